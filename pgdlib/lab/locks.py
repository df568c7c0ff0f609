"""Locks between processes, and folders for unfinished files: both outlive the death of their holder, on any host.

Both rest on flock, which the system frees when its holder dies and which NFS carries from host to host. Where a file system
has none (some mounts of Lustre and NFS), a lock is a lease that its holder renews.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
from pathlib import Path

from pgdlib.lab import disk, leases


@contextlib.contextmanager
def lock(path, report=print, wait=True):
    """Hold `path` for this process alone; others wait, and one of them takes over when the holder dies.

    With `wait=False` raises BlockingIOError if another holds it. Who holds a lease and was asleep for minutes on another host
    may have lost it: then both work, and since files are only ever replaced as a whole, that costs time and nothing else.
    """
    path = Path(path)
    disk.make_folder(path.parent)
    said = False

    def busy():
        nonlocal said
        if not wait:
            raise BlockingIOError(errno.EWOULDBLOCK, f"another process holds {path}")
        if not said:
            report(f"waiting for another process that is making {path.name}")
        said = True

    while True:
        with disk.explained(path):
            f = open(side(path), "a")  # noqa: SIM115 (closed below)
        with f:
            got = _flock(f)
            if got is False:
                busy()
                fcntl.flock(f, fcntl.LOCK_EX)
            if got is None:
                with leases.lease(path, busy):
                    yield
                return
            if _is_at(f, side(path)):  # else its last holder has removed it
                try:
                    yield
                finally:
                    fcntl.flock(f, fcntl.LOCK_UN)  # processes that were forked meanwhile have the file open, too
                return


def side(path):
    """The file beside `path` that is locked in its stead: `path` itself may be replaced, or not yet exist."""
    return path.with_name(f".{path.name}.lock")


def is_held(path):
    """Whether a process holds `path`."""
    try:
        with open(side(path), "r+") as f:
            got = _flock(f)
    except OSError:
        return False  # there is no lock file, or it is not ours
    return leases.newest(path, {})[1] if got is None else not got


def forget(path):
    """Remove the lock file of `path`; only its holder may do so."""
    side(path).unlink(missing_ok=True)


@contextlib.contextmanager
def scratch(path):
    """An empty folder beside `path`, for what is to take its place; removed at the end, or by `sweep` if the process dies."""
    disk.make_folder(path.parent)
    sweep(path)
    f = None
    while f is None:  # `sweep` of another process may be faster: then a new one
        folder = path.with_name(f".{path.name[:150]}.{leases.me()}.partial")
        with disk.explained(folder):
            folder.mkdir()
        f = _claimed(folder)
    try:
        yield folder
    finally:
        _remove(folder, f)


def sweep(path):
    """Remove what dead processes have left of `scratch(path)`."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(path.parent):
            if re.fullmatch(rf"\.{re.escape(path.name[:150])}\.{leases.OWNER}\.partial", name):
                clear(path.parent / name)


def clear(folder, dry=False):
    """Remove `folder` if it is one of `scratch` and its process is dead (`dry`: only find out); whether it is so."""
    found = re.search(rf"\.({leases.OWNER})\.partial$", folder.name)
    if found is None or folder.is_symlink() or not folder.is_dir():
        return False
    try:
        f = _claimed(folder, found[1])
    except OSError:
        return False  # not ours to remove
    if f is None:
        return False
    if dry:
        f.close()
    else:
        _remove(folder, f)
    return True


def _claimed(folder, owner=None):
    """The locked file "lock" of `folder`, open; None if another process has it. `owner`: another one that made the folder."""
    try:
        f = open(folder / "lock", "a")  # noqa: SIM115 (the caller closes it)
    except FileNotFoundError:
        return None
    got = _flock(f)
    if got is None and owner is not None:
        got = leases.is_dead(owner)
    if got is False or not _is_at(f, folder / "lock"):
        f.close()
        return None
    return f


def _remove(folder, f):
    shutil.rmtree(folder, ignore_errors=True)
    f.close()
    shutil.rmtree(folder, ignore_errors=True)  # NFS keeps a removed file until it is closed


def _flock(f):
    """Whether the open file could be locked; None where the file system has no locks."""
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno in disk.NO_SUCH_CALL:
            return None
        raise
    return True


def _is_at(f, path):
    """Whether the open file is the one that is at `path` now."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(f.fileno()), os.stat(path))
    return False
