"""A disk that cannot take a checkpoint, and files that are none: no training ends by them, and none comes to another result."""

import errno
import warnings

import pytest
import torch
from conftest import cut, toy
from test_edm import small_denoiser, training_windows
from test_pgd import FILES, Killed, Noted, Stop, assert_same, learner, run, stopping, whole
from test_worldmodel import how, small

from pgdlib import edm, pgd, worldmodel
from pgdlib.lab import checkpoints, load, store


@pytest.fixture
def disk(monkeypatch):
    """A disk that is full while `disk["full"]`."""
    state, save = {"full": False}, store.save

    def limited(path, tensors, card):
        if state["full"]:
            raise store.NotSaved(errno.ENOSPC, f"{path} cannot be written: No space left on device (9 MB needed, 1 MB free)")
        save(path, tensors, card)

    monkeypatch.setattr(store, "save", limited)
    return state


def train_denoiser(path, report):
    return edm.train(small_denoiser(), training_windows(), edm.Training(12, 4, 1e-3), path, 0.0, report)[0]


def train_world_model(path, report):
    model = small()
    worldmodel.train(model, toy([30, 30]), toy([30, 30]), how(12), path, 0.0, report)
    return model


@pytest.mark.parametrize("train", [train_denoiser, train_world_model])
def test_training_goes_on_where_a_checkpoint_cannot_be_written(train, disk, tmp_path):
    """With one warning for each time that the disk is full; killed then, it goes on from the last one that was written."""
    expected, path = train(None, lambda step, losses: None), tmp_path / "c.safetensors"

    def report(step, losses):
        disk["full"] = step in (3, 4, 5, 8, 9, 10)
        if step == 10:
            assert store.load(path)[1]["step"] == 7
            raise Stop

    with pytest.warns(RuntimeWarning) as warned, pytest.raises(Stop):
        train(path, report)
    assert len(warned) == 2 and all("No space left" in str(w.message) and str(path) in str(w.message) for w in warned)
    steps = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        disk["full"] = False
        again = train(path, lambda step, losses: steps.append(step))
    assert steps == [8, 9, 10, 11, 12]
    for (name, a), b in zip(expected.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_agents_go_on_where_neither_checkpoint_nor_data_can_be_written(disk, tmp_path, monkeypatch):
    monkeypatch.setattr(pgd, "LONG", -1.0)
    expected, path, agent = whole("iql"), tmp_path / "it.safetensors", learner("iql")
    disk["full"] = True
    with pytest.warns(RuntimeWarning, match="No space left"):
        found = run(agent, Noted(), checkpoint=path, save_every=-1.0)
    assert_same((*found, agent), expected)
    assert [f for f in tmp_path.iterdir() if not f.name.endswith(".lock")] == []


def test_data_that_were_drawn_are_kept_while_a_new_checkpoint_cannot_be_written(disk, tmp_path, monkeypatch):
    monkeypatch.setattr(pgd, "LONG", -1.0)
    expected, path, sources = whole("iql"), tmp_path / "it.safetensors", Killed()

    def report(step):
        disk["full"] = step == 5  # as a round ends
        if step == 6:
            raise Stop

    with pytest.warns(RuntimeWarning), pytest.raises(Stop):
        run(learner("iql"), Killed(("b", 1)), checkpoint=path, save_every=1e9, report=report)
    assert store.load(path)[1]["step"] == 0 and all((tmp_path / name).exists() for name in FILES)
    disk["full"], agent = False, learner("iql")
    found = run(agent, sources, checkpoint=path, save_every=1e9)
    assert_same((*found, agent), expected)
    assert ("b", 0) not in sources.drawn


def of_another_run(path):
    other = learner("iql")
    other.learning_rate = 0.5
    run(other, Noted(), checkpoint=path, save_every=-1.0)


def of_another_stack(path):
    store.save(path, *learner("bc").state())


def without_marks(path):
    tensors, card = store.load(path)
    store.save(path, tensors, {**card, "marks": []})


@pytest.mark.parametrize("spoil", [cut, of_another_run, of_another_stack, without_marks, lambda p: p.write_text("x")])
def test_a_bad_checkpoint_of_agents_is_set_aside(spoil, tmp_path, capsys):
    expected, path, steps, agent = whole("iql"), tmp_path / "it.safetensors", [], learner("iql")
    with pytest.raises(Stop):
        run(learner("iql"), Noted(), checkpoint=path, save_every=-1.0, report=stopping(7))
    if spoil is of_another_run:
        path.unlink()
    spoil(path)
    bad = path.read_bytes()
    found = run(agent, Noted(), checkpoint=path, save_every=-1.0, report=steps.append)
    assert_same((*found, agent), expected)
    (aside,) = tmp_path.glob("*.damaged")
    assert steps[0] == 1 and aside.read_bytes() == bad and aside.name in capsys.readouterr().out


def test_what_is_set_aside_changed_nothing(tmp_path):
    path = tmp_path / "c.safetensors"
    for tensors in (
        {"a": torch.ones(2)},
        {"a": torch.ones(2), "b": torch.ones(3, 2)},
        {"a": torch.ones(2), "b": torch.ones(6)},
    ):
        store.save(path, tensors, {"name": "x", "step": 3})
        state = {"a": torch.zeros(2), "b": torch.zeros(2, 3)}
        assert checkpoints.restore(path, state, {"name": "x"}) == 0 and not path.exists()
        assert not any(t.any() for t in state.values())
    store.save(path, {"a": torch.ones(2), "b": torch.ones(2, 3)}, {"name": "x", "step": 3})
    assert checkpoints.restore(path, state, {"name": "x"}) == 3 and all(t.all() for t in state.values())


def test_a_full_disk_at_the_end_costs_no_training(disk, runs, monkeypatch):
    """The result cannot be kept: a clear error; the next run goes on from the checkpoint."""
    from test_load_models import CPU, dataset, settings

    def report(step, losses):
        disk["full"] = step == 4

    train, steps = edm.train, []
    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning), pytest.raises(store.NotSaved, match="9 MB needed"):
        patch.setattr(edm, "train", lambda *a, **k: train(*a, save_every=0.0, report=report))
        load.load_denoiser(dataset(), settings(), CPU)
    disk["full"] = False
    monkeypatch.setattr(edm, "train", lambda *a, **k: train(*a, report=lambda step, losses: steps.append(step)))
    load.load_denoiser(dataset(), settings(), CPU)
    assert steps == [4]
