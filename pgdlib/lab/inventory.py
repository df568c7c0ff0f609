"""What the folder of runs holds: `python -m pgdlib.lab.artifacts list`, `verify` and `prune`.

An artifact is a .safetensors file that carries the name under which it lies, with a key in it; a stand-in's folder in minari/;
what was set aside; and what a dead process left unfinished. All else, such as figures, notebooks, your own files and whatever a
symlink leads to, is never deleted; nor is a file in the place of an artifact that is none (`SUSPECT`) before it is set aside.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pgdlib.lab import artifacts, locks

KEY = re.compile(r"(?<![0-9a-f])[0-9a-f]{12}(?![0-9a-f])")
UNITS = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
KINDS = ("agents", "checkpoints", "data", "denoisers", "guides", "sweeps", "worldmodels")  # folders of artifacts
SUSPECT = ("unreadable", "misplaced", "unnamed")  # no header; that of another artifact; that of a version without names
REST = 86_400.0  # seconds: what a run is making keeps its checkpoints and chunks at least as long as this


@dataclass(frozen=True)
class Item:
    """One artifact. Times are Unix times, s; `used` is when it was last loaded or made."""

    path: Path
    kind: str  # its folder in the root; "damaged" if set aside, "unfinished" if a dead process left it; or of `SUSPECT`
    size: int  # bytes
    made: float
    used: float

    @property
    def name(self):
        """Its path in the root."""
        return str(self.path.relative_to(artifacts.root()))


def items():
    """All artifacts in the root, by name. Reads no more of them than their headers."""
    found = []
    for folder, folders, files in os.walk(artifacts.root()):  # follows no symlink
        folder = Path(folder)
        for name in sorted(folders):
            kind = _folder_kind(folder / name)
            if kind or (folder / name).is_symlink():
                folders.remove(name)
            if kind:
                found.append(_item(folder / name, kind))
        for name in files:
            path = folder / name
            if not path.is_symlink() and (kind := _file_kind(path)):
                found.append(_item(path, kind))
    return sorted(found, key=lambda item: item.name)


def _folder_kind(path):
    if locks.clear(path, dry=True):
        return "unfinished"
    if path.name.endswith(".damaged") and not path.is_symlink() and KEY.search(_inside(path)):
        return "damaged"
    is_data = path.parent == artifacts.root() / "minari" and KEY.search(path.name) and not path.is_symlink()
    return "minari" if is_data and any(path.glob("standin/pen/*/sha256")) else None


def _file_kind(path):
    name, folder = _inside(path), path.relative_to(artifacts.root()).parts[0]
    if path.name.endswith(".damaged") and ".safetensors." in path.name:
        return "damaged"
    if path.suffix != ".safetensors" or not KEY.search(name):
        return None
    header = _header(path)
    if header is not None and header.get("name") == name:
        return "checkpoints" if folder == "minari" else folder  # a part of a stand-in that is being collected
    if folder not in KINDS:
        return None
    if header is None:
        return "unreadable"
    return "misplaced" if "name" in header else "unnamed" if "sha256" in header else None


def _inside(path):
    return str(path.relative_to(artifacts.root()))


def _header(path):
    """What a safetensors file tells of itself; None if it cannot be read."""
    with contextlib.suppress(OSError, ValueError, struct.error, AttributeError, MemoryError), open(path, "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        if length < 100_000_000:  # as safetensors has it
            return json.loads(f.read(length)).get("__metadata__") or {}
    return None


def _item(path, kind):
    parts = [path, *path.rglob("*")] if path.is_dir() else [path]
    stats = [f.lstat() for f in parts]
    made = max(s.st_mtime for s in stats)
    return Item(
        path, kind, sum(s.st_size for f, s in zip(parts, stats) if not f.is_dir()), made, max(made, artifacts.last_use(path))
    )


def damage(item):
    """Why an item cannot be used, or None."""
    if item.kind in ("damaged", "unfinished"):
        return None
    if item.kind == "minari":
        from pgdlib.lab import minari_files

        (place,) = item.path.glob("standin/pen/*")
        return None if minari_files.is_whole(place) else f"{place} is damaged: its checksum does not hold"
    try:
        name = artifacts.read(item.path)[2]
    except (artifacts.CorruptArtifact, OSError) as e:
        return str(e)
    return None if name in (None, item.name) else f"{item.path} is another artifact: it was saved as {name}"


def prunable(found, older_than=None, unused_for=None, keep_under=None, kind=None, now=None):
    """Of the items `found` those that may go: of this kind, older and unused for so many s; and of these the longest unused
    that must go for all of `found` to take at most `keep_under` bytes.

    What lies in checkpoints/ is left until it is a day old: a run may need it.
    """
    now = time.time() if now is None else now
    least = {"older_than": older_than or 0.0, "unused_for": unused_for or 0.0}
    picked = [i for i in found if i.kind not in SUSPECT and kind in (None, i.kind) and now - i.made >= least["older_than"]]
    picked = [i for i in picked if now - i.used >= max(least["unused_for"], REST if i.kind == "checkpoints" else -REST)]
    picked.sort(key=lambda item: item.used)
    if keep_under is None:
        return picked
    total, gone = sum(i.size for i in found), []
    for item in picked:
        if total <= keep_under:
            break
        gone.append(item)
        total -= item.size
    return gone


def delete(item):
    """Delete an item; whether it is gone. It stays where a process holds its lock, or has used it since it was listed."""
    if item.kind == "unfinished":
        return locks.clear(item.path)
    try:
        if _item(item.path, item.kind) != item:
            return False
        with locks.lock(item.path, wait=False):
            if _item(item.path, item.kind).made != item.made:
                return False
            shutil.rmtree(item.path) if item.path.is_dir() else item.path.unlink()
            locks.forget(item.path)
    except (BlockingIOError, FileNotFoundError):
        return False
    if item.path.parent.parent.parent == artifacts.root() and not any(item.path.parent.iterdir()):
        item.path.parent.rmdir()  # a sweep's, or that of a drawing's chunks
    return True


def main(arguments=None):
    """The command line; returns the exit code: 1 where something is damaged or could not be deleted."""
    given = _parser().parse_args(arguments)
    return {"list": _list, "verify": _verify, "prune": _prune}[given.command](given)


def _parser():
    parser = argparse.ArgumentParser(prog="python -m pgdlib.lab.artifacts", description=f"Artifacts in {artifacts.root()}.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in (("list", "a table of all artifacts"), ("prune", "delete artifacts; only shows which, without --yes")):
        command = commands.add_parser(name, help=words, description=words)
        command.add_argument("--kind", metavar="KIND", help="only these, such as sweeps; as `list` has it")
    command.add_argument("--older-than", type=_seconds, metavar="30d", help="made so long ago or longer")
    command.add_argument("--unused-for", type=_seconds, metavar="30d", help="last loaded so long ago or longer")
    command.add_argument(
        "--keep-under", type=_bytes, metavar="5GB", help="only until the rest takes less, longest unused first"
    )
    command.add_argument("--yes", action="store_true", help="do delete")
    verify = commands.add_parser("verify", help="read everything and check the checksums; exit code 1 if one does not hold")
    verify.add_argument("--set-aside", action="store_true", help="rename what is damaged, so that it is made again")
    return parser


def _seconds(text):
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be a number and m, h, d or w, such as 30d")
    return float(found[1]) * UNITS[found[2]]


def _bytes(text):
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be a number and KB, MB, GB or TB, such as 5GB")
    return float(found[1]) * SIZES[found[2]]


def _table(found):
    now = time.time()
    print(f"{'kind':<12} {'MB':>9} {'age':>6} {'unused':>6} {'locked':<6} name")
    for i in found:
        locked = "yes" if locks.is_held(i.path) else ""
        print(f"{i.kind:<12} {i.size / 1e6:>9.1f} {_age(now - i.made):>6} {_age(now - i.used):>6} {locked:<6} {i.name}")
    print(f"{len(found)} artifacts, {sum(i.size for i in found) / 1e9:.3g} GB, in {artifacts.root()}")


def _age(seconds):
    unit = next((u for u in "wdh" if seconds >= 2 * UNITS[u]), "m")
    return f"{max(0.0, seconds) / UNITS[unit]:.0f} {unit}"  # below zero: the clock was set back


def _list(given):
    _table([i for i in items() if given.kind in (None, i.kind)])
    return 0


def _verify(given):
    found = items()
    reasons = {item: reason for item in found if (reason := damage(item))} if found else {}
    for item, reason in reasons.items():
        print(reason)
        if given.set_aside:
            with locks.lock(item.path):
                if damage(item):  # still: it may have been made again
                    print(f"  set aside as {artifacts.set_aside(item.path, reason).name}")
    print(f"{len(found)} artifacts, {len(reasons)} damaged")
    return 1 if reasons else 0


def _prune(given):
    if given.older_than is given.unused_for is given.keep_under is None:
        print("nothing is deleted: say which, by --older-than, --unused-for or --keep-under", file=sys.stderr)
        return 2
    found = prunable(items(), given.older_than, given.unused_for, given.keep_under, given.kind)
    _table(found)
    if not given.yes:
        print("nothing was deleted; --yes does")
        return 0
    kept = [item.name for item in found if not delete(item)]
    print(f"deleted: {len(found) - len(kept)}", *(f"\nin use, kept: {name}" for name in kept), sep="")
    return 1 if kept else 0
