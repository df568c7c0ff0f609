"""Sweeps that are killed, stopped, short of disk, or lose a machine: what is done is kept, nothing is half-written."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import wait_for
from test_sweep import ROOT, write

pytestmark = pytest.mark.faults
BODY = """import os, pathlib, random, time
folder = pathlib.Path(os.environ["PGD_RUNS"])
with open(folder / "attempts.txt", "a") as f:
    f.write("one\\n")
time.sleep(p.x / 10)
(folder / "results").mkdir()
lines = [f"{random.Random(p.seed * 10_000 + i).random()}" for i in range(2000)]
(folder / "results" / "numbers.csv").write_text("\\n".join(["number", *lines[:1000]]))
time.sleep(p.x / 10)
(folder / "results" / "more.csv").write_text("\\n".join(["number", *lines[1000:]]))"""
POINTS = ["-p", "x", "10", "-y", "seed: [0, 1, 2, 3, 4, 5]"]  # of 2 s and what a kernel takes


@pytest.fixture
def toy(tmp_path):
    return write(tmp_path / "toy.ipynb", body=BODY)


def hear():
    """As in a terminal: what a shell starts in the background, such as these tests, is deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(toy, runs, *arguments, **how):
    """A running sweep of the toy; its lines go to <runs>.log."""
    call = [sys.executable, "-m", "pgdlib.lab.sweep", str(toy), *POINTS, "--out", f"{runs}.parquet", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PGD_RUNS": str(runs)}
    with open(f"{runs}.log", "a") as log:
        how = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, preexec_fn=hear) | how
        return subprocess.Popen(call, env=env, **how)


def said(runs):
    return Path(f"{runs}.log").read_text()


def finish(toy, runs, *arguments):
    """Run the sweep to its end; the frame that it writes."""
    assert start(toy, runs, *arguments).wait(300) == 0, said(runs)
    return measured(runs)


def measured(runs):
    frame = pd.read_parquet(f"{runs}.parquet")
    return frame[["p.seed", "run.table", "run.row", "number"]].sort_values(
        ["p.seed", "run.table", "run.row"], ignore_index=True
    )


def is_done(runs):
    return len(list(Path(runs).glob("points/toy/*/done.json")))


def attempts(runs):
    """How often a point's notebook has begun."""
    return sum(path.read_text().count("one") for path in Path(runs).glob("points/toy/*/attempts.txt"))


def processes(runs):
    """The processes that work for a sweep in the folder `runs`, kernels too: by their environment."""
    found, mark = [], f"PGD_RUNS={runs}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes() and (path.parent / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                found.append(int(path.parent.name))
        except OSError:  # gone, or another user's
            continue
    return found


def leftovers(runs):
    return [path.name for path in Path(runs).rglob("*") if "partial" in path.name or "damaged" in path.name]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The runs of a sweep to which nothing happens; its frame is what it must be."""
    folder = tmp_path_factory.mktemp("undisturbed")
    frame = finish(write(folder / "toy.ipynb", body=BODY), folder / "runs")
    numbers = [random.Random(seed * 10_000 + i).random() for seed in range(6) for i in (*range(1000, 2000), *range(1000))]
    assert np.allclose(frame["number"], numbers, rtol=0, atol=1e-15)
    return folder / "runs"


def killed(toy, runs, ready, seconds):
    """Start the sweep, and kill it at a random moment, at most so many `seconds` after it is `ready()`."""
    sweep = start(toy, runs, "--workers", "2")
    wait_for(ready, 90)
    time.sleep(random.uniform(0, seconds))
    sweep.kill()
    sweep.wait()
    return {path: path.read_text() for path in runs.glob("points/toy/*/done.json")}


def test_killed_twice_at_random_it_gives_what_it_gives_undisturbed(toy, tmp_path, undisturbed, told):
    runs = tmp_path / "killed"
    kept = killed(toy, runs, lambda: is_done(runs) >= 1, 8)  # anywhere
    wait_for(lambda: not processes(runs), 15)
    before = attempts(runs)
    kept |= killed(toy, runs, lambda: attempts(runs) > before, 1.5)  # while a point runs, which takes 2 s
    # The next sweep starts while processes of this one are still there.
    pd.testing.assert_frame_equal(finish(toy, runs), measured(undisturbed))
    assert is_done(runs) == 6 and not leftovers(runs) and not processes(runs)
    assert all(path.read_text() == text for path, text in kept.items()), "what was done was run again"
    assert 6 < attempts(runs) <= 6 + 2 * 2
    told("sweeps killed", injected=2, survived=2, identical=2, lost=0)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_ends_its_children_and_the_same_command_goes_on(toy, tmp_path, undisturbed, how, told):
    runs = tmp_path / "stopped"
    sweep = start(toy, runs, "--workers", "2")
    wait_for(lambda: is_done(runs) >= 1, 90)
    sweep.send_signal(how)
    begun = time.monotonic()
    assert sweep.wait(20) == 128 + how, said(runs)
    assert time.monotonic() - begun < 12
    wait_for(lambda: not processes(runs), 5)
    done = is_done(runs)
    assert 1 <= done < 6 and not leftovers(runs) and not Path(f"{runs}.parquet").exists()
    if how == signal.SIGINT:
        assert said(runs).endswith("stopped; the same command goes on from here\n") and "Traceback" not in said(runs)
    pd.testing.assert_frame_equal(finish(toy, runs), measured(undisturbed))
    assert f"toy: 6 points, {done} of them are done" in said(runs)
    told("sweeps stopped by Ctrl-C or SIGTERM", injected=1, survived=1, identical=1, lost=0)


@pytest.mark.parametrize(("what", "why"), [("sweep.point", "killed by SIGKILL"), ("ipykernel", "its kernel died")])
def test_a_point_whose_process_is_killed_is_run_again(toy, tmp_path, undisturbed, what, why, told):
    runs = tmp_path / "lost"
    sweep = start(toy, runs)
    wait_for(lambda: attempts(runs), 90)
    victim = next(p for p in processes(runs) if what.encode() in Path(f"/proc/{p}/cmdline").read_bytes())
    os.kill(victim, signal.SIGKILL)
    assert sweep.wait(300) == 0, said(runs)
    assert said(runs).count("again   seed=") == 1 and why in said(runs)
    pd.testing.assert_frame_equal(measured(runs), measured(undisturbed))
    told("points of a sweep, or their kernels, killed", injected=1, survived=1, identical=1, lost=0)


def limit(size):
    """No file may grow beyond `size`, as if the disk were full: the system refuses to write."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_points_for_which_the_disk_is_full_fail_and_are_run_when_there_is_room(toy, tmp_path, undisturbed, told):
    runs = tmp_path / "full"
    assert start(toy, runs, preexec_fn=limit(12_000)).wait(300) == 1
    assert said(runs).count("FAILED  seed=") == 6 and "OSError: [Errno 27] File too large" in said(runs)
    assert is_done(runs) == 0
    pd.testing.assert_frame_equal(finish(toy, runs), measured(undisturbed))
    told("no room for a sweep's points or table", injected=6, survived=6, identical=6, lost=0)


