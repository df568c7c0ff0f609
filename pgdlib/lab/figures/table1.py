"""Figures of Table 1: learning curves, and the table with everything that gives it meaning."""

import numpy as np

from pgdlib import measures
from pgdlib.lab import seeds
from pgdlib.lab.figures.style import figure, finished, grid, lines, looks, marks


def curves(steps, returns, resamples, title):
    """Mean returns over seeds with their standard errors: steps [P], returns row -> [P, S], resamples: steps of new data."""
    fig, [[ax]] = figure(title, 8, 4, xlabel="training step", ylabel="return, D4RL's scale (± SE over seeds)")
    found = {name: np.array([seeds.mean_se(at_step) for at_step in each]).T for name, each in returns.items()}
    lines(ax, {name: (steps, mean, mean - error, mean + error) for name, (mean, error) in found.items()})
    for step in resamples:
        ax.axvline(step, color="0.7", linestyle=":", linewidth=1, label="new synthetic data")
    return finished(fig)


def agents(returns, title):
    """Mean returns ± SE of agents on each kind of data, which stand in rows: agent -> kind -> [S], NaN where diverged."""
    kinds = list(dict.fromkeys(kind for own in returns.values() for kind in own))
    fig, [[ax]] = figure(title, 8.5, 0.6 * len(kinds) + 1, xlabel="return, D4RL's scale (± SE over seeds)")
    for shift, (agent, look) in zip(np.linspace(-0.3, 0.3, len(returns)), looks(returns).items()):
        mean, error = np.array([seeds.mean_se(values) for values in returns[agent].values()]).T
        y = [kinds.index(kind) + shift for kind in returns[agent]]
        marks(ax, y, mean, mean - error, mean + error, fmt=look["marker"], color=look["color"], markersize=5, label=agent)
    ax.set(yticks=range(len(kinds)), yticklabels=kinds, ylim=(len(kinds) - 0.5, -0.5))
    ax.hlines(np.arange(1, len(kinds)) - 0.5, 0, 1, "0.8", linewidth=0.8, transform=ax.get_yaxis_transform())
    return finished(fig)


def conservatism(weights, returns, cloning, title):
    """Mean returns ± SE at `weights` [C] of staying near the data: agent -> (real, unguided, guided) [C, S]; `cloning` [S]."""
    axis = dict(xscale="log", xlabel="weight of staying near the data", ylabel="return, D4RL's scale (± SE)")
    fig, axes = grid(title, len(returns), 3.3, 3, sharex=False, **axis)
    for ax, (agent, parts) in zip(axes, returns.items()):
        found = (np.array([seeds.mean_se(of_weight) for of_weight in each]).T for each in parts)
        named = zip(("real data", "unguided data", "data guided toward the agent"), found)
        lines(ax, {name: (weights, mean, mean - error, mean + error) for name, (mean, error) in named})
        ax.axhline(np.nanmean(cloning), color="0.35", linestyle=":", label="cloning")
        ax.set_title(agent, fontsize="medium")
    return finished(fig)


def table1(rows, behaviour, paper, score, title):
    """Table 1 as a figure: one line a row with each seed's return, the mean ± SE, and the interval of the IQM.

    rows: name -> returns [S] (NaN where diverged); behaviour: (mean, se) of the data's own episodes; paper: name -> (mean,
    se), the paper's numbers and others' on D4RL's own data, drawn apart below. All on D4RL's scale; `score` gives D4RL's score.
    """
    own = [("behaviour (± over episodes)", behaviour), *((name, seeds.mean_se(values)) for name, values in rows.items())]
    names, measured = zip(*own, *paper.items())
    y = np.arange(len(names)) + np.where(np.arange(len(names)) < len(own), 0, 0.7)  # what others measured stands apart
    colours = ["0.35", *(look["color"] for look in looks(rows).values()), *["0.35"] * len(paper)]
    fig, [[ax]] = figure(title, 9.5, 0.42 * len(y) + 1.9, xlabel="return on D4RL's scale")
    text = dict(family="monospace", fontsize="small")
    ax.annotate(f"{'mean ± SE':>16}  {'score':>6}", (1.01, 1), xycoords="axes fraction", va="bottom", **text)
    for at, colour, (mean, se) in zip(y, colours, measured):
        error = np.nan_to_num(se)
        marks(ax, [at], [mean], [mean - error], [mean + error], fmt="o" if at < len(own) else "s", color=colour, capsize=3)
        number = f"{mean:,.0f}" + ("" if np.isnan(se) else f" ± {se:,.0f}")
        ax.annotate(f"{number:>16}  {score(mean):6.1f}", (1.01, at), xycoords=("axes fraction", "data"), va="center", **text)
    for at, colour, values in zip(y[1:], colours[1:], rows.values()):
        ax.plot(values, np.full(len(values), at + 0.22), "|", color=colour, markersize=7)
        _, low, high = measures.bootstrap(seeds.interquartile_mean, values)
        ax.plot([low, high], [at, at], color=colour, linewidth=6, alpha=0.25, solid_capstyle="butt")
    ax.set_yticks(y, names)
    ax.set_ylim(y[-1] + 0.6, -0.6)
    if paper:
        ax.axhline(len(own) - 0.15, color="0.8", linewidth=1)
    ax.grid(axis="x", alpha=0.3)
    return fig
