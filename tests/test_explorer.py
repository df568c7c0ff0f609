"""The λ explorer without a frontend: traits are set and buttons clicked as one would, and what is shown is looked at."""

import io
import re
import threading
import time

import numpy as np
import pytest
from conftest import cut, kept
from PIL import Image
from test_shelf import LAMS, SMOOTHED, SWEEPS, Recalling, a_lab, counted, put_sweep, the_lab

from pgdlib.lab import study
from pgdlib.lab.explorer import explorer, plots_explorer, widgets

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(autouse=True)
def nothing_fails_unseen(tmp_path, monkeypatch, caplog, runs):
    """ipywidgets only logs what callbacks raise; MuJoCo logs its warnings in the working folder. No thread is left."""
    monkeypatch.chdir(tmp_path)
    before = set(threading.enumerate())
    yield
    assert not [r.getMessage() for r in caplog.get_records("call") if "Exception in callback" in r.getMessage()]
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith("film"):  # whose thread lives as long as the process
            thread.join(10)
            assert not thread.is_alive()


def words(name, view):
    """What a picture would show."""
    shown = view.label, view.rule, list(view.points), view.lam, view.estimator, view.picked, view.calibrated, view.limit
    return f"{name}: {shown}, {float(view.here.x.sum())}".encode()


@pytest.fixture
def sketched(monkeypatch):
    """Pictures that are words."""
    monkeypatch.setattr(plots_explorer, "cloud", lambda view: words("cloud", view))
    monkeypatch.setattr(plots_explorer, "curve", lambda view, frame: words(f"curve of {frame['lam'].tolist()}", view))
    monkeypatch.setattr(widgets, "png", lambda picture: picture)


@pytest.fixture
def panel(runs, monkeypatch):
    """An explorer over two sweeps."""
    monkeypatch.setattr(widgets, "live", lambda: False)
    return explorer.Explorer(put_sweep(runs), SWEEPS, {"explicit": 0.9})


def a_panel(lab=None):
    return explorer.Explorer(lab or the_lab(), SWEEPS)


def shows(panel, lam):
    """Whether all that is shown is of this λ of the explicit sweep."""
    view = panel.view
    assert view.lam == lam and (panel.stop[1] or view.here is view.points[lam])
    mean = f"{view.here.measures['log_likelihood'].mean():.3g} ["
    same = panel._cloud.value == words("cloud", view) and panel._curve.value == words(f"curve of {[0.0, *LAMS]}", view)
    return same and mean in panel._numbers.value and panel._number.value == lam


def says(panel, text, button):
    """Whether the panel says so and offers that."""
    offered = panel._compute.description if panel._compute.layout.display == "" else ""
    return (panel._message.value, offered) == (f"<b>{text}</b>" if text else "", button)


def is_empty(panel):
    """Whether nothing is shown and nothing can be sampled."""
    return panel.stop is None and panel._box.layout.display == "none" and panel._now.disabled and panel._number.disabled


def is_full(panel):
    """Whether the whole explicit sweep is shown."""
    assert panel.shelf.stops == [(lam, 0) for lam in (0.0, *LAMS)]
    enabled = not (panel._slider.disabled or panel._now.disabled or panel._number.disabled)
    return says(panel, "", "") and enabled and panel._box.layout.display == "" and shows(panel, panel.stop[0])


# What is shown


def test_the_slider_moves_both_pictures_and_the_numbers(panel):
    lab, seen = the_lab(), set()
    points = lab.sweep("explicit", LAMS, lambda x, **_: x)
    assert panel.stop == (1.0, 0)  # nearest to the calibrated one
    for place, lam in ((1, 0.5), (3, 2.5)):
        panel._slider.value = place
        view = plots_explorer.View(
            lab.dataset.label, "explicit", points, lam, points[lam], lab.on_policy, lab.floor, limit=2.0, calibrated=0.9
        )
        assert bytes(panel._cloud.value) == widgets.png(plots_explorer.cloud(view))
        assert bytes(panel._curve.value) == widgets.png(plots_explorer.curve(view))
        assert plots_explorer.numbers(view).to_html(border=0) in panel._numbers.value
        seen |= {bytes(panel._cloud.value), bytes(panel._curve.value), panel._numbers.value}
        assert panel._slider.label == f"{lam:.3g}" and panel._number.value == lam
    assert len(seen) == 6


