"""Every figure can be read: it has its title and labels, no text lies over another or is cut, and no series is dropped."""

import inspect
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import assert_labelled, drawn
from matplotlib.figure import Figure

from pgdlib.lab import figures, tasks
from pgdlib.lab.figures import data, guidance, style, sweep, table1

RNG = np.random.default_rng(0)
T = 12
MEASURES = ("log_likelihood", "normalised", "appendix_b")
SAMPLED = ("error", "motion", "relative", "distance")
FLOORS = {"normalised": 0.1, "appendix_b": 0.5}
RULES = ("explicit (the paper)", "explicit, denoised", "linear", "cosine", "cosine, denoised", "proximal", "smoothed")
SEEDS = np.array([1000.0, 1200.0, 1400.0, 1100.0, 1300.0])
PEN = tasks.by_name("pen")
PAPER = {"paper, λ = 0": (2232, 230), "published, IQL": (2436.0, math.nan)}
MULTIPLES = np.array([0.5, 1.0, 1.5])
NAN = math.nan
BLIND = np.full(3, NAN)


def with_intervals(frame, *measures, mean=None):
    """`frame` with mean, low and high of each of the `measures`: random, or `mean`."""
    for name in measures:
        values = RNG.random(len(frame)) + 0.5 if mean is None else np.full(len(frame), mean)
        frame = frame.assign(**{f"{name}.mean": values, f"{name}.low": values - 0.1, f"{name}.high": values + 0.1})
    return frame


def samplers(n, mean=None):
    frame = pd.DataFrame({"family": np.repeat([f"series {k}" for k in range(n)], 2), "evaluations": np.arange(2 * n) + 8})
    return with_intervals(frame, *SAMPLED, mean=mean).assign(**{f"{m}.real": NAN if m == "relative" else 0.5 for m in SAMPLED})


def clouds(n):
    return {0.5 * k: {m: RNG.random(5) for m in MEASURES} for k in range(n)}


def lams(values=(0.0, 1.0, 2.0, 2.5), diverged=(0, 0, 3, 8), mean=None):
    return with_intervals(pd.DataFrame({"lam": values, "diverged": diverged}), *MEASURES, mean=mean)


def curve(slope=1.0, x=(-0.8, -0.5, 0.2)):
    y = 0.5 + slope * (np.array(x) + 1)
    return np.array(x), y, y - 0.1, y + 0.1


def study(n, mean=None):
    rows = [(d, f"series {k}", lam) for d in ("human", "cloned") for k in range(n) for lam in (0.0, 0.1, 1.0)]
    return with_intervals(pd.DataFrame(rows, columns=["dataset", "rule", "lam"]), "log_likelihood", "relative", mean=mean)


def at_levels(n, mean=None):
    rows = [("human", f"series {k}", level) for k in range(n) for level in (-2.0, -0.4)]
    return with_intervals(pd.DataFrame(rows, columns=["dataset", "rule", "log_likelihood"]), "ratio", mean=mean)


def qualities(n, low=0.4):
    rows = [(c, f"series {k}", 0.02 / (1 + k), 0.5 + k, low, 0.6 + k) for c in ("C1", "C2") for k in range(n)]
    return pd.DataFrame(rows, columns=["id", "variant", "error", "effect", "low", "high"]), {"C1": "first", "C2": "second"}


def gains(n, mean=None):
    means = with_intervals(pd.DataFrame({"dataset": "human", "row": [f"series {k}" for k in range(n)]}), "gain", mean=mean)
    return means.rename(columns={f"gain.{k}": k for k in ("low", "high")} | {"gain.mean": "gain"}).assign(seed=0), means


def series(n, make):
    return {f"series {k}": make(k) for k in range(n)}


