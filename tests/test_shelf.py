"""What the shelf takes from runs/, what it says and offers where something is missing, and what it makes when told to."""

import copy
import functools
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import cut, kept
from torch import nn

from pgdlib import data
from pgdlib.lab import load, minari_files, params, store, study
from pgdlib.lab.explorer import shelf, widgets
from pgdlib.simulators import pen as adroit

LAMS, SMOOTHED = [0.5, 1.0, 2.5], [0.5]  # the sweeps of two rules, in these tests
SWEEPS = {"explicit": LAMS, "smoothed": SMOOTHED}


@pytest.fixture(autouse=True)
def mujoco_log(tmp_path, monkeypatch):
    """MuJoCo logs its warnings in the working folder."""
    monkeypatch.chdir(tmp_path)


class Recalling(nn.Module):
    """The denoiser of narrow Gaussians, of std 0.01, around the normalised `windows` [n, T, 71]: near real trajectories."""

    def __init__(self, windows, normaliser):
        super().__init__()
        self.normaliser = normaliser
        self.register_buffer("windows", windows)

    def forward(self, x, sigma):
        noise, own = torch.as_tensor(sigma, dtype=x.dtype) ** 2, 1e-4
        away = (x[:, None] - self.windows).square().sum((2, 3))
        centre = torch.einsum("bw,wtc->btc", (-away / 2 / (noise + own)).softmax(1), self.windows)
        return (own * x + noise * centre) / (own + noise)


@functools.cache
def parts():
    """(dataset, denoiser, guide) of six real episodes of the guide."""
    guide = load.load_guide()[0]
    made = adroit.rollout(guide.act(torch.Generator().manual_seed(0)), 6, np.random.default_rng(0), 40, threads=1)
    columns = made.obs[:, :-1], made.actions.clip(-1, 1), made.rewards, np.zeros((6, 40)), made.obs[:, 1:]
    columns = (torch.tensor(x, dtype=torch.float32).flatten(0, 1) for x in columns)
    episodes = data.Trajectories(*columns, torch.full((6,), 40), "stand-in pen-human")
    dataset = load.Dataset(episodes, episodes, False, "toy-1", 0, 0)
    train, _ = load.train_val(dataset)
    normaliser = data.Normaliser().fit(train.packed())
    windows = data.Windows(train, normaliser, 8)
    return dataset, Recalling(windows[torch.arange(len(windows))][0], normaliser), guide


def a_lab(episodes=None, denoiser=None, policy=None, **changes):
    """A small study. Its λ = 2.5 lies beyond the limit, and some of its trajectories have no error."""
    own = dict(dataset="human", source="local", guide="shipped", device="cpu", transform="raw", seed=0, units="natural")
    own |= dict(horizon=8, steps=4, samples=6, data_steps=500, train_steps=3, features=8, batch_size=4)
    p = params.defaults("ci", **{k: v for k, v in own.items() if k not in params.SETTINGS})
    vars(p).update(own | changes)
    given = (episodes, denoiser, policy)
    return study.Study(*(mine or theirs for mine, theirs in zip(given, parts())), p)


def plain(iterable, **_):
    """A bar that shows nothing."""
    return iterable


def a_shelf(lab, **how):
    return shelf.Shelf(lab, SWEEPS, **how)


def ignore(*_):
    """A report that nobody reads."""


def counted(monkeypatch, lab):
    """The λ that are drawn from now on."""
    drawn, draw = [], lab.draw
    monkeypatch.setattr(lab, "draw", lambda rule, lam, *a, **k: drawn.append(lam) or draw(rule, lam, *a, **k))
    return drawn


@functools.cache
def the_lab():
    """One study for many tests, which leave it as it is."""
    return a_lab()


