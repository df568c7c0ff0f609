"""What the slider's stops are taken from in runs/, what is said and offered where something is missing, and what is made."""

import contextlib
import copy
import threading

import numpy as np
import pytest
import torch
from conftest import cut, kept
from small_study import LAMS, SWEEPS, a_lab, another_model, counted, nothing_fails_unseen, parts, plain, swept, the_lab

from pgdlib.lab import artifacts, minari_files, study
from pgdlib.lab.explorer import stops, widgets

__all__ = ["nothing_fails_unseen", "swept"]  # fixtures
ALL = [(lam, 0) for lam in (0.0, *LAMS)]
HALF = ("2 of 4 λ of this sweep are computed.", "Compute the rest")


def some(lab, **how):
    return stops.Stops(lab, SWEEPS, **how)


def ignore(*_):
    """A report that nobody reads."""


def cancel_at(word, heard=None):
    """A report that ends the work where it hears the word."""

    def report(share, text=""):
        if heard is not None:
            heard.append((share, text))
        if word in text:
            raise widgets.Cancelled

    return report


def test_nothing_in_runs(runs):
    mine = some(the_lab())
    text, button = mine.choose("human", "explicit")
    assert text == "There is no sweep of the explicit rule on stand-in pen-human yet." and button == "Compute it"
    assert (mine.sweep, mine.all, mine.first, kept(runs)) == (None, [], None, [])


def test_a_whole_sweep(swept):
    mine = some(swept)
    assert mine.choose("human", "explicit") == ("", "")
    sweep = mine.sweep
    assert list(sweep.points) == [0.0, *LAMS] and mine.all == ALL
    for lam, point in sweep.points.items():
        assert torch.equal(point.x, swept.draw("explicit", lam)[0]) and mine.view((lam, 0), "normalised").here is point
    assert sweep.frame["lam"].tolist() == [0.0, *LAMS] and sweep.limit == 2.0
    mean = [sweep.points[lam].measures["log_likelihood"].mean() for lam in (0.5, 1.0)]
    assert mean[0] < swept.on_policy < mean[1]
    assert sweep.calibrated == pytest.approx(np.interp(swept.on_policy, mean, [0.5, 1.0])) and mine.first == (1.0, 0)
    mine.choose("human", "smoothed")
    mine.choose("human", "explicit")
    assert mine.sweep is sweep  # so its pictures are still there


def test_what_is_given_counts_for_the_first_study_alone(swept, monkeypatch):
    mine = some(swept, calibrated={"explicit": 0.9, "smoothed": 3.0})
    mine.choose("human", "explicit")
    assert mine.sweep.calibrated == 0.9 and mine.first == (1.0, 0)
    mine.choose("human", "smoothed")
    assert mine.sweep.calibrated == 3.0 and mine.sweep.limit is None and mine.all == [(0.0, 0), (0.5, 0)]
    other = a_lab(dataset="expert")
    monkeypatch.setattr(study, "GRIDS", {"explicit": [0.25]})
    monkeypatch.setattr(study.Study, "open", lambda p, *_, **__: other)
    other.sweep("explicit", [0.25], plain)
    assert mine.choose("expert", "explicit") == ("", "")
    assert list(mine.sweep.points) == [0.0, 0.25] and mine.sweep.calibrated is None


@pytest.mark.parametrize("name", ["diffusion model", "guide", "trajectories"])
def test_a_sweep_of_something_else_is_stale(runs, name):
    other_guide = copy.deepcopy(the_lab().policy)
    other_guide.log_std += 0.1
    changed = {
        "diffusion model": another_model,
        "guide": lambda: a_lab(policy=other_guide),
        "trajectories": lambda: a_lab(samples=4),
    }[name]()
    changed.sweep("explicit", LAMS, plain)
    text, button = some(the_lab()).choose("human", "explicit")
    assert text == f"The sweep in runs/ is stale: it was made with another {name}." and button == "Compute it anew"


