"""Statistics over training seeds: intervals, tests, the seeds that a difference needs, and the paper's own numbers.

A row of Table 1 (a way to train agents) has scores [S], one a seed. Where two rows are *paired*, seed i is the same in both:
same initial networks, same states to start from. A seed that diverged is NaN. What is not finite is left out, of pairs in
both; this flatters a row that diverges, so say how many. For five seeds a bootstrap's interval is too narrow (a mean of normal
scores lies in it in 84% of all cases, not in 95%): it is good for a picture, and verdicts use `paired_interval`.
"""

import bisect
import math
from functools import partial

import numpy as np
from scipy import stats

from pgdlib.measures import bootstrap

# Jackson et al. (2024), Table 1, Adroit Pen: the return (D4RL's scale, not normalised) of IQL trained on synthetic data, mean
# and standard error over 5 seeds. dataset -> (unguided, λ = 0), (guided, λ = 2).
PAPER_TABLE_1 = {"human": ((2232, 230), (2448, 130)), "cloned": ((1649, 113), (1763, 89)), "expert": ((3113, 134), (3166, 146))}
PAPER_GAINS = {name: guided - unguided for name, ((unguided, _), (guided, _)) in PAPER_TABLE_1.items()}
PAPER_SEEDS = 5  # the std over seeds is a standard error times √5

# On the real data, D4RL's pen-*-v1: D4RL-normalised score of the last checkpoint, as CORL reports it (Tarasov et al. 2022).
PUBLISHED = {
    "IQL": {"human": 78.5, "cloned": 83.4, "expert": 128.1},
    "TD3+BC": {"human": -3.9, "cloned": 5.1, "expert": 122.5},
    "ReBRAC": {"human": 103.2, "cloned": 102.8, "expert": 152.2},
    "CQL": {"human": 13.7, "cloned": 1.0, "expert": -1.4},
    "EDAC": {"human": 5.1, "cloned": 12.0, "expert": -1.6},
}

FLIPS = 2**16  # up to 16 pairs the sign-flip test goes through all flips, beyond it draws so many


def mean_se(returns):
    """(mean, standard error) of returns [S] over seeds, with S - 1 in the std. The error of fewer than 2 seeds is NaN."""
    (returns,) = _finite(returns)
    mean = float(returns.mean()) if len(returns) else math.nan
    return mean, float(stats.sem(returns)) if len(returns) > 1 else math.nan


def interquartile_mean(scores):
    """The mean of scores [..., S] without the lowest and the highest quarter (each rounded down); NaN without a finite one.

    A statistic for `measures.bootstrap` (Agarwal et al. 2021).
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim > 1:
        return stats.trim_mean(scores, 0.25, axis=-1)
    (scores,) = _finite(scores)
    return float(stats.trim_mean(scores, 0.25)) if len(scores) else math.nan


def probability_of_improvement(x, y):
    """(P, low, high): the probability that a score of row x [S] is above one of row y [S'], both drawn at random, ties half.

    P is U / (S S'), U of Mann and Whitney; over all pairs of seeds, not the same seed's alone. The interval is a bootstrap's.
    """
    above = partial(stats.mannwhitneyu, axis=-1, method="asymptotic")  # the method is of p, which is not asked for
    return bootstrap(lambda x, y: above(x, y).statistic / (x.shape[-1] * y.shape[-1]), x, y)


def sign_flip_test(differences, seed=0):
    """The two-sided p-value of paired differences [S], if each were as likely of the other sign; NaN for fewer than 2.

    Up to 16 pairs every flip counts, else `FLIPS` are drawn. n pairs cannot give less than 2 / 2**n: 1/16 for five.
    """
    (differences,) = _finite(differences)
    if len(differences) < 2:
        return math.nan
    how = dict(permutation_type="samples", n_resamples=FLIPS, vectorized=True, rng=np.random.default_rng(seed))
    return float(stats.permutation_test((differences,), lambda d, axis: d.mean(axis), **how).pvalue)


def paired_interval(x, y):
    """(mean, low, high) of differences x - y of pairs, [S] or lists of [S_d]: 95%, Student's t with S - 1 degrees of freedom.

    Of several datasets it is the mean of their means, with the degrees of freedom of Welch and Satterthwaite; datasets count as
    independent, although they may share seeds. A dataset with fewer than 2 pairs makes low and high NaN.
    """
    several = isinstance(x, list) and len(x) > 0 and np.ndim(x[0]) > 0
    differences = [np.subtract(*_finite(*pair)) for pair in zip(*((x, y) if several else ([x], [y])), strict=True)]
    n = np.array([len(d) for d in differences])
    mean = float(np.mean([d.mean() for d in differences])) if n.min() > 0 else math.nan
    if n.min() < 2:
        return mean, math.nan, math.nan
    parts = np.array([d.var(ddof=1) for d in differences]) / n / len(n) ** 2  # of the variance of the mean
    if not parts.any():
        return mean, mean, mean
    freedom = parts.sum() ** 2 / (parts**2 / (n - 1)).sum()
    half = float(stats.t.isf(0.025, freedom) * math.sqrt(parts.sum()))
    return mean, mean - half, mean + half


def seeds_needed(difference, *stds):
    """The fewest seeds (2 or more) with which a t-test finds a difference of means: of pairs, of whose differences one std is
    given, or of two rows with a std each (Welch's test, so many seeds for each row).

    "Finds" is p < 5%, two-sided, in 80% of all cases, if scores are independent and normal with these stds. By the noncentral
    t, with the degrees of freedom that the true stds give; Welch's test estimates them, which costs it up to 2 points of power
    with 5 seeds and 10 with 3. ValueError names what is not finite, a difference of 0, a std that is not positive.
    """
    for name, value in [("difference", difference), *(("std", std) for std in stds)]:
        if not math.isfinite(value) or value == 0 or (name == "std" and value < 0):
            raise ValueError(f"{name}={value} is not allowed; it must be finite and {'positive' if name == 'std' else 'not 0'}")
    variances = np.square(stds, dtype=np.float64)
    freedom = variances.sum() ** 2 / (variances**2).sum()  # for each seed more than one: 1 for one std, 1 to 2 for two

    def enough(n):
        df, shift = freedom * (n - 1), abs(difference) * math.sqrt(n / variances.sum())
        critical = stats.t.isf(0.025, df)
        return bool(stats.nct.sf(critical, df, shift) + stats.nct.cdf(-critical, df, shift) >= 0.8)

    high = 2
    while not enough(high):
        high *= 2
    return bisect.bisect_left(range(high), True, lo=2, key=enough)


def _finite(*rows):
    """Rows of scores [S] as double arrays, without the places at which one of them is not finite."""
    rows = [np.asarray(row, dtype=np.float64) for row in rows]
    if any(row.ndim != 1 for row in rows) or len({row.shape for row in rows}) > 1:
        raise ValueError(f"scores must be [S], of the same seeds where they are paired; got {[row.shape for row in rows]}")
    finite = np.isfinite(rows).all(0)
    return [row[finite] for row in rows]
