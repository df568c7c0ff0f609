"""Figures: arrays in, `Figure` out, one style, colours that the colour-blind can tell apart."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from pgdlib.lab import artifacts

DATA, MODEL, GUIDED, THEIRS, MUTED = (sns.color_palette("colorblind")[i] for i in (0, 1, 2, 4, 7))


def use_style():
    """The style of all figures; call it once a notebook."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", font_scale=0.9)
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 100, "savefig.dpi": 150})
    plt.rcParams.update({"figure.constrained_layout.use": True, "legend.frameon": False, "axes.titlesize": "medium"})


def save(fig, name, scale, table=None):
    """Write `fig`, and the `table` it was drawn from, to runs/figures/<scale>/<name>.png and .csv; the figure."""
    folder = artifacts.root() / "figures" / scale
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, write in ((".png", fig.savefig), (".csv", None if table is None else pd.DataFrame(table).to_csv)):
        if write is not None:
            with artifacts.replacing(folder / f"{name}{suffix}") as partial:
                write(partial, **({"format": "png"} if suffix == ".png" else {"index": False}))
    return fig


def returns(groups, references, title):
    """Histograms of D4RL-scale returns: groups name -> [n], references name -> value (vertical lines)."""
    fig, ax = plt.subplots(figsize=(7, 3.2))
    shown = np.concatenate([*groups.values(), [0.0, *references.values()]])
    shown = shown[np.isfinite(shown)]
    bins = np.linspace(shown.min(), shown.max(), 40)
    for (name, values), colour in zip(groups.items(), (DATA, MODEL, GUIDED, THEIRS)):
        weights = np.full(len(values), 1 / len(values))
        ax.hist(values, bins, weights=weights, alpha=0.55, color=colour, label=f"{name} (n={len(values):,})")
    for (name, value), line in zip(references.items(), (":", "--", "-.")):
        ax.axvline(value, color="black", linestyle=line, linewidth=1.2, label=f"{name}: {value:,.0f}")
    ax.set(xlabel="return on D4RL's scale (first 100 steps, ended by a fall)", ylabel="fraction of episodes", title=title)
    ax.legend(fontsize="small")
    return fig


def episode(obs, rewards, title):
    """One episode obs [T, 45], rewards [T]: the pen against its target, its height, the reward."""
    fig = Figure(figsize=(11, 3))  # without pyplot, for a thread may draw it
    axes = fig.subplots(1, 3)
    t = np.arange(len(obs)) / 100
    for i, (name, colour) in enumerate(zip("xyz", (DATA, MODEL, GUIDED))):
        axes[0].plot(t, obs[:, 33 + i], color=colour, label=name)
        axes[0].plot(t, obs[:, 36 + i], color=colour, linestyle=":")
    axes[0].set(xlabel="time (s)", ylabel="pen axis (dotted: target)")
    axes[0].legend(ncols=3, fontsize="small")
    axes[1].plot(t, obs[:, 26], color=DATA)
    axes[1].axhline(0.075, color="black", linestyle="--", linewidth=1, label="fallen below")
    axes[1].set(xlabel="time (s)", ylabel="pen height (m)")
    axes[1].legend(fontsize="small")
    axes[2].plot(t, rewards, color=DATA)
    axes[2].set(xlabel="time (s)", ylabel="reward")
    fig.suptitle(title, fontsize="medium")
    return fig


def restoring(clean, noised, denoised, sigmas, title):
    """State channels [36, T] of a trajectory: for each of `sigmas` [L] noised [L, 36, T] above, denoised below; and `clean`.

    All are normalised; the noised ones are scaled to unit variance.
    """
    fig = Figure(figsize=(2.1 * len(sigmas) + 3.2, 4.2))
    axes = fig.subplots(2, len(sigmas) + 1, sharex=True, sharey=True, squeeze=False)
    how = dict(aspect="auto", cmap="RdBu_r", vmin=-2.5, vmax=2.5, interpolation="nearest")
    for (above, below), sigma, x, estimate in zip(axes.T, sigmas, noised, denoised):
        above.imshow(x / np.sqrt(1 + sigma**2), **how)
        image = below.imshow(estimate, **how)
        above.set_title(f"noised, σ = {sigma:.2g}", fontsize="small")
        below.set_title(f"denoised, error {np.mean((estimate - clean) ** 2):.2g}", fontsize="small")
    for ax in axes[:, -1]:
        ax.imshow(clean, **how)
        ax.set_title("the truth", fontsize="small")
    axes[0, 0].set(ylabel="36 states", yticks=[])
    axes[1, 0].set(ylabel="36 states")
    for ax in axes[1]:
        ax.set_xlabel("step")
    fig.colorbar(image, ax=axes[:, -1], label="std")
    fig.suptitle(title, fontsize="medium")
    return fig


