"""What a notebook may be asked: the three scales, and the check of papermill parameters."""

import ast
import math
import sys
from types import SimpleNamespace

SCALES = ("ci", "quick", "paper")
DATASETS = ("human", "cloned", "expert")
SOURCES = ("auto", "d4rl", "local")
DEVICES = ("auto", "cpu", "cuda")

# `ci` proves that the path runs, `quick` is for a laptop's CPU, `paper` holds the paper's Tables 2 and 3.
SETTINGS = {
    # the local stand-ins: steps of cloned and expert (human always has 25 episodes of 200)
    "data_steps": dict(ci=4_000, quick=100_000, paper=500_000),
    "horizon": dict(ci=16, quick=32, paper=128),  # trajectory length, steps
    # U-Net (Table 3)
    "blocks": dict(ci=2, quick=2, paper=2),
    "features": dict(ci=16, quick=128, paper=1024),
    "kernel_size": dict(ci=3, quick=3, paper=3),
    # training (Table 3)
    "train_steps": dict(ci=60, quick=10_000, paper=None),
    "epochs": dict(ci=None, quick=None, paper=512),  # of the data's steps, where train_steps is None
    "passes": dict(ci=16, quick=8, paper=None),  # over all windows at most: on human's 5,000 steps more of them overfit
    "batch_size": dict(ci=16, quick=32, paper=16),
    "learning_rate": dict(ci=1e-3, quick=2e-3, paper=1e-3),
    # the world model that the paper argues against; at quick half the denoiser's training time
    "model_steps": dict(ci=60, quick=12_000, paper=200_000),
    "model_passes": dict(ci=80, quick=80, paper=None),
    "long": dict(ci=16, quick=64, paper=128),  # length of the trajectories compared with it
    # EDM sampler (Table 2); why quick has fewer steps: notebook 02
    "solver": dict(ci="heun", quick="heun", paper="heun"),
    "steps": dict(ci=8, quick=32, paper=400),
    "warmup": dict(ci=2, quick=5, paper=64),  # steps without guidance, at the highest noise
    "churn": dict(ci=1.6, quick=13.2, paper=80.0),
    "samples": dict(ci=8, quick=192, paper=1024),  # trajectories for each λ
    # the agents of the benchmark (IQL: Table 4); at quick fewer steps with faster targets
    "agent_steps": dict(ci=40, quick=4_000, paper=50_000),
    "real_steps": dict(ci=None, quick=None, paper=1_000_000),  # one more row on real data, as long as published results
    "agent_batch": dict(ci=32, quick=256, paper=512),
    "agent_rate": dict(ci=1e-3, quick=1e-3, paper=3e-4),  # learning rate
    "hidden": dict(ci=16, quick=128, paper=256),  # width of the two hidden layers
    "polyak": dict(ci=0.05, quick=0.05, paper=0.005),  # share by which the targets move, each step
    "resample_every": dict(ci=20, quick=1_000, paper=10_000),  # steps between new synthetic data
    "windows": dict(ci=8, quick=384, paper=2_048),  # trajectories for each agent, every time
    # how they are drawn: so many that quick takes the cheapest sampler of notebook 02
    "draw_solver": dict(ci="multistep", quick="multistep", paper="heun"),
    "draw_steps": dict(ci=8, quick=16, paper=400),
    "draw_warmup": dict(ci=2, quick=3, paper=64),
    "draw_churn": dict(ci=0.0, quick=0.0, paper=80.0),
    "curve_points": dict(ci=2, quick=4, paper=10),
    "curve_episodes": dict(ci=2, quick=12, paper=50),  # for each agent at each point
    "test_episodes": dict(ci=4, quick=160, paper=1_000),  # for each agent at the end
    # the guide
    "ppo_steps": dict(ci=2_048, quick=5_000_000, paper=5_000_000),  # environment steps, if it is trained anew
    "episodes": dict(ci=20, quick=200, paper=1_000),  # for its return
}


def settings(scale):
    """The settings of `scale`, name -> value."""
    return {name: row[scale] for name, row in SETTINGS.items()}


def defaults(scale, **more):
    """The settings of `scale` and `more` as attributes, for use without a notebook."""
    return SimpleNamespace(scale=scale, **settings(scale), **more)


