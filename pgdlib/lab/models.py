"""The denoiser and the world model of a dataset: shipped in the package, found in `runs/`, trained, or read from a file."""

import contextlib

import torch
from tqdm import tqdm

from pgdlib import data, edm, worldmodel
from pgdlib.lab import artifacts, budget, load, resumable, settings

ASSETS = artifacts.PACKAGE / "assets"
# The settings of which another value than the scale's own asks for a model of its own.
OF_DENOISER = ("horizon", "blocks", "features", "train_steps", "epochs", "passes", "batch_size", "learning_rate")
OF_DENOISER += ("p_mean", "p_std", "optimiser")
OF_WORLD_MODEL = ("model_steps", "model_passes")


def load_denoiser(dataset, p, device, progress=tqdm, say=print, training=edm.Training):
    """(EMA denoiser, losses [steps], card) of the training side of `dataset`; `p.denoiser` says whence.

    "shipped": the package's, where one was trained on this stand-in, else as "train", and `say` says why. "train": trained with
    the settings `p` (those of `OF_DENOISER`, transform, seed, scale), or found in runs/. Else a file of such a model.
    `progress` makes the bar, as tqdm does, `say` prints what a long training takes (`budget.announce_training`), `training` is
    its loop. Raises ValueError that names the parameter: for a horizon of which no episode fills half a window, where the
    device has too little memory, and for a file that is missing, damaged, or of other data.
    """
    if p.denoiser not in ("shipped", "train"):
        return _on(device, *_read(p.denoiser, dataset))
    if p.denoiser == "shipped" and (found := _shipped("denoiser", edm.Denoiser, dataset, p, OF_DENOISER, say)):
        return _on(device, *found)
    train_data, _ = load.train_val(dataset)
    if p.horizon > 2 * (longest := int(train_data.lengths.max())):
        allowed = f"it must be at most {2 * longest}, twice the longest episode"
        raise ValueError(f"horizon={p.horizon} is not allowed for {dataset.label}; {allowed}")
    steps = p.train_steps or round(p.epochs * len(train_data.rewards) / (p.horizon * p.batch_size))
    steps = _at_most(p.passes, steps, p.batch_size, train_data)
    how = dict(optimiser=p.optimiser, p_mean=p.p_mean, p_std=p.p_std)
    recipe = edm.Recipe(steps, p.batch_size, p.learning_rate, p.seed, **how)
    config = dict(obs_dim=train_data.spec.obs_dim, action_dim=train_data.spec.action_dim, horizon=p.horizon)
    config |= dict(features=p.features, blocks=p.blocks, transform=p.transform)

    def begin(checkpoint):
        done = 0
        with contextlib.suppress(FileNotFoundError, artifacts.CorruptArtifact, KeyError):
            done = artifacts.load(checkpoint)[1]["step"]
        budget.announce_training(config, recipe, done, p.scale, device, say)
        denoiser = _begun(edm.Denoiser, config, p.seed)
        denoiser.normaliser.fit(train_data.packed())
        denoiser.to(device)
        return training(denoiser, data.Windows(train_data, denoiser.normaliser, p.horizon, device), recipe)

    found = _trained("denoiser", "edm", dataset, p, config, recipe, begin, lambda loop: loop.ema, progress)
    return _on(device, *_restored(edm.Denoiser, *found))


def load_world_model(dataset, p, device, progress=tqdm, say=print):
    """(ensemble, losses [steps], card) of one-step models of the training side of `dataset`.

    The package's, where `p.denoiser` is not "train" and one was trained on this stand-in; else found in runs/, or trained, with
    the settings of `OF_WORLD_MODEL`, scale and seed. The card's "seconds" are those of its training, where it was made.
    """
    if p.denoiser != "train" and (found := _shipped("world model", worldmodel.Ensemble, dataset, p, OF_WORLD_MODEL, say)):
        return _on(device, *found)
    train_data, val_data = load.train_val(dataset)
    recipe = worldmodel.Recipe(p.model_steps, seed=p.seed)
    recipe.steps = _at_most(p.model_passes, recipe.steps, recipe.batch_size, train_data)
    config = dict(obs_dim=train_data.spec.obs_dim, action_dim=train_data.spec.action_dim)

    def begin(checkpoint):
        return worldmodel.Training(_begun(worldmodel.Ensemble, config, p.seed).to(device), train_data, val_data, recipe)

    found = _trained("world model", "worldmodel", dataset, p, config, recipe, begin, lambda loop: loop.ensemble, progress)
    return _on(device, *_restored(worldmodel.Ensemble, *found))


