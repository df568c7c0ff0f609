"""The figures of guidance show all the numbers they are given, under labels, each in a style of its own."""

import functools
import math

import conftest
import numpy as np
import pandas as pd
import pytest
from conftest import TITLE, assert_labelled, line, texts
from matplotlib.colors import to_rgb

from pgdlib.lab.figures import plots_guidance

pytestmark = pytest.mark.usefixtures("style")
RNG = np.random.default_rng(0)
T = 12
MEASURES = ("log_likelihood", "normalised", "reconstructed", "appendix_b")
FLOORS = {"normalised": 0.1, "appendix_b": 0.5}
NOTHING = {f"{name}.{k}": math.nan for name in MEASURES for k in ("mean", "low", "high")}


def clouds(lams=(0.0, 1.0), n=5, value=None):
    return {m: {k: np.full(n, value) if value is not None else RNG.random(n) for k in MEASURES} for m in lams}


def sweep(lams=(0.0, 1.0, 2.0, 2.5), diverged=(0, 0, 3, 8)):
    frame = pd.DataFrame({"lam": lams, "diverged": diverged})
    for name in MEASURES:
        mean = RNG.random(len(lams)) + 0.5
        frame[[f"{name}.mean", f"{name}.low", f"{name}.high"]] = np.stack([mean, mean - 0.1, mean + 0.1], 1)
    return frame


def tracks(lams=(0.0, 2.0)):
    return {lam: tuple(RNG.normal(size=(T, k)) for k in (24, 24, 45)) for lam in lams}


MULTIPLES = np.array([0.5, 1.0, 1.5])


def demonstrations(n=4):
    return {f"{k} steps": (MULTIPLES, 10.0 ** (k + np.arange(3))) for k in range(n)}


def shares(n=4):
    return {f"guide {k}": (MULTIPLES, [0.0, 0.1 * k, 1.0], RNG.random(3)) for k in range(n)}


UNGUIDED = -1.0, 0.5


def curve(slope=1.0, x=(-0.8, -0.5, 0.2), bottom=0.5):
    """A front [L] that rises by `slope` for each nat from the unguided point on, with its interval."""
    x = np.array(x)
    y = bottom + slope * (x + 1)
    return x, y, y - 0.1, y + 0.1


RULES = ("explicit (the paper)", "explicit, denoised", "linear", "cosine", "cosine, denoised", "proximal", "smoothed")


def curves(rules=RULES):
    return {rule: curve(1.0 + i) for i, rule in enumerate(rules)}


WEIGHTS = [0.0, 0.1, 1.0, 10.0]


def distances(n=3):
    return {f"reference {k}": [1.0 + k, 0.5, -0.01, 0.3] for k in range(n)}


def null(n=3):
    return {f"reference {k}": 0.02 + 0.01 * k for k in range(n)}


def horizons(n=6):
    return {f"model {k}": np.stack([v := k + 1 + RNG.random(T), v - 0.5, v + 0.5])[: 1 + 2 * (k % 2)] for k in range(n)}


# name -> (arguments, the x label of every axis that has one)
FIGURES = {
    "figure_1": ((clouds(), sweep(), FLOORS, 0.1), ["log-likelihood", "guidance weight λ"] * 2),
    "guided_pair": ((tracks(),), ["time (s)"] * 4),
    "threshold": ((demonstrations(), shares()), ["λ / predicted limit"] * 2),
    "fronts": ((curves(), UNGUIDED, 0.1, "smoothed"), ["log-likelihood under the guide"] * 2),
    "states_over_lam": ((WEIGHTS, distances(), null(), 0.4), ["guidance weight λ"]),
    "by_horizon": ((horizons(),), ["steps k from the start"]),
}

drawn = functools.partial(conftest.drawn, plots_guidance)


def made(name, *arguments, **named):
    """The figure, not rendered."""
    return getattr(plots_guidance, name)(*arguments, title=TITLE, **named)


