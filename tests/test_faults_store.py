"""What no fault may do: end a later run, change a result, or lose what was whole. Faults are counted, and told at the end.

Each stage of a run, made small, is killed at random moments again and again until it is over; each of its files is cut, flipped
and swapped for another's; its disk is too small; and several processes want the same at once, while some of them are killed.
"""

import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import Ideal, kept, shorter, toy

from pgdlib import pgd, worldmodel
from pgdlib.agents.iql import IQL
from pgdlib.lab import artifacts, load, models, resumable, standins, study, table1
from pgdlib.policies import GaussianPolicy

pytestmark = pytest.mark.faults
fork = multiprocessing.get_context("fork")
MOMENTS, CPU = 20, torch.device("cpu")  # kills of each stage


@pytest.fixture
def tally(request, told):
    """Counts of faults "injected", those that were "survived", results "identical" and artifacts "lost"."""
    counts = Counter(injected=0, survived=0, identical=0, lost=0)
    yield counts
    told(KINDS[request.node.originalname], **counts)


# The stages. Each makes all that it needs in runs/, or goes on with it, and returns a digest of its result.


SETTINGS = SimpleNamespace(
    **dict(scale="ci", denoiser="train", seed=0, transform="raw", horizon=8, features=8, blocks=1, batch_size=4),
    **dict(train_steps=20, learning_rate=2e-4, optimiser="muon", p_mean=-0.6, p_std=1.4, epochs=None, passes=None),
    **dict(model_steps=15, model_passes=None, samples=160, solver="heun", steps=16, churn=2.0, warmup=2, units="natural"),
    **dict(agent_steps=24, agent_batch=16, agent_rate=1e-3, resample_every=6),
    **dict(curve_points=2, curve_episodes=1, test_episodes=1),
)


def dataset():
    trajectories = toy([40, 30, 50, 20, 40, 20, 30, 40, 50, 40])
    return load.Dataset(trajectories, trajectories, False, "toy-1", 0, 0)


def denoiser():
    model, losses, _ = models.load_denoiser(dataset(), SETTINGS, CPU)
    return artifacts.digest({**model.state_dict(), "losses": losses})


def world_model():
    model, losses, _ = models.load_world_model(dataset(), SETTINGS, CPU)
    return artifacts.digest({**model.state_dict(), "losses": losses})


def agents():
    real, seeds = toy([60]), [0, 7]
    rows = [pgd.Row("real", "real"), pgd.Row("guided", "diffusion", "explicit", 1.0)]

    def sources(row, policy, number):
        if row.source == "real":
            return [real.transitions()] * policy.runs, None
        facts = SimpleNamespace(**{name: torch.full((policy.runs,), float(number)) for name in pgd.FACTS})
        return [toy([30], seed=10 * number + seed).transitions() for seed in seeds], facts

    sources.simulator = None

    def make(stack):
        return IQL(real.spec, stack, torch.zeros(45), torch.ones(45), (16, 16))

    found = table1.train("iql", make, rows, seeds, sources, SETTINGS, CPU, {})
    arrays = {name: torch.as_tensor(getattr(found, name)) for name in ("curve", "facts", "returns", "diverged_at")}
    return artifacts.digest({**found.policy.state_dict(), **arrays})


def score(simulator, policy, *_):
    """In the place of tests in the simulator: returns and falls, of one episode."""
    return policy.std.mean(1).detach().numpy()[None, :, None].repeat(2, 0)


def drawing():
    torch.manual_seed(0)
    policy = GaussianPolicy(45, 24, hidden=[8]).requires_grad_(False)
    point = study.Study(dataset(), Ideal(), policy, SETTINGS).point("explicit", 0.5)
    return artifacts.digest({"x": point.x, **{k: torch.from_numpy(v) for k, v in point.measures.items()}})


def collection():
    return load.load_data("expert", "local", 300, say=lambda text: None).key


STAGES = dict(denoiser=denoiser, world_model=world_model, agents=agents, drawing=drawing, collection=collection)