def floors(table, title):
    """Bars of the normalised error by group of dimensions; table: group -> {line name -> value}. Zeros are left out."""
    frame = pd.DataFrame(table).T
    fig, ax = plt.subplots(figsize=(8, 0.42 * len(frame) + 1.6))
    y = np.arange(len(frame))[::-1]
    for (name, values), marker, colour in zip(frame.items(), "osD^v", (GUIDED, MUTED, THEIRS, MODEL, DATA)):
        shown = values.where(values > 1e-12)
        ax.plot(shown, y, marker, color=colour, label=name, markersize=7)
    ax.set_yticks(y, frame.index)
    ax.set(xscale="log", xlabel="one-step squared error / variance of the data", title=title)
    ax.grid(axis="both", alpha=0.3)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    return fig


def coverage(horizons, kept, chosen, title):
    """Share of the data's steps that lie in a full window [n], against the trajectory length [n]."""
    fig, ax = plt.subplots(figsize=(6, 2.8))
    ax.plot(horizons, 100 * np.asarray(kept), color=DATA, marker=".")
    ax.axvline(chosen, color=MODEL, linestyle="--", label=f"this run: {chosen}")
    ax.axvline(128, color="black", linestyle=":", label="the paper: 128")
    ax.set(xlabel="trajectory length (steps)", ylabel="steps in full windows (%)", ylim=(-3, 103), title=title)
    ax.legend(fontsize="small")
    return fig


def learning_curve(steps, mean, se, reference, title):
    """Return [n] with its standard error over environment steps, and D4RL's expert reference."""
    fig, ax = plt.subplots(figsize=(6, 3))
    steps, mean, se = (np.asarray(v, dtype=float) for v in (steps, mean, se))
    ax.plot(steps / 1e6, mean, color=DATA, marker=".")
    ax.fill_between(steps / 1e6, mean - 1.96 * se, mean + 1.96 * se, color=DATA, alpha=0.2, linewidth=0)
    ax.axhline(reference, color="black", linestyle="--", linewidth=1, label=f"D4RL's expert reference: {reference:,.0f}")
    ax.set(xlabel="environment steps (millions)", ylabel="return, D4RL's scale", title=title)
    ax.legend(fontsize="small")
    return fig


def training(losses, sigmas, train_loss, val_loss, title):
    """Left: the loss of every training step, smoothed. Right: the loss by noise level on training and validation windows."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
    window = max(1, len(losses) // 100)
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    left.plot(np.arange(len(smooth)) + window, smooth, color=DATA)
    left.set(xlabel="training step", ylabel=f"EDM loss (mean of {window} steps)", yscale="log")
    right.plot(sigmas, train_loss, color=DATA, marker="o", label="training windows")
    right.plot(sigmas, val_loss, color=MODEL, marker="s", label="validation windows")
    right.axhline(1, color="black", linewidth=1, linestyle=":", label="a network that has learnt nothing")
    right.set(xlabel="noise level σ", ylabel="EDM loss", xscale="log", yscale="log")
    right.legend(fontsize="small")
    fig.suptitle(title, fontsize="medium")
    return fig


def channels(real, generated, names, title):
    """Some channels over time: `real` and `generated` are lists of [n, T] arrays, one of each name."""
    fig, axes = plt.subplots(2, len(names), figsize=(2.9 * len(names), 4.4), sharex=True, sharey="col", squeeze=False)
    for column, name in enumerate(names):
        for row, (values, colour, label) in enumerate(((real, DATA, "data"), (generated, MODEL, "generated"))):
            t = np.arange(values[column].shape[1]) / 100
            axes[row, column].plot(t, values[column].T, color=colour, linewidth=0.8, alpha=0.7)
            axes[row, 0].set_ylabel(label)
        axes[0, column].set_title(name, fontsize="small")
        axes[1, column].set_xlabel("time (s)")
    fig.suptitle(title, fontsize="medium")
    return fig


def quantiles(real, generated, title):
    """Quantiles of every channel of generated steps against the data's, both [n, C] in normalised space."""
    fig, ax = plt.subplots(figsize=(4.2, 4.2))
    levels = (0.05, 0.25, 0.5, 0.75, 0.95)
    for level, colour in zip(levels, sns.color_palette("viridis", len(levels))):
        ax.plot(
            np.quantile(real, level, 0), np.quantile(generated, level, 0), "o", color=colour, markersize=4, label=f"{level:.0%}"
        )
    lim = np.array([-2.6, 2.6])
    ax.plot(lim, lim, color="black", linewidth=0.8)
    ax.set(xlabel="data (std)", ylabel="generated (std)", xlim=lim, ylim=lim, title=title)
    ax.legend(title="quantile", fontsize="small")
    return fig


