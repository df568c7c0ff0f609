"""The verdicts on the paper's claims, on data where the answer is plain and on the borders of their rules."""

import math

import numpy as np
import pytest

from pgdlib.lab import claims
from pgdlib.lab.claims import MARGIN, NOT, PARTLY, REPRODUCED, UNTESTED, Claim

EIGHT = np.ones(8)  # means of eight equal numbers are exact


def around(mean, spread=0.1, n=200, seed=0):
    """[n] values near `mean`."""
    return mean + spread * np.random.default_rng(seed).normal(size=n)


def shape(claim):
    return claim.verdict, claim.effect, claim.low, claim.high


# C1


@pytest.mark.parametrize(
    "closed, verdict",
    [(1.2, REPRODUCED), (0.9, REPRODUCED), (0.5, REPRODUCED), (0.49, PARTLY), (1e-3, PARTLY), (0.0, NOT), (-0.5, NOT)],
)
def test_likelihood_raised_by_a_share_of_the_gap(closed, verdict):
    """From -2 nats, the guide's own -1 being the end; every trajectory rises alike, so that the share is exact."""
    claim = claims.likelihood_raised(-2 * EIGHT, -2 + closed * EIGHT, -1.0)
    assert claim.id == "C1" and claim.verdict == verdict and claim.effect == pytest.approx(closed)


def test_likelihood_raised_surely_or_only_perhaps():
    """A bit more than half of the gap in the mean is not surely half; a rise within the noise is none."""
    unguided, noise = around(-2), around(0, 0.5, seed=1)
    for closed, verdict in ((0.6, REPRODUCED), (0.51, PARTLY), (0.1, PARTLY), (0.01, NOT)):
        claim = claims.likelihood_raised(unguided, unguided + noise - noise.mean() + closed, -1.0)
        assert claim.verdict == verdict and claim.effect == pytest.approx(closed, rel=0.05)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a gap of zero
def test_likelihood_without_a_gap_cannot_be_tested():
    """Data as likely as the guide's own actions, or more: guidance that lowers it to theirs must not count as a share of 1."""
    unguided = around(-0.5)
    for guided in (unguided - 0.5, unguided - 0.1, unguided + 0.5):
        assert claims.likelihood_raised(unguided, guided, -1.0).verdict == UNTESTED
    assert claims.likelihood_raised(-EIGHT, -0.5 * EIGHT, -1.0).verdict == UNTESTED
    assert claims.likelihood_raised(-1.01 * EIGHT, -0.5 * EIGHT, -1.0).verdict == REPRODUCED


# C2


@pytest.mark.parametrize(
    "ratio, verdict", [(0.3, REPRODUCED), (0.99, REPRODUCED), (MARGIN, REPRODUCED), (1.06, NOT), (4.0, NOT)]
)
def test_error_not_raised_up_to_the_margin(ratio, verdict):
    claim = claims.error_not_raised(EIGHT, ratio * EIGHT, "the paper's rule")
    assert shape(claim) == (verdict, ratio, ratio, ratio)
    assert claim.id == "C2 the paper's rule" and "the paper's rule" in claim.measure and str(MARGIN) in claim.rule


def test_no_guidance_at_all_cannot_be_tested():
    assert claims.error_not_raised(EIGHT, EIGHT.copy(), "").verdict == UNTESTED


def test_error_perhaps_not_raised():
    """Differences that the noise hides; between one ratio and the next, only the mean differs."""
    unguided, noise = np.exp(around(0, 1.0)), 0.5 * around(0, 1.0, seed=1)
    for ratio, verdict in ((0.7, REPRODUCED), (1.04, PARTLY), (1.4, NOT)):
        claim = claims.error_not_raised(unguided, ratio * unguided + noise - noise.mean(), "")
        assert claim.verdict == verdict and claim.effect == pytest.approx(ratio)
        assert (claim.low < MARGIN < claim.high) == (verdict == PARTLY)


# C3

LAMS = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0]


def sweep(last_good, collapse=(-50.0, 10.0, 0.0)):
    """Log-likelihoods, errors and shares of diverged: fine up to λ = `last_good`, then as `collapse` says."""
    rows = [collapse if lam > last_good else (lam - 2, 1 - 0.1 * lam, 0.0) for lam in LAMS]
    likelihoods, errors, diverged = zip(*rows, strict=True)
    return (
        [around(v, seed=i) for i, v in enumerate(likelihoods)],
        [around(v, 0.01, seed=i) for i, v in enumerate(errors)],
        diverged,
    )


