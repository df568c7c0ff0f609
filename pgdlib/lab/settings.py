"""What a notebook may be asked: every parameter, once; the values of the three scales; and the check of what was given."""

import ast
import re
from contextlib import suppress
from difflib import get_close_matches
from types import SimpleNamespace
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from pgdlib.guidance import RULES
from pgdlib.lab import artifacts
from pgdlib.lab.tasks import DATASETS, KINDS, PEN
from pgdlib.sampler import SOLVERS
from pgdlib.simulators.locomotion import RUNNERS

SCALES = ("ci", "quick", "paper")


def one_of(*choices):
    """One of these texts."""
    return Annotated[Literal[choices], f"one of {', '.join(map(repr, choices))}"]


def several(*choices):
    """Lists of these texts."""
    return Annotated[list[Literal[choices]], Field(min_length=1), f"a list, not empty, of {', '.join(map(repr, choices))}"]


def whole(low, high=2**32 - 1):
    """Whole numbers from `low` to `high`."""
    return Annotated[int, Field(ge=low, le=high), f"a whole number from {low} to {high}"]


def number(low, high=None):
    """Finite numbers from `low` to `high`."""
    words = f"a number of at least {low}" if high is None else f"a number from {low} to {high}"
    # By itself pydantic takes an array of one number for a number.
    return Annotated[float, Field(ge=low, le=high, allow_inf_nan=False), BeforeValidator(_number), words]


def _number(value):
    if isinstance(value, int | float):
        return value
    raise ValueError


# A type, and in the end, in words, what it allows.
TEXT = Annotated[str, Field(min_length=1), "a text that is not empty"]
NUMBERS = Annotated[list[number(0)], Field(min_length=1), "a list, not empty, of a number of at least 0"]
WEIGHTS = Annotated[list[number(0.001, 1000)], Field(min_length=1), "a list, not empty, of a number from 0.001 to 1000"]
TEXTS = Annotated[list[TEXT], Field(min_length=1), "a list, not empty, of texts that are not empty"]
AGENTS = "iql", "td3_bc", "rebrac", "cql", "edac", "bcq"
DATA = "real", "synther", "pgd", "mbpo", "mopo", "morel", "rambo"
AUTO_OR_NUMBER = Annotated[Literal["auto"] | number(0), "'auto' or a number of at least 0"]
ONES = f"one of {', '.join(map(repr, PEN))}, a runner's ({', '.join(RUNNERS)}) with -{', -'.join(KINDS)}"
NAMED = rf"({'|'.join(DATASETS)}|(\w[\w.-]*/)*\w[\w.-]*-v\d+)"
DATASET = Annotated[str, Field(pattern=rf"^{NAMED}$"), f"{ONES}, or a Minari dataset's id"]
YES_OR_NO = Annotated[bool, "one of True, False"]

