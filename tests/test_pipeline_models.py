"""The models of the notebooks: trained once, found again, trained anew for other inputs, and never used when damaged."""

import functools
from types import SimpleNamespace

import pytest
import torch
from conftest import cut, kept, toy

from pgdlib import edm, worldmodel
from pgdlib.lab import params, pipeline, store, table1

CPU = torch.device("cpu")


def dataset(key="toy-1", seed=0):
    trajectories = toy([40, 30, 50, 20, 40, 20, 30, 40, 50, 40], seed)
    return pipeline.Dataset(trajectories, trajectories, False, key, 0, 0)


def assert_same(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for (name, mine), theirs in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


# The denoiser


def settings(**changes):
    own = dict(transform="raw", seed=0, scale="ci", train_steps=4, batch_size=4, features=8, horizon=8)
    return SimpleNamespace(**{**params.settings("ci"), **own, **changes})


def counted(monkeypatch, module):
    """The calls of `module.train`, which goes on to work."""
    calls, train = [], module.train
    monkeypatch.setattr(module, "train", lambda *a, **k: calls.append(a) or train(*a, **k))
    return calls


@pytest.fixture
def trainings(monkeypatch):
    """The denoiser trainings that took place."""
    return counted(monkeypatch, edm)


def test_a_denoiser_is_trained_once(runs, trainings):
    torch.manual_seed(1)
    first, losses = pipeline.load_denoiser(dataset(), settings(), CPU)
    torch.manual_seed(2)
    again, losses_again = pipeline.load_denoiser(dataset(), settings(), CPU)
    assert len(trainings) == 1 and torch.equal(losses, losses_again) and losses.shape == (4,)
    assert_same(first, again)
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    (file,) = kept(runs)
    assert file.startswith("denoisers/toy-1-ci-")
    train, val = pipeline.train_val(dataset())
    torch.testing.assert_close(again.normaliser.mean[:69], train.packed().mean(0)[:69], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(again.normaliser.mean[:69], toy([1]).packed().mean(0)[:69]) and len(val.lengths) == 1
    (runs / file).unlink()
    torch.manual_seed(3)
    assert_same(first, pipeline.load_denoiser(dataset(), settings(), CPU)[0])  # the global random state does not enter


def test_every_input_makes_another_denoiser(runs, trainings):
    changes = dict(
        horizon=12,
        features=16,
        blocks=1,
        kernel_size=5,
        train_steps=5,
        batch_size=5,
        learning_rate=2e-3,
        transform="arctanh",
        seed=1,
    )
    pipeline.load_denoiser(dataset(), settings(), CPU)
    for key, value in changes.items():
        denoiser, _ = pipeline.load_denoiser(dataset(), settings(**{key: value}), CPU)
        assert denoiser.config.get(key, value) == value
    pipeline.load_denoiser(dataset("toy-2", seed=1), settings(), CPU)
    assert len(trainings) == len(kept(runs)) == len(changes) + 2


def test_epochs_give_the_steps_where_none_are_set(runs):
    train, _ = pipeline.train_val(dataset())
    _, losses = pipeline.load_denoiser(dataset(), settings(train_steps=None, epochs=2), CPU)
    assert len(losses) == round(2 * len(train.rewards) / (8 * 4))


def test_a_damaged_denoiser_is_set_aside_and_trained_again(runs, trainings, capsys):
    first, _ = pipeline.load_denoiser(dataset(), settings(), CPU)
    (file,) = kept(runs)
    (runs / file).write_bytes((runs / file).read_bytes()[:-5])
    again, _ = pipeline.load_denoiser(dataset(), settings(), CPU)
    assert_same(first, again)
    assert len(trainings) == 2 and file in capsys.readouterr().out and len(kept(runs)) == 2


def interrupt_training(runs):
    """A training of four steps that was interrupted in its third; its checkpoint."""

    def interrupt(step, losses):
        if step == 3:
            raise KeyboardInterrupt

    train = functools.partial(edm.train, save_every=0.0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(edm, "train", lambda *a, report: train(*a, report=interrupt))
        pipeline.load_denoiser(dataset(), settings(), CPU)
    (checkpoint,) = kept(runs)
    assert checkpoint.startswith("checkpoints/")
    return runs / checkpoint


def test_an_interrupted_training_goes_on(runs, monkeypatch):
    interrupt_training(runs)
    steps, train = [], edm.train
    with monkeypatch.context() as patch:
        patch.setattr(edm, "train", lambda *a, report: train(*a, report=lambda step, losses: steps.append(step)))
        resumed, _ = pipeline.load_denoiser(dataset(), settings(), CPU)
    assert steps == [4]  # what was raised by the report of a step did not lose it
    (file,) = kept(runs)  # the checkpoint is gone
    (runs / file).unlink()
    assert_same(resumed, pipeline.load_denoiser(dataset(), settings(), CPU)[0])


def test_a_damaged_checkpoint_is_set_aside_and_training_begins_anew(runs, capsys):
    cut(interrupt_training(runs))
    first, _ = pipeline.load_denoiser(dataset(), settings(), CPU)
    aside, file = kept(runs)
    assert aside.startswith("checkpoints/") and aside.endswith(".damaged") and aside.split("/")[1] in capsys.readouterr().out
    (runs / file).unlink()
    assert_same(first, pipeline.load_denoiser(dataset(), settings(), CPU)[0])


# The world model


def model_settings(**changes):
    """Little enough to be trained in no time."""
    return SimpleNamespace(**{**params.settings("ci"), **dict(scale="ci", seed=0, model_steps=3), **changes})


@pytest.fixture
def model_trainings(monkeypatch):
    """The world model trainings that took place."""
    return counted(monkeypatch, worldmodel)


def test_a_world_model_is_trained_once(runs, model_trainings):
    torch.manual_seed(1)
    first, losses, seconds = pipeline.load_world_model(dataset(), model_settings(), CPU)
    torch.manual_seed(2)
    again, losses_again, seconds_again = pipeline.load_world_model(dataset(), model_settings(), CPU)
    assert len(model_trainings) == 1 and torch.equal(losses, losses_again) and losses.shape == (3,)
    assert losses.isfinite().all() and 0 < seconds == seconds_again < 60
    assert_same(first, again)
    assert not any(p.requires_grad for p in again.parameters())
    (file,) = kept(runs)  # no checkpoint is left
    assert file.startswith("worldmodels/toy-1-ci-")
    (runs / file).unlink()
    torch.manual_seed(3)
    assert_same(first, pipeline.load_world_model(dataset(), model_settings(), CPU)[0])  # the global random state does not enter


def test_a_world_model_sees_the_training_side_and_is_chosen_on_the_other(runs, model_trainings):
    """Its statistics are those of the training episodes; its elites err least on the validation episodes."""
    ensemble, _, _ = pipeline.load_world_model(dataset(), model_settings(), CPU)
    train, val = pipeline.train_val(dataset())
    ((_, given_train, given_val, how, _),) = model_trainings
    assert torch.equal(given_train.packed(), train.packed()) and torch.equal(given_val.packed(), val.packed())
    assert how.steps == 3 and len(train.lengths) == 9 and len(val.lengths) == 1
    torch.testing.assert_close(ensemble.mean[:45], train.obs.mean(0), rtol=1e-4, atol=1e-5)
    errors = worldmodel.validation_error(ensemble, val).mean(1)
    assert ensemble.elites.tolist() == errors.argsort()[:5].tolist() != [*range(5)]


def test_every_input_makes_another_world_model(runs, model_trainings):
    first, _, _ = pipeline.load_world_model(dataset(), model_settings(), CPU)
    others = [pipeline.load_world_model(dataset(), model_settings(**c), CPU) for c in (dict(model_steps=4), dict(seed=1))]
    others.append(pipeline.load_world_model(dataset("toy-2", seed=1), model_settings(), CPU))
    assert len(model_trainings) == len(kept(runs)) == 4
    assert [len(losses) for _, losses, _ in others] == [4, 3, 3]
    assert not any(torch.equal(first.weights[0], other.weights[0]) for other, _, _ in others)
    pipeline.load_world_model(dataset(), model_settings(horizon=4, features=32, samples=3, train_steps=9), CPU)
    assert len(model_trainings) == 4  # what is the denoiser's or the sampler's makes no other


def test_a_damaged_world_model_is_set_aside_and_trained_again(runs, model_trainings, capsys):
    first, _, _ = pipeline.load_world_model(dataset(), model_settings(), CPU)
    (file,) = kept(runs)
    (runs / file).write_bytes((runs / file).read_bytes()[:-5])
    assert_same(first, pipeline.load_world_model(dataset(), model_settings(), CPU)[0])
    assert len(model_trainings) == 2 and file in capsys.readouterr().out and len(kept(runs)) == 2


def test_an_interrupted_training_of_the_world_model_goes_on(runs, monkeypatch):
    steps, train = [], worldmodel.train

    def interrupt(step, losses):
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(worldmodel, "train", lambda *a, report: train(*a, save_every=0.0, report=interrupt))
        pipeline.load_world_model(dataset(), model_settings(), CPU)
    (checkpoint,) = kept(runs)
    assert checkpoint.startswith("checkpoints/world-toy-1-ci-")
    with monkeypatch.context() as patch:
        patch.setattr(worldmodel, "train", lambda *a, report: train(*a, report=lambda step, losses: steps.append(step)))
        resumed, _, _ = pipeline.load_world_model(dataset(), model_settings(), CPU)
    assert steps == [2, 3]
    (file,) = kept(runs)  # the checkpoint is gone
    (runs / file).unlink()
    assert_same(resumed, pipeline.load_world_model(dataset(), model_settings(), CPU)[0])


@pytest.mark.parametrize("load, given", [("load_denoiser", settings), ("load_world_model", model_settings)])
def test_killed_while_it_is_saved_nothing_is_trained_again(load, given, runs, monkeypatch):
    steps, save = [], store.save
    module = edm if load == "load_denoiser" else worldmodel
    train = module.train

    def killed(path, tensors, card):
        if path.parent.name != "checkpoints":
            raise KeyboardInterrupt
        save(path, tensors, card)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "train", lambda *a, report: train(*a, save_every=0.0, report=report))
        patch.setattr(store, "save", killed)
        getattr(pipeline, load)(dataset(), given(), CPU)
    (checkpoint,) = kept(runs)
    assert checkpoint.startswith("checkpoints/")
    last = store.load(runs / checkpoint)[1]["step"]
    monkeypatch.setattr(module, "train", lambda *a, report: train(*a, report=lambda step, losses: steps.append(step)))
    resumed = getattr(pipeline, load)(dataset(), given(), CPU)[0]
    assert last > 1 and steps == [*range(last + 1, len(steps) + last + 1)] and len(steps) <= 1
    (file,) = kept(runs)  # the checkpoint is gone
    (runs / file).unlink()
    assert_same(resumed, getattr(pipeline, load)(dataset(), given(), CPU)[0])


def test_a_world_model_lies_on_the_device_that_was_asked_for(runs):
    """`meta` stands for any other device: a tensor there has no values, only its place."""
    pipeline.load_world_model(dataset(), model_settings(), CPU)
    elsewhere, losses, _ = pipeline.load_world_model(dataset(), model_settings(), torch.device("meta"))
    assert {t.device.type for t in elsewhere.state_dict().values()} == {"meta"} and losses.device == CPU


# A denoiser from a file


@pytest.fixture
def file(runs):
    """A denoiser that was trained on `dataset()`, and its file."""
    denoiser, _ = pipeline.load_denoiser(dataset(), settings(), CPU)
    return denoiser, runs / kept(runs)[0]


def rewritten(path, tensors=lambda t: t, card=lambda c: c):
    """A file beside `path` with changed tensors or card."""
    old_tensors, old_card = store.load(path)
    other = path.with_name("other.safetensors")
    store.save(other, tensors(old_tensors), card(old_card))
    return other


def refused(path, match, data=None):
    with pytest.raises(ValueError, match="(?s)^denoiser=.*" + match) as error:
        table1.read_denoiser(path, data or dataset(), CPU)
    assert str(path) in str(error.value)


def test_a_denoiser_is_read_from_its_file(file, trainings):
    expected, path = file
    for given in (path, str(path)):
        read = table1.read_denoiser(given, dataset(), CPU)
        assert_same(read, expected)
        assert read.config == expected.config and not read.training and not any(p.requires_grad for p in read.parameters())
    x = torch.randn(2, 8, 71, generator=torch.Generator().manual_seed(0))
    assert torch.equal(read(x, 1.0), expected(x, 1.0)) and trainings == []
    elsewhere = table1.read_denoiser(path, dataset(), torch.device("meta"))
    assert {t.device.type for t in elsewhere.state_dict().values()} == {"meta"}


def test_a_denoiser_of_the_other_transform_is_read(runs):
    expected, _ = pipeline.load_denoiser(dataset(), settings(transform="arctanh"), CPU)
    read = table1.read_denoiser(runs / kept(runs)[0], dataset(), CPU)
    assert_same(read, expected)
    assert read.normaliser.transform == "arctanh"


def test_files_that_hold_no_denoiser_are_refused(file, tmp_path):
    _, path = file
    refused(path.with_name("nowhere.safetensors"), "nowhere")
    refused(tmp_path, "FileNotFoundError")
    refused(pipeline.SHIPPED_GUIDE, "KeyError")
    refused(rewritten(path, card=lambda c: {k: v for k, v in c.items() if k != "config"}), "config")
    refused(rewritten(path, card=lambda c: {**c, "config": {**c["config"], "members": 3}}), "members")
    refused(rewritten(path, card=lambda c: {**c, "config": {**c["config"], "features": 16}}), "size mismatch")
    refused(rewritten(path, card=lambda c: {**c, "config": {**c["config"], "features": 12}}), "features=12")
    refused(rewritten(path, card=lambda c: {**c, "config": {**c["config"], "transform": "log"}}), "transform='log'")
    refused(rewritten(path, lambda t: {k: v for k, v in t.items() if k != "normaliser.std"}), "normaliser.std")
    (tmp_path / "text.safetensors").write_text("not safetensors " * 100)
    refused(tmp_path / "text.safetensors", "damaged")
    cut(path)
    refused(path, "damaged")


def test_a_world_model_is_no_denoiser(runs):
    pipeline.load_world_model(dataset(), model_settings(), CPU)
    refused(runs / kept(runs)[0], "TypeError")


def test_a_denoiser_of_other_data_is_refused(file):
    _, path = file
    refused(path, "toy-1.*toy-2", dataset("toy-2"))  # by its name
    refused(path, "normaliser", dataset(seed=1))  # by what it saw
    refused(rewritten(path, card=lambda c: {k: v for k, v in c.items() if k != "data_key"}), "toy-1")
    for name, i in (("mean", 3), ("std", 50)):

        def moved(tensors, name=name, i=i):
            tensors[f"normaliser.{name}"][i] += 0.01
            return tensors

        refused(rewritten(path, moved), "normaliser")
    refused(rewritten(path, card=lambda c: {**c, "config": {**c["config"], "transform": "arctanh"}}), "normaliser")
