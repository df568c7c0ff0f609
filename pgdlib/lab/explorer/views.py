"""What the widgets show, each a pure function: a state in, a `Figure` out. None keeps anything, and none needs a kernel.

They make figures without pyplot, for they are also called from threads.
"""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from pgdlib import measures
from pgdlib.lab import study
from pgdlib.lab.figures import guidance, style
from pgdlib.lab.figures.style import DATA, GUIDED, MODEL, MUTED

ESTIMATORS = {"state reconstructed (ours)": "normalised", "Appendix B (the paper's)": "appendix_b"}
ESTIMATORS |= {"distance to the data": "distance"}  # where there is no simulator
ROWS = {"log-likelihood": "log_likelihood", "error / variance, ours": "normalised", "motion": "motion"}
ROWS |= {"error, Appendix B": "appendix_b", "distance to the data": "distance"}
SIZE = 5.0, 4.3  # of a picture, inches


@dataclass(frozen=True, eq=False)
class Sweep:
    """A sweep over λ, and what its trajectories are measured against."""

    label: str  # of the data
    rule: str
    points: dict  # λ -> `study.Point`, 0 among them
    frame: pd.DataFrame  # their `study.summary`
    on_policy: float
    floor: dict  # measure -> its mean on real data
    limit: float | None = None  # the λ from which the rule must diverge
    calibrated: float | None = None


@dataclass(frozen=True)
class View:
    """What the λ explorer shows: a sweep, and where one stands in it. Views of the same are equal."""

    sweep: Sweep
    stop: tuple  # (λ, 0) of the sweep, or (λ, n) of the n-th drawing of fresh trajectories
    here: study.Point = field(compare=False)  # there
    estimator: str = "normalised"
    picked: int | None = None  # a trajectory

    @property
    def lam(self):
        """The λ where one stands."""
        return self.stop[0]


def cloud(view, fig=None):
    """Each trajectory's dynamics error against its log-likelihood, at λ = 0 and at this λ, with marginal densities.

    `fig.axes[0]` holds the cloud; its limits are the same for every λ of a sweep.
    """
    fig, sweep, unguided = fig or Figure(SIZE, layout="none"), view.sweep, view.sweep.points[0.0]
    ratios = dict(width_ratios=(5, 1), height_ratios=(1, 5), wspace=0.03, hspace=0.03)
    grid = fig.add_gridspec(2, 2, **ratios, left=0.17, right=0.98, bottom=0.12, top=0.93)
    ax, (x_limits, y_limits) = fig.add_subplot(grid[1, 0]), _limits(view)
    clouds, floor = {0.0: unguided.measures, view.lam: view.here.measures}, sweep.floor[view.estimator]
    for (lam, values), colour, marker in zip(clouds.items(), (DATA, MODEL), "os"):
        x, y = values["log_likelihood"], values[view.estimator]
        ax.plot(x, y, marker, color=colour, markersize=4.5, alpha=0.5, markeredgewidth=0, label=f"λ = {lam:.3g}")
        shown = (x > x_limits[0]) & (x < x_limits[1]) & (y > y_limits[0]) & (y < y_limits[1])
        _density(fig.add_subplot(grid[0, 0]), "x", x[shown], x_limits, colour)
        _density(fig.add_subplot(grid[1, 1]), "y", np.log10(y[shown]), np.log10(y_limits), colour)
    if (beyond := len(x) - int(shown.sum())) > 0.02 * len(x):
        text = f"{beyond} of {len(x)} lie beyond the axes ({view.here.counts['diverged']} diverged)"
        ax.text(0.02, 0.02, text, transform=ax.transAxes, va="bottom", fontsize="small")
    if view.picked is not None and view.picked < len(x):
        ring = dict(color="black", markersize=11, markerfacecolor="none", markeredgewidth=2, label=f"no. {view.picked}")
        ax.plot(x[view.picked], y[view.picked], "o", **ring)
    guidance.draw_floor(ax, floor, y_limits)
    ax.axvline(sweep.on_policy, color=MUTED, linewidth=1.2, linestyle="--", label="on-policy")
    ax.set(xlabel="log-likelihood (nats per action dimension)", xlim=x_limits, ylim=y_limits, yscale="log")
    ax.set_ylabel(guidance.wrongness(view.estimator))
    # The legend stands between the floor and the clouds, where there is room.
    room = y_limits[0] < floor < 0.02 * _mean(unguided, view.estimator)
    place = dict(loc="center left", bbox_to_anchor=(0, 0.25)) if room else dict(loc="upper left")
    ax.legend(fontsize="x-small", frameon=True, framealpha=0.85, edgecolor="none", **place)
    _plain_log(ax)
    fig.suptitle(f"{sweep.label}, {sweep.rule} rule: λ = {view.lam:.3g}", fontsize="medium")
    return fig


