"""Figures of a sweep: every rule on every dataset, means over seeds."""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns

from pgdlib.lab.figures.plots_guidance import LIKELIHOOD, MARKERS

LINES = ("-", "--", ":", "-.", (0, (3, 1, 1, 1)), (0, (5, 1)), (0, (4, 2, 1, 2)), (0, (1, 1)))
ERROR = "dynamics error / that at λ = 0\n(the same seed, so the same model)"
X, Y = "log_likelihood", "relative"


def fronts(study, title):
    """Dynamics error against likelihood: a panel for each dataset, a line for each rule, a mark for each λ.

    study: a frame with dataset, rule, lam (rising) and mean, low and high of `log_likelihood` and `relative`, the
    error over the unguided one. A line ends where the likelihood falls, which is past the rule's threshold. Intervals
    are left to the other figures: those of eight rules hide one another here.
    """
    fig, axes = _panels(study, 1, sharex=True)
    for ax, (_, rows) in zip(axes[0], study.groupby("dataset", sort=False)):
        for rule, part in rows.groupby("rule", sort=False):
            part = part[part[f"{X}.mean"] >= np.fmax.accumulate(part[f"{X}.mean"])]
            ax.plot(part[f"{X}.mean"], part[f"{Y}.mean"], **_styles(study)[rule])
        unguided = rows[rows["lam"] == 0].iloc[0]
        ax.plot(unguided[f"{X}.mean"], unguided[f"{Y}.mean"], "o", color="red", markersize=10, fillstyle="none", label="λ = 0")
        ax.set(xlabel=LIKELIHOOD, ylim=_around(rows, Y))
    axes[0, 0].set_ylabel(ERROR)
    return _finished(fig, axes, title)


def at_likelihood(study, chosen, title):
    """Each rule's error over that of the rule `chosen` at equal likelihood: a panel for each dataset, rules in rows.

    study: a frame with dataset, log_likelihood, rule and mean, low and high of `ratio`. Where a rule does not reach the
    likelihood in every seed, it has no mark.
    """
    levels = sorted(study["log_likelihood"].unique())
    colours = sns.color_palette("viridis", len(levels))
    shifts = dict(zip(levels, np.linspace(-0.22, 0.22, len(levels)) if len(levels) > 1 else [0]))
    fig, axes = _panels(study, 1, sharex=True, sharey=True)
    rules = list(study["rule"].unique())
    for ax, (_, rows) in zip(axes[0], study.groupby("dataset", sort=False)):
        for (level, part), colour, marker in zip(rows.groupby("log_likelihood"), colours, MARKERS):
            y = [rules.index(rule) + shifts[level] for rule in part["rule"]]
            style = dict(fmt=marker, color=colour, markersize=4.5, elinewidth=1.2, label=f"{level:g} nats")
            _marks(ax, y, part["ratio.mean"], part["ratio.low"], part["ratio.high"], **style)
        ax.axvline(1, color="black", linewidth=1)
        ax.set(xlabel=f"error / that of {chosen}\nat the same likelihood")
    _name_rows(axes, rules)
    return _finished(fig, axes, title, "log-likelihood under\nthe guide, a dimension")


def over_lam(study, title):
    """Likelihood and dynamics error over λ, a column for each dataset: `study` as for `fronts`; bands are the intervals."""
    fig, axes = _panels(study, 2, sharex=True)
    for column, (_, rows) in zip(axes.T, study.groupby("dataset", sort=False)):
        for ax, measure in zip(column, (X, Y)):
            for rule, part in rows[rows["lam"] > 0].groupby("rule", sort=False):
                x, mean, low, high = (part[c].to_numpy() for c in ("lam", *(f"{measure}.{k}" for k in ("mean", "low", "high"))))
                style = _styles(study)[rule]
                ax.plot(x, mean, **style)
                ax.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
            ax.axhline(rows.loc[rows["lam"] == 0, f"{measure}.mean"].iloc[0], color="red", linewidth=1, label="λ = 0")
        lams = rows.loc[rows["lam"] > 0, "lam"]
        column[0].set(xscale="log", xlim=(lams.min() / 1.3, 1.3 * lams.max()), ylim=_around(rows, X))
        column[1].set(xlabel="λ, in each rule's own sense", ylim=_around(rows, Y))
    axes[0, 0].set_ylabel(LIKELIHOOD)
    axes[1, 0].set_ylabel(ERROR)
    return _finished(fig, axes, title)


