"""Dynamics error: how far each step of a trajectory is from what the simulator does with its state and action.

error_t = (T(s_t, a_t) - s_{t+1})², T the simulator. The observation holds neither the hand's velocities nor the pen's roll,
so T needs a state made from observations; how it is made decides what is measured:

reconstructed  pen pose and velocity computed from the observation, hand velocities by corrected central differences.
appendix_b     the paper's Appendix B: hand joint angles from the observation, the pen's pose and all velocities zero.
still          no simulator: T(s, a) = s, the error of predicting that nothing moves. A yardstick.

The open-loop error is that of k steps in a row, played from the reconstructed state. `inject` gives errors of a known size,
to see which of them an estimator reports.
"""

from dataclasses import dataclass

import numpy as np

from pgdlib.simulators import pen as adroit
from pgdlib.simulators.pen_states import state_from_observations

ESTIMATORS = ("reconstructed", "appendix_b", "still")
STATE_DIMS = slice(0, 36)  # what a state is made from; the rest of an observation is the target, and differences from it


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
    return _with_target(after, before[..., 36:39])


def _with_target(obs, target):
    """`obs` [..., 45] of a simulation with any target, as with the target axis `target` [..., 3]; changed in place."""
    obs[..., 36:39] = target
    obs[..., 42:45] = obs[..., 33:36] - target
    return obs


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

    @property
    def unjudged(self):
        """How many of the B trajectories have no error (NaN). A mean leaves them out: report it with the mean."""
        return int(np.isnan(self.plain).sum())

    def by_step(self):
        """[T - 1]: the mean normalised error at each place of the trajectory, of those that have one there."""
        return _mean(self.squared / self.variance, (0, 2))

    def by_dimension(self):
        """[45]: the mean normalised error of each dimension of the observation."""
        return _mean(self.squared, (0, 1)) / self.variance

    def by_group(self):
        """Mean normalised error of each group of dimensions of `adroit.OBS_SLICES`."""
        per_dim = self.by_dimension()
        return {name: float(per_dim[s].mean()) for name, s in adroit.OBS_SLICES.items()}


@dataclass
class OpenLoopError(DynamicsError):
    """Squared errors after k = 1..K steps of the simulator on its own, of B trajectories; sums are those of each k.

    `squared` is [B, K, 45]. It is NaN from where the trajectory has ended, or all along where the simulator cannot start, or
    from where it gives up; a step of the trajectory that is not finite is NaN by itself.
    """

    lasts: np.ndarray  # [B, K]: whether the trajectory still has a step start + k
    joints: np.ndarray | None = None  # [B, K, 30]: the simulator's qpos; NaN where it cannot start, or has given up

    @property
    def plain(self):
        """[B, K]: the mean over dimensions."""
        return _mean(self.squared, 2)

    @property
    def normalised(self):
        """[B, K]: the mean over dimensions, each divided by its variance in the data."""
        return _mean(self.squared / self.variance, 2)

    @property
    def unjudged(self):
        """[K]: how many trajectories last k steps and have no error. A mean leaves them out: report it with the mean."""
        return (self.lasts & np.isnan(self.plain)).sum(0)


def dynamics_error(obs, actions, variance, estimator="reconstructed", alive=None, threads=None):
    """`DynamicsError` of trajectories obs [B, T, 45], actions [B, T, 24] (environment space).

    `variance` [45] is the data's; `alive` [B, T] is 1 on the steps that belong to the trajectory, its first ones (all by
    default); the others do not enter. A trajectory with a step outside the simulator's reach has NaN as its error.
    """
    obs, actions = np.asarray(obs, dtype=np.float64), np.asarray(actions, dtype=np.float64)
    if len(obs) == 0:
        raise ValueError(f"obs of shape {obs.shape} is not allowed; it must hold a trajectory or more, to have an error")
    lengths = _lengths(obs, alive)
    squared = np.full((len(obs), obs.shape[1] - 1, obs.shape[2]), np.nan)
    for n in np.unique(lengths[lengths > 1]):  # cut, for the state is rebuilt from neighbours in time
        rows = np.flatnonzero(lengths == n)
        error = (predict(obs[rows, :n], actions[rows, :n], estimator, threads) - obs[rows, 1:n]) ** 2
        error[~np.isfinite(error).all((1, 2))] = np.nan
        squared[rows, : n - 1] = error
    return DynamicsError(squared, _divisor(variance))