def _density(ax, along, values, limits, colour):
    """The density of `values` on an axis of its own, so that each reaches to its own peak."""
    ax.set_axis_off()
    if len(values) > 2 and np.ptp(values) > 1e-6:
        style = dict(color=colour, fill=True, alpha=0.35, linewidth=1.2, gridsize=80, cut=2)
        sns.kdeplot(**{along: values}, ax=ax, **style)
    ax.set(**{f"{along}lim": limits})


def _limits(view):
    """((low, high) of log-likelihood, (low, high) of the error), the same for every λ of the sweep.

    Past the threshold the likelihood falls by thousands: the axes keep to what lies before it.
    """
    sweep, floor = view.sweep, view.sweep.floor[view.estimator]
    first, lowest = sweep.points[0.0], np.nan_to_num(sweep.points[0.0].measures["log_likelihood"], nan=np.inf).min() - 2
    sane = [p for p in sweep.points.values() if _mean(p, "log_likelihood") > _mean(first, "log_likelihood") - 2] or [first]
    x, y = (np.concatenate([p.measures[name] for p in sane]) for name in ("log_likelihood", view.estimator))
    x, y = x[np.isfinite(x) & (x > lowest)], y[np.isfinite(y) & (y > 0)]
    x = np.append(np.quantile(x, [0.002, 1.0]) if len(x) else [], sweep.on_policy)
    near = [floor] if floor > guidance.FAR * np.min(y, initial=np.inf) else []
    y = np.append(np.quantile(y, [0.002, 0.998]) if len(y) else [], near)
    y = y if len(y) else np.ones(1)
    margin = 0.06 * np.ptp(x) + 1e-3
    return (x.min() - margin, x.max() + margin), (0.7 * y.min(), 1.6 * y.max())


def _mean(point, measure):
    values = point.measures[measure]
    return values[np.isfinite(values)].mean() if np.isfinite(values).any() else np.nan


def curve(view, fig=None):
    """Mean error and mean log-likelihood over λ, with the calibrated λ, the predicted limit, and a marker at this λ."""
    fig, sweep = fig or Figure(SIZE, layout="none"), view.sweep
    ax = fig.add_axes((0.19, 0.12, 0.63, 0.8))
    twin = guidance.over_lam(ax, sweep.frame, view.estimator, sweep.floor[view.estimator], sweep.on_policy)
    for lam, name in ((sweep.calibrated, "calibrated"), (sweep.limit, "predicted limit")):
        if lam is not None and 0 < lam <= 1.03 * sweep.frame["lam"].max():
            ax.axvline(lam, color="black", linewidth=1.2, linestyle="-.")
            style = dict(rotation=90, ha="right", va="bottom", fontsize="small")
            ax.text(lam, 0.02, f"{name} ", transform=ax.get_xaxis_transform(), **style)
    if view.lam > ax.get_xlim()[1]:  # drawn afresh, beyond the sweep
        ticks = view.lam * np.array([0, 0.1, 0.4, 1])
        ax.set_xticks(ticks, [f"{lam:.3g}" for lam in ticks])
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
    if min(ax.get_ylim()) <= 0:  # there is nothing to show
        ax.set_ylim(0.1, 1.0)
    style.plain_log(ax.yaxis)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_locator(NullLocator())


