"""Figures of guidance: Figure 1, the threshold, the fronts of the rules, states over λ, the world model beside it."""

import numpy as np

from pgdlib.lab.figures.style import DATA, LIKELIHOOD, MODEL, MUTED, figure, finished, interval, lines, looks, ring
from pgdlib.lab.fronts import on_front

LABELS = dict(reconstructed="state reconstructed", appendix_b="the paper's Appendix B")
LABELS |= dict(normalised="reconstructed, / variance", distance="distance to the data (std)")
FAR = 1e-6  # times the errors: a floor below it is that of an exact ruler
TICKS = (0, 0.02, 0.1, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 10, 20, 30, 50, 100)  # of λ


def wrongness(measure, between=" "):
    """What a measure of wrongness is called: a dynamics error by one estimator, or the distance to the data."""
    return LABELS[measure] if measure == "distance" else f"dynamics error{between}({LABELS[measure]})"


def figure_1(clouds, sweep, floors, on_policy, title, limit=None):
    """The paper's Figure 1 with both estimators: one row each.

    clouds: λ -> {"log_likelihood" [n], estimator -> error [n]}, the dots of the left column.
    sweep: a frame with lam, diverged, and mean, low, high of log_likelihood and of every estimator.
    floors: estimator -> the error of real data. on_policy: the mean log-likelihood of the guide's own actions, in nats per
    action dimension. limit: the λ from which the rule must diverge, if there is one.
    """
    fig, axes = figure(title, 12, 3.7 * len(floors), len(floors), 2, yscale="log")
    for (left, right), (estimator, floor) in zip(axes, floors.items()):
        points = {f"λ = {lam:.3g}": (v["log_likelihood"], v[estimator]) for lam, v in clouds.items()}
        lines(left, points, linestyle="", markersize=4, alpha=0.55, markeredgewidth=0)
        draw_floor(left, floor, sweep[f"{estimator}.mean"])
        left.axvline(on_policy, color=MUTED, linewidth=1.2, linestyle="--", label="on-policy")
        left.set(xlabel=LIKELIHOOD, ylabel=wrongness(estimator, "\n"))
        over_lam(right, sweep, estimator, floor, on_policy)
        if limit is not None and limit <= 1.03 * sweep["lam"].max():
            right.axvline(limit, color="black", linewidth=1.2, linestyle="-.", label="predicted limit")
    return finished(fig)


def draw_floor(ax, floor, errors, colour="black"):
    """The error of real data as a dotted line. That of an exact ruler, far below all errors, would squeeze them: told alone."""
    known = [error for error in errors if np.isfinite(error)]
    if not known or floor > FAR * min(known):
        ax.axhline(floor, color=colour, linewidth=1, linestyle=":", label="floor: real data")
    else:
        ax.plot([], [], color=colour, linewidth=1, linestyle=":", label=f"floor: real data, {floor:.0e}")


def over_lam(ax, sweep, estimator, floor, on_policy):
    """On `ax` and a twin of it, which is returned: mean error and mean log-likelihood of a `sweep`, as for `figure_1`."""
    twin = ax.twinx()
    twin.spines["right"].set_visible(True)
    lams = sweep["lam"].to_numpy()
    top = lams[np.isfinite(lams)].max(initial=0.0)
    ax.set_xscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
    ticks = [v for v in TICKS if top / 300 < v <= top or v == 0]
    ax.set_xticks(ticks, [f"{v:g}" for v in ticks])
    ax.set_xlim(0, 1.03 * top or 1.0)
    for axis, name, colour, marker in ((ax, estimator, MODEL, "s"), (twin, "log_likelihood", DATA, "o")):
        mean, low, high = interval(sweep, name)
        axis.fill_between(lams, low, high, color=colour, alpha=0.25, linewidth=0)
        axis.plot(lams, mean, color=colour, marker=marker, markersize=4)
        ring(axis, lams[0], mean[0])
    draw_floor(ax, floor, sweep[f"{estimator}.mean"], MODEL)
    twin.axhline(on_policy, color=DATA, linewidth=1, linestyle="--")
    ax.set(xlabel="guidance weight λ  (red ring: λ = 0)", yscale="log")
    what = LABELS["distance"] if estimator == "distance" else "dynamics error"
    ax.set_ylabel(f"{what} ■ (dotted: floor)", color=MODEL)
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


def guided_pair(tracks, observations, dt, title, actions=(0, 9)):
    """One trajectory for each λ: some actions with the guide's mean (dotted), some observations.

    tracks: λ -> (actions [T, A], means [T, A], obs [T, O]), in the environment's units, `dt` s apart; observations: label ->
    its index.
    """
    fig, [axes] = figure(title, 13, 2.9, 1, len(actions) + len(observations), xlabel="step" if dt == 1 else "time (s)")
    for (lam, (acted, wanted, obs)), look in zip(tracks.items(), looks(tracks).values()):
        t = dt * np.arange(len(acted))
        columns = [*acted.T[list(actions)], *obs.T[list(observations.values())]]
        for ax, values in zip(axes, columns):
            ax.plot(t, values, color=look["color"], label=f"λ = {lam:.3g}")
        for ax, i in zip(axes, actions):
            ax.plot(t, wanted[:, i], color=look["color"], linestyle=":")
    for ax, name in zip(axes, [*(f"action {i} (dotted: guide's mean)" for i in actions), *observations]):
        ax.set_title(name)
    return finished(fig)