def open_loop_error(obs, actions, variance, steps, alive=None, threads=None, start=1):
    """`OpenLoopError`: the simulator plays each trajectory's own actions from its step `start`, for k = 1..`steps` steps.

    Arguments are those of `dynamics_error`. The state at `start` is the reconstructed one, and the target stays where s_start
    has it. By default the start is step 1, for step 0 has a hand velocity from one side only: on real data its mean floor is
    five times as high at k = 1, and still twice at k = 30.
    """
    obs, actions = np.asarray(obs, dtype=np.float64), np.asarray(actions, dtype=np.float64)
    T = obs.shape[1]
    if not 0 <= start <= T - 2:
        raise ValueError(f"start={start} is not allowed; it must be 0 to {T - 2}, for trajectories of {T} steps")
    if not 1 <= steps <= T - 1 - start:
        raise ValueError(f"steps={steps} is not allowed; it must be 1 to {T - 1 - start}, for {T} steps from start={start}")
    lengths = _lengths(obs, alive)
    qpos, qvel = np.full((2, len(obs), 30), np.nan)
    for n in np.unique(lengths[lengths > start + 1]):
        rows = np.flatnonzero(lengths == n)
        qpos[rows], qvel[rows] = (x[:, start] for x in state_from_observations(obs[rows, :n], actions[rows, :n]))
    lasts = np.arange(start + 1, start + steps + 1) < lengths[:, None]
    simulated, joints = (np.full((len(obs), steps, size), np.nan) for size in (adroit.OBS_DIM, 30))
    rows = np.flatnonzero(adroit.within_reach(qpos, qvel))
    if len(rows):
        batch = adroit.PenBatch(len(rows), threads)
        batch.set_state(qpos[rows], qvel[rows])
        for k in range(steps):  # an ended trajectory goes on with no action, for what stands there may be anything
            simulated[rows, k] = batch.step(np.where(lasts[rows, k, None], actions[rows, start + k], 0.0))
            joints[rows, k] = batch.state()[0]
    joints[np.isnan(simulated).any(2)] = np.nan
    _with_target(simulated, obs[:, start, None, 36:39])
    squared = (simulated - obs[:, start + 1 : start + steps + 1]) ** 2
    squared[~(lasts & np.isfinite(squared).all(2))] = np.nan
    return OpenLoopError(squared, _divisor(variance), lasts, joints)


@dataclass
class Replay:
    """The states that a trajectory has from its step `start` on, and where the simulator gets with its actions."""

    imagined: np.ndarray  # [K + 1, 30]: qpos, reconstructed
    simulated: np.ndarray  # [K + 1, 30]: qpos; NaN from where the simulator gives up, or all along where it cannot start
    squared: np.ndarray  # [K + 1, 45]: that of `open_loop_error`, after a 0 for the start, which the two share
    target_axis: np.ndarray  # [3], at the start

    def normalised(self, variance):
        """[K + 1]: the squared error's mean over dimensions, each divided by its `variance` [45] in the data."""
        return _mean(self.squared / _divisor(variance), 1)