def _shipped(kind, network, dataset, p, names, say):
    """(network, losses, card) of the package's model of this `kind` for `dataset`, or None, saying why."""
    made, scaled = dataset.made or {}, settings.of_scale(p.scale)
    path = ASSETS / f"{kind.replace(' ', '')}_{made.get('name')}.safetensors"
    if not path.exists():
        return say(f"no {kind} ships for {dataset.label}: training one")
    tensors, card = artifacts.load(path)
    given = {name: getattr(p, name) for name in names if getattr(p, name) != scaled[name]}
    given |= {k: v for k, v in dict(horizon=p.horizon, transform=p.transform).items() if v != card["config"].get(k, v)}
    given |= {f"data {k}": v for k, v in made.items() if v != card["made"][k]}
    if given:
        return say(f"no {kind} ships with {', '.join(f'{k}={v!r}' for k, v in given.items())}: training one")
    found = _restored(network, tensors, card)
    own, here = getattr(found[0], "normaliser", found[0]), load.train_val(dataset)[0].obs.mean(0)
    apart = float(((here - own.mean[: len(here)]) / own.std[: len(here)]).abs().max())
    if apart > 1e-4:  # than which the order of a sum makes less
        say(f"the shipped {kind} was trained on data rounded otherwise: means differ by up to {apart:.1g} std from those here")
    return found


def _read(path, dataset):
    """(denoiser, losses, card) of the file `path`, if it was trained on `dataset`."""
    file = artifacts.given("denoiser", path, "'shipped', 'train', or a .safetensors of a diffusion model")
    try:
        found = _restored(edm.Denoiser, *artifacts.load(file))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as e:  # a foreign file breaks these in many ways
        raise ValueError(f"denoiser={str(path)!r} cannot be used: {type(e).__name__}: {e}") from e
    normaliser, train = found[0].normaliser, load.train_val(dataset)[0]
    own = data.Normaliser(train.spec, normaliser.transform).fit(train.packed()).state_dict()
    if not all(torch.allclose(v, normaliser.state_dict()[k]) for k, v in own.items()):
        raise ValueError(f"denoiser={str(path)!r} is not allowed; its normaliser is not that of the data {dataset.key}")
    return found


def _on(device, network, *more):
    return network.to(device), *more


def _restored(kind, tensors, card):
    """(network, losses, card) of the tensors and the card of a file; the network frozen."""
    network = kind(**card["config"])
    network.load_state_dict({name: tensor for name, tensor in tensors.items() if name != "losses"})
    return network.eval().requires_grad_(False), tensors["losses"], card


def _at_most(passes, steps, batch_size, data):
    """Training steps that draw each window of the data, in the mean, at most `passes` times; None is no limit."""
    return steps if passes is None else min(steps, max(1, round(passes * len(data.rewards) / batch_size)))


def _begun(kind, config, seed):
    """A network with initial weights by `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(**config)


def _trained(kind, module, dataset, p, config, recipe, begin, made, progress):
    """(tensors, card) of a model of the data, found or trained by the loop that `begin` makes; kept is `made(loop)`."""
    key = artifacts.key(data=dataset.key, config=config, recipe=vars(recipe), code=artifacts.code_version(module))
    card = dict(kind=kind, recipe=vars(recipe), data=dataset.label, data_key=dataset.key, scale=p.scale)

    def finished(loop):
        network = made(loop)
        return {**network.state_dict(), "losses": loop.losses}, {**card, "config": network.config}

    folder, text = kind.replace(" ", "") + "s", f"training the {kind} on {dataset.label}"
    return resumable.trained(folder, f"{dataset.key}-{p.scale}-{key}", begin, finished, text, progress)[1:]