@pytest.mark.parametrize(
    "last_good, low, high, verdict",
    [
        (2.0, 2.0, 2.5, REPRODUCED),
        (1.5, 1.5, 2.0, REPRODUCED),
        (2.5, 2.5, 3.0, REPRODUCED),
        (1.0, 1.0, 1.5, PARTLY),
        (3.0, 3.0, 4.0, PARTLY),
        (0.0, 0.0, 0.5, PARTLY),  # the first λ is the best
    ],
)
def test_threshold_lies_between_the_last_that_works_and_the_first_that_does_not(last_good, low, high, verdict):
    claim = claims.threshold(LAMS, *sweep(last_good))
    assert claim.id == "C3" and shape(claim) == (verdict, (low + high) / 2, low, high)


@pytest.mark.parametrize(
    "collapse, found",
    [
        ((-50.0, 10.0, 0.0), True),
        ((-50.0, math.nan, 0.0), True),  # nothing can be judged any more
        ((-50.0, math.inf, 0.0), True),
        ((-50.0, 0.8, 0.5), True),  # half diverge, and the others look fine
        ((-50.0, 0.8, 0.49), False),
        ((-50.0, 1.4, 0.0), False),  # the error rises, but does not double
        ((1.0, 10.0, 1.0), False),  # the likelihood goes on rising
        ((1.0, math.nan, 1.0), False),
    ],
)
def test_threshold_needs_a_fall_of_likelihood_and_a_rise_of_error_or_divergence(collapse, found):
    claim = claims.threshold(LAMS, *sweep(2.0, collapse))
    assert shape(claim)[:2] == (REPRODUCED, 2.25) if found else claim.verdict == NOT


def no_threshold(claim):
    """Up to the last λ nothing has happened: that is the lower end of where it may lie."""
    return claim.verdict == NOT and math.isnan(claim.effect) and claim.low == LAMS[-1] and math.isnan(claim.high)


def test_no_threshold():
    assert no_threshold(claims.threshold(LAMS, *sweep(9.0)))
    likelihoods, errors, diverged = sweep(9.0)
    assert no_threshold(claims.threshold(LAMS, likelihoods[::-1], errors, diverged))  # falls with every λ, but nothing else
    assert no_threshold(claims.threshold(LAMS[-1:], likelihoods[-1:], errors[-1:], diverged[-1:]))


def test_a_doubled_error_is_the_border():
    likelihoods, _, diverged = sweep(2.0)
    assert no_threshold(claims.threshold(LAMS, likelihoods, [EIGHT] * 5 + [2 * EIGHT] * 3, diverged))
    claim = claims.threshold(LAMS, likelihoods, [EIGHT] * 5 + [2 * EIGHT, 2.01 * EIGHT, EIGHT], diverged)
    assert shape(claim) == (REPRODUCED, 2.75, 2.5, 3.0)


def test_a_fall_of_likelihood_within_the_noise_is_no_threshold():
    likelihoods, errors, diverged = sweep(2.0, (-0.1, 10.0, 1.0))  # from 0 down to -0.1
    assert claims.threshold(LAMS, likelihoods, errors, diverged).verdict == REPRODUCED
    spread = [v.mean() + 20 * (v - v.mean()) for v in likelihoods]
    assert no_threshold(claims.threshold(LAMS, spread, errors, diverged))


# C4


def gains(**of):
    """Returns, dataset -> (unguided [5], guided [5]) with such a mean gain, of which the std over pairs is 100."""
    pairs = {}
    for seed, (name, gain) in enumerate(of.items()):
        unguided, change = around(2000, 300, 5, seed=seed), around(0, 1, 5, seed=seed + 9)
        change = 100 * (change - change.mean()) / change.std(ddof=1)
        pairs[name] = unguided, unguided + gain + change
    return pairs


HALF = 124.17  # Student's interval of 5 differences with a std of 100: 2.7764 / √5 of it to each side


@pytest.mark.parametrize(
    "gain, verdict",
    [
        (600, REPRODUCED),
        (HALF + 1, REPRODUCED),
        (HALF - 1, UNTESTED),  # perhaps zero, perhaps the paper's 216
        (216 - HALF + 1, UNTESTED),
        (216 - HALF - 1, NOT),  # perhaps zero, but surely not 216
        (0, NOT),
        (-600, NOT),
    ],
)
def test_returns_raised_surely_or_by_less_than_the_papers(gain, verdict):
    claim = claims.returns_raised(gains(human=gain))
    assert claim.id == "C4" and claim.verdict == verdict
    assert (claim.effect, claim.low, claim.high) == pytest.approx((gain, gain - HALF, gain + HALF), abs=0.1)