def replay(obs, actions, start=1, threads=None):
    """`Replay` of one trajectory obs [T, 45], actions [T, 24] (environment space), from step `start` to its last."""
    obs, actions = (np.asarray(x, dtype=np.float64)[None] for x in (obs, actions))
    played = open_loop_error(obs, actions, np.ones(adroit.OBS_DIM), obs.shape[1] - 1 - start, threads=threads, start=start)
    qpos, qvel = (x[0, start:] for x in state_from_observations(obs, actions))
    starts = adroit.within_reach(qpos[:1], qvel[:1])
    simulated = np.concatenate([np.where(starts, qpos[:1], np.nan), played.joints[0]])
    squared = np.concatenate([np.full((1, adroit.OBS_DIM), 0.0 if starts else np.nan), played.squared[0]])
    return Replay(qpos, simulated, squared, obs[0, start, 36:39])


def rollout_from(obs, actions, act, horizon, start=1, threads=None):
    """What the simulator does under a policy from step `start` of trajectories obs [B, T, 45], actions [B, T, 24].

    `act(obs [B, 45]) -> actions [B, 24]`. Returns (obs [B, horizon, 45], actions [B, horizon, 24]); the first observation is
    the trajectory's own. Falls do not end it. Rows are NaN where the start is outside the simulator's reach.
    """
    obs, actions = np.asarray(obs, dtype=np.float64), np.asarray(actions, dtype=np.float64)
    qpos, qvel = (x[:, start] for x in state_from_observations(obs, actions))
    reach = adroit.within_reach(qpos, qvel)
    batch = adroit.PenBatch(len(obs), threads)
    batch.set_state(*(np.where(reach[:, None], x, 0.0) for x in (qpos, qvel)))
    seen, acted = [obs[:, start]], []
    for _ in range(horizon):
        acted.append(np.asarray(act(seen[-1]), dtype=np.float64))
        seen.append(_with_target(batch.step(acted[-1]), obs[:, start, 36:39]))
    seen, acted = np.stack(seen[:-1], 1), np.stack(acted, 1)
    seen[~reach], acted[~reach] = np.nan, np.nan
    return seen, acted


def inject(obs, size, rng, variance, dims=STATE_DIMS):
    """`obs` [..., 45] (environment space) with independent Gaussian noise: how large an error does an estimator see?

    The noise has `size` standard deviations of the data, whose `variance` [45] is given, in the dimensions `dims` (a slice or
    indices, within the first 36). The result is a possible observation again, so that only the dynamics are wrong: the pen's
    axis keeps its length, and the differences from the target, entries 39 to 44, follow the pen.
    """
    obs, chosen = np.asarray(obs, dtype=np.float64), np.zeros(adroit.OBS_DIM, dtype=bool)
    chosen[dims] = True
    if chosen[STATE_DIMS.stop :].any():
        raise ValueError(f"dims={dims!r} is not allowed; it must be within the first {STATE_DIMS.stop} dimensions")
    std = np.sqrt(np.asarray(variance, dtype=np.float64))
    noisy = obs + np.where(chosen, size * std, 0.0) * rng.normal(size=obs.shape)
    length, noisy_length = (np.linalg.norm(x[..., 33:36], axis=-1, keepdims=True) for x in (obs, noisy))
    noisy[..., 33:36] *= length / noisy_length
    for own, difference in ((slice(24, 27), slice(39, 42)), (slice(33, 36), slice(42, 45))):
        noisy[..., difference] += noisy[..., own] - obs[..., own]
    return noisy


def _lengths(obs, alive):
    """[B]: how many steps of the trajectories obs [B, T, 45] belong to them."""
    return np.full(len(obs), obs.shape[1]) if alive is None else (np.asarray(alive) > 0).sum(1)


def _divisor(variance):
    """[45]: the variance to divide by, 1 for a dimension that never changes."""
    variance = np.asarray(variance, dtype=np.float64)
    return np.where(variance > 1e-12, variance, 1.0)


def _mean(x, axis):
    """The mean of what is not NaN; NaN where nothing is left."""
    count = (~np.isnan(x)).sum(axis)
    return np.where(count > 0, np.nansum(x, axis) / np.maximum(count, 1), np.nan)
