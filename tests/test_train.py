"""Training with several processes against one: the same weights; and the command line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import kept
from test_edm import HOW, in_float64, small_denoiser

from pgdlib import edm
from pgdlib.lab import load, store, train

HERE = Path(__file__).parent
WORKER = """
import sys
import torch
import torch.distributed as dist
from test_edm import HOW, in_float64
from pgdlib import edm
from pgdlib.lab import store

torch.set_num_threads(1)
dist.init_process_group("gloo")
checkpoint, result, stop = sys.argv[1], sys.argv[2], int(sys.argv[3])

def report(step, losses):
    if step == stop:
        raise KeyboardInterrupt

try:
    ema, losses = edm.train(*in_float64(), HOW, checkpoint, report=report)
    if dist.get_rank() == 0:
        store.save(result, {**ema.state_dict(), "losses": losses}, {})
except KeyboardInterrupt:
    pass
dist.destroy_process_group()
"""


def torchrun(processes, *arguments, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{HERE.parent}", **environment}
    return subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.notebook
def test_two_processes_give_the_weights_of_one_also_after_an_interruption(tmp_path):
    ema, losses = edm.train(*in_float64(), HOW)
    script, checkpoint, result = (tmp_path / name for name in ("worker.py", "c.safetensors", "r.safetensors"))
    script.write_text(WORKER)
    torchrun(2, script, checkpoint, result, 7)
    assert edm.steps_done(checkpoint) == 7 and not result.exists()
    ran = torchrun(2, script, checkpoint, result, 0)
    assert ran.returncode == 0, ran.stderr
    found, _ = store.load(result)
    torch.testing.assert_close(found.pop("losses"), losses, rtol=1e-5, atol=0)
    untrained, moved = small_denoiser().double().state_dict(), 0
    for name, value in ema.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9)
        moved = max(moved, (value - untrained[name]).abs().max().item())
    assert moved > 1e-3


@pytest.mark.notebook
def test_the_command_trains_what_a_notebook_finds(runs, monkeypatch, tmp_path):
    """With two processes, which make data and model once; then one process finds all, and so does `load_denoiser`."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags = ["--dataset", "human", "--scale", "ci", "--source", "local", "--train-steps", "6", "--seed", "3"]
    ran = torchrun(2, "-m", "pgdlib.lab.train", *flags)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("6 training steps") == 1 and not [f for f in kept(runs) if f.startswith("checkpoints")]
    files = kept(runs)
    p = train.parse(flags)
    monkeypatch.setattr(edm, "train", None)
    train.main(flags)
    denoiser, losses = load.load_denoiser(load.load_data("human", "local", p.data_steps), p, torch.device("cpu"))
    assert kept(runs) == files and len(losses) == 6 and denoiser.config["features"] == 16


@pytest.mark.parametrize(
    "flags, message",
    {
        "value": ("--dataset humn", r"dataset='humn' is not allowed; it must be one of 'human', 'cloned', 'expert'"),
        "size": ("--batch-size 0", r"batch_size=0 is not allowed; it must be a whole number of at least|batch_size=0.*from 1"),
        "name": ("--epoch 3", r"--epoch 3; allowed are --help, --dataset, --scale"),
        "nothing": ("--seed", r"--seed.*expected one argument; allowed are"),
        "stray": ("cloned", r"cloned; allowed are --help, --dataset"),
    }.values(),
)
def test_bad_arguments_end_with_one_line(runs, flags, message):
    with pytest.raises(SystemExit) as end:
        train.main(flags.split())
    assert re.search(message, end.value.code) and "\n" not in end.value.code and kept(runs) == []


def test_more_processes_than_windows_are_refused(monkeypatch):
    monkeypatch.setattr(edm, "processes", lambda: (0, 6))
    with pytest.raises(ValueError, match="batch_size=5 is not allowed with 6 processes"):
        edm.train(*in_float64(), HOW)
