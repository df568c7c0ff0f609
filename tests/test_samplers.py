"""The table of samplers, and which of them are as good as the first."""

import numpy as np
import pytest

from pgdlib.lab import samplers

RNG = np.random.default_rng(0)
ERROR, MOTION, LIKELIHOOD = (c + 0.05 * RNG.normal(size=200) for c in (1.0, 2.0, -3.0))
TRUTH = dict(normalised=0.1, motion=1.5, log_likelihood=-2.9)
BASE = dict(normalised=ERROR, motion=MOTION, log_likelihood=LIKELIHOOD), (0.05, 0.01, 0.02)


def changed(distance=0.05, **factors):
    """The base's measures times `factors`, and another distance to the data."""
    return {k: factors.get(k, 1) * v for k, v in BASE[0].items()}, (distance, 0.01, 0.02)


@pytest.mark.parametrize(
    ("values", "good"),
    [
        (changed(), True),
        (changed(normalised=1.04), True),
        (changed(normalised=1.06), False),
        (changed(normalised=1.06, motion=1.06), True),  # it moves more by as much
        (changed(normalised=0.5, motion=0.4), False),  # a low error of what hardly moves
        (changed(log_likelihood=0.97), True),  # nearer to the data's
        (changed(log_likelihood=1.03), False),
        (changed(log_likelihood=0.9), False),  # as far off on the other side, and farther
        (changed(0.069), True),  # within chance
        (changed(0.071), False),
        (changed(normalised=1.6, motion=1.6), False),  # the data at rest would have less
    ],
)
def test_as_good_is_what_is_worse_in_nothing(values, good):
    assert samplers.as_good(*values, *BASE, TRUTH) is good


def test_the_frame_holds_cost_measures_and_truth():
    found = {("heun", 400, 80.0): BASE, ("heun", 32, 0.0): changed(normalised=2), ("multistep", 16, 0.0): changed(0.04)}
    frame = samplers.frame(found, TRUTH)
    assert frame["sampler"].tolist() == ["heun 400, churn 80", "heun 32", "multistep 16"]
    assert frame["evaluations"].tolist() == [799, 63, 16]
    assert frame["family"].tolist() == ["Heun with churn", "Heun", "multistep"]
    assert frame["as good"].tolist() == [True, False, True]
    np.testing.assert_allclose(frame["relative.mean"], ERROR.mean() / MOTION.mean() * np.array([1, 2, 1]))
    np.testing.assert_allclose(frame["likelihood.mean"], LIKELIHOOD.mean())
    assert (frame["error.low"] < frame["error.mean"]).all() and (frame["error.mean"] < frame["error.high"]).all()
    assert frame["distance.mean"].tolist() == [0.05, 0.05, 0.04] and (frame["motion.real"] == 1.5).all()


def test_trajectories_without_an_error_are_left_out():
    some = {k: np.where(np.arange(200) % 2, v, np.nan) for k, v in BASE[0].items()}
    assert samplers.as_good(some, BASE[1], *BASE, TRUTH)
    none = {k: np.full(200, np.nan) for k in some}
    assert not samplers.as_good(none, BASE[1], *BASE, TRUTH)
