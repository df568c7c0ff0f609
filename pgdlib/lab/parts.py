"""Parts of what takes long, kept in runs/checkpoints/ until the whole is: a killed run goes on with those that it has."""

import shutil
import time

import torch

from pgdlib.lab import artifacts, resumable


class Parts:
    """The finished parts of something, in the folder runs/checkpoints/<name>: lists of tensors, found again on `device`.

    Only a part that took `least` seconds or more is kept; `before()` is called when one is about to be.
    """

    def __init__(self, name, device="cpu", least=0.0, before=lambda: None):
        self.folder, self.device, self.least, self.before = artifacts.root() / "checkpoints" / name, device, least, before

    def keep(self, name, make):
        """What `make()` gives, tensors in a row, or what it gave when this part was made; a hook for `sampler.draw`."""
        path = self.folder / f"{name}.safetensors"
        try:
            found, _ = artifacts.load(path, own=True)
            return [found[str(i)].to(self.device) for i in range(len(found))]
        except FileNotFoundError:
            pass
        except artifacts.CorruptArtifact as e:
            artifacts.set_aside(path, e)
        started = time.monotonic()
        made = make()
        if time.monotonic() - started >= self.least:
            self.before()
            resumable.save(path, {str(i): torch.as_tensor(tensor) for i, tensor in enumerate(made)}, {})
        return made

    @property
    def at_once(self):
        """How many trajectories the first part of a `sampler.draw` holds, which the others must, too; None if there is none."""
        first = next(self.folder.glob("0-*.safetensors"), None)
        return first and int(first.stem.split("-")[1])

    def discard(self):
        """Delete them: the whole is kept."""
        shutil.rmtree(self.folder, ignore_errors=True)