@pytest.fixture
def small(runs, tmp_path, monkeypatch):
    """Checkpoints at every step, and parts of every size."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resumable, "run", functools.partial(resumable.run, save_every=-1.0))
    monkeypatch.setattr(worldmodel.Ensemble.__init__, "__defaults__", (3, 2, (16,) * 4))
    monkeypatch.setattr(table1, "LONG", -1.0)
    monkeypatch.setattr(table1, "evaluate", score)
    monkeypatch.setattr(study.Study, "most", lambda lab, n: 32)
    monkeypatch.setattr(standins, "CHUNK", 4)
    shorter(monkeypatch, 10)
    return runs


def work(stage, out, seconds=120, saves=None):
    """The digest that a stage gives in a process of its own, or what ended it; None if it is killed.

    It is killed after so many `seconds`, or when it has saved so many artifacts; `out` is a file for the digest.
    """
    saved, save = out.with_suffix(".saves"), artifacts.save

    def counted(*given):
        save(*given)
        with open(saved, "a") as f:
            f.write("x")
        if saved.stat().st_size == saves:
            os.kill(os.getpid(), signal.SIGKILL)

    def run():
        artifacts.save = counted
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        try:
            text = STAGES[stage]()
        except Exception as e:
            text = f"{type(e).__name__}: {e}"
        with artifacts.replacing(out) as partial:
            partial.write_text(text)

    out.unlink(missing_ok=True)
    saved.unlink(missing_ok=True)
    process = fork.Process(target=run)
    process.start()
    process.join(seconds)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return out.read_text() if out.exists() else None


def fresh(runs):
    shutil.rmtree(runs, ignore_errors=True)


def files(folder, *suffixes):
    """The artifacts in a folder and below, but not what is unfinished."""
    return sorted(f for f in folder.rglob("*") if f.suffix in (suffixes or (".safetensors",)) and ".partial/" not in str(f))


def is_whole(path):
    try:
        artifacts.load(path)
    except artifacts.CorruptArtifact:
        return False
    return True


def check(tally, found, expected):
    """Count the result of the run that came after a fault; fail if it is another."""
    tally["survived"] += found is not None and "Error" not in found
    tally["identical"] += found == expected
    tally["lost"] += found != expected
    assert found == expected


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_moments_a_stage_goes_on_to_the_same_bits(stage, small, tmp_path, tally):
    rng, out = random.Random(stage), tmp_path / "out"
    expected = work(stage, out)
    fresh(small)
    started = time.monotonic()
    assert work(stage, out) == expected
    whole, kills, runs, chains = time.monotonic() - started, 0, 0, []
    fresh(small)
    while sum(chains) + kills < MOMENTS or kills:
        seconds = rng.uniform(0.1, 0.8) * whole if sum(chains) + kills < MOMENTS else 120
        found, runs = work(stage, out, seconds), runs + 1
        damaged = [f for f in files(small) if not is_whole(f)]
        tally["lost"] += len(damaged)
        assert damaged == [] and runs < 20 * MOMENTS  # a file is there as a whole or not at all
        if found is None:
            kills += 1
            continue
        tally["injected"] += kills
        for _ in range(kills):
            check(tally, found, expected)
        assert found == expected and [f for f in kept(small) if f.endswith(".damaged") or "/." in f] == []
        chains.append(kills)
        kills = 0
        fresh(small)
    assert sum(chains) >= MOMENTS


def flip(path, rng):
    whole = bytearray(path.read_bytes())
    whole[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    path.write_bytes(whole)


def shorten(path, rng):
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def swap(path, rng):
    """For another artifact, whole, of another key: here a checkpoint or a result that something else has left."""
    other = path.with_name(f"other-{path.name}")
    tensors, card = artifacts.load(path)
    artifacts.save(other, {k: v + 1 if v.is_floating_point() else v for k, v in tensors.items()}, card)
    os.replace(other, path)


FAULTS = dict(cut=shorten, flipped=flip, swapped=swap)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_artifact_that_is_spoilt_is_set_aside_and_made_again(stage, fault, small, tmp_path, tally):
    """First those of a finished stage, then the checkpoints and parts that a killed one leaves."""
    rng, out = random.Random(stage + fault), tmp_path / "out"
    expected = work(stage, out)
    whole = files(small) if fault == "swapped" else files(small, ".safetensors", ".hdf5")
    assert whole
    for path in whole:
        spoil(path, fault, rng, tally, lambda: work(stage, out), expected)
    fresh(small)
    assert work(stage, out) == expected
    for saves in rng.sample(range(1, out.with_suffix(".saves").stat().st_size), 3):
        fresh(small)
        assert work(stage, out, saves=saves) is None
        spoil(rng.choice(files(small)), fault, rng, tally, lambda: work(stage, out), expected)


def spoil(path, fault, rng, tally, again, expected):
    before = path.read_bytes()
    FAULTS[fault](path, rng)
    bad = path.read_bytes()
    assert bad != before
    tally["injected"] += 1
    check(tally, again(), expected)
    copies = [f for f in artifacts.root().rglob("*") if f.is_file() and f.stat().st_size == len(bad)]
    if "parts" not in path.parts and "checkpoints" not in path.parent.parent.parts:
        assert any(f.read_bytes() == bad for f in copies)  # set aside; the others are deleted when they are needed no more
    assert not path.exists() or path.read_bytes() != bad


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A function that makes runs/ a file system of so many KB, or makes it larger. Only root may."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def limit(size):
        verb = "remount," if os.path.ismount(folder) else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{verb}size={size}k", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no file system may be mounted here")

    monkeypatch.setenv("PGD_RUNS", str(folder))
    yield limit
    subprocess.run(["umount", str(folder)], check=False, capture_output=True)


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_ends_a_stage_with_a_clear_error_or_not_at_all(stage, small, disk, tmp_path, tally):
    out = tmp_path / "out"
    expected = work(stage, out)
    used = sum(f.stat().st_size for f in small.rglob("*") if f.is_file()) // 1000
    errors = 0
    for share in (0.05, 0.2, 0.4, 0.6, 0.8, 0.95):
        disk(max(8, round(share * used)))
        root = artifacts.root()
        found = work(stage, out)
        tally["injected"] += 1
        assert found is not None
        if found != expected:
            errors += 1
            assert "cannot be written: No space left on device" in found and "MB free" in found, found
        assert [f for f in files(root) if not is_whole(f)] == []
        assert [f for f in root.rglob("*.partial")] == []
        disk(100_000)
        check(tally, work(stage, out), expected)
        for f in root.iterdir():
            shutil.rmtree(f)
    assert errors > 0


@pytest.mark.parametrize("processes", [2, 8])
def test_many_processes_on_one_store_make_everything_once(processes, small, tmp_path, tally):
    log = tmp_path / "log"
    expected = json.dumps({f"{i}": artifacts.digest({"x": torch.full((1000,), float(i))}) for i in range(6)})

    def client(number, out):
        rng, found = random.Random(number), {}
        for i in sorted(range(6), key=lambda i: rng.random()):

            def make(i=i):
                with open(log, "a") as f:
                    f.write(f"{i}\n")
                time.sleep(0.05)
                return {"x": torch.full((1000,), float(i))}, {}

            tensors, _ = artifacts.artifact(artifacts.root() / "sweeps" / f"{i}.safetensors", make, report=lambda message: None)
            found[str(i)] = artifacts.digest(tensors)
        out.write_text(json.dumps(found, sort_keys=True))

    rng = random.Random(processes)
    for killing in (False, True):
        fresh(small)
        log.unlink(missing_ok=True)
        outs = [tmp_path / f"{killing}{n}" for n in range(processes)]
        together = [fork.Process(target=client, args=(n, out)) for n, out in enumerate(outs)]
        for p in together:
            p.start()
        killed = together[: processes // 2] if killing else []
        for p in killed:
            time.sleep(rng.uniform(0, 0.1))
            os.kill(p.pid, signal.SIGKILL)
        for p, out in zip(together, outs, strict=True):
            p.join(60)
            tally["injected"] += 1
            if p in killed:
                client(0, out)  # another process wants the same after it
            check(tally, out.read_text() if out.exists() else None, expected)
        made = Counter(log.read_text().split())
        assert set(made) == set(map(str, range(6))) and (killing or set(made.values()) == {1})
        assert sum(made.values()) <= 6 + len(killed)
        artifacts.artifact(artifacts.root() / "sweeps" / "0.safetensors", None)
        assert [f for f in kept(small) if not f.endswith(".safetensors")] == []


KINDS = {
    "test_killed_at_random_moments_a_stage_goes_on_to_the_same_bits": f"SIGKILL at random moments, {len(STAGES)} stages",
    "test_every_artifact_that_is_spoilt_is_set_aside_and_made_again": "artifacts cut, bit-flipped, swapped",
    "test_a_full_disk_ends_a_stage_with_a_clear_error_or_not_at_all": "file systems too small for a stage",
    "test_many_processes_on_one_store_make_everything_once": "2 and 8 processes on one store, some killed",
}
