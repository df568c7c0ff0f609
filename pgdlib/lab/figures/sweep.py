"""Figures of a sweep: every rule on every dataset, means over seeds.

A `study` is a frame with dataset, rule, lam (rising) and mean, low and high of `log_likelihood` (nats per action dimension)
and of `relative`, the dynamics error over the unguided one of the same seed.
"""

import numpy as np
import seaborn as sns
from matplotlib import ticker

from pgdlib.lab.figures.style import DATA, LIKELIHOOD, MARKERS, finished, grid, interval, lines, looks, marks, ring

ERROR = "dynamics error / that at λ = 0\n(the same seed, so the same model)"
X, Y = "log_likelihood", "relative"


def fronts(study, title):
    """Dynamics error against likelihood: a panel for each dataset, a line for each rule, a mark for each λ of a `study`.

    A line ends where the likelihood falls, which is past the rule's threshold. Intervals: in the other figures.
    """
    fig, panels = _panels(study, title, sharex=False, xlabel=LIKELIHOOD)
    for rows, (ax,) in panels:
        rows = _risen(rows)
        curves = {rule: (part[f"{X}.mean"], part[f"{Y}.mean"]) for rule, part in rows.groupby("rule", sort=False)}
        lines(ax, curves, looks(study["rule"].unique()))
        ring(ax, *rows.loc[rows["lam"] == 0, [f"{X}.mean", f"{Y}.mean"]].head(1).to_numpy().T, "λ = 0")
    fig.supylabel(ERROR)
    return finished(fig)


def at_likelihood(study, chosen, title):
    """Each rule's error over that of the rule `chosen` at equal likelihood: a panel for each dataset, rules in rows.

    study: a frame with dataset, log_likelihood (0 unguided, 1 on-policy), rule, and mean, low and high of `ratio`. Where a
    rule does not reach the likelihood in every seed, it has no mark.
    """
    levels = sorted(study["log_likelihood"].unique())
    shifts = np.linspace(-0.22, 0.22, len(levels)) if len(levels) > 1 else [0]
    styles = list(zip(levels, shifts, sns.color_palette("viridis", len(levels)), MARKERS))
    fig, panels = _panels(study, title, sharey=True, xlabel=f"error / that of {chosen}\nat the same likelihood")
    places = _name_rows(fig, study["rule"])
    for rows, (ax,) in panels:
        for level, shift, colour, marker in styles:
            part = rows[rows["log_likelihood"] == level]
            style = dict(fmt=marker, color=colour, markersize=4.5, elinewidth=1.2, label=f"{level:g}")
            marks(ax, part["rule"].map(places).astype(float) + shift, *interval(part, "ratio"), **style)
        ax.axvline(1, color="black", linewidth=1)
    return finished(fig, "share of the way to the\non-policy likelihood")


def over_lam(study, title):
    """Likelihood and dynamics error of a `study` over λ, side by side for each dataset; bands are the intervals."""
    styles = looks(study["rule"].unique())
    fig, panels = _panels(study, title, 2, xscale="log", xlabel="λ, in each rule's own sense")
    for rows, axes in panels:
        for ax, measure in zip(axes, (X, Y)):
            for rule, part in rows[rows["lam"] > 0].groupby("rule", sort=False):
                lines(ax, {rule: (part["lam"], *interval(part, measure))}, styles)
            ax.axhline(rows.loc[rows["lam"] == 0, f"{measure}.mean"].iloc[0], color="red", linewidth=1, label="λ = 0")
            shown = _risen(rows)[f"{measure}.mean"].dropna()  # past their thresholds, curves leave the panel
            if len(shown):
                room = 0.1 * (np.ptp(shown) or 1)
                ax.set_ylim(shown.min() - room, shown.max() + room)
        for ax, label in zip(axes, (LIKELIHOOD, ERROR)):
            ax.set_ylabel(label)
    return finished(fig)


def gains(runs, study, paper, title):
    """What each row of Table 1 gains (D4RL's scale): a panel for each dataset, rows below one another.

    runs: a frame with dataset, row, seed, gain, low, high, one line a run, thin; study: their means over runs, dataset, row and
    mean, low and high of `gain`, thick; paper: dataset -> the gain that the paper reports, a dotted line.
    """
    fig, panels = _panels(study, title, sharey=True, xlabel="return less that of unguided\n(D4RL's scale)")
    places = _name_rows(fig, study["row"])
    for means, (ax,) in panels:
        dataset = means["dataset"].iloc[0]
        for row, own in runs[runs["dataset"] == dataset].groupby("row", sort=False):
            style = dict(fmt=".", color="0.65", elinewidth=0.8, label="one run: mean over its agents")
            y = places[row] + np.linspace(-0.1, 0.35, len(own))
            marks(ax, y, own["gain"], own["low"], own["high"], **style)
        style = dict(fmt="D", color=DATA, elinewidth=2.2, label="mean over runs")
        marks(ax, means["row"].map(places) - 0.27, *interval(means, "gain"), **style)
        ax.axvline(0, color="black", linewidth=1)
        if dataset in paper:
            ax.axvline(paper[dataset], color="red", linewidth=1, linestyle=":", label="the paper's gain")
    return finished(fig)


def quality(effects, names, title):
    """Each claim's effect over the unguided error of the model, better models on the right: a panel for each of `names`.

    effects: a frame with id, variant, error, effect, low and high; names: id -> what its effect is.
    """
    fig, axes = grid(title, len(names), 3.4, 2.5, 4 if len(names) % 3 == 1 else 3, xscale="log")  # none alone in its row
    styles = looks(effects["variant"].unique())
    for ax, (name, words) in zip(axes, names.items()):
        for variant, part in effects[effects["id"] == name].groupby("variant", sort=False):
            y, low, high = (part[k].to_numpy(dtype=float) for k in ("effect", "low", "high"))
            bars = np.nan_to_num(np.abs(np.stack([low, high]) - y))
            ax.errorbar(part["error"], y, bars, **styles[variant] | {"linestyle": ""}, elinewidth=0.8, label=variant)
        ax.set_title(words)
    axes[0].set_xlim(1.4 * effects["error"].max(), effects["error"].min() / 1.4)  # also where all are of one model
    fig.supxlabel("unguided error / variance")
    finished(fig)
    axes[0].xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))  # of all: they share it, and are narrow
    return fig


def _panels(study, title, measures=1, **how):
    """A figure, and for each dataset the rows of the frame `study` and its axes [measures] under its name."""
    names, parts = zip(*study.groupby("dataset", sort=False))
    fig, axes = grid(title, measures * len(names), 4.4, 3.4, 3 if measures == 1 else measures, **how)
    for ax, name in zip(axes, np.repeat(names, measures)):
        ax.set_title(name)
    return fig, list(zip(parts, axes.reshape(-1, measures)))


def _name_rows(fig, names):
    """Name -> its row in all panels, from above: the order in which `names` first come."""
    places = {name: i for i, name in enumerate(names.unique())}
    fig.axes[0].set_yticks(range(len(places)), places)
    for ax in fig.axes:
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(len(places) - 0.5, -0.5)
    return places


def _risen(rows):
    """The rows of a study up to each rule's threshold, where the likelihood begins to fall."""
    return rows[rows[f"{X}.mean"] >= rows.groupby("rule")[f"{X}.mean"].cummax()]
