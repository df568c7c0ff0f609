"""What the widgets show, each a pure function: a state in, a `Figure` out. None keeps anything, and none needs a kernel.

They make figures without pyplot, for they are also called from threads.
"""

from dataclasses import dataclass
from itertools import cycle

import matplotlib.ticker
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from pgdlib import measures
from pgdlib.lab import figures, study
from pgdlib.lab.figures.style import DATA, GUIDED, MODEL, MUTED
from pgdlib.simulators import pen as adroit

ESTIMATORS = {"state reconstructed (ours)": "normalised", "Appendix B (the paper's)": "appendix_b"}
SHORT_LIKELIHOOD = "log-likelihood (nats per action dimension)"


@dataclass(frozen=True)
class View:
    """What the λ explorer shows: a sweep, and where one stands in it."""

    label: str  # of the data
    rule: str
    points: dict  # the sweep, λ -> `study.Point`, 0 among them
    lam: float
    here: study.Point  # at this λ, of the sweep or drawn afresh
    on_policy: float
    floor: dict  # measure -> its mean on real data
    estimator: str = "normalised"
    picked: int | None = None  # a trajectory
    limit: float | None = None  # the λ from which the rule must diverge
    calibrated: float | None = None


def cloud(view, fig=None):
    """Each trajectory's dynamics error against its log-likelihood, at λ = 0 and at this λ, with marginal densities.

    `fig.axes[0]` holds the cloud; its limits are the same for every λ of a sweep.
    """
    fig = fig or Figure(figsize=(5.0, 4.3), layout="none")
    grid = fig.add_gridspec(
        2, 2, width_ratios=(5, 1), height_ratios=(1, 5), wspace=0.03, hspace=0.03, left=0.17, right=0.98, bottom=0.12, top=0.93
    )
    ax = fig.add_subplot(grid[1, 0])
    x_limits, y_limits = _limits(view)
    clouds = [("λ = 0", view.points[0.0], DATA, "o"), (f"λ = {view.lam:.3g}", view.here, MODEL, "s")]
    for name, point, colour, marker in clouds[: 2 if view.lam or view.here is not view.points[0.0] else 1]:
        x, y = point.measures["log_likelihood"], point.measures[view.estimator]
        ax.plot(x, y, marker, color=colour, markersize=4.5, alpha=0.5, markeredgewidth=0, label=name)
        shown = (x > x_limits[0]) & (x < x_limits[1]) & (y > y_limits[0]) & (y < y_limits[1])
        style = dict(color=colour, fill=True, alpha=0.35, linewidth=1.2, gridsize=80, cut=2)
        top, side = _bare(fig.add_subplot(grid[0, 0])), _bare(fig.add_subplot(grid[1, 1]))  # each density to its own peak
        for along, values, axes in (("x", x[shown], top), ("y", np.log10(y[shown]), side)):
            if len(values) > 2 and np.ptp(values) > 1e-6:
                sns.kdeplot(**{along: values}, ax=axes, **style)
        top.set(xlim=x_limits)
        side.set(ylim=np.log10(y_limits))
    beyond = len(x) - int(shown.sum())
    if beyond > 0.02 * len(x):
        text = f"{beyond} of {len(x)} lie beyond the axes ({view.here.counts['diverged']} diverged)"
        ax.text(0.02, 0.02, text, transform=ax.transAxes, va="bottom", fontsize="small")
    if view.picked is not None and view.picked < len(x):
        at = (x[view.picked], y[view.picked])
        ax.plot(*at, "o", color="black", markersize=11, markerfacecolor="none", markeredgewidth=2, label=f"no. {view.picked}")
    ax.axhline(view.floor[view.estimator], color="black", linewidth=1, linestyle=":", label="floor: real data")
    ax.axvline(view.on_policy, color=MUTED, linewidth=1.2, linestyle="--", label="on-policy")
    ax.set(xlabel=SHORT_LIKELIHOOD, xlim=x_limits, ylim=y_limits, yscale="log")
    ax.set_ylabel(f"dynamics error ({figures.guidance.LABELS[view.estimator]})")
    # Between the floor and the clouds, where there is room.
    room = view.floor[view.estimator] < 0.02 * measures.interval(view.points[0.0].measures[view.estimator], resamples=1)[0]
    place = dict(loc="center left", bbox_to_anchor=(0, 0.25)) if room else dict(loc="upper left")
    ax.legend(fontsize="x-small", frameon=True, framealpha=0.85, edgecolor="none", **place)
    _plain_log(ax)
    fig.suptitle(f"{view.label}, {view.rule} rule: λ = {view.lam:.3g}", fontsize="medium")
    return fig