def each(n):
    """Function -> (its arguments for n series, its x labels)."""
    x, names = "log-likelihood under the guide", [f"series {k}" for k in range(n)]
    ways = {0.5 * k: tuple(RNG.normal(size=(T, w)) for w in (24, 24, 45)) for k in range(n)}
    shares = series(n, lambda k: (MULTIPLES, [0, 0.1, 1], SEEDS))
    bands, far = series(n, lambda k: (1 + k, 0.9 + k, 1.1 + k)), series(n, lambda k: [1.0 + k, 0.5, -0.01, 0.3])
    return {
        data.returns: ((series(n, lambda k: RNG.normal(size=50)), {"random": 96.0}), ["return on D4RL"]),
        data.episode: ((RNG.normal(size=(T, 45)), RNG.normal(size=T), PEN), ["time (s)"] * 3),
        data.restoring: ((RNG.normal(size=(36, T)), *RNG.normal(size=(2, n, 36, T)), np.arange(1, n + 1)), []),
        data.floors: (({g: series(n, lambda k: 10.0**-k) for g in ("hand joints", "pen axis")},), ["one-step squared"]),
        data.coverage: (([4, 8, 12], [1.0, 0.7, 0.2], 8), ["trajectory length"]),
        data.learning_curve: (([0, 1e6], [0.0, 900.0], [10.0, 20.0], 3077), ["environment steps"]),
        data.training: (
            ({"short": RNG.random(300) + 0.1, "long": RNG.random(900) + 0.1}, MULTIPLES, [0.2, 0.5, 1], [0.3, 0.6, 1]),
            ["training step", "noise level"],
        ),
        data.channels: (([RNG.random((3, T))] * n, [RNG.random((4, T))] * n, names, 0.01), []),
        data.quantiles: ((RNG.normal(size=(99, 71)), RNG.normal(size=(80, 71))), ["data (std)"]),
        data.sharpness: ((RNG.random(24), RNG.random(24)), ["action dimension"]),
        data.sensitivity: ((MULTIPLES, series(n, lambda k: 1 + k + RNG.random(3)), bands), ["injected noise"]),
        data.loss_against_error: ((RNG.random(20), RNG.random(20)), ["denoising loss"]),
        data.sampler_quality: ((samplers(n),), ["network evaluations"] * 4),
        table1.curves: (([0, 10, 20], series(n, lambda k: RNG.random((3, 5))), [5, 10, 15]), ["training step"]),
        table1.agents: ((series(n, lambda k: {"real": SEEDS, "SynthER": SEEDS + k}),), ["return, D4RL's scale"]),
        table1.conservatism: (
            ([0.5, 1, 2], series(n, lambda k: RNG.random((3, 3, 5))), SEEDS),
            ["weight of staying near the data"] * n,
        ),
        table1.table1: (
            (series(n, lambda k: SEEDS + k), (1500.0, 25.0), PAPER, PEN.simulator.score),
            ["return on D4RL's scale"],
        ),
        guidance.figure_1: ((clouds(n), lams(), FLOORS, 0.1, 2.0), [x, "guidance weight λ"] * 2),
        guidance.guided_pair: ((ways, {"turn": 31, "axis": 33}, 0.01), ["time (s)"] * 4),
        guidance.threshold: ((series(n, lambda k: (MULTIPLES, SEEDS[:3])), shares), ["λ / predicted limit"] * 2),
        guidance.fronts: ((series(n, curve), (-1.0, 0.5), 0.1, "series 0"), [x] * 2),
        guidance.states_over_lam: (([0.0, 0.1, 1.0, 10.0], far, dict.fromkeys(names, 0.02), 0.4), ["guidance weight λ"]),
        guidance.by_horizon: ((series(n, lambda k: RNG.random((1 + 2 * (k % 2), T)) + 1),), ["steps k from the start"]),
        sweep.fronts: ((study(n),), [x] * 2),
        sweep.at_likelihood: ((at_levels(n), "annealed"), ["error / that of annealed"]),
        sweep.over_lam: ((study(n),), ["λ, in each rule's own sense"] * 2),
        sweep.gains: ((*gains(n), {"human": 216}), ["return less that of unguided"]),
        sweep.quality: (qualities(n), []),
    }


FIGURES = each(2).keys()
SHAPED = (data.episode, data.restoring, data.coverage, data.learning_curve, data.training, data.quantiles)  # of no series
SHAPED += (data.sharpness, data.loss_against_error)
pytestmark = pytest.mark.usefixtures("style")


def draw(function, *arguments):
    if function is guidance.figure_1:
        *arguments, limit = arguments
        return drawn(guidance, "figure_1", *arguments, limit=limit)
    return drawn(inspect.getmodule(function), function.__name__, *arguments)


