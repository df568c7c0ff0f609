"""Fronts: a rule's dynamics error against its likelihood, as λ grows from 0. The one way to read them."""

import numpy as np
import pandas as pd


def crossing(lams, likelihoods, target):
    """The λ at which the log-likelihoods [L] of rising λ [L] first come to `target`; None if never."""
    lam = _where_met(likelihoods, lams, target)
    return None if np.isnan(lam) else lam


def error_at(likelihoods, errors, target):
    """The mean error where the mean log-likelihood first comes to `target`: [L, n] each, of n trajectories at L rising λ.

    NaN if never. Errors may be missing (NaN).
    """
    finite = np.isfinite(errors)
    with np.errstate(invalid="ignore"):  # NaN where no trajectory has an error
        means = np.where(finite, errors, 0.0).sum(1) / finite.sum(1)
    return _where_met(likelihoods.mean(1), means, target)


def on_front(curve, unguided, grid):
    """The errors at the log-likelihoods `grid`, [G] both, of a curve (log-likelihood [L], error [L], ...) of rising λ.

    The front begins at the `unguided` point (log-likelihood, error); NaN below that and out of reach.
    """
    x, y = (np.append(u, v) for u, v in zip(unguided, curve))
    return np.array([_where_met(x, y, level) if level >= x[0] else np.nan for level in grid])


def ratios(rows, levels, chosen):
    """Each rule's error over that of the rule `chosen` at equal likelihood: dataset, seed, rule, log_likelihood, ratio.

    rows: a frame with dataset, seed, rule, lam, log_likelihood and normalised, of each rule one front a seed, which begins at
    λ = 0. NaN where either does not reach one of the `levels`.
    """
    rules, found = list(rows["rule"].unique()), []
    for (dataset, seed), part in rows.sort_values("lam", kind="stable").groupby(["dataset", "seed"], sort=False):
        points = {rule: f[["log_likelihood", "normalised"]].to_numpy().T for rule, f in part.groupby("rule", sort=False)}
        errors = {rule: on_front(xy[:, 1:], xy[:, 0], levels) for rule, xy in points.items()}
        for rule in errors.keys() - {chosen}:
            found += [(dataset, seed, rule, *pair) for pair in zip(levels, errors[rule] / errors[chosen])]
    frame = pd.DataFrame(found, columns=["dataset", "seed", "rule", "log_likelihood", "ratio"])
    return frame.sort_values("rule", key=lambda column: column.map(rules.index), kind="stable", ignore_index=True)


def bootstrap(statistic, n, level=0.95, resamples=500, seed=0):
    """(value, low, high) of `statistic(ids)`: percentile bootstrap over n trajectories; resamples of NaN are left out."""
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(n, size=n)) for _ in range(resamples)]
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(statistic(np.arange(n))), float(low), float(high)


def _where_met(likelihoods, values, target):
    """The value where the likelihood first comes to `target`, linear between neighbours in λ; NaN if never."""
    x, y = (np.asarray(v, dtype=float) for v in (likelihoods, values))
    passed = np.flatnonzero(x >= target)
    around = slice(max(passed[0] - 1, 0), passed[0] + 1) if len(passed) else slice(0)
    return float(np.interp(target, x[around], y[around])) if len(passed) else float("nan")
