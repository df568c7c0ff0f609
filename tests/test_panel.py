"""The λ explorer without a front end: traits are set and buttons clicked as one would, and what is shown is looked at."""

import io
import re
import threading
import time

import numpy as np
import pytest
from conftest import kept, wait_for
from PIL import Image
from small_study import (
    LAMS,
    SMOOTHED,
    SWEEPS,
    a_lab,
    counted,
    explorer,
    finish,
    is_live,
    nothing_fails_unseen,
    sample,
    sketched,
    swept,
    the_lab,
    words,
)

from pgdlib.lab import study
from pgdlib.lab.explorer import panel, views, widgets

__all__ = ["explorer", "is_live", "nothing_fails_unseen", "sketched", "swept"]  # fixtures
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
ALL = [(lam, 0) for lam in (0.0, *LAMS)]


def an_explorer(lab=None):
    return panel.Explorer(lab or the_lab(), SWEEPS)


def made(runs):
    """How many points are in runs/."""
    return len([*runs.glob("*/*explicit*/[!.]*.safetensors")])


def shows(explorer, lam):
    """Whether all that is shown is of this λ of the explicit sweep."""
    view = explorer.view
    assert view.lam == lam and (explorer.stop[1] or view.here is view.sweep.points[lam])
    mean = f"{view.here.measures['log_likelihood'].mean():.3g} ["
    same = explorer._cloud.value == words("cloud", view) and explorer._curve.value == words("curve", view)
    return same and mean in explorer._numbers.value and explorer._number.value == lam


def says(explorer, text, button):
    """Whether the explorer says so and offers that."""
    offered = explorer._compute.description if explorer._compute.layout.display == "" else ""
    return (explorer._message.value, offered) == (f"<b>{text}</b>" if text else "", button)


def is_empty(explorer):
    """Whether nothing is shown and nothing can be sampled."""
    return explorer.stop is None and explorer._box.layout.display == "none" and explorer._now.disabled


def is_full(explorer):
    """Whether the whole explicit sweep is shown."""
    assert explorer.stops.all == ALL
    enabled = not (explorer._slider.disabled or explorer._now.disabled or explorer._number.disabled)
    return says(explorer, "", "") and enabled and explorer._box.layout.display == "" and shows(explorer, explorer.stop[0])


# What is shown


def test_the_slider_moves_both_pictures_and_the_numbers(explorer):
    seen, stops = set(), explorer.stops
    assert explorer.stop == (1.0, 0)  # nearest to the calibrated one
    for place, lam in ((1, 0.5), (3, 2.5)):
        explorer._slider.value = place
        view = views.View(stops.sweep, (lam, 0), stops.sweep.points[lam])
        assert bytes(explorer._cloud.value) == widgets.png(views.cloud(view))
        assert bytes(explorer._curve.value) == widgets.png(views.curve(view))
        assert views.numbers(view).to_html(border=0) in explorer._numbers.value
        seen |= {bytes(explorer._cloud.value), bytes(explorer._curve.value), explorer._numbers.value}
        assert explorer._slider.label == f"{lam:.3g}" and explorer._number.value == lam
    assert len(seen) == 6


@pytest.mark.usefixtures("sketched")
def test_the_error_is_chosen(explorer):
    for estimator in ("appendix_b", "normalised"):
        explorer._estimator.value = estimator
        assert explorer.view.estimator == estimator and shows(explorer, 1.0)


def marks(explorer):
    """What is marked under the slider, and where in percent from the left."""
    pattern = r"(left|right):([\d.]+)%[^>]*>(?:▲ )?(\w+ [\d.]+)(?: ▲)?<"
    return {
        name: float(place) if side == "left" else round(100 - float(place), 1)
        for side, place, name in re.findall(pattern, explorer._marks.value)
    }


