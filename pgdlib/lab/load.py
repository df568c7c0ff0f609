"""What the notebooks share: the guide and the data, loaded from `runs/` or made."""

from dataclasses import dataclass
from os.path import isfile
from pathlib import Path

import torch
from tqdm import tqdm

from pgdlib import data
from pgdlib.agents.squashed import SquashedGaussian
from pgdlib.lab import artifacts, guide_zip, minari_files, resumable, standins
from pgdlib.policies import GaussianPolicy
from pgdlib.simulators import pen

SHIPPED_GUIDE = artifacts.PACKAGE / "assets" / "ppo_pen.safetensors"
DEMONSTRATOR = artifacts.PACKAGE / "assets" / "ppo_pen_demonstrator.safetensors"  # another seed, a fifth of the steps


def device_of(name):
    """The torch device for `name`: "auto", "cpu" or "cuda"."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def load_guide(guide="shipped"):
    """(policy, card) of a guide: "shipped", a .safetensors that `save_guide` wrote, or a .zip as `guide_zip.from_zip` has it.

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
        policy = (GaussianPolicy if "log_std" in tensors else SquashedGaussian)(**card["config"])
        policy.load_state_dict(tensors)
    except (artifacts.CorruptArtifact, KeyError, TypeError, RuntimeError) as e:
        raise ValueError(f"guide={guide!r} cannot be used: {e}") from e
    needed, found = (pen.OBS_DIM, pen.ACTION_DIM), tuple(policy.config[k] for k in ("obs_dim", "action_dim"))
    if found != needed:
        text = "is a policy of another environment: {} observations and {} actions; needed are {} and {}"
        raise ValueError(f"guide={guide!r} " + text.format(*found, *needed))
    return policy.requires_grad_(False), card


def save_guide(path, policy, card):
    """Write a `GaussianPolicy` or `SquashedGaussian` with its card to `path`."""
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
    path, *_ = resumable.trained("guides", name, begin, finished, "training PPO", words=words)
    return load_guide(path)


@dataclass
class Dataset:
    """A dataset that is ready for training, and where it comes from."""

    data: data.Trajectories  # episodes end at falls
    raw: data.Trajectories  # as the file holds them
    is_d4rl: bool
    key: str  # names the content
    cut_episodes: int
    dropped_steps: int
    made: dict | None = None  # of a stand-in: name, steps, and the policy that acts in it

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
        policy, card = load_guide(SHIPPED_GUIDE if dataset == "expert" else DEMONSTRATOR)
        made = dict(name=dataset, steps=standins.steps_of(dataset, steps), policy=artifacts.digest(policy.state_dict())[:12])
        folder = standins.folder(dataset, steps, policy, card, progress, say)
    content = artifacts.key(content=minari_files.digest(folder), code=artifacts.code_version("data", "lab.minari_files"))
    key = f"{dataset}-{'standin' if is_ours else 'minari'}-{content}"
    cache = artifacts.root() / "data" / f"{key}.safetensors"
    tensors, _ = artifacts.artifact(cache, lambda: (minari_files.from_minari(folder, key).tensors(), dict(kind="data")))
    is_d4rl = not is_ours and minari_files.is_d4rls(folder, dataset, tensors["lengths"])
    name = ("stand-in" if is_ours else "D4RL" if is_d4rl else "own") + f" pen-{dataset}"
    raw = data.Trajectories.from_tensors(tensors, name)
    if raw.spec != data.Spec(pen.OBS_DIM, pen.ACTION_DIM):
        found = f"{raw.spec.obs_dim} observations and {raw.spec.action_dim} actions"
        raise ValueError(f"dataset={dataset!r} in {folder} is of another environment than Adroit Pen: it has {found}")
    say(f"{name}: {len(raw.lengths):,} episodes, {len(raw.rewards):,} steps")
    if not (is_ours or is_d4rl):
        known = "{} of {:,} episodes and {:,} steps".format(*minari_files.D4RL[dataset])
        say(f"{folder} is not D4RL's, which is {known}: called {name!r} here, not D4RL")
    if missing := minari_files.INFO_DIMS.keys() - raw.info.keys():
        say(f"{name} goes without the simulator's {', '.join(sorted(missing))}: some episodes lack them, or hold odd ones")
    repaired, cut, dropped = data.end_where(raw, torch.from_numpy(pen.outcome(raw.next_obs.numpy())[2]))  # at falls
    return Dataset(repaired, raw, is_d4rl, key, cut, dropped, made if is_ours else None)


def train_val(dataset):
    """(training, validation) episodes: a tenth of the unique episodes is kept back."""
    return data.split(dataset.data, 0.1, seed=0)
