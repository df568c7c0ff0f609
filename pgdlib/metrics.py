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
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return float("nan"), float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def alive(terminal, threshold=0.5):
    """[B, T]: 1 up to and including the first step whose terminal flag [B, T] is above `threshold`, then 0."""
    ended = (terminal > threshold).float()
    return ((ended.cumsum(-1) - ended) == 0).float()


def _masked_mean(values, alive):
    if alive is None:
        return values.mean(-1)
    return torch.where(alive > 0, values, 0.0).sum(-1) / alive.sum(-1)