@pytest.mark.usefixtures("runs")
def test_half_a_sweep_is_shown_and_the_rest_made_as_far_as_it_is_not_cancelled(monkeypatch):
    lab, reports = the_lab(), []
    mine = some(lab)
    lab.point("explicit", 1.0)
    assert mine.choose("human", "explicit") == ("1 of 4 λ of this sweep are computed.", "Compute the rest")
    assert mine.sweep is None and mine.all == []  # without its zero it is not shown
    lab.point("explicit", 0.0)
    assert mine.choose("human", "explicit") == HALF and mine.all == [(0.0, 0), (1.0, 0)]
    drawn = counted(monkeypatch, lab)
    with pytest.raises(widgets.Cancelled):
        mine.compute("human", "explicit", cancel_at("2 of 2"))
    assert mine.choose("human", "explicit")[0] == "3 of 4 λ of this sweep are computed."
    mine.compute("human", "explicit", cancel_at("nowhere", reports))
    assert drawn == [0.5, 2.5, 2.5] and mine.choose("human", "explicit") == ("", "") and mine.all == ALL
    shares, texts = zip(*reports)
    assert list(shares) == sorted(shares) and (shares[0], shares[-1]) == (1 / 7, 1.0)  # 7 evaluations
    assert set(texts) == {"λ = 2.5, 1 of 1"}


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_a_damaged_point_is_made_again_when_told_to(swept, runs, monkeypatch, lam):
    (path,) = runs.glob(f"*/*explicit*/*-{lam!r}.safetensors")
    cut(path)
    mine, drawn = some(swept), []
    with monkeypatch.context() as patch:
        patch.setattr(swept, "judge", lambda *_: drawn.append(lam))  # nothing is made for who only looks
        text = mine.choose("human", "explicit")
    assert text == ("3 of 4 λ of this sweep are computed.", "Compute the rest")
    assert drawn == [] and [stop for stop, _ in mine.all] == ([] if lam == 0.0 else [0.0, 0.5, 2.5])
    drawn = counted(monkeypatch, swept)
    mine.compute("human", "explicit", ignore)
    assert drawn == [lam] and mine.choose("human", "explicit") == ("", "")
    assert artifacts.load(path)[1]["lam"] == lam and sum(name.endswith(".damaged") for name in kept(runs)) == 1


# Other datasets


def test_another_dataset_is_made_only_when_told_to(swept, runs, monkeypatch):
    monkeypatch.setattr(study, "GRIDS", {"explicit": [0.5]})
    mine, before, heard = some(swept), kept(runs), []
    text = "expert is not ready yet: collecting the stand-in expert comes first, then the sweep."
    assert mine.choose("expert", "explicit") == (text, "Compute")
    assert kept(runs) == before and mine.sweep is None
    with pytest.raises(widgets.Cancelled):
        mine.compute("expert", "explicit", cancel_at("training", heard))
    text = "expert is not ready yet: training the denoiser on stand-in pen-expert comes first, then the sweep."
    assert mine.choose("expert", "explicit") == (text, "Compute")
    mine.compute("expert", "explicit", cancel_at("nowhere", heard))
    assert mine.choose("expert", "explicit") == ("", "") and list(mine.sweep.points) == [0.0, 0.5]
    assert mine.sweep.label == "stand-in pen-expert" and mine.sweep.limit == 2.0
    assert sorted({text for _, text in heard}) == [
        "collecting the stand-in expert",
        "training the denoiser on stand-in pen-expert",
        "λ = 0, 1 of 2",
        "λ = 0.5, 2 of 2",
    ]
    assert mine.choose("human", "explicit") == ("", "") and list(mine.sweep.points) == [0.0, *LAMS]


