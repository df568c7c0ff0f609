"""Training the guide, killed at random moments: it goes on, loses a rollout at most, and ends as if never killed."""

import functools
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from conftest import kept

from pgdlib.lab import artifacts, pipeline, ppo
from pgdlib.simulators import pen as adroit

FAULTS, MOST = 20, 4  # all, and in one training
ROLLOUTS, ENVS, STEPS = 20, 8, 16
fork = multiprocessing.get_context("fork")


@pytest.fixture
def taken(monkeypatch):
    """A guide that trains in seconds, with a checkpoint before each rollout, on a slow disk.

    Counts the steps of its rollouts, in all processes.
    """
    fsync = os.fsync
    taken, train, step_wait = multiprocessing.RawValue("l"), ppo.train, ppo.PenVecEnv.step_wait

    def step(self):
        result = step_wait(self)
        taken.value += 1
        return result

    def slow(file):
        time.sleep(0.03)
        fsync(file)

    small = dict(n_envs=ENVS, n_steps=STEPS, batch_size=32, n_epochs=2, hidden=[16, 16])
    often = functools.partial(train, evaluate_every=8 * STEPS * ENVS, save_every=0, **small)
    monkeypatch.setattr(ppo, "train", often)
    monkeypatch.setattr(ppo.PenVecEnv, "step_wait", step)
    monkeypatch.setattr(os, "fsync", slow)
    monkeypatch.setattr(pipeline._evaluation, "__defaults__", (4,))
    monkeypatch.setattr(adroit, "D4RL_HORIZON", 6)
    return taken


@pytest.mark.faults
def test_a_killed_training_ends_as_if_never_killed(taken, tmp_path, monkeypatch, told):
    def start(folder):
        monkeypatch.setenv("PGD_RUNS", str(folder))
        child = fork.Process(target=pipeline.train_guide, args=(ROLLOUTS * STEPS * ENVS, 5))
        child.start()
        return child

    def halves_in(folder):
        return set((folder / "checkpoints").glob(".*.partial"))

    def result(folder):
        """The digest of the one guide there, with its curve and evaluation, and of nothing else."""
        (file,) = (f for f in kept(folder) if ".partial" not in f)
        assert file.startswith("guides/")
        return artifacts.digest(*artifacts.load(folder / file))

    began, whole = time.monotonic(), start(tmp_path / "whole")
    whole.join()
    seconds, expected = time.monotonic() - began, result(tmp_path / "whole")
    assert whole.exitcode == 0 and taken.value == ROLLOUTS * STEPS
    rng, faults, halves, lost, results = np.random.default_rng(), 0, set(), [], []
    while faults < FAULTS:
        folder, kills, taken.value, code = tmp_path / f"killed-{len(results)}", 0, 0, None
        while code != 0:
            child = start(folder)
            child.join(rng.uniform(0, seconds) if faults < FAULTS and kills < MOST else None)
            while faults % 2 and child.is_alive() and not (halves_in(folder) - halves):  # each other one while it writes
                time.sleep(0.002)
            child.kill()
            child.join()
            code = child.exitcode
            assert code in (0, -signal.SIGKILL), "it did not survive the fault before"
            faults, kills = faults + (code != 0), kills + (code != 0)
            halves |= halves_in(folder)
        lost.append((taken.value / STEPS - ROLLOUTS, kills))
        results.append(result(folder))
    identical = results.count(expected)
    counts = dict(injected=faults, survived=faults, identical=faults if identical == len(results) else 0)
    told(f"SIGKILL at random moments, PPO ({len(halves)} in the midst of writing)", **counts, lost=len(results) - identical)
    assert set(results) == {expected}
    assert all(rollouts <= kills for rollouts, kills in lost), "more than a rollout was lost"
