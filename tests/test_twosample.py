"""Energy distance and coverage against scipy and loops; false alarms, power, and what counts as one draw."""

import itertools

import numpy as np
import pytest
import torch
from scipy import spatial, stats

from pgdlib.measures import coverage, energy_distance


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def walks(n, steps, seed, wander=0.1):
    """[n, steps, 2]: each walk stays near a place of its own, so that its steps are nearly copies of each other."""
    return draw(n, 1, 2, seed=seed) + wander * draw(n, steps, 2, seed=seed + 10_000)


def by_loops(x, y):
    """E, one pair of trajectories at a time."""

    def apart(a, b):
        return spatial.distance.cdist(a, b).mean()

    same = [np.mean([apart(a, b) for a, b in itertools.permutations(s, 2)]) for s in (x, y)]
    return 2 * np.mean([apart(a, b) for a in x for b in y]) - sum(same)


@pytest.mark.parametrize("n, m, steps", [(30, 50, 1), (6, 9, 5)])
def test_one_dimension_against_scipy(n, m, steps):
    """scipy's is the root of 2 ∫ (F - G)² = 2 E|X - Y| - E|X - X'| - E|Y - Y'|, with all pairs, those of one trajectory too.

    With S the mean over all n² pairs of trajectories, d that over the n of one with itself, and U over the others,
    S = ((n - 1) U + d) / n, so U = S + (S - d) / (n - 1): what E has less than scipy's square is (S - d) / (n - 1) a side.
    """
    x, y = draw(n, steps, 1), 0.7 * draw(m, steps, 1, seed=1) + 0.5
    expected = stats.energy_distance(x.flatten(), y.flatten()) ** 2
    for side in (x[..., 0].numpy(), y[..., 0].numpy()):
        own = np.mean([np.abs(np.subtract.outer(s, s)).mean() for s in side])
        everything = np.abs(np.subtract.outer(side.ravel(), side.ravel())).mean()
        expected -= (everything - own) / (len(side) - 1)
    assert energy_distance(x, y, [1.0], seeded(), 1)[0] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("far", [0.0, 1e7])
def test_many_dimensions_against_loops(far):
    """Different numbers and lengths of trajectories, more than a block of them, in units of `scale`, far from zero."""
    x, y, scale = draw(35, 4, 7), 1 + draw(33, 6, 7, seed=1), draw(7, seed=2).abs() + 0.5
    assert energy_distance(x * scale + far, y * scale + far, scale, seeded(), 1)[0] == pytest.approx(by_loops(x, y), abs=1e-6)


def test_long_trajectories_count_at_evenly_spread_steps():
    x, y = draw(5, 101, 2).cumsum(1), draw(6, 51, 2, seed=1).cumsum(1)
    few = energy_distance(x, y, torch.ones(2), seeded(), 20, steps_each=6)
    assert few == energy_distance(x[:, ::20], y[:, ::10], torch.ones(2), seeded(), 20)
    assert few[0] == pytest.approx(by_loops(x[:, ::20], y[:, ::10]), abs=1e-6)
    few = energy_distance(x, x[1:], torch.ones(2), seeded(), 1, steps_each=7)  # 16 2/3 steps apart
    nearest = x[:, [0, 17, 33, 50, 67, 83, 100]]
    assert few[0] == pytest.approx(by_loops(nearest, nearest[1:]), abs=1e-6)
    assert energy_distance(x, y, torch.ones(2), seeded(), 1, steps_each=101)[0] == pytest.approx(by_loops(x, y), abs=1e-6)


def test_p_and_quantile_against_all_permutations():
    """Four against three: 35 ways to part the seven."""
    x, y = draw(4, 3, 2), draw(3, 3, 2, seed=1) + 0.8
    pooled = torch.cat([x, y])
    ways = [[*w, *(i for i in range(7) if i not in w)] for w in itertools.combinations(range(7), 4)]
    energies = np.array([by_loops(pooled[w[:4]], pooled[w[4:]]) for w in ways])
    value, p, q = energy_distance(x, y, torch.ones(2), seeded(), 20_000)
    assert value == pytest.approx(energies[0], abs=1e-7)
    exact = (energies >= energies[0] - 1e-9).mean()
    assert 0 < exact < 0.5 and p == pytest.approx(exact, abs=4 * np.sqrt(exact / 20_000))
    assert q == pytest.approx(np.sort(energies)[33], abs=1e-7)  # 34 of 35 are 97%, 33 are 94%