def test_returns_are_judged_by_the_papers_gain_on_the_same_datasets():
    """A gain of 60 ± 124 rules out 216, the paper's on human, but not 53, that on expert; of three, 128 is its mean."""
    assert claims.returns_raised(gains(human=60)).verdict == NOT
    assert claims.returns_raised(gains(expert=60)).verdict == UNTESTED
    # The interval of three is 100 times t(0.975, 12) / √15 = 56.3 to each side.
    for gain, verdict in ((57, REPRODUCED), (55, NOT), (71, REPRODUCED)):
        claim = claims.returns_raised(gains(human=gain + 100, cloned=gain, expert=gain - 100))
        assert claim.verdict == verdict and claim.effect == pytest.approx(gain) and "the paper's +128" in claim.measure
        assert claim.high - gain == pytest.approx(56.26, abs=0.1)


def test_a_dataset_that_surely_loses_is_against_returns_raised():
    assert claims.returns_raised(gains(human=900, cloned=-HALF + 1)).verdict == REPRODUCED
    assert claims.returns_raised(gains(human=900, cloned=-HALF - 1)).verdict == PARTLY


@pytest.mark.parametrize("side", [0, 1])
def test_a_seed_that_diverged_is_named_and_against_returns_raised(side):
    returns = gains(human=900, cloned=800)
    assert claims.returns_raised(returns).verdict == REPRODUCED
    returns["cloned"][side][2] = math.nan
    claim = claims.returns_raised(returns)
    kept = [np.delete(v, 2) for v in returns["cloned"]]
    expected = claims.returns_raised({**returns, "cloned": kept})
    assert shape(claim) == (PARTLY, *shape(expected)[1:]) and expected.verdict == REPRODUCED
    assert "human +900, 5 seeds; cloned" in claim.measure and ", 4 of 5 seeds; the paper's +165" in claim.measure


def test_returns_may_be_paired_by_models():
    claim, same = claims.returns_raised(gains(human=600), "λ = 2", "models"), claims.returns_raised(gains(human=600), "λ = 2")
    assert shape(claim) == shape(same) and "human +600, 5 models;" in claim.measure and "so few models" in claim.rule


def test_returns_of_a_single_pair_decide_nothing():
    claim = claims.returns_raised({"human": ([1.0, 2.0], [900.0, math.nan])})
    assert claim.verdict == UNTESTED and claim.effect == 899 and math.isnan(claim.low)
    assert claims.effect(claim) == "899"


@pytest.mark.parametrize("datasets, named", [((), "got none"), (("human", "door"), "got door")])
def test_returns_need_a_dataset_of_the_paper(datasets, named):
    with pytest.raises(ValueError, match=rf"one or more of human, cloned, expert; {named}"):
        claims.returns_raised(dict.fromkeys(datasets, (EIGHT, EIGHT)))


# C5


@pytest.mark.parametrize(
    "ratio, diverged, verdict",
    [
        (3.0, (0.0, 0.0), REPRODUCED),
        (1.06, (0.0, 0.0), REPRODUCED),
        (MARGIN, (0.0, 0.0), PARTLY),
        (1.01, (0.0, 0.0), PARTLY),
        (1.0, (0.0, 0.0), NOT),
        (0.5, (0.0, 0.0), NOT),
        (0.5, (0.0, 0.06), REPRODUCED),
        (0.5, (0.05, 0.06), REPRODUCED),
        (0.5, (0.0, 0.05), NOT),
        (0.5, (0.06, 0.9), NOT),  # both diverge: the warm-up cures nothing
        (1.01, (0.06, 0.9), PARTLY),
        (math.nan, (0.0, 1.0), REPRODUCED),  # without a warm-up all diverged, and none has an error
        (math.nan, (1.0, 1.0), NOT),
    ],
)
def test_warmup_cures_errors_or_divergence(ratio, diverged, verdict):
    claim = claims.warmup_cures(EIGHT, ratio * EIGHT, diverged)
    assert claim.id == "C5" and shape(claim) == pytest.approx((verdict, ratio, ratio, ratio), nan_ok=True)


def test_a_cure_within_the_noise_is_none():
    with_warmup = around(1, 0.3)
    change = around(0, 0.5, seed=1)
    for rise, verdict in ((0.03, NOT), (0.1, PARTLY), (0.3, REPRODUCED)):
        claim = claims.warmup_cures(with_warmup, with_warmup + change - change.mean() + rise, (0.0, 0.0))
        assert claim.verdict == verdict and claim.effect == pytest.approx(1 + rise, abs=0.01)


# C6