def threshold(demonstration, measured, title):
    """Left: the one-dimensional demonstration. Right: the real model. Both over λ as a multiple of the predicted limit.

    demonstration: label -> (multiples [L], distance from the target [L], in std); one curve for each number of steps.
    measured: label -> (multiples [L], share of diverged trajectories [L], ...).
    """
    fig, [(left, right)] = figure(title, 13, 3.6, 1, 2, xlabel="λ / predicted limit")
    lines(left, {label: (x, np.minimum(y, 1e12)) for label, (x, y) in demonstration.items()}, marker="")
    left.axhline(1, color=MUTED, linewidth=0.8)
    left.set(yscale="log", ylim=(1e-7, 1e7), ylabel="distance from the target (std)", title="one dimension, exact denoiser")
    lines(right, {label: (x, 100 * np.asarray(share)) for label, (x, share, *_) in measured.items()})
    right.set(ylabel="trajectories that diverged (%)", ylim=(-4, 104), title="the diffusion model")
    for ax in (left, right):
        ax.axvline(1, color="black", linewidth=1.2, label="predicted limit")
    left.legend()
    right.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))  # inside, it would lie on the curves
    return fig


def fronts(curves, unguided, on_policy, chosen, title):
    """Dynamics error against log-likelihood, one curve for each rule; and each rule's error over that of the `chosen` one.

    curves: rule -> (log-likelihood, error, low, high), [L] each, λ rising, as far as the likelihood rises; bars: interval.
    unguided: (log-likelihood, error) at λ = 0. Likelihoods are in nats per action dimension, errors over the data's variance.
    """
    fig, [(left, right)] = figure(title, 13, 4, 1, 2, xlabel=LIKELIHOOD)
    reach = np.nanmax([unguided[0], *(x for c in curves.values() for x in c[0][np.isfinite(c[1])])])
    grid = np.linspace(unguided[0], reach, 60)
    best = on_front(curves[chosen], unguided, grid)
    start = *unguided, unguided[1], unguided[1]
    for rule, look in looks(dict.fromkeys([chosen, *curves])).items():
        curve = np.column_stack([start, np.stack(curves[rule])])
        curve = curve[:, curve[0] >= np.fmax.accumulate(curve[0])]  # past the threshold likelihood falls by thousands
        style = {rule: look | (dict(linewidth=2.2, zorder=3) if rule == chosen else dict(linewidth=1.4))}
        lines(left, {rule: curve[:2]}, style)
        left.vlines(*curve[[0, 2, 3]], color=look["color"], linewidth=1, alpha=0.6)
        lines(right, {rule: (grid, on_front(curves[rule], unguided, grid) / best)}, style, marker="")
    ring(left, *unguided, "λ = 0")
    if any(np.isfinite(ln.get_xydata()).all(1).any() for ln in left.get_lines()):  # a logarithm of nothing has no scale
        left.set_yscale("log")
    for ax in (left, right):
        ax.axvline(on_policy, color="black", linewidth=1, linestyle="--", label="on-policy")
    left.set(ylabel="dynamics error / variance", title="lower right is better")
    right.set(ylabel=f"error / that of {chosen}\nat the same likelihood", title="above 1: dominated")
    return finished(fig)


def states_over_lam(lams, distances, null, calibrated, title):
    """Energy distance (std) of states to references over λ [L]: distances, reference -> [L]; null -> chance's 95% quantile."""
    labels = dict(xlabel="guidance weight λ", ylabel="energy distance of states (std)\nthin: what chance gives")
    fig, [[ax]] = figure(title, 7.5, 3.4, **labels)
    lines(ax, {f"to {name}": (lams, values) for name, values in distances.items()}, clip_on=False)
    for name, look in looks(distances).items():
        ax.axhline(null[name], color=look["color"], linewidth=0.8, linestyle=look["linestyle"], alpha=0.6)
    ax.axvline(calibrated, color="black", linestyle="-.", linewidth=1.2, label=f"calibrated λ = {calibrated:.3g}")
    ax.set_xscale("symlog", linthresh=min((v for v in lams if v > 0), default=1.0))
    ax.set(xlim=(0, None), ylim=(min(0, ax.get_ylim()[0]), None))
    return finished(fig)


def by_horizon(curves, title, xlabel="steps k from the start"):
    """Error over the data's variance against k or place: label -> [K] or (mean, low, high) of [K]."""
    fig, [[ax]] = figure(title, 7.5, 3.6, xlabel=xlabel, ylabel="squared error / variance", yscale="log")
    curves = {label: np.atleast_2d(values) for label, values in curves.items()}
    lines(ax, {label: (np.arange(1, v.shape[1] + 1), *v) for label, v in curves.items()}, marker="")
    ax.grid(axis="y", alpha=0.3)
    return finished(fig)