@pytest.mark.usefixtures("sketched")
def test_the_calibrated_weight_and_the_limit_are_marked(explorer):
    assert marks(explorer) == {"calibrated 0.9": 60.0, "limit 2": 88.9}  # at 1.8 and 2 + 2/3 of three steps
    explorer._rule.value = "smoothed"
    assert marks(explorer) == {}  # of no limit; and it never meets the guide's likelihood
    explorer._rule.value = "explicit"
    sample(explorer, 0.7)
    assert marks(explorer) == {"calibrated 0.9": 66.7, "limit 2": 91.7}  # one more step before


@pytest.mark.usefixtures("sketched")
def test_a_panel_draws_no_more_than_is_looked_at(explorer, monkeypatch):
    drawn, cloud = [], views.cloud
    monkeypatch.setattr(views, "cloud", lambda view: drawn.append(view.lam) or cloud(view))
    for place in (0, 3, 0, 2, 3):
        explorer._slider.value = place
    assert drawn == [0.0, 2.5]  # λ = 1 was there before
    monkeypatch.setattr(widgets, "live", lambda: True)
    explorer._slider.value = 0
    wait_for(lambda: len(drawn) == 3)
    assert drawn == [0.0, 2.5, 0.5]
    for place in (1, 2, 3):
        explorer._slider.value = place
        assert shows(explorer, [0.0, *LAMS][place])
    assert len(drawn) == 3


@pytest.mark.usefixtures("sketched", "is_live")
def test_nothing_is_mixed_up_however_fast_one_clicks(explorer, monkeypatch):
    """While pictures are drawn ahead, and a job's end chooses anew in its thread."""
    cloud, done, failed = views.cloud, threading.Event(), []
    monkeypatch.setattr(views, "cloud", lambda view: time.sleep(0.001) or cloud(view))

    def choose():
        try:
            while not done.is_set():
                explorer.choose()
                time.sleep(0.002)
        except Exception as e:
            failed.append(e)

    thread = threading.Thread(target=choose)
    thread.start()
    rng = np.random.default_rng(0)
    for i in range(60):
        with explorer.lock:  # as a front end does, that knows the newest stops
            explorer._slider.value = int(rng.integers(len(explorer.stops.all)))
        explorer.redraw()
        if i % 7 == 0:
            explorer._rule.value = ("explicit", "smoothed")[i % 2]
        if i % 3 == 0:
            explorer.pick(int(rng.integers(6)))
        with explorer.lock:
            assert explorer._cloud.value == words("cloud", explorer.view)
    done.set()
    thread.join()
    explorer._album.draw_ahead([])
    assert not failed
    assert all(picture == words("cloud", view) for view, (picture, _, _) in explorer._album._kept.items())
    assert {view.sweep.rule for view in explorer._album._kept} == {"explicit", "smoothed"}


# What is missing


@pytest.mark.usefixtures("sketched")
def test_a_missing_sweep_is_computed(runs):
    explorer = an_explorer()
    assert is_empty(explorer) and says(
        explorer, "There is no sweep of the explicit rule on stand-in pen-human yet.", "Compute it"
    )
    explorer._slider.value = explorer._slider.value  # what can be done without a sweep does no harm
    explorer._estimator.value = "appendix_b"
    explorer._now.click()
    explorer.pick(3)
    click(explorer, 100, 100)
    assert is_empty(explorer) and not explorer._job.busy and kept(runs) == []
    explorer._compute.click()
    finish(explorer)
    assert is_full(explorer) and explorer.picked is None and made(runs) == 4


@pytest.mark.usefixtures("sketched")
def test_a_cancelled_computation_goes_on_the_next_time(runs, monkeypatch):
    explorer, lab = an_explorer(), the_lab()
    drawn = counted(monkeypatch, lab)
    with monkeypatch.context() as patch:
        draw = lab.draw

        def cancel_the_third(rule, lam, *rest, **how):
            if lam == 1.0:
                explorer._job.cancel.click()
            return draw(rule, lam, *rest, **how)

        patch.setattr(lab, "draw", cancel_the_third)
        explorer._compute.click()
        finish(explorer)
    assert explorer._job.line.value == "cancelled" and made(runs) == 2
    assert says(explorer, "2 of 4 λ of this sweep are computed.", "Compute the rest")
    assert explorer.stops.all == [(0.0, 0), (0.5, 0)] and explorer._box.layout.display == ""
    drawn.clear()
    explorer._compute.click()
    finish(explorer)
    assert drawn == [1.0, 2.5] and is_full(explorer)