def test_every_function_is_tested():
    own = {k: v for k, v in vars(plots_guidance).items() if getattr(v, "__module__", "") == plots_guidance.__name__}
    assert {k for k in own if k[0] != "_"} == {*FIGURES, "over_lam"}  # the last is seen in figure_1


@pytest.mark.parametrize("name", FIGURES)
def test_titles_and_labels(name):
    arguments, labels = FIGURES[name]
    fig = drawn(name, *arguments)
    assert_labelled(fig, labels)
    assert all(ax.get_ylabel() or (name == "guided_pair" and ax.get_title()) for ax in fig.axes)


def in_view(ax, points):
    """Whether all finite points [n, 2] lie within the axes, to a thousandth of their width."""
    points = np.asarray(points, dtype=float)
    ax.autoscale_view()
    shares = ax.transAxes.inverted().transform(ax.transData.transform(points[np.isfinite(points).all(1)]))
    return len(shares) > 0 and (shares > -1e-3).all() and (shares < 1.001).all()


def band(collection):
    """(lowest, highest) of a filled band."""
    y = np.concatenate([p.vertices[:, 1] for p in collection.get_paths()])
    return y.min(), y.max()


def colours(lines):
    return [tuple(np.round(to_rgb(ln.get_color()), 3)) for ln in lines]


# Figure 1


def test_figure_1_shows_both_estimators_with_floors_and_divergence():
    given, frame = clouds(), sweep()
    fig = made("figure_1", given, frame, FLOORS, 0.25)
    assert len(fig.axes) == 6
    lefts, rights, twins = fig.axes[0:4:2], fig.axes[1:4:2], fig.axes[4:]
    for left, right, twin, estimator in zip(lefts, rights, twins, FLOORS, strict=True):
        for lam in (0.0, 1.0):
            x, y = line(left, f"λ = {lam:g}").T
            assert (x == given[lam]["log_likelihood"]).all() and (y == given[lam][estimator]).all()
        assert (line(left, "floor: real data")[:, 1] == FLOORS[estimator]).all()
        assert (line(left, "on-policy")[:, 0] == 0.25).all()
        for ax, name in ((right, estimator), (twin, "log_likelihood")):
            means, ring, reference = ax.get_lines()
            np.testing.assert_allclose(means.get_xydata(), frame[["lam", f"{name}.mean"]])
            np.testing.assert_allclose(ring.get_xydata(), frame.loc[:0, ["lam", f"{name}.mean"]])
            assert ring.get_color() == "red" and set(reference.get_ydata()) == {FLOORS.get(name, 0.25)}
            assert band(ax.collections[0]) == pytest.approx((frame[f"{name}.low"].min(), frame[f"{name}.high"].max()))
            assert in_view(ax, means.get_xydata())
        assert any("diverged" in t.get_text() for t in right.texts)
    assert "/ variance" in lefts[0].get_ylabel() and "Appendix B" in lefts[1].get_ylabel()
    assert not any(
        "diverged" in t for t in texts(made("figure_1", given, sweep(diverged=(0,) * 4), {"reconstructed": 1}, 0.25))
    )


def test_figure_1_keeps_to_what_lies_before_the_collapse():
    """A likelihood that falls by thousands does not flatten the curve before it."""
    frame = sweep()
    frame["log_likelihood.mean"] = [-1.0, -0.5, -0.2, -5000.0]
    twin = made("figure_1", clouds(), frame, {"normalised": 0.1}, -0.3).axes[2]
    assert twin.get_lines()[0].get_ydata().tolist() == [-1, -0.5, -0.2, -5000]
    low, high = twin.get_ylim()
    assert -1.5 < low < -1 and -0.2 < high < 0


@pytest.mark.parametrize("limit, shown", [(2.0, True), (2.5, True), (9.0, False)])
def test_figure_1_shows_the_limit_where_the_sweep_reaches_it(limit, shown):
    fig = made("figure_1", clouds(), sweep(), FLOORS, 0.25, limit=limit)
    for right in fig.axes[1:4:2]:
        assert ([limit, limit] in [list(ln.get_xdata()) for ln in right.get_lines()]) == shown
        assert any("predicted limit" in t.get_text() for t in right.texts) == shown


