"""Each figure shows the numbers it is given, under labels; files appear whole."""

import functools
import math

import conftest
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import TITLE, assert_labelled, line
from matplotlib.figure import Figure

from pgdlib.lab.figures import plots
from pgdlib.simulators import pen as adroit

pytestmark = pytest.mark.usefixtures("style")
RNG = np.random.default_rng(0)
T = 12
GROUPS = {g: {"ours": 1e-3, "theirs": 0.5, "still": 0.0} for g in adroit.OBS_SLICES}

SIZES = [1e-3, 1e-2, 1e-1]
NOTICED = {"ours": [0.02, 0.1, 3.0], "theirs": [5.0, 5.0, 6.0], "still": [0.5, 0.5, 0.5]}
BANDS = {"ours": (0.02, 0.01, 0.03), "theirs": (5.0, 4.0, 7.0), "still": (0.5, 0.4, 0.6)}


MEASURES = ("error", "motion", "relative", "distance")


def samplers(families=("multistep", "Heun", "Heun with churn"), lowest=0.1):
    """Two samplers of each family; the least distance is `lowest`."""
    frame = pd.DataFrame({"family": np.repeat(families, 2), "evaluations": np.arange(2 * len(families)) + 8})
    for name, real in zip(MEASURES, (0.01, 0.4, math.nan, 0.02), strict=True):
        frame[f"{name}.mean"] = lowest + np.arange(len(frame))
        frame[f"{name}.low"], frame[f"{name}.high"] = frame[f"{name}.mean"] - 0.05, frame[f"{name}.mean"] + 0.1
        frame[f"{name}.real"] = real
    return frame


# name -> (arguments, the x label of every axis that has one)
FIGURES = {
    "returns": (({"a": RNG.normal(size=50), "b": RNG.normal(size=9)}, {"random": 96.0, "expert": 3077.0}), ["return on D4RL"]),
    "episode": ((RNG.normal(size=(T, 45)), RNG.normal(size=T)), ["time (s)"] * 3),
    "restoring": ((RNG.normal(size=(36, T)), *RNG.normal(size=(2, 2, 36, T)), [0.5, 2.0]), ["step"] * 3),
    "floors": ((GROUPS,), ["one-step squared error / variance"]),
    "coverage": (([4, 8, 12], [1.0, 0.7, 0.2], 8), ["trajectory length"]),
    "learning_curve": (([0, 1e6], [0.0, 900.0], [10.0, 20.0], 3077), ["environment steps"]),
    "training": ((RNG.random(300) + 0.1, [0.1, 1, 10], [0.2, 0.5, 1], [0.3, 0.6, 1]), ["training step", "noise level"]),
    "channels": (([RNG.random((3, T))] * 2, [RNG.random((4, T))] * 2, ["p", "q"]), ["time (s)"] * 2),
    "quantiles": ((RNG.normal(size=(99, 71)), RNG.normal(size=(80, 71))), ["data (std)"]),
    "sharpness": ((RNG.random(24), RNG.random(24)), ["action dimension"]),
    "sensitivity": ((SIZES, NOTICED, BANDS), ["injected noise"]),
    "loss_against_error": ((RNG.random(20), RNG.random(20)), ["denoising loss"]),
    "sampler_quality": ((samplers(),), ["network evaluations"] * 4),
}

drawn = functools.partial(conftest.drawn, plots)


def test_every_function_is_tested():
    public = {
        k for k, v in vars(plots).items() if callable(v) and getattr(v, "__module__", "") == plots.__name__ and k[0] != "_"
    }
    assert public == {*FIGURES, "save", "use_style"}


@pytest.mark.parametrize("name", FIGURES)
def test_titles_and_labels(name):
    arguments, labels = FIGURES[name]
    fig = drawn(name, *arguments)
    assert_labelled(fig, labels)
    # the labels of their y axes are titles or names of rows
    shared = name in ("episode", "floors", "sampler_quality", "restoring")
    assert shared or sum(bool(ax.get_ylabel()) for ax in fig.axes) >= len(labels) - (name == "channels")


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


