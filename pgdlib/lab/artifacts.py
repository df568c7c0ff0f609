"""Where artifacts live: one safetensors file each with its JSON card inside, atomic, verified on load, keyed by content."""

import ast
import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import secrets
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

from pgdlib.lab.locks import NotSaved, explained, lock, replacing, sweep  # noqa: F401 (`save` raises NotSaved)

PACKAGE = Path(__file__).resolve().parents[1]


class CorruptArtifact(ValueError):
    """A file that is damaged, or is no artifact of ours."""


def root():
    """The folder of everything that runs make: $PGD_RUNS, or `runs/` beside the package in a checkout, or `runs/` here."""
    if "PGD_RUNS" in os.environ:
        return Path(os.environ["PGD_RUNS"]).resolve()
    checkout = PACKAGE.parent
    return (checkout if (checkout / "pyproject.toml").exists() else Path.cwd()) / "runs"


def require_writable():
    """Raise NotSaved at once where the root, or a folder of it that is no symlink, is another user's or read-only."""
    place = next(f for f in (root(), *root().parents) if os.path.exists(f))
    for folder in (place, *(place.glob("*/") if place == root() else ())):
        if not (folder.is_symlink() or os.access(folder, os.R_OK | os.W_OK | os.X_OK)):
            with explained(folder):
                raise PermissionError(errno.EACCES, "")


def given(parameter, path, allowed):
    """The file that a parameter names, with ~ for the home. Raises ValueError that names the folder searched."""
    file = Path(os.path.expanduser(path))
    if not os.path.isfile(file):  # Path.is_file itself fails for a name that is too long
        where = "" if file.is_absolute() else f" in {Path.cwd()}"
        raise ValueError(f"{parameter}={str(path)!r} is not a file{where}; it must be {allowed}")
    return file


def key(**inputs):
    """12 hex digits that name `inputs` (plain JSON values): other inputs, another key."""
    return hashlib.sha256(_canonical(inputs).encode()).hexdigest()[:12]


@cache
def code_version(*modules):
    """A digest of the code of the named modules, such as `code_version("edm")`, and of all that they import of this package.

    Comments, docstrings and layout do not count. Raises FileNotFoundError for a module that does not exist.
    """
    code = "".join(f"{name}\0{_parsed(source_of(name))[0]}\0" for name in closure(*modules))
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def closure(*modules):
    """The names of the `modules` of this package, and of all that they import of it, directly or not, sorted."""
    found, queue = set(), list(modules)
    while queue:
        if (name := queue.pop()) not in found:
            found.add(name)
            package = name.rpartition(".")[0]  # Python runs its __init__ first
            queue += [*_parsed(source_of(name))[1], *filter(None, [package])]
    return sorted(found)


def imported(source):
    """The names of the modules of this package that Python `source` (text or its tree) imports, anywhere in it."""
    names, package = set(), f"{PACKAGE.name}."
    for node in ast.walk(ast.parse(source) if isinstance(source, str) else source):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(package):
            names |= {f"{node.module}.", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith(package)}
    parts = {name.removeprefix(package).strip(".") for name in names} - {""}
    return {name for name in parts if _path(name).exists()}


def source_of(name):
    """The file of the module `name` of this package; of a package, its `__init__`."""
    if not (path := _path(name)).exists():
        raise FileNotFoundError(f"no module {name} in {PACKAGE}")
    return path


def _path(name):
    path = PACKAGE.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_name(f"{path.name}.py")


@cache  # so that a key tells of the code as it was when this process first asked
def _parsed(path):
    """(code without comments and docstrings, names of the modules of this package that it imports) of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            del node.body[0]
    return ast.unparse(tree), imported(tree)


def versions():
    """Versions of what decides a result, and the commit of this checkout, "unknown" if it is none or git is missing."""
    packages = ("torch", "numpy", "mujoco", "gymnasium", "gymnasium-robotics", "minari")
    return {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}, "git": _commit(PACKAGE)}


@cache  # as it was when this process first asked, as its code
def _commit(package):
    """Asked without git's lock, which a run that is killed here would leave."""
    command, said = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch", "-uno"], "# oid unknown"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if (package.parent / ".git").exists():  # else this package lies in somebody else's repository, or in none
            said = subprocess.run(command, cwd=package, capture_output=True, text=True, check=True).stdout
    return re.search(r"oid \(?(\w{7})", said)[1] + "-dirty" * bool(re.search(r"^[^#]", said, re.MULTILINE))


