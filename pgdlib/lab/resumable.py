"""Checkpoints of trainings: a bad one never ends a run, nor does a disk that cannot take one."""

import warnings
from pathlib import Path

from pgdlib.lab import artifacts

_failed = set()  # paths that could not be written the last time


def restore(path, state, card, say=print):
    """Copy the checkpoint at `path` into `state`, name -> tensor of the training; the step it had reached, 0 without one.

    `card` (plain JSON values) names the training. A file that is damaged or of another training is set aside, with the reason
    in its new name, and `state` stays as it is.
    """
    path = Path(path)
    try:
        tensors, found = artifacts.load(path, own=True)
        step = found.get("step") if isinstance(found, dict) else None
        if found != {**card, "step": step}:
            raise artifacts.CorruptArtifact(f"{path} is of another training: {found}")
        if _shapes(tensors) != _shapes(state):
            raise artifacts.CorruptArtifact(f"{path} is of another training: its tensors have other names, shapes or types")
    except FileNotFoundError:
        return 0
    except artifacts.CorruptArtifact as e:
        say(f"{e}. Set aside as {artifacts.set_aside(path, e).name}; training begins anew.")
        return 0
    for name, tensor in state.items():
        tensor.copy_(tensors[name])
    return step


def save(path, state, card):
    """Write a checkpoint; whether it worked. If the disk does not let it, the last one stays and a warning is given, once."""
    try:
        artifacts.save(path, state, card)
    except artifacts.NotSaved as e:
        if path not in _failed:
            text = f"{e}. The training goes on, but until a checkpoint can be written it can only go on from the last one."
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        _failed.add(path)
        return False
    _failed.discard(path)
    return True


def _shapes(tensors):
    return {name: (t.shape, t.dtype) for name, t in tensors.items()}
