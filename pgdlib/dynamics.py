"""Dynamics error: how far each step of a trajectory is from what the simulator does with its state and action.

error_t = (T(s_t, a_t) - s_{t+1})², T the simulator. Where the observation does not hold the whole state, T needs one made from
observations; how it is made, the *estimator*, decides what is measured. A `Simulator` has its own, by name; "reconstructed" is
the one to trust. Beside them stands

still          no simulator: T(s, a) = s, the error of predicting that nothing moves. A yardstick: how much a trajectory moves.

The open-loop error is that of k steps in a row, played from the reconstructed state of step `START`. Arrays are numpy, in
environment space: obs [B, T, obs_dim], actions [B, T, action_dim].
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from pgdlib.simulators import Simulator, advance

ESTIMATORS = ("reconstructed", "appendix_b", "still")
# Not 0, where a velocity that must be made from neighbours has only one: on real data of Adroit Pen the mean floor from there
# is five times as high at k = 1, and still twice at k = 30.
START = 1


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
    axes = 1, 2  # of `squared`, over which `plain` and `normalised` are means

    def __post_init__(self):
        self.variance = np.asarray(self.variance, dtype=np.float64)
        if len(bad := np.flatnonzero(~(self.variance > 0))):
            raise ValueError(f"variance[{bad[0]}]={self.variance[bad[0]]} is not allowed; it must be above zero")

    @property
    def plain(self) -> Array:
        """[B]: the paper's mean over steps and dimensions. Almost only the pen's angular velocity enters it."""
        return _mean(self.squared, self.axes)

    @property
    def normalised(self) -> Array:
        """[B]: the mean with each dimension divided by its variance in the data."""
        return _mean(self.squared / self.variance, self.axes)

    @property
    def unjudged(self) -> int:
        """How many of the B trajectories have no error (NaN). A mean leaves them out: report it with the mean."""
        return int(np.isnan(self.plain).sum())

    def by_step(self) -> Array:
        """[T - 1]: the mean normalised error at each place of the trajectory, of those that have one there."""
        return _mean(self.squared / self.variance, (0, 2))

    def by_group(self) -> dict[str, float]:
        """Mean normalised error of each group of dimensions."""
        per_dim = _mean(self.squared, (0, 1)) / self.variance
        return {name: float(per_dim[s].mean()) for name, s in self.groups.items()}


@dataclass
class OpenLoopError(DynamicsError):
    """Squared errors after k = 1..K steps of the simulator on its own, of B trajectories; `plain` and `normalised` are [B, K].

    `squared` is [B, K, obs_dim]. It is NaN from where the trajectory has ended, all along where the simulator cannot start, or
    from where it gives up; a step of the trajectory that is not finite is NaN by itself.
    """

    lasts: Array  # [B, K]: whether the trajectory still has a step start + k
    joints: Array | None = None  # [B, K + 1, qpos_dim]: qpos after k = 0..K; NaN where it cannot start, or has given up
    axes = 2

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
    simulator: Simulator, obs: Array, actions: Array, variance: Array, steps: int, alive: Array | None = None
) -> OpenLoopError:
    """`OpenLoopError`: the simulator plays each trajectory's own actions from its step `START`, for k = 1..`steps` steps.

    Arguments are those of `dynamics_error`. The goal stays where the start has it.
    """
    obs, actions = np.asarray(obs, dtype=np.float64), np.asarray(actions, dtype=np.float64)
    T = obs.shape[1]
    if not 1 <= steps <= T - 1 - START:
        raise ValueError(f"steps={steps} is not allowed; it must be 1 to {T - 1 - START}, for trajectories of {T} steps")
    lengths = _lengths(obs, alive)
    lasts = np.arange(START + 1, START + steps + 1) < lengths[:, None]
    qpos, qvel = (np.full((len(obs), size), np.nan) for size in (simulator.qpos_dim, simulator.qvel_dim))
    for n in np.unique(lengths[lengths > START + 1]):
        rows = np.flatnonzero(lengths == n)
        states = simulator.states["reconstructed"](obs[rows, :n], actions[rows, :n])
        qpos[rows], qvel[rows] = (x[:, START] for x in states)
    # An ended trajectory goes on with no action, for what stands there may be anything.
    played = iter(np.where(lasts[..., None], actions[:, START : START + steps], 0.0).swapaxes(0, 1))
    simulated, _, joints = _simulated(simulator, obs[:, START], qpos, qvel, lambda seen: next(played), steps)
    squared = (simulated[:, 1:] - obs[:, START + 1 : START + steps + 1]) ** 2
    squared[~(lasts & np.isfinite(squared).all(2))] = np.nan
    return OpenLoopError(squared, variance, simulator.groups, lasts, joints)


def _simulated(simulator, start, qpos, qvel, act, steps):
    """B simulations from the states qpos, qvel [B, ...] under `act`, with the goals of the observations `start` [B, obs_dim].

    Observations [B, steps + 1, ...], the first of them `start`, actions [B, steps, ...] and qpos [B, steps + 1, ...]; NaN where
    the simulator cannot start, and observations and qpos from where it gives up.
    """
    reach = simulator.within_reach(qpos, qvel)
    batch = simulator.batch(int(reach.sum()), None) if reach.any() else None
    if batch:
        batch.set_state(qpos[reach], qvel[reach])
    seen, acted, joints = [start], [], [qpos]
    for _ in range(steps):
        acted.append(np.asarray(act(seen[-1]), dtype=np.float64))
        after, where = np.full(start.shape, np.nan), np.full(qpos.shape, np.nan)
        if batch:
            after[reach] = batch.step(acted[-1][reach])
            where[reach] = batch.state()[0]
        joints.append(np.where(np.isnan(after).any(1, keepdims=True), np.nan, where))
        seen.append(simulator.with_goal(after, start))
    made = [np.stack(x, 1) for x in (seen, acted, joints)]
    for x in made:
        x[~reach] = np.nan
    return made


@dataclass
class Replay:
    """The states that a trajectory has from its step `START` on, and where the simulator gets with its actions."""

    imagined: Array  # [K + 1, qpos_dim]: qpos, reconstructed
    simulated: Array  # [K + 1, qpos_dim]: qpos; NaN from where the simulator gives up, or all along if it cannot start
    error: Array  # [K + 1]: the normalised `open_loop_error`, after a 0 for the start, which the two share
    start: Array  # [obs_dim]: the observation there
    simulator: Simulator


def replay(simulator: Simulator, obs: Array, actions: Array, variance: Array) -> Replay:
    """`Replay` of one trajectory obs [T, obs_dim], actions [T, action_dim], to its last step."""
    obs, actions = (np.asarray(x, dtype=np.float64)[None] for x in (obs, actions))
    played = open_loop_error(simulator, obs, actions, variance, obs.shape[1] - 1 - START)
    imagined, simulated = simulator.states["reconstructed"](obs, actions)[0][0, START:], played.joints[0]
    error = [0.0 if np.isfinite(simulated[0]).all() else np.nan, *played.normalised[0]]
    return Replay(imagined, simulated, np.array(error), obs[0, START], simulator)


def rollout_from(simulator: Simulator, obs: Array, actions: Array, act: Callable, horizon: int) -> tuple[Array, Array]:
    """What the simulator does under a policy from step `START` of trajectories obs [B, T, obs_dim], actions [B, T, action_dim].

    `act(obs [B, obs_dim]) -> actions [B, action_dim]`. Returns obs [B, horizon, obs_dim], actions [B, horizon, action_dim]; the
    first observation is the trajectory's own. No outcome ends it. Rows are NaN if the start is outside the simulator's reach.
    """
    obs, actions = np.asarray(obs, dtype=np.float64), np.asarray(actions, dtype=np.float64)
    qpos, qvel = (x[:, START] for x in simulator.states["reconstructed"](obs, actions))
    seen, acted, _ = _simulated(simulator, obs[:, START], qpos, qvel, act, horizon)
    return seen[:, :-1], acted


def _lengths(obs, alive):
    """[B]: how many steps of the trajectories obs [B, T, obs_dim] belong to them."""
    return np.full(len(obs), obs.shape[1]) if alive is None else (np.asarray(alive) > 0).sum(1)


def _mean(x, axis):
    """The mean of what is not NaN; NaN where nothing is left."""
    count = (~np.isnan(x)).sum(axis)
    return np.where(count > 0, np.nansum(x, axis) / np.maximum(count, 1), np.nan)