@pytest.mark.usefixtures("sketched")
def test_another_dataset_is_made_when_told_to(explorer, runs, monkeypatch):
    other, opened, before = a_lab(dataset="expert"), [], kept(runs)

    def make(p, progress, say):
        with progress(total=2, desc="collecting <it>") as bar:
            opened.append(p.dataset)
            bar.update(2)
        return other

    monkeypatch.setattr(study.Study, "open", make)
    monkeypatch.setattr(study, "GRIDS", {"explicit": [0.5]})
    explorer._dataset.value = "expert"
    assert is_empty(explorer) and opened == [] and kept(runs) == before and not explorer._job.busy
    text = "expert is not ready yet: collecting &lt;it&gt; comes first, then the sweep."
    assert says(explorer, text, "Compute")
    explorer.sample()  # the study at hand is still the other one
    assert not explorer._job.busy and is_empty(explorer)
    explorer._dataset.value = "human"
    assert is_full(explorer)
    explorer._dataset.value = "expert"
    explorer._compute.click()
    finish(explorer)
    assert opened == ["expert"] and says(explorer, "", "")
    assert explorer.stops.all == [(0.0, 0), (0.5, 0)] and explorer.stops.lab is other and explorer._box.layout.display == ""


@pytest.mark.usefixtures("sketched")
def test_what_ends_after_one_has_left_is_not_shown(explorer, monkeypatch):
    """The computation goes on, and its sweep is there when one comes back."""
    go_on, lab = threading.Event(), the_lab()
    draw = lab.draw
    monkeypatch.setattr(lab, "draw", lambda *a, **k: go_on.wait(10) and draw(*a, **k))
    monkeypatch.setattr(study, "GRIDS", {"proximal": [0.1]})
    explorer._rule.value = "proximal"
    explorer._compute.click()
    explorer._rule.value = "explicit"
    explorer._slider.value = 0
    go_on.set()
    finish(explorer)
    assert is_full(explorer) and explorer.stop == (0.0, 0)
    explorer._rule.value = "proximal"
    assert explorer.stops.all == [(0.0, 0), (0.1, 0)] and says(explorer, "", "")


# Sample now


@pytest.mark.usefixtures("sketched")
def test_sample_now_adds_a_stop_and_goes_there(explorer, runs):
    before, sweep = kept(runs), explorer.stops.sweep
    explorer.pick(3)
    sample(explorer, 0.7)
    assert explorer.stop == (0.7, 1) and explorer.picked is None and shows(explorer, 0.7)
    assert explorer._slider.label == "0.7 (fresh)" and len(explorer._slider.options) == 5
    assert explorer.view.sweep is sweep and kept(runs) == before
    assert explorer._job.line.value.startswith("6 fresh trajectories at λ = 0.7 in ")
    explorer._slider.value = 3
    assert shows(explorer, 1.0)
    explorer._rule.value = "smoothed"
    assert [lam for lam, _ in explorer.stops.all] == [0.0, *SMOOTHED]
    explorer._rule.value = "explicit"
    assert explorer.stops.all[2] == (0.7, 1)


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(explorer, value):
    explorer._number.value = value
    explorer._now.click()
    assert (
        not explorer._job.busy and explorer._job.line.value == f"λ = {value} is not allowed; it must be a number of at least 0"
    )
    assert explorer.stops.all == ALL and shows(explorer, 1.0) == (explorer._number.value == 1.0)


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("stage", ["draw", "judge"])
def test_cancelled_sampling_leaves_nothing(explorer, runs, monkeypatch, stage):
    before, lab = kept(runs), the_lab()
    work = getattr(lab, stage)
    monkeypatch.setattr(lab, stage, lambda *a, **k: explorer._job.cancel.click() or work(*a, **k))
    sample(explorer, 0.7)
    assert explorer._job.line.value == "cancelled"
    assert explorer.stop == (1.0, 0) and len(explorer.stops.all) == 4 and kept(runs) == before


