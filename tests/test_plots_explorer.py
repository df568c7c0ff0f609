"""What the widgets show holds the numbers it is made of: each point, each mean, each step, and the words around them."""

import copy
import dataclasses
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
from pgdlib.lab import figures, study
from pgdlib.lab.explorer import plots_explorer
from pgdlib.lab.explorer.plots_explorer import View, cloud, curve, denoising, message, nearest, numbers, panel, still
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
    unjudged = int(np.isnan(own["normalised"]).sum())
    return study.Point(torch.zeros(n, 2, 71), own, {"diverged": 0, "unjudged": unjudged})


def collapsed(lam=2.0, n=30):
    """What is left of a sweep past its threshold: half of it without an error, the others with a large one."""
    errors = dict(enumerate(np.where(np.arange(n) < n // 2, math.nan, 1e5)))
    found = point(lam, n, log_likelihood=-4000.0, normalised=errors, appendix_b=errors)
    found.counts["diverged"] = n
    return found


def a_view(lam=0.5, points=None, **changes):
    points = {lam: point(lam) for lam in LAMS} if points is None else points
    here = points.get(lam)
    own = dict(label="stand-in pen-toy", rule="explicit", points=points, lam=lam, here=here, on_policy=-0.6, floor=FLOOR)
    return View(**{**own, **changes})


def a_view_of_fresh(lam, n=12, **changes):
    """A view of n trajectories that are not of the sweep."""
    return a_view(lam, here=point(lam, n, seed=1), **changes)


def rendered(fig):
    """The figure; what cannot be drawn fails here."""
    assert isinstance(fig, Figure)
    FigureCanvasAgg(fig).draw()
    return fig


def made(show, *arguments, **named):
    return rendered(show(*arguments, **named))


def of(values, estimator="normalised"):
    """[n, 2]: where a cloud has its points."""
    return np.stack([values.measures["log_likelihood"], values.measures[estimator]], -1)


# The cloud


@pytest.mark.parametrize("estimator, lam", [("normalised", 0.1), ("appendix_b", 2.0)])
def test_a_cloud_shows_every_trajectory_of_both_weights(estimator, lam):
    view = a_view(lam, estimator=estimator)
    ax = cloud(view).axes[0]
    for name, values in (("λ = 0", view.points[0.0]), (f"λ = {lam:g}", view.here)):
        np.testing.assert_array_equal(line(ax, name), of(values, estimator))
        assert len(line(ax, name)) == 30
    assert (line(ax, "floor: real data")[:, 1] == FLOOR[estimator]).all()
    assert (line(ax, "on-policy")[:, 0] == -0.6).all() and ax.get_yscale() == "log"
    assert {"λ = 0", f"λ = {lam:g}", "floor: real data", "on-policy"} == {t.get_text() for t in ax.get_legend().get_texts()}


def test_a_cloud_says_what_it_is():
    fig = made(cloud, a_view_of_fresh(0.1234))
    ax = fig.axes[0]
    assert "stand-in pen-toy, explicit rule: λ = 0.123" in texts(fig)
    assert ax.get_xlabel() == "log-likelihood (nats per action dimension)"
    assert ax.get_ylabel() == "dynamics error (reconstructed, / variance)"
    assert "Appendix B" in cloud(a_view(estimator="appendix_b")).axes[0].get_ylabel()
    assert all(figures.guidance.LABELS[e] for e in plots_explorer.ESTIMATORS.values())


@pytest.mark.parametrize("estimator", plots_explorer.ESTIMATORS.values())
def test_limits_do_not_move_with_the_weight(estimator):
    sweep = {**{lam: point(lam) for lam in LAMS}, 3.0: collapsed(3.0)}
    views = [a_view(lam, sweep, estimator=estimator, picked=7) for lam in (0.0, 1.0, 3.0)]
    views += [a_view_of_fresh(0.3, points=sweep, estimator=estimator), replace(views[0], here=collapsed(9.0), lam=9.0)]
    axes = [cloud(view).axes[0] for view in views]
    (xs, ys) = ({getattr(ax, f"get_{k}lim")() for ax in axes} for k in "xy")
    assert len(xs) == len(ys) == 1
    ((low, high),), ((bottom, top),) = xs, ys
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


def test_limits_keep_to_what_has_not_collapsed():
    """Neither a few of a λ whose mean is still sane nor any of a λ that is lost are in view."""
    few = point(1.0, 400, log_likelihood={i: -150.0 for i in range(5)})
    sweep = {0.0: point(), 1.0: few, 2.0: collapsed()}
    assert few.measures["log_likelihood"].mean() > point().measures["log_likelihood"].mean() - 2
    low, high = cloud(a_view(1.0, sweep)).axes[0].get_xlim()
    assert -5 < low < -1.5 and -0.6 < high < 1


def words(fig):
    return [t for t in texts(fig) if "beyond" in t]


def test_what_lies_beyond_the_axes_is_counted():
    assert words(cloud(a_view())) == []
    view = a_view(2.0, {0.0: point(), 2.0: collapsed()})
    assert words(cloud(view)) == ["30 of 30 lie beyond the axes (30 diverged)"]
    lost = point(1.0, log_likelihood={3: -900.0, 4: -900.0}, normalised={4: math.nan, 9: math.nan, 10: 1e9, 11: 1e-9})
    lost.counts["diverged"] = 2
    view = a_view(1.0, {lam: point(lam) for lam in LAMS}, here=lost)
    assert words(cloud(view)) == ["5 of 30 lie beyond the axes (2 diverged)"]
    assert words(cloud(replace(view, here=point(1.0, log_likelihood={3: -900.0})))) == [
        "1 of 30 lie beyond the axes (0 diverged)"
    ]
    few = point(1.0, n=100, seed=0, log_likelihood={3: -900.0})
    fine = {lam: point(lam, n=100) for lam in LAMS}
    assert words(cloud(a_view(1.0, fine, here=few))) == []  # 1%
    assert words(cloud(replace(view, lam=0.0, here=view.points[0.0]))) == []


def densities(fig):
    """For each weight ((x of the peak, its height in its axes), (y of the peak, its height)); None where none is drawn."""
    found = []
    for top, side in zip(fig.axes[1::2], fig.axes[2::2], strict=True):
        each = []
        for ax, i in ((top, 0), (side, 1)):
            vertices = ax.collections[0].get_paths()[0].vertices if ax.collections else None
            at = None if vertices is None else vertices[vertices[:, 1 - i].argmax()]
            tallest = None if at is None else ax.transAxes.inverted().transform(ax.transData.transform(at))[1 - i]
            each.append(None if at is None else (at[i], tallest))
        found.append(each)
    return found


def test_both_clouds_have_densities_of_one_height():
    """A thousand trajectories of λ = 0 against eighty that lie much closer together."""
    narrow = point(0.5, 80)
    narrow.measures["log_likelihood"] = -0.9 + 0.02 * np.random.default_rng(0).normal(size=80)
    view = a_view(points={0.0: point(n=1000), 0.5: narrow})
    fig = cloud(view)
    found = densities(fig)
    heights = [height for each in found for _, height in each]
    assert len(heights) == 4 and max(heights) - min(heights) < 1e-6 and 0.8 < heights[0] <= 1
    for values, ((x, _), (y, _)) in zip((view.points[0.0], narrow), found, strict=True):
        likelihood, error = of(values).T
        assert abs(x - np.median(likelihood)) < 0.5 * likelihood.std()
        assert abs(y - np.median(np.log10(error))) < 0.5 * np.log10(error).std()
    ax, tops, sides = fig.axes[0], fig.axes[1::2], fig.axes[2::2]
    assert {t.get_xlim() for t in tops} == {ax.get_xlim()}
    np.testing.assert_allclose([s.get_ylim() for s in sides], [np.log10(ax.get_ylim())] * 2)
    colours = [tuple(np.round(a.collections[0].get_facecolor()[0, :3], 3)) for a in fig.axes[1:]]
    assert colours == [tuple(np.round(to_rgb(c), 3)) for c in (DATA, DATA, MODEL, MODEL)]


def test_densities_are_those_of_what_is_in_view():
    view = a_view(1.0, {lam: point(lam) for lam in LAMS}, here=point(1.0, log_likelihood={3: -900.0}, normalised={5: math.nan}))
    rest = {k: np.delete(v, [3, 5]) for k, v in view.here.measures.items()}
    without = replace(view, here=study.Point(torch.zeros(28, 2, 71), rest, view.here.counts))
    assert densities(cloud(view)) == densities(cloud(without))


POOR = {
    "nothing but NaN": dict.fromkeys(MEASURES, math.nan),
    "no error": {"normalised": math.nan, "appendix_b": math.nan},
    "no likelihood": {"log_likelihood": math.nan},
    "all the same": {"log_likelihood": -1.0, "normalised": 0.1, "appendix_b": 0.1},
    "one likelihood": {"log_likelihood": -1.0},
    "one error": {"normalised": 0.1, "appendix_b": 0.1},
    "infinite": {"log_likelihood": -math.inf, "normalised": math.inf},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", POOR)
def test_poor_measures_can_be_shown(name):
    """Of one λ, or of λ = 0 and the real data too."""
    good, poor, lost = point(0.0, 3), point(0.5, 3, **POOR[name]), dict.fromkeys(FLOOR, math.nan)
    for points, floor in (({0.0: good, 0.5: poor}, FLOOR), ({0.0: poor, 0.5: poor}, lost)):
        view = a_view(points=points, floor=floor, picked=0, limit=0.4, calibrated=0.1)
        fig = panel(view)
        assert [len(line(fig.axes[0], f"λ = {lam:g}")) for lam in points] == [3, 3]
        for ax in (fig.axes[0], *fig.axes[5:]):
            (low, high), (bottom, top) = ax.get_xlim(), ax.get_ylim()
            assert -math.inf < low < high < math.inf and -math.inf < bottom < top < math.inf
            assert bottom > 0 or ax.get_yscale() == "linear"
        assert numbers(view).shape == (6, 2)
    rendered(fig)


@pytest.mark.parametrize("n", [1, 2])
def test_a_few_trajectories_can_be_shown(n):
    view = a_view(points={0.0: point(0.0, n), 0.5: point(0.5, n)}, picked=n - 1)
    fig = made(panel, view)
    assert len(line(fig.axes[0], "λ = 0.5")) == len(line(fig.axes[0], "λ = 0")) == n


def test_values_without_spread_have_no_density():
    for changes in (dict(log_likelihood=-1.0), dict(normalised=0.1)):
        _, here = densities(cloud(a_view(points={0.0: point(), 0.5: point(0.5, **changes)})))
        assert [v is None for v in here] == ["log_likelihood" in changes, "normalised" in changes]
    assert densities(cloud(a_view(points={0.0: point(), 0.5: point(0.5, n=2)})))[1] == [None, None]


def test_the_picked_trajectory_is_marked_where_it_is():
    for picked in (0, 29):
        view = a_view(picked=picked)
        ring = line(cloud(view).axes[0], f"no. {picked}")
        assert ring.tolist() == [[view.here.measures["log_likelihood"][picked], view.here.measures["normalised"][picked]]]


@pytest.mark.parametrize("picked", [None, 30])
def test_what_is_not_picked_or_not_there_is_not_marked(picked):
    assert not [t for t in texts(cloud(a_view(picked=picked))) if t.startswith("no. ")]


# The curve


def marks(fig):
    """The diamonds of the two axes: [[λ, mean]] of each."""
    return [[list(*ln.get_xydata()) for ln in ax.get_lines() if ln.get_marker() == "D"] for ax in fig.axes]


def verticals(ax):
    """λ -> colour of vertical lines."""
    return {
        ln.get_xdata()[0]: to_rgb(ln.get_color())
        for ln in ax.get_lines()
        if len(set(ln.get_xdata())) == 1 < len(ln.get_xdata())
    }


def view_shares(ax, places):
    """Where places [n, 2] are in the axes, 0 to 1."""
    return ax.transAxes.inverted().transform(ax.transData.transform(places))


@pytest.mark.parametrize("estimator, lam", [("normalised", 0.0), ("normalised", 0.5), ("appendix_b", 2.0)])
def test_a_curve_has_the_means_and_a_mark_at_the_weight(lam, estimator):
    view = a_view(lam, estimator=estimator)
    fig = made(curve, view)
    for ax, name, found in zip(fig.axes, (estimator, "log_likelihood"), marks(fig), strict=True):
        (means,) = (ln.get_xydata() for ln in ax.get_lines() if len(ln.get_xdata()) == len(LAMS))
        np.testing.assert_allclose(means, [[lam, p.measures[name].mean()] for lam, p in view.points.items()])
        assert found == [[lam, pytest.approx(view.here.measures[name].mean())]]
        shares = view_shares(ax, found)
        assert (shares >= -1e-9).all() and (shares <= 1 + 1e-9).all()
        reference = {"log_likelihood": -0.6}.get(name, FLOOR.get(name))
        assert [reference, reference] in [list(ln.get_ydata()) for ln in ax.get_lines()]
    assert verticals(fig.axes[0]) == {lam: to_rgb(GUIDED)}
    assert fig.axes[0].get_xlabel().startswith("guidance weight λ") and f"means; the diamonds stand at λ = {lam:g}" in texts(
        fig
    )
    assert "dynamics error" in fig.axes[0].get_ylabel() and "log-likelihood" in fig.axes[1].get_ylabel()


def test_a_curve_takes_the_summary_it_is_given():
    view = a_view()
    frame = study.summary(view.points)
    frame["normalised.mean"] += 1.0
    means = next(ln for ln in curve(view, frame=frame).axes[0].get_lines() if len(ln.get_xdata()) == len(LAMS))
    np.testing.assert_array_equal(means.get_ydata(), frame["normalised.mean"])


@pytest.mark.parametrize(
    "calibrated, limit, shown",
    [
        (None, None, []),
        (0.3, 1.9, [0.3, 1.9]),
        (0.3, 9.0, [0.3]),
        (0.0, None, []),
        (2.5, 2.0, [2.0]),
        (0.001, 2.05, [0.001, 2.05]),
    ],
)
def test_calibrated_weight_and_limit_are_shown_within_the_sweep(calibrated, limit, shown):
    fig = curve(a_view(calibrated=calibrated, limit=limit))
    black = [lam for lam, colour in verticals(fig.axes[0]).items() if colour == to_rgb("black")]
    assert sorted(black) == shown
    expected = {"calibrated": calibrated in shown, "predicted limit": limit in shown}
    assert {name: any(name in t for t in texts(fig)) for name in expected} == expected


@pytest.mark.parametrize("lam", [1.7, 5.0, 40.0])
def test_fresh_trajectories_are_marked_beside_the_sweep(lam):
    """Between its weights, or beyond them, where the axis reaches on."""
    view = a_view_of_fresh(lam)
    fig = made(curve, view)
    for ax, name, found in zip(fig.axes, ("normalised", "log_likelihood"), marks(fig), strict=True):
        assert found == [[lam, pytest.approx(view.here.measures[name].mean())]]
        assert (means := [ln for ln in ax.get_lines() if len(ln.get_xdata()) == len(LAMS)]) and lam not in means[0].get_xdata()
    assert view_shares(fig.axes[0], [[lam, 1]])[0, 0] < 0.999 and np.diff(fig.axes[0].get_xlim()) > 0
    np.testing.assert_array_equal(line(cloud(view).axes[0], f"λ = {lam:g}"), of(view.here))
    labels = [t.get_window_extent() for t in fig.axes[0].get_xticklabels()]
    assert all(a.x1 <= b.x0 for a, b in zip(labels, labels[1:]))


def test_a_mark_far_out_is_not_drawn_over_the_labels():
    """A likelihood of -4000 lies below the axes: its mark is cut off; one at the left edge is whole."""
    for lam, points, whole in ((2.0, {0.0: point(), 2.0: collapsed()}, False), (0.0, {0.0: point(), 2.0: point(2.0)}, True)):
        twin = curve(a_view(lam, points)).axes[1]
        (mark,) = (ln for ln in twin.get_lines() if ln.get_marker() == "D")
        assert mark.get_clip_on() != whole and (0 <= view_shares(twin, mark.get_xydata())[0, 1] <= 1) == whole


def test_a_curve_of_one_weight():
    fig = curve(a_view(0.0, {0.0: point()}, calibrated=0.0, limit=2.0))
    assert [len(found) for found in marks(fig)] == [1, 1] and np.diff(fig.axes[0].get_xlim()) > 0


RANGES = (cloud, 0.21, 0.26), (curve, 0.21, 0.26), (curve, 0.07, 0.3), (cloud, 0.2, 0.9), (curve, 0.03, 3.0), (cloud, 1e-5, 1e4)


@pytest.mark.parametrize("show, low, high", RANGES)
def test_an_error_axis_has_numbers_whatever_its_range(show, low, high):
    points = {
        lam: point(lam, normalised=dict(enumerate(np.geomspace(low, high, 30) ** (1 if lam else 0.9)))) for lam in LAMS[:2]
    }
    ax = show(a_view(0.1, points, floor={"normalised": low})).axes[0]
    bottom, top = ax.get_ylim()
    inside = [t for t in ax.get_yticks() if bottom <= t <= top]
    assert 2 <= len(inside) <= 12 and len(inside) == len(ax.get_yticks())
    shown = [float(t.get_text()) for t in ax.get_yticklabels()]
    assert shown == pytest.approx(inside, rel=1e-2) and len(set(shown)) == len(shown)


# Panel and numbers


def test_numbers_are_means_with_intervals_and_counts():
    view = a_view(here=collapsed(0.5, 24))
    table = numbers(view)
    assert list(table.columns) == ["λ = 0", "λ = 0.5"]
    rows = {"log-likelihood": "log_likelihood", "error / variance, ours": "normalised", "motion": "motion"}
    rows |= {"error, Appendix B": "appendix_b"}
    for column, values in (("λ = 0", view.points[0.0]), ("λ = 0.5", view.here)):
        for row, name in rows.items():
            found = [float(v) for v in re.fullmatch(r"(\S+) \[(\S+), (\S+)\]", table.loc[row, column]).groups()]
            assert found == pytest.approx(measures.interval(values.measures[name]), rel=5e-3)
    assert table.loc[["diverged", "unjudged"], "λ = 0.5"].tolist() == ["24 of 24", "12 of 24"]
    assert table.loc[["diverged", "unjudged"], "λ = 0"].tolist() == ["0 of 30", "0 of 30"] and len(table) == 6


def test_numbers_without_guidance_are_one_column():
    assert list(numbers(a_view(0.0)).columns) == ["λ = 0"]
    fresh = a_view(0.0, here=point(0.0, n=8, seed=5))
    assert numbers(fresh).loc["diverged"].tolist() == ["0 of 8"]  # what is shown, not what is in the sweep


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
    ax = fig.axes[0]
    share = ax.transAxes.inverted().transform(ax.transData.transform(places))
    box = ax.get_position()  # in shares of the figure
    width, height = fig.get_size_inches() * dpi
    return np.stack([(box.x0 + share[:, 0] * box.width) * width, (1 - box.y0 - share[:, 1] * box.height) * height], -1)


@pytest.mark.parametrize("estimator, dpi", [("normalised", 72), ("appendix_b", 110)])
def test_a_click_finds_the_trajectory_it_is_on(dpi, estimator):
    lost = point(0.5, normalised={3: math.nan, 8: math.nan}, log_likelihood={5: -4000.0, 6: math.nan}, appendix_b={3: 0.0})
    view = a_view(here=lost, estimator=estimator)
    fig = cloud(view)
    fig.dpi = dpi
    rendered(fig)
    places = of(lost, estimator)
    for i, (x, y) in enumerate(pixels(fig, places, dpi)):
        if i not in (3, 5, 6, 8):
            assert nearest(view, fig, x, y) == nearest(view, fig, x + 0.1, y - 0.1) == i
            assert type(nearest(view, fig, x, y)) is int
    assert nearest(view, fig, 2, 2) is None


def test_a_click_at_the_dpi_of_the_picture():
    """A picture of another dpi than the figure's own: its pixels count in the figure's."""
    view = a_view()
    fig = made(cloud, view)
    x, y = pixels(fig, of(view.here), 110)[12] * fig.dpi / 110
    assert nearest(view, fig, x, y) == 12


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
    assert nearest(view, fig, x, y) == 0


@pytest.mark.parametrize("here", [collapsed(), point(0.5, **POOR["nothing but NaN"]), point(0.5, n=1, log_likelihood=-4000.0)])
def test_a_click_where_nothing_is_in_view_finds_nothing(here):
    view = a_view(points={0.0: point(), 0.5: here})
    fig = made(cloud, view)
    (left, bottom), (right, top) = fig.axes[0].bbox.get_points()
    grid = [(x, fig.bbox.height - y) for x in np.linspace(left, right, 9) for y in np.linspace(bottom, top, 9)]
    assert {nearest(view, fig, x, y) for x, y in grid} == {None}


def test_a_click_at_the_edge_does_not_find_what_is_just_beyond_it():
    fig = cloud(a_view())
    (low, high), (left, right) = fig.axes[0].get_xlim(), fig.axes[0].bbox.intervalx
    for beyond, x in ((low - 0.02, left), (high + 0.02, right)):
        view = a_view(here=point(0.5, n=1, log_likelihood=beyond))
        ((there, y),) = pixels(fig, of(view.here), fig.dpi)
        assert 0 < abs(there - x) < 10 and nearest(view, cloud(view), x, y) is None


def test_a_click_far_from_all_finds_nothing():
    """Beyond 5% of the picture's width, and not before."""
    view = a_view(points={0.0: point(), 0.5: point(0.5, n=1)})
    fig = cloud(view)
    ((x, y),) = pixels(fig, of(view.here), fig.dpi)
    reach = 0.05 * fig.bbox.width
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.6, 0.8)):
        assert nearest(view, fig, x + 0.98 * reach * dx, y + 0.98 * reach * dy) == 0
        assert nearest(view, fig, x + 1.02 * reach * dx, y + 1.02 * reach * dy) is None


# From noise to motion


def a_film(seed=0, K=5, T=7, scale=1.0):
    rng = np.random.default_rng(seed)
    sigma = scale * np.geomspace(80, 0.01, K)
    noised = rng.normal(size=(K, T, 71)) * np.sqrt(1 + sigma[:, None, None] ** 2)
    return study.Denoising(sigma, noised, *rng.uniform(-1, 1, (2, K, T, 24)))


def shown(above, below, film, step, action):
    """Whether two axes show this step of a film: the states above, the action and the policy's mean below."""
    (image,) = above.get_images()
    expected = (film.noised[step, :, :36] / math.sqrt(1 + film.sigma[step] ** 2)).T
    np.testing.assert_allclose(image.get_array(), expected, rtol=1e-12)
    solid, dotted = below.get_lines()
    np.testing.assert_array_equal(solid.get_ydata(), film.actions[step][:, action])
    np.testing.assert_array_equal(dotted.get_ydata(), film.means[step][:, action])
    assert solid.get_linestyle() == "-" and dotted.get_linestyle() == ":"
    assert solid.get_xdata().tolist() == dotted.get_xdata().tolist() == [*range(len(film.actions[step]))]
    left, right, *_ = image.get_extent()
    low, high = below.get_xlim()
    assert low <= left and right <= high and abs(low + 0.5) < 0.5  # columns stand above their steps


FILMS = {"unguided": a_film(0), "λ = 0.3": a_film(1, scale=1.1), "λ = 2": a_film(2, scale=1.2)}


@pytest.mark.parametrize("count, step, action", [(1, 0, 0), (2, 3, 9), (3, 4, 23)])
def test_denoising_shows_one_step_of_each_film(count, step, action):
    films = dict(list(FILMS.items())[:count])
    fig = denoising(films, step, TITLE, action=action)
    axes = np.reshape(fig.axes[: 2 * count], (2, count))
    assert len(fig.axes) == 2 * count + 1 and TITLE in texts(fig)
    for (name, film), (above, below) in zip(films.items(), axes.T, strict=True):
        shown(above, below, film, step, action)
        assert above.get_title() == f"{name}, σ = {film.sigma[step]:.3g}"
        assert below.get_xlabel() == "step of the trajectory"
        assert [t.get_text() for t in below.get_legend().get_texts()] == ["denoised action", "the policy's mean there"]
    assert axes[1, 0].get_ylabel() == f"action {action}" and fig.axes[-1].get_ylabel() == "state (std)"
    names = {t.get_text(): y for t, y in zip(axes[0, 0].get_yticklabels(), axes[0, 0].get_yticks())}
    assert names == {
        "hand joints": 0,
        "pen position": 24,
        "pen linear velocity": 27,
        "pen angular velocity": 30,
        "pen axis": 33,
    }


def test_the_legend_of_denoising_keeps_away_from_the_policys_mean():
    for level, low in ((1.0, True), (-1.0, False)):
        film = dataclasses.replace(FILMS["unguided"], means=np.full_like(FILMS["unguided"].means, level))
        for step in (0, 4):  # the same at every step
            fig = denoising({"unguided": film}, step, TITLE)
            fig.draw_without_rendering()
            below = fig.axes[1]
            box = below.get_legend().get_window_extent().transformed(below.transData.inverted())
            assert (box.y1 < 0) if low else (box.y0 > 0)


@pytest.mark.parametrize("count, steps", [(1, [0, 2, 4]), (2, np.array([0, 4])), (3, [3])])
def test_a_still_shows_some_steps_of_each_film(count, steps):
    films = dict(list(FILMS.items())[:count])
    fig = still(films, steps, TITLE, action=4)
    axes = np.reshape(fig.axes, (count, 2, len(steps)))
    assert TITLE in texts(fig)
    for (name, film), rows in zip(films.items(), axes, strict=True):
        for step, (above, below) in zip(steps, rows.T, strict=True):
            shown(above, below, film, step, 4)
            assert above.get_title() == f"{name}, σ = {film.sigma[step]:.2g}"
        assert rows[1, 0].get_ylabel().startswith("action 4") and rows[0, 0].get_ylabel() == "36 states"
    assert all(ax.get_xlabel() == "step" for ax in axes[-1, 1])


@pytest.mark.parametrize("text", ["nothing to see", "two\nlines", "No simulator can draw here: " + "a long reason " * 8])
def test_a_message_shows_its_text(text):
    fig = made(message, text)
    assert texts(fig) == [text]
    (shown,) = fig.findobj(matplotlib.text.Text)
    box = shown.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= fig.bbox.width and box.y0 >= 0 and box.y1 <= fig.bbox.height


# All of them


def picture(fig):
    file = io.BytesIO()
    fig.savefig(file, format="png", dpi=60)
    return file.getvalue()


DRAWN = {
    "cloud": lambda: cloud(a_view(picked=3)),
    "curve": lambda: curve(a_view(calibrated=0.3, limit=1.0)),
    "still": lambda: still({"unguided": FILMS["unguided"]}, [0, 2], TITLE),
    "message": lambda: message("a text"),
}


def test_every_figure_is_tested():
    own = {
        k for k, v in vars(plots_explorer).items() if getattr(v, "__module__", "") == plots_explorer.__name__ and k[0] != "_"
    }
    assert own == {*DRAWN, "panel", "denoising", "View", "nearest", "numbers"}


def same(a, b):
    """Whether two points, films or views are the same, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if hasattr(a, "__dataclass_fields__"):
        return same(vars(a), vars(b))
    return a.tobytes() == b.tobytes() if isinstance(a, np.ndarray) else bool(np.all(np.asarray(a == b)))


def test_inputs_are_not_changed():
    sweep = {0.0: point(), 0.5: point(0.5, normalised={3: math.nan}), 2.0: collapsed()}
    view, films = a_view(points=sweep, picked=3, limit=1.0, calibrated=0.1), copy.deepcopy(FILMS)
    frame = study.summary(sweep)
    view_before, films_before, frame_before = copy.deepcopy((view, films, frame))
    fig = cloud(view)
    nearest(view, fig, 200, 200)
    for show in (panel, numbers, lambda view: curve(view, frame=frame)):
        show(view)
    denoising(films, 1, TITLE)
    still(films, [1, 2], TITLE)
    assert same(view, view_before) and same(films, films_before) and frame.equals(frame_before)


@pytest.mark.slow
def test_two_threads_draw_what_one_does():
    alone = {name: picture(show()) for name, show in DRAWN.items()}
    found, at_once = [], threading.Barrier(2)

    def draw(names):
        at_once.wait()
        for name in names:
            found.append((name, picture(DRAWN[name]())))

    threads = [threading.Thread(target=draw, args=(names,)) for names in ([*DRAWN], [*DRAWN][::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 2 * len(DRAWN) and all(alone[name] == png for name, png in found)
