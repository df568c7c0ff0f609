"""The benchmark's figures show all rows and numbers that they are given, under labels, and no warning is raised."""

import functools
import math

import conftest
import numpy as np
import pytest
from conftest import TITLE, assert_labelled, line, texts
from matplotlib.colors import to_rgb

from pgdlib import measures
from pgdlib.lab import seeds as seedstats
from pgdlib.lab.figures import plots_benchmark

pytestmark = [pytest.mark.usefixtures("style"), pytest.mark.filterwarnings("error")]
drawn = functools.partial(conftest.drawn, plots_benchmark)

STEPS = [0, 10, 20]
CURVES = {
    "real": np.array([[0.0, 2.0, 4.0], [10.0, 20.0, 30.0], [50.0, 60.0, 100.0]]),
    "guided, λ = 2": np.array([[0.0, 2.0, 4.0], [10.0, np.nan, 40.0], [500.0, np.nan, np.nan]]),
}
ROWS = {
    "behaviour cloning": np.array([1000.0, 1200.0, 1400.0, 1100.0, 1300.0]),
    "IQL, real data": np.array([2000.0, np.nan, 2400.0, 2200.0, 2300.0]),
    "IQL, a rule with a rather long name, calibrated λ": np.array([2500.0, 2600.0, 2400.0, 2450.0, 3000.0]),
}
PAPER = {"paper, λ = 0": (2232, 230), "published, IQL": (2436.0, math.nan)}
BEHAVIOUR = 1500.0, 25.0


def colour_of(artist):
    return tuple(np.round(to_rgb(artist.get_color()), 4))


def tick_labels(ax):
    return [t.get_text() for t in ax.get_yticklabels()]


def numbers(fig):
    """{row name: the text beside it}, by the height at which both stand."""
    (ax,) = fig.axes
    places = dict(zip(ax.get_yticks(), tick_labels(ax), strict=True))
    return {places[t.xy[1]]: " ".join(t.get_text().split()) for t in ax.texts if t.xycoords == ("axes fraction", "data")}


def at(fig, name):
    """The height of a row."""
    (ax,) = fig.axes
    return dict(zip(tick_labels(ax), ax.get_yticks(), strict=True))[name]


def test_every_function_is_tested():
    own = {k for k, v in vars(plots_benchmark).items() if getattr(v, "__module__", "") == plots_benchmark.__name__}
    assert own == {"colours", "curves", "table1"}


def test_colours_go_with_the_place_of_a_name():
    names = [f"row {i}" for i in range(12)]
    found = plots_benchmark.colours(names)
    assert list(found) == names and len(set(list(found.values())[:10])) == 10 and found["row 0"] == found["row 10"]


# Curves


def test_curves_show_means_and_errors_of_the_seeds_that_are_left():
    fig = drawn("curves", STEPS, CURVES, [10])
    assert_labelled(fig, ["training step"])
    (ax,) = fig.axes
    assert "return" in ax.get_ylabel()
    np.testing.assert_allclose(line(ax, "real"), [[0, 2], [10, 20], [20, 70]])
    np.testing.assert_allclose(line(ax, "guided, λ = 2"), [[0, 2], [10, 25], [20, 500]])
    bands = [np.concatenate([p.vertices for p in c.get_paths()]) for c in ax.collections]
    assert len(bands) == 2
    for band, expected in zip(bands, ([2 / 3**0.5, 10 / 3**0.5, np.std([50, 60, 100], ddof=1) / 3**0.5], [2 / 3**0.5, 15])):
        means = (2, 20, 70) if len(expected) == 3 else (2, 25)
        for step, mean, error in zip(STEPS, means, expected):
            around = band[band[:, 0] == step, 1]
            assert (around.min(), around.max()) == pytest.approx((mean - error, mean + error))
    assert not (bands[1][:, 0] == 20).any()  # one seed has no error
    vertical = [ln.get_xdata()[0] for ln in ax.get_lines() if ln.get_linestyle() == ":"]
    assert vertical == [10]


