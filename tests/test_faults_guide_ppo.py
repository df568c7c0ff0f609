"""Training the guide, killed at random moments: it goes on, loses a rollout at most for each kill, and ends whole."""

import functools
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from conftest import kept, shorter

from pgdlib.lab import guide_ppo, load, resumable
from pgdlib.simulators import pen

FAULTS, MOST = 20, 4  # all, and in one training
ROLLOUTS, ENVS, STEPS = 20, 8, 16
EVERY = 8 * STEPS * ENVS
fork = multiprocessing.get_context("fork")


@pytest.fixture
def taken(monkeypatch):
    """A guide that trains in seconds, with a checkpoint after each rollout, on a slow disk.

    Counts the steps of its rollouts, in all processes.
    """
    taken, fsync, step_wait = multiprocessing.RawValue("l"), os.fsync, guide_ppo.SimulatorVecEnv.step_wait

    def step(self):
        result = step_wait(self)
        taken.value += 1
        return result

    def slow(file):
        time.sleep(0.03)
        fsync(file)

    small = dict(n_envs=ENVS, n_steps=STEPS, batch_size=32, n_epochs=2, hidden=[16, 16], evaluate_every=EVERY)
    monkeypatch.setattr(guide_ppo, "Training", functools.partial(guide_ppo.Training, **small))
    monkeypatch.setattr(resumable, "run", functools.partial(resumable.run, save_every=0))
    monkeypatch.setattr(guide_ppo.SimulatorVecEnv, "step_wait", step)
    monkeypatch.setattr(os, "fsync", slow)
    monkeypatch.setattr(guide_ppo.evaluation, "__defaults__", (4,))
    shorter(monkeypatch, 6)
    return taken


@pytest.mark.faults
def test_a_killed_training_ends_whole(taken, tmp_path, monkeypatch, told):
    def start(folder):
        monkeypatch.setenv("PGD_RUNS", str(folder))
        child = fork.Process(target=load.train_guide, args=(ROLLOUTS * STEPS * ENVS, 5))
        child.start()
        return child

    def halves_in(folder):
        return set((folder / "checkpoints").glob(".*.partial"))

    def finished(folder):
        """Whether the one guide there, and nothing else, has its whole curve and is what it was evaluated as."""
        (file,) = (f for f in kept(folder) if ".partial" not in f)
        policy, card = load.load_guide(str(folder / file))
        points = [steps for steps, *_ in card["curve"]]
        assert file.startswith("guides/") and points == [0, EVERY, 2 * EVERY, ROLLOUTS * STEPS * ENVS]
        return guide_ppo.evaluation(pen.PEN, policy).items() <= card.items()

    began, whole = time.monotonic(), start(tmp_path / "whole")
    whole.join()
    seconds = time.monotonic() - began
    assert whole.exitcode == 0 and taken.value == ROLLOUTS * STEPS and finished(tmp_path / "whole")
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
        results.append(finished(folder))
    counts = dict(injected=faults, survived=faults, lost=results.count(False))
    told(f"SIGKILL at random moments, PPO ({len(halves)} in the midst of writing)", **counts)
    assert all(results)
    assert all(rollouts <= kills for rollouts, kills in lost), "more than a rollout was lost"