# One trajectory of each λ


def test_guided_pair_shows_actions_means_and_observations():
    given = tracks()
    axes = made("guided_pair", given, actions=(3,), observations=(31, 5)).axes
    assert len(axes) == 3
    for (lam, (acted, wanted, obs)), solid, dotted in zip(given.items(), axes[0].get_lines()[::2], axes[0].get_lines()[1::2]):
        assert solid.get_label() == f"λ = {lam:g}" and dotted.get_linestyle() == ":"
        np.testing.assert_allclose(solid.get_xydata(), np.stack([np.arange(T) / 100, acted[:, 3]], 1))
        np.testing.assert_allclose(dotted.get_ydata(), wanted[:, 3])
        for ax, i in zip(axes[1:], (31, 5)):
            assert any((ln.get_ydata() == obs[:, i]).all() for ln in ax.get_lines())
    assert [ax.get_title() for ax in axes] == ["action 3 (dotted: guide's mean)", "pen turn rate (rad/s)", "observation 5"]


# The threshold


def test_threshold_shows_demonstration_and_measurement_over_the_limit():
    left, right = made("threshold", demonstrations(), shares()).axes
    for label, (x, y) in demonstrations().items():
        assert line(left, label).tolist() == np.stack([x, y], 1).tolist()
    for label, (x, share, _) in shares().items():
        np.testing.assert_allclose(line(right, label), np.stack([x, 100 * np.array(share)], 1))
        assert in_view(right, line(right, label))
    assert left.get_yscale() == "log"
    for ax in (left, right):
        assert line(ax, "predicted limit")[:, 0].tolist() == [1, 1]
        assert len(set(colours(ax.get_lines()[:4]))) == 4


def test_a_distance_beyond_all_bounds_is_drawn():
    left, _ = made("threshold", {"16 steps": (MULTIPLES, [1e-3, 1e80, math.inf])}, shares(1)).axes
    y = line(left, "16 steps")[:, 1]
    assert y[0] == 1e-3 and np.isfinite(y).all() and (y[1:] > left.get_ylim()[1]).all()


# The fronts


def test_fronts_show_every_rule_from_the_unguided_point_on():
    given = curves()
    left, _ = made("fronts", given, UNGUIDED, 0.1, "smoothed").axes
    for (rule, (x, y, low, high)), shade in zip(given.items(), left.collections, strict=True):
        points = np.stack([np.append(UNGUIDED[0], x), np.append(UNGUIDED[1], y)], 1)
        np.testing.assert_allclose(line(left, rule), points)
        assert band(shade) == pytest.approx((low.min(), high.max())) and in_view(left, points)
    assert line(left, "λ = 0").tolist() == [list(UNGUIDED)] and left.get_yscale() == "log"
    assert {*RULES, "λ = 0"} <= {t.get_text() for t in left.get_legend().get_texts()}


def test_fronts_show_the_guides_own_likelihood():
    left, right = made("fronts", curves(), UNGUIDED, 0.1, "smoothed").axes
    for ax in (left, right):
        assert [0.1, 0.1] in [list(ln.get_xdata()) for ln in ax.get_lines()] and "on-policy " in texts(ax)


def test_fronts_are_shown_as_far_as_the_likelihood_rises():
    """A point that falls back is left out, one that rises above all before it is not."""
    x = np.array([-0.5, 0.0, -0.1, 0.3, -5000.0])
    given = {"explicit": (x, y := 1 + x**2, y - 0.5, y + 0.5), "smoothed": curve()}
    left, _ = made("fronts", given, UNGUIDED, 0.0, "smoothed").axes
    assert line(left, "explicit").tolist() == [list(UNGUIDED), [-0.5, 1.25], [0.0, 1.0], [0.3, 1.09]]
    assert band(left.collections[0]) == (0.5, 1.75) and left.get_xlim()[0] > -2


