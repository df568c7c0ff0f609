"""Trainings that a kill cannot undo: their checkpoints are restored and saved here, whatever it is that trains.

A bad checkpoint never ends a training, nor does a disk that cannot take one.
"""

import time
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

from pgdlib.lab import artifacts

_failed = set()  # paths that could not be written the last time


def run(loop, path=None, report=lambda step: None, save_every=90.0, say=print):
    """Train `loop` to its end, from the checkpoint at `path` on if there is one, calling `report(step)` after every step.

    `loop` has `step`, the steps that are done; `steps`, where it ends; `state()`, all that a step changes, name -> tensor, into
    which a checkpoint is copied; and `card`, plain JSON values that name the training. Iterating it yields `step` after each.
    It is saved every `save_every` seconds, and when `report` raises, so that a cancelled training has lost nothing. The
    checkpoint stays: `artifacts.discard` it once the result is kept.
    """
    if path is not None:
        loop.step = restore(path, loop.state(), loop.card, say)
    saved = time.monotonic()
    for step in loop:
        try:
            report(step)
        except BaseException:
            if path is not None:
                save(path, loop.state(), {**loop.card, "step": step})
            raise
        if path is not None and time.monotonic() - saved > save_every:
            save(path, loop.state(), {**loop.card, "step": step})
            saved = time.monotonic()


def trained(folder, name, begin, finished, text, progress=tqdm, words=None):
    """(path, tensors, card) of what training makes: found in runs/, or trained, from its checkpoint if it was stopped.

    `begin(checkpoint)` makes the loop, `finished(loop)` the tensors and the card of what it came to. The bar is called
    `text`, and `words(loop)` stand behind it. The card's seconds are those of all steps, by the rate since the last start.
    """
    path = artifacts.root() / folder / f"{name}.safetensors"
    checkpoint = artifacts.root() / "checkpoints" / f"{folder}-{name}.safetensors"

    def make():
        loop, started, first = begin(checkpoint), time.monotonic(), None
        with progress(total=loop.steps, desc=text, mininterval=5) as bar:

            def report(step):
                nonlocal first
                first = step - 1 if first is None else first
                bar.update(step - bar.n)
                if words:
                    bar.set_postfix_str(words(loop), refresh=False)

            run(loop, checkpoint, report)
        tensors, card = finished(loop)
        rate = (time.monotonic() - started) / max(1, loop.step - (first or 0))
        return tensors, {**card, "seconds": rate * loop.steps}

    found = artifacts.artifact(path, make)
    artifacts.discard(checkpoint)  # not before what came of it is kept
    return path, *found


def restore(path, state, card, say=print):
    """Copy the checkpoint at `path` into `state`, name -> tensor of the training; the step it had reached, 0 without one.

    `card` (plain JSON values) names the training. A file that is damaged or of another training is set aside, with the reason
    in its new name, and `state` stays as it is.
    """
    path = Path(path)
    try:
        tensors, found = artifacts.load(path, own=True)
        step = found.get("step") if isinstance(found, dict) else None
        if not isinstance(step, int) or artifacts.key(v=found) != artifacts.key(v={**card, "step": step}):
            raise artifacts.CorruptArtifact(f"{path} is of another training: {found}")
        if _shapes(tensors) != _shapes(state):
            raise artifacts.CorruptArtifact(f"{path} is of another training: its tensors have other names, shapes or types")
    except FileNotFoundError:
        return 0
    except artifacts.CorruptArtifact as e:
        say(f"{e}. Set aside as {artifacts.set_aside(path, e).name}; training begins anew.")
        return 0
    with torch.no_grad():
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
