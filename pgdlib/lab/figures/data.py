"""Figures of the data, the simulator, the denoiser and the guide."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from pgdlib.lab.figures.style import COLOURS, DATA, MODEL, STATES, figure, finished, interval, lines, looks


def returns(groups, references, title):
    """Histograms of returns: groups, name -> [n]; references, name -> value, upright lines. What is not finite is left out."""
    scale = " on D4RL's scale" if references else ""
    fig, [[ax]] = figure(title, 8.5, 3.2, xlabel=f"return{scale}", ylabel="fraction of episodes")
    shown = np.concatenate([*groups.values(), [0.0, *references.values()]])
    shown = shown[np.isfinite(shown)]
    bins = np.linspace(shown.min(), shown.max(), 40)
    for name, look in looks(groups).items():
        n = len(groups[name])
        ax.hist(groups[name], bins, weights=np.full(n, 1 / n), alpha=0.55, color=look["color"], label=f"{name} (n={n:,})")
    for (name, value), line in zip(references.items(), (":", "--", "-.")):
        ax.axvline(value, color="black", linestyle=line, linewidth=1.2, label=f"{name}: {value:,.0f}")
    return finished(fig)


def episode(obs, rewards, task, title):
    """Some channels and the reward in one episode of the `Task`: obs [T, obs_dim] and rewards [T], in the environment's units.

    The channels are its `axes`, if it has them (dotted: the one to come to), and the first of `shown`.
    """
    fig = Figure(figsize=(11, 3))  # without pyplot, for a thread may draw it
    axes = fig.subplots(1, 3)
    t = task.simulator.dt * np.arange(len(obs))
    plain = {label: obs[:, i] for label, i in list(task.shown.items())[: 1 if task.axes else 2]} | {"reward": rewards}
    for part, dashes in zip(task.axes, ("-", ":")):
        lines(axes[0], {name: (t, v) for name, v in zip("xyz", obs[:, part].T)}, linestyle=dashes, marker="")
        axes[0].set(ylabel="axis (dotted: target)")
    for ax, (label, values) in zip(axes[-len(plain) :], plain.items()):
        ax.plot(t, values, color=DATA)
        ax.set(ylabel=label)
    for ax in axes:
        ax.set(xlabel="time (s)" if task.simulator.states else "step")
    fig.suptitle(title)
    return finished(fig)


def restoring(clean, noised, denoised, sigmas, title):
    """States [C, T] of a trajectory: for each of `sigmas` [L] noised [L, C, T] above, denoised below; and `clean`.

    All are normalised; the noised ones are scaled to unit variance.
    """
    fig = Figure(figsize=(2.1 * len(sigmas) + 3.2, 4.2))
    axes = fig.subplots(2, len(sigmas) + 1, sharex=True, sharey=True, squeeze=False)
    for (above, below), sigma, x, estimate in zip(axes.T, sigmas, noised, denoised):
        above.imshow(x / np.sqrt(1 + sigma**2), **STATES)
        below.imshow(estimate, **STATES)
        above.set_title(f"noised, σ = {sigma:.2g}", fontsize="small")
        below.set_title(f"denoised, error {np.mean((estimate - clean) ** 2):.2g}", fontsize="small")
    for ax in axes[:, -1]:
        image = ax.imshow(clean, **STATES)
        ax.set_title("the truth", fontsize="small")
    for ax in axes[:, 0]:
        ax.set(ylabel=f"{len(clean)} states", yticks=[])
    fig.supxlabel("step")
    fig.colorbar(image, ax=axes[:, -1], label="std")
    fig.suptitle(title)
    return fig


def floors(table, title):
    """The normalised error of each group of dimensions; table: group -> {line name -> value}. Zeros are left out."""
    frame = pd.DataFrame(table).T
    places = np.arange(len(frame))
    xlabel = "one-step squared error / variance of the data"
    fig, [[ax]] = figure(title, 8, 0.42 * len(frame) + 1.6, xscale="log", xlabel=xlabel)
    shown = frame.where(frame > 1e-12)
    lines(ax, {name: (values, places) for name, values in shown.items()}, linestyle="", markersize=7)
    ax.set_yticks(places, frame.index)
    ax.invert_yaxis()
    ax.grid(axis="both", alpha=0.3)
    return finished(fig)


def coverage(horizons, kept, chosen, title):
    """Share of the data's steps that lie in a full window [n], against the trajectory length [n] in steps."""
    labels = dict(xlabel="trajectory length (steps)", ylabel="steps in full windows (%)")
    fig, [[ax]] = figure(title, 7.5, 2.8, ylim=(-3, 103), **labels)
    ax.plot(horizons, 100 * np.asarray(kept), color=DATA, marker=".")
    ax.axvline(chosen, color=MODEL, linestyle="--", label=f"this run: {chosen}")
    ax.axvline(128, color="black", linestyle=":", label="the paper: 128")
    return finished(fig)


def learning_curve(steps, mean, se, reference, title):
    """Return [n] and its standard error [n] (band: 95%) over environment steps [n], and D4RL's expert reference."""
    fig, [[ax]] = figure(title, 8, 3, xlabel="environment steps (millions)", ylabel="return, D4RL's scale")
    steps, mean, se = (np.asarray(v, dtype=float) for v in (steps, mean, se))
    lines(ax, {"mean, 95% interval": (steps / 1e6, mean, mean - 1.96 * se, mean + 1.96 * se)})
    ax.axhline(reference, color="black", linestyle="--", linewidth=1, label=f"D4RL's expert: {reference:,.0f}")
    return finished(fig)


