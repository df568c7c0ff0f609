"""What is measured of trajectories: likelihood under a policy, intervals, whether two sets of them visit the same states."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy import spatial, stats
from torch import Tensor, nn

BLOCK = 32  # trajectories whose distances to all others are held at once


@torch.no_grad()
def log_likelihood(policy: nn.Module, obs: Tensor, actions: Tensor, alive: Tensor | None = None) -> Tensor:
    """The mean over steps of log π(a|s) per action dimension, in nats: [B], for obs [B, T, ...], actions [B, T, action_dim].

    `alive` [B, T] is 1 on the steps that count (all by default). Environment space. NaN for a policy without a density.
    """
    if not hasattr(policy, "log_prob"):
        return obs.new_full(obs.shape[:1], torch.nan, dtype=torch.float64)
    return _masked_mean(policy.log_prob(obs, actions).double() / actions.shape[-1], alive)


@torch.no_grad()
def mean_density(policy: nn.Module, obs: Tensor, actions: Tensor, alive: Tensor | None = None) -> Tensor:
    """The paper's trajectory likelihood, read literally: the mean over steps of the density π(a|s), [B].

    In many dimensions a few steps decide it; `log_likelihood` is the measure to trust.
    """
    return _masked_mean(policy.log_prob(obs, actions).double().exp(), alive)


def on_policy_log_likelihood(policy: nn.Module, obs: Tensor | None = None) -> Tensor:
    """-H(π) per action dimension, in nats: what trajectories of the policies themselves [R] have, in the mean.

    It is that in the states obs [B, obs_dim], for policies whose entropy depends on them. NaN for one without a density.
    """
    if not hasattr(policy, "log_prob"):
        return torch.full((policy.runs,), torch.nan)
    return -policy.entropy(obs) / policy.action_dim


def interval(values: Sequence) -> tuple[float, float, float]:
    """(mean, low, high) of `values` [n], as `bootstrap` has them."""
    return bootstrap(lambda v: v.mean(-1), values)


def bootstrap(
    statistic: Callable, *samples: Sequence, paired: bool = False, resamples: int = 2_000
) -> tuple[float, float, float]:
    """(value, low, high) of `statistic(*samples)`, samples [n] each: 95% by percentile bootstrap over trajectories.

    `statistic` takes arrays whose last axis is trajectories. paired: all samples are of the same trajectories, or of the same
    noise, and are drawn together. Trajectories with values that are not finite are left out, of paired samples in all.
    """
    samples = [np.asarray(s, dtype=np.float64) for s in samples]
    finite = [np.isfinite(s) for s in samples]
    if paired:
        finite = [np.logical_and.reduce(finite)] * len(samples)
    samples = [s[f] for s, f in zip(samples, finite, strict=True)]
    if min(map(len, samples)) == 0:
        return float("nan"), float("nan"), float("nan")
    value = float(statistic(*samples))
    if min(map(len, samples)) == 1:
        return value, value, value
    how = dict(n_resamples=resamples, paired=paired, method="percentile", vectorized=True, rng=np.random.default_rng(0))
    found = stats.bootstrap(samples, lambda *drawn, axis: statistic(*drawn), **how).confidence_interval
    return value, float(found.low), float(found.high)


def ratio_of_means(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The mean of the first over the mean of the second, along the last axis; a statistic for `bootstrap`."""
    return numerator.mean(-1) / denominator.mean(-1)


def alive(terminal: Tensor) -> Tensor:
    """[B, T]: 1 up to and including the first step whose terminal flag [B, T] is above one half, then 0."""
    ended = (terminal > 0.5).float()
    return ((ended.cumsum(-1) - ended) == 0).float()


def _masked_mean(values, alive):
    if alive is None:
        return values.mean(-1)
    return torch.where(alive > 0, values, 0.0).sum(-1) / alive.sum(-1)


@torch.no_grad()
def energy_distance(
    x: Tensor, y: Tensor, scale: Tensor, generator: torch.Generator, permutations: int = 500, steps_each: int = 32
) -> tuple[float, float, float]:
    """(E, p, q): squared energy distance of the states of trajectories x [n, T, D] and y [m, T', D], p-value, null quantile.

    Any space; the states are divided by `scale` [D], the data's standard deviations, and E is in that unit. The steps of a
    trajectory depend on each other, so a trajectory counts as one draw: D_ij is the mean distance of a step of i from a
    step of j, and E = 2 mean D_xy - mean D_xx - mean D_yy. The last two are over i != j (U-statistics): E is unbiased, zero
    in the mean if nothing differs, and may be negative.

    p = (1 + #{E of permuted trajectories >= E}) / (1 + permutations); q is the 95% quantile of the permuted E.
    Of more than `steps_each` steps, that many count, evenly spread from the first to the last. All must belong to the
    trajectory: let one that ended repeat its last state, on both sides alike. Trajectories that depend on each other (copies,
    windows of one episode) make p too small.
    """
    x, y, scale = _checked(x, y, scale)
    if permutations < 1 or steps_each < 1:
        raise ValueError(f"permutations={permutations} and steps_each={steps_each} must be 1 or more")
    n, total = len(x), len(x) + len(y)
    distances = _mean_distances([_spread(v, steps_each) / scale for v in (x, y)])
    # A permutation is a row of ones and zeros: which of the pooled trajectories play the part of x. The first is the truth.
    ranks = torch.rand(permutations, total, generator=generator, dtype=torch.float64).argsort(1)
    sides = torch.cat([torch.arange(total)[None], ranks]) < n
    values = _energies(distances, sides.double())
    value, null = values[0], values[1:]
    # Sides that are the same sets add up in another order: what is equal but for rounding counts as equal.
    above = (null >= value - 1e-10 * distances.mean()).sum()
    return float(value), (1 + int(above)) / (1 + permutations), float(null.quantile(0.95))


