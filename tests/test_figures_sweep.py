"""Figures of a sweep: what they show of frames that are made by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from conftest import assert_labelled, drawn, line, texts

from pgdlib.lab import figures
from pgdlib.lab.sweep import results


def study():
    """Two rules on two datasets; the first rule falls, and then diverges, past its third λ."""
    rows = []
    for dataset, shift in (("human", 0.0), ("cloned", 1.0)):
        for rule, last in (("explicit", -500.0), ("annealed", 0.0)):
            for lam, x in zip((0.0, 0.1, 1.0, 3.0), (-2.0, -1.0, -0.5, last)):
                y = 0.1 * (1 + lam) + shift
                row = [dataset, rule, lam, x, x - 0.1, x + 0.1, *((math.nan,) * 3 if x < -9 else (y, y - 0.05, y + 0.05))]
                rows.append(row)
    names = [f"{m}.{k}" for m in ("log_likelihood", "relative") for k in ("mean", "low", "high")]
    return pd.DataFrame(rows, columns=["dataset", "rule", "lam", *names])


@pytest.mark.usefixtures("style")
def test_fronts_show_every_mean_up_to_where_the_likelihood_falls():
    fig = drawn(figures.sweep, "fronts", study())
    assert_labelled(fig, ["log-likelihood"] * 2)
    assert {"human", "cloned", "explicit", "annealed", "λ = 0"} <= set(texts(fig))
    for ax, shift in zip(fig.axes, (0.0, 1.0)):
        assert np.allclose(line(ax, "annealed")[:, 1], np.array([0.1, 0.11, 0.2, 0.4]) + shift)
        assert line(ax, "explicit")[:, 0].tolist() == [-2, -1, -0.5]
        assert np.allclose(line(ax, "λ = 0"), [[-2, 0.1 + shift]])


def at_likelihood():
    rows = [("human", "explicit", -2.0, 1.1), ("human", "explicit", -0.4, 0.9), ("cloned", "explicit", -2.0, 1.2)]
    rows += [("cloned", "smoothed", -2.0, 1.5)]  # there no rule reaches -0.4
    table = pd.DataFrame(rows, columns=["dataset", "rule", "log_likelihood", "ratio.mean"])
    return table.assign(**{"ratio.low": table["ratio.mean"] - 0.1, "ratio.high": table["ratio.mean"] + 0.2})


@pytest.mark.usefixtures("style")
def test_at_likelihood_shows_a_mark_with_its_interval_for_each_rule():
    fig = figures.sweep.at_likelihood(at_likelihood(), "annealed", "A study")
    fig.canvas.draw()
    assert {"human", "cloned", "explicit", "smoothed", "-2", "-0.4"} <= set(texts(fig))
    for ax, marks in zip(fig.axes, ({-2: [1.1], -0.4: [0.9]}, {-2: [1.2, 1.5], -0.4: []})):
        assert "error / that of annealed" in ax.get_xlabel()
        for container in ax.containers:
            level = float(container.get_label().split()[0])
            assert container[0].get_xdata().tolist() == marks[level]
            assert np.allclose(np.round(container[0].get_ydata()), range(len(marks[level])))
            ends = np.array(container[2][0].get_segments()).reshape(-1, 2, 2)[:, :, 0]
            assert np.allclose(ends, np.array(marks[level])[:, None] + [-0.1, 0.2])


def gains():
    """Two rows of two runs each on human, one row of one run on cloned."""
    rows = [
        ("human", "guided", 0, 50.0),
        ("human", "guided", 1, 150.0),
        ("human", "world", 0, -10.0),
        ("human", "world", 1, -30.0),
    ]
    runs = pd.DataFrame([*rows, ("cloned", "world", 0, 7.0)], columns=["dataset", "row", "seed", "gain"])
    return runs.assign(low=runs["gain"] - 20, high=runs["gain"] + 25)


@pytest.mark.usefixtures("style")
def test_gains_show_each_run_their_mean_and_the_papers():
    means = results.over_seeds(gains(), ["dataset", "row"], ["gain"])
    fig = drawn(figures.sweep, "gains", gains(), means, {"human": 216})
    assert {"human", "cloned", "guided", "world", "mean over runs", "the paper's gain"} <= set(texts(fig))
    assert_labelled(fig, ["return less that of unguided"] * 2)
    for ax, runs, mean in zip(fig.axes, ({50, 150, -10, -30}, {7}), ([100, -20], [7])):
        drawn_runs = [c for c in ax.containers if c.get_label().startswith("one run")]
        assert {x for c in drawn_runs for x in c[0].get_xdata()} == runs
        for c in drawn_runs:
            ends = np.array(c[2][0].get_segments())[:, :, 0]
            assert ends.tolist() == [[x - 20, x + 25] for x in c[0].get_xdata()]
        (over,) = [c for c in ax.containers if c.get_label() == "mean over runs"]
        assert over[0].get_xdata().tolist() == mean
        rows = [fig.axes[0].get_yticklabels()[round(y)].get_text() for y in over[0].get_ydata()]
        assert rows == (["guided", "world"] if len(mean) == 2 else ["world"])
    assert line(fig.axes[0], "the paper's gain")[:, 0].tolist() == [216, 216]
    assert "the paper's gain" not in {artist.get_label() for artist in fig.axes[1].lines}


@pytest.mark.usefixtures("style")
def test_over_lam_shows_both_measures_and_what_is_unguided():
    fig = drawn(figures.sweep, "over_lam", study())
    assert_labelled(fig, ["λ, in each rule's own sense"] * 2)
    above, below = fig.axes[:2]
    assert np.allclose(line(above, "explicit"), [[0.1, -1], [1, -0.5], [3, -500]])
    assert np.allclose(line(below, "annealed"), [[0.1, 0.11], [1, 0.2], [3, 0.4]])
    assert above.get_ylim()[0] > -3 and above.get_ylim()[1] > 0  # what diverged does not decide what is seen
    band = above.collections[1].get_paths()[0].vertices
    assert np.isclose(band[:, 1].max(), 0.1) and np.allclose(line(above, "λ = 0")[:, 1], -2)


@pytest.mark.slow
@pytest.mark.usefixtures("style")
@pytest.mark.parametrize("figure", ["fronts", "over_lam"])
def test_one_seed_and_nothing_but_nan_can_be_drawn(figure):
    frame = study()
    frame.loc[:, [c for c in frame if c.endswith(("low", "high"))]] = math.nan  # one seed has no interval
    drawn(figures.sweep, figure, frame)
    frame[["log_likelihood.mean", "relative.mean"]] = math.nan
    drawn(figures.sweep, figure, frame)
    table = at_likelihood().assign(**{"ratio.low": math.nan, "ratio.high": math.nan})
    figures.sweep.at_likelihood(table, "annealed", "One seed").canvas.draw()
    one = gains().drop_duplicates(["dataset", "row"]).assign(low=math.nan, high=math.nan)
    drawn(figures.sweep, "gains", one, results.over_seeds(one, ["dataset", "row"], ["gain"]), {})