def _limits(view):
    """((low, high) of log-likelihood, (low, high) of the error), the same for every λ of the sweep.

    Past the threshold the likelihood falls by thousands: the axes keep to what lies before it.
    """
    unguided, floor = view.points[0.0].measures, view.floor[view.estimator]
    lowest = np.nan_to_num(unguided["log_likelihood"], nan=np.inf).min() - 2
    first = _mean(view.points[0.0], "log_likelihood")
    sane = [p.measures for p in view.points.values() if _mean(p, "log_likelihood") > first - 2]
    x, y = (np.concatenate([m[name] for m in sane or [unguided]]) for name in ("log_likelihood", view.estimator))
    x, y = x[np.isfinite(x) & (x > lowest)], y[np.isfinite(y) & (y > 0)]
    x = np.append(np.quantile(x, [0.002, 1.0]) if len(x) else [], view.on_policy)
    y = np.append(np.quantile(y, [0.002, 0.998]) if len(y) else [], floor if floor > 0 else [])
    y = y if len(y) else np.ones(1)
    margin = 0.06 * np.ptp(x) + 1e-3
    return (x.min() - margin, x.max() + margin), (0.7 * y.min(), 1.6 * y.max())


def _mean(point, measure):
    return measures.interval(point.measures[measure], resamples=1)[0]


def curve(view, fig=None, frame=None):
    """Mean error and mean log-likelihood over λ, with the calibrated λ, the predicted limit, and a marker at this λ.

    `frame` is the `study.summary` of the sweep, if it is known already.
    """
    fig = fig or Figure(figsize=(5.0, 4.3), layout="none")
    ax = fig.add_axes((0.19, 0.12, 0.63, 0.8))
    frame = study.summary(view.points) if frame is None else frame
    twin = figures.guidance.over_lam(ax, frame, view.estimator, view.floor[view.estimator], view.on_policy)
    for lam, name in ((view.calibrated, "calibrated"), (view.limit, "predicted limit")):
        if lam is not None and 0 < lam <= 1.03 * frame["lam"].max():
            ax.axvline(lam, color="black", linewidth=1.2, linestyle="-.")
            style = dict(rotation=90, ha="right", va="bottom", fontsize="small")
            ax.text(lam, 0.02, f"{name} ", transform=ax.get_xaxis_transform(), **style)
    if view.lam > ax.get_xlim()[1]:  # drawn afresh, beyond the sweep
        ticks = [0.0]
        for lam in ax.get_xticks():
            ticks += [lam] * bool(np.sqrt(lam) - np.sqrt(ticks[-1]) > 0.1 * np.sqrt(view.lam))
        ax.set_xticks(ticks, [f"{lam:g}" for lam in ticks])
        ax.set_xlim(0, 1.03 * view.lam)
    ax.axvline(view.lam, color=GUIDED, linewidth=6, alpha=0.3, zorder=0)
    marker = dict(marker="D", color=GUIDED, markersize=9, markeredgecolor="white", zorder=6)
    for axis, measure in ((ax, view.estimator), (twin, "log_likelihood")):
        value, (low, high) = _mean(view.here, measure), axis.get_ylim()
        axis.plot(view.lam, value, **marker, clip_on=not low <= value <= high)  # whole at an edge, none far outside
    _plain_log(ax)
    fig.suptitle(f"means; the diamonds stand at λ = {view.lam:.3g}", fontsize="medium")
    return fig


def _plain_log(ax):
    """A few ticks, two at least, with plain numbers: half the time of a redraw goes into the others."""
    low, high = ax.get_ylim() if min(ax.get_ylim()) > 0 else ax.set_ylim(0.1, 1.0)  # where there is nothing to show
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.log10(high))
    for steps in ([1], [1, 3], [1, 2, 4, 6, 8], None):
        ticks = matplotlib.ticker.MaxNLocator(4).tick_values(low, high) if steps is None else np.outer(decades, steps).ravel()
        ticks = ticks[(ticks >= low) & (ticks <= high)]
        if len(ticks) > 2:
            break
    ax.set_yticks(ticks, [f"{v:.4g}" for v in ticks])
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_locator(matplotlib.ticker.NullLocator())


def _bare(ax):
    """`ax` with nothing but what is drawn on it."""
    ax.set_axis_off()
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(matplotlib.ticker.NullLocator())
    return ax


def panel(view):
    """`cloud` and `curve` side by side, and the numbers: what stands where the explorer cannot run."""
    fig = Figure(figsize=(10.4, 4.9), layout="none")
    upper, lower = fig.subfigures(2, 1, height_ratios=(4.6, 0.6))
    left, right = upper.subfigures(1, 2)
    cloud(view, left)
    curve(view, right)
    table = numbers(view).T[["log-likelihood", "error / variance, ours", "error, Appendix B"]]
    lower.text(0.05, 0.95, table.to_string(), va="top", fontsize="small", family="DejaVu Sans Mono")
    return fig


