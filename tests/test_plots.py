"""Each figure shows the numbers it is given, under labels; files appear whole."""

import math

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from pgdlib import adroit, plots

RNG = np.random.default_rng(0)
T = 12


@pytest.fixture(autouse=True)
def style():
    plots.use_style()
    yield
    plt.close("all")
    plt.rcdefaults()


def sweep(lams=(0.0, 1.0, 2.0, 2.5), diverged=(0, 0, 3, 8), estimators=("reconstructed", "appendix_b")):
    frame = pd.DataFrame({"lam": lams, "diverged": diverged})
    for name in ("log_likelihood", *estimators):
        mean = RNG.random(len(lams)) + 0.5
        frame[[f"{name}.mean", f"{name}.low", f"{name}.high"]] = np.stack([mean, mean - 0.1, mean + 0.1], 1)
    return frame


def clouds(lams=(0.0, 1.0), n=5, value=None):
    names = ("log_likelihood", "reconstructed", "appendix_b")
    return {lam: {k: np.full(n, value) if value is not None else RNG.random(n) for k in names} for lam in lams}


FLOORS = {"reconstructed": 1e-3, "appendix_b": 0.5}
NOTHING = {f"{name}.{k}": math.nan for name in ("log_likelihood", *FLOORS) for k in ("mean", "low", "high")}
GROUPS = {g: {"ours": 1e-3, "theirs": 0.5, "still": 0.0} for g in adroit.OBS_SLICES}

# name -> (arguments, the x label of every axis that has one)
FIGURES = {
    "returns": (({"a": RNG.normal(size=50), "b": RNG.normal(size=9)}, {"random": 96.0, "expert": 3077.0}), ["return on D4RL"]),
    "episode": ((RNG.normal(size=(T, 45)), RNG.normal(size=T)), ["time (s)"] * 3),
    "floors": ((GROUPS,), ["one-step squared error / variance"]),
    "coverage": (([4, 8, 12], [1.0, 0.7, 0.2], 8), ["trajectory length"]),
    "learning_curve": (([0, 1e6], [0.0, 900.0], [10.0, 20.0], 3077), ["environment steps"]),
    "training": ((RNG.random(300) + 0.1, [0.1, 1, 10], [0.2, 0.5, 1], [0.3, 0.6, 1]), ["training step", "noise level"]),
    "channels": (([RNG.random((3, T))] * 2, [RNG.random((4, T))] * 2, ["p", "q"]), ["time (s)"] * 2),
    "quantiles": ((RNG.normal(size=(99, 71)), RNG.normal(size=(80, 71))), ["data (std)"]),
    "figure_1": ((clouds(), sweep(), FLOORS, 0.1), ["log-likelihood", "guidance weight λ"] * 2),
    "sharpness": ((RNG.random(24), RNG.random(24)), ["action dimension"]),
    "guided_pair": (
        ({lam: tuple(RNG.normal(size=(T, k)) for k in (24, 24, 45)) for lam in (0.0, 2.0)},),
        ["time (s)"] * 4,
    ),
}


def drawn(name, *arguments, **named):
    """The figure, rendered: what cannot be drawn fails here."""
    fig = getattr(plots, name)(*arguments, title="on stand-in pen-toy", **named)
    assert isinstance(fig, Figure)
    fig.canvas.draw()
    return fig


def texts(fig):
    return [t.get_text() for t in fig.findobj(matplotlib.text.Text)]


def test_every_function_is_tested():
    public = {
        k for k, v in vars(plots).items() if callable(v) and getattr(v, "__module__", "") == plots.__name__ and k[0] != "_"
    }
    assert public == {*FIGURES, "save", "use_style"}


@pytest.mark.parametrize("name", FIGURES)
def test_titles_and_labels(name):
    arguments, labels = FIGURES[name]
    fig = drawn(name, *arguments)
    assert "on stand-in pen-toy" in texts(fig)
    found = [ax.get_xlabel() for ax in fig.axes if ax.get_xlabel()]
    assert len(found) == len(labels) and all(f.startswith(expected) for f, expected in zip(found, labels)), found
    shared = name in ("episode", "guided_pair", "floors")  # the labels of their y axes are titles or names of rows
    assert shared or sum(bool(ax.get_ylabel()) for ax in fig.axes) >= len(labels) - (name == "channels")


def line(ax, label):
    (found,) = [ln for ln in ax.get_lines() if ln.get_label() == label]
    return found.get_xydata()


def test_returns_shows_fractions_and_references():
    groups = {"a": np.array([0.0, 0, 0, 100]), "b": np.array([50.0])}
    (ax,) = drawn("returns", groups, {"expert": 3077.0}).axes
    heights = [[p.get_height() for p in c.patches] for c in ax.containers]
    assert [sum(h) for h in heights] == pytest.approx([1, 1]) and max(heights[0]) == pytest.approx(0.75)
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert labels == ["a (n=4)", "b (n=1)", "expert: 3,077"]
    assert line(ax, "expert: 3,077")[:, 0].tolist() == [3077, 3077]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_returns_that_are_not_finite_leave_the_others_in_sight():
    (ax,) = drawn("returns", {"a": np.array([1.0, math.nan, 5, math.inf]), "b": np.array([math.nan])}, {"expert": 9.0}).axes
    assert [sum(p.get_height() for p in c.patches) for c in ax.containers] == pytest.approx([0.5, 0])
    low, high = ax.get_xlim()
    assert low < 1 and 9 < high < 20


