"""Locks for file systems without flock (some mounts of Lustre and NFS): leases that their holders renew.

A lease is a file with a number, `.name.3.lock`: its holder is who made the newest, and who finds that one free or left makes
the next, which only one process can. Only a successor removes the newest, so that the numbers never fall.
"""

import contextlib
import hashlib
import os
import re
import secrets
import socket
import threading
import time
from functools import cache
from pathlib import Path

RENEW, STALE, POLL = 20.0, 180.0, 1.0  # seconds: after these a lease is renewed, counts as left, is looked at again
FREE = "free"
OWNER = r"[0-9a-f]{8}-\d+-[0-9a-f]{8}"  # a set of processes, the number of one, and a random one


@contextlib.contextmanager
def lease(path, busy):
    """Hold `path` for this process alone, for the block; while another does, `busy()` is called again and again."""
    own, seen = me(), {}
    while True:
        number, taken = newest(path, seen)
        if taken:
            busy()
            time.sleep(POLL)
            continue
        mine = _numbered(path, number + 1)
        try:
            with open(mine, "x") as f:
                f.write(own)
        except FileExistsError:
            continue
        if max(_numbers(path)) == number + 1:
            break
        mine.unlink()  # a process that was slow to look: others have had this number, and later ones
    for old in _numbers(path) - {number + 1}:
        _numbered(path, old).unlink(missing_ok=True)
    over = threading.Event()

    def renew():
        while not over.wait(RENEW):
            with contextlib.suppress(OSError):
                os.utime(mine)

    threading.Thread(target=renew, daemon=True).start()
    try:
        yield
    finally:
        over.set()
        if mine.exists():
            mine.write_text(FREE)


def newest(path, seen):
    """(number of the newest lease on `path`, whether somebody holds it). `seen` remembers since when it is as it is."""
    number = max(_numbers(path), default=0)
    try:
        file = _numbered(path, number)
        state = number, file.read_text(), file.stat().st_mtime_ns
    except FileNotFoundError:
        return number, number > 0
    if state[1] == FREE or (re.fullmatch(OWNER, state[1]) and is_dead(state[1])):
        return number, False
    now = time.monotonic()  # our own clock alone: hosts disagree on the time, and may set it back
    if seen.get("state") != state:
        seen.update(state=state, since=now)
    return number, now - seen["since"] < STALE


def _numbers(path):
    """The numbers of all leases on `path`."""
    found = (re.fullmatch(rf"\.{re.escape(path.name)}\.(\d+)\.lock", name) for name in os.listdir(path.parent))
    return {int(match[1]) for match in found if match}


def _numbered(path, number):
    return path.with_name(f".{path.name}.{number}.lock")


def me():
    """A new name for something that this process owns."""
    return f"{_here()}-{os.getpid()}-{secrets.token_hex(4)}"


@cache
def _here():
    """Names the set of processes to which this one's number belongs: host, boot and container."""
    parts = [socket.gethostname()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text(), lambda: os.readlink("/proc/self/ns/pid")):
        with contextlib.suppress(OSError):  # only Linux has these
            parts.append(read())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def is_dead(owner):
    """Whether the process of `owner`, as `me` gave it, is known to be dead: one of another host never is."""
    here, number, _ = owner.split("-")
    if here == _here():
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    return False
