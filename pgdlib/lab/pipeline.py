"""What the notebooks share: the guide, the data and the denoiser, loaded from `runs/` or made."""

import shutil
import tempfile
import time
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pgdlib import data, edm, measures, worldmodel
from pgdlib.lab import budget, collect, minari_files, store
from pgdlib.policies import GaussianPolicy
from pgdlib.simulators import pen as adroit

SHIPPED_GUIDE = store.PACKAGE / "assets" / "ppo_pen.safetensors"
DEMONSTRATOR = store.PACKAGE / "assets" / "ppo_pen_demonstrator.safetensors"  # another seed, a fifth of the steps


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
        policy = from_sb3_zip(path, adroit.OBS_DIM, adroit.ACTION_DIM)
        return policy.requires_grad_(False), dict(kind="guide", source=path.name)
    try:
        tensors, card = store.load(path)
        policy = GaussianPolicy(**card["config"])
        policy.load_state_dict(tensors)
    except (store.CorruptArtifact, KeyError, TypeError, RuntimeError) as e:
        raise ValueError(f"guide={guide!r} cannot be used: {e}") from e
    found = policy.config["obs_dim"], policy.config["action_dim"]
    if found != (adroit.OBS_DIM, adroit.ACTION_DIM):
        raise ValueError(
            f"guide={guide!r} is a policy of another environment: {found[0]} observations and {found[1]} actions; needed are "
            f"{adroit.OBS_DIM} and {adroit.ACTION_DIM}"
        )
    return policy.requires_grad_(False), card


def save_guide(path, policy, card):
    """Write a `GaussianPolicy` with its card to `path`."""
    store.save(path, policy.state_dict(), {**card, "kind": "guide", "config": policy.config, "versions": store.versions()})


def train_guide(steps, seed):
    """(policy, card) of a guide trained with PPO for `steps` environment steps; kept in runs/guides/.

    If it is stopped, the next call goes on from its checkpoint and loses at most two minutes' work.
    """
    from pgdlib.lab import ppo

    key = store.key(steps=steps, seed=seed, code=store.code_version("lab.ppo"))
    path = store.root() / "guides" / f"ppo-{key}.safetensors"
    checkpoint = store.root() / "checkpoints" / path.name

    def make():
        with tqdm(total=steps, desc="training PPO", unit=" steps", mininterval=5) as bar:

            def report(done, mean, se):
                bar.update(done - bar.n)
                bar.set_postfix_str(f"return {mean:.0f} ± {se:.0f}")

            model, curve = ppo.train(seed=seed, steps=steps, report=report, checkpoint=checkpoint, say=bar.write)
        with tempfile.TemporaryDirectory() as folder:
            model.save(Path(folder) / "model.zip")
            policy = from_sb3_zip(Path(folder) / "model.zip", adroit.OBS_DIM, adroit.ACTION_DIM)
        card = dict(kind="guide", config=policy.config, parameters={**ppo.DEFAULTS, "steps": steps}, seed=seed, curve=curve)
        return policy.state_dict(), {**card, **_evaluation(policy)}

    store.artifact(path, make)
    store.discard(checkpoint)  # not before the guide is kept
    return load_guide(path)


def _evaluation(policy, episodes=200):
    """The guide's return on D4RL's scale, mean and sampled actions, with 95% intervals over `episodes` episodes."""
    card = {"evaluation episodes": episodes}
    for name, generator in (("mean action", None), ("sampled action", torch.Generator().manual_seed(1))):
        returns = adroit.rollout(policy.act(generator), episodes, np.random.default_rng(1), adroit.D4RL_HORIZON).d4rl_returns
        card[f"return, {name}"] = "{:.0f} [{:.0f}, {:.0f}]".format(*measures.interval(returns))
    return card


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
    is_d4rl = folder is not None
    name = f"D4RL pen-{dataset}" if is_d4rl else f"stand-in pen-{dataset}"
    if folder is None:
        folder = _stand_in(dataset, steps, progress, say)
    key = store.key(content=minari_files.digest(folder), code=store.code_version("data", "lab.minari_files"))
    cache = store.root() / "data" / f"{dataset}-{'d4rl' if is_d4rl else 'standin'}-{key}.safetensors"
    tensors, _ = store.artifact(
        cache, lambda: (minari_files.from_minari(folder, name)[0].tensors(), dict(kind="data", name=name))
    )
    raw = data.Trajectories.from_tensors(tensors, name)
    repaired, cut, dropped = data.end_at_falls(raw)
    say(f"{name}: {len(raw.lengths):,} episodes, {len(raw.rewards):,} steps")
    return Dataset(repaired, raw, is_d4rl, cache.stem, cut, dropped)


def _stand_in(dataset, steps, progress, say):
    steps = 5_000 if dataset == "human" else steps
    policy, card = load_guide(SHIPPED_GUIDE if dataset == "expert" else DEMONSTRATOR)
    inputs = dict(steps=steps, policy=card, code=store.code_version("lab.collect"))
    folder = store.root() / "minari" / f"{dataset}-{store.key(**inputs)}"
    place = folder / "standin" / "pen" / f"{dataset}-v0"
    if not minari_files.is_whole(place):
        with store.lock(folder):
            if place.exists() and not minari_files.is_whole(place):
                reason = f"{place} is damaged: its checksum does not hold"
                say(f"{reason}. Set aside as {store.set_aside(folder, reason).name}; collecting it again.")
            if not place.exists():
                with progress(total=100, desc=f"collecting the stand-in {dataset}", unit="%", mininterval=2) as bar:
                    collect.write(dataset, folder, policy, steps, lambda done: bar.update(round(100 * done) - bar.n))
    shutil.rmtree(folder / "parts", ignore_errors=True)  # of a run that was killed at the very end
    store.note_use(folder)
    return place


