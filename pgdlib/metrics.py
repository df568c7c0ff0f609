"""Likelihood of trajectories under a policy, and intervals of means."""

import numpy as np
import torch


@torch.no_grad()
def log_likelihood(policy, obs, actions, alive=None):
    """The mean over steps of log π(a|s) per action dimension, in nats: [B], for obs [B, T, 45], actions [B, T, 24].

    `alive` [B, T] is 1 on the steps that count (all by default). On-policy trajectories have mean -H(π) / 24.
    """
    log_prob = policy.log_prob(obs, actions).double() / actions.shape[-1]
    return _masked_mean(log_prob, alive)


@torch.no_grad()
def mean_density(policy, obs, actions, alive=None):
    """The paper's trajectory likelihood, read literally: the mean over steps of the density π(a|s), [B].

    In 24 dimensions a few steps decide it; `log_likelihood` is the measure to trust.
    """
    return _masked_mean(policy.log_prob(obs, actions).double().exp(), alive)


def on_policy_log_likelihood(policy):
    """-H(π) per action dimension, in nats: what trajectories of the policy itself have, in the mean."""
    return -float(policy.entropy()) / policy.log_std.shape[-1]


def interval(values, level=0.95, resamples=2_000, seed=0):
    """(mean, low, high) of `values` [n]: percentile bootstrap over the n trajectories, values that are not finite left out."""
    return bootstrap(lambda v: v.mean(-1), values, level=level, resamples=resamples, seed=seed)


def bootstrap(statistic, *samples, paired=False, level=0.95, resamples=2_000, seed=0):
    """(value, low, high) of `statistic(*samples)`, samples [n] each: percentile bootstrap over trajectories.

    `statistic` takes arrays whose last axis is trajectories. paired: all samples are of the same trajectories, or of the same
    noise, and are drawn together. Trajectories with values that are not finite are left out, of paired samples in all.
    """
    samples = [np.asarray(s, dtype=np.float64) for s in samples]
    finite = [np.isfinite(s) for s in samples]
    if paired:
        finite = [np.logical_and.reduce(finite)] * len(samples)
    samples = [s[f] for s, f in zip(samples, finite, strict=True)]
    if min(map(len, samples)) == 0:
        return float("nan"), float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    rows = [rng.integers(len(s), size=(resamples, len(s))) for s in (samples[:1] if paired else samples)]
    rows *= len(samples) if paired else 1
    values = statistic(*(s[r] for s, r in zip(samples, rows, strict=True)))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(statistic(*samples)), float(low), float(high)


def ratio_of_means(numerator, denominator):
    """The mean of the first over the mean of the second, along the last axis; a statistic for `bootstrap`."""
    return numerator.mean(-1) / denominator.mean(-1)


def error_at(likelihoods, errors, target):
    """The mean error at the mean log-likelihood `target`, of a rule's front: [L, n] each, for L rising λ from 0.

    Linear between neighbours in λ, up to the first that passes the target; NaN if none does.
    """
    x = likelihoods.mean(1)
    passed = np.flatnonzero(x >= target)
    if len(passed) == 0:
        return float("nan")
    around = slice(max(passed[0] - 1, 0), passed[0] + 1)
    finite = np.isfinite(errors[around])
    with np.errstate(invalid="ignore"):  # NaN where no trajectory has an error
        y = np.where(finite, errors[around], 0.0).sum(1) / finite.sum(1)
    return float(np.interp(target, x[around], y))


def bootstrap_ids(statistic, n, level=0.95, resamples=500, seed=0):
    """(value, low, high) of `statistic(ids)`: percentile bootstrap over n trajectories that several arrays share.

    Resamples of which the statistic is NaN are left out.
    """
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(n, size=n)) for _ in range(resamples)]
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(statistic(np.arange(n))), float(low), float(high)


def alive(terminal, threshold=0.5):
    """[B, T]: 1 up to and including the first step whose terminal flag [B, T] is above `threshold`, then 0."""
    ended = (terminal > threshold).float()
    return ((ended.cumsum(-1) - ended) == 0).float()


def _masked_mean(values, alive):
    if alive is None:
        return values.mean(-1)
    return torch.where(alive > 0, values, 0.0).sum(-1) / alive.sum(-1)
