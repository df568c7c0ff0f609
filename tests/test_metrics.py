"""Likelihoods against torch.distributions, intervals against what they promise."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pgdlib import measures
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
    assert measures.on_policy_log_likelihood(policy) == pytest.approx(measured, abs=4 * math.sqrt(1 / (2 * 3 * 200_000)))


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


def test_the_interval_covers_the_true_mean():
    """As often as it says, for a skewed distribution with mean 1; 400 repetitions have a standard error of 1.1%."""
    rng = np.random.default_rng(0)
    draws = rng.exponential(size=(400, 60))
    for level in (0.95, 0.5):
        bounds = [measures.interval(values, level, resamples=400, seed=i)[1:] for i, values in enumerate(draws)]
        covered = np.mean([low <= 1 <= high for low, high in bounds])
        assert level - 0.06 < covered < level + 0.04


def test_the_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(0).normal(3, 2, 1000)
    mean, low, high = measures.interval(values)
    assert mean == values.mean()
    half = 1.96 * values.std() / math.sqrt(1000)
    assert low == pytest.approx(mean - half, abs=0.1 * half) and high == pytest.approx(mean + half, abs=0.1 * half)
    assert measures.interval(values) == (mean, low, high)
    assert measures.interval(values, seed=1) != (mean, low, high)


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


def width(result):
    return result[2] - result[1]


def related(n, noise, rng):
    """Two samples [n] of the same trajectories: what they share has std 1, what each has of its own has std `noise`."""
    shared = rng.normal(size=n)
    return shared + noise * rng.normal(size=n), shared + noise * rng.normal(size=n)


@pytest.mark.parametrize(
    "statistic, truth, paired", [(mean, 2, False), (difference, 0, True), (measures.ratio_of_means, 1, True)]
)
def test_the_bootstrap_covers_the_truth(statistic, truth, paired):
    """As often as it says; 1,500 repetitions have a standard error of 0.6%, and with 60 values the method loses as much."""
    rng, covered = np.random.default_rng(1), []
    for seed in range(1_500):
        samples = [2 + x for x in related(60, 0.5, rng)][: 1 if statistic is mean else 2]
        value, low, high = measures.bootstrap(statistic, *samples, paired=paired, resamples=400, seed=seed)
        assert low < value < high
        covered.append(low <= truth <= high)
    assert np.mean(covered) == pytest.approx(0.944, abs=0.02)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("statistic", [difference, measures.ratio_of_means])
@pytest.mark.parametrize("level", [0.95, 0.5])
def test_the_bootstrap_against_scipys(statistic, paired, level):
    rng = np.random.default_rng(1)
    samples = [np.exp(x) for x in related(40, 0.5, rng)]
    value, low, high = measures.bootstrap(statistic, *samples, paired=paired, level=level, resamples=10_000)
    theirs = stats.bootstrap(
        samples,
        lambda x, y, axis: x.mean(axis) - y.mean(axis) if statistic is difference else x.mean(axis) / y.mean(axis),
        paired=paired,
        confidence_level=level,
        n_resamples=10_000,
        method="percentile",
        rng=rng,
    ).confidence_interval
    assert value == pytest.approx(statistic(*samples))
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.04 * (theirs.high - theirs.low))


def test_the_bootstrap_of_two_values_by_hand():
    """Of two values 0 and 1 a quarter of the draws has mean 0, half 1/2 and a quarter 1."""
    assert measures.bootstrap(mean, [0, 1]) == (0.5, 0, 1)
    assert measures.bootstrap(mean, [0, 1], level=0.4) == (0.5, 0.5, 0.5)
    # Drawn together, 0 and 1 never part from 10 and 11; drawn apart, they do.
    assert measures.bootstrap(difference, [10, 11], [0, 1], paired=True) == (10, 10, 10)
    assert measures.bootstrap(difference, [10, 11], [0, 1]) == (10, 9, 11)
    assert measures.bootstrap(mean, [7.0]) == (7, 7, 7)


def test_a_pair_shows_what_two_samples_hide():
    """The difference of the means has variance 2 noise² / n if paired, and 2 (1 + noise²) / n if not."""
    rng = np.random.default_rng(0)
    x, y = related(300, 0.1, rng)
    together, apart = (measures.bootstrap(difference, x, y + 0.05, paired=paired) for paired in (True, False))
    assert together[0] == apart[0] == pytest.approx(x.mean() - y.mean() - 0.05)
    assert width(together) / width(apart) == pytest.approx(0.1 / math.sqrt(1.01), rel=0.15)
    assert together[2] < 0 < apart[2]
    x, y = rng.normal(size=(2, 300))  # nothing in common: no gain
    together, apart = (measures.bootstrap(difference, x, y, paired=paired) for paired in (True, False))
    assert width(together) == pytest.approx(width(apart), rel=0.15)


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


def test_the_bootstrap_follows_its_seed_and_level():
    x = torch.linspace(0, 1, 50)
    first = measures.bootstrap(mean, x)
    assert first == measures.bootstrap(mean, x) != measures.bootstrap(mean, x, seed=1)
    assert all(type(v) is float for v in first)
    assert width(measures.bootstrap(mean, x, level=0.5)) == pytest.approx(width(first) * 0.6745 / 1.96, rel=0.1)


def test_the_bootstrap_over_ids_against_scipys():
    """Two arrays [2, n] that share their trajectories: what is drawn together is paired in scipy's."""
    rng = np.random.default_rng(2)
    pair = np.stack([np.stack(related(80, 0.3, rng)) for _ in range(2)])
    value, low, high = measures.bootstrap_ids(lambda ids: np.ptp(pair[:, 0, ids].mean(1)) + pair[1, 1, ids].mean(), 80)
    theirs = stats.bootstrap(
        tuple(pair[[0, 1, 1], [0, 0, 1]]),
        lambda a, b, c, axis: abs(a.mean(axis) - b.mean(axis)) + c.mean(axis),
        paired=True,
        method="percentile",
        rng=rng,
    ).confidence_interval
    assert value == pytest.approx(abs(pair[0, 0].mean() - pair[1, 0].mean()) + pair[1, 1].mean())
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.1 * (theirs.high - theirs.low))


