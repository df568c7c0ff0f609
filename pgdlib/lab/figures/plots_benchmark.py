"""Figures of the benchmark: learning curves, and Table 1 with everything that gives it meaning."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns

from pgdlib import measures
from pgdlib.lab import seeds as seedstats
from pgdlib.simulators import pen as adroit


def colours(names):
    """A colour for each row, the same in all figures."""
    palette = sns.color_palette("colorblind", 10)
    return {name: palette[i % 10] for i, name in enumerate(names)}


def curves(steps, returns, resamples, title):
    """Mean returns over seeds with their standard errors: steps [P], returns row -> [P, S], resamples: steps of new data."""
    fig, ax = plt.subplots(figsize=(8, 4))
    for (name, colour), marker in zip(colours(returns).items(), itertools.cycle("osD^vPX*")):
        mean, error = np.array([seedstats.mean_se(at_step) for at_step in returns[name]]).T
        ax.plot(steps, mean, color=colour, marker=marker, markersize=5, label=name)
        ax.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
    for i, step in enumerate(resamples):
        ax.axvline(step, color="0.7", linestyle=":", linewidth=1, label="new synthetic data" if i == 0 else None)
    ax.set(xlabel="training step", ylabel="return, D4RL's scale (± SE over seeds)", title=title)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    return fig


def table1(rows, behaviour, paper, title):
    """Table 1 as a figure: one line a row with each seed's return, the mean ± SE, and the interval of the IQM.

    rows: name -> returns [S] (NaN where diverged); behaviour: (mean, se) of the data's own episodes; paper: name -> (mean,
    se), the paper's numbers and others' on D4RL's own data, drawn apart below.
    """
    lines = [("behaviour (± over episodes)", behaviour, None)]
    lines += [(name, seedstats.mean_se(values), np.asarray(values, dtype=float)) for name, values in rows.items()]
    theirs = [(name, values, None) for name, values in paper.items()]
    fig, ax = plt.subplots(figsize=(9.5, 0.42 * (len(lines) + len(theirs)) + 1.9))
    palette, labels = colours(rows), []
    for y, (name, (mean, se), seeds) in enumerate([*lines, *theirs]):
        y += (y >= len(lines)) * 0.7  # what others measured stands apart
        colour = palette.get(name, "0.35")
        if seeds is not None:
            ax.plot(seeds, np.full(len(seeds), y + 0.22), "|", color=colour, markersize=7)
            _, low, high = measures.bootstrap(seedstats.interquartile_mean, seeds)
            ax.plot([low, high], [y, y], color=colour, linewidth=6, alpha=0.25, solid_capstyle="butt")
        ax.errorbar(mean, y, xerr=0 if np.isnan(se) else se, fmt="o" if y < len(lines) else "s", color=colour, capsize=3)
        score = adroit.normalised_score(mean)
        text = f"{mean:,.0f}" + ("" if np.isnan(se) else f" ± {se:,.0f}")
        ax.annotate(
            f"{text:>16}  {score:6.1f}", (1.01, y), xycoords=("axes fraction", "data"), va="center", family="monospace",
            fontsize="small",
        )  # fmt: skip
        labels.append((y, name))
    ax.set_yticks(*zip(*labels))
    ax.set_ylim(labels[-1][0] + 0.6, -0.6)
    if theirs:
        ax.axhline(len(lines) - 0.15, color="0.8", linewidth=1)
    ax.annotate(f"{'mean ± SE':>16}  {'score':>6}", (1.01, 1.0), xycoords="axes fraction", va="bottom", family="monospace",
                fontsize="small")  # fmt: skip
    ax.set(xlabel="return on D4RL's scale", title=title)
    ax.grid(axis="x", alpha=0.3)
    return fig
