"""Artifacts: whole or absent, verified on load, named by their inputs, made once."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pgdlib.lab import artifacts, settings

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
    """What a folder holds, but for lock files and notes of use."""
    return sorted(f.name for f in folder.iterdir() if f.suffix not in (".lock", ".used"))


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


def test_files_that_are_cut_or_of_others_are_refused(path):
    artifacts.save(path, TENSORS, CARD)
    whole = path.read_bytes()
    cuts = [whole[:length] for length in [1, 8, 9, *range(20, len(whole), 37), len(whole) - 1]]
    for text in (*cuts, whole + b"x", b"", b"not safetensors " * 100, bytes(1000)):
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


def maker(log, value=1.0):
    """A `make` for `artifact` that leaves a line in the file `log` each time it runs."""

    def make():
        with open(log, "a") as f:
            f.write(f"{os.getpid()}\n")
        return {"x": torch.tensor([value])}, {"value": value}

    return make


def test_an_artifact_is_made_once(path, tmp_path):
    log = tmp_path / "log"
    (first, card), (second, again) = (artifacts.artifact(path, maker(log, value)) for value in (1.0, 2.0))
    assert len(log.read_text().split()) == 1
    assert_same(first, {"x": torch.tensor([1.0])})
    assert_same(second, first)
    assert card == again == {"value": 1.0, "versions": artifacts.versions()}
    assert torch.__version__.startswith(card["versions"]["torch"])


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
    others = [
        {**TENSORS, "more": torch.ones(1)},
        {k: v for k, v in TENSORS.items() if k != "empty"},
        {**TENSORS, "empty": torch.zeros(3, 0)},
        {**TENSORS, "scalar": torch.tensor([3.0])},
        {**TENSORS, "scalar": torch.tensor(3)},
        {**TENSORS, "half": TENSORS["half"].view(torch.int16)},  # the same bytes
        {**TENSORS, "mask": ~TENSORS["mask"]},
        {**TENSORS, "ids": TENSORS["ids"].flip(0)},
        {**TENSORS, "weights": TENSORS["weights"].reshape(3, 4)},
        {**TENSORS, "ids": TENSORS["mask"], "mask": TENSORS["ids"]},
        {**TENSORS, "scalar": TENSORS["scalar"] + 1e-6},
    ]
    digests = [artifacts.digest(TENSORS), *map(artifacts.digest, others), artifacts.digest(TENSORS, CARD)]
    assert len({*digests, artifacts.digest(TENSORS, {**CARD, "kind": "other"})}) == len(digests) + 1
    assert all(len(digest) == 64 and int(digest, 16) >= 0 for digest in digests)


def test_a_digest_does_not_depend_on_how_tensors_lie_in_memory_or_were_kept(path):
    alike = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in reversed(TENSORS.items())}
    assert not TENSORS["weights"].is_contiguous() and alike["weights"].is_contiguous()
    alike["ids"] = torch.tensor([2**40, 0, -1])[::2]  # part of another
    assert artifacts.digest(alike) == artifacts.digest(TENSORS)
    artifacts.save(path, TENSORS, CARD)
    assert artifacts.digest(*artifacts.load(path)) == artifacts.digest(TENSORS, CARD)


SOURCES = {
    "__init__": "version = 1",
    "top": "from toy import middle\nfrom toy.inner import leaf\nimport toy.alone as other\nx = 1",
    "middle": "def late():\n    from toy.low import f\n    return f",
    "low": "import numpy\n\ndef f(a):\n    return a + 1\n\nclass C:\n    async def g(self):\n        return 2",
    "alone": "x = 1",
    "unused": "x = 1",
    "inner/__init__": "from toy.inner.hidden import x",
    "inner/leaf": "x = 1",
    "inner/hidden": "x = 1",
}


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A function that changes files of a package and gives the version of its module "top"."""
    package = tmp_path / "toy"
    monkeypatch.setattr(artifacts, "PACKAGE", package)

    def forget():
        artifacts._parsed.cache_clear()
        artifacts.code_version.cache_clear()

    def version(**changes):
        for name, text in {**SOURCES, **changes}.items():
            path = package / f"{name.replace('inner_', 'inner/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        forget()
        return artifacts.code_version("top")

    forget()
    yield version
    forget()


def test_the_code_of_a_module_is_all_that_it_imports(code):
    before, low = code(), SOURCES["low"]
    assert artifacts.closure("top") == ["alone", "inner", "inner.hidden", "inner.leaf", "low", "middle", "top"]
    changes = [
        dict(low=low.replace("a + 1", "a + 2")),  # two imports away
        dict(low=low.replace("return 2", "return 3")),
        dict(low=low.replace("def f", "def h")),
        dict(inner_hidden="x = 2"),
        dict(alone="x = 2"),
        dict(middle="x = 1"),
    ]
    assert len({before, *(code(**change) for change in changes)}) == len(changes) + 1
    assert code() == before == code(unused="x = 2", __init__="version = 2")


def test_comments_docstrings_and_layout_are_no_code(code):
    low = '"""What."""\nimport numpy  # why\ndef f(a):\n    """Adds."""\n\n    return (a+1)\n\n\nclass C:\n    """Is."""\n'
    before = code()
    assert code(low=low + '    async def g(self):\n        """Gives."""\n        # two\n        return 2\n') == before
    assert code(low=low + '    async def g(self):\n        x = """Gives."""\n        return 2\n') != before


