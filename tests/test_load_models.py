"""The models of the notebooks: trained once, found again, trained anew for other inputs, and never used when damaged."""

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
from conftest import cut, kept, toy
from tqdm import tqdm

from pgdlib import data, edm, worldmodel
from pgdlib.lab import artifacts, budget, load, models, resumable, standins
from pgdlib.lab import settings as scales
from tools import models as tool

CPU = torch.device("cpu")
quiet = functools.partial(tqdm, disable=True)


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
    return functools.partial(getattr(models, name), given or dataset(), p or settings(), CPU)


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
            monkeypatch.setattr(models.load_denoiser, "__defaults__", (*models.load_denoiser.__defaults__[:-1], noted))
    return begun


@both
def test_a_model_is_trained_once(name, runs, loops):
    """And the global random state does not enter."""
    torch.manual_seed(1)
    first, losses, card = makes(name)()
    torch.manual_seed(2)
    again, losses_again, card_again = makes(name)()
    assert len(loops) == 1 and torch.equal(losses, losses_again) and losses.shape == (4,) and losses.isfinite().all()
    assert card == card_again and 0 < card["seconds"] < 60 and card["recipe"]["steps"] == 4
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
        denoiser, *_ = makes("load_denoiser", p=settings(**{key: value}))()
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
    _, losses, _ = makes("load_denoiser", p=settings(train_steps=None, epochs=2))()
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
    elsewhere, losses, _ = models.load_world_model(dataset(), settings(), torch.device("meta"))
    assert {t.device.type for t in elsewhere.state_dict().values()} == {"meta"} and losses.device == CPU


# A denoiser from a file


@pytest.fixture
def file(runs):
    """A denoiser that was trained on `dataset()`, and its file."""
    denoiser, *_ = models.load_denoiser(dataset(), settings(), CPU)
    return denoiser, runs / kept(runs)[0]


def rewritten(path, tensors=lambda t: t, card=lambda c: c):
    """A file beside `path` with changed tensors or card."""
    old_tensors, old_card = artifacts.load(path)
    other = path.with_name("other.safetensors")
    artifacts.save(other, tensors(old_tensors), card(old_card))
    return other


def read_from(path, data=None, device=CPU):
    return models.load_denoiser(data or dataset(), settings(denoiser=str(path)), device)[0]


def refused(path, match, data=None):
    with pytest.raises(ValueError, match="(?s)^denoiser=.*" + match) as error:
        read_from(path, data)
    assert str(path) in str(error.value)


def test_a_denoiser_is_read_from_its_file(file, loops):
    expected, path = file
    read = read_from(path)
    assert_same(read, expected)
    assert read.config == expected.config and not read.training and not any(p.requires_grad for p in read.parameters())
    x = torch.randn(2, 8, 71, generator=torch.Generator().manual_seed(0))
    assert torch.equal(read(x, 1.0), expected(x, 1.0)) and loops == []
    elsewhere = read_from(path, device=torch.device("meta"))
    assert {t.device.type for t in elsewhere.state_dict().values()} == {"meta"}


def test_a_denoiser_of_the_other_transform_is_read(runs):
    expected, *_ = models.load_denoiser(dataset(), settings(transform="arctanh"), CPU)
    read = read_from(runs / kept(runs)[0])
    assert_same(read, expected)
    assert read.normaliser.transform == "arctanh"


def test_files_that_hold_no_denoiser_are_refused(file, tmp_path):
    _, path = file
    refused(path.with_name("nowhere.safetensors"), "nowhere")
    refused(tmp_path, "is not a file; it must be")
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
    refused(path, "normaliser", dataset(seed=1))  # by what it saw
    for name, i in (("mean", 3), ("std", 50)):

        def moved(tensors, name=name, i=i):
            tensors[f"normaliser.{name}"][i] += 0.01
            return tensors

        refused(rewritten(path, moved), "normaliser")
    refused(rewritten(path, card=lambda c: {**c, "config": {**c["config"], "transform": "arctanh"}}), "normaliser")


# Models in the package


@pytest.fixture
def shipped(runs, monkeypatch):
    """Models of `stand_in()` as the package's, trained by others' settings: kind -> what was shipped."""
    monkeypatch.setattr(models, "ASSETS", runs / "assets")
    found = {
        name: makes(name, stand_in(), settings(features=16, model_steps=6))() for name in ("load_denoiser", "load_world_model")
    }
    for kind, (network, losses, card) in zip(("denoiser", "worldmodel"), found.values()):
        path = runs / "assets" / f"{kind}_toy.safetensors"
        artifacts.save(path, {**network.state_dict(), "losses": losses}, {**card, "made": stand_in().made})
    return found


def stand_in(seed=0, **made):
    return dataclasses.replace(dataset(seed=seed), made=dict(name="toy", steps=320, policy="1a") | made)


def from_package(name, given, **changes):
    """What is loaded where the scale's own settings are asked for, but for `changes`; and what was said."""
    said, own = [], scales.of_scale("ci") | dict(horizon=8, model_steps=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scales, "of_scale", lambda scale: own)
        p = SimpleNamespace(**own | dict(denoiser="shipped", seed=0, scale="ci", transform="raw", train_steps=4) | changes)
        own["train_steps"] = 4
        return getattr(models, name)(given, p, CPU, say=said.append), said