def save(path, tensors, card):
    """Write `tensors` (name -> torch tensor) and `card` (plain JSON values) to `path`, whole or not at all.

    Raises NotSaved, with the space needed and the space free, where the disk or the memory is full or the folder read-only.
    """
    from safetensors.torch import save_file

    path = Path(path)
    needed = sum(t.numel() * t.element_size() for t in tensors.values())
    with replacing(path, needed) as partial:
        tensors, name = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, place(path)
        header = {"card": _canonical(card), "name": name, "sha256": digest(tensors, {"card": card, "name": name})}
        save_file(tensors, partial, metadata=header)
        partial.chmod(0o644)  # safetensors makes files that only their owner can read


def load(path, own=False):
    """The (tensors, card) that `save` wrote. Raises CorruptArtifact, naming file and reason, if the checksum does not hold.

    With `own` also if it was saved under another name, so is a copy of something else. What a user names, such as a guide, may
    be such a copy.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    with explained(path, what="read"):  # says what the system has against it: that is no damage
        if not path.is_file():
            raise FileNotFoundError(f"no artifact at {path}")
        open(path, "rb").close()
    try:
        with safe_open(path, "pt") as f:
            header = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
        card, name, expected = json.loads(header["card"]), header["name"], header["sha256"]
        found = digest(tensors, {"card": card, "name": name})
    except (SafetensorError, KeyError, ValueError) as e:
        raise CorruptArtifact(f"{path} is damaged or no artifact of ours: {type(e).__name__}: {e}") from e
    if found != expected:
        raise CorruptArtifact(f"{path} is damaged: its checksum does not hold")
    if own and name != place(path):
        raise CorruptArtifact(f"{path} is another artifact: it was saved as {name}")
    return tensors, card


def artifact(path, make, report=print):
    """The (tensors, card) at `path`, made by `make() -> (tensors, card)` and saved there if missing or damaged.

    Put every input of `make` into the name of `path`, by `key`. A damaged file, or one that was saved under another name, is
    set aside, not deleted.
    """
    path, found = Path(path), None
    with contextlib.suppress(FileNotFoundError, CorruptArtifact):
        found = load(path, own=True)  # needs no lock, so no folder that can be written
    if found is None:
        with lock(path, report):
            found = _found_or_made(path, make, report)
    note_use(path)
    return found


def _found_or_made(path, make, report):
    try:
        return load(path, own=True)  # another process was faster
    except FileNotFoundError:
        pass
    except CorruptArtifact as e:
        report(f"{e}. Set aside as {set_aside(path, e).name}; making it again.")
    tensors, card = make()
    save(path, tensors, {**card, "versions": versions()})
    return load(path, own=True)


def note_use(path):
    """Note that `path` is used now, in an empty file beside it: the system's times of access tell of backups, too."""
    with contextlib.suppress(OSError):  # in a folder of another user, or a read-only one
        noted(path).touch()


def noted(path):
    """The file beside `path` whose time is when `path` was last used."""
    return path.with_name(f".{path.name}.used")


def set_aside(path, reason):
    """Rename the file or folder `path`, with the `reason` in its new name, which no other file has; the new path."""
    words = re.sub("[^A-Za-z0-9]+", "-", str(reason).replace(str(path), "")).strip("-")[:100]
    aside = path.with_name(f"{path.name[:120]}.{secrets.token_hex(4)}.{words}.damaged")
    with contextlib.suppress(FileNotFoundError), explained(path):  # another process was faster
        os.replace(path, aside)
    return aside


def discard(path):
    """Delete the file `path`, if it exists, and what dead processes left of writing it."""
    path.unlink(missing_ok=True)
    sweep(path)


def place(path):
    """The name that an artifact at `path` carries: its path in `root`, so that the root may be moved; elsewhere its name."""
    path = Path(os.path.abspath(path))
    return path.relative_to(root()).as_posix() if path.is_relative_to(root()) else path.name


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