def test_modules_that_do_not_exist_have_no_code(code):
    code()
    for name in ("nowhere", "inner.nowhere", "inner.leaf.x"):
        with pytest.raises(FileNotFoundError, match=name):
            artifacts.code_version(name)


def test_a_key_covers_all_modules_that_python_loads():
    """In a process that imports one after the other, and says what of the package each has loaded."""
    names = ["edm", "worldmodel", "lab.study", "lab.table1"]
    program = f"""
import importlib, sys
for name in {names}:
    before = set(sys.modules)
    importlib.import_module("pgdlib." + name)
    print(*(m[7:] for m in set(sys.modules) - before if m.startswith("pgdlib.")))
"""
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    for name, line in zip(names, ran.stdout.splitlines(), strict=True):
        assert name in line.split() and set(line.split()) <= set(artifacts.closure(name)), name


def test_versions_without_git_and_in_the_repository_of_another(monkeypatch, tmp_path):
    assert artifacts.versions()["git"] != "unknown" or not (artifacts.PACKAGE.parent / ".git").exists()
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "of another"]):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *command], cwd=tmp_path, check=True)
    package = tmp_path / "vendored" / "pgdlib"
    package.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "PACKAGE", package)
        assert artifacts.versions()["git"] == "unknown"
    package, index = tmp_path / "pgdlib", tmp_path / ".git/index"
    package.mkdir()
    (package / "a.py").write_text("a = 1")
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    os.utime(package / "a.py", (0, 0))  # git looks again, and would write what it saw
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "PACKAGE", package)
        before = index.stat()
        assert artifacts.versions()["git"].endswith("-dirty") and index.stat() == before
        (tmp_path / ".git").rename(tmp_path / "gone")
        assert artifacts.versions()["git"].endswith("-dirty"), "a process has one commit: that of its code"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(artifacts, "_commit", artifacts._commit.__wrapped__)
    assert artifacts.versions()["git"] == "unknown"


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
    (runs / "sweeps" / "b").mkdir()
    (runs / "sweeps" / "b" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(artifacts.CorruptArtifact, match=r"saved as sweeps/a/0\.5\.safetensors"):
        artifacts.load(runs / "sweeps" / "b" / path.name, own=True)
    runs.rename(tmp_path / "moved")
    monkeypatch.setenv("PGD_RUNS", str(tmp_path / "moved"))
    artifacts.load(tmp_path / "moved" / "sweeps" / "a" / path.name, own=True)


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
    path.read_bytes()
    artifacts.load(path)  # by a user who names the file
    assert artifacts.noted(path).stat().st_mtime == 2000
    before = time.time()
    artifacts.artifact(path, None)
    assert path.stat().st_mtime == 2000 and artifacts.noted(path).stat().st_mtime >= before - 1


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


def as_user(uid, umask, others, told):
    """What the user `uid` of a group is told, of the folder, of another's artifact, and on the way to one of their own."""
    os.setgroups([20_001])
    os.setgid(20_001)
    os.setuid(uid)
    os.umask(umask)
    own = artifacts.root() / "guides" / f"{uid}.safetensors"
    make = dict(make=lambda: ({"x": torch.zeros(1)}, {}))
    for call in (artifacts.require_writable, lambda: artifacts.load(others), lambda: artifacts.artifact(own, **make)):
        try:
            call()
            told.send("")
        except OSError as e:
            told.send(str(e))


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can be two users")
@pytest.mark.parametrize("umask, fits, seen", [(0o002, True, True), (0o022, False, True), (0o077, False, False)])
def test_two_users_share_a_folder_or_are_told_what_it_takes(monkeypatch, umask, fits, seen):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        monkeypatch.setenv("PGD_RUNS", folder)
        os.chown(folder, 0, 20_001)
        os.chmod(folder, 0o2775)
        first, second = (f"{folder}/guides/{uid}.safetensors" for uid in (20_001, 20_002))
        heard = []
        for uid, others in ((20_001, second), (20_002, first)):
            listen, told = fork.Pipe(False)
            p = fork.Process(target=as_user, args=(uid, umask, others, told))
            p.start()
            p.join(60)
            heard.append([listen.recv() for _ in range(3)])
        assert heard[0] == ["", f"no artifact at {second}", ""]
        at_once, read, made = heard[1]
        assert [at_once == "", read == "", made == ""] == [fits, seen, fits]
        for text, of in ((at_once, "guides cannot be written"), (read, f"{first} cannot be read"), (made, f"{second} cannot")):
            assert text == "" or (of in text and "Permission denied. PGD_RUNS can name another" in text and "umask 002" in text)


def test_a_root_that_cannot_be_written_is_refused_at_once(runs, monkeypatch):
    artifacts.require_writable()  # it can be made
    assert not runs.exists()
    runs.mkdir()
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != runs)
    with pytest.raises(artifacts.NotSaved, match=f"{runs} cannot be written: .*PGD_RUNS can name another"):
        settings.check({})


def test_an_artifact_in_a_folder_that_is_read_only_is_found(path, tmp_path, monkeypatch):
    """Root may write everywhere: so nothing that writes may be called."""
    artifacts.artifact(path, maker(tmp_path / "log"))

    def refuse(*args, **named):
        raise PermissionError(13, "read-only")

    for name in ("mkdir", "open", "replace", "utime"):
        monkeypatch.setattr(os, name, refuse)
    assert_same(artifacts.artifact(path, None)[0], {"x": torch.tensor([1.0])})