@pytest.mark.usefixtures("sketched")
def test_what_fails_is_told_and_the_next_job_runs(explorer, monkeypatch):
    lab = the_lab()
    with monkeypatch.context() as patch:
        patch.setattr(lab, "draw", lambda *_, **__: {}["<x>"])
        explorer._now.click()
        finish(explorer)
    assert explorer._job.line.value == "KeyError: &#x27;&lt;x&gt;&#x27;" and shows(explorer, 1.0)
    sample(explorer, 1e300)  # finite, but not for the guide
    assert explorer._job.line.value.startswith("ValueError: lam=1e+300 is not allowed")
    sample(explorer, 0.7)
    assert explorer.stop[0] == 0.7


@pytest.mark.usefixtures("sketched")
def test_one_job_at_a_time(explorer, monkeypatch):
    go_on, begun, lab = threading.Event(), [], the_lab()
    draw = lab.draw
    monkeypatch.setattr(lab, "draw", lambda *a, **k: begun.append(a) or (go_on.wait(10) and draw(*a, **k)))
    explorer._number.value = 0.7
    explorer._now.click()
    explorer._now.click()
    explorer._compute.click()
    explorer._slider.value = 0
    assert explorer._job.busy and shows(explorer, 0.0)  # one can go on looking
    go_on.set()
    finish(explorer)
    assert len(begun) == 1 and explorer.stop == (0.7, 1)


# Picking


def click(explorer, x, y):
    """A click on the cloud, at pixels of the picture, as the frontend tells of it."""
    explorer._clicks._handle_mouse_msg(None, {"type": "click", "dataX": x, "dataY": y}, [])


def places(explorer):
    """[n, 2]: where the trajectories are in the picture of the cloud, px from its top left."""
    fig = views.cloud(explorer.view)
    fig.set_dpi(widgets.DPI)
    fig.canvas.draw()
    x, y = (
        fig.axes[0].transData.transform([*zip(*(explorer.view.here.measures[k] for k in ("log_likelihood", "normalised")))]).T
    )
    return np.stack([x, 4.3 * widgets.DPI - y], 1)


def test_a_click_picks_the_nearest_trajectory(explorer):
    explorer._slider.value = 0
    at = places(explorer)
    first, *_, last = np.flatnonzero(np.isfinite(at).all(1))
    assert np.hypot(*(at[first] - at[last])) > 15
    for i in (first, last):
        click(explorer, *at[i] + 1.5)
        assert explorer.picked == explorer.view.picked == i
        image = np.asarray(Image.open(io.BytesIO(explorer._cloud.value)).convert("L"), int)
        rows, columns = np.mgrid[: len(image), : image.shape[1]]
        ring = abs(np.hypot(rows - at[i, 1], columns - at[i, 0]) - 11 / 2 / 72 * widgets.DPI) < 0.8  # a marker of 11 pt
        assert np.median(image[ring]) < 60
    click(explorer, 60, 10)  # above the axes, far from all
    assert explorer.picked == last


@pytest.mark.usefixtures("sketched")
def test_who_follows_hears_of_every_other_view_and_nothing_changes_meanwhile(explorer):
    other = threading.Thread(target=lambda: explorer._rule.set_trait("value", "smoothed"))
    heard = []

    def follow():
        if len(heard) == 1:
            other.start()
            other.join(0.2)
        heard.append((explorer.stops.rule, explorer.stop, explorer.picked))

    explorer.follow = follow
    explorer._slider.value = 3
    explorer.pick(4)
    other.join(10)
    explorer.choose()
    assert heard[:2] == [("explicit", (2.5, 0), None), ("explicit", (2.5, 0), 4)]
    assert heard[2:] == [("smoothed", (0.0, 0), None)] * 2