@pytest.mark.usefixtures("sketched")
def test_the_error_is_chosen(panel):
    for estimator in ("appendix_b", "normalised"):
        panel._estimator.value = estimator
        assert panel.view.estimator == estimator and shows(panel, 1.0)


def marks(panel):
    """What is marked under the slider, and where in percent from the left."""
    pattern = r"(left|right):([\d.]+)%[^>]*>(?:▲ )?(\w+ [\d.]+)(?: ▲)?<"
    return {
        name: float(place) if side == "left" else round(100 - float(place), 1)
        for side, place, name in re.findall(pattern, panel._marks.value)
    }


@pytest.mark.usefixtures("sketched")
def test_the_calibrated_weight_and_the_limit_are_marked(panel):
    assert marks(panel) == {"calibrated 0.9": 60.0, "limit 2": 88.9}  # at 1.8 and 2 + 2/3 of three steps
    panel._rule.value = "smoothed"
    assert marks(panel) == {}  # of no limit; and it never meets the guide's likelihood
    panel._rule.value, panel._number.value = "explicit", 0.7
    panel._now.click()
    assert panel._job.wait(30) and marks(panel) == {"calibrated 0.9": 66.7, "limit 2": 91.7}  # one more step before


@pytest.mark.usefixtures("sketched")
def test_a_panel_draws_no_more_than_is_looked_at(panel, monkeypatch):
    drawn, cloud = [], plots_explorer.cloud
    monkeypatch.setattr(plots_explorer, "cloud", lambda view: drawn.append(view.lam) or cloud(view))
    for place in (0, 3, 0, 2, 3):
        panel._slider.value = place
    assert drawn == [0.0, 2.5]  # λ = 1 was there before
    monkeypatch.setattr(widgets, "live", lambda: True)
    panel._slider.value = 0
    end = time.monotonic() + 10
    while len(drawn) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    assert drawn == [0.0, 2.5, 0.5]
    for place in (1, 2, 3):
        panel._slider.value = place
        assert shows(panel, [0.0, *LAMS][place])
    assert len(drawn) == 3


@pytest.mark.usefixtures("sketched")
def test_nothing_is_mixed_up_however_fast_one_clicks(panel, monkeypatch):
    """While pictures are drawn ahead, and a job's end chooses anew in its thread."""
    monkeypatch.setattr(widgets, "live", lambda: True)
    cloud, done, failed = plots_explorer.cloud, threading.Event(), []
    monkeypatch.setattr(plots_explorer, "cloud", lambda view: time.sleep(0.001) or cloud(view))

    def choose():
        try:
            while not done.is_set():
                panel.choose()
                time.sleep(0.002)
        except Exception as e:
            failed.append(e)

    thread = threading.Thread(target=choose)
    thread.start()
    rng = np.random.default_rng(0)
    for i in range(60):
        with panel.lock:  # as a frontend does, that knows the newest stops
            panel._slider.value = int(rng.integers(len(panel.shelf.stops)))
        panel.redraw()
        if i % 7 == 0:
            panel._rule.value = ("explicit", "smoothed")[i % 2]
        if i % 3 == 0:
            panel.pick(int(rng.integers(6)))
        with panel.lock:
            assert panel._cloud.value == words("cloud", panel.view)
    done.set()
    thread.join()
    panel._album.draw_ahead([])
    assert not failed
    for key, (picture, _, _) in panel._album._kept.items():
        _, rule, lams, (lam, _), estimator, picked = key
        assert f"'{rule}', {list(lams)}, {lam}, '{estimator}', {picked}," in picture.decode()
    assert {key[1] for key in panel._album._kept} == {"explicit", "smoothed"}