def test_restoring_shows_noise_at_unit_variance_and_the_error_of_each_estimate():
    clean, sigmas = np.zeros((36, T)), [0.5, 2.0]
    noised = clean + np.reshape(sigmas, (2, 1, 1)) * np.ones((36, T))
    fig = drawn("restoring", clean, noised, clean + np.reshape([0.1, 0.2], (2, 1, 1)), sigmas)
    shown = [np.asarray(ax.get_images()[0].get_array()) for ax in fig.axes[:6]]  # above: two noised, the truth; below as many
    values = [0.5 / 1.25**0.5, 2 / 5**0.5, 0, 0.1, 0.2, 0]
    for image, value in zip(shown, values, strict=True):
        np.testing.assert_allclose(image, np.full((36, T), value))
    titles = [ax.get_title() for ax in fig.axes[:6]]
    assert titles[:2] == ["noised, σ = 0.5", "noised, σ = 2"]
    assert titles[3:5] == ["denoised, error 0.01", "denoised, error 0.04"]


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


def test_sensitivity_shows_every_estimator_with_its_band():
    (ax,) = plots.sensitivity(SIZES, NOTICED, BANDS, TITLE).axes
    for (name, values), patch in zip(NOTICED.items(), ax.patches, strict=True):
        assert line(ax, name).tolist() == [[x, y] for x, y in zip(SIZES, values, strict=True)]
        assert (patch.get_y(), patch.get_y() + patch.get_height()) == pytest.approx(BANDS[name][1:])
    assert ax.get_xscale() == ax.get_yscale() == "log" and len({ln.get_color() for ln in ax.get_lines()}) == 3


def test_loss_against_error_shows_every_trajectory():
    loss, error = RNG.random((2, 30)) + 1e-3
    (ax,) = plots.loss_against_error(loss, error, TITLE).axes
    assert ax.get_lines()[0].get_xydata().tolist() == np.stack([loss, error], 1).tolist()
    assert ax.get_xscale() == ax.get_yscale() == "log"


@pytest.mark.parametrize("lowest", [0.1, -0.1])
def test_sampler_quality_shows_every_sampler_in_sight(lowest):
    """Distances may lie below zero, for they are zero in the mean where nothing differs."""
    frame = samplers(lowest=lowest)
    for ax, name in zip(plots.sampler_quality(frame, TITLE).axes, MEASURES, strict=True):
        for container, (family, rows) in zip(ax.containers, frame.groupby("family", sort=False), strict=True):
            points, _, (bars,) = container
            assert container.get_label() == family
            np.testing.assert_allclose(points.get_xydata(), rows[["evaluations", f"{name}.mean"]])
            ends = np.array([segment[:, 1] for segment in bars.get_segments()])
            np.testing.assert_allclose(ends, rows[[f"{name}.low", f"{name}.high"]])
        low, high = ax.get_ylim()
        assert low <= min(0, frame[f"{name}.mean"].min()) and frame[f"{name}.high"].max() <= high
        real = [ln.get_ydata()[0] for ln in ax.get_lines() if ln.get_label() == "real data"]
        assert real == ([] if name == "relative" else [frame[f"{name}.real"][0]])


@pytest.mark.slow
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
        "sharpness": (np.full(1, math.nan), np.zeros(1)),
        "sensitivity": ([0.1], {"ours": [math.nan]}, {"ours": (1.0, 0.5, 2.0)}),
        "sensitivity, no band": ([0.1], {"ours": [1.0]}, {"ours": (math.nan,) * 3}),
        "loss_against_error": (np.array([0.5]), np.array([1.0])),
        "loss_against_error, no errors": (np.array([0.5, 0.6]), np.full(2, math.nan)),
        "sampler_quality": (samplers(("Heun",)).assign(**{"motion.mean": math.nan, "relative.low": math.nan}),),
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