@functools.cache
def sweep_files():
    """The files of its two sweeps, path -> content."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGD_RUNS", folder)
        the_lab().sweep("explicit", LAMS, plain)
        the_lab().sweep("smoothed", SMOOTHED, plain)
        return {name: Path(folder, name).read_bytes() for name in kept(Path(folder))}


def put_sweep(runs):
    """Put the sweeps into runs/; their study."""
    for name, content in sweep_files().items():
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        (runs / name).write_bytes(content)
    return the_lab()


@pytest.fixture
def lab(runs):
    return the_lab()


@pytest.fixture
def swept(runs):
    return put_sweep(runs)


def test_nothing_in_runs(lab, runs):
    mine = a_shelf(lab)
    text, button = mine.choose("human", "explicit")
    assert text == "There is no sweep of the explicit rule on stand-in pen-human yet." and button == "Compute it"
    assert (mine.points, mine.stops, mine.frame, mine.calibrated, kept(runs)) == ({}, [], None, None, [])


def test_a_whole_sweep(swept):
    mine = a_shelf(swept)
    assert mine.choose("human", "explicit") == ("", "")
    assert list(mine.points) == [0.0, *LAMS] and mine.stops == [(lam, 0) for lam in (0.0, *LAMS)]
    for lam, point in mine.points.items():
        assert torch.equal(point.x, swept.draw("explicit", lam)[0]) and mine.point((lam, 0)) is point
    assert mine.frame["lam"].tolist() == [0.0, *LAMS] and mine.limit == 2.0
    mean = [mine.points[lam].measures["log_likelihood"].mean() for lam in (0.5, 1.0)]
    assert mean[0] < swept.on_policy < mean[1]
    assert mine.calibrated == pytest.approx(np.interp(swept.on_policy, mean, [0.5, 1.0])) and mine.first == (1.0, 0)


def test_what_is_given_counts_for_the_first_study_alone(swept, monkeypatch):
    mine = a_shelf(swept, calibrated={"explicit": 0.9, "smoothed": 3.0})
    mine.choose("human", "explicit")
    assert mine.calibrated == 0.9 and mine.first == (1.0, 0)
    mine.choose("human", "smoothed")
    assert mine.calibrated == 3.0 and mine.limit is None and mine.stops == [(0.0, 0), (0.5, 0)]
    other = a_lab(dataset="expert")
    monkeypatch.setattr(study, "GRIDS", {"explicit": [0.25]})
    monkeypatch.setattr(study.Study, "open", lambda p, *_, **__: other)
    other.sweep("explicit", [0.25], plain)
    assert mine.choose("expert", "explicit") == ("", "") and list(mine.points) == [0.0, 0.25] and mine.calibrated is None


@pytest.mark.parametrize("name", ["diffusion model", "guide", "trajectories"])
def test_a_sweep_of_something_else_is_stale(lab, name):
    changed = {
        "diffusion model": lambda: a_lab(denoiser=Recalling(0.9 * lab.denoiser.windows, lab.normaliser)),
        "guide": lambda: a_lab(policy=shifted(lab.policy)),
        "trajectories": lambda: a_lab(samples=4),
    }[name]()
    changed.sweep("explicit", LAMS, plain)
    text, button = a_shelf(lab).choose("human", "explicit")
    assert text == f"The sweep in runs/ is stale: it was made with another {name}." and button == "Compute it anew"


def shifted(policy):
    other = copy.deepcopy(policy)
    other.log_std += 0.1
    return other


def test_half_a_sweep_is_shown_and_the_rest_made(lab, monkeypatch):
    for lam in (0.0, 1.0):
        lab.point("explicit", lam)
    mine = a_shelf(lab)
    assert mine.choose("human", "explicit") == ("2 of 4 λ of this sweep are computed.", "Compute the rest")
    assert mine.stops == [(0.0, 0), (1.0, 0)]
    drawn, reports = counted(monkeypatch, lab), []
    mine.compute("human", "explicit", None, lambda *given: reports.append(given))
    assert drawn == [0.5, 2.5] and mine.choose("human", "explicit") == ("", "") and len(mine.stops) == 4
    shares, texts = zip(*reports)
    assert list(shares) == sorted(shares) and (shares[0], shares[-1]) == (1 / 14, 1.0)  # 7 evaluations for each
    assert set(texts) == {"λ = 0.5, 1 of 2", "λ = 2.5, 2 of 2"}


def test_without_its_zero_a_sweep_is_not_shown(lab):
    lab.point("explicit", 1.0)
    mine = a_shelf(lab)
    assert mine.choose("human", "explicit") == ("1 of 4 λ of this sweep are computed.", "Compute the rest")
    assert mine.points == {} and mine.stops == []


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_a_damaged_point_is_made_again_when_told_to(swept, runs, monkeypatch, lam):
    (path,) = runs.glob(f"*/*explicit*/*-{lam!r}.safetensors")
    cut(path)
    mine, drawn = a_shelf(swept), []
    with monkeypatch.context() as patch:
        patch.setattr(swept, "judge", lambda *_: drawn.append(lam))  # nothing is made for who only looks
        text = mine.choose("human", "explicit")
    assert text == ("3 of 4 λ of this sweep are computed.", "Compute the rest")
    assert drawn == [] and [stop for stop, _ in mine.stops] == ([] if lam == 0.0 else [0.0, 0.5, 2.5])
    drawn = counted(monkeypatch, swept)
    mine.compute("human", "explicit", None, ignore)
    assert drawn == [lam] and mine.choose("human", "explicit") == ("", "")
    assert store.load(path)[1]["lam"] == lam and sum(name.endswith(".damaged") for name in kept(runs)) == 1


def test_a_cancelled_computation_keeps_what_is_done(lab, monkeypatch):
    def cancel(share, text):
        if text == "λ = 1, 3 of 4":
            raise widgets.Cancelled

    mine = a_shelf(lab)
    with pytest.raises(widgets.Cancelled):
        mine.compute("human", "explicit", None, cancel)
    assert mine.choose("human", "explicit")[0] == "2 of 4 λ of this sweep are computed."
    drawn = counted(monkeypatch, lab)
    mine.compute("human", "explicit", None, ignore)
    assert drawn == [1.0, 2.5] and mine.choose("human", "explicit") == ("", "")


# Other datasets


def test_another_dataset_is_made_only_when_told_to(swept, runs, monkeypatch):
    monkeypatch.setattr(study, "GRIDS", {"explicit": [0.5]})
    mine, before, heard = a_shelf(swept), kept(runs), []
    text = "expert is not ready yet: collecting the stand-in expert comes first, then the sweep."
    assert mine.choose("expert", "explicit") == (text, "Compute")
    assert kept(runs) == before and (mine.stops, mine.frame) == ([], None)

    def stop_at(word):
        def report(share, text):
            heard.append(text)
            if word in text:
                raise widgets.Cancelled

        return report

    with pytest.raises(widgets.Cancelled):
        mine.compute("expert", "explicit", widgets.bars(stop_at("training")), ignore)
    text = "expert is not ready yet: training the denoiser on stand-in pen-expert comes first, then the sweep."
    assert mine.choose("expert", "explicit") == (text, "Compute")
    report = stop_at("nowhere")
    mine.compute("expert", "explicit", widgets.bars(report), report)
    assert mine.choose("expert", "explicit") == ("", "") and list(mine.points) == [0.0, 0.5]
    assert mine.view((0.5, 0), "normalised").label == "stand-in pen-expert" and mine.limit == 2.0
    assert sorted(set(heard)) == [
        "collecting the stand-in expert",
        "training the denoiser on stand-in pen-expert",
        "λ = 0, 1 of 2",
        "λ = 0.5, 2 of 2",
    ]
    assert mine.choose("human", "explicit") == ("", "") and list(mine.points) == [0.0, *LAMS]


@pytest.mark.parametrize("error", [ValueError("horizon=8 is not allowed."), FileNotFoundError("no such"), PermissionError(13)])
def test_what_cannot_be_opened_is_told(swept, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(study.Study, "open", fail)
    mine = a_shelf(swept)
    text, button = mine.choose("expert", "explicit")
    assert text == f"expert is not ready yet: {str(error).rstrip('.')}." and button == "Compute" and mine.stops == []


def test_d4rl_is_not_downloaded_for_who_only_looks(runs, monkeypatch):
    dataset = copy.copy(parts()[0])
    dataset.is_d4rl, asked = True, []

    def find(name, download=True):
        asked.append((name, download))
        raise FileNotFoundError("it is not on disk")

    monkeypatch.setattr(minari_files, "find_d4rl", find)
    mine = shelf.Shelf(a_lab(dataset, source="auto"))
    assert mine.choose("cloned", "explicit") == ("cloned is not ready yet: it is not on disk.", "Compute")
    assert asked == [("cloned", False)]
    with pytest.raises(FileNotFoundError):
        mine.compute("cloned", "explicit", widgets.bars(ignore), ignore)
    assert asked[1:] == [("cloned", True)]


def test_who_looks_does_not_wait_for_what_is_being_made(swept, runs, monkeypatch):
    """What is being made is locked, so opening it would wait for its end."""
    making, go_on, mine = threading.Event(), threading.Event(), a_shelf(swept)

    def make(p, progress, say):
        with store.lock(runs / "expert"):
            making.set()
            assert go_on.wait(10)
            raise ValueError("it fails")

    monkeypatch.setattr(study.Study, "open", make)
    failed = []

    def compute():
        try:
            mine.compute("expert", "explicit", plain, ignore)
        except ValueError as e:
            failed.append(str(e))

    thread = threading.Thread(target=compute, daemon=True)
    thread.start()
    making.wait(10)
    text = "expert is not ready yet: its data and its denoiser are being made."
    looked = threading.Thread(target=lambda: failed.append(mine.choose("expert", "explicit")), daemon=True)
    looked.start()
    looked.join(2)
    assert failed == [(text, "Compute")]
    go_on.set()
    thread.join(10)
    assert failed[1:] == ["it fails"]
    assert mine.choose("expert", "explicit")[0] == "expert is not ready yet: it fails."


# Fresh trajectories


def test_a_fresh_stop_stands_between_the_others(swept, runs):
    mine = a_shelf(swept)
    mine.choose("human", "explicit")
    before, frame, shares = kept(runs), mine.frame, []
    keep = mine.sample(swept, "explicit", 0.7, 5, lambda share, text="": shares.append(share))
    assert mine.stops == [(lam, 0) for lam in (0.0, *LAMS)]
    assert keep() == (0.7, 1) and mine.stops == [(0.0, 0), (0.5, 0), (0.7, 1), (1.0, 0), (2.5, 0)]
    point = mine.point((0.7, 1))
    assert len(point.x) == 5 and torch.equal(point.x, swept.draw("explicit", 0.7, 5, 1_000_001)[0])
    assert list(mine.points) == [0.0, *LAMS] and mine.frame is frame and kept(runs) == before
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert mine.sample(swept, "explicit", 0.7, 5, ignore)() == (0.7, 2)
    assert mine.stops == [(0.0, 0), (0.5, 0), (0.7, 2), (1.0, 0), (2.5, 0)]  # the newest alone
    assert not torch.equal(mine.point((0.7, 2)).x, point.x)
    assert mine.sample(swept, "explicit", 1.0, 5, ignore)() == (1.0, 3) and mine.stops[3:5] == [(1.0, 0), (1.0, 3)]


def test_fresh_trajectories_belong_to_their_dataset_and_rule(swept):
    mine = a_shelf(swept)
    mine.choose("human", "explicit")
    keep = mine.sample(swept, "explicit", 0.7, 3, ignore)
    mine.choose("human", "smoothed")  # while it is drawn
    assert keep() is None and mine.stops == [(0.0, 0), (0.5, 0)]
    mine.choose("human", "explicit")
    assert mine.stops[2] == (0.7, 1)


def test_a_view_is_what_lies_at_its_stop(swept):
    mine = a_shelf(swept, calibrated={"explicit": 0.9})
    mine.choose("human", "explicit")
    view = mine.view((1.0, 0), "appendix_b", 3)
    assert (view.label, view.rule, view.lam) == ("stand-in pen-human", "explicit", 1.0)
    assert (view.estimator, view.picked) == ("appendix_b", 3)
    assert view.points is mine.points and view.here is mine.points[1.0] and (view.limit, view.calibrated) == (2.0, 0.9)
    assert view.on_policy == swept.on_policy and view.floor == swept.floor
