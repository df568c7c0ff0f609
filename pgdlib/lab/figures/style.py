"""The style of all figures, their files, and what several of them draw alike; colours that the colour-blind can tell apart."""

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import ticker

from pgdlib.lab import artifacts

COLOURS = [sns.color_palette("colorblind")[i] for i in (0, 1, 2, 4, 3, 9, 7, 5, 6, 8)]
DATA, MODEL, GUIDED, THEIRS, MUTED = (COLOURS[i] for i in (0, 1, 2, 3, 6))  # the last is grey
MARKERS = "osD^vPX*"
DASHES = ("-", "--", ":", "-.", (0, (3, 1, 1, 1)), (0, (5, 1)), (0, (4, 2, 1, 2)), (0, (1, 1)))
STATES = dict(aspect="auto", cmap="RdBu_r", vmin=-2.5, vmax=2.5, interpolation="nearest")  # an image of states, in std
LIKELIHOOD = "log-likelihood under the guide\n(nats per action dimension)"


def use_style():
    """The style of all figures; call it once a notebook."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", font_scale=0.9)
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 100, "savefig.dpi": 150})
    plt.rcParams.update({"figure.constrained_layout.use": True, "legend.frameon": False, "legend.fontsize": "small"})
    plt.rcParams.update(dict.fromkeys(("axes.titlesize", "figure.titlesize", "figure.labelsize"), "medium"))


def save(fig, name, scale, table=None):
    """Write `fig`, and the `table` it was drawn from, to runs/figures/<scale>/<name>.png and .csv; the figure."""
    folder = artifacts.root() / "figures" / scale
    with artifacts.replacing(folder / f"{name}.png") as partial:
        fig.savefig(partial, format="png")
    if table is not None:
        with artifacts.replacing(folder / f"{name}.csv") as partial:
            pd.DataFrame(table).to_csv(partial, index=False)
    return fig


def figure(title, width, height, rows=1, columns=1, sharex=False, sharey=False, **axis):
    """(figure, axes [rows, columns]) of that size in inches under a title; `axis` as for `Axes.set`, for each of the axes."""
    size, share = (width, height), dict(sharex=sharex, sharey=sharey)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, subplot_kw=axis, **share)
    fig.suptitle(title)
    return fig, axes


def grid(title, n, width, height, columns=3, sharex=True, **how):
    """(figure, axes [n]): panels of that size, at most so many to a row; x, if shared, is told under each column's lowest."""
    columns, rows = min(n, columns), -(-n // columns)
    fig, axes = figure(title, width * columns + 2.4, height * rows + 0.4, rows, columns, sharex, **how)
    for ax in axes.flat[n:]:
        ax.remove()
    for ax in axes.flat[n - columns : n]:  # matplotlib would tell it in the last row alone
        ax.tick_params(labelbottom=True)
        ax.set_xlabel(how.get("xlabel", ""))
    return fig, axes.flat[:n]


def finished(fig, legend=None):
    """The figure, with plain ticks on log axes and one legend right of all axes: each label once, `legend` its title."""
    handles = {}
    for ax in fig.axes:
        plain_log(ax.xaxis), plain_log(ax.yaxis)
        for handle, label in zip(*ax.get_legend_handles_labels() if ax.get_legend() is None else ((), ())):
            handles.setdefault(label, handle)
    if handles:
        fig.legend(handles.values(), handles.keys(), loc="outside right center", title=legend, title_fontsize="small")
    return fig


def plain_log(axis):
    """Plain numbers (0.02, not 2 × 10⁻²) on a log axis, `ax.xaxis` or `ax.yaxis`, whose limits lie within 1e-5 and 1e5."""
    low, high = sorted(axis.get_view_interval())
    if axis.get_scale() == "log" and 1e-5 < low < high < 1e5:
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5) if high < 50 * low else (1,)))
        axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.set_minor_formatter(ticker.NullFormatter())


def looks(names):
    """Name -> the colour, marker and dashes of its line: no two of 40 look alike; names in this order do in every figure."""
    styles = zip(names, cycle(COLOURS), cycle(MARKERS), cycle(DASHES))
    return {name: dict(color=c, marker=m, linestyle=d, markersize=5) for name, c, m, d in styles}


def lines(ax, curves, styles=None, **changes):
    """A line for each of `curves`, label -> (x, y) or (x, y, low, high), [n] each, the interval as a band.

    styles: the `looks` of the labels, of these curves alone where left out, which `changes` changes.
    """
    styles = styles or looks(curves)
    for label, (x, y, *interval) in curves.items():
        ax.plot(x, y, **styles[label] | changes, label=label)
        if interval:
            ax.fill_between(x, *interval, color=styles[label]["color"], alpha=0.18, linewidth=0)


def interval(frame, measure):
    """Mean, low and high [n] of a measure: three columns of a frame."""
    return [frame[f"{measure}.{k}"].to_numpy(dtype=float) for k in ("mean", "low", "high")]


def marks(ax, y, mean, low, high, **style):
    """Marks at the means [n] with their intervals, one below another at the heights y [n]."""
    y, mean, low, high = (np.asarray(v, dtype=float) for v in (y, mean, low, high))
    ax.errorbar(mean, y, xerr=np.abs(np.stack([low, high]) - mean), **style)


def ring(ax, x, y, label=None):
    """The red ring that marks λ = 0; it may stand on the edge of the axes."""
    how = dict(color="red", markersize=9, fillstyle="none", markeredgewidth=1.8, zorder=5, clip_on=False)
    ax.plot(x, y, "o", label=label, in_layout=False, **how)
