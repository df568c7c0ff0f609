"""Likelihoods against torch.distributions, intervals against what they promise."""

import math

import numpy as np
import pytest
import torch

from pgdlib import measures
from pgdlib.policies import GaussianPolicy


@pytest.fixture
def policy():
    torch.manual_seed(0)
    policy = GaussianPolicy(5, 3, hidden=[8]).requires_grad_(False)
    policy.log_std.copy_(torch.tensor([[[-1.0, 0.0, 0.5]]]))
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
    np.testing.assert_allclose(measures.log_likelihood(policy, *batch, alive), [np.mean(r) / 3 for r in rows], rtol=1e-5)
    np.testing.assert_allclose(measures.mean_density(policy, *batch, alive), [np.exp(r).mean() for r in rows], rtol=1e-5)


@pytest.mark.parametrize("garbage", [1e30, math.nan, math.inf])
def test_dead_steps_do_not_count(policy, batch, garbage):
    alive = (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).float()
    dead = [torch.where(alive[..., None] > 0, v, garbage) for v in batch]
    for measure in (measures.log_likelihood, measures.mean_density):
        torch.testing.assert_close(measure(policy, *dead, alive), measure(policy, *batch, alive))


def test_a_tiny_density_is_not_rounded_to_nothing(policy, batch):
    obs, actions = batch
    value = measures.mean_density(policy, obs, actions + 12)
    assert value.dtype == torch.float64 and (value > 0).all() and (value.log() < -150).all()


def test_the_on_policy_likelihood_is_that_of_the_policys_own_actions(policy):
    obs = torch.zeros(1, 200_000, 5)
    actions = policy.sample(obs, torch.Generator().manual_seed(0))
    measured = float(measures.log_likelihood(policy, obs, actions))
    # Σ z²/2 over k dimensions has variance k/2, so the mean over n steps and k dimensions has std sqrt(1 / (2 k n))
    assert float(measures.on_policy_log_likelihood(policy)) == pytest.approx(measured, abs=4 * math.sqrt(1 / (2 * 3 * 200_000)))


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
    assert measures.alive(flags).tolist() == expected
    assert measures.alive(flags, threshold=0.3).tolist()[3] == [1, 0, 0, 0]


def test_the_interval_leaves_out_what_is_not_finite():
    clean = [1.0, 2.0, 4.0]
    assert measures.interval([1.0, math.nan, 2.0, math.inf, 4.0, -math.inf]) == measures.interval(clean)
    assert measures.interval([7]) == (7, 7, 7)
    for nothing in ([], [math.nan]):
        assert all(math.isnan(v) for v in measures.interval(nothing))
    assert all(type(v) is float for v in measures.interval(torch.tensor([1.0, 2.0])))


# Bootstrapped statistics


def mean(x):
    return x.mean(-1)


def difference(x, y):
    return x.mean(-1) - y.mean(-1)


def test_the_bootstrap_of_two_values_by_hand():
    """Of two values 0 and 1 a quarter of the draws has mean 0, half 1/2 and a quarter 1."""
    assert measures.bootstrap(mean, [0, 1]) == (0.5, 0, 1)
    assert measures.bootstrap(mean, [0, 1], level=0.4) == (0.5, 0.5, 0.5)
    # Drawn together, 0 and 1 never part from 10 and 11; drawn apart, they do.
    assert measures.bootstrap(difference, [10, 11], [0, 1], paired=True) == (10, 10, 10)
    assert measures.bootstrap(difference, [10, 11], [0, 1]) == (10, 9, 11)
    assert measures.bootstrap(mean, [7.0]) == (7, 7, 7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_bootstrap_leaves_out_what_is_not_finite(bad):
    x, y = np.random.default_rng(0).normal(3, 1, (2, 12))
    broken_x, broken_y = x.copy(), y.copy()
    broken_x[[0, 5]], broken_y[[5, 7, 8]] = bad, bad
    kept = np.delete(np.arange(12), [0, 5, 7, 8])
    ratio = measures.ratio_of_means
    together = measures.bootstrap(ratio, broken_x, broken_y, paired=True)
    assert together == measures.bootstrap(ratio, x[kept], y[kept], paired=True) and np.isfinite(together).all()
    apart = measures.bootstrap(ratio, broken_x, broken_y)
    assert apart == measures.bootstrap(ratio, np.delete(x, [0, 5]), np.delete(y, [5, 7, 8])) != together
    assert np.isnan(measures.bootstrap(ratio, [bad, bad], [1.0, 2.0])).all()
    assert np.isnan(measures.bootstrap(ratio, [bad, 1.0], [1.0, bad], paired=True)).all()  # no trajectory has both
    assert np.isfinite(measures.bootstrap(ratio, [bad, 1.0], [1.0, bad])).all()