def train_val(dataset):
    """(training, validation) episodes: a tenth of the unique episodes is kept back."""
    return data.split(dataset.data, 0.1, seed=0)


def _at_most(passes, steps, batch_size, data):
    """Training steps that draw each window of the data, in the mean, at most `passes` times; None is no limit."""
    return steps if passes is None else min(steps, max(1, round(passes * len(data.rewards) / batch_size)))


def load_denoiser(dataset, p, device, progress=tqdm, say=print):
    """(EMA denoiser, losses [steps]) trained on the training side of `dataset` with the settings `p`; made if missing.

    `p` has horizon, features, blocks, kernel_size, train_steps, batch_size, learning_rate, epochs, passes, transform and seed.
    `progress` makes the bar, as tqdm does, and `say` prints what a long training takes (`budget.announce_training`). With
    torch.distributed all processes train together. Raises ValueError where no episode fills half a window, and where the
    device has too little memory.
    """
    train_data, _ = train_val(dataset)
    if p.horizon > 2 * (longest := int(train_data.lengths.max())):
        allowed = f"it must be at most {2 * longest}, twice the longest episode"
        raise ValueError(f"horizon={p.horizon} is not allowed for {dataset.label}; {allowed}")
    steps = p.train_steps or round(p.epochs * len(train_data.rewards) / (p.horizon * p.batch_size))
    steps = _at_most(p.passes, steps, p.batch_size, train_data)
    config = dict(horizon=p.horizon, features=p.features, blocks=p.blocks, kernel_size=p.kernel_size, transform=p.transform)
    how = edm.Training(steps, p.batch_size, p.learning_rate, p.seed)
    code = store.code_version("edm")
    name = f"{dataset.key}-{p.scale}-{store.key(data=dataset.key, config=config, how=vars(how), code=code)}"
    checkpoint = store.root() / "checkpoints" / f"{name}.safetensors"

    def make():
        budget.announce_training(config, how, edm.steps_done(checkpoint), p.scale, device, say)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(p.seed)
            denoiser = edm.Denoiser(**config)
        denoiser.normaliser.fit(train_data.packed())
        denoiser.to(device)
        windows = data.Windows(train_data, denoiser.normaliser, p.horizon, device)
        started = time.monotonic()
        with progress(total=steps, desc=f"training the denoiser on {dataset.label}", mininterval=5) as bar:

            def report(step, losses):
                bar.update(step - bar.n)

            ema, losses = edm.train(denoiser, windows, how, checkpoint, report=report)
        card = dict(kind="denoiser", config=config, how=vars(how), data=dataset.label, data_key=dataset.key, scale=p.scale)
        return {**ema.state_dict(), "losses": losses}, {**card, "seconds": time.monotonic() - started}

    tensors, card = edm.artifact(store.root() / "denoisers" / f"{name}.safetensors", make)
    store.discard(checkpoint)  # not before the weights are kept
    losses = tensors.pop("losses")
    return restored(tensors, card).to(device), losses


def restored(tensors, card):
    """The denoiser with the weights `tensors` and the `card` that `load_denoiser` keeps with them."""
    denoiser = edm.Denoiser(**card["config"])
    denoiser.load_state_dict(tensors)
    return denoiser.eval().requires_grad_(False)


def load_world_model(dataset, p, device):
    """(ensemble, losses [steps], seconds) of one-step models trained on the training side of `dataset`; made if missing.

    `p` has model_steps, model_passes, scale and seed. The seconds are those of its training, on the machine that made it.
    """
    train_data, val_data = train_val(dataset)
    how = worldmodel.Training(p.model_steps, seed=p.seed)
    how.steps = _at_most(p.model_passes, how.steps, how.batch_size, train_data)
    code = store.code_version("worldmodel")
    name = f"{dataset.key}-{p.scale}-{store.key(data=dataset.key, how=how.card(), code=code)}"
    checkpoint = store.root() / "checkpoints" / f"world-{name}.safetensors"

    def make():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(p.seed)
            ensemble = worldmodel.Ensemble().to(device)
        started = time.monotonic()
        with tqdm(total=how.steps, desc=f"training the world model on {dataset.label}", mininterval=5) as bar:
            losses = worldmodel.train(
                ensemble, train_data, val_data, how, checkpoint, report=lambda step, losses: bar.update(step - bar.n)
            )
        card = dict(kind="world model", config=ensemble.config, how=how.card(), data=dataset.label, data_key=dataset.key)
        return {**ensemble.state_dict(), "losses": losses}, {**card, "seconds": time.monotonic() - started}

    tensors, card = store.artifact(store.root() / "worldmodels" / f"{name}.safetensors", make)
    store.discard(checkpoint)  # not before the weights are kept
    losses = tensors.pop("losses")
    ensemble = worldmodel.Ensemble(**card["config"])
    ensemble.load_state_dict(tensors)
    return ensemble.to(device).requires_grad_(False), losses, card["seconds"]
