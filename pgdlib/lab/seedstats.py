"""Statistics over training seeds: intervals, tests, the seeds that a difference needs, and the paper's own numbers.

A row of a benchmark (a way to train agents) has scores [S], one a seed, on one dataset, or a list of such arrays, one a
dataset. Where two rows are *paired*, seed i is the same in both: same initial networks, same states to start from. A seed
that diverged is NaN. What is not finite is left out, of pairs in both; this flatters a row that diverges, so say how many.
"""

import math

import numpy as np
from scipy import stats

# Jackson et al. (2024), Table 1, Adroit Pen: the return (D4RL's scale, not normalised) of IQL trained on synthetic data, mean
# and standard error over 5 seeds. dataset -> (unguided, λ = 0), (guided, λ = 2).
PAPER_TABLE_1 = {
    "human": ((2232, 230), (2448, 130)),
    "cloned": ((1649, 113), (1763, 89)),
    "expert": ((3113, 134), (3166, 146)),
}
PAPER_GAINS = {name: guided - unguided for name, ((unguided, _), (guided, _)) in PAPER_TABLE_1.items()}
PAPER_SEEDS = 5  # the std over seeds is a standard error times √5

# IQL on the real data, D4RL's pen-*-v1: D4RL-normalised score of the last checkpoint, as CORL reports it (Tarasov et al. 2022).
PUBLISHED_IQL = {"human": 78.5, "cloned": 83.4, "expert": 128.1}

EXACT_PAIRS = 16  # up to so many pairs the sign-flip test goes through all 2**pairs flips, beyond it draws 2**16


def mean_se(returns):
    """(mean, standard error) of returns [S] over seeds, with S - 1 in the std. The error of fewer than 2 seeds is NaN."""
    ((returns,),) = _kept([returns])
    mean = float(returns.mean()) if len(returns) else math.nan
    return mean, float(returns.std(ddof=1) / math.sqrt(len(returns))) if len(returns) > 1 else math.nan