# What is missing


@pytest.mark.usefixtures("sketched")
def test_a_missing_sweep_is_computed(runs):
    panel = a_panel()
    assert is_empty(panel) and says(panel, "There is no sweep of the explicit rule on stand-in pen-human yet.", "Compute it")
    panel._slider.value = panel._slider.value  # what can be done without a sweep does no harm
    panel._estimator.value = "appendix_b"
    panel._now.click()
    panel.pick(3)
    assert is_empty(panel) and not panel._job.busy and kept(runs) == []
    panel._compute.click()
    assert panel._job.wait(30) and is_full(panel) and panel.picked is None and len(kept(runs)) == 4


@pytest.mark.usefixtures("sketched")
def test_a_stale_sweep_is_computed_anew(runs):
    put_sweep(runs)
    lab = a_lab(denoiser=Recalling(0.9 * the_lab().denoiser.windows, the_lab().normaliser))
    before, panel = kept(runs), a_panel(lab)
    text = "The sweep in runs/ is stale: it was made with another diffusion model."
    assert is_empty(panel) and says(panel, text, "Compute it anew")
    panel._compute.click()
    assert panel._job.wait(30) and is_full(panel) and set(before) < set(kept(runs))


@pytest.mark.usefixtures("sketched")
def test_half_a_sweep_is_shown_and_the_damaged_rest_computed(runs, monkeypatch):
    lab = put_sweep(runs)
    cut(next(runs.glob("*/*explicit*/*-2.5.safetensors")))
    next(runs.glob("*/*explicit*/*-0.5.safetensors")).unlink()
    panel = a_panel(lab)
    assert panel.shelf.stops == [(0.0, 0), (1.0, 0)] and panel._box.layout.display == ""
    assert says(panel, "2 of 4 λ of this sweep are computed.", "Compute the rest")
    drawn = counted(monkeypatch, lab)
    panel._compute.click()
    assert panel._job.wait(30) and drawn == [0.5, 2.5] and is_full(panel)


@pytest.mark.usefixtures("sketched")
def test_a_cancelled_computation_goes_on_the_next_time(runs, monkeypatch):
    panel, lab = a_panel(), the_lab()
    drawn = counted(monkeypatch, lab)
    with monkeypatch.context() as patch:
        draw = lab.draw

        def cancel_the_third(rule, lam, *rest, **how):
            if lam == 1.0:
                panel._job.cancel.click()
            return draw(rule, lam, *rest, **how)

        patch.setattr(lab, "draw", cancel_the_third)
        panel._compute.click()
        assert panel._job.wait(30)
    assert panel._job.line.value == "cancelled" and len(kept(runs)) == 2
    assert says(panel, "2 of 4 λ of this sweep are computed.", "Compute the rest")
    assert panel.shelf.stops == [(0.0, 0), (0.5, 0)] and panel._box.layout.display == ""
    drawn.clear()
    panel._compute.click()
    assert panel._job.wait(30) and drawn == [1.0, 2.5] and is_full(panel)


@pytest.mark.usefixtures("sketched")
def test_another_dataset_is_made_when_told_to(panel, runs, monkeypatch):
    other, opened, before = a_lab(dataset="expert"), [], kept(runs)

    def make(p, progress, say):
        with progress(total=2, desc="collecting <it>") as bar:
            opened.append(p.dataset)
            bar.update(2)
        return other

    monkeypatch.setattr(study.Study, "open", make)
    monkeypatch.setattr(study, "GRIDS", {"explicit": [0.5]})
    panel._dataset.value = "expert"
    assert is_empty(panel) and opened == [] and kept(runs) == before and not panel._job.busy
    text = "expert is not ready yet: collecting &lt;it&gt; comes first, then the sweep."
    assert says(panel, text, "Compute")
    panel.sample()  # the study at hand is still the other one
    assert not panel._job.busy and is_empty(panel)
    panel._dataset.value = "human"
    assert is_full(panel)
    panel._dataset.value = "expert"
    panel._compute.click()
    assert panel._job.wait(30) and opened == ["expert"] and says(panel, "", "")
    assert panel.shelf.stops == [(0.0, 0), (0.5, 0)] and panel.shelf.lab is other and panel._box.layout.display == ""