@both
def test_a_shipped_model_is_used_and_nothing_is_trained(name, shipped, loops):
    (network, losses, card), said = from_package(name, stand_in(), seed=5)
    expected = shipped[name]
    assert_same(network, expected[0])
    assert torch.equal(losses, expected[1]) and card == {**expected[2], "made": stand_in().made}
    assert said == [] == loops and not any(p.requires_grad for p in network.parameters())


@both
def test_where_none_ships_one_is_trained_and_the_reason_said(name, shipped, loops):
    """Other data, or other settings than the scale's own, which ask for a model of one's own."""
    changed = dict(features=8, learning_rate=2e-3, optimiser="adam", horizon=12) if name == "load_denoiser" else {}
    changed |= dict(transform="arctanh") if changed else dict(model_steps=5, model_passes=1)
    for setting, value in changed.items():
        _, said = from_package(name, stand_in(), **{setting: value})
        assert len(said) == 1 and f"ships with {setting}={value!r}: training one" in said[0]
    for made in (dict(steps=321), dict(policy="2b")):
        (reason,), (value,) = made, made.values()
        assert f"data {reason}={value!r}" in from_package(name, stand_in(**made))[1][0]
    for other in (dataset(), stand_in(name="other")):
        assert "ships for toy: training one" in from_package(name, other)[1][0]
    found, said = from_package(name, stand_in(), denoiser="train")
    assert said == [] and "made" not in found[2], "none of the package's was asked for"
    assert len(loops) == len(changed) + 1  # the others are all of the same data and settings


@both
def test_a_shipped_model_of_data_rounded_otherwise_is_used_and_the_difference_said(name, shipped, loops):
    (network, *_), (said,) = from_package(name, stand_in(seed=1))
    assert_same(network, shipped[name][0])
    means = [load.train_val(stand_in(seed))[0].obs.mean(0) for seed in (0, 1)]
    std = load.train_val(stand_in())[0].obs.std(0)
    apart = ((means[1] - means[0]) / std).abs().max().item()
    assert f"by up to {apart:.1g} std" in said and loops == []


SHIPPED = sorted(path.stem for path in models.ASSETS.glob("[dw]*_*.safetensors"))


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_is_what_make_models_would_train(name):
    """And at quick nothing but the data decides whether it is used. 16 MB is what a repository can bear."""
    path = models.ASSETS / f"{name}.safetensors"
    tensors, card = artifacts.load(path)
    p, recipe = tool.settings_of(name), card["recipe"]
    assert sorted(tool.RECIPES) == SHIPPED and path.stat().st_size <= 16e6
    assert {"versions", "machine", "seconds", "data", "data_key"} <= card.keys() and recipe["seed"] == 0
    assert (
        card["made"]["steps"] == standins.steps_of(name.split("_")[1], p.data_steps)
        and len(tensors["losses"]) == recipe["steps"]
    )
    if name.startswith("denoiser"):
        assert p.horizon == scales.of_scale("quick")["horizon"] == card["config"]["horizon"]
        assert [recipe[k] for k in ("steps", "batch_size", "optimiser")] == [p.train_steps, p.batch_size, p.optimiser]
        assert [card["config"][k] for k in ("features", "blocks")] == [p.features, p.blocks]


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("denoiser")])
def test_a_shipped_denoiser_has_learnt_its_data(name, runs):
    """On windows of its data (of *human*, half of what *cloned* holds); in half precision as in its own."""
    dataset = name.removeprefix("denoiser_").replace("cloned", "human")
    ds = load.load_data(dataset, "local", 5_000, quiet, lambda text: None)
    denoiser, *_ = models._restored(edm.Denoiser, *artifacts.load(models.ASSETS / f"{name}.safetensors"))
    windows = data.Windows(ds.data, denoiser.normaliser, denoiser.horizon)
    low, middle = edm.validation_loss(denoiser, windows, torch.tensor([0.1, 1.0]), 64, 0).tolist()
    assert low < 0.6 and middle < 0.3


def test_shipping_halves_large_weights_alone(tmp_path, monkeypatch, runs):
    monkeypatch.setattr(models, "ASSETS", tmp_path)
    monkeypatch.setattr(tool, "RECIPES", {"denoiser_human": dict(train_steps=2, features=64, blocks=1, batch_size=2)})
    assert tool.main(["denoiser_human"]) == 0
    tensors, card = artifacts.load(tmp_path / "denoiser_human.safetensors")
    trained, _, own = models.load_denoiser(load.load_data("human", "local", 1), tool.settings_of("denoiser_human"), CPU)
    for key, weight in trained.state_dict().items():
        assert torch.equal(tensors[key].float(), weight.half().float() if weight.numel() > 10_000 else weight)
    assert card == {**own, "made": card["made"], "machine": tool.machine()} and "threads" in card["machine"]
    with pytest.raises(SystemExit):
        tool.main(["denoiser_dog"])
