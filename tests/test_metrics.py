"""Likelihoods against torch.distributions, intervals against what they promise."""

import math

import numpy as np
import pytest
import torch

from pgdlib import metrics
from pgdlib.policies import GaussianPolicy


@pytest.fixture
def policy():
    torch.manual_seed(0)
    policy = GaussianPolicy(5, 3, hidden=[8]).requires_grad_(False)
    policy.log_std.copy_(torch.tensor([-1.0, 0.0, 0.5]))
    policy.obs_mean.normal_()
    return policy


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 6, 5, generator=generator), torch.randn(4, 6, 3, generator=generator)


LENGTHS = [6, 1, 4, 3]


def log_densities(policy, obs, actions):
    """[B][T]: log π(a|s), one step at a time."""

    def one(o, a):
        mean, std = policy(o)
        return float(torch.distributions.MultivariateNormal(mean.double(), torch.diag(std.double() ** 2)).log_prob(a.double()))

    return [[one(o, a) for o, a in zip(*rows)] for rows in zip(obs, actions)]


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_likelihoods_against_a_loop(policy, batch, lengths):
    alive = None if lengths is None else (torch.arange(6) < torch.tensor(lengths)[:, None]).float()
    rows = [row[:n] for row, n in zip(log_densities(policy, *batch), lengths or [6] * 4)]
    np.testing.assert_allclose(metrics.log_likelihood(policy, *batch, alive), [np.mean(r) / 3 for r in rows], rtol=1e-5)
    np.testing.assert_allclose(metrics.mean_density(policy, *batch, alive), [np.exp(r).mean() for r in rows], rtol=1e-5)


@pytest.mark.parametrize("garbage", [1e30, math.nan, math.inf])
def test_dead_steps_do_not_count(policy, batch, garbage):
    alive = (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).float()
    dead = [torch.where(alive[..., None] > 0, v, garbage) for v in batch]
    for measure in (metrics.log_likelihood, metrics.mean_density):
        torch.testing.assert_close(measure(policy, *dead, alive), measure(policy, *batch, alive))


def test_a_tiny_density_is_not_rounded_to_nothing(policy, batch):
    obs, actions = batch
    value = metrics.mean_density(policy, obs, actions + 12)
    assert value.dtype == torch.float64 and (value > 0).all() and (value.log() < -150).all()


def test_the_on_policy_likelihood_is_that_of_the_policys_own_actions(policy):
    obs = torch.zeros(1, 200_000, 5)
    actions = policy.sample(obs, torch.Generator().manual_seed(0))
    measured = float(metrics.log_likelihood(policy, obs, actions))
    # Σ z²/2 over k dimensions has variance k/2, so the mean over n steps and k dimensions has std sqrt(1 / (2 k n))
    assert metrics.on_policy_log_likelihood(policy) == pytest.approx(measured, abs=4 * math.sqrt(1 / (2 * 3 * 200_000)))


def test_alive_on_flags_by_hand():
    flags = torch.tensor(
        [
            [0.0, 0.0, 0.0, 0.0],
            [0.0, 1.0, 0.0, 0.0],
            [1.0, 1.0, 1.0, 1.0],
            [0.4, 0.5, 0.6, 0.0],
            [-3.0, math.nan, 0.2, 9.0],
            [0.0, 1.0, 0.0, 1.0],
        ]
    )
    expected = [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert metrics.alive(flags).tolist() == expected
    assert metrics.alive(flags, threshold=0.3).tolist()[3] == [1, 0, 0, 0]


def test_the_interval_covers_the_true_mean():
    """As often as it says, for a skewed distribution with mean 1; 400 repetitions have a standard error of 1.1%."""
    rng = np.random.default_rng(0)
    draws = rng.exponential(size=(400, 60))
    for level in (0.95, 0.5):
        bounds = [metrics.interval(values, level, resamples=400, seed=i)[1:] for i, values in enumerate(draws)]
        covered = np.mean([low <= 1 <= high for low, high in bounds])
        assert level - 0.06 < covered < level + 0.04


def test_the_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(0).normal(3, 2, 1000)
    mean, low, high = metrics.interval(values)
    assert mean == values.mean()
    half = 1.96 * values.std() / math.sqrt(1000)
    assert low == pytest.approx(mean - half, abs=0.1 * half) and high == pytest.approx(mean + half, abs=0.1 * half)
    assert metrics.interval(values) == (mean, low, high)
    assert metrics.interval(values, seed=1) != (mean, low, high)


def test_the_interval_leaves_out_what_is_not_finite():
    clean = [1.0, 2.0, 4.0]
    assert metrics.interval([1.0, math.nan, 2.0, math.inf, 4.0, -math.inf]) == metrics.interval(clean)
    assert metrics.interval([7]) == (7, 7, 7)
    for nothing in ([], [math.nan]):
        assert all(math.isnan(v) for v in metrics.interval(nothing))
    assert all(type(v) is float for v in metrics.interval(torch.tensor([1.0, 2.0])))