@pytest.mark.usefixtures("sketched")
def test_what_ends_after_one_has_left_is_not_shown(panel, monkeypatch):
    """The computation goes on, and its sweep is there when one comes back."""
    go_on, lab = threading.Event(), the_lab()
    draw = lab.draw
    monkeypatch.setattr(lab, "draw", lambda *a, **k: go_on.wait(10) and draw(*a, **k))
    monkeypatch.setattr(study, "GRIDS", {"proximal": [0.1]})
    panel._rule.value = "proximal"
    panel._compute.click()
    panel._rule.value = "explicit"
    panel._slider.value = 0
    go_on.set()
    assert panel._job.wait(30) and is_full(panel) and panel.stop == (0.0, 0)
    panel._rule.value = "proximal"
    assert panel.shelf.stops == [(0.0, 0), (0.1, 0)] and says(panel, "", "")


# Sample now


@pytest.mark.usefixtures("sketched")
def test_sample_now_adds_a_stop_and_goes_there(panel, runs):
    before, frame = kept(runs), panel.shelf.frame
    panel.pick(3)
    panel._number.value = 0.7
    panel._now.click()
    assert panel._job.wait(30) and panel.stop == (0.7, 1) and panel.picked is None and shows(panel, 0.7)
    assert panel._slider.label == "0.7 (fresh)" and len(panel._slider.options) == 5
    assert panel.shelf.frame is frame and list(panel.view.points) == [0.0, *LAMS] and kept(runs) == before
    assert panel._job.line.value.startswith("6 fresh trajectories at λ = 0.7 in ")
    panel._slider.value = 3
    assert shows(panel, 1.0)
    panel._rule.value = "smoothed"
    assert [lam for lam, _ in panel.shelf.stops] == [0.0, *SMOOTHED]
    panel._rule.value = "explicit"
    assert panel.shelf.stops[2] == (0.7, 1)


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(panel, value):
    panel._number.value = value
    panel._now.click()
    assert not panel._job.busy and panel._job.line.value == f"λ = {value} is not allowed; it must be a number of at least 0"
    assert panel.shelf.stops == [(lam, 0) for lam in (0.0, *LAMS)] and shows(panel, 1.0) == (panel._number.value == 1.0)


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("stage", ["draw", "judge"])
def test_cancelled_sampling_leaves_nothing(panel, runs, monkeypatch, stage):
    before, lab = kept(runs), the_lab()
    work = getattr(lab, stage)
    monkeypatch.setattr(lab, stage, lambda *a, **k: panel._job.cancel.click() or work(*a, **k))
    panel._number.value = 0.7
    panel._now.click()
    assert panel._job.wait(30) and panel._job.line.value == "cancelled"
    assert panel.stop == (1.0, 0) and len(panel.shelf.stops) == 4 and kept(runs) == before


@pytest.mark.usefixtures("sketched")
def test_what_fails_is_told_and_the_next_job_runs(panel, monkeypatch):
    lab = the_lab()
    with monkeypatch.context() as patch:
        patch.setattr(lab, "draw", lambda *_, **__: {}["<x>"])
        panel._now.click()
        assert panel._job.wait(30)
    assert panel._job.line.value == "KeyError: &#x27;&lt;x&gt;&#x27;" and shows(panel, 1.0)
    panel._number.value = 1e300  # finite, but not for the guide
    panel._now.click()
    assert panel._job.wait(30) and panel._job.line.value.startswith("ValueError: lam=1e+300 is not allowed")
    panel._number.value = 0.7
    panel._now.click()
    assert panel._job.wait(30) and panel.stop[0] == 0.7


