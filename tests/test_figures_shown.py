"""Each figure shows the numbers it is given, and where it transforms them, what must come of it."""

import math

import numpy as np
import pytest
from conftest import TITLE, line, texts
from matplotlib.colors import to_rgb
from test_figures import FLOORS, MULTIPLES, PAPER, PEN, RULES, SEEDS, T, clouds, curve, draw, lams, samplers

from pgdlib import measures
from pgdlib.lab import seeds
from pgdlib.lab.figures import data, guidance, style, table1

pytestmark = pytest.mark.usefixtures("style")
NAN = math.nan


def band(collection):
    """(lowest, highest) of a filled band."""
    y = np.concatenate([p.vertices[:, 1] for p in collection.get_paths()])
    return y.min(), y.max()


def in_view(ax, points):
    """Whether all finite points [n, 2] lie within the axes, to a thousandth of their width."""
    points = np.asarray(points, dtype=float)
    shares = ax.transAxes.inverted().transform(ax.transData.transform(points[np.isfinite(points).all(1)]))
    return len(shares) > 0 and (shares > -1e-3).all() and (shares < 1.001).all()


# Data, denoiser, guide


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_returns_are_shares_of_all_episodes_whatever_is_finite():
    groups = {"a": np.array([1.0, NAN, 5, math.inf]), "b": np.array([0.0, 0, 0, 100]), "c": np.array([NAN])}
    fig = draw(data.returns, groups, {"expert": 3077.0})
    heights = [[p.get_height() for p in c.patches] for c in fig.axes[0].containers]
    assert [sum(h) for h in heights] == pytest.approx([0.5, 1, 0]) and max(heights[1]) == pytest.approx(0.75)
    assert {"a (n=4)", "b (n=4)", "c (n=1)", "expert: 3,077"} <= set(texts(fig))
    assert line(fig.axes[0], "expert: 3,077")[:, 0].tolist() == [3077, 3077] and fig.axes[0].get_xlim()[1] < 4000


def test_an_episode_shows_the_pens_axis_its_target_and_its_height():
    obs = np.arange(2 * 45.0).reshape(2, 45)
    axis, height, reward = draw(data.episode, obs, np.array([7.0, 8.0]), PEN).axes
    solid, dotted = axis.get_lines()[:3], axis.get_lines()[3:]
    assert [ln.get_ydata()[0] for ln in (*solid, *dotted)] == [33, 34, 35, 36, 37, 38] and dotted[0].get_linestyle() == ":"
    assert height.get_lines()[0].get_xydata().tolist() == [[0, 26], [0.01, 71]]
    assert reward.get_lines()[0].get_ydata().tolist() == [7, 8]


def test_restoring_shows_noise_at_unit_variance_and_the_error_of_each_estimate():
    clean, sigmas = np.zeros((36, T)), [0.5, 2.0]
    noised = clean + np.reshape(sigmas, (2, 1, 1)) * np.ones((36, T))
    axes = draw(data.restoring, clean, noised, clean + np.reshape([0.1, 0.2], (2, 1, 1)), sigmas).axes[:6]
    values = [0.5 / 1.25**0.5, 2 / 5**0.5, 0, 0.1, 0.2, 0]  # above: two noised, the truth; below as many
    for ax, value in zip(axes, values, strict=True):
        np.testing.assert_allclose(np.asarray(ax.get_images()[0].get_array()), np.full((36, T), value))
    titles = [ax.get_title() for ax in axes]
    assert titles[:2] == ["noised, σ = 0.5", "noised, σ = 2"]
    assert titles[3:5] == ["denoised, error 0.01", "denoised, error 0.04"]


def test_floors_leave_out_zeros_and_begin_on_top():
    (ax,) = draw(data.floors, {g: {"theirs": 0.5, "still": 0.0} for g in ("hand", "pen")}).axes
    assert ax.get_xscale() == "log" and [t.get_text() for t in ax.get_yticklabels()] == ["hand", "pen"]
    assert line(ax, "theirs").tolist() == [[0.5, 0], [0.5, 1]] and np.isnan(line(ax, "still")[:, 0]).all()
    assert ax.yaxis_inverted()


def test_the_guides_learning_curve_is_in_millions_with_95_percent():
    (ax,) = draw(data.learning_curve, [0, 2_000_000], [0, 900], [10, 20], 3077).axes
    assert ax.get_lines()[0].get_xydata().tolist() == [[0, 0], [2, 900]]
    assert band(ax.collections[0])[1] == pytest.approx(900 + 1.96 * 20)


