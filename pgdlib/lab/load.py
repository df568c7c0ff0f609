"""What the notebooks share: the guide, the data and the denoiser, loaded from `runs/` or made."""

import contextlib
import time
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path

import torch
from tqdm import tqdm

from pgdlib import data, edm, worldmodel
from pgdlib.lab import artifacts, budget, guide_zip, minari_files, resumable, standins
from pgdlib.policies import GaussianPolicy
from pgdlib.simulators import pen

SHIPPED_GUIDE = artifacts.PACKAGE / "assets" / "ppo_pen.safetensors"
DEMONSTRATOR = artifacts.PACKAGE / "assets" / "ppo_pen_demonstrator.safetensors"  # another seed, a fifth of the steps


def device_of(name):
    """The torch device for `name`: "auto", "cpu" or "cuda"."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def load_guide(guide="shipped"):
    """(policy, card) of a guide: "shipped", a .safetensors that `save_guide` wrote, or a Stable-Baselines3 PPO .zip.

    Raises ValueError that names the parameter `guide` for a file that is missing, damaged, or of another environment.
    """
    path = SHIPPED_GUIDE if guide == "shipped" else Path(guide)
    if not isfile(path):  # Path.is_file itself fails for a name that is too long
        raise ValueError(
            f"guide={guide!r} is not a file; it must be 'shipped', a .safetensors guide or a Stable-Baselines3 .zip"
        )
    if path.suffix == ".zip":
        policy = guide_zip.from_zip(path, pen.OBS_DIM, pen.ACTION_DIM)
        return policy.requires_grad_(False), dict(kind="guide", source=path.name)
    try:
        tensors, card = artifacts.load(path)
        policy = GaussianPolicy(**card["config"])
        policy.load_state_dict(tensors)
    except (artifacts.CorruptArtifact, KeyError, TypeError, RuntimeError) as e:
        raise ValueError(f"guide={guide!r} cannot be used: {e}") from e
    needed, found = (pen.OBS_DIM, pen.ACTION_DIM), tuple(policy.config[k] for k in ("obs_dim", "action_dim"))
    if found != needed:
        text = "is a policy of another environment: {} observations and {} actions; needed are {} and {}"
        raise ValueError(f"guide={guide!r} " + text.format(*found, *needed))
    return policy.requires_grad_(False), card


def save_guide(path, policy, card):
    """Write a `GaussianPolicy` with its card to `path`."""
    card = {**card, "kind": "guide", "config": policy.config, "versions": artifacts.versions()}
    artifacts.save(path, policy.state_dict(), card)


def train_guide(steps, seed):
    """(policy, card) of a guide trained with PPO for `steps` environment steps; kept in runs/guides/.

    If it is stopped, the next call goes on from its checkpoint, which is two minutes old at most, with new episodes.
    """
    from pgdlib.lab import guide_ppo  # Stable-Baselines3 takes seconds to import

    def begin(checkpoint):
        return guide_ppo.Training(seed, steps=steps)

    def finished(training):
        policy = training.policy()
        card = dict(kind="guide", config=policy.config, parameters=training.parameters, seed=seed, curve=training.curve)
        return policy.state_dict(), {**card, **guide_ppo.evaluation(policy)}

    def words(training):
        return "return {:.0f} ± {:.0f}".format(*training.curve[-1][1:])

    name = f"ppo-{artifacts.key(steps=steps, seed=seed, code=artifacts.code_version('lab.guide_ppo'))}"
    path, *_ = _trained("guides", name, begin, finished, "training PPO", words=words)
    return load_guide(path)


def _trained(folder, name, begin, finished, text, progress=tqdm, words=None):
    """(path, tensors, card) of what training makes: found in runs/, or trained, from its checkpoint if it was stopped.

    `begin(checkpoint)` makes the loop, `finished(loop)` the tensors and the card of what it came to. The bar is called
    `text`, and `words(loop)` stand behind it.
    """
    path = artifacts.root() / folder / f"{name}.safetensors"
    checkpoint = artifacts.root() / "checkpoints" / f"{folder}-{name}.safetensors"

    def make():
        loop, started = begin(checkpoint), time.monotonic()
        with progress(total=loop.steps, desc=text, mininterval=5) as bar:

            def report(step):
                bar.update(step - bar.n)
                if words:
                    bar.set_postfix_str(words(loop), refresh=False)

            resumable.run(loop, checkpoint, report)
        tensors, card = finished(loop)
        return tensors, {**card, "seconds": time.monotonic() - started}

    found = artifacts.artifact(path, make)
    artifacts.discard(checkpoint)  # not before what came of it is kept
    return path, *found


@dataclass
class Dataset:
    """A dataset that is ready for training, and where it comes from."""

    data: data.Trajectories  # episodes end at falls
    raw: data.Trajectories  # as the file holds them
    is_d4rl: bool
    key: str  # names the content
    cut_episodes: int
    dropped_steps: int

    @property
    def label(self):
        """What titles, tables and file names call the data."""
        return self.data.name

    @property
    def slug(self):
        """The label as part of a file name."""
        return self.label.lower().replace(" pen-", "-").replace("stand-in", "standin")


def load_data(dataset, source, steps, progress=tqdm, say=print):
    """The `Dataset` human, cloned or expert. `source`: "d4rl", "local" (the stand-in), or "auto": D4RL if it can be had.

    `steps` is the size of the stand-ins cloned and expert; human always has 25 episodes of 200 steps. `progress` makes the
    bar of what takes long, as tqdm does, and `say` prints.
    """
    folder = None
    if source in ("auto", "d4rl"):
        try:
            folder = minari_files.find_d4rl(dataset)
        except FileNotFoundError:
            if source == "d4rl":
                raise
            say(f"D4RL's {dataset} data is not on disk and cannot be downloaded (source='d4rl' says why): using the stand-in")
    if is_ours := folder is None:
        folder = standins.folder(
            dataset, steps, *load_guide(SHIPPED_GUIDE if dataset == "expert" else DEMONSTRATOR), progress, say
        )
    content = artifacts.key(content=minari_files.digest(folder), code=artifacts.code_version("data", "lab.minari_files"))
    key = f"{dataset}-{'standin' if is_ours else 'minari'}-{content}"
    cache = artifacts.root() / "data" / f"{key}.safetensors"
    tensors, _ = artifacts.artifact(cache, lambda: (minari_files.from_minari(folder, key).tensors(), dict(kind="data")))
    is_d4rl = not is_ours and minari_files.is_d4rls(folder, dataset, tensors["lengths"])
    name = ("stand-in" if is_ours else "D4RL" if is_d4rl else "own") + f" pen-{dataset}"
    raw = data.Trajectories.from_tensors(tensors, name)
    say(f"{name}: {len(raw.lengths):,} episodes, {len(raw.rewards):,} steps")
    if not (is_ours or is_d4rl):
        known = "{} of {:,} episodes and {:,} steps".format(*minari_files.D4RL[dataset])
        say(f"{folder} is not D4RL's, which is {known}: called {name!r} here, not D4RL")
    if missing := minari_files.INFO_DIMS.keys() - raw.info.keys():
        say(f"{name} goes without the simulator's {', '.join(sorted(missing))}: some episodes lack them, or hold odd ones")
    repaired, cut, dropped = data.end_where(raw, torch.from_numpy(pen.outcome(raw.next_obs.numpy())[2]))  # at falls
    return Dataset(repaired, raw, is_d4rl, key, cut, dropped)


def train_val(dataset):
    """(training, validation) episodes: a tenth of the unique episodes is kept back."""
    return data.split(dataset.data, 0.1, seed=0)


def _at_most(passes, steps, batch_size, data):
    """Training steps that draw each window of the data, in the mean, at most `passes` times; None is no limit."""
    return steps if passes is None else min(steps, max(1, round(passes * len(data.rewards) / batch_size)))


def load_denoiser(dataset, p, device, progress=tqdm, say=print, training=edm.Training):
    """(EMA denoiser, losses [steps]) trained on the training side of `dataset` with the settings `p`; made if missing.

    `p` has horizon, features, blocks, transform, seed, and of the training train_steps, epochs, passes, batch_size,
    learning_rate, p_mean, p_std and optimiser.
    `progress` makes the bar, as tqdm does, `say` prints what a long training takes (`budget.announce_training`), `training` is
    its loop. Raises ValueError where no episode fills half a window, and where the device has too little memory.
    """
    train_data, _ = train_val(dataset)
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

    tensors, card = _model("denoiser", "edm", dataset, p, config, recipe, begin, lambda loop: loop.ema, progress)
    return restored(tensors, card).to(device), tensors["losses"]


def restored(tensors, card, kind=edm.Denoiser):
    """The network, frozen, of the tensors and the card that `load_denoiser` (or `load_world_model`) keeps."""
    network = kind(**card["config"])
    network.load_state_dict({name: tensor for name, tensor in tensors.items() if name != "losses"})
    return network.eval().requires_grad_(False)


def load_world_model(dataset, p, device, progress=tqdm):
    """(ensemble, losses [steps], seconds) of one-step models trained on the training side of `dataset`; made if missing.

    `p` has model_steps, model_passes, scale and seed. The seconds are those of its training, on the machine that made it.
    """
    train_data, val_data = train_val(dataset)
    recipe = worldmodel.Recipe(p.model_steps, seed=p.seed)
    recipe.steps = _at_most(p.model_passes, recipe.steps, recipe.batch_size, train_data)
    config = dict(obs_dim=train_data.spec.obs_dim, action_dim=train_data.spec.action_dim)

    def begin(checkpoint):
        return worldmodel.Training(_begun(worldmodel.Ensemble, config, p.seed).to(device), train_data, val_data, recipe)

    tensors, card = _model("world model", "worldmodel", dataset, p, config, recipe, begin, lambda loop: loop.ensemble, progress)
    return restored(tensors, card, worldmodel.Ensemble).to(device), tensors["losses"], card["seconds"]


def _begun(kind, config, seed):
    """A network with initial weights by `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(**config)


def _model(kind, module, dataset, p, config, recipe, begin, made, progress):
    """(tensors, card) of a model of the data, found or trained by the loop that `begin` makes; kept is `made(loop)`."""
    key = artifacts.key(data=dataset.key, config=config, recipe=vars(recipe), code=artifacts.code_version(module))
    card = dict(kind=kind, recipe=vars(recipe), data=dataset.label, data_key=dataset.key, scale=p.scale)

    def finished(loop):
        network = made(loop)
        return {**network.state_dict(), "losses": loop.losses}, {**card, "config": network.config}

    folder, text = kind.replace(" ", "") + "s", f"training the {kind} on {dataset.label}"
    return _trained(folder, f"{dataset.key}-{p.scale}-{key}", begin, finished, text, progress)[1:]