@pytest.mark.parametrize(
    "model, whole, verdict",
    [
        ((1, 9), (2, 3), REPRODUCED),
        ((1, 2), (2, 3), PARTLY),  # grows more, and is still below
        ((1, 3), (2, 3), PARTLY),
        ((4, 8), (1, 2), NOT),  # far above, but grows alike
        ((4, 8), (1, 3), NOT),
        ((2, 1), (1, 2), NOT),
    ],
)
def test_compounding_needs_more_growth_and_more_error(model, whole, verdict):
    claim = claims.compounding(*(v * EIGHT for v in (*model, *whole)), 60)
    assert claim.id == "C6" and "60 steps" in claim.measure
    assert shape(claim) == pytest.approx((verdict, *[model[1] / whole[1]] * 3))


def test_each_growth_is_of_the_same_trajectories():
    """Wildly different trajectories that all grow by half, against others that do not: sure, though the spread hides it."""
    early = np.exp(around(0, 3.0, 100))
    assert claims.compounding(early, 1.5 * early, early, early, 9).verdict == PARTLY
    shuffled = np.random.default_rng(1).permutation(1.5 * early)
    assert claims.compounding(early, shuffled, early, early, 9).verdict == NOT


# C7


def verdict_of(verdict):
    return Claim("C1", "m", 1.0, 1.0, 1.0, verdict, "r")


@pytest.mark.parametrize(
    "first, second, worse",
    [
        (REPRODUCED, REPRODUCED, REPRODUCED),
        (REPRODUCED, PARTLY, PARTLY),
        (PARTLY, REPRODUCED, PARTLY),
        (NOT, REPRODUCED, NOT),
        (PARTLY, NOT, NOT),
        (REPRODUCED, UNTESTED, UNTESTED),
    ],
)
def test_better_guide_has_the_worse_verdict(first, second, worse):
    claim = claims.better_guide(3 * EIGHT, EIGHT, verdict_of(first), verdict_of(second))
    assert claim.id == "C7" and shape(claim) == (worse, 3, 3, 3)


def test_a_guide_that_is_not_surely_twice_as_good_tests_nothing():
    both = verdict_of(REPRODUCED), verdict_of(REPRODUCED)
    assert claims.better_guide(2 * EIGHT, EIGHT, *both).verdict == UNTESTED
    assert claims.better_guide(2.01 * EIGHT, EIGHT, *both).verdict == REPRODUCED
    claim = claims.better_guide(around(2.1, 2.0), around(1, 0.5, 90, seed=1), *both)
    assert claim.verdict == UNTESTED and claim.low < 2 < claim.effect
    assert claims.better_guide(around(2.1, 0.2), around(1, 0.05, 90, seed=1), *both).verdict == REPRODUCED


# C8


@pytest.mark.parametrize("noise, sign, verdict", [(0.1, 1, REPRODUCED), (1.0, 1, REPRODUCED), (6.0, 1, PARTLY), (0.1, -1, NOT)])
def test_likely_is_real_if_ranks_agree(noise, sign, verdict):
    """A normal loss of which the error is the exponential but for noise has the rank correlation 6/π arcsin(r/2)."""
    losses = around(0, 1.0, 400)
    errors = np.exp(sign * (losses + around(0, noise, 400, seed=1)))
    claim = claims.likely_is_real(losses, errors)
    r = sign / math.hypot(1, noise)
    assert claim.id == "C8" and claim.verdict == verdict
    assert claim.effect == pytest.approx(6 / math.pi * math.asin(r / 2), abs=0.1)


def test_likely_is_real_looks_at_ranks_alone():
    losses = around(0, 1.0, 50)
    assert shape(claims.likely_is_real(losses, np.exp(30 * losses))) == pytest.approx((REPRODUCED, 1, 1, 1))
    assert shape(claims.likely_is_real(losses, -(losses**3))) == pytest.approx((NOT, -1, -1, -1))


def test_one_trajectory_with_an_error_shows_nothing():
    one = claims.likely_is_real(np.arange(8.0), np.where(np.arange(8) == 3, 0.5, math.nan))
    assert one.verdict == NOT and np.isnan([one.effect, one.low, one.high]).all()


# C9


@pytest.mark.parametrize(
    "p, before, after, verdict",
    [
        (0.005, 0.9, 0.4, REPRODUCED),
        (0.05, 0.9, 0.4, REPRODUCED),
        (0.005, 0.4, 0.9, PARTLY),
        (0.005, 0.4, 0.4, PARTLY),
        (0.051, 0.9, 0.4, NOT),
        (0.5, 0.4, 0.9, NOT),
    ],
)
def test_states_shift_toward_the_policys(p, before, after, verdict):
    claim = claims.states_shift((0.3, p, 0.02), (before, 0.1, 0.0), (after,))
    assert claim.id == "C9" and claim.verdict == verdict and claim.effect == 0.3
    assert math.isnan(claim.low) and math.isnan(claim.high) and "0.020" in claim.measure and f"{p:.3f}" in claim.measure


