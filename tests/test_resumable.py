"""One matrix for all trainings: killed, cancelled, without room, or with a bad checkpoint, each ends with the same bits.

A line in `LOOPS` adds a training: a function that makes a fresh loop, of which two train alike.
"""

import errno
import multiprocessing
import os
import signal
import time
import warnings

import pytest
import torch
from conftest import cut, kept
from torch import nn

from pgdlib.lab import artifacts, resumable

fork = multiprocessing.get_context("fork")


class Walk:
    """A random walk of which step n is drawn from a generator of its own."""

    def __init__(self, steps=12, scale=1.0):
        self.step, self.steps, self.card = 0, steps, dict(name="walk", steps=steps, scale=scale, numbers=(1, 2))
        self.x = torch.zeros(3)

    def state(self):
        return {"x": self.x}

    def __iter__(self):
        while self.step < self.steps:
            self.x += self.card["scale"] * torch.randn(3, generator=torch.Generator().manual_seed(self.step))
            self.step += 1
            yield self.step


class Regression:
    """A network, Adam with its moments, and a record of losses: parameters that require gradients are in the state."""

    def __init__(self):
        torch.manual_seed(0)
        self.step, self.steps, self.card = 0, 12, dict(name="regression")
        self.net, self.losses = nn.Linear(3, 1), torch.zeros(12)
        self.adam = torch.optim.Adam(self.net.parameters(), 0.1)
        for p in self.net.parameters():
            self.adam.state[p] = dict(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))

    def state(self):
        moments = {f"{i}.{k}": v for i, s in enumerate(self.adam.state.values()) for k, v in s.items()}
        return {"losses": self.losses, **dict(self.net.named_parameters()), **moments}

    def __iter__(self):
        while self.step < self.steps:
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(self.step))
            loss = (self.net(x).squeeze() - x.sum(1)).square().mean()
            self.adam.zero_grad()
            loss.backward()
            self.adam.step()
            self.losses[self.step] = loss.detach()
            self.step += 1
            yield self.step


LOOPS = dict(walk=Walk, regression=Regression)


class Stop(Exception):
    """Raised in reports."""


def stopping(at, error=Stop):
    """A report that raises at this step."""

    def report(step):
        if step == at:
            raise error

    return report


@pytest.fixture(params=LOOPS)
def make(request):
    return LOOPS[request.param]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "loop.safetensors"


def result(loop, *arguments, **named):
    """The digest of all that a loop has made when it ends."""
    resumable.run(loop, *arguments, **named)
    assert loop.step == loop.steps
    return artifacts.digest(loop.state())


def assert_goes_on(make, path, after, expected, **named):
    """A fresh loop begins after a step, and ends as one that was never stopped."""
    steps = []
    assert result(make(), path, steps.append, **named) == expected
    assert steps == [*range(after + 1, make().steps + 1)]


def test_without_a_path_nothing_is_kept(make, tmp_path):
    assert_goes_on(make, None, 0, result(make()))
    assert kept(tmp_path) == []


@pytest.mark.parametrize("save_every", [-1.0, 1e9], ids=["always saved", "never saved"])
def test_a_finished_training_keeps_its_checkpoint(make, path, save_every):
    expected = result(make())
    assert result(make(), path, save_every=save_every) == expected
    assert_goes_on(make, path, make().steps if save_every < 0 else 0, expected)


@pytest.mark.parametrize("at", [1, 5, 11])
def test_killed_it_goes_on_from_the_last_checkpoint(make, path, at):
    def kill(step):
        if step == at:
            os.kill(os.getpid(), signal.SIGKILL)

    expected = result(make())
    process = fork.Process(target=lambda: resumable.run(make(), path, kill, -1.0))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert_goes_on(make, path, at - 1, expected)


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, SystemExit])
def test_cancelled_it_has_lost_nothing(make, path, error):
    expected = result(make())
    for at in (2, 7):
        with pytest.raises(error):
            resumable.run(make(), path, stopping(at, error))
    assert_goes_on(make, path, 7, expected)


def test_it_is_saved_every_so_many_seconds(make, path, monkeypatch):
    now, saved = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(resumable, "save", lambda path, state, card: saved.append(card["step"]))
    resumable.run(make(), path, lambda step: now.__setitem__(0, now[0] + 30))
    assert saved == [4, 8, 12]


def of_another(path):
    resumable.run(Walk(scale=0.5), path, save_every=-1.0)


def rewritten(tensors=lambda t: t, card=lambda c: c, name="loop.safetensors"):
    """A function that saves a checkpoint with other tensors, another card, or under another name."""

    def spoil(path):
        found = artifacts.load(path)
        artifacts.save(path.with_name(name), tensors(found[0]), card(found[1]))
        path.with_name(name).rename(path)

    return spoil


of_other_types = rewritten(tensors=lambda found: {k: t.double() for k, t in found.items()})
of_fewer_tensors = rewritten(tensors=lambda found: dict(list(found.items())[1:]))
of_no_step = rewritten(card=lambda card: {**card, "step": None})
of_another_name = rewritten(name="other.safetensors")
SPOILT = [cut, of_another, of_other_types, of_fewer_tensors, of_no_step, of_another_name, lambda p: p.write_text("x")]


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_bad_checkpoint_is_set_aside_and_training_begins_anew(make, path, spoil):
    expected, said = result(make()), []
    with pytest.raises(Stop):
        resumable.run(make(), path, stopping(5))
    if spoil is of_another:
        path.unlink()
    spoil(path)
    bad = path.read_bytes()
    assert_goes_on(make, path, 0, expected, say=said.append)
    (aside,) = path.parent.glob("*.damaged")
    assert aside.read_bytes() == bad and aside.name in said[0] and "training begins anew" in said[0]


def test_what_is_set_aside_changed_nothing(path):
    for tensors in ({"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(3, 2)}):
        artifacts.save(path, tensors, {"name": "x", "step": 3})
        state = {"a": torch.zeros(2), "b": torch.zeros(2, 3)}
        assert resumable.restore(path, state, {"name": "x"}) == 0 and not path.exists()
        assert not any(t.any() for t in state.values())


@pytest.fixture
def disk(monkeypatch):
    """A disk that is full while `disk["full"]`."""
    state, save = {"full": False}, artifacts.save

    def limited(path, *given):
        if state["full"]:
            raise artifacts.NotSaved(errno.ENOSPC, f"{path} cannot be written: No space left on device")
        save(path, *given)

    monkeypatch.setattr(artifacts, "save", limited)
    return state


def test_it_goes_on_where_a_checkpoint_cannot_be_written(make, path, disk):
    """With one warning for each time that the disk is full; stopped then, it goes on from the last one that was written."""
    expected = result(make())

    def report(step):
        disk["full"] = step in (3, 4, 5, 8, 9, 10)
        stopping(10)(step)

    with pytest.warns(RuntimeWarning) as warned, pytest.raises(Stop):
        resumable.run(make(), path, report, -1.0)
    assert len(warned) == 2 and all("No space left" in str(w.message) and str(path) in str(w.message) for w in warned)
    disk["full"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_goes_on(make, path, 7, expected, save_every=-1.0)
