"""Figures: arrays in, `Figure` out, one style, colours that the colour-blind can tell apart."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from pgdlib import store

DATA, MODEL, GUIDED, THEIRS, MUTED = (sns.color_palette("colorblind")[i] for i in (0, 1, 2, 4, 7))
LIKELIHOOD = "log-likelihood under the guide\n(nats per action dimension)"


def use_style():
    """The style of all figures; call it once a notebook."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", font_scale=0.9)
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 100, "savefig.dpi": 150})
    plt.rcParams.update({"figure.constrained_layout.use": True, "legend.frameon": False, "axes.titlesize": "medium"})


def save(fig, name, scale, table=None):
    """Write `fig`, and the `table` it was drawn from, to runs/figures/<scale>/<name>.png and .csv; the figure."""
    folder = store.root() / "figures" / scale
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, write in ((".png", fig.savefig), (".csv", None if table is None else pd.DataFrame(table).to_csv)):
        if write is not None:
            with store.replacing(folder / f"{name}{suffix}") as partial:
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
    fig, axes = plt.subplots(1, 3, figsize=(11, 3))
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


def figure_1(clouds, sweep, floors, on_policy, title):
    """The paper's Figure 1 with both estimators: one row each.

    clouds: λ -> {"log_likelihood" [n], estimator -> error [n]}, the dots of the left column.
    sweep: a frame with lam, diverged, and mean, low, high of log_likelihood and of every estimator.
    floors: estimator -> the error of real data. on_policy: the mean log-likelihood of the guide's own actions.
    """
    estimators = list(floors)
    fig, axes = plt.subplots(len(estimators), 2, figsize=(11, 3.7 * len(estimators)), squeeze=False)
    for (left, right), estimator in zip(axes, estimators):
        _cloud(left, clouds, estimator, floors[estimator], on_policy)
        _sweep(right, sweep, estimator, floors[estimator], on_policy)
    fig.suptitle(title, fontsize="medium")
    return fig


def _cloud(ax, clouds, estimator, floor, on_policy):
    for (lam, values), colour, marker in zip(clouds.items(), (DATA, MODEL, GUIDED), "osD"):
        x, y = values["log_likelihood"], values[estimator]
        ax.plot(x, y, marker, color=colour, markersize=3.5, alpha=0.55, markeredgewidth=0, label=f"λ = {lam:g}")
    ax.axhline(floor, color="black", linewidth=1, linestyle=":", label="floor: real data")
    ax.axvline(on_policy, color=MUTED, linewidth=1.2, linestyle="--", label="on-policy")
    ax.set(xlabel=LIKELIHOOD, ylabel=f"dynamics error\n({_LABELS[estimator]})", yscale="log")
    ax.legend(fontsize="small", markerscale=1.8)


def _sweep(ax, sweep, estimator, floor, on_policy):
    twin = ax.twinx()
    twin.spines["right"].set_visible(True)
    lams = sweep["lam"].to_numpy()
    ax.set_xscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
    top = lams[np.isfinite(lams)].max(initial=0.0)
    ticks = [v for v in (0, 0.02, 0.1, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 10) if v <= top]
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
    ax.set_ylabel(f"dynamics error ■\n({_LABELS[estimator]}; dotted: floor)", color=MODEL)
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
        ax.text(first, 0.5, "diverged", transform=ax.get_xaxis_transform(), rotation=90, ha="right", va="center")


_LABELS = {
    "reconstructed": "state reconstructed",
    "appendix_b": "the paper's Appendix B",
    "normalised": "state reconstructed, / variance",
}


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


def guided_pair(tracks, title, actions=(0, 9), observations=(31, 33)):
    """One trajectory for each λ: some actions with the guide's mean (dotted), some observations.

    tracks: λ -> (actions [T, 24], means [T, 24], observations [T, 45]), environment space.
    """
    fig, axes = plt.subplots(1, len(actions) + len(observations), figsize=(12, 2.9))
    for (lam, (acted, wanted, obs)), colour in zip(tracks.items(), (DATA, MODEL)):
        t = np.arange(len(acted)) / 100
        for ax, i in zip(axes, actions):
            ax.plot(t, acted[:, i], color=colour, label=f"λ = {lam:g}")
            ax.plot(t, wanted[:, i], color=colour, linestyle=":")
            ax.set(xlabel="time (s)", title=f"action {i} (dotted: guide's mean)")
        for ax, i in zip(axes[len(actions) :], observations):
            ax.plot(t, obs[:, i], color=colour)
            ax.set(xlabel="time (s)", title={31: "pen turn rate (rad/s)", 33: "pen axis x"}.get(i, f"observation {i}"))
    axes[0].legend(fontsize="small")
    fig.suptitle(title, fontsize="medium")
    return fig