def test_every_draw_of_ids_is_a_sample_with_replacement():
    drawn = []
    value, low, high = measures.bootstrap_ids(lambda ids: drawn.append(ids) or len(drawn), 20, level=0.8, resamples=101)
    *resampled, whole = drawn
    assert whole.tolist() == list(range(20)) and value == 102 and (low, high) == pytest.approx((11, 91))
    assert all(len(ids) == 20 and ids.min() >= 0 and ids.max() < 20 and len(set(ids)) < 20 for ids in resampled)
    assert (np.bincount(np.concatenate(resampled), minlength=20) > 50).all()  # each about 101 times
    again = [measures.bootstrap_ids(lambda ids: ids.mean(), 20, seed=seed) for seed in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


def front(*points):
    """Log-likelihoods and errors [L, 4] of trajectories with such means (likelihood, error), one pair for each λ."""
    spread = np.array([-0.75, -0.25, 0.25, 0.75])
    return tuple(np.array(column, dtype=float)[:, None] + spread for column in zip(*points, strict=True))


RISING = (-2, 1), (-1, 2), (0, 4), (1, 8)
# With λ the likelihood rises, falls, and rises once more.
TURNING = (-2, 1), (0, 3), (-1, 10), (1, 5)


@pytest.mark.parametrize(
    "points, target, expected",
    [
        (RISING, -1.5, 1.5),
        (RISING, -1, 2),
        (RISING, 0.25, 5),
        (RISING, 1, 8),
        (RISING, 1.01, math.nan),  # out of reach
        (RISING, -2, 1),
        (RISING, -5, 1),  # reached without guidance
        (RISING[::-1], 0.5, 8),
        (TURNING, -0.5, 2.5),  # between the first two: what comes later does not count
        (TURNING, 0, 3),
        (TURNING, 0.5, 6.25),  # passed by the last alone, a quarter before it
        (TURNING[:3], 0.5, math.nan),
        (((-1, 2), (-1, 5), (0, 6)), -0.5, 5.5),  # no rise at first
        (RISING[:1], -3, 1),
        (RISING[:1], 0, math.nan),
    ],
)
def test_the_error_at_a_likelihood_by_hand(points, target, expected):
    found = measures.error_at(*front(*points), target)
    assert type(found) is float and found == pytest.approx(expected, nan_ok=True)


@pytest.mark.filterwarnings("ignore:Mean of empty slice:RuntimeWarning")
def test_the_error_at_a_likelihood_leaves_out_errors_that_are_missing():
    likelihoods, errors = front(*RISING)
    errors[0, :2], errors[1, 3] = math.nan, math.nan  # means 1.5 and 1.75 of what is left
    assert measures.error_at(likelihoods, errors, -1.5) == pytest.approx(1.625)
    errors[3] = math.nan  # all at the last λ: the error is unknown there, but not before
    assert measures.error_at(likelihoods, errors, -1.5) == pytest.approx(1.625)
    assert measures.error_at(likelihoods, errors, 0) == 4
    assert math.isnan(measures.error_at(likelihoods, errors, 0.5))
