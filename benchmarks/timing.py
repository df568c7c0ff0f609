"""Timing in alternation: what is compared runs in the same rounds, and only ratios within a round count."""

import contextlib
import math
import statistics
import time
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch

from pgdlib import edm, fast

SAMPLE = 0.02  # s: shorter calls are repeated within a round until they take about that long
ROUNDS = 3, 200  # at least, at most


def alternate(calls, seconds, device="cpu"):
    """name -> seconds of one call in each round: all `calls` (name -> function) run in each, backwards in every other one."""
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = min(10_000, math.ceil(SAMPLE / max(_seconds(call, 1, device), 1e-9)))
    taken, started = {name: [] for name in calls}, time.perf_counter()
    for number in range(ROUNDS[1]):
        if number >= ROUNDS[0] and time.perf_counter() - started > seconds:
            break
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            taken[name].append(_seconds(calls[name], repeats[name], device))
    return taken


def _seconds(call, repeats, device):
    synchronise(device)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronise(device)
    return (time.perf_counter() - started) / repeats


def synchronise(device):
    """Wait for what a CUDA device still has to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(values):
    """Median, lower and upper quartile."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float(middle), float(low), float(high)


def ratio(taken, slow, fast, scale=1.0):
    """Quartiles of how many times longer `slow` took than `fast`, round by round; `scale` is fast's work over slow's."""
    return quartiles([scale * a / b for a, b in zip(taken[slow], taken[fast])])


def rate(taken, name, units):
    """The median of `units` a second."""
    return units / statistics.median(taken[name])


def exponent(taken):
    """Quartiles over rounds of p in cost ~ size^p, the slope of a line through logarithms; `taken` has sizes as its names."""
    logs = np.log(list(taken))
    return quartiles([np.polyfit(logs, np.log(costs), 1)[0] for costs in zip(*taken.values())])


@contextlib.contextmanager
def float32():
    """Networks compute in float32 inside, whatever the device multiplies."""
    with contextlib.ExitStack() as stack:
        for module in (edm, fast):
            stack.enter_context(mock.patch.object(module, "has_bfloat16", lambda device: False))
        yield


def precisions(device):
    """name -> context of the precisions to measure: the library's own on `device`, and float32."""
    own = {"bfloat16": contextlib.nullcontext} if fast.has_bfloat16(torch.device(device)) else {}
    return {**own, "float32": float32}


def within(context, call):
    """`call` made inside `context()`."""

    def called():
        with context():
            return call()

    return called


@dataclass
class Row:
    """A line of the table and of the CSV."""

    path: str
    size: str
    against: str  # what the ratio compares with
    ratio: tuple  # median and quartiles
    ours: float | None = None  # units a second; the pair of `other`
    other: float | None = None
    unit: str = ""
    share: tuple | None = None  # of the machine's limit, median and quartiles
    limit: str = ""
    target: float | None = None  # of what `judged` names
    judged: str = "ratio"
    rounds: int = 0

    @property
    def verdict(self):
        """Whether the target is met, in words; empty without one."""
        if self.target is None:
            return ""
        found = self.ratio if self.judged == "ratio" else self.share
        return f"{'met' if found is not None and found[0] >= self.target else 'NOT met'} ({self.judged} ≥ {self.target:g})"
