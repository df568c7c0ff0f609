"""Dynamics error: how far each step of a trajectory is from what the simulator does with its state and action.

error_t = (T(s_t, a_t) - s_{t+1})², T the simulator. The observation holds neither the hand's velocities nor the pen's roll,
so T needs a state made from observations; how it is made decides what is measured:

reconstructed  pen pose and velocity computed from the observation, hand velocities by corrected central differences.
appendix_b     the paper's Appendix B: hand joint angles from the observation, the pen's pose and all velocities zero.
still          no simulator: T(s, a) = s, the error of predicting that nothing moves. A yardstick.
"""

from dataclasses import dataclass

import numpy as np

from pgdlib import adroit
from pgdlib.reconstruct import state_from_observations

ESTIMATORS = ("reconstructed", "appendix_b", "still")


def predict(obs, actions, estimator="reconstructed", threads=None):
    """T(s_t, a_t) for all but the last step of trajectories obs [B, T, 45], actions [B, T, 24] (environment space).

    Returns [B, T - 1, 45]; NaN rows are outside the simulator's reach. The target keeps the place that s_t gives it.
    """
    obs, actions = np.asarray(obs, dtype=np.float64), np.asarray(actions, dtype=np.float64)
    before = obs[:, :-1]
    if estimator == "still":
        return before
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator={estimator!r} is not allowed; it must be one of {', '.join(ESTIMATORS)}")
    if estimator == "reconstructed":
        qpos, qvel = state_from_observations(obs, actions)
    else:
        qpos, qvel = np.zeros((2, *obs.shape[:-1], 30))
        qpos[..., :24] = obs[..., :24]
    flat = (x[:, :-1].reshape(-1, x.shape[-1]) for x in (qpos, qvel, actions))
    after = adroit.advance(*flat, threads=threads).reshape(before.shape)
    target = before[..., 36:39]
    after[..., 36:39] = target
    after[..., 42:45] = after[..., 33:36] - target
    return after


@dataclass
class DynamicsError:
    """Squared one-step errors of B trajectories, and the ways to sum them up."""

    squared: np.ndarray  # [B, T - 1, 45], environment space; NaN outside the simulator's reach and after the end
    variance: np.ndarray  # [45]: each dimension's variance in the data

    @property
    def plain(self):
        """[B]: the paper's mean over steps and dimensions. Almost only the pen's angular velocity enters it."""
        return _mean(self.squared, (1, 2))

    @property
    def normalised(self):
        """[B]: the mean with each dimension divided by its variance in the data."""
        return _mean(self.squared / self.variance, (1, 2))

    def by_group(self):
        """Mean normalised error of each group of dimensions of `adroit.OBS_SLICES`."""
        per_dim = _mean(self.squared, (0, 1)) / self.variance
        return {name: float(per_dim[s].mean()) for name, s in adroit.OBS_SLICES.items()}


def dynamics_error(obs, actions, variance, estimator="reconstructed", alive=None, threads=None):
    """`DynamicsError` of trajectories obs [B, T, 45], actions [B, T, 24] (environment space).

    `variance` [45] is the data's; `alive` [B, T] is 1 on the steps that belong to the trajectory, its first ones (all by
    default); the others do not enter. A trajectory with a step outside the simulator's reach has NaN as its error.
    """
    obs, actions = np.asarray(obs, dtype=np.float64), np.asarray(actions, dtype=np.float64)
    lengths = np.full(len(obs), obs.shape[1]) if alive is None else (np.asarray(alive) > 0).sum(1)
    squared = np.full((len(obs), obs.shape[1] - 1, obs.shape[2]), np.nan)
    for n in np.unique(lengths[lengths > 1]):  # cut, for the state is rebuilt from neighbours in time
        rows = np.flatnonzero(lengths == n)
        error = (predict(obs[rows, :n], actions[rows, :n], estimator, threads) - obs[rows, 1:n]) ** 2
        error[~np.isfinite(error).all((1, 2))] = np.nan
        squared[rows, : n - 1] = error
    variance = np.asarray(variance, dtype=np.float64)
    return DynamicsError(squared, np.where(variance > 1e-12, variance, 1.0))


def _mean(x, axis):
    """The mean of what is not NaN; NaN where nothing is left."""
    count = (~np.isnan(x)).sum(axis)
    return np.where(count > 0, np.nansum(x, axis) / np.maximum(count, 1), np.nan)