# fmt: off
PARAMETERS = {  # name: (what is allowed, what it is)
    "scale": (one_of(*SCALES), "ci, quick or paper: the size of everything"),
    "dataset": (DATASET, "human, cloned, expert, hopper-medium and the like, or a Minari id"),
    "source": (one_of("auto", "d4rl", "local"), "d4rl, local (the stand-in), or auto: D4RL's data if they are there"),
    "seed": (whole(0), "seed of all that is random"),
    "device": (one_of("auto", "cpu", "cuda"), "cpu, cuda or auto"),
    "transform": (one_of("raw", "arctanh"), "raw or arctanh: of actions, before they are normalised"),
    "guide": (TEXT, "the policy that guides: shipped, or a file"),
    "retrain": (YES_OR_NO, "whether to train the guide anew"),
    "rule": (one_of(*RULES), "rule of guidance"),
    "calibrated_rule": (one_of(*RULES), "rule of the row with the calibrated λ"),
    "units": (one_of("natural", "raw"), "natural or raw: units of λ"),
    "lam": (AUTO_OR_NUMBER, "strength of guidance, or auto: the calibrated λ of each rule"),
    "lams": (NUMBERS, "several λ"),
    "agents": (several(*AGENTS), f"{', '.join(AGENTS)}; the first one is shown in full"),
    "sources": (several(*DATA), f"{', '.join(DATA)}: what they learn from"),
    "conservatism": (WEIGHTS, "weights of staying near the data, over an agent's own"),
    "seeds": (whole(1, 1000), "agents of each row"),
    "real_fraction": (number(0, 1), "share of real data in synthetic batches"),
    "sweep": (TEXT, "Parquet file of a sweep of 08, shipped, or newest at this scale"),
    "benchmark": (TEXT, "the same of 05"),
    "verdicts": (TEXTS, "Parquet files of sweeps of 02, 04, 06 and 08, or shipped"),
}
# `ci` proves that the path runs, `quick` is for a laptop's CPU, `paper` holds the paper's Tables 2 to 4.
SETTINGS = {  # name: (what is allowed beside None, its values at ci, quick and paper, what it is)
    # human always has 25 episodes of 200 steps; more than 10,000 steps are beyond any episode, and would not fit into memory
    "data_steps":     (whole(2_000), 4_000, 500_000, 500_000, "steps of the stand-ins, but for human's"),
    "horizon":        (whole(4, 10_000), 16, 32, 128, "steps of a trajectory"),
    # the U-Net and its training (Table 3), where it is trained; on human's 5,000 steps more passes overfit
    "denoiser":       (TEXT, "train", "shipped", "train", "shipped, train (at this scale), or a file of a diffusion model"),
    "blocks":         (whole(1), 2, 3, 2, "levels of the U-Net"),
    "features":       (whole(8), 16, 96, 1024, "channels of the U-Net's first level"),
    "train_steps":    (whole(1), 60, 5_000, None, "training steps of the diffusion model"),
    "short_steps":    (whole(1), 20, 600, 10_000, "training steps of 02's model from scratch"),
    "epochs":         (whole(1), None, None, 512, "of the data's steps, where train_steps is None"),
    "passes":         (whole(1), 16, 8, None, "over all windows, at most"),
    "batch_size":     (whole(1), 16, 32, 16, "windows of a training step"),
    "learning_rate":  (number(1e-8, 1), 1e-3, 2e-3, 1e-3, "of the diffusion model"),
    "p_mean":         (number(-10, 10), -0.6, -0.6, -1.2, "mean of ln σ, the noise in training"),
    "p_std":          (number(0.01, 10), 1.4, 1.4, 1.2, "std of ln σ, the noise in training"),
    "optimiser":      (one_of("adam", "muon"), "muon", "muon", "adam", "adam or muon: of the diffusion model"),
    # the world model that the paper argues against; at quick in less time than the denoiser
    "model_steps":    (whole(1), 60, 12_000, 200_000, "training steps of the world model"),
    "model_passes":   (whole(1), 80, 80, None, "over all transitions, at most"),
    "long":           (whole(8), 16, 64, 128, "steps of the trajectories beside the world model's"),
    # EDM's sampler (Table 2); why quick has another, and how much churn is to each: notebook 02
    "solver":         (one_of(*SOLVERS), "heun", "multistep", "heun", "heun or multistep"),
    "steps":          (whole(2), 8, 24, 400, "steps of the sampler"),
    "warmup":         (whole(0), 2, 4, 64, "steps without guidance, at the highest noise"),
    "churn":          (number(0), 1.6, 24.0, 80.0, "how much noise the sampler adds"),
    "samples":        (whole(2), 8, 192, 1024, "trajectories for each λ"),
    # the agents of the benchmark (IQL: Table 4); at quick fewer steps with faster targets
    "agent_steps":    (whole(1), 40, 4_000, 50_000, "training steps of an agent"),
    "real_steps":     (whole(1), None, None, 1_000_000, "steps of one more row, on real data"),
    "agent_batch":    (whole(1), 32, 256, 512, "transitions of a training step"),
    "agent_rate":     (number(1e-8, 1), 1e-3, 1e-3, 3e-4, "learning rate of an agent"),
    "hidden":         (whole(1), 16, 128, 256, "width of an agent's two hidden layers"),
    "polyak":         (number(1e-6, 1), 0.05, 0.05, 0.005, "share by which targets move, each step"),
    "resample_every": (whole(1), 20, 1_000, 10_000, "steps between new synthetic data"),
    "windows":        (whole(1), 8, 384, 2_048, "trajectories for each agent, every time"),
    # how they are drawn: so many that quick takes few steps and no churn
    "draw_solver":    (one_of(*SOLVERS), "multistep", "multistep", "heun", "solver of synthetic data"),
    "draw_steps":     (whole(2), 8, 16, 400, "steps of their sampler"),
    "draw_warmup":    (whole(0), 2, 3, 64, "steps without guidance"),
    "draw_churn":     (number(0), 0.0, 0.0, 80.0, "noise that it adds"),
    "curve_points":   (whole(1), 2, 4, 10, "of a learning curve"),
    "curve_episodes": (whole(1), 2, 12, 50, "for each agent at each point"),
    "test_episodes":  (whole(2), 4, 160, 1_000, "test episodes for each agent"),
    # the guide, if it is trained anew
    "ppo_steps":      (whole(1), 2_048, 5_000_000, 5_000_000, "steps of the environment, if trained anew"),
    "episodes":       (whole(2), 20, 200, 1_000, "episodes for the guide's return"),
}
# fmt: on