@pytest.mark.usefixtures("sketched")
def test_one_job_at_a_time(panel, monkeypatch):
    go_on, begun, lab = threading.Event(), [], the_lab()
    draw = lab.draw
    monkeypatch.setattr(lab, "draw", lambda *a, **k: begun.append(a) or (go_on.wait(10) and draw(*a, **k)))
    panel._number.value = 0.7
    panel._now.click()
    panel._now.click()
    panel._compute.click()
    panel._slider.value = 0
    assert panel._job.busy and shows(panel, 0.0)  # one can go on looking
    go_on.set()
    assert panel._job.wait(30) and len(begun) == 1 and panel.stop == (0.7, 1)


# Picking


def click(panel, x, y):
    """A click on the cloud, at pixels of the picture, as the frontend tells of it."""
    panel._clicks._handle_mouse_msg(None, {"type": "click", "dataX": x, "dataY": y}, [])


def places(panel):
    """[n, 2]: where the trajectories are in the picture of the cloud, px from its top left."""
    fig = plots_explorer.cloud(panel.view)
    fig.set_dpi(widgets.DPI)
    fig.canvas.draw()
    x, y = fig.axes[0].transData.transform([*zip(*(panel.view.here.measures[k] for k in ("log_likelihood", "normalised")))]).T
    return np.stack([x, 4.3 * widgets.DPI - y], 1)


def test_a_click_picks_the_nearest_trajectory(panel):
    panel._slider.value = 0
    at = places(panel)
    first, *_, last = np.flatnonzero(np.isfinite(at).all(1))
    assert np.hypot(*(at[first] - at[last])) > 15
    for i in (first, last):
        click(panel, *at[i] + 1.5)
        assert panel.picked == panel.view.picked == i
        image = np.asarray(Image.open(io.BytesIO(panel._cloud.value)).convert("L"), int)
        rows, columns = np.mgrid[: len(image), : image.shape[1]]
        ring = abs(np.hypot(rows - at[i, 1], columns - at[i, 0]) - 11 / 2 / 72 * widgets.DPI) < 0.8  # a marker of 11 pt
        assert np.median(image[ring]) < 60
    click(panel, 60, 10)  # above the axes, far from all
    assert panel.picked == last


@pytest.mark.usefixtures("sketched")
def test_what_is_picked_is_followed_over_one_sweep(panel):
    panel.pick(4)
    panel._slider.value = 1
    panel._estimator.value = "appendix_b"
    assert panel.picked == 4 and shows(panel, 0.5)
    panel._rule.value = "smoothed"
    assert panel.picked is None


def test_a_click_far_from_all_picks_none(panel):
    at = places(panel)
    far = max(((x, y) for x in range(100, 540, 20) for y in range(40, 420, 20)), key=lambda p: np.nanmin(np.hypot(*(at - p).T)))
    assert np.nanmin(np.hypot(*(at - far).T)) > 0.06 * 550
    click(panel, *far)
    assert panel.picked is None


def test_a_click_where_nothing_is_shown_is_nothing():
    panel = a_panel()
    click(panel, 100, 100)
    assert panel.picked is None


@pytest.mark.usefixtures("sketched")
def test_listeners_hear_of_every_other_view(panel):
    heard = []
    panel.listeners.append(lambda: heard.append((panel.stop, panel.picked)))
    panel._slider.value = 2
    panel._slider.value = 3
    panel.pick(4)
    panel.choose()
    assert heard == [((2.5, 0), None), ((2.5, 0), 4), ((1.0, 0), None)]


@pytest.mark.usefixtures("sketched")
def test_nothing_changes_under_a_listener(panel):
    other = threading.Thread(target=lambda: panel._rule.set_trait("value", "smoothed"))
    seen = []

    def listen():
        if not seen:
            other.start()
            other.join(0.2)
        seen.append((panel.shelf.rule, panel.stop))

    panel.listeners.append(listen)
    panel._slider.value = 3
    other.join(10)
    assert seen == [("explicit", (2.5, 0)), ("smoothed", (0.0, 0))]
