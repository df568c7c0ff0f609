"""Statistics over seeds against enumeration by hand, closed forms, and what intervals and tests promise."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from pgdlib import measures
from pgdlib.lab import seeds
from pgdlib.lab.seeds import PAPER_SEEDS, PAPER_TABLE_1

NAN = math.nan


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def datasets(*sizes, seed=0):
    """A list of scores [S_d], of datasets of other means and spreads."""
    rng = np.random.default_rng(seed)
    return [3 * d + (1 + d) * rng.normal(size=n) for d, n in enumerate(sizes)]


# Means


def test_mean_and_standard_error_by_hand():
    """The std of 1, 2, 6 is √7; what is not finite is left out."""
    assert seeds.mean_se([1, 3]) == (2, 1)
    for some in ([1, 2, 6], [1, NAN, 2, math.inf, 6]):
        assert seeds.mean_se(some) == pytest.approx((3, math.sqrt(7 / 3)))


@pytest.mark.filterwarnings("error")
def test_means_of_few():
    assert seeds.mean_se([7.0]) == pytest.approx((7, NAN), nan_ok=True)
    assert np.isnan(seeds.mean_se([NAN, NAN])).all() and np.isnan(seeds.mean_se([])).all()
    assert math.isnan(seeds.interquartile_mean([NAN])) and math.isnan(seeds.interquartile_mean([]))
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        seeds.mean_se(normal(2, 3))


@pytest.mark.parametrize(
    "scores, expected",
    [
        ([4], 4),
        ([1, 2, 9], 4),  # a quarter of three is none
        ([0, 1, 3, 90], 2),
        ([90, 1, 0, 3, 5], 3),
        ([-90, 0, 2, 3, 4, 5, 6, 80], 3.5),
        ([0, NAN, 1, 2, math.inf, 3], 1.5),
    ],
)
def test_the_interquartile_mean_by_hand(scores, expected):
    found = seeds.interquartile_mean(scores)
    assert found == expected and type(found) is float


def test_the_interquartile_mean_is_a_statistic_for_the_bootstrap():
    np.testing.assert_array_equal(seeds.interquartile_mean(np.array([[0, 1, 3, 90], [8, 7, 6, 5]])), [2, 6.5])
    value, low, high = measures.bootstrap(seeds.interquartile_mean, [0, 1, 2, 3, 4, NAN])
    assert value == 2 and 0 < low < 2 < high < 4


def test_the_bootstrap_of_five_seeds_is_too_narrow():
    """As the module says; 600 repetitions have a standard error of 1.5%."""
    intervals = [measures.bootstrap(lambda v: v.mean(-1), x, resamples=500) for x in normal(600, 5)]
    cover = [low <= 0 <= high for _, low, high in intervals]
    assert np.mean(cover) == pytest.approx(0.84, abs=0.045)


# The probability of improvement


def test_the_probability_of_improvement_by_hand():
    improvement = seeds.probability_of_improvement
    assert improvement([3, 4], [1, 2]) == (1, 1, 1) and improvement([1, 2], [3, 4]) == (0, 0, 0)
    assert improvement([5, 5], [5, 5, 5]) == (0.5, 0.5, 0.5)
    assert improvement([1, NAN, 3], [2, 0, NAN])[0] == 0.75


def test_the_probability_of_improvement_counts_pairs():
    """Rounded scores tie often, and the sides have other sizes."""
    x, y = np.round(2 * normal(7)), np.round(2 * normal(5, seed=1))
    shares = [(a > b) + 0.5 * (a == b) for a in x for b in y]
    value, low, high = seeds.probability_of_improvement(x, y)
    assert value == pytest.approx(np.mean(shares)) and low <= value <= high
    assert seeds.probability_of_improvement(y, x)[0] == pytest.approx(1 - value)


def test_the_interval_of_the_probability_of_improvement_covers_it():
    """Normals d apart: Φ(d / √2). 300 repetitions have a standard error of 1.3%."""
    rng, covered, truth = np.random.default_rng(0), [], stats.norm.cdf(0.5 / math.sqrt(2))
    for _ in range(300):
        _, low, high = seeds.probability_of_improvement(rng.normal(0.5, 1, 25), rng.normal(0, 1, 25))
        covered.append(low <= truth <= high)
    assert np.mean(covered) == pytest.approx(0.94, abs=0.045)


# Sign flips


@pytest.mark.parametrize("n", [2, 4, 9])
def test_sign_flips_against_enumeration(n):
    for seed in range(3):
        differences = np.round(normal(n, seed=seed) + 1)  # rounded: ties and zeros
        flipped = [abs((differences * signs).mean()) for signs in itertools.product((1, -1), repeat=n)]
        expected = np.mean(np.array(flipped) >= abs(differences.mean()) - 1e-9)
        assert seeds.sign_flip_test(differences) == pytest.approx(expected)


def test_the_least_p_that_pairs_can_give():
    for n in (2, 5, 16):
        assert seeds.sign_flip_test(1 + np.arange(n)) == seeds.sign_flip_test(-1 - np.arange(n)) == 2 / 2**n
    assert 0 < seeds.sign_flip_test(np.arange(1, 41)) < 1e-4  # drawn: never 0


def test_drawn_flips_agree_with_the_exact_ones():
    """20 pairs of which 8 are zero have the exact p-value of the other 12; 65,536 draws have a standard error of 0.2%."""
    d = normal(12, seed=3) + 0.5
    exact = seeds.sign_flip_test(d)
    drawn = [seeds.sign_flip_test(np.append(d, np.zeros(8)), seed=s) for s in (0, 0, 1)]
    assert 0.02 < exact < 0.5
    assert drawn == pytest.approx([exact] * 3, abs=0.008) and drawn[0] == drawn[1] != drawn[2]


def test_sign_flips_leave_out_pairs_that_diverged():
    d = normal(5) + 1
    assert seeds.sign_flip_test(np.append(d, NAN)) == seeds.sign_flip_test(d)
    assert math.isnan(seeds.sign_flip_test([NAN, 1.0])) and seeds.sign_flip_test([0.0, 0.0]) == 1


# The paired interval


def test_the_paired_interval_by_hand():
    """Differences 1, 2, 6: mean 3, std √7, and t(0.975, 2) = 4.3027."""
    half = 4.30265 * math.sqrt(7 / 3)
    for several in (False, True):
        x, y = np.array([1.0, 12, 26]), np.array([0.0, 10, 20])
        found = seeds.paired_interval(*(([x], [y]) if several else (x, y)))
        assert found == pytest.approx((3, 3 - half, 3 + half), rel=1e-5) and all(type(v) is float for v in found)


def test_the_paired_interval_of_two_datasets_is_welchs():
    """The mean of a and b is half of a less -b, of which Welch's interval is known."""
    a, b = datasets(5, 9)
    theirs = stats.ttest_ind(a, -b, equal_var=False).confidence_interval()
    found = seeds.paired_interval([a, b], [np.zeros(5), np.zeros(9)])
    assert found == pytest.approx(((a.mean() + b.mean()) / 2, theirs.low / 2, theirs.high / 2))