def gains(runs, study, paper, title):
    """What each row of Table 1 gains: a panel for each dataset, rows below one another.

    runs: a frame with dataset, row, seed, gain, low, high, one line a run, thin; study: their means over runs, dataset, row and
    mean, low and high of `gain`, thick; paper: dataset -> the gain that the paper reports, a dotted line.
    """
    fig, axes = _panels(study, 1, sharex=True, sharey=True)
    rows = list(study["row"].unique())
    for ax, (dataset, means) in zip(axes[0], study.groupby("dataset", sort=False)):
        for row, own in runs[runs["dataset"] == dataset].groupby("row", sort=False):
            y = rows.index(row) + np.linspace(-0.1, 0.35, len(own))
            style = dict(fmt=".", color="0.65", elinewidth=0.8, label="one run: mean over its agents")
            _marks(ax, y, own["gain"], own["low"], own["high"], **style)
        y = [rows.index(row) - 0.27 for row in means["row"]]
        style = dict(fmt="D", color=sns.color_palette("colorblind")[0], elinewidth=2.2, label="mean over runs")
        _marks(ax, y, means["gain.mean"], means["gain.low"], means["gain.high"], **style)
        ax.axvline(0, color="black", linewidth=1)
        if dataset in paper:
            ax.axvline(paper[dataset], color="red", linewidth=1, linestyle=":", label="the paper's gain")
        ax.set(xlabel="return less that of unguided\n(D4RL's scale)")
    _name_rows(axes, rows)
    return _finished(fig, axes, title)


def _marks(ax, y, mean, low, high, **style):
    """Means [n] with their intervals, one below another."""
    ax.errorbar(mean, np.asarray(y), xerr=np.abs(np.array([low, high]) - mean.to_numpy()), **style)


def _name_rows(axes, names):
    """Row i of all panels is that of names[i], from above."""
    for ax in axes[0]:
        ax.set_yticks(range(len(names)), names)
        ax.tick_params(axis="y", length=0)
    axes[0, 0].invert_yaxis()


def _around(rows, measure):
    """Limits that hold all means up to each rule's highest likelihood: past their thresholds, curves leave the panel."""
    rows = rows[np.isfinite(rows[f"{X}.mean"])]
    kept = [part[: int(part[f"{X}.mean"].argmax()) + 1] for _, part in rows.groupby("rule")]
    means = np.concatenate([[], *(part[f"{measure}.mean"].dropna() for part in kept)])
    if not len(means):
        return 0, 1
    room = 0.1 * (np.ptp(means) or 1)
    return means.min() - room, means.max() + room


def _panels(study, rows, **how):
    names = list(study["dataset"].unique())
    fig, axes = plt.subplots(rows, len(names), figsize=(4.4 * len(names) + 2.4, 3.4 * rows + 0.4), squeeze=False, **how)
    for ax, name in zip(axes[0], names):
        ax.set_title(name)
    return fig, axes


def _styles(study):
    """Rule -> its colour, marker and line, the same in all figures."""
    rules = list(study["rule"].unique())
    palette = sns.color_palette("colorblind", len(rules))
    styles = zip(rules, palette, (MARKERS * len(rules))[: len(rules)], (LINES * len(rules))[: len(rules)])
    return {r: dict(color=c, marker=m, linestyle=s, markersize=4.5, linewidth=1.4, label=r) for r, c, m, s in styles}


def _finished(fig, axes, title, legend=None):
    handles = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels())))
    fig.legend(
        handles.values(), handles.keys(), loc="outside right center", fontsize="small", title=legend, title_fontsize="small"
    )
    fig.suptitle(title, fontsize="medium")
    return fig
