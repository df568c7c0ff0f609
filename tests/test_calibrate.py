"""Calibrated λ against likelihoods whose answer is known."""

import math

import numpy as np
import pytest
import torch

from pgdlib.calibrate import OutOfReach, bisect, calibrate


def rising(at=0.27, spread=0.3, offset=0.0):
    """Draws of log-likelihoods, plus `offset`, that rise from -2.5 to 0.1 with λ and are -0.4 at λ = `at`, and their noise."""

    def draw(lam, n, number):
        mean = 0.1 - 2.6 / (1 + 4.2 * lam / at)  # 0.1 - 2.6 / 5.2 = -0.4
        return offset + mean + spread * np.random.default_rng(number).normal(size=n)

    return draw


def limited(spread=0.0):
    """A rule whose trajectories diverge beyond λ = 0.05, on its way to -1."""
    return lambda lam, n, number: rising(spread=spread)(lam, n, number) + (math.nan if lam > 0.05 else 0.0)


@pytest.mark.parametrize("at", [0.002, 0.27, 40.0])
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.5])
def test_finds_the_lam_of_a_known_likelihood(at, spread):
    found = calibrate(rising(at, spread), target=-0.4)
    true = float(rising(at, 0.0)(found.lam, 1, 0)[0])
    assert abs(found.log_likelihood + 0.4) <= 0.02 * 0.4  # what it saw
    assert abs(true + 0.4) <= 0.02 * 0.4 + 3 * found.standard_error  # what is so
    assert found.standard_error <= 0.5 * 0.02 * 0.4 * 1.3  # the spread itself is estimated, from 64
    assert found.drawn == sum(n for _, n, _, _ in found.trace) and found.target == -0.4


@pytest.mark.parametrize("at", [0.0951, 0.0999, 0.101, 0.106])  # of 0.1, a point of the bisection, just below and above
def test_a_curve_that_is_flat_elsewhere(at):
    """So that only the slope close by leads to the target, and only from one side of it."""

    def draw(lam, n, number):
        mean = 0.2 - 3.2 / (1 + (lam / at) ** 3 * 4.5)
        return mean + 0.3 * np.random.default_rng(number).normal(size=n)

    found = calibrate(draw, -0.38, 0.05)
    assert abs(found.log_likelihood + 0.38) <= 0.05 * 0.38 and found.lam == pytest.approx(at, rel=0.05)


def test_the_number_of_samples_follows_from_the_spread():
    """The standard error must be half the tolerance: n = (2 spread / tolerance)², four times as many for twice the spread."""
    for spread in (0.1, 0.2, 0.4):
        n = calibrate(rising(spread=spread), -0.4).samples
        assert n == pytest.approx((2 * spread / (0.02 * 0.4)) ** 2, rel=0.5)
    assert calibrate(rising(spread=0.4), -0.4, most=500).samples == 500


def test_the_last_draw_is_from_noise_that_the_search_has_not_seen():
    numbers = []

    def draw(lam, n, number):
        numbers.append((number, n))
        return rising()(lam, n, number)

    found = calibrate(draw, -0.4)
    assert {number for number, n in numbers if n == 64} == {0} and numbers[-1][0] > 0
    assert numbers[-1][1] == found.samples > 64
    assert [number for number, n in numbers if n > 64] == list(range(1, numbers[-1][0] + 1))


def test_no_guidance_where_none_is_needed():
    found = calibrate(rising(offset=3.0), -0.4)
    assert found.lam == 0 and found.drawn == 64


@pytest.mark.parametrize("draw", [lambda *how: np.minimum(rising()(*how), -1.0), limited(0.01)], ids=["a ceiling", "a limit"])
def test_out_of_reach_is_said_with_what_came_nearest(draw):
    reason = r"-2\.\d+ at λ=0, at best -\d\.\d+, at λ=\S+: -0\.100 is not reached within"
    with pytest.raises(OutOfReach, match=reason) as caught:
        calibrate(draw, -0.1)
    nearest = caught.value.nearest
    assert nearest.log_likelihood == max(mean for _, _, mean, _ in nearest.trace if math.isfinite(mean))


def test_what_holds_in_the_search_alone_is_out_of_reach():
    """Likely in the noise of the search, but not finite, or never as likely, in any other."""
    for other, draws in ((math.nan, 1), (-50.0, 8)):
        with pytest.raises(OutOfReach) as caught:
            calibrate(lambda lam, n, number, v=other: rising()(lam, n, 0) + (v if number else 0.0), -0.4)
        assert sum(n > 64 for _, n, _, _ in caught.value.nearest.trace) == draws
        assert caught.value.nearest.samples == 64 and caught.value.nearest.log_likelihood == pytest.approx(-0.4, abs=0.1)


def test_a_target_of_nearly_zero_has_a_tolerance():
    assert abs(calibrate(rising(spread=0.05), target=0.001).log_likelihood - 0.001) <= 0.002


def test_bisection_finds_every_runs_lam_at_once():
    """log λ halves its interval in every round: log(30 / 0.001) / 2**8 = 4% after 8. Of likelihoods in closed form."""
    asked = []

    def log_likelihoods(lam):
        asked.append(lam)
        values = torch.log1p(lam) - 3
        values[3] = torch.where(lam[3] > 0.5, math.nan, values[3])  # diverges before its target
        values[4] = torch.where(lam[4] > 2.0, -9.0, values[4])  # so far beyond the limit that it is less likely
        return values

    targets = torch.tensor([math.log1p(0.02) - 3, math.log1p(7.0) - 3, -3.0, 0.0, 0.0, 2.0], dtype=torch.float64)
    found = bisect(log_likelihoods, targets)
    assert len(asked) == 10 and not asked[0].any()
    assert found[:2].tolist() == pytest.approx([0.02, 7.0], rel=0.021)  # half of the last interval
    assert found[2] == 0 and found[5] == 30.0  # there already, and out of reach
    assert found[3:5].tolist() == pytest.approx([0.5, 2.0], rel=0.021)  # the limits