def test_training_is_smoothed_over_a_hundredth():
    losses = {"short": np.full(10, 2.0), "long": np.r_[np.ones(500), np.full(500, 3.0)]}
    left, right = draw(data.training, losses, [1, 10], [0.2, 1], [0.4, 1]).axes
    x, y = line(left, "long").T
    assert (
        line(left, "short")[:, 1].tolist() == [2] * 10
        and x[0] == 10
        and x[-1] == 1000
        and y[[0, -1]].tolist() == pytest.approx([1, 3])
    )
    assert line(right, "validation windows")[:, 1].tolist() == [0.4, 1] and "log" == right.get_yscale() == left.get_yscale()


def test_quantiles_and_sensitivity_show_what_they_are_given():
    (ax,) = draw(data.quantiles, np.arange(101.0)[:, None] / 50, np.arange(101.0)[:, None] / 100).axes
    assert line(ax, "95%").tolist() == [[1.9, 0.95]]
    (ax,) = draw(data.sensitivity, MULTIPLES, {"ours": [1.0, 2.0, 3.0]}, {"ours": (0.5, 0.4, 0.6)}).axes
    assert line(ax, "ours").tolist() == [[0.5, 1], [1, 2], [1.5, 3]]
    assert (ax.patches[0].get_y(), ax.patches[0].get_height()) == pytest.approx((0.4, 0.2))


@pytest.mark.parametrize("lowest", [0.1, -0.1])  # distances are zero in the mean where nothing differs
def test_sampler_quality_shows_every_sampler_in_sight(lowest):
    frame = samplers(3, lowest)
    for ax, name in zip(draw(data.sampler_quality, frame).axes, ("error", "motion", "relative", "distance"), strict=True):
        for container, (family, rows) in zip(ax.containers, frame.groupby("family", sort=False), strict=True):
            np.testing.assert_allclose(container[0].get_xydata(), rows[["evaluations", f"{name}.mean"]])
            ends = [segment[:, 1] for segment in container[2][0].get_segments()]
            np.testing.assert_allclose(ends, rows[[f"{name}.low", f"{name}.high"]])
            assert container.get_label() == family
        assert ax.get_ylim()[0] <= min(0, lowest) and lowest + 0.1 <= ax.get_ylim()[1]
        assert [ln.get_ydata()[0] for ln in ax.get_lines() if ln.get_label() == "real data"] == [0.5] * (name != "relative")


# Table 1


def test_curves_show_means_and_errors_of_the_seeds_that_are_left():
    values = np.array([[0.0, 2.0, 4.0], [10.0, NAN, 40.0], [500.0, NAN, NAN]])
    fig = draw(table1.curves, [0, 10, 20], {"guided": values}, [5, 10])
    (ax,) = fig.axes
    np.testing.assert_allclose(line(ax, "guided"), [[0, 2], [10, 25], [20, 500]])
    vertices = np.concatenate([p.vertices for p in ax.collections[0].get_paths()])
    for step, (low, high) in {0: (2 - 2 / 3**0.5, 2 + 2 / 3**0.5), 10: (10, 40)}.items():
        around = vertices[vertices[:, 0] == step, 1]
        assert (around.min(), around.max()) == pytest.approx((low, high))
    assert not (vertices[:, 0] == 20).any()  # one seed has no error
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["guided", "new synthetic data"]