def test_a_table_for_which_the_disk_is_full_leaves_the_old_one(toy, tmp_path, undisturbed, told):
    runs = tmp_path / "full"
    pd.DataFrame({"old": [1]}).to_parquet(f"{runs}.parquet")
    sizes = [path.stat().st_size for path in undisturbed.rglob("*") if path.is_file()]
    enough = max(sizes) + 10_000  # for each file of a point, but not for the table of all
    assert Path(f"{undisturbed}.parquet").stat().st_size > 2 * enough
    assert start(toy, runs, preexec_fn=limit(enough)).wait(300) == 1
    assert "stopped: " in said(runs) and "what is done is kept" in said(runs) and "Traceback" not in said(runs)
    assert pd.read_parquet(f"{runs}.parquet")["old"].tolist() == [1] and is_done(runs) == 6
    assert [path.name for path in tmp_path.glob("*partial*")] == []
    pd.testing.assert_frame_equal(finish(toy, runs), measured(undisturbed))
    assert said(runs).count("done    ") == 6  # none of them again
    told("no room for a sweep's points or table", injected=1, survived=1, identical=1, lost=0)


@pytest.fixture
def cluster(monkeypatch):
    """A Ray cluster of two nodes with one core each, on the loopback interface."""
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed: pip install -e '.[cluster]'")
    for attempt in (1, 2, 3):  # Ray gives its own processes 30 s to start, which is too short on a busy machine
        both = ray.Cluster()
        try:
            both.add_node(num_cpus=1, include_dashboard=False)
            node = both.add_node(num_cpus=1)
            break
        except Exception:
            both.shutdown()
            if attempt == 3:
                raise
    yield both, node
    both.shutdown()


def test_a_ray_cluster_may_lose_a_machine(toy, tmp_path, undisturbed, cluster, told):
    both, node = cluster
    runs = tmp_path / "ray"
    sweep = start(toy, runs, "--backend", "ray", "--address", both.address, "-p", "x", "20")  # so long that two overlap
    wait_for(lambda: attempts(runs) >= is_done(runs) + 2 > 2, 180)  # one on each node
    both.remove_node(node, allow_graceful=False)
    assert sweep.wait(300) == 0, said(runs)
    assert "again   seed=" in said(runs) and "lost: " in said(runs)
    pd.testing.assert_frame_equal(measured(runs), measured(undisturbed))
    assert not processes(runs) and not leftovers(runs)
    told("one of two Ray nodes killed in mid-sweep", injected=1, survived=1, identical=1, lost=0)


def test_a_sweep_on_ray_is_stopped_by_ctrl_c(toy, tmp_path, cluster):
    runs = tmp_path / "ray"
    sweep = start(toy, runs, "--backend", "ray", "--address", cluster[0].address)
    wait_for(lambda: is_done(runs) >= 1, 180)
    sweep.send_signal(signal.SIGINT)
    assert sweep.wait(40) == 130, said(runs)
    wait_for(lambda: not processes(runs), 5)
    assert is_done(runs) < 6 and not leftovers(runs)
    assert all(json.loads(p.read_text())["seconds"] > 0 for p in runs.glob("points/toy/*/done.json"))