def boxes(fig):
    """The texts that are seen, each with its box in px: ticks only within their axes."""
    seen = []
    for ax in fig.axes:
        for axis in (axis for axis in (ax.xaxis, ax.yaxis) if axis.get_visible()):
            low, high = sorted(axis.get_view_interval())
            ticks = [t for minor in (False, True) for t in axis.get_ticklabels(minor=minor)]
            places = [*axis.get_ticklocs(), *axis.get_ticklocs(minor=True)]
            outside = {id(t) for t, place in zip(ticks, places) if not low <= place <= high}
            seen += [t for t in ticks if id(t) not in outside]
        seen += [*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label, *(ax.get_legend().get_texts() if ax.get_legend() else [])]
    seen += [*fig.texts, *(t for legend in fig.legends for t in legend.get_texts())]
    return [(t.get_text(), t.get_window_extent()) for t in seen if t.get_text().strip() and t.get_visible()]


def test_every_function_is_tested():
    public = {
        f for room in (data, guidance, sweep, table1) for f in vars(room).values()
        if inspect.isfunction(f) and inspect.getmodule(f) is room and f.__name__[0] != "_"
    }  # fmt: skip
    assert public == {*FIGURES, guidance.over_lam, guidance.wrongness, guidance.draw_floor}  # seen in Figure 1


@pytest.mark.parametrize("n", [2, 11])  # more series than there are colours
@pytest.mark.parametrize("function", FIGURES, ids=lambda f: f"{f.__module__.rpartition('.')[2]}.{f.__name__}")
def test_every_figure_can_be_read_and_names_every_series(function, n):
    arguments, labels = each(n)[function]
    fig = draw(function, *arguments)
    assert_labelled(fig, labels)
    found = boxes(fig)
    shown = " ".join(text for text, _ in found) + " "
    assert function in SHAPED or all(f"series {k} " in shown or f"λ = {0.5 * k:g} " in shown for k in range(n))
    for i, (text, a) in enumerate(found):
        assert a.x0 >= -1 and a.y0 >= -1 and a.x1 <= fig.bbox.x1 + 1 and a.y1 <= fig.bbox.y1 + 1, text
        for other, b in found[i + 1 :]:
            assert min(a.x1, b.x1) - max(a.x0, b.x0) < 2 or min(a.y1, b.y1) - max(a.y0, b.y0) < 2, (text, other)
    assert min(ax.bbox.width for ax in fig.axes if ax.get_label() != "<colorbar>") > 0.06 * fig.bbox.width


def test_no_two_looks_are_alike():
    found = style.looks(range(13)).values()
    assert len({(v["color"], v["marker"]) for v in found}) == 13 and len({v["color"] for v in list(found)[:10]}) == 10
    assert np.ptp(style.MUTED) < 0.01  # grey


