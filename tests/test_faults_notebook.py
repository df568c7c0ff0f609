"""A notebook whose kernel dies in the middle says so, and the next run of it ends as one to which nothing happens."""

import os
import subprocess
import sys

import psutil
import pytest
from conftest import kept, wait_for
from test_notebooks import ROOT

pytestmark = pytest.mark.faults
PARAMETERS = dict(scale="ci", dataset="human", source="local", train_steps="60", samples="6")


def start(runs, log):
    call = [sys.executable, "-m", "papermill", "-k", "python3", "--no-progress-bar"]
    call += [word for pair in PARAMETERS.items() for word in ("-p", *pair)]
    env = {"PGD_RUNS": str(runs), "JUPYTER_PREFER_ENV_PATH": "1", "OMP_NUM_THREADS": "1"}
    notebook, output = ROOT / "notebooks" / "02_diffusion.ipynb", runs.with_suffix(".ipynb")
    with open(log, "a") as f:
        how = dict(env=os.environ | env, stdin=subprocess.DEVNULL, stdout=f, stderr=f)
        return subprocess.Popen([*call, str(notebook), str(output)], **how)


def tables(runs):
    return {path.name: path.read_bytes() for path in sorted((runs / "figures" / "ci").glob("*.csv"))}


def kill_kernel(process, ready):
    """SIGKILL to the kernel as soon as `ready()`."""
    wait_for(lambda: process.poll() is not None or ready(), 180)
    assert process.poll() is None, "it ended before it could be disturbed"
    kernels = [c for c in psutil.Process(process.pid).children(recursive=True) if "ipykernel_launcher" in " ".join(c.cmdline())]
    assert len(kernels) == 1
    kernels[0].kill()
    return process.wait(60)


def test_a_dead_kernel_costs_nothing_that_was_made(tmp_path, told):
    calm, runs, log = tmp_path / "calm", tmp_path / "runs", tmp_path / "log"
    assert start(calm, log).wait(300) == 0, log.read_text()
    expected = tables(calm)
    assert len(expected) >= 4
    made = {}
    # While the data are there and the model is not yet; while the model is there and the last figure is not yet.
    for kind in ("data", "denoisers"):
        code = kill_kernel(start(runs, log), lambda kind=kind: any(runs.glob(f"{kind}/*.safetensors")))
        assert code != 0 and "Kernel died" in log.read_text()
        assert len(tables(runs)) < len(expected)
        found = {path: path.stat().st_mtime_ns for path in runs.glob("*/*.safetensors") if path.parent.name != "checkpoints"}
        assert made.items() <= found.items() and any(path.parent.name == kind for path in found)
        made = found
    assert start(runs, log).wait(300) == 0, log.read_text()
    assert tables(runs) == expected
    assert {path: path.stat().st_mtime_ns for path in made} == made, "what was whole has been made again"
    assert not [name for folder in ("data", "denoisers", "figures/ci") for name in kept(runs / folder) if "damaged" in name]
    told("kernels killed in mid-notebook", injected=2, survived=2, identical=2, lost=0)
