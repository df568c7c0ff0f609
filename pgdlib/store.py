"""Where artifacts live: one safetensors file each with its JSON card inside, atomic, verified on load, keyed by content."""

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import time
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


class CorruptArtifact(ValueError):
    """A file that is damaged, or is no artifact of ours."""


def root():
    """The folder of everything that runs make: $PGD_RUNS, or `runs/` beside the package in a checkout, or `runs/` here."""
    if "PGD_RUNS" in os.environ:
        return Path(os.environ["PGD_RUNS"]).resolve()
    checkout = PACKAGE.parent
    return (checkout if (checkout / "pyproject.toml").exists() else Path.cwd()) / "runs"


def key(**inputs):
    """12 hex digits that name `inputs` (plain JSON values): other inputs, another key."""
    return hashlib.sha256(_canonical(inputs).encode()).hexdigest()[:12]


@cache
def code_version(*rooms):
    """A digest of the source of the named rooms, such as `code_version("unet", "edm")`."""
    return hashlib.sha256(b"\0".join((PACKAGE / f"{r}.py").read_bytes() for r in rooms)).hexdigest()[:12]


def versions():
    """Versions of what decides a result, and the commit of this checkout if there is one."""
    packages = ("torch", "numpy", "mujoco", "gymnasium", "gymnasium-robotics", "minari")
    found = {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}}
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=PACKAGE, capture_output=True, text=True, check=False)
    return {**found, "git": git.stdout.strip() or "unknown"}


def save(path, tensors, card):
    """Write `tensors` (name -> torch tensor) and `card` (plain JSON values) to `path`, whole or not at all."""
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    header = {"card": _canonical(card), "sha256": digest(tensors, card)}
    with replacing(path) as partial:
        save_file(tensors, partial, metadata=header)
        partial.chmod(0o644)  # safetensors makes files that only their owner can read


@contextlib.contextmanager
def replacing(path):
    """A temporary name beside `path` that takes its place, synced to disk, if the block ends well, and vanishes if not."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb") as f:
            os.fsync(f.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path):
    """The (tensors, card) that `save` wrote. Raises CorruptArtifact, naming file and reason, if the checksum does not hold."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no artifact at {path}")
    try:
        with safe_open(path, "pt") as f:
            header = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
        card, expected = json.loads(header["card"]), header["sha256"]
        found = digest(tensors, card)
    except (SafetensorError, KeyError, ValueError, OSError) as e:
        raise CorruptArtifact(f"{path} is damaged or no artifact of ours: {type(e).__name__}: {e}") from e
    if found != expected:
        raise CorruptArtifact(f"{path} is damaged: its checksum does not hold")
    return tensors, card


@contextlib.contextmanager
def lock(path, report=print):
    """Hold `path` for this process alone. Others wait; the system frees it when its holder dies."""
    import fcntl

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another process that is making {path.name}")
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def artifact(path, make, report=print):
    """The (tensors, card) at `path`, made by `make() -> (tensors, card)` and saved there if missing or damaged.

    Put every input of `make` into the name of `path`, by `key`. A damaged file is set aside, not deleted.
    """
    path = Path(path)
    with lock(path, report):
        if path.exists():
            try:
                return load(path)
            except CorruptArtifact as e:
                aside = path.with_name(f"{path.name}.{int(time.time())}.damaged")
                path.rename(aside)
                report(f"{e}. Set aside as {aside.name}; making it again.")
        tensors, card = make()
        save(path, tensors, {**card, "versions": versions()})
    return load(path)


def _canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(tensors, card=None):
    """A digest of `tensors` (name -> CPU or CUDA tensor) and of plain JSON values, 64 hex digits."""
    import torch

    h = hashlib.sha256(_canonical(card).encode())
    for name, t in sorted(tensors.items()):
        h.update(f"{name} {t.dtype} {tuple(t.shape)};".encode())
        h.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return h.hexdigest()