@torch.no_grad()
def nearest(obs: Tensor, reference: Tensor, scale: Tensor, alive: Tensor | None = None) -> Tensor:
    """[B]: how far the states obs [B, T, obs_dim] lie, in the mean, from the nearest of `reference` [N, obs_dim].

    Any space; both are divided by `scale` [obs_dim], the data's standard deviations. A distance is the root of the mean square
    over dimensions. `alive` [B, T] is 1 on the steps that count.
    """
    distances = [torch.cdist(each / scale, reference.to(scale.dtype) / scale).amin(-1) for each in obs.to(scale.dtype)]
    return _masked_mean(torch.stack(distances) / obs.shape[-1] ** 0.5, alive)


def _checked(x, y, scale):
    """x [n, T, D], y [m, T', D] and scale [D] as double tensors on the CPU, that can be compared."""
    x, y, scale = (torch.as_tensor(v).detach().cpu().double() for v in (x, y, scale))
    if x.dim() != 3 or y.dim() != 3 or scale.shape != x.shape[2:] or scale.shape != y.shape[2:]:
        raise ValueError(
            f"x, y and scale must be [n, T, D], [m, T', D] and [D]; got {[*x.shape]}, {[*y.shape]} and {[*scale.shape]}"
        )
    if min(len(x), len(y)) < 2 or min(x.shape[1], y.shape[1]) < 1:
        raise ValueError(f"x and y must hold 2 or more trajectories, of a step or more; got {[*x.shape]} and {[*y.shape]}")
    if not (x.isfinite().all() and y.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
        raise ValueError("x, y and scale must be finite, and scale positive")
    return x, y, scale


def _spread(x, steps):
    """x [n, T, D] at `steps` evenly spread steps, or all if there are no more."""
    if x.shape[1] <= steps:
        return x
    return x[:, torch.linspace(0, x.shape[1] - 1, steps, dtype=torch.float64).round().long()]


def _mean_distances(sides):
    """[N, N]: mean distance of the steps of each pair of the trajectories of all `sides` [n, k, D]; zero on the diagonal."""
    centre = torch.cat([s.flatten(0, 1) for s in sides]).mean(0)  # the matmul form of a distance loses digits far from zero
    blocks = [b for s in sides for b in (s - centre).split(BLOCK)]
    rows = []
    for i, a in enumerate(blocks):
        row = [torch.zeros(len(a), len(b), dtype=a.dtype) for b in blocks[:i]]
        for b in blocks[i:]:
            pairs = torch.cdist(a.flatten(0, 1), b.flatten(0, 1), compute_mode="use_mm_for_euclid_dist")
            row.append(pairs.reshape(len(a), a.shape[1], len(b), b.shape[1]).mean((1, 3)))
        rows.append(torch.cat(row, 1))
    upper = torch.cat(rows).triu(1)
    return upper + upper.T


def _energies(distances, x):
    """[P]: E of each row of x [P, N], 1 for the trajectories on x's side and 0 for those on y's."""
    n, sums = x.sum(1), x @ distances
    m = x.shape[1] - n
    xx = (sums * x).sum(1)
    xy = sums.sum(1) - xx
    yy = distances.sum() - xx - 2 * xy
    return 2 * xy / (n * m) - xx / (n * (n - 1)) - yy / (m * (m - 1))


def coverage(reference: Tensor, generated: Tensor, scale: Tensor, neighbours: int = 5, steps_each: int = 8) -> float:
    """The share of the states of `reference` [n, T, D] that have a state of `generated` [m, T', D] near (Naeem et al. 2020).

    Near is no farther than the state's own `neighbours`-th nearest neighbour among the states of other reference
    trajectories, after division by `scale` [D]. Of each trajectory `steps_each` evenly spread steps count. A sample of the
    reference's own distribution, of the same size, covers 1 - 2**-neighbours of it, about.
    """
    reference, generated, scale = _checked(reference, generated, scale)
    ours, theirs = (_spread(v, steps_each) / scale for v in (reference, generated))
    n, own = ours.shape[:2]
    others = (n - 1) * own
    if not 1 <= neighbours <= others:
        raise ValueError(f"neighbours={neighbours} must be 1 to {others}, the states of other reference trajectories")
    trajectory = np.repeat(np.arange(n), own)
    ours, theirs = (v.flatten(0, 1).numpy() for v in (ours, theirs))
    distance, ids = spatial.KDTree(ours).query(ours, neighbours + own)  # of these, `own` at most are of the same trajectory
    distance[trajectory[ids] == trajectory[:, None]] = np.inf
    radius = np.sort(distance, 1)[:, neighbours - 1]
    return float((spatial.KDTree(theirs).query(ours)[0] <= radius).mean())