def test_new_data_are_in_the_legend_once():
    fig = drawn("curves", STEPS, CURVES, [5, 10, 15])
    (ax,) = fig.axes
    entries = [t.get_text() for t in ax.get_legend().get_texts()]
    assert entries == ["real", "guided, λ = 2", "new synthetic data"]
    assert [ln.get_xdata()[0] for ln in ax.get_lines() if ln.get_linestyle() == ":"] == [5, 10, 15]


def test_no_row_is_dropped_from_the_curves():
    """More of them than there are colours or markers: each has a line and a legend entry, and no two look alike."""
    many = {f"row {i}": CURVES["real"] + i for i in range(13)}
    (ax,) = drawn("curves", STEPS, many, []).axes
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(many)
    for i, name in enumerate(many):
        np.testing.assert_allclose(line(ax, name)[:, 1], [2 + i, 20 + i, 70 + i])
    assert len({(colour_of(ln), ln.get_marker()) for ln in ax.get_lines()}) == 13


@pytest.mark.parametrize(
    "returns",
    {
        "one seed": {"a": np.array([[1.0], [2.0], [3.0]])},
        "a row that is lost": {"a": CURVES["real"], "b": np.full((3, 3), np.nan)},
        "lost on the way": {"a": np.array([[1.0, 2.0], [np.nan, np.nan], [np.nan, np.nan]])},
    }.items(),
    ids=lambda v: v[0],
)
def test_curves_without_errors_or_values_are_drawn(returns):
    name, values = returns
    (ax,) = drawn("curves", STEPS, values, []).axes
    np.testing.assert_allclose(line(ax, "a")[0], [0, values["a"][0].mean()])
    assert name != "one seed" or line(ax, "a")[:, 1].tolist() == [1, 2, 3]


# Table 1


def test_table_1_has_all_rows_from_the_top_and_their_numbers():
    fig = drawn("table1", ROWS, BEHAVIOUR, PAPER)
    assert_labelled(fig, ["return on D4RL's scale"])
    (ax,) = fig.axes
    assert tick_labels(ax) == ["behaviour (± over episodes)", *ROWS, *PAPER]
    shown = ax.transData.transform([(0, y) for y in ax.get_yticks()])[:, 1]
    assert (np.diff(shown) < 0).all()
    expected = {"behaviour (± over episodes)": BEHAVIOUR, **{k: seedstats.mean_se(v) for k, v in ROWS.items()}, **PAPER}
    assert numbers(fig) == {
        name: (f"{m:,.0f}" if math.isnan(se) else f"{m:,.0f} ± {se:,.0f}") + f" {(m - 96.262799) / 29.80570274:.1f}"
        for name, (m, se) in expected.items()
    }
    assert numbers(fig)["behaviour cloning"] == "1,200 ± 71 37.0" and numbers(fig)["published, IQL"] == "2,436 78.5"
    assert sum(t.split() == ["mean", "±", "SE", "score"] for t in texts(fig)) == 1


def test_table_1_draws_each_seed_that_is_left_the_mean_and_its_error():
    fig = drawn("table1", ROWS, BEHAVIOUR, PAPER)
    (ax,) = fig.axes
    means = {**{k: seedstats.mean_se(v) for k, v in ROWS.items()}, "behaviour (± over episodes)": BEHAVIOUR, **PAPER}
    bars = {c.lines[0].get_ydata()[0]: c for c in ax.containers}
    assert len(bars) == 6
    for name, (mean, se) in means.items():
        points, _, (bar,) = bars[at(fig, name)].lines
        assert points.get_xdata()[0] == mean and points.get_marker() == ("s" if name in PAPER else "o")
        low, high = bar.get_segments()[0][:, 0]
        assert (low, high) == pytest.approx((mean, mean) if math.isnan(se) else (mean - se, mean + se))
    for name, values in ROWS.items():
        drawn_seeds = [ln for ln in ax.get_lines() if len(ln.get_xdata()) == 5]
        (seeds,) = [ln for ln in drawn_seeds if abs(ln.get_ydata()[0] - at(fig, name)) < 0.4]
        np.testing.assert_array_equal(seeds.get_xdata(), values)  # what is NaN is not drawn
        assert seeds.get_marker() == "|" and seeds.get_linestyle() in ("None", "none")
        _, low, high = measures.bootstrap(seedstats.interquartile_mean, values)
        pale = [ln for ln in ax.get_lines() if ln.get_alpha() == 0.25 and ln.get_ydata()[0] == at(fig, name)]
        assert [tuple(ln.get_xdata()) for ln in pale] == [(low, high)] and values[np.isfinite(values)].min() <= low < high
    lo, hi = ax.get_xlim()
    assert lo < 1000 and hi > 3000


