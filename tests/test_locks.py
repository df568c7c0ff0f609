"""Locks, with flock and without, and writing: a dead process can block nothing, and leaves nothing half done."""

import errno
import fcntl
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
from conftest import wait_for
from filelock import _util

from pgdlib.lab import artifacts, locks

fork = multiprocessing.get_context("fork")


def silent(message):
    """Report nothing."""


@pytest.fixture(params=["flock", "leases", "leases, no exchange of names"])
def system(request, monkeypatch):
    """A file system with flock, or without; or without what filelock takes over leases by, as NFS."""
    monkeypatch.setattr(locks, "POLL", 0.01)
    if request.param != "flock":
        without_flock(monkeypatch)
    if "no" in request.param:
        monkeypatch.setattr(_util, "_rename_call", lambda: (lambda *names: errno.EINVAL, 2))
    return request.param


def without_flock(monkeypatch):
    def missing(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", missing)
    monkeypatch.setattr(locks, "LEASE", 0.5)
    monkeypatch.setattr(locks, "RENEW", 0.1)


def started(target, *args):
    process = fork.Process(target=target, args=args)
    process.start()
    return process


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def hold(path, sign):
    with locks.lock(path, silent):
        sign.touch()
        time.sleep(60)


def count(path, number, times):
    for _ in range(times):
        with locks.lock(path, silent):
            before = int(number.read_text())
            time.sleep(0.002)
            number.write_text(str(before + 1))


def test_one_holder_at_a_time_even_if_a_lock_file_is_removed(system, tmp_path):
    number, path = tmp_path / "number", tmp_path / "x"
    number.write_text("0")
    with locks.lock(path):
        together = [started(count, path, number, 5) for _ in range(3)]
        time.sleep(0.1)
        locks.side(path).unlink()  # as `prune` does
        together.append(started(count, path, number, 5))
    for p in together:
        p.join(30)
    assert number.read_text() == "20" and not locks.is_held(path)


def test_who_does_not_wait_is_told(system, tmp_path):
    with locks.lock(tmp_path / "x"):
        assert locks.is_held(tmp_path / "x") and not locks.is_held(tmp_path / "y")
        with pytest.raises(BlockingIOError, match="x"), locks.lock(tmp_path / "x", wait=False):
            pytest.fail("held twice")
    for error in (BlockingIOError, FileNotFoundError, KeyboardInterrupt):  # comes out, and frees the lock
        with pytest.raises(error), locks.lock(tmp_path / "x", wait=False):
            raise error


def test_a_dead_holder_is_followed_and_a_living_one_is_not(system, tmp_path):
    holder, said = started(hold, tmp_path / "x", tmp_path / "sign"), []
    wait_for((tmp_path / "sign").exists)
    time.sleep(0.8)  # longer than a lease lasts
    with pytest.raises(BlockingIOError), locks.lock(tmp_path / "x", wait=False):
        pytest.fail("held twice")
    waiter = started(count, tmp_path / "x", tmp_path / "number", 0)
    kill(holder)
    with locks.lock(tmp_path / "x", said.append):
        assert said in ([], ["waiting for another process that is making x"])
    waiter.join(10)


@pytest.mark.parametrize("content", ["", "filelock/2\npid=1\nhost=elsewhere\nmode=lease\ntoken=0\nduration=0.5\n"])
@pytest.mark.parametrize("system", ["leases", "leases, no exchange of names"], indirect=True)
def test_a_lease_that_nobody_renews_is_taken_after_a_while(system, content, tmp_path):
    """Of another host, that cannot be asked; or of one that crashed before its name was written."""
    lease, begun = tmp_path / ".x.lease", time.monotonic()
    lease.write_text(content)
    with pytest.raises(BlockingIOError), locks.lock(tmp_path / "x", wait=False):
        pass
    with locks.lock(tmp_path / "x", silent):
        assert time.monotonic() - begun > 0.5 and lease.read_text() not in ("", content)
    assert not lease.exists()
    lease.write_text(content)
    os.utime(lease, (1, 1))  # not for years
    assert not locks.is_held(tmp_path / "x")


def test_it_imports_where_there_is_no_fcntl():
    program = "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None; from pgdlib.lab import artifacts, inventory"
    command = [sys.executable, "-W", "ignore", "-c", program]
    subprocess.run(command, check=True, cwd=artifacts.PACKAGE.parent)


# Writing


def write(path, text="new"):
    with locks.replacing(path) as partial:
        partial.write_text(text)


def test_a_file_is_seen_only_when_it_is_whole(system, tmp_path):
    path = tmp_path / "folder" / "x"
    with locks.replacing(path) as partial:
        partial.write_text("new")
        assert not path.exists() and partial.name == path.name and partial.is_relative_to(path.parent)
    with open(path) as reader:  # who reads the old file goes on reading it, whole
        write(path, "newer")
        assert reader.read() == "new" and path.read_text() == "newer"
    for error in (ZeroDivisionError, KeyboardInterrupt, FileNotFoundError):
        with pytest.raises(error), locks.replacing(path) as partial:
            partial.write_text("newest")
            raise error
    assert path.read_text() == "newer" and [f.name for f in path.parent.iterdir()] == ["x"]


def unfinished(path, sign):
    with locks.replacing(path) as partial:
        partial.write_text("half of it")
        sign.touch()
        time.sleep(60)


def test_what_a_dead_process_left_is_removed_and_what_a_living_one_makes_is_not(tmp_path):
    path, sign = tmp_path / "a [x].safetensors", tmp_path / "sign"
    process = started(unfinished, path, sign)
    wait_for(sign.exists)
    (left,) = tmp_path.glob("*.partial")
    (tmp_path / ".a [x].safetensors.partial").mkdir()  # of the user
    (tmp_path / ".a [x].safetensors.01234567.partial").symlink_to(tmp_path / "others")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "file").touch()
    write(path)
    assert left.exists() and not locks.clear(left)
    kill(process)
    write(tmp_path / "b.safetensors")
    assert left.exists()
    write(path)
    assert not left.exists() and (tmp_path / "others" / "file").exists()
    names = {".a [x].safetensors.01234567.partial", ".a [x].safetensors.partial", "a [x].safetensors", "b.safetensors"}
    assert {f.name for f in tmp_path.iterdir()} == names | {"others", "sign"}


