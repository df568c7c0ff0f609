"""Locks between processes and hosts, and writing that is whole or not at all and says in words why it failed.

Locks are filelock's: flock, which the system frees when its holder dies and which NFS carries from host to host; where a file
system has none (some mounts of Lustre and NFS), a lease that its holder renews.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import time
from pathlib import Path

from filelock import FileLock, SoftFileLease, Timeout

LEASE, RENEW, POLL, DAY = 180.0, 20.0, 0.1, 86_400.0  # s: a lease counts as left, is renewed, is looked at; surely left
NO_SUCH_CALL = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}  # what file systems say of what they cannot do
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM}
SHUT = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
SHARED = ". PGD_RUNS can name another; a shared folder needs a group (`chgrp -R`, `chmod -R g+rwX`, folders g+s) and umask 002"


class NotSaved(OSError):
    """A file could not be written, or read. What was there before is whole, and nothing half-written is left."""


@contextlib.contextmanager
def lock(path, report=print, wait=True):
    """Hold `path` for this process alone; others wait, which `report` is told, and one takes over when the holder dies.

    With `wait=False` raises BlockingIOError if another holds it. Who holds a lease and was asleep for minutes on another host
    may have lost it: then both work, and since files are only ever replaced as a whole, that costs time and nothing else.
    """
    path = Path(path)
    make_folder(path.parent)
    with explained(path):
        try:
            held = _acquired(FileLock(side(path), fallback_to_soft=False), path, report, wait)
        except OSError as e:
            if e.errno not in NO_SUCH_CALL:
                raise
            lease = SoftFileLease(side(path).with_suffix(".lease"), lease_duration=LEASE, heartbeat_interval=RENEW)
            held = _acquired(lease, path, report, wait)
    try:
        yield
    finally:
        held.release()


def _acquired(held, path, report, wait):
    said, seen = False, {}
    while not _got(held):
        if isinstance(held, SoftFileLease) and _is_left(held, seen):
            held.force_break()
            if _got(held):
                break
        if not wait:
            raise BlockingIOError(errno.EWOULDBLOCK, f"another process holds {path}")
        if not said:
            report(f"waiting for another process that is making {path.name}")
        said = True
        time.sleep(POLL)
    return held


def _got(held):
    with contextlib.suppress(Timeout):
        held.acquire(timeout=0)
    return held.is_locked


def _is_left(lease, seen):
    """Whether its holder has not renewed a lease for a day, or for as long as we see it: `seen` remembers since when.

    filelock takes over by itself, but only where the file system can exchange two names, so not on NFS, and only from holders
    that have written who they are, so not from one whose host crashed before that.
    """
    try:
        found = os.stat(lease.lock_file)
    except FileNotFoundError:
        return False
    now, state = time.monotonic(), (found.st_ino, found.st_ctime_ns)  # our own clock: hosts disagree on the time
    if seen.get("state") != state:
        seen.update(state=state, since=now)
    return now - seen["since"] > LEASE or time.time() - found.st_mtime > DAY


def side(path):
    """The file beside `path` that is locked in its stead: `path` itself may be replaced, or not yet exist."""
    return path.with_name(f".{path.name}.lock")


def is_held(path):
    """Whether a process holds `path`."""
    with contextlib.suppress(OSError):  # not ours to lock
        if side(path).exists():
            try:
                with lock(path, wait=False):
                    pass
            except BlockingIOError:
                return True
    return False


@contextlib.contextmanager
def replacing(path, needed=None):
    """A temporary file or folder that takes the place of `path`, synced to disk, if the block ends well, and vanishes if not.

    It has the name of `path` in a folder of its own beside it. `needed` are its bytes, to be told if the disk is full.
    """
    path = Path(path)
    with explained(path, needed):
        sweep(path)
        folder = path.with_name(f".{path.name[:150]}.{secrets.token_hex(4)}.partial")
        with lock(folder, report=lambda message: None):  # it tells others that we live
            try:
                folder.mkdir()
                partial = folder / path.name
                yield partial
                for f in (*partial.rglob("*"), partial):
                    sync(f)
                os.replace(partial, path)
                sync(path.parent)
            finally:
                _remove(folder)


def sweep(path):
    """Remove what dead processes have left of `replacing(path)`."""
    ours = re.compile(rf"\.?(\.{re.escape(path.name[:150])}\.[0-9a-f]{{8}}\.partial)(\.lock)?")
    with contextlib.suppress(FileNotFoundError):
        for found in filter(None, map(ours.fullmatch, os.listdir(path.parent))):
            clear(path.with_name(found[1]))


def clear(folder):
    """Remove `folder`, one of `replacing`, if its process is dead; whether it was so."""
    try:
        with lock(folder, wait=False):
            _remove(folder)
    except OSError:  # its process lives, or it is not ours to remove
        return False
    return True


def _remove(folder):
    shutil.rmtree(folder, ignore_errors=True)  # never what a symlink leads to
    with contextlib.suppress(OSError):  # Windows removes nothing that is open
        side(folder).unlink(missing_ok=True)


@contextlib.contextmanager
def explained(path, needed=None, what="written"):
    """Turn what a full disk, a read-only folder or a lack of memory raises into `NotSaved`; `needed` are bytes."""
    try:
        yield
    except Exception as e:
        number = _number(e)
        if number not in FULL | SHUT or (isinstance(e, NotSaved) and needed is None):
            raise
        text = f"{path} cannot be {what}: {os.strerror(number)}{SHARED * (number in SHUT - {errno.EIO})}"
        if number in FULL:
            there = next(f for f in Path(path).absolute().parents if f.exists())
            text += f" ({_size(needed)} needed, {_size(shutil.disk_usage(there).free)} free)"
        raise NotSaved(number, text) from e


def _number(e):
    """The system's number of the error `e`, also where torch or safetensors hide it in a text; None if it has none."""
    if isinstance(e, OSError):
        return e.errno
    if isinstance(e, MemoryError) or (isinstance(e, RuntimeError) and re.search("out of memory|allocate memory", str(e))):
        return errno.ENOMEM
    found = re.search(r"\(os error (\d+)\)", str(e)) if type(e).__name__ == "SafetensorError" else None
    return found and int(found[1])


def _size(count):
    return "an unknown number of bytes" if count is None else f"{count / 1e6:,.1f} MB"


def make_folder(folder):
    """Make `folder` and its parents, and see to it that the disk knows of them."""
    new = [f for f in (folder, *folder.parents) if not f.exists()]
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for f in new:
            sync(f.parent)


def sync(path):
    """Wait until the file or folder `path` is on the disk; of a folder, as far as its file system can."""
    is_folder = os.path.isdir(path)
    with contextlib.suppress(PermissionError if is_folder else ()):  # Windows opens no folder
        fd = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows syncs only what may be written
        try:
            os.fsync(fd)
        except OSError as e:
            if not is_folder or e.errno not in {errno.EINVAL, *NO_SUCH_CALL}:
                raise
        finally:
            os.close(fd)
