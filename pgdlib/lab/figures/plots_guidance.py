"""Figures of guidance: Figure 1, the threshold, the fronts of the rules, states over λ, the world model beside it."""

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns

from pgdlib.lab.figures.plots import DATA, GUIDED, MODEL, MUTED, THEIRS
from pgdlib.lab.fronts import on_front

LIKELIHOOD = "log-likelihood under the guide\n(nats per action dimension)"
MARKERS = "osD^vPX*"


def figure_1(clouds, sweep, floors, on_policy, title, limit=None):
    """The paper's Figure 1 with both estimators: one row each.

    clouds: λ -> {"log_likelihood" [n], estimator -> error [n]}, the dots of the left column.
    sweep: a frame with lam, diverged, and mean, low, high of log_likelihood and of every estimator.
    floors: estimator -> the error of real data. on_policy: the mean log-likelihood of the guide's own actions.
    limit: the λ from which the rule must diverge, if there is one.
    """
    estimators = list(floors)
    fig, axes = plt.subplots(len(estimators), 2, figsize=(11, 3.7 * len(estimators)), squeeze=False)
    for (left, right), estimator in zip(axes, estimators):
        _cloud(left, clouds, estimator, floors[estimator], on_policy)
        over_lam(right, sweep, estimator, floors[estimator], on_policy)
        if limit is not None and limit <= 1.03 * sweep["lam"].max():
            right.axvline(limit, color="black", linewidth=1.2, linestyle="-.")
            right.text(
                limit, 0.02, "predicted limit ", transform=right.get_xaxis_transform(), rotation=90, ha="right", va="bottom"
            )
    fig.suptitle(title, fontsize="medium")
    return fig


def _cloud(ax, clouds, estimator, floor, on_policy):
    for (lam, values), colour, marker in zip(clouds.items(), cycle((DATA, MODEL, GUIDED)), cycle("osD")):
        x, y = values["log_likelihood"], values[estimator]
        ax.plot(x, y, marker, color=colour, markersize=3.5, alpha=0.55, markeredgewidth=0, label=f"λ = {lam:.3g}")
    ax.axhline(floor, color="black", linewidth=1, linestyle=":", label="floor: real data")
    ax.axvline(on_policy, color=MUTED, linewidth=1.2, linestyle="--", label="on-policy")
    ax.set(xlabel=LIKELIHOOD, ylabel=f"dynamics error\n({LABELS[estimator]})", yscale="log")
    ax.legend(fontsize="x-small", markerscale=1.8, frameon=True, framealpha=0.9, edgecolor="none")


def over_lam(ax, sweep, estimator, floor, on_policy):
    """On `ax` and a twin of it, which is returned: mean error and mean log-likelihood of a `sweep`, as for `figure_1`."""
    twin = ax.twinx()
    twin.spines["right"].set_visible(True)
    lams = sweep["lam"].to_numpy()
    ax.set_xscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
    top = lams[np.isfinite(lams)].max(initial=0.0)
    ticks = [v for v in (0, 0.02, 0.1, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 10, 20, 30, 50, 100) if top / 300 < v <= top or v == 0]
    ax.set_xticks(ticks, [f"{v:g}" for v in ticks])
    ax.set_xlim(0, 1.03 * top or 1.0)
    for axis, name, colour in ((ax, estimator, MODEL), (twin, "log_likelihood", DATA)):
        mean, low, high = (sweep[f"{name}.{k}"].to_numpy() for k in ("mean", "low", "high"))
        axis.fill_between(lams, low, high, color=colour, alpha=0.25, linewidth=0)
        axis.plot(lams, mean, color=colour, marker="s" if axis is ax else "o", markersize=4)
        ring = dict(color="red", markersize=8, markerfacecolor="none", markeredgewidth=2, zorder=5, clip_on=False)
        axis.plot(lams[0], mean[0], "o", **ring)
    ax.axhline(floor, color=MODEL, linewidth=1, linestyle=":")
    twin.axhline(on_policy, color=DATA, linewidth=1, linestyle="--")
    ax.set(xlabel="guidance weight λ  (red ring: λ = 0)", yscale="log")
    ax.set_ylabel("dynamics error ■ (dotted: floor)", color=MODEL)
    twin.set_ylabel("log-likelihood ● (dashed: on-policy)", color=DATA)
    # Past the threshold the likelihood falls by thousands; the axis keeps to what lies before it.
    likelihood = sweep["log_likelihood.mean"].to_numpy()
    sane = np.append(likelihood[likelihood > likelihood[0] - 2], on_policy)
    if np.isfinite(sane).any():
        low, high = np.nanmin(sane), np.nanmax(sane)
        twin.set_ylim(low - 0.25 * (high - low) - 0.02, high + 0.1 * (high - low) + 0.02)
    if (sweep["diverged"] > 0).any():
        first = sweep["lam"][sweep["diverged"] > 0].min()
        ax.axvspan(first, 1.03 * top, color="black", alpha=0.07, linewidth=0)
        inside = "left" if first < 0.9 * top else "right"  # of the grey band, if there is room
        ax.text(first, 0.5, " diverged ", transform=ax.get_xaxis_transform(), rotation=90, ha=inside, va="center")
    return twin