def interquartile_mean(scores):
    """The mean without the lowest and the highest quarter of the scores (each rounded down), along the last axis.

    Scores of several datasets, a list of [..., S_d], are pooled first (Agarwal et al. 2021): let them be normalised.
    A float for one row of scores, else an array; a statistic for `stratified_bootstrap`.
    """
    pooled = np.concatenate(_by_dataset(scores), -1)
    ordered = np.sort(np.where(np.isfinite(pooled), pooled, np.nan), -1)  # NaN goes to the end
    n = np.isfinite(ordered).sum(-1, keepdims=True)
    place = np.arange(ordered.shape[-1])
    kept = (place >= n // 4) & (place < n - n // 4)
    with np.errstate(invalid="ignore"):  # no score at all
        mean = np.where(kept, ordered, 0.0).sum(-1) / kept.sum(-1)
    return mean if mean.ndim else float(mean)


def stratified_bootstrap(statistic, *rows, paired=False, level=0.95, resamples=2_000, seed=0):
    """(value, low, high) of `statistic(*rows)`: percentile bootstrap that draws each dataset's seeds within the dataset.

    Each of `rows` is a list of scores [S_d], one a dataset, or one array [S]. `statistic` takes as many lists of [..., S_d] and
    returns [...]. paired: seeds are drawn together in all rows. All NaN if a dataset has no score. Agarwal et al. (2021).
    With 5 seeds such an interval is too narrow (a mean of normal scores lies in it in 84% of all cases, not in 95%), so that
    verdicts use `paired_interval`.
    """
    _check_share("level", level)
    rows = _kept(rows, paired)
    if min(len(scores) for row in rows for scores in row) == 0:
        return math.nan, math.nan, math.nan
    rng = np.random.default_rng(seed)
    drawn = [[] for _ in rows]
    for dataset in zip(*rows):
        for i, scores in enumerate(dataset):
            if i == 0 or not paired:
                ids = rng.integers(len(scores), size=(resamples, len(scores)))
            drawn[i].append(scores[ids])
    low, high = np.quantile(statistic(*drawn), [(1 - level) / 2, (1 + level) / 2])
    return float(statistic(*rows)), float(low), float(high)


def probability_of_improvement(x, y, level=0.95, resamples=2_000, seed=0):
    """(P, low, high): the probability that a score of row x is above one of row y, both drawn at random, ties counting half.

    P is the mean over datasets of U / (S_x S_y), U of Mann and Whitney; it is over all pairs of seeds, not the same seed's
    alone. The interval is `stratified_bootstrap`'s. x, y: [S], or lists of [S_d]. Agarwal et al. (2021).
    """

    def share_above(x, y):
        shares = [(1 + np.sign(a[..., :, None] - b[..., None, :]).mean((-2, -1))) / 2 for a, b in zip(x, y)]
        return np.mean(shares, 0)

    return stratified_bootstrap(share_above, x, y, level=level, resamples=resamples, seed=seed)


def sign_flip_test(differences, alternative="two-sided", seed=0):
    """The p-value of paired differences, [S] or a list of [S_d], if each were as likely of the other sign.

    The statistic is the mean of the datasets' means, so that a dataset weighs the same whatever its seeds; "greater" asks
    whether it is positive. Up to 16 pairs in all every flip counts, else 65,536 are drawn and p = (1 + #as extreme) / (1 +
    #drawn). n pairs cannot give less than 2 / 2**n two-sided and 1 / 2**n one-sided: 5 pairs not less than 2/32 and 1/32.
    NaN without pairs. Seeds and datasets count as independent. ValueError for another `alternative`.
    """
    if alternative not in ("two-sided", "greater"):
        raise ValueError(f"alternative={alternative!r} is not allowed; it must be 'two-sided' or 'greater'")
    (differences,) = _kept([differences])
    differences = [d for d in differences if len(d)]
    if not differences:
        return math.nan
    shares = np.concatenate([d / len(d) for d in differences])  # what each pair adds to the statistic, up to a factor
    n = len(shares)
    if exact := n <= EXACT_PAIRS:
        flips = np.arange(2**n)[:, None] >> np.arange(n) & 1
    else:
        flips = np.random.default_rng(seed).integers(2, size=(2**EXACT_PAIRS, n), dtype=np.int8)
    value, null = shares.sum(), (1.0 - 2.0 * flips) @ shares
    if alternative == "two-sided":
        value, null = abs(value), abs(null)
    # The same sum in another order differs by rounding: what is equal but for that counts as equal.
    extreme = int((null >= value - 1e-12 * abs(shares).sum()).sum())
    return extreme / len(flips) if exact else (1 + extreme) / (1 + len(flips))


def paired_interval(x, y, level=0.95):
    """(mean, low, high) of the differences x - y of pairs, [S] or lists of [S_d], by Student's t with S - 1 degrees of freedom.

    Of several datasets it is the mean of their means, with the degrees of freedom of Welch and Satterthwaite; datasets count as
    independent, although they may share seeds. A dataset with fewer than 2 pairs makes low and high NaN.
    """
    _check_share("level", level)
    x, y = _kept([x, y], paired=True)
    differences = [a - b for a, b in zip(x, y)]
    n = np.array([len(d) for d in differences])
    if n.min() == 0:
        return math.nan, math.nan, math.nan
    mean = float(np.mean([d.mean() for d in differences]))
    if n.min() < 2:
        return mean, math.nan, math.nan
    parts = np.array([d.var(ddof=1) for d in differences]) / n / len(n) ** 2  # of the variance of the mean
    if not parts.any():
        return mean, mean, mean
    freedom = parts.sum() ** 2 / (parts**2 / (n - 1)).sum()
    half = float(stats.t.isf((1 - level) / 2, freedom) * math.sqrt(parts.sum()))
    return mean, mean - half, mean + half


def seeds_needed(difference, std_x, std_y, power=0.8, level=0.05):
    """The fewest seeds for each of two rows (2 or more) with which Welch's t-test finds a difference of their means.

    That is, it gives p < `level`, two-sided, with probability `power`, if the seeds are independent and normal with these stds.
    By the noncentral t, with the degrees of freedom that the true stds give; Welch's test estimates them, which costs it up to
    2 points of power with 5 seeds and 10 with 3. ValueError names a parameter that cannot be: a difference of 0, stds that are
    not positive, power and level not between 0 and 1.
    """
    _check_positive(std_x=std_x, std_y=std_y)
    variance = std_x**2 + std_y**2
    freedom = variance**2 / (std_x**4 + std_y**4)  # for each seed more than one: 1 to 2
    return _fewest(difference, math.sqrt(variance), freedom, power, level)


def paired_seeds_needed(difference, std_of_differences, power=0.8, level=0.05):
    """The fewest pairs (2 or more) with which the paired t-test finds a mean difference; the rest as in `seeds_needed`."""
    _check_positive(std_of_differences=std_of_differences)
    return _fewest(difference, std_of_differences, 1.0, power, level)


def _fewest(difference, std, freedom, power, level):
    """The smallest n >= 2 at which a two-sided t-test with freedom * (n - 1) degrees of freedom has the power."""
    if not math.isfinite(difference) or difference == 0:
        raise ValueError(f"difference={difference} is not allowed; it must be finite and not 0")
    _check_share("power", power)
    _check_share("level", level)

    def enough(n):
        df, shift = freedom * (n - 1), abs(difference) / std * math.sqrt(n)
        critical = stats.t.isf(level / 2, df)
        return stats.nct.sf(critical, df, shift) + stats.nct.cdf(-critical, df, shift) >= power

    high = 2
    while not enough(high):
        high *= 2
    low = high // 2  # too few, or below 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _by_dataset(scores):
    """The scores as a list of double arrays, one a dataset; they are one array, or a list of arrays."""
    several = isinstance(scores, list | tuple) and len(scores) > 0 and np.ndim(scores[0]) > 0
    return [np.asarray(s, dtype=np.float64) for s in (scores if several else [scores])]


def _kept(rows, paired=False):
    """The finite scores of each row, a list of [S_d], one a dataset; of pairs, those that are finite in all rows."""
    rows = [_by_dataset(row) for row in rows]
    shapes = [[s.shape for s in row] for row in rows]
    if any(len(shape) != 1 for row in shapes for shape in row):
        raise ValueError(f"the scores of a row must be [S], or a list of [S], one a dataset; got the shapes {shapes}")
    if len({len(row) for row in rows}) > 1 or (paired and any(row != shapes[0] for row in shapes)):
        raise ValueError(f"rows must be of the same datasets{' and seeds' * paired}; got the shapes {shapes}")
    finite = [[np.isfinite(s) for s in row] for row in rows]
    if paired:
        finite = [[np.logical_and.reduce(f) for f in zip(*finite)]] * len(rows)
    return [[s[f] for s, f in zip(row, keep)] for row, keep in zip(rows, finite)]


def _check_share(name, value):
    if not 0 < value < 1:
        raise ValueError(f"{name}={value} is not allowed; it must be between 0 and 1, both excluded")


def _check_positive(**values):
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value} is not allowed; it must be finite and positive")