def test_floors_leave_out_zeros():
    (ax,) = drawn("floors", GROUPS).axes
    assert ax.get_xscale() == "log" and [t.get_text() for t in ax.get_yticklabels()] == list(GROUPS)
    assert line(ax, "theirs")[:, 0].tolist() == [0.5] * 8 and np.isnan(line(ax, "still")[:, 0]).all()
    assert (np.diff(line(ax, "ours")[:, 1]) < 0).all()  # the first group on top


def test_learning_curve_in_millions():
    (ax,) = drawn("learning_curve", [0, 2_000_000], [0, 900], [10, 20], 3077).axes
    assert ax.get_lines()[0].get_xydata().tolist() == [[0, 0], [2, 900]]
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(900 + 1.96 * 20)


def test_training_smooths():
    left, right = drawn("training", np.r_[np.ones(500), np.full(500, 3.0)], [1, 10], [0.2, 1], [0.4, 1]).axes
    x, y = left.get_lines()[0].get_xydata().T
    assert x[0] == 10 and x[-1] == 1000 and y[[0, -1]].tolist() == pytest.approx([1, 3])
    assert line(right, "validation windows")[:, 1].tolist() == [0.4, 1] and "log" == right.get_yscale() == left.get_yscale()


def test_figure_1_shows_both_estimators_with_floors_and_divergence():
    given, frame = clouds(), sweep()
    fig = drawn("figure_1", given, frame, FLOORS, 0.25)
    lefts, rights, twins = fig.axes[0:4:2], fig.axes[1:4:2], fig.axes[4:]
    assert len(fig.axes) == 6
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
        assert any("diverged" in t.get_text() for t in right.texts)
    assert not any("diverged" in t for t in texts(drawn("figure_1", given, sweep(diverged=(0,) * 4), FLOORS, 0.25)))


@pytest.mark.filterwarnings("ignore:(Data has no positive|Attempt to set non-positive|All-NaN|invalid value):UserWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "name, arguments",
    {
        "returns": ({"a": np.array([7.0])}, {"expert": 3077.0}),
        "returns, some NaN": ({"a": np.array([1.0, math.nan]), "b": np.array([math.nan])}, {"expert": 3077.0}),
        "returns, no reference": ({"a": np.array([7.0, 8.0])}, {}),
        "episode": (np.full((1, 45), math.nan), np.array([math.nan])),
        "floors": ({"one group": {"ours": math.nan, "theirs": 1.0}},),
        "coverage": ([4], [math.nan], 4),
        "learning_curve": ([0], [math.nan], [math.nan], 3077),
        "training": (np.array([0.5]), [1.0], [math.nan], [0.5]),
        "channels": ([np.full((1, 1), math.nan)], [np.zeros((0, 1))], ["none generated"]),
        "quantiles": (np.full((1, 71), math.nan), np.zeros((1, 71))),
        "figure_1": (clouds((0.0,), 1, math.nan), sweep((0.0,), (1,)).assign(**NOTHING), FLOORS, math.nan),
        "figure_1, one": (clouds((0.0,), 1), sweep((0.0,), (1,)), {"reconstructed": math.nan}, 0.0),
        "sharpness": (np.full(1, math.nan), np.zeros(1)),
        "guided_pair": ({0.0: (np.zeros((1, 24)), np.full((1, 24), math.nan), np.zeros((1, 45)))},),
    }.items(),
)
def test_nan_and_single_values_are_drawn(name, arguments):
    drawn(name.split(",")[0], *arguments)


def files(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def test_save_writes_figure_and_table(runs):
    fig = drawn("sharpness", *FIGURES["sharpness"][0])
    assert plots.save(fig, "name", "ci", {"x": [1, 2], "y": [0.5, math.nan]}) is fig
    plots.save(fig, "bare", "quick")
    assert files(runs) == ["figures/ci/name.csv", "figures/ci/name.png", "figures/quick/bare.png"]
    assert (runs / "figures/ci/name.csv").read_text().split() == ["x,y", "1,0.5", "2,"]
    assert plt.imread(runs / "figures/ci/name.png").std() > 0.01
    plots.save(fig, "name", "ci", pd.DataFrame({"z": [3]}))
    assert (runs / "figures/ci/name.csv").read_text().split() == ["z", "3"] and len(files(runs)) == 3


@pytest.mark.parametrize("broken", ["savefig", "to_csv"])
def test_an_interrupted_save_leaves_the_old_file_and_no_other(runs, monkeypatch, broken):
    fig = drawn("sharpness", *FIGURES["sharpness"][0])
    plots.save(fig, "name", "ci", {"x": [1]})
    before = {f: (runs / f).read_bytes() for f in files(runs)}

    def fail(self, path, **how):
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure if broken == "savefig" else pd.DataFrame, broken, fail)
    with pytest.raises(KeyboardInterrupt):
        plots.save(drawn("coverage", *FIGURES["coverage"][0]), "name", "ci", {"x": [2]})
    after = {f: (runs / f).read_bytes() for f in files(runs)}
    assert after.keys() == before.keys() and after["figures/ci/name.csv"] == before["figures/ci/name.csv"]
    assert (after == before) == (broken == "savefig")