LABELS = {
    "reconstructed": "state reconstructed",
    "appendix_b": "the paper's Appendix B",
    "normalised": "reconstructed, / variance",
}


def guided_pair(tracks, title, actions=(0, 9), observations=(31, 33)):
    """One trajectory for each λ: some actions with the guide's mean (dotted), some observations.

    tracks: λ -> (actions [T, 24], means [T, 24], observations [T, 45]), environment space.
    """
    fig, axes = plt.subplots(1, len(actions) + len(observations), figsize=(12, 2.9))
    for (lam, (acted, wanted, obs)), colour in zip(tracks.items(), cycle((DATA, MODEL, GUIDED, THEIRS))):
        t = np.arange(len(acted)) / 100
        for ax, i in zip(axes, actions):
            ax.plot(t, acted[:, i], color=colour, label=f"λ = {lam:.3g}")
            ax.plot(t, wanted[:, i], color=colour, linestyle=":")
            ax.set(xlabel="time (s)", title=f"action {i} (dotted: guide's mean)")
        for ax, i in zip(axes[len(actions) :], observations):
            ax.plot(t, obs[:, i], color=colour)
            ax.set(xlabel="time (s)", title={31: "pen turn rate (rad/s)", 33: "pen axis x"}.get(i, f"observation {i}"))
    axes[0].legend(fontsize="small")
    fig.suptitle(title, fontsize="medium")
    return fig


