"""Fronts by hand, and ratios of fronts that are known."""

import math

import numpy as np
import pandas as pd
import pytest

from pgdlib.lab.equal_likelihood import on_front, ratios

UNGUIDED = -1.0, 0.5


# With λ the likelihood rises, falls, and rises once more.
TURNING = [-0.5, 0.0, -0.25, 0.5], [1.0, 3.0, 9.0, 5.0]


@pytest.mark.parametrize(
    "points, grid, expected",
    [
        (TURNING, [-1.0, -0.75, -0.5, -0.25, 0.0], [0.5, 0.75, 1.0, 2.0, 3.0]),
        (TURNING, [0.25, 0.5], [4.0, 5.0]),  # the point that falls back is no part of it
        (TURNING, [-1.01, 0.51], [math.nan, math.nan]),
        (([-0.5, 0.0, 0.5], [1.0, math.nan, 5.0]), [-0.5, 0.0, 0.5], [1.0, 3.0, 5.0]),  # a gap is bridged
        (([-0.5, 0.0, 0.5], [1.0, 3.0, math.nan]), [0.0, 0.25], [3.0, math.nan]),  # and the front ends where errors end
        (([-0.5, math.nan, 0.5], [1.0, 3.0, 5.0]), [0.0], [3.0]),
        (([-2.0, -3.0], [9.0, 9.0]), [-1.0, -2.0, -0.9], [0.5, math.nan, math.nan]),  # it never rises
        (([], []), [-1.0, 0.0], [0.5, math.nan]),
    ],
)
def test_on_front_by_hand(points, grid, expected):
    """From the unguided point (-1, 0.5); the interval that comes with a curve does not matter."""
    np.testing.assert_allclose(on_front((*points, [0] * len(points[0])), UNGUIDED, grid), expected)


def test_on_front_where_nothing_is_known():
    assert np.isnan(on_front(([0.0, 0.5], [math.nan] * 2), (-1.0, math.nan), [-1.0, 0.0, 0.2])).all()


def test_rules_are_compared_at_equal_likelihood_within_each_seed():
    fronts = []  # rule, lam, log-likelihood, error; the second seed's model errs ten times as much
    for seed, scale in ((0, 1.0), (1, 10.0)):
        for rule, points in {
            "explicit": [(0.0, -3, 1.0), (0.5, -1, 3.0), (1.0, -0.5, 9.0), (2.0, -9, 99.0)],  # 2 at -2, 3 at -1
            "annealed": [(0.0, -3, 1.0), (0.3, -2, 1.0), (0.6, 0, 2.0)],  # 1 at -2, 1.5 at -1
            "smoothed": [(0.0, -3, 1.0), (5.0, -1.5, 1.3 + 0.6 * seed)],  # 1.2 or 1.6 at -2, and not as far as -1
        }.items():
            fronts += [("human", seed, rule, lam, x, scale * y) for lam, x, y in reversed(points)]
    fronts = pd.DataFrame(fronts, columns=["dataset", "seed", "rule", "lam", "log_likelihood", "normalised"])
    compared = ratios(fronts, [-2, -1], "annealed")
    assert list(compared["rule"].unique()) == ["explicit", "smoothed"] and len(compared) == 8
    found = compared.set_index(["rule", "seed", "log_likelihood"])["ratio"]
    np.testing.assert_allclose(found["explicit"].loc[[(0, -2), (0, -1), (1, -2), (1, -1)]], [2, 2, 2, 2])
    np.testing.assert_allclose(found["smoothed"].loc[[(0, -2), (1, -2)]], [1.2, 1.6])
    assert found["smoothed"].loc[[(0, -1), (1, -1)]].isna().all()
