"""What the folder of runs holds: `python -m pgdlib.lab.inventory list`, `verify` and `prune`.

An artifact is a .safetensors file that carries the name under which it lies, with a key in it; a stand-in's folder in minari/;
what was set aside; and what a dead process left unfinished. All else, such as figures, notebooks, your own files and whatever a
symlink leads to, is never deleted; nor is a "suspect", which lies in the place of an artifact and is none, before `verify
--set-aside` has renamed it.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import stat
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pgdlib.lab import artifacts, locks

KEY = re.compile(r"(?<![0-9a-f])[0-9a-f]{12}(?![0-9a-f])")
TIMES = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
KINDS = ("agents", "checkpoints", "data", "denoisers", "guides", "sweeps", "worldmodels")  # folders of artifacts
REST = 86_400.0  # seconds: what a run is making keeps its checkpoints and chunks at least as long as this


@dataclass(frozen=True)
class Item:
    """One artifact. Times are Unix times, s; `used` is when it was last loaded or made."""

    path: Path
    name: str  # its path in the root
    kind: str  # its folder in the root, or "damaged" if set aside, "unfinished" if a dead process left it, "suspect"
    size: int  # bytes
    made: float
    used: float


def items():
    """All artifacts in the root, by name. Reads no more of them than their headers. Raises OSError if there is no root."""
    found, root = [], artifacts.root()
    os.listdir(root)
    for folder, folders, files in os.walk(root, onerror=_unreadable):  # follows no symlink
        for name in [*folders, *files]:
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                if item := _item(Path(folder, name)):
                    found.append(item)
                    folders[:] = [f for f in folders if f != name]
    return sorted(found, key=lambda item: item.name)


def _unreadable(error):
    if not isinstance(error, FileNotFoundError):
        raise error


def _item(path):
    """The artifact at `path`; None if it is none."""
    kind = None if path.is_symlink() else _folder_kind(path) if path.is_dir() else _file_kind(path)
    if kind is None:
        return None
    stats = [f.lstat() for f in ([path, *path.rglob("*")] if path.is_dir() else [path])]
    made, size = max(s.st_mtime for s in stats), sum(s.st_size for s in stats if not stat.S_ISDIR(s.st_mode))
    noted = artifacts.noted(path)
    return Item(path, artifacts.place(path), kind, size, made, max(made, noted.stat().st_mtime if noted.exists() else 0))


def _folder_kind(path):
    if re.search(r"\.[0-9a-f]{8}\.partial$", path.name):
        return None if locks.is_held(path) else "unfinished"
    if path.suffix == ".damaged" and KEY.search(artifacts.place(path)):
        return "damaged"
    is_data = path.parent == artifacts.root() / "minari" and KEY.search(path.name)
    return "minari" if is_data and any(path.glob("standin/*/*/sha256")) else None


def _file_kind(path):
    name, top = artifacts.place(path), path.relative_to(artifacts.root()).parts[0]
    if path.suffix not in (".safetensors", ".damaged") or not KEY.search(name):
        return None
    if path.suffix == ".damaged":
        return "damaged"
    header = _header(path)
    if header and header.get("name") == name:
        return "checkpoints" if top == "minari" else top  # a part of a stand-in that is being collected
    return "suspect" if top in KINDS and (header is None or "sha256" in header) else None


def _header(path):
    """What a safetensors file tells of itself; None if it cannot be read."""
    with contextlib.suppress(OSError, ValueError, struct.error, AttributeError, MemoryError), open(path, "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        if length < 100_000_000:  # as safetensors has it
            return json.loads(f.read(length)).get("__metadata__") or {}
    return None


def damage(item):
    """Why an item cannot be used, or None."""
    if item.kind in ("damaged", "unfinished"):
        return None
    if item.kind == "minari":
        from pgdlib.lab import minari_files

        (place,) = item.path.glob("standin/*/*")
        return None if minari_files.is_whole(place) else f"{place} is damaged: its checksum does not hold"
    try:
        artifacts.load(item.path, own=True)
    except (artifacts.CorruptArtifact, OSError) as e:
        return str(e)
    return None


def prunable(found, older_than=None, unused_for=None, keep_under=None, kind=None):
    """Of the items `found` those that may go: of this kind, older and unused for so many s; and of these the longest unused
    that must go for all of `found` to take at most `keep_under` bytes.

    What lies in checkpoints/ is left until it is a day old: a run may need it.
    """
    now, left, gone = time.time(), sum(i.size for i in found), []
    for i in sorted(found, key=lambda item: item.used):
        rest = max(unused_for or 0.0, REST if i.kind == "checkpoints" else 0.0)
        may_go = i.kind != "suspect" and kind in (None, i.kind) and now - i.made >= (older_than or 0.0) and now - i.used >= rest
        if may_go and (keep_under is None or left > keep_under):
            gone.append(i)
            left -= i.size
    return gone


def delete(item):
    """Delete an item; whether it is gone. It stays where a process holds its lock, or has used it since it was listed."""
    if item.kind == "unfinished":
        return locks.clear(item.path)
    try:
        if _item(item.path) != item:
            return False
        with locks.lock(item.path, wait=False):
            if _item(item.path) != item:
                return False
            shutil.rmtree(item.path) if item.path.is_dir() else item.path.unlink()
            for beside in (artifacts.noted(item.path), locks.side(item.path)):
                beside.unlink(missing_ok=True)
    except OSError:
        return False
    if item.path.parent.parent.parent == artifacts.root():  # a folder of one sweep, or of one drawing's chunks
        with contextlib.suppress(OSError):  # there is more in it
            item.path.parent.rmdir()
    return True


def main(arguments=None):
    """The command line; returns the exit code: 1 where something is damaged or stays, 2 where it cannot be told or done."""
    given = _parser().parse_args(arguments)
    try:
        found = items()
    except OSError as e:
        print(f"the folder of runs, {artifacts.root()}, cannot be read: {e}", file=sys.stderr)
        return 2
    return {"list": _list, "verify": _verify, "prune": _prune}[given.command](found, given)


def _parser():
    parser = argparse.ArgumentParser(prog="python -m pgdlib.lab.inventory", description=f"Artifacts in {artifacts.root()}.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in (("list", "a table of all artifacts"), ("prune", "delete artifacts; only shows which, without --yes")):
        command = commands.add_parser(name, help=words, description=words)
        command.add_argument("--kind", metavar="KIND", help="only these, such as sweeps; as `list` has it")
    command.add_argument("--older-than", type=_in(TIMES), metavar="30d", help="made so long ago or longer")
    command.add_argument("--unused-for", type=_in(TIMES), metavar="30d", help="last loaded so long ago or longer")
    command.add_argument("--keep-under", type=_in(SIZES), metavar="5GB", help="until the rest takes less, oldest use first")
    command.add_argument("--yes", action="store_true", help="do delete")
    verify = commands.add_parser("verify", help="read everything and check the checksums; exit code 1 if one does not hold")
    verify.add_argument("--set-aside", action="store_true", help="rename what is damaged, so that it is made again")
    return parser


def _in(units):
    def parse(text):
        found = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(units)})", text)
        if not found:
            allowed = f"a number and one of {', '.join(units)}, such as 30{list(units)[2]}"
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be {allowed}")
        return float(found[1]) * units[found[2]]

    return parse


def _list(found, given):
    now, found = time.time(), [i for i in found if given.kind in (None, i.kind)]
    print(f"{'kind':<12} {'MB':>9} {'age':>6} {'unused':>6} {'locked':<6} name")
    for i in found:
        locked = "yes" if locks.is_held(i.path) else ""
        print(f"{i.kind:<12} {i.size / 1e6:>9.1f} {_age(now - i.made):>6} {_age(now - i.used):>6} {locked:<6} {i.name}")
    print(f"{len(found)} artifacts, {sum(i.size for i in found) / 1e9:.3g} GB, in {artifacts.root()}")
    return 0


def _age(seconds):
    unit = next((u for u in "wdh" if seconds >= 2 * TIMES[u]), "m")
    return f"{max(0.0, seconds) / TIMES[unit]:.0f} {unit}"  # below zero: the clock was set back


def _verify(found, given):
    reasons = {item: reason for item in found if (reason := damage(item))}
    for item, reason in reasons.items():
        print(reason)
        if given.set_aside:
            with locks.lock(item.path):
                if damage(item):  # still: it may have been made again
                    print(f"  set aside as {artifacts.set_aside(item.path, reason).name}")
    print(f"{len(found)} artifacts, {len(reasons)} damaged")
    if not found:
        print(f"nothing was verified: {artifacts.root()} holds no artifact; is its disk mounted?", file=sys.stderr)
    return 1 if reasons else 0 if found else 2


def _prune(found, given):
    if given.older_than is given.unused_for is given.keep_under is None:
        print("nothing is deleted: say which, by --older-than, --unused-for or --keep-under", file=sys.stderr)
        return 2
    found = prunable(found, given.older_than, given.unused_for, given.keep_under, given.kind)
    _list(found, given)
    if not given.yes:
        print("nothing was deleted; --yes does")
        return 0
    kept = [item.name for item in found if not delete(item)]
    print(f"deleted: {len(found) - len(kept)}", *(f"\nin use, kept: {name}" for name in kept), sep="")
    return 1 if kept else 0


if __name__ == "__main__":
    raise SystemExit(main())
