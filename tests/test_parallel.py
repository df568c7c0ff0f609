"""Training with several processes against one: the same weights; and the command line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import kept, toy

from pgdlib import data, edm
from pgdlib.lab import load, models, parallel

HERE = Path(__file__).parent
WORKER = """
import sys
import torch
import torch.distributed as dist
from test_parallel import training
from pgdlib.lab import parallel

dist.init_process_group("gloo")
if dist.get_rank():
    parallel.serve(torch.device("cpu"))
else:
    ours = training(parallel.Shared)
    list(ours)
    parallel._say()
    torch.save([ours.losses, *ours.ema.state_dict().values()], sys.argv[1])
parallel._leave()
"""


def training(kind):
    """Twelve steps of batches of five, in double precision, in which the order of a sum hardly matters."""
    torch.manual_seed(0)
    denoiser = edm.Denoiser(45, 24, 8, 16, 2)
    windows = data.Windows(toy([20, 30]), denoiser.normaliser.fit(toy([20, 30]).packed()), 8)
    windows.steps = windows.steps.double()
    return kind(denoiser.double(), windows, edm.Recipe(12, 5, 1e-2))


def torchrun(processes, *arguments):
    readme = (HERE.parent / "README.md").read_text("utf-8")
    how = re.search(r"^torchrun (.* --nproc-per-node) ", readme, re.MULTILINE)[1].split()
    command = [sys.executable, "-m", "torch.distributed.run", *how, str(processes), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{HERE.parent}"}
    return subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.notebook
@pytest.mark.parametrize("processes", [2, 6])
def test_several_processes_give_the_weights_of_one(tmp_path, processes):
    """Of six one has no window of the batch of five."""
    one = training(edm.Training)
    untrained = [v.clone() for v in one.ema.state_dict().values()]
    list(one)
    (tmp_path / "worker.py").write_text(WORKER)
    ran = torchrun(processes, tmp_path / "worker.py", tmp_path / "weights.pt")
    assert ran.returncode == 0, ran.stderr
    losses, *found = torch.load(tmp_path / "weights.pt")
    torch.testing.assert_close(losses, one.losses, rtol=1e-6, atol=0)
    for value, expected in zip(found, one.ema.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-9)
    assert max((a - b).abs().max() for a, b in zip(found, untrained)) > 1e-2


@pytest.mark.notebook
def test_the_command_trains_what_a_notebook_finds(runs, monkeypatch, tmp_path):
    """With two processes, which make data and model once; then one process finds all, and so does `load_denoiser`."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags = ["--dataset=human", "--scale=ci", "--source=local", "--train-steps=6", "--seed=3", "--optimiser=adam"]
    ran = torchrun(2, "-m", "pgdlib.lab.parallel", *flags)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("6 training steps") == 1 and not [f for f in kept(runs) if f.startswith("checkpoints")]
    files = kept(runs)
    parallel.main(flags)
    monkeypatch.setattr(edm, "Training", None)
    p = parallel.parse(flags)
    denoiser, losses, _ = models.load_denoiser(load.load_data("human", "local", p.data_steps), p, torch.device("cpu"))
    assert kept(runs) == files and len(losses) == 6 and denoiser.config["features"] == 16


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--dataset humn", "parameter dataset='humn' is not allowed; it must be one of 'human', 'cloned', 'expert'"),
        ("--batch-size 0", "parameter batch_size=0 is not allowed; it must be a whole number from 1 to"),
        ("--epoch 3", "unrecognized arguments: --epoch 3"),
        ("--seed", "argument --seed: expected one argument"),
    ],
)
def test_bad_arguments_are_named(runs, capsys, flags, message):
    with pytest.raises((SystemExit, ValueError)) as end:
        parallel.main(flags.split())
    assert message in str(end.value) + capsys.readouterr().err and kept(runs) == []
