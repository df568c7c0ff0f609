"""The models of the notebooks: trained once, found again, trained anew for other inputs, and never used when damaged."""

import functools
from types import SimpleNamespace

import pytest
import torch
from conftest import cut, kept, toy

from pgdlib import edm, worldmodel
from pgdlib.lab import artifacts, budget, load, resumable, table1
from pgdlib.lab import settings as scales

CPU = torch.device("cpu")


def dataset(key="toy-1", seed=0):
    trajectories = toy([40, 30, 50, 20, 40, 20, 30, 40, 50, 40], seed)
    return load.Dataset(trajectories, trajectories, False, key, 0, 0)


def assert_same(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for (name, mine), theirs in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def settings(**changes):
    """Little enough to be trained in no time."""
    own = dict(transform="raw", seed=0, scale="ci", train_steps=4, model_steps=4, batch_size=4, features=8, horizon=8)
    return SimpleNamespace(**{**scales.of_scale("ci"), **own, **changes})


model_settings = settings
both = pytest.mark.parametrize("name", ["load_denoiser", "load_world_model"])


def makes(name, given=None, p=None):
    """A function of nothing that makes or finds the model."""
    return functools.partial(getattr(load, name), given or dataset(), p or settings(), CPU)


@pytest.fixture
def loops(monkeypatch):
    """The trainings that were begun, of either kind."""
    begun = []
    for module, kind in ((edm, edm.Training), (worldmodel, worldmodel.Training)):

        def noted(*given, kind=kind):
            begun.append(kind(*given))
            return begun[-1]

        monkeypatch.setattr(module, "Training", noted)
        if module is edm:  # which is a default there
            monkeypatch.setattr(load.load_denoiser, "__defaults__", (*load.load_denoiser.__defaults__[:-1], noted))
    return begun


@both
def test_a_model_is_trained_once(name, runs, loops):
    """And the global random state does not enter."""
    torch.manual_seed(1)
    first, losses, *seconds = makes(name)()
    torch.manual_seed(2)
    again, losses_again, *seconds_again = makes(name)()
    assert len(loops) == 1 and torch.equal(losses, losses_again) and losses.shape == (4,) and losses.isfinite().all()
    assert seconds == seconds_again and all(0 < t < 60 for t in seconds)
    assert_same(first, again)
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    (file,) = kept(runs)  # no checkpoint is left
    assert file.startswith(("denoisers" if name == "load_denoiser" else "worldmodels") + "/toy-1-ci-")
    (runs / file).unlink()
    torch.manual_seed(3)
    assert_same(first, makes(name)()[0])


def test_models_see_the_training_side(runs, loops):
    """Their statistics are those of the training episodes; the world model's elites err least on the others."""
    denoiser, ensemble = makes("load_denoiser")()[0], makes("load_world_model")()[0]
    train, val = load.train_val(dataset())
    assert (len(train.lengths), len(val.lengths)) == (9, 1)
    torch.testing.assert_close(denoiser.normaliser.mean[:69], train.packed().mean(0)[:69], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ensemble.mean[:45], train.obs.mean(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(loops[1].inputs, loops[1].ensemble.pairs(train)[0])
    errors = worldmodel.validation_error(ensemble, val).mean(1)
    assert ensemble.elites.tolist() == errors.argsort()[:5].tolist() != [*range(5)]


def test_every_input_makes_another_denoiser(runs, loops):
    changes = dict(horizon=12, features=16, blocks=1, train_steps=5, batch_size=5, learning_rate=2e-3, seed=1)
    changes |= dict(optimiser="adam", p_mean=0.0, p_std=1.0)
    changes["transform"] = "arctanh"
    makes("load_denoiser")()
    for key, value in changes.items():
        denoiser, _ = makes("load_denoiser", p=settings(**{key: value}))()
        assert denoiser.config.get(key, value) == value
    makes("load_denoiser", dataset("toy-2", seed=1))()
    assert len(loops) == len(kept(runs)) == len(changes) + 2


def test_every_input_makes_another_world_model(runs, loops):
    first = makes("load_world_model")()
    others = [makes("load_world_model", p=settings(**c))() for c in (dict(model_steps=5), dict(seed=1))]
    others.append(makes("load_world_model", dataset("toy-2", seed=1))())
    assert len(loops) == len(kept(runs)) == 4 and [len(losses) for _, losses, _ in others] == [5, 4, 4]
    assert not any(torch.equal(first[0].weights[0], other.weights[0]) for other, *_ in others)
    makes("load_world_model", p=settings(horizon=4, features=32, samples=3, train_steps=9))()
    assert len(loops) == 4  # what is the denoiser's or the sampler's makes no other


def test_epochs_give_the_steps_where_none_are_set(runs):
    train, _ = load.train_val(dataset())
    _, losses = makes("load_denoiser", p=settings(train_steps=None, epochs=2))()
    assert len(losses) == round(2 * len(train.rewards) / (8 * 4))


@both
def test_a_damaged_model_is_set_aside_and_trained_again(name, runs, loops, capsys):
    first = makes(name)()[0]
    (file,) = kept(runs)
    (runs / file).write_bytes((runs / file).read_bytes()[:-5])
    assert_same(first, makes(name)()[0])
    assert len(loops) == 2 and file in capsys.readouterr().out and len(kept(runs)) == 2


def stopped_at(stop, make):
    """Call `make()`, whose training is interrupted when it reports step `stop`."""
    run = resumable.run

    def noted(loop, path, report):
        def until(step):
            report(step)
            if step == stop:
                raise KeyboardInterrupt

        run(loop, path, until)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(resumable, "run", noted)
        make()


def steps_of(monkeypatch):
    """The steps that the trainings from here on report."""
    steps, run = [], resumable.run
    noted = lambda loop, path, report: run(loop, path, lambda step: (steps.append(step), report(step)))  # noqa: E731
    monkeypatch.setattr(resumable, "run", noted)
    return steps


@both
@pytest.mark.parametrize("when", ["in its third step", "while it is saved"])
def test_an_interrupted_training_goes_on(name, when, runs, monkeypatch):
    """To the same weights; no step that was kept is taken again, and no checkpoint is left."""
    make, save = makes(name), artifacts.save

    def killed(path, tensors, card):
        if path.parent.name != "checkpoints":
            raise KeyboardInterrupt
        save(path, tensors, card)

    if when == "in its third step":
        stopped_at(3, make)
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(resumable, "run", functools.partial(resumable.run, save_every=-1.0))
            patch.setattr(artifacts, "save", killed)
            make()
    (checkpoint,) = kept(runs)
    assert checkpoint.startswith(f"checkpoints/{'denoisers' if name == 'load_denoiser' else 'worldmodels'}-toy-1-ci-")
    steps = steps_of(monkeypatch)
    resumed = make()[0]
    assert steps == ([4] if when == "in its third step" else [])
    (file,) = kept(runs)
    (runs / file).unlink()
    assert_same(resumed, make()[0])


def test_a_long_training_says_what_is_left(runs, monkeypatch):
    said = []
    monkeypatch.setattr(budget, "announce_training", lambda config, recipe, done, *given: said.append((recipe.steps, done)))
    stopped_at(3, makes("load_denoiser"))
    makes("load_denoiser")()
    assert said == [(4, 0), (4, 3)]


def test_another_loop_may_train(runs, loops):
    """As one that shares its batches with other processes; what it came to is the same artifact."""
    mine = []
    makes("load_denoiser")(training=lambda *given: mine.append(edm.Training(*given)) or mine[0])
    makes("load_denoiser")()
    assert mine == loops and mine[0].step == 4 and len(kept(runs)) == 1


def test_a_world_model_lies_on_the_device_that_was_asked_for(runs):
    """`meta` stands for any other device: a tensor there has no values, only its place."""
    makes("load_world_model")()
    elsewhere, losses, _ = load.load_world_model(dataset(), settings(), torch.device("meta"))
    assert {t.device.type for t in elsewhere.state_dict().values()} == {"meta"} and losses.device == CPU


# A denoiser from a file


@pytest.fixture
def file(runs):
    """A denoiser that was trained on `dataset()`, and its file."""
    denoiser, _ = load.load_denoiser(dataset(), settings(), CPU)
    return denoiser, runs / kept(runs)[0]


def rewritten(path, tensors=lambda t: t, card=lambda c: c):
    """A file beside `path` with changed tensors or card."""
    old_tensors, old_card = artifacts.load(path)
    other = path.with_name("other.safetensors")
    artifacts.save(other, tensors(old_tensors), card(old_card))
    return other


def refused(path, match, data=None):
    with pytest.raises(ValueError, match="(?s)^denoiser=.*" + match) as error:
        table1.read_denoiser(path, data or dataset(), CPU)
    assert str(path) in str(error.value)


def test_a_denoiser_is_read_from_its_file(file, loops):
    expected, path = file
    for given in (path, str(path)):
        read = table1.read_denoiser(given, dataset(), CPU)
        assert_same(read, expected)
        assert read.config == expected.config and not read.training and not any(p.requires_grad for p in read.parameters())
    x = torch.randn(2, 8, 71, generator=torch.Generator().manual_seed(0))
    assert torch.equal(read(x, 1.0), expected(x, 1.0)) and loops == []
    elsewhere = table1.read_denoiser(path, dataset(), torch.device("meta"))
    assert {t.device.type for t in elsewhere.state_dict().values()} == {"meta"}


def test_a_denoiser_of_the_other_transform_is_read(runs):
    expected, _ = load.load_denoiser(dataset(), settings(transform="arctanh"), CPU)
    read = table1.read_denoiser(runs / kept(runs)[0], dataset(), CPU)
    assert_same(read, expected)
    assert read.normaliser.transform == "arctanh"


def test_files_that_hold_no_denoiser_are_refused(file, tmp_path):
    _, path = file
    refused(path.with_name("nowhere.safetensors"), "nowhere")
    refused(tmp_path, "FileNotFoundError")
    refused(load.SHIPPED_GUIDE, "TypeError.*activation")
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
    makes("load_world_model")()
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
