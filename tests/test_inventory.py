"""What runs/ holds, what of it is damaged, and what may be deleted: never what is in use, of the user, or elsewhere."""

import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import cut, kept, still, wait_for
from test_locks import started, unfinished

from pgdlib.lab import artifacts, inventory, locks, minari_files
from pgdlib.simulators import pen as adroit

DAY, KEY = 86_400, "0123456789ab"
NOW = time.time()


def artifact(name, days, size=100_000, used=None):
    """An artifact in runs/, `size` bytes of numbers, made and last used so many days ago."""
    path = artifacts.root() / name
    artifacts.artifact(path, lambda: ({"x": torch.zeros(size // 4)}, {}))
    os.utime(path, (NOW - days * DAY,) * 2)
    os.utime(artifacts.noted(path), (NOW - (days if used is None else used) * DAY,) * 2)
    return path


def names(found):
    return [item.name for item in found]


NAMES = {
    f"agents/iql-ci-{KEY}.safetensors": (40, 40),
    f"checkpoints/point-slug-{KEY}-0.5/0-64.safetensors": (40, 40),
    f"denoisers/human-standin-{KEY}-quick-{KEY}.safetensors": (40, 2),
    f"sweeps/slug/{KEY}-0.5.safetensors": (3, 3),
    f"sweeps/slug/{KEY}-1.0.safetensors": (20, 10),
}


@pytest.fixture
def shop(runs):
    for name, (days, used) in NAMES.items():
        artifact(name, days, used=used)
    return runs


def test_artifacts_are_listed_with_kind_size_and_times(shop, capsys):
    found = inventory.items()
    assert names(found) == sorted(NAMES) and [i.kind for i in found] == [name.split("/")[0] for name in sorted(NAMES)]
    for item in found:
        days, used = NAMES[item.name]
        assert item.size == item.path.stat().st_size > 1000
        assert (NOW - item.made, NOW - item.used) == pytest.approx((days * DAY, used * DAY))
    with locks.lock(found[0].path):
        assert inventory.main(["list"]) == 0
    head, *lines, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["kind", "MB", "age", "unused", "locked", "name"] and last.startswith("5 artifacts")
    assert lines[0].split() == ["agents", "0.1", "6", "w", "6", "w", "yes", found[0].name] and "yes" not in lines[1]
    assert lines[2].split()[2:6] == ["6", "w", "2", "d"]
    inventory.main(["list", "--kind", "sweeps"])
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_stray_file_is_neither_listed_nor_deleted(shop, tmp_path):
    """The user's: text, tensors, a guide, a copy of an artifact; figures; and all that symlinks lead to."""
    other = tmp_path / "elsewhere"
    for folder in ("guides", "figures/quick", "notebooks", "mine", "sweeps/mine"):
        (shop / folder).mkdir(parents=True)
    (shop / "notes.txt").touch()
    (shop / "figures/quick/04.png").touch()
    (shop / "sweeps/mine/0.5.csv").touch()
    (shop / f"sweeps/slug/{KEY}.txt").touch()
    artifacts.save(shop / "guides/mine.safetensors", {}, {"kind": "guide"})
    copied = (shop / sorted(NAMES)[0]).read_bytes()
    (shop / f"mine/iql-ci-{KEY}.safetensors").write_bytes(copied)
    (shop / f"mine/other-{KEY}.safetensors").write_bytes(b"not safetensors")
    other.mkdir()
    (other / f"far-{KEY}.safetensors").write_bytes(copied)
    (shop / "agents" / f"link-{KEY}.safetensors").symlink_to(other / f"far-{KEY}.safetensors")
    (shop / "sweeps" / "linked").symlink_to(other)
    (shop / "minari").symlink_to(other)
    before = set(kept(shop)) | set(kept(tmp_path))
    assert names(inventory.items()) == sorted(NAMES)
    assert inventory.main(["prune", "--older-than", "0m", "--yes"]) == 0
    assert before - set(kept(shop)) - set(kept(tmp_path)) == {*NAMES, *(f"runs/{name}" for name in NAMES)}


def test_what_is_in_the_place_of_an_artifact_is_named_and_not_deleted(shop, capsys):
    a, b, c, d, e = (shop / name for name in sorted(NAMES))
    cut(a)
    b.write_bytes(b"")
    c.write_bytes(d.read_bytes())
    whole = e.read_bytes()
    e.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    kinds = ["agents", "suspect", "suspect", "sweeps", "sweeps"]
    assert [i.kind for i in inventory.items()] == kinds
    assert inventory.main(["verify"]) == 1
    out = capsys.readouterr().out
    assert all(str(path) in out for path in (a, b, c, e)) and str(d) + " is" not in out and "5 artifacts, 4 damaged" in out
    assert "saved as sweeps/slug" in out and "checksum does not hold" in out
    assert inventory.main(["prune", "--older-than", "0m", "--kind", "suspect", "--yes"]) == 0 and c.exists()
    assert inventory.main(["verify", "--set-aside"]) == 1
    assert [p.exists() for p in (a, b, c, d, e)] == [False, False, False, True, False]
    assert [i.kind for i in inventory.items()].count("damaged") == 4
    assert inventory.main(["verify"]) == 0
    assert inventory.main(["prune", "--older-than", "0m", "--kind", "damaged", "--yes"]) == 0
    assert kept(shop) == [str(d.relative_to(shop))]


def test_verify_of_whole_artifacts_is_silent_and_uses_none(shop, capsys):
    used = {i.name: i.used for i in inventory.items()}
    assert inventory.main(["verify"]) == 0 and capsys.readouterr().out == "5 artifacts, 0 damaged\n"
    assert {i.name: i.used for i in inventory.items()} == used


RULES = [
    (dict(older_than=30 * DAY), {0, 1, 2}),
    (dict(unused_for=30 * DAY), {0, 1}),
    (dict(unused_for=5 * DAY), {0, 1, 4}),
    (dict(older_than=15 * DAY, unused_for=5 * DAY), {0, 1, 4}),
    (dict(older_than=15 * DAY, kind="sweeps"), {4}),
    (dict(keep_under=0), {0, 1, 2, 3, 4}),
    (dict(keep_under=330_000), {0, 1}),
    (dict(keep_under=250_000), {0, 1, 4}),
    (dict(keep_under=330_000, kind="sweeps"), {3, 4}),
    (dict(keep_under=330_000, unused_for=30 * DAY), {0, 1}),
    (dict(keep_under=10**9), set()),
]


@pytest.mark.parametrize("rules, gone", RULES, ids=lambda value: str(value))
def test_what_may_go(shop, rules, gone):
    found = inventory.items()
    assert all(100_000 < item.size < 101_000 for item in found)
    assert {found.index(item) for item in inventory.prunable(found, **rules)} == gone


def test_nothing_is_deleted_without_yes_or_without_a_rule(shop, capsys):
    assert inventory.main(["prune", "--older-than", "0m"]) == 0 and "nothing was deleted; --yes does" in capsys.readouterr().out
    assert inventory.main(["prune", "--yes"]) == 2 and "--keep-under" in capsys.readouterr().err
    for wrong in (["--older-than", "30"], ["--older-than", "1y"], ["--keep-under", "5"], ["--keep-under", "GB"]):
        with pytest.raises(SystemExit) as error:
            inventory.main(["prune", "--yes", *wrong])
        assert error.value.code == 2 and "is not allowed; it must be a number and" in capsys.readouterr().err.replace("\n", " ")
    assert kept(shop) == sorted(NAMES)


def test_what_is_locked_or_has_been_used_meanwhile_stays(shop, capsys):
    a, _, c, d, _ = found = inventory.items()
    artifacts.artifact(c.path, None)
    with locks.lock(a.path):
        assert not inventory.delete(a) and not inventory.delete(c) and inventory.delete(d)
        assert inventory.main(["prune", "--keep-under", "0KB", "--yes"]) == 1
        assert f"in use, kept: {a.name}" in capsys.readouterr().out
    assert names(inventory.items()) == [a.name] and not inventory.delete(found[1])
    assert inventory.delete(inventory.items()[0])
    assert [f for f in shop.rglob("*") if f.is_file()] == []  # neither locks nor notes of use


def test_a_run_keeps_its_checkpoints_for_a_day(runs):
    for hours in (1, 23, 25):
        artifact(f"checkpoints/{hours}-{KEY}.safetensors", hours / 24)
    assert names(inventory.prunable(inventory.items(), keep_under=0)) == [f"checkpoints/25-{KEY}.safetensors"]


def test_files_of_the_future_are_kept(runs):
    """The clock was set back."""
    artifact(f"sweeps/x/{KEY}-1.0.safetensors", -3)
    assert inventory.prunable(inventory.items(), unused_for=60.0) == []
    assert inventory.main(["list"]) == 0


def test_what_a_dead_process_left_unfinished_goes_and_what_a_living_one_makes_stays(shop, tmp_path):
    process = started(unfinished, shop / "denoisers" / f"x-{KEY}.safetensors", tmp_path / "sign")
    wait_for((tmp_path / "sign").exists)
    assert inventory.main(["prune", "--older-than", "0m", "--kind", "unfinished", "--yes"]) == 0
    (left,) = (shop / "denoisers").glob("*.partial")
    process.kill()
    process.join()
    assert [i.kind for i in inventory.items()].count("unfinished") == 1
    assert inventory.main(["prune", "--older-than", "0m", "--kind", "unfinished", "--yes"]) == 0
    assert not left.exists() and kept(shop) == sorted(NAMES)


def test_a_stand_in_is_one_artifact(runs):
    import numpy as np

    rng = np.random.default_rng(0)
    batch = adroit.rollout(lambda obs: still(rng, len(obs), 1)[:, 0], 2, rng, 3)
    folder = runs / "minari" / f"human-{KEY}"
    minari_files.write_minari(folder, "standin/pen/human-v0", [batch], "toy")
    (item,) = inventory.items()
    assert (item.kind, item.path) == ("minari", folder) and inventory.damage(item) is None
    assert item.size == sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    cut(folder / "standin/pen/human-v0/data/main_data.hdf5")
    assert inventory.main(["verify", "--set-aside"]) == 1
    (item,) = inventory.items()
    assert item.kind == "damaged" and not folder.exists()
    assert inventory.main(["prune", "--older-than", "0m", "--yes"]) == 0 and kept(runs) == []


@pytest.mark.parametrize("command", [["list"], ["verify"], ["prune", "--keep-under", "1GB", "--yes"]])
def test_a_folder_that_is_not_there_or_no_folder_is_an_error(runs, command, capsys):
    for make in (lambda: None, runs.touch):
        make()
        assert inventory.main(command) == 2 and str(runs) in capsys.readouterr().err


def test_an_empty_folder_as_of_a_disk_that_is_not_mounted_verifies_nothing(runs, capsys):
    runs.mkdir()
    assert inventory.main(["verify"]) == 2 and f"{runs} holds no artifact; is its disk" in capsys.readouterr().err
    assert inventory.main(["list"]) == 0


def test_a_folder_that_cannot_be_read_is_an_error_and_one_that_vanishes_is_none(shop, monkeypatch, capsys):
    scandir = os.scandir

    def failing(folder):
        if str(folder).endswith("agents"):
            raise error
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", failing)
    error = PermissionError(13, "Permission denied")
    assert inventory.main(["verify"]) == 2 and "Permission denied" in capsys.readouterr().err
    error = FileNotFoundError(2, "gone")
    assert inventory.main(["verify"]) == 0 and "4 artifacts" in capsys.readouterr().out


def test_the_command_begins_without_torch(shop):
    program = """
import runpy, sys
sys.argv = ["inventory", "list"]
try:
    runpy.run_module("pgdlib.lab.inventory", None, "__main__")
except SystemExit as e:
    assert not e.code
assert not {"torch", "numpy", "safetensors"} & set(sys.modules)
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=artifacts.PACKAGE.parent, check=False)
    assert ran.returncode == 0 and "5 artifacts" in ran.stdout, ran.stderr