def test_the_paired_interval_covers_with_five_seeds():
    """The truth, as often as it says, whatever the pairs share; 4,000 repetitions have a standard error of 0.34%."""
    shared, x, y = 10 * normal(4_000, 5), normal(4_000, 5, seed=1), normal(4_000, 5, seed=2)
    found = np.array([seeds.paired_interval(s + 1 + a, s + b) for s, a, b in zip(shared, x, y)])
    assert np.mean((found[:, 1] <= 1) & (found[:, 2] >= 1)) == pytest.approx(0.95, abs=0.014)


def test_the_paired_interval_of_several_datasets_covers():
    """Spreads of 1, 2 and 3 and 5 seeds each; the degrees of freedom are estimated, which may cost or give a little."""
    d = np.array([1.0, 2.0, 3.0])[:, None, None] * normal(3, 1_500, 5)
    found = np.array([seeds.paired_interval([*d[:, i]], [np.zeros(5)] * 3) for i in range(1_500)])
    assert np.mean((found[:, 1] <= 0) & (found[:, 2] >= 0)) == pytest.approx(0.95, abs=0.022)


@pytest.mark.filterwarnings("error")
def test_the_paired_interval_of_few():
    assert seeds.paired_interval([1, 2, NAN, 9], [0, 1, 5, NAN]) == (1, 1, 1)  # two pairs are left, and they agree
    assert seeds.paired_interval([3, NAN], [1, 2]) == pytest.approx((2, NAN, NAN), nan_ok=True)
    some = np.arange(3.0)
    lost = seeds.paired_interval([some, np.array([NAN])], [some, np.array([1.0])])
    assert np.isnan(lost).all()  # not the mean of another set of datasets
    with pytest.raises(ValueError, match=r"of the same seeds .* got \[\(2,\), \(3,\)\]"):
        seeds.paired_interval([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="shorter"):
        seeds.paired_interval([some, some], [some])


# The seeds that a difference needs


def power_of(test, draws=40_000, seed=0):
    """The share of p-values below 5%; standard error 0.2% near a power of 80%."""
    return np.mean(test(np.random.default_rng(seed), draws) < 0.05)


def power_of_welch(n, difference, std_x, std_y):
    def welch(rng, draws):
        x, y = difference + std_x * rng.normal(size=(draws, n)), std_y * rng.normal(size=(draws, n))
        return stats.ttest_ind(x, y, axis=1, equal_var=False).pvalue

    return power_of(welch)


@pytest.mark.parametrize("case", [(1.0, 1.0, 1.0), (-1.0, 2.0, 0.5), (0.8, 0.3, 1.5)])
def test_the_seeds_needed_have_the_power_and_one_fewer_has_not(case):
    """A seed more is worth some 2%; the test's own estimate of its degrees of freedom costs less than 0.5% here."""
    difference, std_x, std_y = case
    n = seeds.seeds_needed(difference, std_x, std_y)
    assert 10 < n < 50 and power_of_welch(n, *case) > 0.79 and power_of_welch(n - 1, *case) < 0.805
    assert n == seeds.seeds_needed(-difference, std_y, std_x) == seeds.seeds_needed(7 * difference, 7 * std_x, 7 * std_y)


@pytest.mark.parametrize("difference", [2.0, 1.0])
def test_the_pairs_needed_have_the_power_and_one_fewer_has_not(difference):
    """The noncentral t is exact here, so that the simulation's own error, 0.25%, is all."""
    n = seeds.seeds_needed(difference, 1.0)

    def found(n):
        return power_of(lambda rng, draws: stats.ttest_1samp(rng.normal(difference, 1, (draws, n)), 0, axis=1).pvalue)

    assert 2 < n < 15 and found(n) > 0.8 - 0.008 and found(n - 1) < 0.8 + 0.008


def test_five_seeds_have_a_little_less_power():
    """As the docstring says: the difference at which 5 seeds just suffice is found by Welch's test in 78% of all cases."""
    assert seeds.seeds_needed(2.03, 1.0, 1.0) == 5 and seeds.seeds_needed(2.02, 1.0, 1.0) == 6
    assert power_of_welch(5, 2.025, 1.0, 1.0) == pytest.approx(0.78, abs=0.01)


def test_many_seeds_are_those_of_the_normal_test():
    """(z(0.975) + z(0.8))² σ² / difference², a little more for Student's t; and two are the fewest."""
    z = (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) ** 2
    assert 0 < seeds.seeds_needed(0.01, 1.0) - z * 1e4 < 4
    assert 0 < seeds.seeds_needed(0.02, 2.0, 1.0) - z * 5 / 0.0004 < 4
    assert seeds.seeds_needed(1e6, 1.0, 1.0) == seeds.seeds_needed(-1e6, 1.0) == 2


@pytest.mark.parametrize("given", [(0, 1.0), (NAN, 1.0, 1.0), (1.0, 0, 1.0), (1.0, 1.0, -1), (1.0, math.inf, 1.0), (1.0, -1)])
def test_what_cannot_be_is_named(given):
    name, value = next((("std", "difference")[i == 0], v) for i, v in enumerate(given) if v != 1)
    with pytest.raises(ValueError, match=rf"^{name}={value} is not allowed; it must be finite and (positive|not 0)"):
        seeds.seeds_needed(*given)


# The paper's numbers


def test_the_papers_gains_are_not_significant():
    """As it says, by Welch's test of its means and standard errors; 5 seeds are far too few for such gains."""
    assert all(list(PAPER_TABLE_1) == list(of) == ["human", "cloned", "expert"] for of in seeds.PUBLISHED.values())
    assert PAPER_SEEDS == 5
    for name, ((before, se_before), (after, se_after)) in PAPER_TABLE_1.items():
        stds = [se * math.sqrt(PAPER_SEEDS) for se in (se_before, se_after)]
        p = stats.ttest_ind_from_stats(after, stds[1], PAPER_SEEDS, before, stds[0], PAPER_SEEDS, equal_var=False).pvalue
        assert p > 0.4 and seeds.seeds_needed(seeds.PAPER_GAINS[name], *stds) > 10 * PAPER_SEEDS
    assert seeds.PAPER_GAINS == {"human": 216, "cloned": 114, "expert": 53}