def training(losses, sigmas, train_loss, val_loss, title):
    """The loss of every step of some trainings, name -> [n], smoothed; and, on the right, of the last of them by noise level:
    on training and on validation windows, [L] each, at `sigmas` [L]."""
    fig, [(left, right)] = figure(title, 12, 3.2, 1, 2, xscale="log", yscale="log", ylabel="EDM loss")
    for (name, values), colour in zip(losses.items(), COLOURS[2:]):  # the first two are the right's
        window = max(1, len(values) // 100)
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        left.plot(np.arange(len(smooth)) + window, smooth, color=colour, label=name)
    left.set(xlabel="training step", ylabel="EDM loss (mean of 1% of the steps)")
    lines(right, {"training windows": (sigmas, train_loss), "validation windows": (sigmas, val_loss)})
    right.axhline(1, color="black", linewidth=1, linestyle=":", label="a network that\nhas learnt nothing")
    right.set(xlabel="noise level σ")
    return finished(fig)


def channels(real, generated, names, dt, title):
    """Some channels over time: `real` and `generated` are lists of [n, T] arrays, `dt` s apart, one of each of the `names`."""
    fig, axes = figure(title, 2.9 * len(names), 4.4, 2, len(names), sharex=True, sharey="col")
    for row, values, colour, label in zip(axes, (real, generated), COLOURS, ("data", "generated")):
        row[0].set_ylabel(label)
        for ax, each in zip(row, values):
            ax.plot(dt * np.arange(each.shape[1]), each.T, color=colour, linewidth=0.8, alpha=0.7)
    for ax, name in zip(axes[0], names):
        ax.set_title(name, fontsize="small")
    fig.supxlabel("step" if dt == 1 else "time (s)")
    return fig


def quantiles(real, generated, title):
    """Quantiles of every channel of generated steps against the data's, both [n, C] in normalised space."""
    lim = (-2.6, 2.6)
    fig, [[ax]] = figure(title, 5, 4.2, xlabel="data (std)", ylabel="generated (std)", xlim=lim, ylim=lim)
    levels = (0.05, 0.25, 0.5, 0.75, 0.95)
    for level, colour in zip(levels, sns.color_palette("viridis", len(levels))):
        places = (np.quantile(values, level, 0) for values in (real, generated))
        ax.plot(*places, "o", color=colour, markersize=4, label=f"{level:.0%}")
    ax.plot(lim, lim, color="black", linewidth=0.8)
    return finished(fig, "quantile")


def sharpness(std, spread, title):
    """For each action: the std of the policy and the spread of its actions over its episodes, [A] each (limits: ±1)."""
    fig, [[ax]] = figure(title, 9, 2.8, xlabel="action dimension", ylabel="std (action limits: ±1)")
    frame = pd.DataFrame({"std of the policy in one state": std, "std of its actions over all states": spread})
    frame.plot.bar(ax=ax, width=0.8, rot=0, color=[MODEL, DATA], legend=False)
    return finished(fig)


def sensitivity(sizes, curves, floors, title):
    """Reported error against the `sizes` [L] of an injected one: curves, estimator -> [L]; floors -> (mean, low, high)."""
    labels = dict(xlabel="injected noise (std of the data)", ylabel="reported error / variance\n(band: with nothing injected)")
    fig, [[ax]] = figure(title, 7.5, 3.8, xscale="log", yscale="log", **labels)
    lines(ax, {name: (sizes, values) for name, values in curves.items()})
    for name, look in looks(curves).items():
        ax.axhspan(*floors[name][1:], color=look["color"], alpha=0.2, linewidth=0)
    return finished(fig)


def loss_against_error(loss, error, title):
    """Each trajectory's denoising loss [n] and dynamics error [n] over the data's variance."""
    labels = dict(xlabel="denoising loss (low: likely under the model)", ylabel="dynamics error / variance")
    fig, [[ax]] = figure(title, 5, 3.6, **labels)
    ax.plot(loss, error, "o", color=DATA, markersize=4, alpha=0.6, markeredgewidth=0)
    if np.isfinite(loss * error).any():  # a logarithm of nothing has no scale
        ax.set(xscale="log", yscale="log")
    return finished(fig)


def sampler_quality(table, title):
    """Samplers by cost: error, motion, error over own motion, distance to the data, against network evaluations.

    table: a frame with evaluations, family, and for each of error, motion, relative and distance: mean, low, high, and real.
    """
    labels = dict(error="dynamics error / variance", motion="motion: error of predicting stillness")
    labels |= dict(relative="error / own motion", distance="energy distance to data (std)")
    fig, axes = figure(title, 14.5, 3.4, 1, 4, xscale="log", xlabel="network evaluations")
    for ax, (name, label) in zip(axes[0], labels.items()):
        for family, look in looks(table["family"].unique()).items():
            rows = table[table["family"] == family]
            mean, low, high = interval(rows, name)
            ax.errorbar(rows["evaluations"], mean, [mean - low, high - mean], **look, label=family, capsize=2)
        if np.isfinite(real := table[f"{name}.real"].iloc[0]):
            ax.axhline(real, color="black", linewidth=1, linestyle=":", label="real data")
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
        ax.set_title(label, fontsize="small")
    return finished(fig)