# C10


def peaked(best, noise, seed):
    """Returns [5, 8] at `WEIGHTS` that are highest at the weight `best`."""
    return -20 * np.abs(np.log2(WEIGHTS / best))[:, None] + noise * np.random.default_rng(seed).normal(size=(5, 8))


WEIGHTS = np.array([0.25, 0.5, 1.0, 2.0, 4.0])


@pytest.mark.parametrize(
    "guided, noise, verdict",
    [(0.5, 5, REPRODUCED), (0.25, 5, REPRODUCED), (1, 5, NOT), (2, 5, NOT), (0.5, 40, PARTLY), (0.5, 80, UNTESTED)],
)
def test_less_conservatism_is_a_lower_best_weight(guided, noise, verdict):
    one, other = ((peaked(1.0, noise, 2 * i), peaked(guided, noise, 2 * i + 1)) for i in range(2))
    claim = claims.less_conservatism({"A": one, "B": other}, WEIGHTS)
    expected = np.mean([np.log2(WEIGHTS[np.argmax(g.mean(1))] / WEIGHTS[np.argmax(u.mean(1))]) for u, g in (one, other)])
    assert claim.id == "C10" and "A, B" in claim.measure and claim.effect == pytest.approx(expected)
    assert claim.verdict == verdict and claim.low <= claim.effect <= claim.high
    assert noise > 5 or claim.effect == np.log2(guided)


def test_a_run_that_diverged_is_its_agents_worst_and_what_costs_return_is_half_of_the_claim():
    unguided, guided = peaked(1.0, 1, 0), peaked(1.0, 1, 1)
    guided[2, :6] = math.nan  # at the best weight most diverge
    claim = claims.less_conservatism({"A": (unguided, guided)}, WEIGHTS)
    assert abs(claim.effect) == 1 and claims.less_conservatism({"A": (unguided, peaked(1.0, 1, 1))}, WEIGHTS).effect == 0
    assert claims.less_conservatism({"A": (unguided, peaked(0.5, 1, 1) - 20)}, WEIGHTS).verdict == PARTLY  # at a loss


# All with an interval


def positive(n, seed):
    return np.exp(around(0, 0.5, n, seed))


# name -> a function of n samples [n] that gives the claim
WITH_INTERVAL = {
    "C1": lambda a, b, c, d: claims.likelihood_raised(-1 - a, -0.5 - 0.5 * b, 0.0),
    "C2": lambda a, b, c, d: claims.error_not_raised(a, b, ""),
    "C4": lambda a, b, c, d: claims.returns_raised({"human": (a, b)}),
    "C5": lambda a, b, c, d: claims.warmup_cures(a, b, (0.0, 0.0)),
    "C6": lambda a, b, c, d: claims.compounding(a, b, c, d, 9),
    "C7": lambda a, b, c, d: claims.better_guide(a, b, verdict_of(NOT), verdict_of(NOT)),
    "C8": lambda a, b, c, d: claims.likely_is_real(a, b * a),
}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", WITH_INTERVAL)
def test_what_has_no_measure_is_left_out(name, bad):
    """The fourth trajectory has none in any sample, the eighth in the second alone: paired claims do without both."""
    whole = [positive(40, i) for i in range(4)]
    broken = [v.copy() for v in whole]
    for v in broken:
        v[3] = bad
    broken[1][7] = bad
    left_out = {"C6": ([3, 7], [3, 7], 3, 3), "C7": (3, [3, 7], 3, 3)}.get(name, [[3, 7]] * 4)
    cut = [np.delete(v, rows) for v, rows in zip(whole, left_out)]
    found, expected = (WITH_INTERVAL[name](*v) for v in (broken, cut))
    assert shape(found) == shape(expected) and math.isfinite(found.low) and math.isfinite(found.high)


@pytest.mark.parametrize("name", ["C1", "C2", "C4", "C5", "C6", "C8"])
def test_without_any_measure_nothing_is_reproduced(name):
    nothing = [np.full(8, math.nan)] * 4
    found = WITH_INTERVAL[name](*nothing)
    assert (
        found.verdict == (UNTESTED if name in ("C1", "C4") else NOT) and np.isnan([found.effect, found.low, found.high]).all()
    )