def one_of(*choices):
    """Accept one of `choices`, of the same type: 1 is not True."""
    return lambda v: any(type(v) is type(c) and v == c for c in choices), f"one of {', '.join(map(repr, choices))}"


def number(low=-math.inf, high=math.inf):
    """Accept a finite number from `low` to `high`, no larger than a float can be."""

    def accepts(v):
        is_number = isinstance(v, int | float) and not isinstance(v, bool)
        return is_number and abs(v) <= sys.float_info.max and low <= v <= high

    return accepts, f"a number {_range(low, high)}"


def integer(low, high=2**32 - 1):
    """Accept a whole number from `low` to `high`."""
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high, f"a whole number {_range(low, high)}"


def numbers(low=-math.inf):
    """Accept a list of numbers, at least one, each at least `low`."""
    accepts, words = number(low)
    return lambda v: isinstance(v, list) and len(v) > 0 and all(map(accepts, v)), f"a list, not empty, of {words}"


def text():
    """Accept a string that is not empty."""
    return lambda v: isinstance(v, str) and v != "", "a text that is not empty"


def optional(rule):
    """Accept None, for the scale's own value, or what `rule` accepts."""
    accepts, words = rule
    return lambda v: v is None or accepts(v), f"{words}, or None for the scale's own value"


def auto_or(rule):
    """Accept "auto", for the notebook to find the value, or what `rule` accepts."""
    accepts, words = rule
    return lambda v: (isinstance(v, str) and v == "auto") or accepts(v), f"'auto' or {words}"


def optional_settings(names):
    """Rules for the settings `names` (words in one string), each of which may be None for the scale's own value."""
    rules = {
        "horizon": integer(4, 10_000),  # far beyond any episode; windows of more would not fit into memory
        "long": integer(8),
        "data_steps": integer(2_000),
        "features": integer(8),
        "solver": one_of("heun", "multistep"),
        "steps": integer(2),
        "churn": number(0),
        "warmup": integer(0),
        "samples": integer(2),
        "episodes": integer(2),
        "test_episodes": integer(2),
        "agent_rate": number(1e-8, 1),
        "polyak": number(1e-6, 1),
        "draw_solver": one_of("heun", "multistep"),
        "draw_steps": integer(2),
        "draw_churn": number(0),
        "draw_warmup": integer(0),
    }
    return {name: optional(rules.get(name, integer(1))) for name in names.split()}


def check(namespace, **rules):
    """The notebook's parameters, each checked by its rule, with the settings of the scale where they are None.

    Call it with `globals()` after the parameters cell. Raises ValueError that names the parameter, its value and what is
    allowed. A parameter that papermill injected but that no rule knows is an error too: papermill itself only warns and
    runs on with the defaults.
    """
    for name in sorted(_injected(namespace) - set(rules)):
        raise ValueError(f"unknown parameter {name}={_shown(namespace.get(name))}; this notebook takes {', '.join(rules)}")
    for name, (accepts, words) in rules.items():
        if not accepts(namespace[name]):
            raise ValueError(f"parameter {name}={_shown(namespace[name])} is not allowed; it must be {words}")
    given = {name: namespace[name] for name in rules}
    if given.get("device") == "cuda":
        _require_cuda()
    own = settings(given["scale"]) if "scale" in given else {}
    return SimpleNamespace(**{**own, **{k: v for k, v in given.items() if v is not None or k not in own}})


def _injected(namespace):
    """Names that papermill's injected cell assigned: its first line is the comment `# Parameters`."""
    cells = [c for c in namespace.get("In", []) if c.startswith("# Parameters\n")]
    assigned = [n for c in cells for n in ast.walk(ast.parse(c)) if isinstance(n, ast.Assign)]
    return {t.id for a in assigned for t in a.targets if isinstance(t, ast.Name)}


def _shown(value):
    """`value` as messages show it, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no number of thousands of digits, and no list that deep
        return f"({type(value).__name__}, too large to be shown)"
    return text if len(text) <= 500 else f"{text[:500]}... ({len(text):,} characters)"


def _require_cuda():
    import torch

    if not torch.cuda.is_available():
        raise ValueError("parameter device='cuda' is not allowed here: PyTorch finds no CUDA device; use 'cpu' or 'auto'")


def _range(low, high):
    if high == math.inf:
        return "of any size" if low == -math.inf else f"of at least {low}"
    return f"from {low} to {high}"
