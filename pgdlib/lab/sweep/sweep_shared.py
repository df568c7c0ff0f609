"""What several points of a sweep need, made once before them: data, diffusion models, world models."""

from functools import cache

from pgdlib.lab import artifacts
from pgdlib.lab.sweep import sweep_plan

# What is made once for all points that agree in these settings: kind -> (what is made before it, settings).
DATA = ("dataset", "source", "data_steps")
MODEL = ("horizon", "features", "blocks", "transform", "train_steps", "batch_size", "learning_rate", "epochs")
SHARED = {
    "data": ((), DATA),
    "denoiser": (("data",), (*DATA, *MODEL, "passes", "scale", "seed", "device")),
    "world model": (("data",), (*DATA, "model_steps", "model_passes", "scale", "seed", "device")),
}
MAKERS = {"load_data": "data", "load_denoiser": "denoiser", "load_world_model": "world model"}  # by functions of `load`


def makes(notebook):
    """The kinds of `SHARED` that a `sweep_plan.Notebook` loads or makes."""
    code = "\n".join(notebook.cells).replace("Study.open(", "load_data(load_denoiser(")  # which calls both
    return [kind for name, kind in MAKERS.items() if f"{name}(" in code]


def stages(notebook, tasks, checked):
    """`tasks`, and before them the makers of what at least two of them need, to which they are bound by `needs`.

    Points that share something lie far apart: those that run at the same time should not wait for one another's artifacts.
    """
    makers, users, turn = {}, {}, {}
    for task in tasks:
        wanted = [_maker(kind, checked[task.key]) for kind in _kinds(notebook, checked.get(task.key))]
        makers |= {m.key: m for m in wanted}
        for m in wanted:
            users.setdefault(m.key, []).append(task.key)
        own = wanted[-1].key if wanted else ""
        turn[task.key] = turn[own] = turn.get(own, -1) + 1
        task.needs = [m.key for m in wanted]
    makers = {k: m for k, m in makers.items() if len(users[k]) > 1}
    for task in (*tasks, *makers.values()):
        task.needs = [k for k in task.needs if k in makers]
    return [*makers.values(), *sorted(tasks, key=lambda task: turn[task.key])]


def _kinds(notebook, checked):
    if checked is None or not {"dataset", "source"} <= set(checked):
        return []
    given = checked.get("denoiser", "auto") != "auto"  # notebook 05 may be handed one
    return [kind for kind in makes(notebook) if not (given and kind == "denoiser")]


def _maker(kind, checked):
    first, names = SHARED[kind]
    settings = {name: checked.get(name) for name in names}
    modules, own = _pipeline()
    needs = [_maker(before, checked).key for before in first]
    words = " ".join(f"{k}={settings[k]}" for k in ("dataset", "scale", "seed") if k in settings)
    key = artifacts.key(kind=kind, settings=settings, **own)
    return sweep_plan.Task(key, kind, f"{kind}: {words}", settings, {}, "shared", modules, own, needs)


@cache
def _pipeline():
    modules = sweep_plan.rooms(["from pgdlib.lab import load"])
    return modules, sweep_plan.identity(modules)