def of_scale(scale):
    """The settings of `scale`, name -> value."""
    return {name: row[1 + SCALES.index(scale)] for name, row in SETTINGS.items()}


def defaults(scale, **more):
    """The settings of `scale` and `more` as attributes, for use without a notebook."""
    return SimpleNamespace(scale=scale, **{**of_scale(scale), **more})


def check(namespace, **own):
    """The notebook's parameters as attributes, with the settings of the scale where they are None; call it with `globals()`.

    They are what the notebook's cell of parameters assigns of the tables above and of `own`, name -> type, such as
    `number(0)`. Raises ValueError that names the parameter, its value and what is allowed; also for a name that papermill
    injected but that the cell has not: papermill itself only warns, and runs on with the defaults.
    """
    known = {name: row[0] for name, row in (PARAMETERS | SETTINGS).items()} | own
    injected, cells = [], []  # of IPython's history; papermill's cell begins with a comment
    for cell in namespace.get("In", []):
        (injected if cell.startswith("# Parameters\n") else cells).append(_assigned(cell))
    names = max(([n for n in cell if n in known] for cell in cells), key=len, default=[])
    names = names or [n for n in namespace if n in known]  # no notebook
    for name in sorted(set().union(*injected) - set(names)):
        raise ValueError(f"unknown parameter {name}={_shown(namespace.get(name))}; this notebook takes {listed(name, names)}")
    given = {name: namespace[name] for name in names}
    for name, value in given.items():
        _require(name, value, known[name])
    artifacts.require_writable()
    scaled = of_scale(given["scale"]) if "scale" in given else {}
    return SimpleNamespace(**{**scaled, **{k: v for k, v in given.items() if v is not None or k not in scaled}})


def listed(name, known):
    """The `known` names, and which of them was meant by one that is none of them."""
    meant = get_close_matches(str(name).replace("-", "_"), known, 1)
    return ", ".join(known) + "".join(f"; perhaps {n} is meant" for n in meant)


def _assigned(cell):
    """The names that a cell assigns if it does nothing but `name = value`."""
    with suppress(SyntaxError, ValueError, AttributeError):
        return [statement.targets[0].id for statement in ast.parse(cell).body]
    return []


def _require(name, value, kind):
    if value is None and name in SETTINGS:
        return
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError:
        words = kind.__metadata__[-1] + ", or None for the scale's own value" * (name in SETTINGS)
        hint = _hint(value) if "a number" in words else ""
        raise ValueError(f"parameter {name}={_shown(value)} is not allowed; it must be {words}{hint}") from None
    if (name, value) == ("device", "cuda") and not torch.cuda.is_available():
        raise ValueError("parameter device='cuda' is not allowed here: PyTorch finds no CUDA device; use 'cpu' or 'auto'")


def _hint(value):
    """What to write where YAML took a number for a text, such as 1e-4."""
    for text in filter(lambda v: isinstance(v, str), value if isinstance(value, list) else [value]):
        if found := re.fullmatch(r"(-?\d+)(\.\d*)?e([+-]?)(\d+)", text):
            return f"; write {found[1]}{found[2] or '.0'}e{found[3] or '+'}{found[4]}, YAML takes {text} for a text"
    return ""


def _shown(value):
    """`value` as messages show it, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no number of thousands of digits, and no list that deep
        return f"({type(value).__name__}, too large to be shown)"
    return text if len(text) <= 500 else f"{text[:500]}... ({len(text):,} characters)"
