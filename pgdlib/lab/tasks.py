"""The tasks that the notebooks know: their simulator, the guide that ships for them, and what their datasets are called."""

from dataclasses import dataclass, field
from pathlib import Path

from pgdlib.lab import artifacts
from pgdlib.simulators import Simulator, locomotion, pen, pen_states, unknown

ASSETS = artifacts.PACKAGE / "assets"
PEN = ("human", "cloned", "expert")  # names without a task are pen's, as in the paper
KINDS = ("medium", "medium-replay", "medium-expert", "random", "expert")
DATASETS = PEN + tuple(f"{name}-{kind}" for name in locomotion.RUNNERS for kind in KINDS)
PUBLIC = {  # name -> Minari's id; of D4RL's, the episodes and steps too; the `minari_files.digest` could follow, where known
    "human": ("D4RL/pen/human-v2", 25, 5_000),
    "cloned": ("D4RL/pen/cloned-v2", 3_736, 500_000),
    "expert": ("D4RL/pen/expert-v2", 4_958, 499_206),
    **{f"{name}-{kind}": (f"mujoco/{name}/{kind}-v0",) for name in locomotion.RUNNERS for kind in ("medium", "expert")},
}


@dataclass(frozen=True)
class Task:
    """An environment, as the lab sees it."""

    name: str
    simulator: Simulator  # without states where it cannot be judged here
    guide: Path | None = None  # that ships
    states: dict = field(default_factory=dict)  # name -> slice of the observation: what says where things are, and how fast
    shown: dict = field(default_factory=dict)  # label -> index of the observation: a few channels, for figures
    axes: tuple = ()  # slices of the observation: what should come to point as the other one does


def by_name(name):
    """The `Task` "pen", "hopper", "walker2d" or "halfcheetah"."""
    if name == "pen":
        states = {of: s for of, s in pen.GROUPS.items() if s.stop <= pen_states.STATE_DIMS.stop}  # the rest is the target
        shown = {"pen height (m)": 26, "pen turn rate (rad/s)": 31, "pen axis x": 33, "thumb joint (rad)": 20}
        axes = pen.GROUPS["pen axis"], pen.GROUPS["target axis"]
        return Task(name, pen.PEN, ASSETS / "ppo_pen.safetensors", states, shown, axes)
    simulator = locomotion.runner(name)
    speed = simulator.groups["root velocity"].start
    shown = {"height (m)": 0, "forward speed (m/s)": speed, "torso angle (rad)": 1, "first joint (rad)": 2}
    return Task(name, simulator, ASSETS / f"ppo_{name}.safetensors", simulator.groups, shown)


def name_of(dataset):
    """The name of the task of a dataset in `DATASETS`."""
    return "pen" if dataset in PEN else dataset.split("-")[0]


def of_dataset(dataset):
    """The `Task` of a dataset in `DATASETS`."""
    return by_name(name_of(dataset))


def of_environment(env_id, spec, horizon):
    """The `Task` of a gymnasium environment of such sizes; with an `unknown` simulator where none is known for it."""
    known = {of[0]: name for name, of in locomotion.RUNNERS.items()} | {"AdroitHandPen-v1": "pen", "pen-v1": "pen"}
    if env_id in known:
        task = by_name(known[env_id])
        if (task.simulator.obs_dim, task.simulator.action_dim) == (spec.obs_dim, spec.action_dim):
            return task
    simulator = unknown(str(env_id or "an unnamed environment"), spec.obs_dim, spec.action_dim, horizon)
    shown = {f"observation {i}": i for i in range(min(4, spec.obs_dim))}
    return Task(simulator.name, simulator, None, simulator.groups, shown)


def siblings(dataset):
    """The names of the datasets of the same task; no simulator is made for it."""
    return [name for name in DATASETS if name_of(name) == name_of(dataset)] if dataset in DATASETS else [dataset]
