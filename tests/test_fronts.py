"""Fronts by hand, and ratios of fronts that are known."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pgdlib.lab import fronts

# (likelihood, error), with λ = 0, 1, 2, ...
RISING = (-2, 1), (-1, 2), (0, 4), (1, 8)
TURNING = (-2, 1), (0, 3), (-1, 10), (1, 5)  # the likelihood rises, falls, and rises once more


def trajectories(points):
    """Log-likelihoods and errors [L, 4] of trajectories with such means."""
    spread = np.array([-0.75, -0.25, 0.25, 0.75])
    return tuple(np.array(column, dtype=float)[:, None] + spread for column in zip(*points, strict=True))


@pytest.mark.parametrize(
    "points, target, error, lam",
    [
        (RISING, -1.5, 1.5, 0.5),
        (RISING, -1, 2, 1),
        (RISING, 0.25, 5, 2.25),
        (RISING, 1, 8, 3),
        (RISING, 1.01, math.nan, None),  # out of reach
        (RISING, -2, 1, 0),
        (RISING, -5, 1, 0),  # reached without guidance
        (RISING[::-1], 0.5, 8, 0),
        (TURNING, -0.5, 2.5, 0.75),  # between the first two: what comes later does not count
        (TURNING, 0, 3, 1),
        (TURNING, 0.5, 6.25, 2.75),  # passed by the last alone, a quarter before it
        (TURNING[:3], 0.5, math.nan, None),
        (((-1, 2), (-1, 5), (0, 6)), -0.5, 5.5, 1.5),  # no rise at first
        (RISING[:1], -3, 1, 0),
        (RISING[:1], 0, math.nan, None),
    ],
)
def test_a_front_is_read_between_its_points(points, target, error, lam):
    found = fronts.error_at(*trajectories(points), target)
    assert type(found) is float and found == pytest.approx(error, nan_ok=True)
    assert fronts.crossing(range(len(points)), [x for x, _ in points], target) == (lam if lam is None else pytest.approx(lam))
    x, y = np.array(points, dtype=float).T
    error = math.nan if target < x[0] else error  # there is no front below the unguided point
    np.testing.assert_allclose(fronts.on_front((x[1:], y[1:], y[1:] - 1), (x[0], y[0]), [target, 99]), [error, math.nan])


def test_where_nothing_is_known_there_is_no_front():
    assert fronts.crossing([0, 1], [math.nan] * 2, 0) is None
    assert np.isnan(fronts.on_front(([0.0, 0.5], [math.nan] * 2), (-1.0, math.nan), [-1.0, 0.0, 0.2])).all()
    assert fronts.on_front(([math.nan, 1], [5, 7]), (-1, 6), [-1]).tolist() == [6]


def test_errors_that_are_missing_are_left_out():
    likelihoods, errors = trajectories(RISING)
    errors[0, :2], errors[1, 3] = math.nan, math.nan  # means 1.5 and 1.75 of what is left
    assert fronts.error_at(likelihoods, errors, -1.5) == pytest.approx(1.625)
    errors[3] = math.nan  # all at the last λ: the error is unknown there, but not before
    assert fronts.error_at(likelihoods, errors, -1.5) == pytest.approx(1.625)
    assert fronts.error_at(likelihoods, errors, 0) == 4
    assert math.isnan(fronts.error_at(likelihoods, errors, 0.5))


def test_the_bootstrap_draws_trajectories_together():
    """Against the normal interval of a paired difference, which is much narrower than an unpaired one."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=400)
    y = x + 0.1 * rng.normal(size=400) + 1
    value, low, high = fronts.bootstrap(lambda ids: y[ids].mean() - x[ids].mean(), 400, resamples=2000)
    assert value == pytest.approx(np.mean(y - x))
    assert (low, high) == pytest.approx(stats.norm.interval(0.95, np.mean(y - x), stats.sem(y - x)), abs=2e-3)
    narrow = fronts.bootstrap(lambda ids: (y - x)[ids].mean(), 400, level=0.5, resamples=2000)
    assert (narrow[2] - narrow[1]) / (high - low) == pytest.approx(0.6745 / 1.96, rel=0.1)


def test_every_draw_is_a_sample_with_replacement_and_nan_is_left_out():
    drawn = []
    found = fronts.bootstrap(lambda ids: drawn.append(ids) or (math.nan if len(drawn) == 7 else 3), 20)
    drawn = [ids for ids in drawn if ids.tolist() != list(range(20))]
    assert found == (3, 3, 3) and len(drawn) == 500
    assert all(len(ids) == 20 and ids.min() >= 0 and ids.max() < 20 and len(set(ids)) < 20 for ids in drawn)
    assert (np.bincount(np.concatenate(drawn), minlength=20) > 400).all()  # each about 500 times
    again = [fronts.bootstrap(lambda ids: ids.mean(), 20, seed=seed) for seed in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


def test_rules_are_compared_at_equal_likelihood_within_each_seed():
    rows = []  # rule, lam, log-likelihood, error; the second seed's model errs ten times as much
    for seed, scale in ((0, 1.0), (1, 10.0)):
        for rule, points in {
            "explicit": [(0.0, -3, 1.0), (0.5, -1, 3.0), (1.0, -0.5, 9.0), (2.0, -9, 99.0)],  # 2 at -2, 3 at -1
            "annealed": [(0.0, -3, 1.0), (0.3, -2, 1.0), (0.6, 0, 2.0)],  # 1 at -2, 1.5 at -1
            "smoothed": [(0.0, -3, 1.0), (5.0, -1.5, 1.3 + 0.6 * seed)],  # 1.2 or 1.6 at -2, and not as far as -1
        }.items():
            rows += [("human", seed, rule, lam, x, scale * y) for lam, x, y in reversed(points)]
    rows = pd.DataFrame(rows, columns=["dataset", "seed", "rule", "lam", "log_likelihood", "normalised"])
    compared = fronts.ratios(rows, [-2, -1], "annealed")
    assert list(compared["rule"].unique()) == ["explicit", "smoothed"] and len(compared) == 8
    found = compared.set_index(["rule", "seed", "log_likelihood"])["ratio"]
    np.testing.assert_allclose(found["explicit"].loc[[(0, -2), (0, -1), (1, -2), (1, -1)]], [2, 2, 2, 2])
    np.testing.assert_allclose(found["smoothed"].loc[[(0, -2), (1, -2)]], [1.2, 1.6])
    assert found["smoothed"].loc[[(0, -1), (1, -1)]].isna().all()
