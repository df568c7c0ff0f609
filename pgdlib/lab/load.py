"""What the notebooks share: the guide and the data, loaded from `runs/` or made."""

import re
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from pgdlib import data
from pgdlib.agents.squashed import SquashedGaussian
from pgdlib.lab import artifacts, guide_zip, minari_files, resumable, standins, tasks
from pgdlib.policies import GaussianPolicy

SHIPPED_GUIDE = tasks.ASSETS / "ppo_pen.safetensors"
DEMONSTRATOR = tasks.ASSETS / "ppo_pen_demonstrator.safetensors"  # another seed, a fifth of the steps


def device_of(name):
    """The torch device for `name`: "auto", "cpu" or "cuda"."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def load_guide(guide="shipped", task=None, spec=None):
    """(policy, card) of a guide: "shipped", a .safetensors that `save_guide` wrote, or a .zip as `guide_zip.from_zip` has it.

    It must be of the `Task` (by default pen), or have the sizes of `spec`. Raises ValueError that names the parameter `guide`
    for a file that is missing, damaged, or of another environment, and where none ships.
    """
    task = task or tasks.by_name("pen")
    needed = tuple(getattr(spec or task.simulator, k) for k in ("obs_dim", "action_dim"))
    files = "a .safetensors guide or a Stable-Baselines3 .zip"
    if (path := task.guide if guide == "shipped" else guide) is None:
        raise ValueError(f"guide='shipped' is not allowed: none ships for {task.name}; it must be {files}")
    path = artifacts.given("guide", path, f"'shipped', {files}")
    if path.suffix == ".zip":
        policy = guide_zip.from_zip(path, *needed)
        return policy.requires_grad_(False), dict(kind="guide", source=path.name)
    try:
        tensors, card = artifacts.load(path)
        policy = (GaussianPolicy if "log_std" in tensors else SquashedGaussian)(**card["config"])
        policy.load_state_dict(tensors)
    except (artifacts.CorruptArtifact, KeyError, TypeError, RuntimeError) as e:
        raise ValueError(f"guide={guide!r} cannot be used: {e}") from e
    if (found := tuple(policy.config[k] for k in ("obs_dim", "action_dim"))) != needed:
        text = "is a policy of another environment: {} observations and {} actions; needed are {} and {}"
        raise ValueError(f"guide={guide!r} " + text.format(*found, *needed))
    return policy.requires_grad_(False), card


def shipped_guide(task):
    """The policy that ships for the `Task`, or None."""
    return load_guide("shipped", task)[0] if task.guide else None


def save_guide(path, policy, card):
    """Write a `GaussianPolicy` or `SquashedGaussian` with its card to `path`."""
    card = {**card, "kind": "guide", "config": policy.config, "versions": artifacts.versions()}
    artifacts.save(path, policy.state_dict(), card)


def train_guide(steps, seed, task=None):
    """(policy, card) of a guide of the `Task` (by default pen) trained with PPO for `steps` environment steps; kept in runs/.

    If it is stopped, the next call goes on from its checkpoint, which is two minutes old at most, with new episodes.
    """
    from pgdlib.lab import guide_ppo  # Stable-Baselines3 takes seconds to import

    task = task or tasks.by_name("pen")

    def begin(checkpoint):
        return guide_ppo.Training(task.simulator, seed, **guide_ppo.OF_TASK.get(task.name, {}) | dict(steps=steps))

    def finished(training):
        policy = training.policy()
        card = dict(kind="guide", config=policy.config, parameters=training.parameters, seed=seed, curve=training.curve)
        return policy.state_dict(), {**card, **guide_ppo.evaluation(task.simulator, policy)}

    def words(training):
        return "return {:.0f} ± {:.0f}".format(*training.curve[-1][1:])

    name = f"ppo-{artifacts.key(task=task.name, steps=steps, seed=seed, code=artifacts.code_version('lab.guide_ppo'))}"
    path, *_ = resumable.trained("guides", name, begin, finished, "training PPO", words=words)
    return load_guide(path, task)


@dataclass
class Dataset:
    """A dataset that is ready for training, and where it comes from."""

    data: data.Trajectories  # episodes end where the environment ends them
    raw: data.Trajectories  # as the file holds them
    is_public: bool  # D4RL's, or Minari's of the same name
    key: str  # names the content
    cut_episodes: int
    dropped_steps: int
    made: dict | None = None  # of a stand-in: name, steps, and the policies that act in it
    task: tasks.Task = field(default_factory=lambda: tasks.by_name("pen"))
    sides: tuple | None = None  # of `train_val`, once it was asked for

    @property
    def label(self):
        """What titles, tables and file names call the data."""
        return self.data.name

    @property
    def slug(self):
        """The label as part of a file name; it holds a hyphen and no underscore."""
        return _slug(self.label.replace(" pen-", "-").replace("stand-in", "standin"))

    @property
    def simulator(self):
        """The `Simulator` of its environment; without states where none is known."""
        return self.task.simulator


def _slug(text):
    return re.sub(r"[^a-z0-9.]+", "-", text.lower())


def load_data(dataset, source, steps, progress=tqdm, say=print):
    """The `Dataset` of a name in `tasks.DATASETS`, or of any Minari dataset with the id `dataset`.

    `source`, of names: "d4rl" (D4RL's, or Minari's of that name), "local" (the stand-in), or "auto": D4RL's if they can be had.
    `steps` is the size of the stand-ins; human always has 25 episodes of 200. `progress` makes the bar of what is long, as
    tqdm does, and `say` prints.
    """
    folder, made = (_found if dataset in tasks.DATASETS else _of_id)(dataset, source, steps, progress, say)
    content = artifacts.key(content=minari_files.digest(folder), code=artifacts.code_version("data", "lab.minari_files"))
    key = f"{_slug(dataset)}-{'standin' if made else 'minari'}-{content}"
    cache = artifacts.root() / "data" / f"{key}.safetensors"
    tensors, _ = artifacts.artifact(cache, lambda: (minari_files.from_minari(folder, key).tensors(), dict(kind="data")))
    name, task, is_public = _called(dataset, folder, made, tensors, say)
    raw = data.Trajectories.from_tensors(tensors, name)
    say(f"{name}: {len(raw.lengths):,} episodes, {len(raw.rewards):,} steps")
    if not task.simulator.states:
        say(f"no simulator is known for {task.name}: dynamics errors and returns of policies are left out")
    missing = minari_files.INFO_DIMS.keys() - raw.info.keys() if task.name == "pen" else ()
    if missing:
        say(f"{name} goes without the simulator's {', '.join(sorted(missing))}: some episodes lack them, or hold odd ones")
    fallen = torch.from_numpy(task.simulator.ended(raw.next_obs.numpy()))  # which a file may go on after
    repaired, cut, dropped = data.end_where(raw, fallen | (raw.terminals > 0))
    return Dataset(repaired, raw, is_public, key, cut, dropped, made, task)


def _found(dataset, source, steps, progress, say):
    """(folder, None) of D4RL's or Minari's data of that name, or (folder, made) of the stand-in."""
    if source in ("auto", "d4rl") and dataset in tasks.PUBLIC:
        try:
            return minari_files.find(tasks.PUBLIC[dataset][0], hint="; or use source='local', the stand-in"), None
        except FileNotFoundError:
            if source == "d4rl":
                raise
            say(f"D4RL's {dataset} data is not on disk and cannot be downloaded (source='d4rl' says why): using the stand-in")
    elif source == "d4rl":
        raise ValueError(f"source='d4rl' is not allowed for dataset={dataset!r}, which Minari has not; use 'auto' or 'local'")
    policies, cards = _behaviour(dataset)
    weights = [artifacts.digest(policy.state_dict()) for policy in policies if policy]
    made = dict(name=dataset, steps=standins.steps_of(dataset, steps))
    made["policy"] = weights[0][:12] if len(weights) == 1 else artifacts.key(policies=weights)
    return standins.folder(dataset, steps, policies, cards, progress, say), made


def _of_id(dataset, source, steps, progress, say):
    try:
        return minari_files.find(dataset), None
    except (FileNotFoundError, ValueError) as e:
        raise ValueError(f"dataset={dataset!r} cannot be used: {e}") from e


def _behaviour(dataset):
    """(policies, their cards) that act in a stand-in, in order; None acts at random."""
    task, kind = tasks.of_dataset(dataset), dataset.split("-", 1)[-1]
    if kind == "random":
        return [None], "random"
    if task.name == "pen" or kind == "expert":
        policy, card = load_guide(task.guide if kind == "expert" else DEMONSTRATOR, task)
        return [policy], card
    tensors, card = artifacts.load(tasks.ASSETS / f"stages_{task.name}.safetensors")
    stages = [GaussianPolicy(**card["config"]).requires_grad_(False) for _ in card["steps"]]
    for number, policy in enumerate(stages):
        own = f"{number}."
        policy.load_state_dict({name.removeprefix(own): t for name, t in tensors.items() if name.startswith(own)})
    guide, own = load_guide(task.guide, task)
    policies = {"medium": stages[-1:], "medium-replay": stages, "medium-expert": [stages[-1], guide]}
    return policies[kind], [card, own]


def _called(dataset, folder, made, tensors, say):
    """(name, `Task`, whether it is D4RL's or Minari's own) of the data in `folder`."""
    spec = data.Trajectories.from_tensors(tensors, dataset).spec
    if dataset not in tasks.DATASETS:
        return dataset, tasks.of_environment(minari_files.environment(folder), spec, int(tensors["lengths"].max())), False
    task, known = tasks.of_dataset(dataset), tasks.PUBLIC.get(dataset)
    needed = task.simulator.obs_dim, task.simulator.action_dim
    if needed != (spec.obs_dim, spec.action_dim):
        found = f"it has {spec.obs_dim} observations and {spec.action_dim} actions; needed are {needed[0]} and {needed[1]}"
        raise ValueError(f"dataset={dataset!r} in {folder} is of another environment than {task.simulator.name}: {found}")
    is_public = made is None and minari_files.is_known(folder, known, tensors["lengths"])
    whose = "stand-in" if made else "own" if not is_public else "D4RL" if known[0].startswith("D4RL") else "Minari"
    name = f"{whose} {'pen-' if task.name == 'pen' else ''}{dataset}"
    if whose == "own":
        text = " of {:,} episodes and {:,} steps" * (len(known) > 1) + ", with the digest {}" * (len(known) > 3)
        say(f"{folder} is not {known[0]}{text.format(*known[1:])}: called {name!r} here, not D4RL")
    return name, task, is_public


def train_val(dataset):
    """(training, validation) episodes: a tenth of the unique episodes is kept back."""
    if dataset.sides is None:  # it takes a while
        dataset.sides = data.split(dataset.data, 0.1, seed=0)
    return dataset.sides