def test_fronts_are_compared_at_equal_likelihood():
    """Straight fronts 0.5 + s (x + 1): the second rule's error over the first's is known at every likelihood."""
    given = {"proximal": curve(2.0), "smoothed": curve(1.0, (-0.9, 0.1)), "explicit": curve(4.0, (-0.7, 0.5))}
    left, right = made("fronts", given, UNGUIDED, 0.1, "smoothed").axes
    others, (one, on_policy) = right.get_lines()[:2], right.get_lines()[2:]
    for ln, (slope, end) in zip(others, ((2.0, 0.2), (4.0, 0.5))):
        x, y = ln.get_xydata().T
        assert x[0] == -1 and x[-1] == pytest.approx(0.5) and y[0] == pytest.approx(1)
        known = x <= min(end, 0.1)  # where both fronts reach
        np.testing.assert_allclose(y[known], (0.5 + slope * (x + 1))[known] / (0.5 + (x + 1))[known])
        assert known.sum() > 30 and np.isnan(y[~known]).all()
    assert set(one.get_ydata()) == {1} and set(on_policy.get_xdata()) == {0.1}
    assert colours([one]) == colours([ln for ln in left.get_lines() if ln.get_label() == "smoothed"])
    assert any("smoothed" in t.get_text() for t in right.texts) and "smoothed" in right.get_ylabel()


@pytest.mark.parametrize("chosen", ["smoothed", "proximal", RULES[0]])
def test_every_front_looks_different(chosen):
    left, _ = made("fronts", curves(), UNGUIDED, 0.1, chosen).axes
    assert len(set(colours(ln for ln in left.get_lines() if ln.get_label() in RULES))) == len(RULES)


# States over λ


def test_states_over_lam_shows_distances_and_chance():
    (ax,) = made("states_over_lam", WEIGHTS, distances(), null(), 0.4).axes
    for name, values in distances().items():
        points = np.stack([WEIGHTS, values], 1)
        np.testing.assert_allclose(line(ax, f"to {name}"), points)
        (own,) = [ln for ln in ax.get_lines() if ln.get_label() == f"to {name}"]
        assert [null()[name]] * 2 in [list(ln.get_ydata()) for ln in ax.get_lines() if ln.get_color() == own.get_color()]
    assert set(line(ax, "calibrated λ = 0.4")[:, 0]) == {0.4}
    x = ax.transData.transform([(w, 0) for w in WEIGHTS])[:, 0]
    assert (np.diff(x) > 20).all()  # λ = 0 has a place of its own beside a hundredfold range


def test_distances_below_zero_are_in_sight():
    """An energy distance is zero in the mean where nothing differs: half of them lie below."""
    (ax,) = made("states_over_lam", WEIGHTS, {"the data": [0.4, 0.1, -0.05, 0.2]}, {"the data": 0.02}, 0.4).axes
    assert in_view(ax, line(ax, "to the data"))
    (ax,) = made("states_over_lam", WEIGHTS, {"the data": [0.4, 0.3, 0.2, 0.2]}, {"the data": 0.02}, 0.4).axes
    assert ax.get_ylim()[0] <= 0  # and zero is always there


# By horizon


def test_by_horizon_counts_steps_from_one_and_shows_intervals():
    given = horizons()
    (ax,) = made("by_horizon", given).axes
    for label, values in given.items():
        np.testing.assert_allclose(line(ax, label), np.stack([np.arange(1, T + 1), values[0]], 1))
        assert in_view(ax, line(ax, label))
    with_interval = [v for v in given.values() if len(v) == 3]
    assert len(with_interval) == 3
    for shade, values in zip(ax.collections, with_interval, strict=True):
        assert band(shade) == pytest.approx((values[1].min(), values[2].max()))
    assert ax.get_yscale() == "log" and len(set(colours(ax.get_lines()))) == 6