def test_file_and_folder_are_on_the_disk_before_writing_ends(tmp_path, monkeypatch):
    synced, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(os.readlink(f"/proc/self/fd/{fd}"))) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: synced.append("renamed") or replace(a, b))
    write(tmp_path / "folder" / "x")
    new, partial, renamed, folder = synced
    assert (new, partial.name, renamed, folder) == (tmp_path, "x", "renamed", tmp_path / "folder")


@pytest.mark.parametrize(
    "number, text",
    [
        (28, "No space left"),
        (122, "quota"),
        (27, "too large"),
        (12, "memory"),
        (30, "Read-only"),
        (13, "Permission"),
        (5, "I.*O"),
    ],
)
@pytest.mark.parametrize("in_words", [False, True], ids=["of the system", "of safetensors or torch"])
def test_an_error_of_the_disk_says_what_is_needed_and_free(tmp_path, number, text, in_words):
    from safetensors import SafetensorError

    error, path = OSError(number, "words"), tmp_path / "x"
    if in_words:
        told = SafetensorError(f"Error while serializing: I/O error: words (os error {number})")
        error = RuntimeError("DefaultCPUAllocator: can't allocate memory") if number == 12 else told
    path.write_text("old")
    with pytest.raises(locks.NotSaved, match=f"(?i){text}") as caught, locks.replacing(path, 2_000_000) as partial:
        partial.write_text("half of it")
        raise error
    assert caught.value.errno == number and str(path) in str(caught.value)
    assert ("2.0 MB needed" in str(caught.value) and "MB free" in str(caught.value)) == (number in (28, 122, 27, 12))
    assert path.read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["x"]


def test_a_disk_without_room_for_a_lock_says_what_is_needed(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(filelock.FileLock, "acquire", full)
    with pytest.raises(locks.NotSaved, match=r"/x cannot be written: No space.*\(2.0 MB needed"):  # noqa: SIM117
        with locks.replacing(tmp_path / "x", 2_000_000):
            pytest.fail("there is no room")


def limited(path, size):
    """In a process of its own: files may have no more than `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        write(path, "x" * 100_000)
    except locks.NotSaved as e:
        path.with_name("said").write_text(str(e))


def test_a_disk_that_is_full_in_the_middle_leaves_the_old_file(tmp_path):
    write(tmp_path / "x", "old")
    started(limited, tmp_path / "x", 10_000).join(20)
    assert "File too large" in (tmp_path / "said").read_text() and (tmp_path / "x").read_text() == "old"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["said", "x"]
