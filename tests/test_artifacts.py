"""Artifacts: whole or absent, verified on load, named by their inputs, made once."""

import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import wait_for

from pgdlib.lab import artifacts

CARD = {"kind": "toy", "list": [1, 2.5, None, True], "text": "λ ≈ 2", "nested": {"b": 1, "a": []}}
TENSORS = {
    "weights": torch.arange(12.0).reshape(3, 4).T,  # not contiguous
    "ids": torch.tensor([2**40, -1]),
    "mask": torch.tensor([True, False]),
    "half": torch.tensor([1.5], dtype=torch.bfloat16),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 3),
    "learnt": torch.nn.Parameter(torch.tensor([0.1, float("nan")])),
}
fork = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "toy.safetensors"


def names(folder):
    """What a folder holds, but for lock files."""
    return sorted(f.name for f in folder.iterdir() if not f.name.endswith(".lock"))


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)


def test_roundtrip(path):
    artifacts.save(path, TENSORS, CARD)
    tensors, card = artifacts.load(path)
    assert_same(tensors, TENSORS)
    assert card == CARD
    assert names(path.parent) == ["toy.safetensors"]
    artifacts.save(path, {"other": torch.ones(1)}, {})
    assert artifacts.load(path)[0].keys() == {"other"}


def corrupt(path):
    with pytest.raises(artifacts.CorruptArtifact) as error:
        artifacts.load(path)
    assert str(path) in str(error.value)


