"""Dynamics error: how far each step of a trajectory is from what the simulator does with its state and action.

error_t = (T(s_t, a_t) - s_{t+1})², T the simulator. Where the observation does not hold the whole state, T needs one made from
observations; how it is made, the *estimator*, decides what is measured. A `Simulator` has its own, by name; "reconstructed" is
the one to trust. Beside them stands

still          no simulator: T(s, a) = s, the error of predicting that nothing moves. A yardstick: how much a trajectory moves.

The open-loop error is that of k steps in a row, played from the reconstructed state. Arrays are numpy, in environment space:
obs [B, T, obs_dim], actions [B, T, action_dim].
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from pgdlib.simulators import Simulator, advance

ESTIMATORS = ("reconstructed", "appendix_b", "still")


def predict(
    simulator: Simulator, obs: Array, actions: Array, estimator: str = "reconstructed", threads: int | None = None
) -> Array:
    """T(s_t, a_t) for all but the last step of trajectories: [B, T - 1, obs_dim].

    NaN rows are outside the simulator's reach. The goal keeps the place that s_t gives it. ValueError for an `estimator` that
    the simulator has not.
    """
    obs, actions = np.asarray(obs, dtype=np.float64), np.asarray(actions, dtype=np.float64)
    before = obs[:, :-1]
    if estimator == "still":
        return before
    if estimator not in simulator.states:
        allowed = ", ".join([*simulator.states, "still"])
        raise ValueError(f"estimator={estimator!r} is not allowed; it must be one of {allowed}")
    qpos, qvel = simulator.states[estimator](obs, actions)
    flat = (x[:, :-1].reshape(-1, x.shape[-1]) for x in (qpos, qvel, actions))
    after = advance(simulator, *flat, threads=threads).reshape(before.shape)
    return simulator.with_goal(after, before)


@dataclass
class DynamicsError:
    """Squared one-step errors of B trajectories, and the ways to sum them up."""

    squared: Array  # [B, T - 1, obs_dim]; NaN outside the simulator's reach and after the end
    variance: Array  # [obs_dim]: each dimension's variance in the data
    groups: dict  # name -> slice of the observation

    def __post_init__(self):
        self.variance = np.asarray(self.variance, dtype=np.float64)
        if len(bad := np.flatnonzero(~(self.variance > 0))):
            raise ValueError(f"variance[{bad[0]}]={self.variance[bad[0]]} is not allowed; it must be above zero")

    @property
    def plain(self) -> Array:
        """[B]: the paper's mean over steps and dimensions. Almost only the pen's angular velocity enters it."""
        return _mean(self.squared, (1, 2))

    @property
    def normalised(self) -> Array:
        """[B]: the mean with each dimension divided by its variance in the data."""
        return _mean(self.squared / self.variance, (1, 2))

    @property
    def unjudged(self) -> int:
        """How many of the B trajectories have no error (NaN). A mean leaves them out: report it with the mean."""
        return int(np.isnan(self.plain).sum())

    def by_step(self) -> Array:
        """[T - 1]: the mean normalised error at each place of the trajectory, of those that have one there."""
        return _mean(self.squared / self.variance, (0, 2))

    def by_dimension(self) -> Array:
        """[obs_dim]: the mean normalised error of each dimension of the observation."""
        return _mean(self.squared, (0, 1)) / self.variance

    def by_group(self) -> dict[str, float]:
        """Mean normalised error of each group of dimensions."""
        per_dim = self.by_dimension()
        return {name: float(per_dim[s].mean()) for name, s in self.groups.items()}


@dataclass
class OpenLoopError(DynamicsError):
    """Squared errors after k = 1..K steps of the simulator on its own, of B trajectories; sums are those of each k.

    `squared` is [B, K, obs_dim]. It is NaN from where the trajectory has ended, all along where the simulator cannot start, or
    from where it gives up; a step of the trajectory that is not finite is NaN by itself.
    """

    lasts: Array  # [B, K]: whether the trajectory still has a step start + k
    joints: Array | None = None  # [B, K, qpos_dim]: the simulator's qpos; NaN where it cannot start, or has given up

    @property
    def plain(self) -> Array:
        """[B, K]: the mean over dimensions."""
        return _mean(self.squared, 2)

    @property
    def normalised(self) -> Array:
        """[B, K]: the mean over dimensions, each divided by its variance in the data."""
        return _mean(self.squared / self.variance, 2)

    @property
    def unjudged(self) -> Array:
        """[K]: how many trajectories last k steps and have no error. A mean leaves them out: report it with the mean."""
        return (self.lasts & np.isnan(self.plain)).sum(0)


def dynamics_error(
    simulator: Simulator, obs: Array, actions: Array, variance: Array, estimator: str = "reconstructed",
    alive: Array | None = None, threads: int | None = None,
) -> DynamicsError:  # fmt: skip
    """`DynamicsError` of trajectories obs [B, T, obs_dim], actions [B, T, action_dim].

    `variance` [obs_dim], above zero, is the data's (`Trajectories.variance`); `alive` [B, T] is 1 on the steps that belong to a
    trajectory, its first ones (all by default); the others do not enter. A trajectory with a step outside the simulator's reach
    has NaN as its error.
    """
    obs, actions = np.asarray(obs, dtype=np.float64), np.asarray(actions, dtype=np.float64)
    if len(obs) == 0:
        raise ValueError(f"obs of shape {obs.shape} is not allowed; it must hold a trajectory or more, to have an error")
    lengths = _lengths(obs, alive)
    squared = np.full((len(obs), obs.shape[1] - 1, obs.shape[2]), np.nan)
    for n in np.unique(lengths[lengths > 1]):  # cut, for the state is rebuilt from neighbours in time
        rows = np.flatnonzero(lengths == n)
        error = (predict(simulator, obs[rows, :n], actions[rows, :n], estimator, threads) - obs[rows, 1:n]) ** 2
        error[~np.isfinite(error).all((1, 2))] = np.nan
        squared[rows, : n - 1] = error
    return DynamicsError(squared, variance, simulator.groups)


def open_loop_error(
    simulator: Simulator, obs: Array, actions: Array, variance: Array, steps: int, alive: Array | None = None,
    threads: int | None = None, start: int = 1,
) -> OpenLoopError:  # fmt: skip
    """`OpenLoopError`: the simulator plays each trajectory's own actions from its step `start`, for k = 1..`steps` steps.

    Arguments are those of `dynamics_error`. The state at `start` is the reconstructed one, and the goal stays where s_start
    has it. By default the start is step 1, for a velocity that must be made from neighbours has only one at step 0: on real
    data of Adroit Pen the mean floor there is five times as high at k = 1, and still twice at k = 30.
    """
    obs, actions = np.asarray(obs, dtype=np.float64), np.asarray(actions, dtype=np.float64)
    T = obs.shape[1]
    if not 0 <= start <= T - 2:
        raise ValueError(f"start={start} is not allowed; it must be 0 to {T - 2}, for trajectories of {T} steps")
    if not 1 <= steps <= T - 1 - start:
        raise ValueError(f"steps={steps} is not allowed; it must be 1 to {T - 1 - start}, for {T} steps from start={start}")
    lengths = _lengths(obs, alive)
    lasts = np.arange(start + 1, start + steps + 1) < lengths[:, None]
    qpos, qvel = (np.full((len(obs), size), np.nan) for size in (simulator.qpos_dim, simulator.qvel_dim))
    for n in np.unique(lengths[lengths > start + 1]):
        rows = np.flatnonzero(lengths == n)
        states = simulator.states["reconstructed"](obs[rows, :n], actions[rows, :n])
        qpos[rows], qvel[rows] = (x[:, start] for x in states)
    # An ended trajectory goes on with no action, for what stands there may be anything.
    played = np.where(lasts[..., None], actions[:, start : start + steps], 0.0)
    simulated, joints = _played(simulator, qpos, qvel, played, threads)
    simulator.with_goal(simulated, obs[:, start, None])
    squared = (simulated - obs[:, start + 1 : start + steps + 1]) ** 2
    squared[~(lasts & np.isfinite(squared).all(2))] = np.nan
    return OpenLoopError(squared, variance, simulator.groups, lasts, joints)


def _played(simulator, qpos, qvel, actions, threads):
    """Observations [B, K, obs_dim] and qpos [B, K, ...] from the states qpos, qvel [B, ...] under actions [B, K, action_dim].

    NaN where the simulator cannot start, and from where it gives up.
    """
    simulated, joints = (np.full((*actions.shape[:2], n), np.nan) for n in (simulator.obs_dim, simulator.qpos_dim))
    rows = np.flatnonzero(simulator.within_reach(qpos, qvel))
    if len(rows):
        batch = simulator.batch(len(rows), threads)
        batch.set_state(qpos[rows], qvel[rows])
        for k in range(actions.shape[1]):
            simulated[rows, k] = batch.step(actions[rows, k])
            joints[rows, k] = batch.state()[0]
    joints[np.isnan(simulated).any(2)] = np.nan
    return simulated, joints


@dataclass
class Replay:
    """The states that a trajectory has from its step `start` on, and where the simulator gets with its actions."""

    imagined: Array  # [K + 1, qpos_dim]: qpos, reconstructed
    simulated: Array  # [K + 1, qpos_dim]: qpos; NaN from where the simulator gives up, or all along if it cannot start
    squared: Array  # [K + 1, obs_dim]: that of `open_loop_error`, after a 0 for the start, which the two share
    start: Array  # [obs_dim]: the observation there

    def normalised(self, variance: Array) -> Array:
        """[K + 1]: the squared error's mean over dimensions, each divided by its `variance` [obs_dim] in the data."""
        return _mean(self.squared / variance, 1)