@pytest.mark.parametrize("error", [ValueError("horizon=8 is not allowed."), FileNotFoundError("no such"), PermissionError(13)])
def test_what_cannot_be_opened_is_told(swept, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(study.Study, "open", fail)
    mine = some(swept)
    text, button = mine.choose("expert", "explicit")
    assert text == f"expert is not ready yet: {str(error).rstrip('.')}." and button == "Compute" and mine.all == []


@pytest.mark.usefixtures("runs")
def test_d4rl_is_not_downloaded_for_who_only_looks(monkeypatch):
    dataset = copy.copy(parts()[0])
    dataset.is_public, asked = True, []

    def find(name, download=True, hint=""):
        asked.append((name, download))
        raise FileNotFoundError("it is not on disk")

    monkeypatch.setattr(minari_files, "find", find)
    mine = stops.Stops(a_lab(dataset, source="auto"))
    assert mine.choose("cloned", "explicit") == ("cloned is not ready yet: it is not on disk.", "Compute")
    assert asked == [("D4RL/pen/cloned-v2", False)]
    with pytest.raises(FileNotFoundError):
        mine.compute("cloned", "explicit", ignore)
    assert asked[1:] == [("D4RL/pen/cloned-v2", True)]


def test_who_looks_does_not_wait_for_what_is_being_made(swept, runs, monkeypatch):
    """What is being made is locked, so opening it would wait for its end."""
    making, go_on, mine, seen = threading.Event(), threading.Event(), some(swept), []

    def make(p, progress, say):
        with artifacts.lock(runs / "expert"):
            making.set()
            assert go_on.wait(10)
            raise ValueError("it fails")

    def compute():
        with contextlib.suppress(ValueError):
            mine.compute("expert", "explicit", ignore)

    monkeypatch.setattr(study.Study, "open", make)
    thread, looker = (
        threading.Thread(target=work, daemon=True) for work in (compute, lambda: seen.append(mine.choose("expert", "explicit")))
    )
    thread.start()
    making.wait(10)
    looker.start()
    looker.join(2)
    assert seen == [("expert is not ready yet: its data and its denoiser are being made.", "Compute")]
    go_on.set()
    thread.join(10)
    assert mine.choose("expert", "explicit")[0] == "expert is not ready yet: it fails."


# Fresh trajectories


def test_fresh_stops_stand_between_the_others(swept, runs, monkeypatch):
    monkeypatch.setattr(stops, "FRESH", 5)
    mine, shares = some(swept), []
    mine.choose("human", "explicit")
    before, sweep = kept(runs), mine.sweep
    assert mine.sample(swept, "explicit", 0.7, lambda share, text="": shares.append(share)) == ((0.7, 1), 5)
    assert mine.all == [(0.0, 0), (0.5, 0), (0.7, 1), (1.0, 0), (2.5, 0)]
    first = mine.view((0.7, 1), "normalised").here
    assert len(first.x) == 5 and mine.sweep is sweep and kept(runs) == before
    assert shares == sorted(shares) and shares[-1] == 1.0
    values, counts = swept.judge(first.x)
    assert counts == first.counts
    np.testing.assert_array_equal(values["log_likelihood"], first.measures["log_likelihood"])
    assert mine.sample(swept, "explicit", 0.7, ignore)[0] == (0.7, 2)
    assert mine.all == [(0.0, 0), (0.5, 0), (0.7, 2), (1.0, 0), (2.5, 0)]  # the newest alone
    assert not torch.equal(mine.view((0.7, 2), "normalised").here.x, first.x)
    assert mine.sample(swept, "explicit", 1.0, ignore)[0] == (1.0, 3) and mine.all[3:5] == [(1.0, 0), (1.0, 3)]
    mine.choose("human", "smoothed")
    mine.sample(swept, "explicit", 0.2, ignore)  # ends after one has left
    assert mine.all == [(0.0, 0), (0.5, 0)]
    mine.choose("human", "explicit")
    assert mine.all[1] == (0.2, 4) and mine.sweep is sweep


def test_a_view_is_what_lies_at_its_stop(swept):
    mine = some(swept, calibrated={"explicit": 0.9})
    mine.choose("human", "explicit")
    view, sweep = mine.view((1.0, 0), "appendix_b", 3), mine.sweep
    assert (view.lam, view.estimator, view.picked) == (1.0, "appendix_b", 3)
    assert view.sweep is sweep and view.here is sweep.points[1.0]
    assert (sweep.label, sweep.rule, sweep.limit, sweep.calibrated) == ("stand-in pen-human", "explicit", 2.0, 0.9)
    assert sweep.on_policy == swept.on_policy and sweep.floor == swept.floor
    assert view == mine.view((1.0, 0), "appendix_b", 3) != mine.view((1.0, 0), "appendix_b", 2)