def test_flipped_bits_are_found(path):
    """In the header, the card, the checksum and the tensors; every third bit, two or three of each byte."""
    artifacts.save(path, {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([7])}, {"n": 1, "x": 0.5})
    whole = path.read_bytes()
    for i in range(0, 8 * len(whole), 3):
        flipped = bytearray(whole)
        flipped[i // 8] ^= 1 << i % 8
        path.write_bytes(flipped)
        try:
            tensors, card = artifacts.load(path)
        except artifacts.CorruptArtifact as error:
            assert str(path) in str(error)
        else:
            pytest.fail(f"bit {i % 8} of byte {i // 8}, {whole[i // 8 : i // 8 + 1]}: loaded as {tensors}, {card}")


def test_every_truncation_is_found(path):
    artifacts.save(path, TENSORS, CARD)
    whole = path.read_bytes()
    for length in [0, 1, 8, 9, *range(20, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        corrupt(path)
    path.write_bytes(whole + b"x")
    corrupt(path)


def test_files_of_others_are_refused(path):
    path.parent.mkdir()
    for text in (b"", b"not safetensors " * 100, bytes(1000)):
        path.write_bytes(text)
        corrupt(path)
    for metadata in (None, {"format": "pt"}, {"card": "{}"}, {"card": "{", "sha256": "0"}, {"card": "NaN", "sha256": "0"}):
        safetensors.torch.save_file({"a": torch.ones(2)}, path, metadata=metadata)
        corrupt(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        artifacts.load(path.parent / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="folder"):
        artifacts.load(path.parent)


def test_a_card_that_is_not_plain_leaves_no_file(path):
    for card in ({"x": float("nan")}, {"x": torch.ones(1)}):
        with pytest.raises((ValueError, TypeError)):
            artifacts.save(path, TENSORS, card)
        assert names(path.parent) == []


def test_an_interrupted_save_leaves_the_old_file_or_none(path, monkeypatch):
    def half(tensors, partial, metadata):
        Path(partial).write_bytes(b"half of it")
        raise KeyboardInterrupt

    for old in (None, TENSORS):
        if old:
            artifacts.save(path, old, CARD)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(safetensors.torch, "save_file", half)
            artifacts.save(path, {"new": torch.ones(3)}, {})
        assert names(path.parent) == (["toy.safetensors"] if old else [])
    assert_same(artifacts.load(path)[0], TENSORS)


def test_replacing_shows_the_file_only_when_it_is_whole(path):
    path.parent.mkdir()
    with artifacts.replacing(path) as partial:
        partial.write_text("new")
        assert not path.exists() and partial.name == path.name and partial.is_relative_to(path.parent)
    assert path.read_text() == "new"
    with open(path) as reader:  # who reads the old file goes on reading it, whole
        with artifacts.replacing(path) as partial:
            partial.write_text("even newer")
        assert reader.read() == "new"
    path.write_text("new")
    with pytest.raises(ZeroDivisionError), artifacts.replacing(path) as partial:
        partial.write_text("newer")
        1 / 0  # noqa: B018
    assert path.read_text() == "new" and names(path.parent) == ["toy.safetensors"]


def maker(log, value=1.0, until=lambda: True):
    """A `make` for `artifact` that leaves a line in the file `log` each time it runs, and goes on `until`."""

    def make():
        with open(log, "a") as f:
            f.write(f"{os.getpid()}\n")
        wait_for(until)
        return {"x": torch.tensor([value])}, {"value": value}

    return make


def test_an_artifact_is_made_once(path, tmp_path):
    log = tmp_path / "log"
    (first, card), (second, again) = (artifacts.artifact(path, maker(log, value)) for value in (1.0, 2.0))
    assert len(log.read_text().split()) == 1
    assert_same(first, {"x": torch.tensor([1.0])})
    assert_same(second, first)
    assert card == again == {"value": 1.0, "versions": artifacts.versions()}
    assert card["versions"]["torch"] == torch.__version__


def test_a_damaged_artifact_is_set_aside_and_made_again(path, tmp_path):
    log, said = tmp_path / "log", []
    artifacts.artifact(path, maker(log))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    tensors, _ = artifacts.artifact(path, maker(log), said.append)
    assert_same(tensors, {"x": torch.tensor([1.0])})
    assert len(log.read_text().split()) == 2
    (aside,) = path.parent.glob("*.damaged")
    assert aside.read_bytes()[:-1] == whole[:-1] and aside.read_bytes() != whole
    assert str(path) in said[0] and aside.name in said[0]


def test_what_fails_to_be_made_leaves_nothing(path, tmp_path):
    def fail():
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        artifacts.artifact(path, fail)
    assert names(path.parent) == []
    artifacts.artifact(path, maker(tmp_path / "log"))  # the lock is free again


def run(path, log, out, until=lambda: True):
    """In a process of its own: the artifact's value, and what was reported, into the file `out`."""
    said = []

    def report(message):
        said.append(message)
        out.with_suffix(".waits").touch()

    tensors, _ = artifacts.artifact(path, maker(log, until=until), report)
    out.write_text(f"{float(tensors['x'])} {said}")


@pytest.mark.slow
def test_two_processes_at_once_make_it_once(path, tmp_path):
    log, outs = tmp_path / "log", [tmp_path / "a", tmp_path / "b"]

    def the_other_waits():
        return any(tmp_path.glob("*.waits"))

    both = [fork.Process(target=run, args=(path, log, out, the_other_waits)) for out in outs]
    for p in both:
        p.start()
    for p in both:
        p.join(20)
        assert p.exitcode == 0
    assert len(log.read_text().split()) == 1
    texts = sorted(out.read_text() for out in outs)
    assert texts[0].startswith("1.0 ['waiting") and texts[1] == "1.0 []"


def test_the_waiter_takes_over_from_a_killed_holder(path, tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    holder = fork.Process(target=run, args=(path, log, tmp_path / "never", lambda: False))
    holder.start()
    wait_for(log.exists)
    waiter = fork.Process(target=run, args=(path, log, out))
    waiter.start()
    wait_for(out.with_suffix(".waits").exists)
    assert waiter.is_alive() and not out.exists()
    os.kill(holder.pid, signal.SIGKILL)
    waiter.join(20)
    assert waiter.exitcode == 0 and out.read_text().startswith("1.0 ['waiting")
    assert log.read_text().split() == [str(holder.pid), str(waiter.pid)]
    holder.join()


def test_keys_change_with_every_input():
    inputs = dict(steps=3, lr=0.1, name="a", flag=True, layers=[1, 2], nothing=None, nested={"x": 1})
    changes = dict(steps=4, lr=0.2, name="b", flag=False, layers=[2, 1], nothing=0, nested={"x": 2})
    keys = [
        artifacts.key(**inputs),
        *(artifacts.key(**{**inputs, k: v}) for k, v in changes.items()),
        artifacts.key(**inputs, more=1),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(k) == 12 and int(k, 16) >= 0 for k in keys)
    assert artifacts.key(**dict(reversed(inputs.items()))) == keys[0]
    with pytest.raises(ValueError):
        artifacts.key(x=float("nan"))


def test_a_digest_changes_with_every_value_name_type_and_shape_and_with_the_card():
    digest = artifacts.digest(TENSORS)
    assert len(digest) == 64 and int(digest, 16) >= 0
    others = [
        {**TENSORS, "more": torch.ones(1)},
        {k: v for k, v in TENSORS.items() if k != "empty"},
        {**TENSORS, "empty": torch.zeros(3, 0)},
        {**TENSORS, "scalar": torch.tensor([3.0])},
        {**TENSORS, "scalar": torch.tensor(3)},
        {**TENSORS, "half": TENSORS["half"].half()},
        {**TENSORS, "half": TENSORS["half"].view(torch.int16)},  # the same bytes
        {**TENSORS, "mask": ~TENSORS["mask"]},
        {**TENSORS, "ids": TENSORS["ids"].flip(0)},
        {**TENSORS, "weights": TENSORS["weights"].reshape(3, 4)},
        {**TENSORS, "weights": TENSORS["weights"].T.contiguous().reshape(4, 3)},
        {**TENSORS, "ids": TENSORS["mask"], "mask": TENSORS["ids"]},
    ]
    for name in ("weights", "learnt", "scalar"):
        changed = {k: v.detach().clone() for k, v in TENSORS.items()}
        changed[name].view(-1)[0:1].add_(1e-6) if name != "weights" else changed[name][2, 1].add_(1e-6)
        others.append(changed)
    found = [
        digest,
        *map(artifacts.digest, others),
        artifacts.digest(TENSORS, CARD),
        artifacts.digest(TENSORS, {**CARD, "kind": "other"}),
    ]
    assert len(set(found)) == len(found)


def test_a_digest_does_not_depend_on_how_tensors_lie_in_memory():
    alike = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in reversed(TENSORS.items())}
    assert not TENSORS["weights"].is_contiguous() and alike["weights"].is_contiguous()
    alike["ids"] = torch.tensor([2**40, 0, -1])[::2]  # part of another
    alike["scalar"] = torch.tensor([1.0, 3.0])[1]
    alike["learnt"].requires_grad_()
    assert artifacts.digest(alike) == artifacts.digest(TENSORS) == artifacts.digest(TENSORS, None)


def test_a_digest_is_the_same_after_a_roundtrip(path):
    artifacts.save(path, TENSORS, CARD)
    tensors, card = artifacts.load(path)
    assert artifacts.digest(tensors, card) == artifacts.digest(TENSORS, CARD)


def test_code_version_changes_with_the_content(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "PACKAGE", tmp_path)
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "b.py").write_text("y = 1")

    def versions():
        artifacts.code_version.cache_clear()
        return [artifacts.code_version(*rooms) for rooms in (("a",), ("b",), ("a", "b"))]

    before = versions()
    assert len(set(before)) == 3 and versions() == before
    (tmp_path / "b.py").write_text("y = 2")
    changed = [x != y for x, y in zip(before, versions(), strict=True)]
    artifacts.code_version.cache_clear()
    assert changed == [False, True, True]
    with pytest.raises(FileNotFoundError):
        artifacts.code_version("c")


def test_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PGD_RUNS", "elsewhere")
    assert artifacts.root() == tmp_path / "elsewhere"
    monkeypatch.delenv("PGD_RUNS")
    assert artifacts.root() == Path(__file__).resolve().parent.parent / "runs"  # wherever we stand, in a checkout
    monkeypatch.setattr(artifacts, "PACKAGE", tmp_path / "site-packages" / "pgdlib")
    assert artifacts.root() == tmp_path / "runs"


# What is in the wrong place


def test_a_copy_of_another_artifact_is_set_aside_and_made_again(path, tmp_path):
    """A whole file, of another key or kind: where it lies is not what it was saved as."""
    log, said, other = tmp_path / "log", [], path.with_name("other.safetensors")
    artifacts.artifact(other, maker(log, 2.0))
    path.write_bytes(other.read_bytes())
    tensors, _ = artifacts.artifact(path, maker(log, 1.0), said.append)
    assert_same(tensors, {"x": torch.tensor([1.0])})
    (aside,) = path.parent.glob("*.damaged")
    assert aside.read_bytes() == other.read_bytes() and aside.name.endswith("saved-as-other-safetensors.damaged")
    assert "saved as other.safetensors" in said[0] and aside.name in said[0]
    assert_same(artifacts.load(aside)[0], {"x": torch.tensor([2.0])})  # whoever names a file gets it


def test_a_name_is_the_path_in_the_root_which_may_be_moved(runs, tmp_path, monkeypatch):
    path = runs / "sweeps" / "a" / "0.5.safetensors"
    artifacts.artifact(path, maker(tmp_path / "log"))
    assert artifacts.read(path)[2] == "sweeps/a/0.5.safetensors"
    (runs / "sweeps" / "b").mkdir()
    (runs / "sweeps" / "b" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(artifacts.CorruptArtifact, match=r"saved as sweeps/a/0\.5\.safetensors"):
        artifacts.load(runs / "sweeps" / "b" / path.name, own=True)
    runs.rename(tmp_path / "moved")
    monkeypatch.setenv("PGD_RUNS", str(tmp_path / "moved"))
    artifacts.load(tmp_path / "moved" / "sweeps" / "a" / path.name, own=True)


def test_an_artifact_of_before_names_is_taken(path, tmp_path):
    path.parent.mkdir()
    header = {"card": "{}", "sha256": artifacts.digest({"x": torch.ones(1)}, {})}
    safetensors.torch.save_file({"x": torch.ones(1)}, path, metadata=header)
    tensors, _ = artifacts.artifact(path, maker(tmp_path / "log", 2.0))
    assert_same(tensors, {"x": torch.ones(1)})


def test_files_set_aside_never_meet_whatever_the_clock_says(path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    path.parent.mkdir()
    for i in range(20):
        path.write_text(str(i))
        aside = artifacts.set_aside(path, f"{path} is damaged: a reason, {'long ' * 99}")
        assert "is-damaged-a-reason-long" in aside.name and len(aside.name) < 255
    assert sorted(int(f.read_text()) for f in path.parent.iterdir()) == [*range(20)]
    artifacts.set_aside(path, "another process was faster")


# The disk


def test_a_use_is_noted_and_does_not_make_a_file_younger(path, tmp_path):
    artifacts.artifact(path, maker(tmp_path / "log"))
    for file in path.parent.iterdir():
        os.utime(file, (1000, 2000))
    assert artifacts.last_use(path) == 2000
    path.read_bytes()
    artifacts.load(path)  # by a user who names the file
    assert artifacts.last_use(path) == 2000
    before = time.time()
    artifacts.artifact(path, None)
    assert path.stat().st_mtime == 2000 and artifacts.last_use(path) >= before - 1
    assert artifacts.last_use(path.with_name("other")) == 0


def test_file_and_folder_are_on_the_disk_before_save_ends(path, monkeypatch):
    synced, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(os.readlink(f"/proc/self/fd/{fd}"))) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: synced.append("renamed") or replace(a, b))
    artifacts.save(path, TENSORS, CARD)
    new, partial, renamed, folder = synced
    assert (new, partial.name, renamed, folder) == (path.parent.parent, path.name, "renamed", path.parent)


@pytest.mark.parametrize(
    "number, text",
    [(28, "No space left"), (122, "quota"), (27, "too large"), (30, "Read-only"), (13, "Permission"), (5, "I.*O")],
)
def test_an_error_of_the_disk_says_what_is_needed_and_free(path, monkeypatch, number, text):
    artifacts.save(path, TENSORS, CARD)

    def fail(tensors, partial, metadata):
        Path(partial).write_bytes(b"half of it")
        Path(partial).with_name(".tmpAbCdEf").write_bytes(b"as safetensors leaves it")
        raise safetensors.SafetensorError(f"Error while serializing: I/O error: words (os error {number})")

    with monkeypatch.context() as patch, pytest.raises(artifacts.NotSaved, match=f"(?i){text}") as error:
        patch.setattr(safetensors.torch, "save_file", fail)
        artifacts.save(path, {"big": torch.zeros(500_000)}, {})
    assert error.value.errno == number and str(path) in str(error.value)
    assert ("2.0 MB needed" in str(error.value) and "MB free" in str(error.value)) == (number in (28, 122, 27))
    assert names(path.parent) == ["toy.safetensors"]
    assert_same(artifacts.load(path)[0], TENSORS)


def test_no_memory_for_the_writing_is_said(path, monkeypatch):
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")):
        with monkeypatch.context() as patch, pytest.raises(artifacts.NotSaved, match="Cannot allocate memory"):
            patch.setattr(safetensors.torch, "save_file", lambda *a, error=error, **k: (_ for _ in ()).throw(error))
            artifacts.save(path, TENSORS, CARD)
        assert names(path.parent) == []


def test_other_errors_stay_what_they_are(path):
    with pytest.raises(ZeroDivisionError), artifacts.replacing(path):
        1 / 0  # noqa: B018
    with pytest.raises(FileNotFoundError, match="elsewhere"), artifacts.replacing(path):
        (path.parent / "elsewhere").read_text()


def limited(path, size):
    """In a process of its own: files may have no more than `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        artifacts.save(path, {"big": torch.zeros(100_000)}, {})
    except artifacts.NotSaved as e:
        path.with_name("said").write_text(str(e))


def test_a_disk_that_is_full_in_the_middle_leaves_the_old_file(path):
    artifacts.save(path, TENSORS, CARD)
    p = fork.Process(target=limited, args=(path, 10_000))
    p.start()
    p.join(20)
    assert p.exitcode == 0 and "File too large (0.4 MB needed" in path.with_name("said").read_text()
    assert names(path.parent) == ["said", "toy.safetensors"]
    assert_same(artifacts.load(path)[0], TENSORS)


def die_while_saving(path):
    def half(tensors, partial, metadata):
        Path(partial).with_name(".tmpAbCdEf").write_bytes(b"as safetensors leaves it")
        os.kill(os.getpid(), signal.SIGKILL)

    safetensors.torch.save_file = half
    artifacts.save(path, TENSORS, CARD)


def test_what_a_killed_save_left_is_removed_by_the_next(path):
    p = fork.Process(target=die_while_saving, args=(path,))
    p.start()
    p.join(20)
    assert p.exitcode == -signal.SIGKILL and len(names(path.parent)) == 1
    artifacts.save(path.with_name("other.safetensors"), TENSORS, CARD)
    assert len(names(path.parent)) == 2
    artifacts.save(path, TENSORS, CARD)
    assert names(path.parent) == ["other.safetensors", "toy.safetensors"]


def test_an_artifact_in_a_folder_that_is_read_only_is_found(path, tmp_path, monkeypatch):
    """Root may write everywhere: so nothing that writes may be called."""
    artifacts.artifact(path, maker(tmp_path / "log"))

    def refuse(*args, **named):
        raise PermissionError(13, "read-only")

    for name in ("mkdir", "open", "replace", "utime"):
        monkeypatch.setattr(os, name, refuse)
    assert_same(artifacts.artifact(path, None)[0], {"x": torch.tensor([1.0])})