def test_a_row_has_the_same_colour_in_both_figures():
    (curves,), (table,) = (
        fig.axes for fig in (drawn("curves", [0, 1], {k: np.stack([v, v]) for k, v in ROWS.items()}, []),
                             drawn("table1", ROWS, BEHAVIOUR, PAPER))
    )  # fmt: skip
    heights = dict(zip(tick_labels(table), table.get_yticks(), strict=True))
    seen = set()
    for name in ROWS:
        (ours,) = [ln for ln in curves.get_lines() if ln.get_label() == name]
        near = [ln for ln in table.get_lines() if len(ln.get_ydata()) and abs(ln.get_ydata()[0] - heights[name]) < 0.4]
        theirs = {colour_of(ln) for ln in near if ln.get_xdata()[0] != 0}
        assert theirs == {colour_of(ours)}
        seen |= theirs
    assert len(seen) == 3


def test_what_others_measured_stands_apart():
    fig = drawn("table1", ROWS, BEHAVIOUR, PAPER)
    (ax,) = fig.axes
    gaps = np.diff(ax.get_yticks())
    np.testing.assert_allclose(gaps, [1, 1, 1, 1.7, 1])
    (divider,) = [ln.get_ydata()[0] for ln in ax.get_lines() if len(ln.get_xdata()) == 2 and list(ln.get_xdata()) == [0, 1]]
    assert ax.get_yticks()[3] < divider < ax.get_yticks()[4]
    alone = drawn("table1", ROWS, BEHAVIOUR, {})
    assert tick_labels(alone.axes[0]) == ["behaviour (± over episodes)", *ROWS]


@pytest.mark.parametrize("rows", [1, 3, 8, 12])
def test_no_text_runs_into_another_or_out_of_the_figure(rows):
    long = "IQL, a rule with a rather long name, λ = 1"
    fig = drawn("table1", {f"{long}{i}": ROWS["behaviour cloning"] + i for i in range(rows)}, BEHAVIOUR, PAPER)
    (ax,) = fig.axes
    renderer = fig.canvas.get_renderer()
    shown = [t for t in (*ax.texts, *ax.get_yticklabels(), *ax.get_xticklabels(), ax.title, ax.xaxis.label) if t.get_text()]
    boxes = {t: t.get_window_extent(renderer) for t in shown}
    assert all(boxes[t].x0 >= ax.get_window_extent(renderer).x1 for t in ax.texts)  # beside what is drawn
    low, high = ax.get_xlim()
    ticks_out = {t for t, x in zip(ax.get_xticklabels(), ax.get_xticks()) if not low <= x <= high}
    boxes = {t: b for t, b in boxes.items() if t not in ticks_out}
    for i, (t, a) in enumerate(boxes.items()):
        assert a.x0 >= -1 and a.x1 <= fig.bbox.x1 + 1 and a.y0 >= -1 and a.y1 <= fig.bbox.y1 + 1, t
        for other, b in list(boxes.items())[i + 1 :]:
            assert not (min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1), (t, other)
    assert ax.get_window_extent(renderer).width > 0.2 * fig.bbox.width


@pytest.mark.parametrize(
    "values, text",
    {"one seed": ([500.0], "500"), "one left": ([500.0, math.nan], "500"), "none left": ([math.nan, math.nan], "nan")}.values(),
)
def test_rows_without_errors_or_values_are_drawn(values, text):
    fig = drawn("table1", {"it": np.array(values), "other": ROWS["behaviour cloning"]}, BEHAVIOUR, {})
    assert numbers(fig)["it"].split()[0] == text and "±" not in numbers(fig)["it"]
    assert tick_labels(fig.axes[0]) == ["behaviour (± over episodes)", "it", "other"] and TITLE in texts(fig)