def panel(view):
    """`cloud` and `curve` side by side, and the numbers: what stands where the explorer cannot run."""
    fig = Figure(figsize=(10.4, 4.9), layout="none")
    upper, lower = fig.subfigures(2, 1, height_ratios=(4.6, 0.6))
    for draw, side in zip((cloud, curve), upper.subfigures(1, 2)):
        draw(view, side)
    table = numbers(view).T.filter([name for name in ROWS if name != "motion"])
    lower.text(0.05, 0.95, table.to_string(), va="top", fontsize="small", family="DejaVu Sans Mono")
    return fig


def numbers(view):
    """A frame of texts: the measures (means with 95% intervals) and counts, at λ = 0 and at this λ."""
    columns = {}
    for lam, point in {0.0: view.sweep.points[0.0], view.lam: view.here}.items():
        values = {name: measures.interval(point.measures[key]) for name, key in ROWS.items() if key in point.measures}
        column = {name: "{:.3g} [{:.3g}, {:.3g}]".format(*v).replace("nan [nan, nan]", "–") for name, v in values.items()}
        columns[f"λ = {lam:.3g}"] = column | {k: f"{n} of {len(point.x)}" for k, n in point.counts.items()}
    return pd.DataFrame(columns)


def nearest(view, x, y, dpi):
    """The trajectory whose point is nearest to (x, y) of a `cloud`, px from the top left at `dpi`; None if far."""
    fig = cloud(view)
    fig.set_dpi(dpi)
    ax = fig.axes[0]
    with np.errstate(invalid="ignore", divide="ignore"):
        places = ax.transData.transform(np.stack([view.here.measures[k] for k in ("log_likelihood", view.estimator)], -1))
    away = np.hypot(places[:, 0] - x, fig.bbox.height - places[:, 1] - y)
    away[~((places >= ax.bbox.min) & (places <= ax.bbox.max)).all(1)] = np.inf  # not in view
    return int(away.argmin()) if away.min() < 0.05 * fig.bbox.width else None


def denoising(tracks, steps, title):
    """Trajectories on their way from noise to motion, name -> `study.Denoising`, at some `steps`.

    One step of each is a column, several are a row. Above, the state channels of the noised trajectory, scaled to unit
    variance; below, the first action of the denoised estimate, and the policy's mean in its states.
    """
    across, rows = (len(tracks), 1) if len(steps) == 1 else (len(steps), len(tracks))
    fig = Figure(figsize=(11, 5.2 if rows == 1 else 4.2 * rows), layout="constrained")
    axes = fig.subplots(2 * rows, across, sharex=True, sharey="row", height_ratios=(1.5, 1) * rows, squeeze=False)
    columns = iter(zip(axes[::2].ravel(), axes[1::2].ravel()))
    for (name, track), colour in zip(tracks.items(), (DATA, MODEL, GUIDED)):
        for step, (above, below) in zip(steps, columns):
            last = max(s.stop for s in track.states.values())
            states = track.noised[step][:, :last].T / np.sqrt(1 + track.sigma[step] ** 2)
            image = above.imshow(states, **style.STATES)
            above.set_title(f"{name}, σ = {track.sigma[step]:.3g}", fontsize="medium" if rows == 1 else "x-small")
            above.set_yticks([s.start for s in track.states.values()], track.states, fontsize="x-small", va="top")
            below.plot(track.actions[step][:, 0], color=colour, marker=".", label="denoised action")
            below.plot(track.means[step][:, 0], color="black", linestyle=":", label="the policy's mean there")
            below.set(ylim=(-1.6, 1.6))
    for ax in axes[-1]:
        ax.set_xlabel("step of the trajectory", fontsize="medium" if rows == 1 else "small")
    for ax in axes[1::2, 0]:
        ax.set_ylabel("action 0")
    fig.colorbar(image, ax=axes[::2].ravel().tolist(), label="state (std)", shrink=0.9)
    fig.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    fig.suptitle(title, fontsize="medium")
    return fig


def message(text):
    """A text where a picture cannot be."""
    fig = Figure(figsize=(9, 0.6 + 0.22 * len(text.splitlines())), layout="none")
    fig.text(0.02, 0.5, text, va="center", wrap=True)
    return fig