def numbers(view):
    """A frame of texts: the measures (means with 95% intervals) and counts, at λ = 0 and at this λ."""
    rows = {
        "log-likelihood": "log_likelihood",
        "error / variance, ours": "normalised",
        "motion": "motion",
        "error, Appendix B": "appendix_b",
    }
    columns = {}
    for lam, point in {0.0: view.points[0.0], view.lam: view.here}.items():
        values = {name: measures.interval(point.measures[key]) for name, key in rows.items()}
        column = {name: "{:.3g} [{:.3g}, {:.3g}]".format(*v).replace("nan [nan, nan]", "–") for name, v in values.items()}
        counts = {k: f"{n} of {len(point.x)}" for k, n in point.counts.items()}
        columns[f"λ = {lam:.3g}"] = {**column, **counts}
    return pd.DataFrame(columns)


def nearest(view, fig, x, y):
    """The trajectory whose point is nearest to (x, y) of a `cloud`, px from the top left at its own dpi; None if far."""
    ax = fig.axes[0]
    places = np.stack([view.here.measures["log_likelihood"], view.here.measures[view.estimator]], -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        pixels = ax.transData.transform(places)
    away = np.hypot(pixels[:, 0] - x, fig.bbox.height - pixels[:, 1] - y)
    (left, bottom), (right, top) = ax.bbox.get_points()
    seen = (pixels >= (left, bottom)) & (pixels <= (right, top))
    away[~seen.all(1)] = np.inf
    return int(away.argmin()) if away.min() < 0.05 * fig.bbox.width else None


def denoising(films, step, title, action=0):
    """One trajectory on its way from noise to motion, at `step`: a column for each of `films`, name -> `study.Film`.

    Above, the state channels of the noised trajectory, scaled to unit variance; below, one action of the denoised estimate,
    and the policy's mean in its states.
    """
    fig = Figure(figsize=(11, 5.2), layout="constrained")
    axes = fig.subplots(2, len(films), sharex=True, sharey="row", height_ratios=(1.5, 1), squeeze=False)
    groups = {name: s for name, s in adroit.OBS_SLICES.items() if s.stop <= 36}  # the rest is the target, and differences
    # Away from the policy's mean, and in the same place at every step.
    room = "lower left" if np.mean([film.means[..., action].mean() for film in films.values()]) > 0 else "upper left"
    for (name, film), (above, below), colour in zip(films.items(), axes.T, cycle((DATA, MODEL, GUIDED))):
        sigma = film.sigma[step]
        states = film.noised[step][:, :36].T / np.sqrt(1 + sigma**2)
        image = above.imshow(states, aspect="auto", cmap="RdBu_r", vmin=-2.5, vmax=2.5, interpolation="nearest")
        above.set_title(f"{name}, σ = {sigma:.3g}")
        above.set_yticks([s.start for s in groups.values()], groups, fontsize="x-small", va="top")
        below.plot(film.actions[step][:, action], color=colour, marker=".", label="denoised action")
        below.plot(film.means[step][:, action], color="black", linestyle=":", label="the policy's mean there")
        below.set(xlabel="step of the trajectory", ylim=(-1.6, 1.6))
        below.legend(fontsize="x-small", loc=room, ncols=2)
    axes[1, 0].set_ylabel(f"action {action}")
    fig.colorbar(image, ax=axes[0], label="state (std)", shrink=0.9)
    fig.suptitle(title, fontsize="medium")
    return fig


def still(films, steps, title, action=0):
    """`denoising` at a few `steps`, side by side in small: what stands where the film cannot run."""
    fig = Figure(figsize=(11, 2.1 * 2 * len(films)), layout="constrained")
    axes = fig.subplots(2 * len(films), len(steps), sharex=True, squeeze=False)
    for (name, film), rows, colour in zip(films.items(), axes.reshape(len(films), 2, -1), cycle((DATA, MODEL, GUIDED))):
        for step, (above, below) in zip(steps, rows.T):
            sigma = film.sigma[step]
            states = film.noised[step][:, :36].T / np.sqrt(1 + sigma**2)
            above.imshow(states, aspect="auto", cmap="RdBu_r", vmin=-2.5, vmax=2.5, interpolation="nearest")
            above.set(title=f"{name}, σ = {sigma:.2g}", yticks=[])
            below.plot(film.actions[step][:, action], color=colour)
            below.plot(film.means[step][:, action], color="black", linestyle=":")
            below.set(ylim=(-1.6, 1.6))
        rows[0][0].set_ylabel("36 states")
        rows[1][0].set_ylabel(f"action {action}\n(dotted: mean)")
    for ax in axes[-1]:
        ax.set_xlabel("step")
    fig.suptitle(title, fontsize="medium")
    return fig


def message(text):
    """A text where a picture cannot be."""
    fig = Figure(figsize=(9, 0.6 + 0.22 * len(text.splitlines())), layout="none")
    fig.text(0.02, 0.5, text, va="center", wrap=True)
    return fig