@pytest.mark.parametrize("seed", range(8))
def test_a_permutation_that_changes_nothing_counts(seed):
    """Three against three far away: of 20 ways to part them two are theirs, as they are and swapped, equal but for rounding."""
    x, y = draw(3, 3, 2, seed=seed), 50 + draw(3, 3, 2, seed=seed + 100)
    p = energy_distance(x, y, torch.ones(2), seeded(), 3_000)[1]
    assert p == pytest.approx(0.1, abs=4 * np.sqrt(0.1 * 0.9 / 3_000))


def test_under_the_null_the_mean_is_zero_and_p_uniform():
    """Trajectories whose steps depend on each other do not cause false alarms; permuting steps would."""
    honest, naive = [], []
    for seed in range(150):
        x, y = walks(8, 6, 2 * seed), walks(10, 6, 2 * seed + 1)
        honest.append(energy_distance(x, y, torch.ones(2), seeded(seed), 199))
        naive.append(energy_distance(x.reshape(48, 1, 2), y.reshape(60, 1, 2), torch.ones(2), seeded(seed), 199)[1])
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
    value, p, q = energy_distance(x, change(y), torch.ones(2), seeded(), 400)
    assert value > q and p == 1 / 401
    value, p, q = energy_distance(x, y, torch.ones(2), seeded(), 400)
    assert value < q and p > 0.05


def test_order_and_sides_do_not_matter():
    x, y = walks(20, 5, 0), walks(25, 5, 1) + 0.5
    value = energy_distance(x, y, torch.ones(2), seeded(), 1)[0]
    orders = (torch.randperm(20, generator=seeded(1)), torch.randperm(25, generator=seeded(2)), torch.randperm(5))
    for a, b in ((x[orders[0]], y[orders[1]]), (x[:, orders[2]], y), (y, x)):
        assert energy_distance(a, b, torch.ones(2), seeded(), 1)[0] == pytest.approx(value, abs=1e-12)


def test_the_result_is_plain_numbers_that_follow_the_seed():
    x, y = walks(10, 5, 0), walks(10, 5, 1)
    result = energy_distance(x, y, torch.ones(2), seeded(), 50)
    assert [type(v) for v in result] == [float] * 3
    assert energy_distance(x.numpy(), y.numpy(), np.ones(2), seeded(), 50) == result
    assert energy_distance(x, y, torch.ones(2), seeded(1), 50)[1:] != result[1:]


@pytest.mark.parametrize(
    "x, y, scale, message",
    [
        ((4, 3, 2), (4, 3, 3), (2,), r"\[4, 3, 2\], \[4, 3, 3\] and \[2\]"),
        ((4, 3, 2), (4, 3, 2), (3,), r"and \[3\]"),
        ((4, 2), (4, 2), (2,), r"\[n, T, D\]"),
        ((1, 3, 2), (4, 3, 2), (2,), "2 or more trajectories"),
        ((4, 3, 2), (1, 3, 2), (2,), "2 or more trajectories"),
        ((4, 3, 2), (4, 0, 2), (2,), "of a step or more"),
    ],
)
def test_shapes_that_cannot_be_compared(x, y, scale, message):
    with pytest.raises(ValueError, match=message):
        energy_distance(torch.zeros(x), torch.zeros(y), torch.ones(scale), seeded())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_values_that_are_not_finite(which, bad):
    args = [torch.zeros(4, 3, 2), torch.zeros(4, 3, 2), torch.ones(2)]
    args[which].view(-1)[-1] = bad
    with pytest.raises(ValueError, match="finite"):
        energy_distance(*args, seeded())


def test_scale_and_counts_must_be_positive():
    x = torch.zeros(4, 3, 2)
    with pytest.raises(ValueError, match="positive"):
        energy_distance(x, x, [1.0, 0.0], seeded())
    for setting in ("permutations", "steps_each"):
        with pytest.raises(ValueError, match=f"{setting}=0"):
            energy_distance(x, x, torch.ones(2), seeded(), **{setting: 0})


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


def chance(n, m, neighbours):
    """That the nearest of n - 1 other and m new states of one distribution are not all others: exact."""
    return 1 - np.prod([(n - 1 - i) / (n + m - 1 - i) for i in range(neighbours)])