def test_by_horizon_takes_a_bare_curve():
    (ax,) = made("by_horizon", {"a": [3.0, 2.0, 1.0], "b": ([1.0, 2.0], [0.5, 1.0], [2.0, 4.0])}, xlabel="place").axes
    assert line(ax, "a").tolist() == [[1, 3], [2, 2], [3, 1]] and line(ax, "b")[:, 1].tolist() == [1, 2]
    assert band(ax.collections[0]) == (0.5, 4) and ax.get_xlabel() == "place"


# All figures

# name -> a function of the number of series that gives the arguments
SERIES = {
    "figure_1": lambda n: (clouds([0.5 * k for k in range(n)]), sweep(), FLOORS, 0.1),
    "guided_pair": lambda n: (tracks(range(n)),),
    "threshold": lambda n: (demonstrations(n), shares(n)),
    "fronts": lambda n: (curves([f"rule {k}" for k in range(n)]), UNGUIDED, 0.1, "rule 0"),
    "states_over_lam": lambda n: (WEIGHTS, distances(n), null(n), 0.4),
    "by_horizon": lambda n: (horizons(n),),
}


@pytest.mark.parametrize("name", SERIES)
def test_no_series_is_dropped(name):
    """More of them than there are colours: each is in the legend."""
    n = 11
    fig = made(name, *SERIES[name](n))
    legends = [ax.get_legend() for ax in fig.axes if ax.get_legend() is not None]
    entries = [[t.get_text() for t in legend.get_texts()] for legend in legends]
    ours = ("λ = ", "guide ", "rule ", "to reference", "model ")
    shown = [[e for e in each if (e.startswith(ours) or e.endswith("steps")) and e != "λ = 0"] for each in entries]
    expected = n - 1 if name in ("figure_1", "guided_pair") else n  # where λ = 0 is a series
    assert shown and all(len(each) == expected for each in shown), shown


BLIND = np.full(3, math.nan)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:(Data has no|Attempt to set|All-NaN|invalid value|constrained_layout):UserWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "name, arguments",
    {
        "figure_1": (clouds((0.0,), 1, math.nan), sweep((0.0,), (1,)).assign(**NOTHING), FLOORS, math.nan),
        "figure_1, one": (clouds((0.0,), 1), sweep((0.0,), (1,)), {"reconstructed": math.nan}, 0.0),
        "guided_pair": ({0.0: (np.zeros((1, 24)), np.full((1, 24), math.nan), np.zeros((1, 45)))},),
        "threshold": ({"a": (BLIND, BLIND)}, {"b": ([1.0], [math.nan], [math.nan])}),
        "threshold, zero": ({"a": ([1.0], [0.0])}, {"b": ([1.0], [0.0], [0.0])}),
        "fronts, one point": ({"a": curve(x=[0.0])}, UNGUIDED, 0.1, "a"),
        "fronts, a rule without errors": ({"a": curve(), "b": (curve()[0], *[BLIND] * 3)}, UNGUIDED, 0.1, "a"),
        "fronts, no errors at all": ({"a": (curve()[0], *[BLIND] * 3)}, (-1.0, math.nan), 0.1, "a"),
        "fronts, errors only past the threshold": (
            {"a": np.array([[0.0, -60.0, -70.0], *[[math.nan, 1.0, 1.0]] * 3])},
            (-1.0, math.nan),
            0.1,
            "a",
        ),
        "fronts, below the unguided": ({"a": curve(x=[-50.0, -60.0, -70.0])}, UNGUIDED, 0.1, "a"),
        "states_over_lam": ([0.0, 1.0], {"a": [math.nan, 0.1]}, {"a": math.nan}, math.nan),
        "states_over_lam, unguided": ([0.0], {"a": [0.0]}, {"a": 0.0}, 0.0),
        "by_horizon": ({"a": [BLIND] * 3, "b": [math.nan], "c": [0.0, 1.0]},),
    }.items(),
)
def test_nan_and_single_values_are_drawn(name, arguments):
    drawn(name.split(",")[0], *arguments)
