"""What the widgets show holds the numbers it is made of: each point, each mean, each step, and the words around them."""

import io
import math
import re
import threading
from dataclasses import replace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import TITLE, line, texts
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from pgdlib import measures
from pgdlib.lab import study, tasks
from pgdlib.lab.explorer.views import Sweep, View, cloud, curve, denoising, message, nearest, numbers, panel
from pgdlib.lab.figures.style import DATA, GUIDED, MODEL

pytestmark = pytest.mark.filterwarnings("error")
LAMS = (0.0, 0.1, 0.5, 1.0, 2.0)
MEASURES = ("log_likelihood", "density", "normalised", "motion", "reconstructed", "appendix_b")
FLOOR = {"normalised": 0.02, "appendix_b": 0.3}


@pytest.fixture(autouse=True)
def nothing_left_open(style):
    """Nothing goes through pyplot; seen before `style` closes what did."""
    before = plt.get_fignums()
    yield
    assert plt.get_fignums() == before


def read_only(arrays):
    """The arrays, which no view can change from now on."""
    for array in arrays:
        array.flags.writeable = False
    return arrays


def point(lam=0.0, n=30, seed=0, **measures):
    """A likelihood and an error that rise with λ; `measures` replaces some, whole or by {trajectory: value}."""
    rng = np.random.default_rng([seed, round(1000 * lam)])
    own = {name: np.exp(rng.normal(-2 + lam / 2, 0.5, n)) for name in MEASURES}
    own |= {"log_likelihood": rng.normal(-1.5 + lam / (lam + 0.3), 0.2, n), "appendix_b": 10 * own["appendix_b"]}
    for name, values in measures.items():
        if isinstance(values, dict):
            own[name][list(values)] = list(values.values())
        else:
            own[name] = np.full(n, values, dtype=float)
    read_only(own.values())
    unjudged = int(np.isnan(own["normalised"]).sum())
    return study.Point(torch.zeros(n, 2, 71), own, {"diverged": 0, "unjudged": unjudged})