ONE = {0.0: {m: np.array([NAN]) for m in MEASURES}}
EDGES = [
    (data.returns, {"a": np.array([1.0, NAN]), "b": np.array([NAN])}, {}),
    (data.episode, np.full((1, 45), NAN), np.array([NAN]), PEN),
    (data.floors, {"one group": {"ours": NAN, "theirs": 1.0}}),
    (data.coverage, [4], [NAN], 4),
    (data.learning_curve, [0], [NAN], [NAN], 3077),
    (data.training, {"one": np.array([0.5])}, [1.0], [NAN], [0.5]),
    (data.channels, [np.full((1, 1), NAN)], [np.zeros((0, 1))], ["none generated"], 0.01),
    (data.quantiles, np.full((1, 71), NAN), np.zeros((1, 71))),
    (data.sharpness, np.full(1, NAN), np.zeros(1)),
    (data.sensitivity, [0.1], {"ours": [NAN], "no band": [1.0]}, {"ours": (1.0, 0.5, 2.0), "no band": (NAN,) * 3}),
    (data.loss_against_error, np.array([0.5, 0.6]), np.full(2, NAN)),
    (data.loss_against_error, np.array([0.5]), np.array([1.0])),
    (data.sampler_quality, samplers(1).assign(**{"motion.mean": NAN, "relative.low": NAN})),
    (table1.curves, [0, 10, 20], {"one seed": np.ones((3, 1)), "lost": np.full((3, 2), NAN)}, []),
    (table1.table1, {"one left": np.array([500.0, NAN]), "none": np.full(2, NAN)}, (NAN, NAN), {}, PEN.simulator.score),
    (guidance.figure_1, ONE, lams((0.0,), (1,), NAN), FLOORS, NAN, NAN),
    (guidance.figure_1, ONE, lams((0.0,), (1,)), {"normalised": NAN}, 0.0, None),
    (guidance.guided_pair, {0.0: (np.zeros((1, 24)), np.full((1, 24), NAN), np.zeros((1, 45)))}, {"turn": 31}, 0.01),
    (guidance.threshold, {"a": (BLIND, BLIND), "b": ([1.0], [0.0])}, {"b": ([1.0], [NAN], [NAN])}),
    (guidance.fronts, {"a": curve(x=[0.0])}, (-1.0, 0.5), 0.1, "a"),
    (guidance.fronts, {"a": curve(), "b": (curve()[0], *[BLIND] * 3)}, (-1.0, 0.5), 0.1, "a"),
    (guidance.fronts, {"a": (curve()[0], *[BLIND] * 3)}, (-1.0, NAN), 0.1, "a"),
    (guidance.fronts, {"a": np.array([[0.0, -60.0, -70.0], *[[NAN, 1.0, 1.0]] * 3])}, (-1.0, NAN), 0.1, "a"),
    (guidance.fronts, {"a": curve(x=[-50.0, -60.0, -70.0])}, (-1.0, 0.5), 0.1, "a"),
    (guidance.states_over_lam, [0.0], {"a": [0.0]}, {"a": 0.0}, 0.0),
    (guidance.states_over_lam, [0.0, 1.0], {"a": [NAN, 0.1]}, {"a": NAN}, NAN),
    (guidance.by_horizon, {"a": [BLIND] * 3, "b": [NAN], "c": [0.0, 1.0]}),
    (sweep.fronts, study(2, NAN)),
    (sweep.over_lam, study(2, NAN)),
    (sweep.at_likelihood, at_levels(1, NAN), "annealed"),
    (sweep.gains, *gains(1, NAN), {}),
    (sweep.quality, *qualities(1, NAN)),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:(Data has no|Attempt|All-NaN|invalid value):UserWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("function, arguments", [(f, a) for f, *a in EDGES], ids=[f.__name__ for f, *_ in EDGES])
def test_nan_and_single_values_are_drawn(function, arguments):
    draw(function, *arguments)


# Files


def files(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def test_save_writes_figure_and_table(runs):
    fig = draw(data.sharpness, SEEDS, SEEDS)
    assert style.save(fig, "name", "ci", {"x": [1, 2], "y": [0.5, NAN]}) is fig
    figures.style.save(fig, "bare", "quick")
    assert files(runs) == ["figures/ci/name.csv", "figures/ci/name.png", "figures/quick/bare.png"]
    assert (runs / "figures/ci/name.csv").read_text().split() == ["x,y", "1,0.5", "2,"]
    assert plt.imread(runs / "figures/ci/name.png").std() > 0.01
    style.save(fig, "name", "ci", pd.DataFrame({"z": [3]}))
    assert (runs / "figures/ci/name.csv").read_text().split() == ["z", "3"] and len(files(runs)) == 3


@pytest.mark.parametrize("broken", ["savefig", "to_csv"])
def test_an_interrupted_save_leaves_the_old_file_and_no_other(runs, monkeypatch, broken):
    fig = draw(data.sharpness, SEEDS, SEEDS)
    style.save(fig, "name", "ci", {"x": [1]})
    before = {f: (runs / f).read_bytes() for f in files(runs)}

    def fail(self, path, **how):
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure if broken == "savefig" else pd.DataFrame, broken, fail)
    with pytest.raises(KeyboardInterrupt):
        style.save(draw(data.coverage, [4], [0.5], 4), "name", "ci", {"x": [2]})
    after = {f: (runs / f).read_bytes() for f in files(runs)}
    assert after.keys() == before.keys() and after["figures/ci/name.csv"] == before["figures/ci/name.csv"]
    assert (after == before) == (broken == "savefig")
