"""Rules of guidance at equal likelihood: a front is a rule's dynamics error against its likelihood, as λ grows."""

import numpy as np
import pandas as pd


def on_front(curve, unguided, grid):
    """The error at the log-likelihoods `grid`, linear between the points of (log-likelihood, error, ...); NaN out of reach.

    The curve starts at the unguided point and goes on while the likelihood rises.
    """
    x, y = (np.append(u, np.asarray(v, dtype=float)) for u, v in zip(unguided, curve))
    rising = np.concatenate([[True], x[1:] > np.fmax.accumulate(x)[:-1]]) & np.isfinite(y)
    if not rising.any():
        return np.full(np.shape(grid), np.nan)
    return np.interp(grid, x[rising], y[rising], left=np.nan, right=np.nan)


def ratios(rows, levels, chosen):
    """Each rule's error over that of the rule `chosen` at equal likelihood: dataset, seed, rule, log_likelihood, ratio.

    rows: a frame with dataset, seed, rule, lam, log_likelihood and normalised, of each rule one front a seed, which begins at
    λ = 0. Between its points a front is linear; the ratio is NaN where either does not reach one of the `levels`.
    """
    found = []
    for (dataset, seed), part in rows.sort_values("lam", kind="stable").groupby(["dataset", "seed"], sort=False):
        points = {rule: f[["log_likelihood", "normalised"]].to_numpy().T for rule, f in part.groupby("rule", sort=False)}
        errors = {rule: on_front(xy[:, 1:], xy[:, 0], levels) for rule, xy in points.items()}
        for rule in errors.keys() - {chosen}:
            each = zip(levels, errors[rule] / errors[chosen])
            found += [(dataset, seed, rule, level, ratio) for level, ratio in each]
    order = {rule: i for i, rule in enumerate(rows["rule"].unique())}
    frame = pd.DataFrame(found, columns=["dataset", "seed", "rule", "log_likelihood", "ratio"])
    return frame.sort_values("rule", key=lambda rules: rules.map(order), kind="stable", ignore_index=True)