@pytest.mark.parametrize("neighbours", [1, 2, 5])
def test_a_sample_of_the_same_distribution_is_covered_but_for_chance(neighbours):
    found = [coverage(draw(300, 1, 3, seed=s), draw(300, 1, 3, seed=s + 50), np.ones(3), neighbours) for s in range(12)]
    assert chance(300, 300, neighbours) == pytest.approx(1 - 2**-neighbours, abs=0.01)
    assert np.mean(found) == pytest.approx(chance(300, 300, neighbours), abs=4 * np.std(found, ddof=1) / np.sqrt(12))
    assert np.std(found) < 0.04


def test_the_states_of_ones_own_trajectory_do_not_count_as_neighbours():
    """Walks that each keep to a place: measured among its own steps, a state's reach would be a tenth of what it is."""
    x, y = walks(200, 8, 0, wander=1e-3), walks(200, 8, 1, wander=1e-3)
    # The steps of a walk are one state, and the 5 nearest other states are all of the nearest other walk.
    assert coverage(x, y, np.ones(2)) == pytest.approx(chance(200, 200, 1), abs=0.1)
    assert coverage(x.reshape(1600, 1, 2), y.reshape(1600, 1, 2), np.ones(2)) < 0.1


def test_what_is_far_away_covers_nothing_and_a_superset_everything():
    x = walks(40, 8, 0)
    assert coverage(x, x + 100, np.ones(2)) == 0
    for everything in (x, torch.cat([x + 100, x]), torch.cat([x, walks(5, 8, 1)])):
        assert coverage(x, everything, np.ones(2)) == 1


def test_a_superset_covers_states_that_are_all_the_same():
    """As the first states of episodes are: the radius is zero, and so is the distance."""
    x = draw(1, 1, 45) * torch.ones(60, 1, 1)
    assert coverage(x, x, np.ones(45)) == 1
    assert coverage(x, x + 1e-3, np.ones(45)) == 0


def test_a_mode_that_is_missed_is_not_covered():
    x = draw(400, 2, 3)
    x[:100] += 50
    x[100:200] -= 50
    missing, thin = x[100:], torch.cat([x[98:100], x[100:]])
    assert coverage(x, missing, np.ones(3)) == 0.75
    assert coverage(x, x[200:], np.ones(3)) == 0.5
    assert 0.75 < coverage(x, thin, np.ones(3)) < 0.85  # two trajectories are no mode of a hundred
    assert coverage(x[100:], x, np.ones(3)) == 1  # what is too much costs nothing


def test_coverage_is_in_units_of_scale():
    x, y, units = draw(60, 3, 4), 1 + draw(60, 3, 4, seed=1), torch.tensor([1e-4, 1.0, 30.0, 1e5])
    found = coverage(x, y, np.ones(4))
    assert 0.1 < found < 0.95 and coverage(x * units, y * units, units) == found
    assert coverage(x * units, y * units, np.ones(4)) != found  # one dimension decides all


def test_coverage_looks_at_evenly_spread_steps():
    x, y = walks(30, 29, 0), walks(30, 36, 1)
    assert coverage(x, y, np.ones(2)) == coverage(x[:, ::4], y[:, ::5], np.ones(2)) != coverage(x[:, :8], y[:, :8], np.ones(2))
    assert coverage(x, y, np.ones(2), steps_each=50) == pytest.approx(covered_by_loops(x.numpy(), y.numpy(), 5))
    assert coverage(x.numpy(), y.float(), [1.0, 1.0]) == pytest.approx(coverage(x, y, torch.ones(2)), abs=0.01)


@pytest.mark.parametrize(
    "x, y, scale, message",
    [
        (torch.zeros(1, 8, 2), torch.zeros(4, 8, 2), torch.ones(2), "trajectories"),  # it has no other to measure by
        (torch.zeros(2, 4, 2), torch.zeros(4, 8, 2), torch.ones(2), "neighbours=5"),  # the other has 4 states
        (torch.zeros(4, 8, 2), torch.full((4, 8, 2), torch.nan), torch.ones(2), "finite"),
        (torch.full((4, 8, 2), torch.inf), torch.zeros(4, 8, 2), torch.ones(2), "finite"),
        (torch.zeros(4, 8, 2), torch.zeros(4, 8, 2), torch.tensor([1.0, 0.0]), "positive"),
    ],
    ids=["one trajectory", "few states", "NaN", "infinite", "no scale"],
)
def test_coverage_that_means_nothing_is_refused(x, y, scale, message):
    with pytest.raises(ValueError, match=message):
        coverage(x, y, scale)
