"""Calibrated λ: the weight at which guided trajectories are as likely under the policy as the policy's own are.

Log-likelihoods are in nats per action dimension; the target is `measures.on_policy_log_likelihood`. No environment is asked.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

LOWEST, HIGHEST = 1e-4, 1e4  # λ


@dataclass
class Calibration:
    """The λ found, and what it rests on."""

    lam: float
    log_likelihood: float  # at λ, from `samples` trajectories
    standard_error: float
    samples: int
    target: float
    drawn: int  # trajectories drawn in all
    trace: list = field(default_factory=list)  # (λ, trajectories, mean, standard error) of every draw, in order


class OutOfReach(ValueError):
    """No λ brings the trajectories to the target; `nearest` is the `Calibration` of the draw that came nearest."""

    def __init__(self, message: str, nearest: Calibration):
        super().__init__(message)
        self.nearest = nearest


def bisect(log_likelihoods: Callable, targets: Tensor, lowest: float = 1e-3, highest: float = 30.0, rounds: int = 8) -> Tensor:
    """The λ of each run [R] at which `log_likelihoods(lam [R])` [R], all from the same noise, meets `targets` [R].

    Bisection in log λ, all runs at once; 0 where unguided trajectories are at the target already, `highest` where it is out
    of reach.
    """
    unguided = log_likelihoods(torch.zeros_like(targets))

    def enough(lam):
        found = log_likelihoods(lam)
        return (found >= targets) | ~(found > unguided - 1)  # less likely than unguided, or diverged: beyond the rule's limit

    low, high = torch.full_like(targets, lowest), torch.full_like(targets, highest)
    done, reached = unguided >= targets, enough(high)
    for _ in range(rounds):
        middle = (low * high).sqrt()
        above = enough(middle)
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return torch.where(done, 0.0, torch.where(reached, (low * high).sqrt(), highest))


def calibrate(draw: Callable, target: float, tolerance: float = 0.02, first: int = 64, most: int = 16_384) -> Calibration:
    """The λ at which the mean of `draw(λ, n, number)` is `target`: log-likelihoods of n guided trajectories less the diverged.

    "Is" means within `tolerance` of |target| (of 0.1 nats, if |target| is smaller). `bisect`, all on the `first` trajectories
    of number 0, finds a first λ. How many trajectories are needed to see the tolerance follows from their spread: as many as
    make the standard error of the mean half of it. So many are then drawn from other noise, number 1, 2, ..., and λ is moved
    along the slope of the likelihood in log λ, until the mean holds. OutOfReach if it does not. NaN: all diverged.
    """
    allowed, trace = tolerance * max(abs(target), 0.1), []

    def ask(lam, n, number):
        values = np.asarray(draw(float(lam), n, number), dtype=np.float64)
        trace.append((float(lam), n, float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))))
        return trace[-1][2]

    def found(entry):
        lam, n, mean, error = entry
        return Calibration(lam, mean, error, n, target, sum(t[1] for t in trace), trace)

    if ask(0.0, first, 0) >= target - allowed:
        return found(trace[0])
    aim = torch.tensor([target], dtype=torch.float64)
    lam = float(bisect(lambda lam: torch.tensor([ask(lam, first, 0)], dtype=aim.dtype), aim, LOWEST, HIGHEST, 12))
    known = sorted({(t[0], t[2]) for t in trace if t[0] > 0 and math.isfinite(t[2]) and t[2] > trace[0][2] - 1})
    slope, needed = _slope(known, lam), min(most, max(first, math.ceil((2 * trace[-1][3] * math.sqrt(first) / allowed) ** 2)))
    for number in range(1, 9) if slope > 0 and lam < HIGHEST else ():
        off = ask(lam, needed, number) - target
        if abs(off) <= allowed:
            return found(trace[-1])
        if not math.isfinite(off):
            break
        lam *= math.exp(np.clip(-off / slope, -0.7, 0.7))
    finite = [t for t in trace if math.isfinite(t[2])]
    nearest = found(min(finite, key=lambda t: abs(t[2] - target), default=trace[0]))
    told = f"log-likelihood is {trace[0][2]:.3f} at λ=0, at best {nearest.log_likelihood:.3f}, at λ={nearest.lam:.3g}"
    raise OutOfReach(f"{told}: {target:.3f} is not reached within {allowed:.2g}", nearest)


def _slope(known, lam):
    """By how much the log-likelihood rises at λ if log λ rises by 1, of (λ, log-likelihood) rising in λ; NaN if unknown.

    Of the point next to λ and the next one at least a twentieth away, on either side: further off it may be flat.
    """
    near = sorted(known, key=lambda point: abs(math.log(point[0] / lam)))
    other = next((point for point in near[1:] if abs(math.log(point[0] / lam)) > 0.05), None)
    return (other[1] - near[0][1]) / math.log(other[0] / near[0][0]) if other else math.nan
