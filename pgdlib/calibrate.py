"""Calibrated λ: the weight at which guided trajectories are as likely under the policy as the policy's own are."""

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Calibration:
    """The λ found, and what it rests on; log-likelihoods are in nats per action dimension."""

    lam: float
    log_likelihood: float  # at λ, from `samples` trajectories
    standard_error: float
    samples: int
    target: float
    drawn: int  # trajectories drawn in all
    trace: list = field(default_factory=list)  # (λ, trajectories, mean, standard error) of every draw, in order


class OutOfReach(ValueError):
    """No λ brings the trajectories to the target; `nearest` is the `Calibration` of the draw that came nearest."""

    def __init__(self, message, nearest):
        super().__init__(message)
        self.nearest = nearest


def calibrate(draw, target, tolerance=0.02, first=64, most=16_384, start=1.0, highest=1e4):
    """The λ at which the mean of `draw(λ, n, seed)`, log-likelihoods [n] of n guided trajectories, is `target`: -H(π) / 24.

    "Is" means within `tolerance` of |target| (of 0.1 nats, if |target| is smaller). No environment is asked. Bisection in
    log λ (the middle moved to where a straight line through both ends meets the target), all on the same `first` seeds'
    noise, finds a first λ. How many trajectories are needed to see the tolerance follows from their spread: as many as make
    the standard error of the mean half of it. So many are then drawn from other noise, and λ is moved along the slope found
    before, until the mean holds. Where unguided trajectories are at the target already, λ is 0.
    """
    allowed, trace = tolerance * max(abs(target), 0.1), []

    def gap(lam, n, seed):
        values = np.asarray(draw(lam, n, seed), dtype=np.float64)
        mean, error = values.mean(), values.std(ddof=1) / math.sqrt(n)
        trace.append((float(lam), n, float(mean), float(error)))
        if not math.isfinite(mean):
            raise out_of_reach(f"log-likelihood at λ={lam:g} is {mean}: the rule diverges before it reaches {target:.3f}")
        return mean - target

    def result(draw):
        lam, n, mean, error = draw
        return Calibration(lam, mean, error, n, target, sum(t[1] for t in trace), trace)

    def out_of_reach(message):
        finite = [t for t in trace if math.isfinite(t[2])]
        return OutOfReach(message, result(min(finite, key=lambda t: abs(t[2] - target), default=trace[0])))

    if gap(0.0, first, 0) >= -allowed:
        return result(trace[-1])
    ends = _bracket(lambda lam: gap(lam, first, 0), start, highest)
    if ends is None:
        unguided, (last, _, mean, _) = trace[0][2], trace[-1]
        raise out_of_reach(f"log-likelihood is {unguided:.3f} at λ=0, {mean:.3f} at λ={last:g}: {target:.3f} is not reached")
    (low, gap_low), (high, gap_high) = ends
    slope = (gap_high - gap_low) / math.log(high / low)
    lam, off = (low, gap_low) if abs(gap_low) < abs(gap_high) else (high, gap_high)
    while abs(off) > allowed / 2 and high / low > 1.001:
        slope = (gap_high - gap_low) / math.log(high / low)
        share = np.clip(-gap_low / (gap_high - gap_low), 0.1, 0.9)
        lam = low * (high / low) ** share
        off = gap(lam, first, 0)
        (low, gap_low), (high, gap_high) = ((lam, off), (high, gap_high)) if off < 0 else ((low, gap_low), (lam, off))
    needed = min(most, max(first, math.ceil((2 * trace[-1][3] * math.sqrt(first) / allowed) ** 2)))
    for seed in range(1, 9):
        off = gap(lam, needed, seed)
        if abs(off) <= allowed:
            return result(trace[-1])
        lam *= math.exp(np.clip(-off / slope, -0.7, 0.7))
    raise out_of_reach(f"log-likelihood stays {off:+.3f} from {target:.3f} at λ={lam:g} after {len(trace)} draws")


def _bracket(gap, start, highest):
    """((λ below, its gap), (λ above, its gap)), a factor of 4 apart, up or down from `start`; None if there are none."""
    lam, off = start, gap(start)
    factor = 4.0 if off < 0 else 0.25
    while 1e-6 < lam * factor <= highest:
        before, off_before = lam, off
        lam *= factor
        off = gap(lam)
        if (off < 0) != (off_before < 0):
            return tuple(sorted([(before, off_before), (lam, off)]))
    return None
