"""Writing that survives a loss of power, and that says in words why it failed."""

import contextlib
import errno
import os
import re
import shutil
from pathlib import Path

NO_SUCH_CALL = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}  # what file systems say of what they cannot do
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM}
SHUT = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


class NotSaved(OSError):
    """A file could not be written. What was there before is whole, and nothing half-written is left."""


@contextlib.contextmanager
def explained(path, needed=None):
    """Turn what a full disk, a read-only folder or a lack of memory raises into `NotSaved`; `needed` are bytes."""
    try:
        yield
    except NotSaved:
        raise
    except Exception as e:
        number = _number(e)
        if number not in FULL | SHUT:
            raise
        text = f"{path} cannot be written: {os.strerror(number)}"
        if number in FULL:
            text += f" ({_size(needed)} needed, {_size(_free(Path(path)))} free)"
        raise NotSaved(number, text) from e


def make_folder(folder):
    """Make `folder` and its parents, and see to it that the disk knows of them."""
    new = [f for f in (folder, *folder.parents) if not f.exists()]
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for f in new:
            sync(f.parent)


def sync(path):
    """Wait until the file or folder `path` is on the disk."""
    is_folder = os.path.isdir(path)
    try:
        fd = os.open(path, os.O_RDONLY)
    except PermissionError:
        if is_folder:
            return  # one may write into a folder that one may not read
        raise
    try:
        os.fsync(fd)
    except OSError as e:
        if not is_folder or e.errno not in {errno.EINVAL, *NO_SUCH_CALL}:  # some file systems cannot sync folders
            raise
    finally:
        os.close(fd)


def _number(e):
    """The system's number of the error `e`, also where torch or safetensors hide it in a text; None if it has none."""
    if isinstance(e, OSError):
        return e.errno
    if isinstance(e, MemoryError) or (isinstance(e, RuntimeError) and re.search("out of memory|allocate memory", str(e))):
        return errno.ENOMEM
    found = re.search(r"\(os error (\d+)\)", str(e)) if type(e).__name__ == "SafetensorError" else None
    return found and int(found[1])


def _free(path):
    with contextlib.suppress(OSError):
        return shutil.disk_usage(next(f for f in path.absolute().parents if f.exists())).free
    return None


def _size(count):
    return "an unknown number of bytes" if count is None else f"{count / 1e6:,.1f} MB"