def test_table_1_has_all_rows_from_the_top_their_numbers_and_every_seed():
    rows = {"cloning": SEEDS, "lost": np.array([2000.0, NAN, 2400.0, 2200.0, 2300.0])}
    (ax,) = draw(table1.table1, rows, (1500.0, 25.0), PAPER, PEN.simulator.score).axes
    means = {"behaviour (± over episodes)": (1500.0, 25.0), **{k: seeds.mean_se(v) for k, v in rows.items()}, **PAPER}
    heights = dict(zip((t.get_text() for t in ax.get_yticklabels()), ax.get_yticks(), strict=True))
    assert list(heights) == list(means) and np.diff([*heights.values()]).tolist() == pytest.approx([1, 1, 1.7, 1])
    assert ax.yaxis_inverted()
    beside = {t.xy[1]: " ".join(t.get_text().split()) for t in ax.texts if t.xycoords == ("axes fraction", "data")}
    bars = {c.lines[0].get_ydata()[0]: c for c in ax.containers}
    for name, (mean, se) in means.items():
        text = f"{mean:,.0f}" if math.isnan(se) else f"{mean:,.0f} ± {se:,.0f}"
        assert beside[heights[name]] == f"{text} {(mean - 96.262799) / 29.80570274:.1f}"
        points, _, (bar,) = bars[heights[name]].lines
        se = np.nan_to_num(se)
        assert bar.get_segments()[0][:, 0].tolist() == pytest.approx([mean - se, mean + se])
        assert points.get_xdata()[0] == mean and points.get_marker() == ("s" if name in PAPER else "o")
    assert beside[heights["cloning"]] == "1,200 ± 71 37.0"
    for name, values in rows.items():
        (ticks,) = [ln for ln in ax.get_lines() if len(ln.get_xdata()) == 5 and abs(ln.get_ydata()[0] - heights[name]) < 0.4]
        np.testing.assert_array_equal(ticks.get_xdata(), values)  # what is NaN is not drawn
        _, low, high = measures.bootstrap(seeds.interquartile_mean, values)
        (pale,) = [ln for ln in ax.get_lines() if ln.get_alpha() == 0.25 and ln.get_ydata()[0] == heights[name]]
        assert tuple(pale.get_xdata()) == (low, high) and to_rgb(pale.get_color()) == to_rgb(ticks.get_color())


# Guidance


@pytest.mark.parametrize("limit, shown", [(2.0, True), (2.5, True), (9.0, False), (None, False)])
def test_figure_1_shows_both_estimators_with_floors_divergence_and_the_limit(limit, shown):
    given, frame = clouds(2), lams()
    axes = draw(guidance.figure_1, given, frame, FLOORS, 0.25, limit).axes
    for left, right, twin, estimator in zip(axes[0:4:2], axes[1:4:2], axes[4:], FLOORS, strict=True):
        for lam, values in given.items():
            assert line(left, f"λ = {lam:g}").T.tolist() == [values["log_likelihood"].tolist(), values[estimator].tolist()]
        assert (line(left, "floor: real data")[:, 1] == FLOORS[estimator]).all()
        assert (line(left, "on-policy")[:, 0] == 0.25).all()
        for ax, name in ((right, estimator), (twin, "log_likelihood")):
            means, ring, reference = ax.get_lines()[:3]
            np.testing.assert_allclose(means.get_xydata(), frame[["lam", f"{name}.mean"]])
            np.testing.assert_allclose(ring.get_xydata(), frame.loc[:0, ["lam", f"{name}.mean"]])
            assert set(reference.get_ydata()) == {FLOORS.get(name, 0.25)} and in_view(ax, means.get_xydata())
            assert band(ax.collections[0]) == pytest.approx((frame[f"{name}.low"].min(), frame[f"{name}.high"].max()))
        assert [t.get_text() for t in right.texts] == [" diverged "] and right.patches[0].get_x() == 2
        assert [ln.get_xdata()[0] for ln in right.get_lines() if ln.get_label() == "predicted limit"] == [limit] * shown


def test_figure_1_keeps_to_what_lies_before_the_collapse():
    """A likelihood that falls by thousands does not flatten the curve before it."""
    frame = lams(diverged=(0,) * 4).assign(**{"log_likelihood.mean": [-1.0, -0.5, -0.2, -5000.0]})
    fig = draw(guidance.figure_1, clouds(2), frame, {"normalised": 0.1}, -0.3, None)
    low, high = fig.axes[2].get_ylim()
    assert -1.5 < low < -1 and -0.2 < high < 0 and " diverged " not in texts(fig)


def test_guided_pair_shows_actions_means_and_observations():
    acted, wanted, obs = (np.arange(2 * n).reshape(2, n) + 1000 * n for n in (24, 24, 45))
    axes = guidance.guided_pair({2.0: (acted, -wanted, obs)}, {"turn": 31}, 0.01, TITLE, actions=(3, 5)).axes
    assert [ax.get_title() for ax in axes] == [*(f"action {i} (dotted: guide's mean)" for i in (3, 5)), "turn"]
    assert [[ln.get_ydata()[0] for ln in ax.get_lines()] for ax in axes] == [[24003, -24003], [24005, -24005], [45031]]


