"""Likelihoods against torch.distributions, intervals by hand, distances against loops and scipy: false alarms and power."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import draw
from scipy import spatial, stats

from pgdlib import measures
from pgdlib.measures import coverage, energy_distance
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


# Bootstrapped statistics


def test_the_interval_leaves_out_what_is_not_finite():
    clean = [1.0, 2.0, 4.0]
    assert measures.interval([1.0, math.nan, 2.0, math.inf, 4.0, -math.inf]) == measures.interval(clean)
    assert measures.interval([7]) == (7, 7, 7)
    for nothing in ([], [math.nan]):
        assert all(math.isnan(v) for v in measures.interval(nothing))
    assert all(type(v) is float for v in measures.interval(torch.tensor([1.0, 2.0])))


def mean(x):
    return x.mean(-1)


def difference(x, y):
    return x.mean(-1) - y.mean(-1)


def test_the_bootstrap_of_two_values_by_hand():
    """Of two values 0 and 1 a quarter of the draws has mean 0, half 1/2 and a quarter 1."""
    assert measures.bootstrap(mean, [0, 1]) == (0.5, 0, 1)
    # Drawn together, 0 and 1 never part from 10 and 11; drawn apart, they do.
    assert measures.bootstrap(difference, [10, 11], [0, 1], paired=True) == (10, 10, 10)
    assert measures.bootstrap(difference, [10, 11], [0, 1]) == (10, 9, 11)
    assert measures.bootstrap(mean, [7.0]) == measures.interval([7]) == (7, 7, 7)
    assert measures.interval([0, 1]) == (0.5, 0, 1) and np.isnan(measures.interval([])).all()
    assert all(type(v) is float for v in measures.interval(torch.tensor([1.0, 2.0])))


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


# Energy distance

draw64 = partial(draw, dtype=torch.float64)
ONES = torch.ones(2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def walks(n, steps, seed, wander=0.1):
    """[n, steps, 2]: each walk stays near a place of its own, so that its steps are nearly copies of each other."""
    return draw64(seed, n, 1, 2) + wander * draw64(seed + 10_000, n, steps, 2)


def by_loops(x, y):
    """E, one pair of trajectories at a time."""

    def apart(a, b):
        return spatial.distance.cdist(a, b).mean()

    same = [np.mean([apart(a, b) for a, b in itertools.permutations(s, 2)]) for s in (x, y)]
    return 2 * np.mean([apart(a, b) for a in x for b in y]) - sum(same)


def test_of_single_numbers_it_is_scipys():
    """But for a number's distance from itself: scipy's mean over all n² pairs is (n - 1) / n of that over the others."""
    x, y = draw64(0, 30), 0.7 * draw64(1, 50) + 0.5
    expected = stats.energy_distance(x, y) ** 2
    expected -= sum(float((s[:, None] - s).abs().mean()) / (len(s) - 1) for s in (x, y))
    assert energy_distance(x[:, None, None], y[:, None, None], [1.0], seeded(), 1)[0] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("far", [0.0, 1e7])
def test_many_dimensions_against_loops(far):
    """Different numbers and lengths of trajectories, more than a block of them, in units of `scale`, far from zero."""
    x, y, scale = draw64(0, 35, 4, 7), 1 + draw64(1, 33, 6, 7), draw64(2, 7).abs() + 0.5
    assert energy_distance(x * scale + far, y * scale + far, scale, seeded(), 1)[0] == pytest.approx(by_loops(x, y), abs=1e-6)


def test_long_trajectories_count_at_evenly_spread_steps():
    x, y = draw64(0, 5, 101, 2).cumsum(1), draw64(1, 6, 51, 2).cumsum(1)
    few = energy_distance(x, y, ONES, seeded(), 20, steps_each=6)
    assert few == energy_distance(x[:, ::20], y[:, ::10], ONES, seeded(), 20) and [type(v) for v in few] == [float] * 3
    assert energy_distance(x.numpy(), y.numpy(), np.ones(2), seeded(), 20, 6) == few
    assert energy_distance(x, y, ONES, seeded(1), 20, 6)[1:] != few[1:]
    few = energy_distance(x, x[1:], ONES, seeded(), 1, steps_each=7)  # 16 2/3 steps apart
    nearest = x[:, [0, 17, 33, 50, 67, 83, 100]]
    assert few[0] == pytest.approx(by_loops(nearest, nearest[1:]), abs=1e-6)
    assert energy_distance(x, y, ONES, seeded(), 1, steps_each=101)[0] == pytest.approx(by_loops(x, y), abs=1e-6)


def test_p_and_quantile_against_all_permutations():
    """Four against three: 35 ways to part the seven."""
    x, y = draw64(0, 4, 3, 2), draw64(1, 3, 3, 2) + 0.8
    pooled = torch.cat([x, y])
    ways = [[*w, *(i for i in range(7) if i not in w)] for w in itertools.combinations(range(7), 4)]
    energies = np.array([by_loops(pooled[w[:4]], pooled[w[4:]]) for w in ways])
    value, p, q = energy_distance(x, y, ONES, seeded(), 20_000)
    assert value == pytest.approx(energies[0], abs=1e-7)
    exact = (energies >= energies[0] - 1e-9).mean()
    assert 0 < exact < 0.5 and p == pytest.approx(exact, abs=4 * np.sqrt(exact / 20_000))
    assert q == pytest.approx(np.sort(energies)[33], abs=1e-7)  # 34 of 35 are 97%, 33 are 94%


@pytest.mark.parametrize("seed", range(8))
def test_a_permutation_that_changes_nothing_counts(seed):
    """Three against three far away: of 20 ways to part them two are theirs, as they are and swapped, equal but for rounding."""
    x, y = draw64(seed, 3, 3, 2), 50 + draw64(seed + 100, 3, 3, 2)
    assert energy_distance(x, y, ONES, seeded(), 3_000)[1] == pytest.approx(0.1, abs=4 * np.sqrt(0.1 * 0.9 / 3_000))


def test_under_the_null_the_mean_is_zero_and_p_uniform():
    """Trajectories whose steps depend on each other do not cause false alarms; permuting steps would."""
    honest, naive = [], []
    for seed in range(150):
        x, y = walks(8, 6, 2 * seed), walks(10, 6, 2 * seed + 1)
        honest.append(energy_distance(x, y, ONES, seeded(seed), 199))
        naive.append(energy_distance(x.reshape(48, 1, 2), y.reshape(60, 1, 2), ONES, seeded(seed), 199)[1])
    values, p, q = np.array(honest).T
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(150)
    assert (values < 0).any()  # not a sum of squares: unbiased
    assert stats.kstest(p, "uniform").pvalue > 0.05
    assert (values > q).mean() == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / 150))
    assert np.mean(np.array(naive) < 0.05) > 0.5  # measured 0.9


@pytest.mark.parametrize("change", [lambda y: y + 0.7, lambda y: 2.5 * y, lambda y: y + 6 * (y > 1)])
def test_power(change):
    """Another place, another spread, a second place that one in six visits."""
    x, y = walks(80, 8, 0), walks(80, 8, 1)
    value, p, q = energy_distance(x, change(y), ONES, seeded(), 400)
    assert value > q and p == 1 / 401
    value, p, q = energy_distance(x, y, ONES, seeded(), 400)
    assert value < q and p > 0.05


# Coverage


def covered_by_loops(reference, generated, neighbours):
    """The share of covered states, one state at a time."""
    found = []
    for i, trajectory in enumerate(reference):
        others = np.concatenate([t for j, t in enumerate(reference) if j != i])
        for state in trajectory:
            radius = np.sort(np.linalg.norm(others - state, axis=1))[neighbours - 1]
            found.append(np.linalg.norm(np.concatenate(list(generated)) - state, axis=1).min() <= radius)
    return np.mean(found)


@pytest.mark.parametrize("far", [0.0, 1e7])
@pytest.mark.parametrize("neighbours", [1, 5])
def test_coverage_against_loops(neighbours, far):
    """Different numbers and lengths of trajectories, more states than are held at once, in units of `scale`, far from zero."""
    x, y, scale = walks(130, 5, 0), 0.6 * walks(60, 7, 1) + 0.7, torch.tensor([0.5, 20.0])
    expected = covered_by_loops(x.numpy(), y.numpy(), neighbours)
    found = coverage(x * scale + far, y * scale + far, scale, neighbours)
    assert 0.1 < expected < 0.9 and type(found) is float and found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("neighbours", [1, 5])
def test_a_sample_of_the_same_distribution_is_covered_but_for_chance(neighbours):
    """That the nearest of 299 other and 300 new states of one distribution are not all others: exact."""
    chance = 1 - np.prod([(299 - i) / (599 - i) for i in range(neighbours)])
    found = [coverage(draw64(s, 300, 1, 3), draw64(s + 50, 300, 1, 3), np.ones(3), neighbours) for s in range(12)]
    assert chance == pytest.approx(1 - 2**-neighbours, abs=0.01)
    assert np.mean(found) == pytest.approx(chance, abs=4 * np.std(found, ddof=1) / np.sqrt(12)) and np.std(found) < 0.04


def test_a_superset_covers_everything_and_what_is_missed_is_not_covered():
    x, same = draw64(0, 40, 2, 3), draw64(0, 1, 1, 45) * torch.ones(60, 1, 1)
    x[:10] += 50
    assert coverage(x, torch.cat([x + 100, x]), np.ones(3)) == 1 and coverage(x, x[10:], np.ones(3)) == 0.75
    # First states of episodes are all the same: the radius is zero, and so is the distance.
    assert coverage(same, same, np.ones(45)) == 1 and coverage(same, same + 1e-3, np.ones(45)) == 0


def test_coverage_looks_at_evenly_spread_steps():
    x, y = walks(30, 29, 0), walks(30, 36, 1)
    assert coverage(x, y, np.ones(2)) == coverage(x[:, ::4], y[:, ::5], np.ones(2)) != coverage(x[:, :8], y[:, :8], np.ones(2))
    assert coverage(x.numpy(), y, [1.0, 1.0], steps_each=50) == pytest.approx(covered_by_loops(x.numpy(), y.numpy(), 5))


ZEROS = torch.zeros(4, 8, 2)
energy = partial(energy_distance, generator=seeded())


@pytest.mark.parametrize("measure", [energy, coverage])
@pytest.mark.parametrize(
    "changes, message",
    {
        "dimensions": (dict(y=torch.zeros(4, 8, 3)), r"\[4, 8, 2\], \[4, 8, 3\] and \[2\]"),
        "scale": (dict(scale=torch.ones(3)), r"and \[3\]"),
        "no steps": (dict(x=ZEROS[:, 0], y=ZEROS[:, 0]), r"\[n, T, D\]"),
        "one trajectory": (dict(x=ZEROS[:1]), "2 or more trajectories"),
        "one on the other side": (dict(y=ZEROS[:1]), "2 or more trajectories"),
        "no step": (dict(y=ZEROS[:, :0]), "of a step or more"),
        "NaN": (dict(x=ZEROS + math.nan), "finite"),
        "infinite": (dict(y=ZEROS + math.inf), "finite"),
        "an infinite scale": (dict(scale=ONES * math.inf), "finite"),
        "no scale": (dict(scale=[1.0, 0.0]), "positive"),
    }.values(),
)
def test_what_cannot_be_compared_is_named(measure, changes, message):
    with pytest.raises(ValueError, match=message):
        measure(*{"x": ZEROS, "y": ZEROS, "scale": ONES, **changes}.values())


def test_counts_that_are_not_allowed():
    for setting in ("permutations", "steps_each"):
        with pytest.raises(ValueError, match=f"{setting}=0"):
            energy(ZEROS, ZEROS, ONES, **{setting: 0})
    for x, neighbours in ((ZEROS[:2, :4], 5), (ZEROS, 0)):  # of the other trajectory there are 4 states
        with pytest.raises(ValueError, match=f"neighbours={neighbours} must be 1 to"):
            coverage(x, ZEROS, ONES, neighbours)