def sharpness(std, spread, title):
    """For each action: the std of the policy and the spread of its actions over its episodes, [24] each."""
    fig, ax = plt.subplots(figsize=(9, 2.8))
    x = np.arange(len(std))
    ax.bar(x - 0.2, std, 0.4, color=MODEL, label="std of the policy in one state")
    ax.bar(x + 0.2, spread, 0.4, color=DATA, label="std of its actions over all states")
    ax.set(xlabel="action dimension", ylabel="std (action limits: ±1)", title=title)
    ax.set_xticks(x)
    ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return fig


def sensitivity(sizes, curves, floors, title):
    """Reported error against the size of an injected one: curves, estimator -> [L]; floors, estimator -> (mean, low, high)."""
    fig, ax = plt.subplots(figsize=(7.5, 3.8))
    styles = zip(curves.items(), (GUIDED, THEIRS, MUTED), "osD", ("-", "--", ":"))
    for (name, values), colour, marker, line in styles:
        ax.plot(sizes, values, color=colour, marker=marker, linestyle=line, markersize=5, label=name)
        ax.axhspan(*floors[name][1:], color=colour, alpha=0.2, linewidth=0)
    ax.set(xscale="log", yscale="log", title=title)
    ax.set(xlabel="injected noise (std of the data)", ylabel="reported error / variance\n(band: with nothing injected)")
    ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return fig


def loss_against_error(loss, error, title):
    """Each trajectory's denoising loss [n] and dynamics error [n]."""
    fig, ax = plt.subplots(figsize=(5, 3.6))
    ax.plot(loss, error, "o", color=DATA, markersize=4, alpha=0.6, markeredgewidth=0)
    if np.isfinite(loss * error).any():
        ax.set(xscale="log", yscale="log")
    ax.set(title=title, xlabel="denoising loss (low: likely under the model)", ylabel="dynamics error / variance")
    return fig


def sampler_quality(table, title):
    """Samplers by cost: error, motion, error over own motion, distance to the data, against network evaluations.

    table: a frame with evaluations, family, and for each of error, motion, relative and distance: mean, low, high, and real.
    """
    fig, axes = plt.subplots(1, 4, figsize=(13, 3.4))
    labels = dict(
        error="dynamics error / variance",
        motion="motion: error of predicting stillness",
        relative="error / own motion",
        distance="energy distance to data (std)",
    )
    styles = (MODEL, "s", "--"), (DATA, "o", "-"), (GUIDED, "v", ":")
    for ax, (name, label) in zip(axes, labels.items()):
        for (family, rows), (colour, marker, line) in zip(table.groupby("family", sort=False), styles):
            mean, low, high = (rows[f"{name}.{k}"].to_numpy() for k in ("mean", "low", "high"))
            style = dict(color=colour, marker=marker, linestyle=line, capsize=2)
            ax.errorbar(rows["evaluations"], mean, [mean - low, high - mean], label=family, **style)
        ax.set(xscale="log", xlabel="network evaluations")
        ax.set_title(label, fontsize="small")
        if np.isfinite(real := table[f"{name}.real"].iloc[0]):
            ax.axhline(real, color="black", linewidth=1, linestyle=":", label="real data")
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    axes[0].legend(fontsize="x-small")
    fig.suptitle(title, fontsize="medium")
    return fig