def replay(simulator: Simulator, obs: Array, actions: Array, start: int = 1, threads: int | None = None) -> Replay:
    """`Replay` of one trajectory obs [T, obs_dim], actions [T, action_dim], from step `start` to its last."""
    obs, actions = (np.asarray(x, dtype=np.float64)[None] for x in (obs, actions))
    ones = np.ones(simulator.obs_dim)
    played = open_loop_error(simulator, obs, actions, ones, obs.shape[1] - 1 - start, threads=threads, start=start)
    qpos, qvel = (x[0, start:] for x in simulator.states["reconstructed"](obs, actions))
    starts = simulator.within_reach(qpos[:1], qvel[:1])
    simulated = np.concatenate([np.where(starts, qpos[:1], np.nan), played.joints[0]])
    squared = np.concatenate([np.full((1, simulator.obs_dim), 0.0 if starts else np.nan), played.squared[0]])
    return Replay(qpos, simulated, squared, obs[0, start])


def rollout_from(
    simulator: Simulator, obs: Array, actions: Array, act: Callable, horizon: int, start: int = 1, threads: int | None = None
) -> tuple[Array, Array]:
    """What the simulator does under a policy from step `start` of trajectories obs [B, T, obs_dim], actions [B, T, action_dim].

    `act(obs [B, obs_dim]) -> actions [B, action_dim]`. Returns obs [B, horizon, obs_dim], actions [B, horizon, action_dim]; the
    first observation is the trajectory's own. No outcome ends it. Rows are NaN if the start is outside the simulator's reach.
    """
    obs, actions = np.asarray(obs, dtype=np.float64), np.asarray(actions, dtype=np.float64)
    qpos, qvel = (x[:, start] for x in simulator.states["reconstructed"](obs, actions))
    reach = simulator.within_reach(qpos, qvel)
    batch = simulator.batch(len(obs), threads)
    batch.set_state(*(np.where(reach[:, None], x, 0.0) for x in (qpos, qvel)))
    seen, acted = [obs[:, start]], []
    for _ in range(horizon):
        acted.append(np.asarray(act(seen[-1]), dtype=np.float64))
        seen.append(simulator.with_goal(batch.step(acted[-1]), obs[:, start]))
    seen, acted = np.stack(seen[:-1], 1), np.stack(acted, 1)
    seen[~reach], acted[~reach] = np.nan, np.nan
    return seen, acted


def _lengths(obs, alive):
    """[B]: how many steps of the trajectories obs [B, T, obs_dim] belong to them."""
    return np.full(len(obs), obs.shape[1]) if alive is None else (np.asarray(alive) > 0).sum(1)


def _mean(x, axis):
    """The mean of what is not NaN; NaN where nothing is left."""
    count = (~np.isnan(x)).sum(axis)
    return np.where(count > 0, np.nansum(x, axis) / np.maximum(count, 1), np.nan)