def collapsed(lam=2.0, n=30):
    """What is left of a sweep past its threshold: half of it without an error, the others with a large one."""
    errors = dict(enumerate(np.where(np.arange(n) < n // 2, math.nan, 1e5)))
    found = point(lam, n, log_likelihood=-4000.0, normalised=errors, appendix_b=errors)
    found.counts["diverged"] = n
    return found


def a_view(lam=0.5, points=None, here=None, estimator="normalised", picked=None, **changes):
    """A view of the sweep `points` at λ; of fresh trajectories, where they are given as `here`."""
    points = {lam: point(lam) for lam in LAMS} if points is None else points
    own = dict(label="stand-in pen-toy", rule="explicit", on_policy=-0.6, floor=FLOOR)
    sweep = Sweep(points=points, frame=study.summary(points), **own | changes)
    return View(sweep, (lam, 0 if here is None else 1), points[lam] if here is None else here, estimator, picked)


def made(show, *arguments):
    """The figure that a function makes; what cannot be drawn fails here."""
    fig = show(*arguments)
    assert isinstance(fig, Figure)
    FigureCanvasAgg(fig).draw()
    return fig


def of(values, estimator="normalised"):
    """[n, 2]: where a cloud has its points."""
    return np.stack([values.measures["log_likelihood"], values.measures[estimator]], -1)


# The cloud


@pytest.mark.parametrize("estimator, lam, picked", [("normalised", 0.1, 0), ("appendix_b", 2.0, 29)])
def test_a_cloud_shows_every_trajectory_of_both_weights_and_the_picked_one(estimator, lam, picked):
    view = a_view(lam, estimator=estimator, picked=picked)
    ax = cloud(view).axes[0]
    for name, values in (("λ = 0", view.sweep.points[0.0]), (f"λ = {lam:g}", view.here)):
        np.testing.assert_array_equal(line(ax, name), of(values, estimator))
    np.testing.assert_array_equal(line(ax, f"no. {picked}"), of(view.here, estimator)[[picked]])
    assert (line(ax, "floor: real data")[:, 1] == FLOOR[estimator]).all()
    assert (line(ax, "on-policy")[:, 0] == -0.6).all() and ax.get_yscale() == "log"
    names = {"λ = 0", f"λ = {lam:g}", f"no. {picked}", "floor: real data", "on-policy"}
    assert names == {t.get_text() for t in ax.get_legend().get_texts()}


@pytest.mark.parametrize("estimator", FLOOR)
def test_limits_do_not_move_with_the_weight(estimator):
    sweep = {**{lam: point(lam) for lam in LAMS}, 3.0: collapsed(3.0)}
    seen = [a_view(lam, sweep, estimator=estimator, picked=7) for lam in (0.0, 1.0, 3.0)]
    seen += [a_view(lam, sweep, here, estimator) for lam, here in ((0.3, point(0.3, 12, seed=1)), (9.0, collapsed(9.0)))]
    axes = [cloud(view).axes[0] for view in seen]
    ((low, high),), ((bottom, top),) = ({getattr(ax, f"get_{k}lim")() for ax in axes} for k in "xy")
    sane = [v for lam, v in sweep.items() if lam < 3]
    x, y = np.concatenate([of(v, estimator) for v in sane]).T
    assert ((x > low) & (x < high)).mean() > 0.98 and ((y > bottom) & (y < top)).mean() > 0.98
    assert low > x.min() - 0.5 and high < x.max() + 0.5 and bottom > 0 and top < 3 * y.max()
    assert bottom < FLOOR[estimator] < top and low < -0.6 < high


@pytest.mark.parametrize("floor, on_policy", [(1e-6, 5.0), (1e3, -30.0)])
def test_floor_and_on_policy_are_in_view_wherever_they_are(floor, on_policy):
    ax = cloud(a_view(floor={"normalised": floor}, on_policy=on_policy)).axes[0]
    (low, high), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    assert 0 < bottom < floor < top and low < on_policy < high
    points = of(a_view().here)
    assert (points > (low, bottom)).all() and (points < (high, top)).all()


def test_the_floor_of_an_exact_ruler_is_told_and_squeezes_nothing():
    ax = cloud(a_view(floor={"normalised": 1e-14})).axes[0]
    assert ax.get_ylim()[0] > 1e-4 and "floor: real data, 1e-14" in [t.get_text() for t in ax.get_legend().get_texts()]


def test_what_lies_beyond_the_axes_is_counted():
    one = {"log_likelihood": {3: -900.0}}
    lost = point(1.0, log_likelihood={3: -900.0, 4: -900.0}, normalised={4: math.nan, 9: math.nan, 10: 1e9, 11: 1e-9})
    lost.counts["diverged"] = 2
    for view, words in (
        (a_view(), []),
        (a_view(0.0), []),
        (a_view(2.0, {0.0: point(), 2.0: collapsed()}), ["30 of 30 lie beyond the axes (30 diverged)"]),
        (a_view(1.0, here=lost), ["5 of 30 lie beyond the axes (2 diverged)"]),
        (a_view(1.0, here=point(1.0, **one)), ["1 of 30 lie beyond the axes (0 diverged)"]),
        (a_view(1.0, {lam: point(lam, 100) for lam in LAMS}, point(1.0, 100, **one)), []),  # 1%
    ):
        assert [t for t in texts(cloud(view)) if "beyond" in t] == words


def densities(fig):
    """For each weight ((x of the peak, its height in its axes), (y of the peak, its height)); None where none is drawn."""
    found = []
    for top, side in zip(fig.axes[1::2], fig.axes[2::2], strict=True):
        each = []
        for ax, i in ((top, 0), (side, 1)):
            vertices = ax.collections[0].get_paths()[0].vertices if ax.collections else None
            at = None if vertices is None else vertices[vertices[:, 1 - i].argmax()]
            each.append(None if at is None else (at[i], view_shares(ax, at)[1 - i]))
        found.append(each)
    return found


def view_shares(ax, places):
    """Where places [..., 2] are in the axes, 0 to 1."""
    return ax.transAxes.inverted().transform(ax.transData.transform(places))


def test_both_clouds_have_densities_of_one_height():
    """A thousand trajectories of λ = 0 against eighty that lie much closer together."""
    narrow = point(0.5, 80)
    narrow.measures["log_likelihood"] = -0.9 + 0.02 * np.random.default_rng(0).normal(size=80)
    view = a_view(points={0.0: point(n=1000), 0.5: narrow})
    fig = cloud(view)
    found = densities(fig)
    heights = [height for each in found for _, height in each]
    assert len(heights) == 4 and max(heights) - min(heights) < 1e-6 and 0.8 < heights[0] <= 1
    for values, ((x, _), (y, _)) in zip((view.sweep.points[0.0], narrow), found, strict=True):
        likelihood, error = of(values).T
        assert abs(x - np.median(likelihood)) < 0.5 * likelihood.std()
        assert abs(y - np.median(np.log10(error))) < 0.5 * np.log10(error).std()
    ax, tops, sides = fig.axes[0], fig.axes[1::2], fig.axes[2::2]
    assert {t.get_xlim() for t in tops} == {ax.get_xlim()}
    np.testing.assert_allclose([s.get_ylim() for s in sides], [np.log10(ax.get_ylim())] * 2)
    colours = [tuple(np.round(a.collections[0].get_facecolor()[0, :3], 3)) for a in fig.axes[1:]]
    assert colours == [tuple(np.round(to_rgb(c), 3)) for c in (DATA, DATA, MODEL, MODEL)]


def test_values_without_spread_have_no_density():
    for change, without in (
        (dict(log_likelihood=-1.0), [True, False]),
        (dict(normalised=0.1), [False, True]),
        ({"n": 2}, [True] * 2),
    ):
        _, here = densities(cloud(a_view(points={0.0: point(), 0.5: point(0.5, **change)})))
        assert [v is None for v in here] == without


POOR = {
    "nothing but NaN": dict.fromkeys(MEASURES, math.nan),
    "no error": {"normalised": math.nan, "appendix_b": math.nan},
    "no likelihood": {"log_likelihood": math.nan},
    "all the same": {"log_likelihood": -1.0, "normalised": 0.1, "appendix_b": 0.1},
    "infinite": {"log_likelihood": -math.inf, "normalised": math.inf},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", POOR)
def test_poor_measures_can_be_shown(name):
    """Of one λ, or of λ = 0 and the real data too."""
    good, poor, lost = point(0.0, 3), point(0.5, 3, **POOR[name]), dict.fromkeys(FLOOR, math.nan)
    for points, floor in (({0.0: good, 0.5: poor}, FLOOR), ({0.0: poor, 0.5: poor}, lost)):
        view = a_view(points=points, floor=floor, picked=0, limit=0.4, calibrated=0.1)
        fig = made(panel, view)
        assert [len(line(fig.axes[0], f"λ = {lam:g}")) for lam in points] == [3, 3]
        for ax in (fig.axes[0], *fig.axes[5:]):
            (low, high), (bottom, top) = ax.get_xlim(), ax.get_ylim()
            assert -math.inf < low < high < math.inf and -math.inf < bottom < top < math.inf
            assert bottom > 0 or ax.get_yscale() == "linear"
        assert numbers(view).shape == (6, 2)


# The curve


def verticals(ax):
    """λ -> colour of vertical lines."""
    lines = [ln for ln in ax.get_lines() if len(set(ln.get_xdata())) == 1 < len(ln.get_xdata())]
    return {ln.get_xdata()[0]: to_rgb(ln.get_color()) for ln in lines}


def diamonds(ax):
    """[[λ, mean]] of its marks."""
    return [list(*ln.get_xydata()) for ln in ax.get_lines() if ln.get_marker() == "D"]


@pytest.mark.parametrize(
    "estimator, lam, fresh",
    [
        ("normalised", 0.0, 0),
        ("normalised", 0.5, 0),
        ("appendix_b", 2.0, 0),
        *(("normalised", lam, 12) for lam in (1.7, 5.0, 40.0)),
    ],
)
def test_a_curve_has_the_means_and_a_mark_at_the_weight(lam, estimator, fresh):
    """Fresh trajectories are marked between the weights of the sweep, or beyond them, where the axis reaches on."""
    view = a_view(lam, here=point(lam, fresh, seed=1) if fresh else None, estimator=estimator)
    fig = made(curve, view)
    for ax, name in zip(fig.axes, (estimator, "log_likelihood"), strict=True):
        (means,) = (ln.get_xydata() for ln in ax.get_lines() if len(ln.get_xdata()) == len(LAMS))
        np.testing.assert_allclose(means, [[lam, p.measures[name].mean()] for lam, p in view.sweep.points.items()])
        assert diamonds(ax) == [[lam, pytest.approx(view.here.measures[name].mean())]]
        ((x, y),) = view_shares(ax, diamonds(ax))
        assert -1e-9 <= x <= 1 + 1e-9 and (fresh or -1e-9 <= y <= 1 + 1e-9) and not (fresh and x > 0.999)
        reference = {"log_likelihood": -0.6}.get(name, FLOOR.get(name))
        assert [reference, reference] in [list(ln.get_ydata()) for ln in ax.get_lines()]
    assert verticals(fig.axes[0]) == {lam: to_rgb(GUIDED)}
    assert f"means; the diamonds stand at λ = {lam:g}" in texts(fig)
    assert "dynamics error" in fig.axes[0].get_ylabel() and "log-likelihood" in fig.axes[1].get_ylabel()
    labels = [t.get_window_extent() for t in fig.axes[0].get_xticklabels()]
    assert not fresh or all(a.x1 <= b.x0 for a, b in zip(labels, labels[1:]))


@pytest.mark.parametrize(
    "calibrated, limit, shown", [(None, 1.9, [1.9]), (0.3, 9.0, [0.3]), (0.0, 2.05, [2.05]), (2.5, None, [])]
)
def test_calibrated_weight_and_limit_are_shown_within_the_sweep(calibrated, limit, shown):
    fig = curve(a_view(calibrated=calibrated, limit=limit))
    assert [lam for lam, colour in verticals(fig.axes[0]).items() if colour == to_rgb("black")] == shown
    expected = {"calibrated": calibrated in shown, "predicted limit": limit in shown}
    assert {name: any(name in t for t in texts(fig)) for name in expected} == expected


def test_a_mark_far_out_is_not_drawn_over_the_labels():
    """A likelihood of -4000 lies below the axes: its mark is cut off; one at the left edge is whole."""
    for lam, points, whole in ((2.0, {0.0: point(), 2.0: collapsed()}, False), (0.0, {0.0: point(), 2.0: point(2.0)}, True)):
        twin = curve(a_view(lam, points)).axes[1]
        (mark,) = (ln for ln in twin.get_lines() if ln.get_marker() == "D")
        assert mark.get_clip_on() != whole and (0 <= view_shares(twin, mark.get_xydata())[0, 1] <= 1) == whole


RANGES = (cloud, 0.21, 0.26), (curve, 0.21, 0.26), (curve, 0.07, 0.3), (cloud, 0.2, 0.9), (curve, 0.03, 3.0), (cloud, 1e-4, 1e3)


@pytest.mark.parametrize("show, low, high", RANGES)
def test_an_error_axis_has_numbers_whatever_its_range(show, low, high):
    points = {
        lam: point(lam, normalised=dict(enumerate(np.geomspace(low, high, 30) ** (1 if lam else 0.9)))) for lam in LAMS[:2]
    }
    ax = show(a_view(0.1, points, floor={"normalised": low})).axes[0]
    bottom, top = ax.get_ylim()
    inside = [t for t in ax.get_yticks() if bottom <= t <= top]
    assert 2 <= len(inside) <= 12
    shown = [float(t.get_text()) for t in ax.get_yticklabels() if bottom <= t.get_position()[1] <= top]
    assert shown == pytest.approx(inside, rel=1e-2) and len(set(shown)) == len(shown)


# Panel and numbers


def test_numbers_are_means_with_intervals_and_counts():
    view = a_view(here=collapsed(0.5, 24))
    table = numbers(view)
    assert list(table.columns) == ["λ = 0", "λ = 0.5"]
    rows = {"log-likelihood": "log_likelihood", "error / variance, ours": "normalised", "motion": "motion"}
    rows |= {"error, Appendix B": "appendix_b"}
    for column, values in (("λ = 0", view.sweep.points[0.0]), ("λ = 0.5", view.here)):
        for row, name in rows.items():
            found = [float(v) for v in re.fullmatch(r"(\S+) \[(\S+), (\S+)\]", table.loc[row, column]).groups()]
            assert found == pytest.approx(measures.interval(values.measures[name]), rel=5e-3)
    assert table.loc[["diverged", "unjudged"], "λ = 0.5"].tolist() == ["24 of 24", "12 of 24"]
    assert table.loc[["diverged", "unjudged"], "λ = 0"].tolist() == ["0 of 30", "0 of 30"] and len(table) == 6


@pytest.mark.parametrize("lam", [0.5, 2.0])
def test_a_panel_holds_cloud_curve_and_numbers_of_both_weights(lam):
    view = a_view(lam, {**{lam: point(lam) for lam in LAMS[:4]}, 2.0: collapsed()}, picked=3, limit=1.5)
    fig = made(panel, view)
    alone = [cloud(view), curve(view)]
    assert [ax.get_xlabel() for ax in fig.axes] == [ax.get_xlabel() for each in alone for ax in each.axes]
    assert {t for each in alone for t in texts(each)} <= set(texts(fig)) and len(fig.axes) == 7
    table = numbers(view)
    for column in table:
        for name in ("log-likelihood", "error / variance, ours", "error, Appendix B"):
            assert any(column in t and table.loc[name, column] in t and name in t for t in texts(fig)), (column, name)
    (found,) = (t for t in fig.findobj(matplotlib.text.Text) if "Appendix B" in t.get_text() and "[" in t.get_text())
    box = found.get_window_extent()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= fig.bbox.width


# Clicks


def pixels(fig, places, dpi):
    """Where places [n, 2] of a cloud are in its picture: px from the top left."""
    share, box = view_shares(fig.axes[0], places), fig.axes[0].get_position()  # in shares of the figure
    width, height = fig.get_size_inches() * dpi
    return np.stack([(box.x0 + share[:, 0] * box.width) * width, (1 - box.y0 - share[:, 1] * box.height) * height], -1)


@pytest.mark.parametrize("estimator, dpi", [("normalised", 72), ("appendix_b", 110)])
def test_a_click_finds_the_trajectory_it_is_on(dpi, estimator):
    lost = point(0.5, normalised={3: math.nan, 8: math.nan}, log_likelihood={5: -4000.0, 6: math.nan}, appendix_b={3: 0.0})
    view = a_view(here=lost, estimator=estimator)
    places = pixels(made(cloud, view), of(lost, estimator), dpi)
    for i in (0, 29):
        found = nearest(view, *places[i] + (0.1, -0.1), dpi)
        assert found == i and type(found) is int


def test_a_click_far_from_all_finds_nothing():
    """Beyond 5% of the picture's width, and not before."""
    view = a_view(points={0.0: point(), 0.5: point(0.5, n=1)})
    fig = cloud(view)
    ((x, y),) = pixels(fig, of(view.here), fig.dpi)
    reach = 0.05 * fig.bbox.width
    for dx, dy in ((1, 0), (0, -1), (0.6, 0.8)):
        assert nearest(view, x + 0.98 * reach * dx, y + 0.98 * reach * dy, fig.dpi) == 0
        assert nearest(view, x + 1.02 * reach * dx, y + 1.02 * reach * dy, fig.dpi) is None


def test_a_picture_has_its_points_where_a_click_finds_them():
    """One trajectory alone, seen in the picture itself."""
    view = a_view(points={0.0: point(), 0.5: point(0.5, n=1)}, picked=0)
    fig = cloud(view)
    file = io.BytesIO()
    fig.savefig(file, format="png", dpi=fig.dpi)
    file.seek(0)
    picture = plt.imread(file)[..., :3]
    x, y = pixels(fig, of(view.here), fig.dpi)[0]
    around = picture[round(y) - 9 : round(y) + 10, round(x) - 9 : round(x) + 10]
    black = np.argwhere(around.max(-1) < 0.3)
    assert len(black) > 20 and np.abs(black.mean(0) - 9).max() < 1.5  # the ring around it
    assert nearest(view, x, y, fig.dpi) == 0


@pytest.mark.parametrize("here", [point(0.5, **POOR["nothing but NaN"]), point(0.5, n=1, log_likelihood=-4000.0)])
def test_a_click_where_nothing_is_in_view_finds_nothing(here):
    view = a_view(points={0.0: point(), 0.5: here})
    fig = made(cloud, view)
    (left, bottom), (right, top) = fig.axes[0].bbox.get_points()
    grid = [(x, fig.bbox.height - y) for x in np.linspace(left, right, 4) for y in (bottom, top)]
    assert {nearest(view, x, y, fig.dpi) for x, y in grid} == {None}


# From noise to motion


def a_track(seed=0, K=5, T=7, scale=1.0):
    """What `study.Denoising` holds."""
    rng = np.random.default_rng(seed)
    sigma = scale * np.geomspace(80, 0.01, K)
    noised = rng.normal(size=(K, T, 71)) * np.sqrt(1 + sigma[:, None, None] ** 2)
    actions, means = rng.uniform(-1, 1, (2, K, T, 24))
    return study.Denoising(*read_only([sigma, noised, actions, means]), tasks.by_name("pen").states)


TRACKS = {"unguided": a_track(0), "λ = 0.3": a_track(1, scale=1.1), "λ = 2": a_track(2, scale=1.2)}


@pytest.mark.parametrize("count, steps", [(1, [0]), (3, [4]), (2, np.array([0, 2, 4]))])
def test_denoising_shows_steps_of_each_trajectory(count, steps):
    tracks = dict(list(TRACKS.items())[:count])
    fig = made(denoising, tracks, steps, TITLE)
    assert len(fig.axes) == 2 * count * len(steps) + 1 and TITLE in texts(fig)
    if len(steps) == 1:
        pairs = np.reshape(fig.axes[:-1], (2, count)).T
    else:
        pairs = np.reshape(fig.axes[:-1], (count, 2, len(steps))).swapaxes(1, 2).reshape(-1, 2)
    chosen = [(name, track, step) for name, track in tracks.items() for step in steps]
    for (above, below), (name, track, step) in zip(pairs, chosen, strict=True):
        (image,), (solid, dotted) = above.get_images(), below.get_lines()
        expected = (track.noised[step, :, :36] / math.sqrt(1 + track.sigma[step] ** 2)).T
        np.testing.assert_allclose(image.get_array(), expected, rtol=1e-12)
        np.testing.assert_array_equal(solid.get_ydata(), track.actions[step][:, 0])
        np.testing.assert_array_equal(dotted.get_ydata(), track.means[step][:, 0])
        assert solid.get_linestyle() == "-" and dotted.get_linestyle() == ":"
        (left, right, *_), (low, high) = image.get_extent(), below.get_xlim()
        assert low <= left and right <= high and abs(low + 0.5) < 0.5  # columns stand above their steps
        assert above.get_title() == f"{name}, σ = {track.sigma[step]:.3g}"
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["denoised action", "the policy's mean there"]
    assert pairs[0][1].get_ylabel() == "action 0" and fig.axes[-1].get_ylabel() == "state (std)"
    assert pairs[-1][1].get_xlabel() == "step of the trajectory"
    names = {t.get_text(): y for t, y in zip(pairs[0][0].get_yticklabels(), pairs[0][0].get_yticks())}
    groups = ["hand joints", "pen position", "pen linear velocity", "pen angular velocity", "pen axis"]
    assert names == dict(zip(groups, (0, 24, 27, 30, 33)))


@pytest.mark.parametrize("text", ["two\nlines", "No simulator can draw here: " + "a long reason " * 8])
def test_a_message_shows_its_text(text):
    fig = made(message, text)
    (shown,) = fig.findobj(matplotlib.text.Text)
    box = shown.get_window_extent()
    assert shown.get_text() == text
    assert box.x0 >= 0 and box.x1 <= fig.bbox.width and box.y0 >= 0 and box.y1 <= fig.bbox.height


# All of them


def test_views_of_the_same_are_equal():
    view = a_view()
    assert view == replace(view) and hash(view) == hash(replace(view))
    others = [replace(view, **change) for change in (dict(stop=(0.5, 1)), dict(estimator="appendix_b"), dict(picked=1))]
    assert len({view, *others, a_view()}) == 5  # the last is of another sweep


DRAWN = {
    "cloud": lambda: cloud(a_view(picked=3)),
    "curve": lambda: curve(a_view(calibrated=0.3, limit=1.0)),
    "denoising": lambda: denoising({"unguided": TRACKS["unguided"]}, [0, 2], TITLE),
    "message": lambda: message("a text"),
}


def picture(name):
    file = io.BytesIO()
    DRAWN[name]().savefig(file, format="png", dpi=60)
    return name, file.getvalue()


@pytest.mark.slow
def test_two_threads_draw_what_one_does():
    alone, found, at_once = dict(map(picture, DRAWN)), [], threading.Barrier(2)

    def draw(names):
        at_once.wait()
        found.extend(map(picture, names))

    threads = [threading.Thread(target=draw, args=(names,)) for names in ([*DRAWN], [*DRAWN][::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 2 * len(DRAWN) and all(alone[name] == png for name, png in found)