def test_threshold_shows_shares_in_percent_and_distances_beyond_all_bounds():
    measured = {"guide": (MULTIPLES, [0.0, 0.1, 1.0], None)}
    left, right = draw(guidance.threshold, {"16 steps": (MULTIPLES, [1e-3, 1e80, math.inf])}, measured).axes
    y = line(left, "16 steps")[:, 1]
    assert y[0] == 1e-3 and np.isfinite(y).all() and (y[1:] > left.get_ylim()[1]).all()
    assert line(right, "guide")[:, 1].tolist() == [0, 10, 100] and in_view(right, line(right, "guide"))


def test_fronts_are_shown_as_far_as_the_likelihood_rises():
    """A point that falls back is left out, one that rises above all before it is not; each front has its own colour."""
    x = np.array([-0.5, 0.0, -0.1, 0.3, -5000.0])
    given = {"first": (x, 1 + x**2, 0.5 + x**2, 1.5 + x**2), **{rule: curve() for rule in RULES}}
    left, right = draw(guidance.fronts, given, (-1.0, 0.5), 0.1, "smoothed").axes
    assert line(left, "first").tolist() == [[-1, 0.5], [-0.5, 1.25], [0.0, 1.0], [0.3, 1.09]]
    assert left.get_xlim()[0] > -2 and line(left, "λ = 0").tolist() == [[-1, 0.5]]
    assert len({ln.get_color() for ln in left.get_lines() if ln.get_label() in given}) == len(given)
    assert all((line(ax, "on-policy")[:, 0] == 0.1).all() for ax in (left, right))


def test_fronts_are_compared_at_equal_likelihood():
    """Straight fronts 0.5 + s (x + 1): the second rule's error over the first's is known at every likelihood."""
    given = {"proximal": curve(2.0), "smoothed": curve(1.0, (-0.9, 0.1)), "explicit": curve(4.0, (-0.7, 0.5))}
    _, right = draw(guidance.fronts, given, (-1.0, 0.5), 0.1, "smoothed").axes
    for rule, slope, end in (("proximal", 2.0, 0.2), ("smoothed", 1.0, 0.1), ("explicit", 4.0, 0.5)):
        x, y = line(right, rule).T
        known = x <= min(end, 0.1)  # where both fronts reach
        np.testing.assert_allclose(y[known], (0.5 + slope * (x + 1))[known] / (0.5 + (x + 1))[known])
        assert known.sum() > 30 and np.isnan(y[~known]).all()


def test_states_over_lam_shows_distances_chance_and_zero():
    """An energy distance is zero in the mean where nothing differs: half of them lie below."""
    for last in (-0.05, 0.2):
        (ax,) = draw(guidance.states_over_lam, [0.0, 0.1, 10.0], {"data": [0.4, 0.1, last]}, {"data": 0.02}, 0.4).axes
        assert in_view(ax, line(ax, "to data")) and ax.get_ylim()[0] <= 0
        assert [0.02, 0.02] in [list(ln.get_ydata()) for ln in ax.get_lines()]
        assert set(line(ax, "calibrated λ = 0.4")[:, 0]) == {0.4}
    x = ax.transData.transform([(w, 0) for w in (0.0, 0.1, 10.0)])[:, 0]
    assert (np.diff(x) > 20).all()  # λ = 0 has a place of its own beside a hundredfold range


def test_by_horizon_counts_from_one_with_or_without_intervals():
    given = {"a": [3.0, 2.0, 1.0], "b": ([1.0, 2.0], [0.5, 1.0], [2.0, 4.0])}
    (ax,) = guidance.by_horizon(given, TITLE, xlabel="place").axes
    assert line(ax, "a").tolist() == [[1, 3], [2, 2], [3, 1]] and line(ax, "b")[:, 1].tolist() == [1, 2]
    assert band(ax.collections[0]) == (0.5, 4) and ax.get_xlabel() == "place" and ax.get_yscale() == "log"


SPANS = [(0.02, 0.04, True), (0.28, 0.42, True), (0.003, 0.08, True), (0.01, 20, True), (1e-7, 1.0, False)]


@pytest.mark.parametrize("low, high, plain", SPANS)
def test_log_axes_have_plain_numbers_where_they_are_short(low, high, plain):
    fig, [[ax]] = style.figure(TITLE, 5, 4, yscale="log", ylim=(low, high))
    style.finished(fig).draw_without_rendering()
    shown = {t.get_text(): v for t, v in zip(ax.get_yticklabels(), ax.get_yticks()) if low <= v <= high}
    assert len(shown) >= 2 and all(float(text) == pytest.approx(v) if plain else "$" in text for text, v in shown.items())