def threshold(demonstration, measured, title):
    """Left: the one-dimensional demonstration. Right: the real model. Both over λ as a multiple of the predicted limit.

    demonstration: label -> (multiples [L], distance from the target [L]); one curve for each number of steps.
    measured: label -> (multiples [L], share of diverged trajectories [L], log-likelihood [L]).
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    for (label, (x, y)), line, colour in zip(
        demonstration.items(), cycle(("-", "--", ":", "-.")), cycle((DATA, MODEL, GUIDED, THEIRS))
    ):
        left.plot(x, np.minimum(y, 1e12), line, color=colour, label=label)
    left.axhline(1, color=MUTED, linewidth=0.8)
    left.set(yscale="log", ylim=(1e-7, 1e7), ylabel="distance from the target (std)")
    left.set_title("one dimension, exact denoiser")
    for (label, (x, share, _)), marker, line, colour in zip(
        measured.items(), cycle(MARKERS), cycle(("-", "--", ":", "-.")), cycle((DATA, MODEL, GUIDED, THEIRS))
    ):
        right.plot(x, 100 * np.asarray(share), line, marker=marker, color=colour, markersize=5, label=label)
    right.set(ylabel="trajectories that diverged (%)", ylim=(-4, 104))
    right.set_title("the diffusion model")
    for ax in (left, right):
        ax.axvline(1, color="black", linewidth=1.2, label="predicted limit")
        ax.set_xlabel("λ / predicted limit")
        ax.legend(fontsize="small")
    fig.suptitle(title, fontsize="medium")
    return fig


def fronts(curves, unguided, on_policy, chosen, title):
    """Dynamics error against log-likelihood, one curve for each rule; and each rule's error over that of the `chosen` one.

    curves: rule -> (log-likelihood, error, low, high), [L] each, λ rising; shown as far as the likelihood rises.
    unguided: (log-likelihood, error) at λ = 0.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4))
    others = [rule for rule in curves if rule != chosen]
    palette = sns.color_palette("colorblind")
    colours = {chosen: DATA, **dict(zip(others, cycle(palette[i] for i in (1, 5, 7, 3, 4, 2, 9, 8))))}
    dashes = ("--", (0, (1, 1)), ":", "-.", (0, (3, 1, 1, 1)), (0, (5, 1)), (0, (4, 2, 1, 2)), "-")
    lines = {chosen: "-", **dict(zip(others, cycle(dashes)))}
    reach = np.nanmax([unguided[0], *(x for c in curves.values() for x in c[0][np.isfinite(c[1])])])
    grid = np.linspace(unguided[0], reach, 60)
    best = on_front(curves[chosen], unguided, grid)
    drawable = False
    for (rule, curve), marker in zip(curves.items(), cycle(MARKERS)):
        x, y, low, high = (np.asarray(v) for v in curve)
        shown = x >= np.fmax.accumulate(x)  # past the threshold likelihood falls by thousands
        style = dict(color=colours[rule], linestyle=lines[rule], linewidth=2.2 if rule == chosen else 1.4)
        points = np.append(unguided[0], x[shown]), np.append(unguided[1], y[shown])
        drawable |= np.isfinite(points).all(0).any()
        left.plot(*points, marker=marker, markersize=5, label=rule, **style)
        left.fill_between(x[shown], low[shown], high[shown], color=colours[rule], alpha=0.15, linewidth=0)
        if rule != chosen:
            right.plot(grid, on_front(curve, unguided, grid) / best, **style)
    left.plot(*unguided, "o", color="red", markersize=9, markerfacecolor="none", markeredgewidth=2, label="λ = 0")
    left.set(xlabel=LIKELIHOOD, ylabel="dynamics error / variance", title="lower right is better")
    if drawable:  # a logarithm of nothing has no scale
        left.set_yscale("log")
    right.axhline(1, color=DATA, linewidth=2.2)
    right.text(grid[-1], 1, f"{chosen} ", color=DATA, va="top", ha="right", fontsize="small")
    right.set(xlabel=LIKELIHOOD, ylabel=f"error / that of {chosen}\nat the same likelihood", title="above 1: dominated")
    for ax in (left, right):
        ax.axvline(on_policy, color="black", linewidth=1, linestyle="--")
        ax.text(
            on_policy,
            0.99,
            "on-policy ",
            rotation=90,
            transform=ax.get_xaxis_transform(),
            ha="right",
            va="top",
            fontsize="small",
        )
    left.legend(fontsize="x-small", loc="upper left")
    fig.suptitle(title, fontsize="medium")
    return fig


def states_over_lam(lams, distances, null, calibrated, title):
    """Energy distance of states to references over λ: distances, reference -> [L]; null, reference -> chance's 95% quantile."""
    fig, ax = plt.subplots(figsize=(7.5, 3.4))
    for (name, values), colour, marker, line in zip(
        distances.items(), cycle((DATA, MODEL, GUIDED)), cycle(MARKERS), cycle(("-", "--", ":"))
    ):
        ax.plot(lams, values, line, color=colour, marker=marker, markersize=5, label=f"to {name}")
        ax.axhline(null[name], color=colour, linewidth=0.8, linestyle=line, alpha=0.6)
    ax.axvline(calibrated, color="black", linestyle="-.", linewidth=1.2, label=f"calibrated λ = {calibrated:.3g}")
    positive = [v for v in lams if v > 0]
    ax.set_xscale("symlog", linthresh=min(positive, default=1.0))
    ax.set(xlabel="guidance weight λ", ylabel="energy distance of states (std)\nthin: what chance gives", title=title)
    ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    ax.set_xlim(left=0)
    ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return fig


def by_horizon(curves, title, xlabel="steps k from the start"):
    """Error against k or place: label -> [K] or (mean, low, high) of [K]."""
    fig, ax = plt.subplots(figsize=(7.5, 3.6))
    styles = zip(
        curves.items(), cycle((DATA, MODEL, GUIDED, THEIRS, MUTED, "black")), cycle(("-", "--", "-.", ":", (0, (5, 1)), "-"))
    )
    for (label, values), colour, line in styles:
        values = np.atleast_2d(values)
        k = np.arange(1, values.shape[1] + 1)
        ax.plot(k, values[0], color=colour, linestyle=line, label=label)
        if len(values) == 3:
            ax.fill_between(k, values[1], values[2], color=colour, alpha=0.18, linewidth=0)
    ax.set(xlabel=xlabel, ylabel="squared error / variance", yscale="log", title=title)
    ax.grid(axis="y", alpha=0.3)
    ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return fig
