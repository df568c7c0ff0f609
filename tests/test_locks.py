"""Locks and unfinished folders, with flock and without: one holder at a time, and nothing that a dead process can block."""

import errno
import fcntl
import multiprocessing
import os
import signal
import time

import pytest
from conftest import wait_for

from pgdlib.lab import leases, locks

fork = multiprocessing.get_context("fork")


@pytest.fixture(params=["flock", "no flock"])
def system(request, monkeypatch):
    """A file system with flock or without."""
    if request.param == "no flock":

        def missing(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", missing)
        monkeypatch.setattr(leases, "POLL", 0.01)
    return request.param


def started(target, *args):
    process = fork.Process(target=target, args=args)
    process.start()
    return process


def hold(path, sign):
    with locks.lock(path, report=lambda message: None):
        sign.touch()
        time.sleep(60)


def count(path, number, times):
    for _ in range(times):
        with locks.lock(path, report=lambda message: None):
            before = int(number.read_text())
            time.sleep(0.002)
            number.write_text(str(before + 1))


def test_one_holder_at_a_time(system, tmp_path):
    number = tmp_path / "number"
    number.write_text("0")
    together = [started(count, tmp_path / "x", number, 5) for _ in range(4)]
    for p in together:
        p.join(30)
    assert number.read_text() == "20" and not locks.is_held(tmp_path / "x")


def test_who_does_not_wait_is_told(system, tmp_path):
    with locks.lock(tmp_path / "x"):
        assert locks.is_held(tmp_path / "x") and not locks.is_held(tmp_path / "y")
        with pytest.raises(BlockingIOError, match="x"), locks.lock(tmp_path / "x", wait=False):
            pytest.fail("held twice")
    with locks.lock(tmp_path / "x", wait=False):
        pass


def test_what_the_block_raises_comes_out_and_frees_the_lock(system, tmp_path):
    for error in (BlockingIOError, OSError(errno.ENOLCK, "x"), FileNotFoundError, KeyboardInterrupt):
        with pytest.raises(error if isinstance(error, type) else OSError), locks.lock(tmp_path / "x"):
            raise error
        assert not locks.is_held(tmp_path / "x")


def test_a_dead_holder_is_followed(system, tmp_path):
    holder = started(hold, tmp_path / "x", tmp_path / "sign")
    wait_for((tmp_path / "sign").exists)
    assert locks.is_held(tmp_path / "x")
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    said = []
    with locks.lock(tmp_path / "x", said.append, wait=False):
        assert said == []


def test_a_removed_lock_file_lets_nobody_in(tmp_path):
    """Who waits for a lock whose file is removed by its holder, and who comes later, still exclude each other."""
    number, path = tmp_path / "number", tmp_path / "x"
    number.write_text("0")
    with locks.lock(path):
        together = [started(count, path, number, 5) for _ in range(3)]
        time.sleep(0.1)
        locks.forget(path)
        together.append(started(count, path, number, 5))
    for p in together:
        p.join(30)
    assert number.read_text() == "20"


# Leases of other hosts, whose processes cannot be asked


ELSEWHERE = "ffffffff-1-00000000"


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A lease of another host on tmp_path/x."""

    def missing(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(fcntl, "flock", missing)
    monkeypatch.setattr(leases, "POLL", 0.01)
    (tmp_path / ".x.7.lock").write_text(ELSEWHERE)
    return tmp_path / ".x.7.lock"


def test_a_lease_that_is_renewed_is_kept_and_one_that_is_not_is_taken(foreign, tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "STALE", 0.15)
    renewals = [0]

    def busy():
        if renewals[0] < 40:  # for 0.4 s
            renewals[0] += 1
            os.utime(foreign, ns=(10**18 - renewals[0], 10**18 - renewals[0]))  # by a clock that runs backwards
        assert time.monotonic() < started_at + 20, "it is never taken"

    started_at = time.monotonic()
    with leases.lease(tmp_path / "x", busy):
        assert time.monotonic() - started_at > 0.4 and renewals[0] == 40
        assert (tmp_path / ".x.8.lock").exists() and not foreign.exists()
    assert (tmp_path / ".x.8.lock").read_text() == leases.FREE


def test_an_empty_lease_counts_as_held(foreign, tmp_path):
    """It was made a moment ago, and its owner is not yet written."""
    foreign.write_text("")
    with pytest.raises(BlockingIOError), locks.lock(tmp_path / "x", wait=False):
        pass


def test_our_own_lease_is_renewed(foreign, tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "RENEW", 0.01)
    foreign.write_text(leases.FREE)
    with locks.lock(tmp_path / "x"):
        file = tmp_path / ".x.8.lock"
        os.utime(file, ns=(1, 1))
        wait_for(lambda: file.stat().st_mtime_ns > 1)


def test_who_was_slow_to_look_does_not_get_a_number_of_the_past(foreign, tmp_path, monkeypatch):
    """It saw lease 7 free; meanwhile others have had 8, and 9 is held."""
    seen = [(7, False), (9, True)]
    foreign.unlink()
    (tmp_path / ".x.9.lock").write_text(ELSEWHERE)

    class Waits(Exception):
        pass

    def busy():
        raise Waits

    monkeypatch.setattr(leases, "newest", lambda path, memory: seen.pop(0))
    with pytest.raises(Waits), leases.lease(tmp_path / "x", busy):
        pytest.fail("held twice")
    assert [f.name for f in tmp_path.iterdir()] == [".x.9.lock"]


# Unfinished folders


def unfinished(path, sign):
    with locks.scratch(path) as folder:
        (folder / "much").write_text("half of it")
        sign.touch()
        time.sleep(60)


def test_what_a_dead_process_left_is_removed_and_what_a_living_one_makes_is_not(system, tmp_path):
    path, sign = tmp_path / "a [x].safetensors", tmp_path / "sign"
    process = started(unfinished, path, sign)
    wait_for(sign.exists)
    (left,) = tmp_path.glob("*.partial")
    mine = tmp_path / ".a [x].safetensors.partial"  # of the user
    mine.mkdir()
    locks.sweep(path)
    with locks.scratch(path):
        assert (left / "much").exists() and not locks.clear(left, dry=True)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    locks.sweep(tmp_path / "b.safetensors")
    assert left.exists() and locks.clear(left, dry=True) and left.exists()
    with locks.scratch(path) as folder:
        assert not left.exists() and sorted(tmp_path.glob("*.partial")) == sorted([folder, mine])
    assert [*tmp_path.glob("*.partial")] == [mine]


def test_an_unfinished_folder_of_another_host_is_left_where_nobody_can_tell(tmp_path, foreign):
    folder = tmp_path / f".x.{ELSEWHERE}.partial"
    folder.mkdir()
    locks.sweep(tmp_path / "x")
    assert folder.exists()


def test_a_folder_that_another_process_removes_at_once_is_made_again(tmp_path, monkeypatch):
    """Between making the folder and locking it another process may take it for left."""
    claim, taken = locks._claimed, []

    def claimed(folder, owner=None):
        if owner is None and len(taken) < 3:
            taken.append(folder)
            assert locks.clear(folder)
        return claim(folder, owner)

    monkeypatch.setattr(locks, "_claimed", claimed)
    with locks.scratch(tmp_path / "x") as folder:
        assert len(taken) == 3 and folder not in taken and folder.is_dir()
    assert [*tmp_path.iterdir()] == []


def test_a_symlink_is_never_followed(tmp_path):
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "file").touch()
    link = tmp_path / f".x.{leases.me()[:9]}999999999-00000000.partial"
    link.symlink_to(tmp_path / "others")
    locks.sweep(tmp_path / "x")
    assert link.exists() and (tmp_path / "others" / "file").exists()
