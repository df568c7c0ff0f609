"""Calibrated λ against likelihoods whose answer is known."""

import math

import numpy as np
import pytest

from pgdlib.calibrate import OutOfReach, calibrate


def rising(lam, at=0.27, spread=0.3):
    """Log-likelihoods that rise from -2.5 to 0.1 with λ and are -0.4 at λ = `at`, with noise over trajectories."""
    share = (0.1 + 0.4) / 2.6 / at  # 0.1 - 2.6 / (1 + kλ) = -0.4
    k = (1 / (share * at) - 1) / at
    mean = 0.1 - 2.6 / (1 + k * lam)
    return lambda n, seed: mean + spread * np.random.default_rng(seed).normal(size=n)


@pytest.mark.parametrize("at", [0.002, 0.27, 40.0])
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.5])
def test_finds_the_lam_of_a_known_likelihood(at, spread):
    found = calibrate(lambda lam, n, seed: rising(lam, at, spread)(n, seed), target=-0.4)
    true = float(rising(found.lam, at, 0.0)(1, 0)[0])
    assert abs(found.log_likelihood + 0.4) <= 0.02 * 0.4  # what it saw
    assert abs(true + 0.4) <= 0.02 * 0.4 + 3 * found.standard_error  # what is so
    assert found.standard_error <= 0.5 * 0.02 * 0.4 * 1.3  # the spread itself is estimated, from 64
    assert found.drawn == sum(n for _, n, _, _ in found.trace)


def test_the_number_of_samples_follows_from_the_spread():
    """The standard error must be half the tolerance: n = (2 spread / tolerance)², four times as many for twice the spread."""
    counts = [calibrate(lambda lam, n, seed, s=s: rising(lam, 0.27, s)(n, seed), -0.4).samples for s in (0.1, 0.2, 0.4)]
    for spread, n in zip((0.1, 0.2, 0.4), counts):
        assert n == pytest.approx((2 * spread / (0.02 * 0.4)) ** 2, rel=0.5)
    assert calibrate(lambda lam, n, seed: rising(lam, 0.27, 0.4)(n, seed), -0.4, most=500).samples == 500


def test_the_last_draw_is_from_noise_that_the_search_has_not_seen():
    seeds = []

    def draw(lam, n, seed):
        seeds.append((seed, n))
        return rising(lam)(n, seed)

    found = calibrate(draw, -0.4)
    assert {s for s, n in seeds if n == 64} == {0} and seeds[-1][0] > 0 and seeds[-1][1] == found.samples > 64


def test_no_guidance_where_none_is_needed():
    found = calibrate(lambda lam, n, seed: rising(lam)(n, seed) + 3.0, -0.4)
    assert found.lam == 0 and found.drawn == 64


def test_out_of_reach_is_said_with_what_came_nearest():
    with pytest.raises(OutOfReach, match=r"-2\.\d+ at λ=0, -1\.0\d+ at λ=\d+: -0\.100 is not reached") as caught:
        calibrate(lambda lam, n, seed: np.minimum(rising(lam)(n, seed), -1.0), -0.1)
    nearest = caught.value.nearest
    assert nearest.log_likelihood == max(mean for _, _, mean, _ in nearest.trace) == pytest.approx(-1.0, abs=0.05)
    with pytest.raises(OutOfReach, match="diverges before") as caught:
        calibrate(lambda lam, n, seed: np.full(n, math.nan if lam > 0.01 else 0.0) + rising(0)(n, seed), -0.4)
    assert caught.value.nearest.lam == 0.0 and math.isfinite(caught.value.nearest.log_likelihood)


def test_a_target_of_nearly_zero_has_a_tolerance():
    found = calibrate(lambda lam, n, seed: rising(lam, 0.27, 0.05)(n, seed), target=0.001)
    assert abs(found.log_likelihood - 0.001) <= 0.002
