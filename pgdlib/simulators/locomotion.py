"""Gymnasium's MuJoCo environments that observe qpos and qvel: Hopper, Walker2d, HalfCheetah, and a reader's own.

Such an observation is the simulator's whole state, but for the root's x, on which nothing depends. One trap: Hopper and
Walker2d show no velocity beyond ±10, and the joints of a random Walker2d are faster than that in most steps. What a clipped
velocity was, the simulator tells from the step before; at a trajectory's first step it is the one that leads to the positions
of the second, or one of two at a joint's limit.
"""

from collections.abc import Callable
from functools import cache, partial

import gymnasium
import numpy as np

from pgdlib.simulators import Simulator, import_mujoco
from pgdlib.simulators.batch import Batch

FASTEST = 1_000.0  # rad/s or m/s: nothing that simulates is as fast, and MuJoCo itself gives up far above it
ROUNDS = 15  # of the search for clipped velocities at the first step: each leaves a tenth of the error, or so


class GymBatch(Batch):
    """`n` simulations of the gymnasium environment `env`, whose observation is qpos[skipped:] and qvel, clipped at ±`clip`."""

    def __init__(self, env: gymnasium.Env, skipped: int, clip: float, n: int, threads: int | None = None):
        low, high = (bound.astype(float) for bound in (env.action_space.low, env.action_space.high))
        super().__init__(env.model, n, threads, env.frame_skip, (high + low) / 2, (high - low) / 2)
        self._skipped, self._clip = skipped, clip

    def _observe(self):
        return np.concatenate([self._qpos[:, self._skipped :], self._qvel.clip(-self._clip, self._clip)], -1)


def from_gym(
    name: str, make: Callable, groups: dict | None = None, reward: Callable | None = None, ended: Callable | None = None,
    references: tuple | None = None,
) -> Simulator:  # fmt: skip
    """The `Simulator` of the environment that `make()` gives: any of gymnasium's MuJoCo kind that observes qpos and qvel.

    The first numbers of qpos may be left out of the observation (they are taken for 0), and velocities clipped in it. Actions
    are those of the environment's Box, scaled to [-1, 1]. `groups`, `reward`, `ended` and `references` as in `Simulator`; by
    default two groups, no reward (NaN), no end, and no references. ValueError if the observation is anything else.
    """
    import_mujoco()
    env = make()
    horizon, env = env.spec and env.spec.max_episode_steps, env.unwrapped
    skipped, clip = _observed(env)
    model, positions = env.model, env.model.nq - skipped
    size, batch = positions + model.nv, partial(GymBatch, env, skipped, clip)
    return Simulator(
        name=name,
        obs_dim=size,
        action_dim=model.nu,
        qpos_dim=model.nq,
        qvel_dim=model.nv,
        dt=float(env.dt),
        horizon=horizon,
        groups=groups or {"positions": slice(0, positions), "velocities": slice(positions, size)},
        batch=batch,
        start=partial(_start, env),
        states={"reconstructed": partial(_state, batch, skipped, positions, clip, env.dt)},
        within_reach=lambda qpos, qvel: (np.abs(qvel) < FASTEST).all(-1) & np.isfinite(qpos).all(-1),
        reward=reward or (lambda obs, actions, next_obs: np.full(obs.shape[:-1], np.nan)),
        ended=ended or (lambda obs: np.zeros(obs.shape[:-1], dtype=bool)),
        with_goal=lambda obs, start: obs,
        references=references,
    )


def _start(env, n, rng):
    states = []
    for seed in rng.integers(2**31, size=n).tolist():
        env.reset(seed=seed)
        states.append((env.data.qpos.copy(), env.data.qvel.copy()))
    return tuple(np.stack(of) for of in zip(*states))


def _state(batch, skipped, positions, clip, dt, obs, actions):
    qpos = np.concatenate([np.zeros((*obs.shape[:-1], skipped)), obs[..., :positions]], -1)
    return qpos, _unclipped(batch, qpos, obs[..., positions:].copy(), actions, clip, dt)


def _observed(env):
    """(how many numbers of qpos the environment does not observe, where it clips qvel), by a state with large ones."""
    rng, model = np.random.default_rng(0), env.model
    (size,), both = env.observation_space.shape, model.nq + model.nv
    qpos, qvel = env.init_qpos + 0.1 * rng.normal(size=model.nq), FASTEST * rng.normal(size=model.nv)
    env.reset(seed=0)
    env.set_state(qpos, qvel)
    obs, skipped = env._get_obs(), both - size
    if 0 <= skipped <= model.nq:
        seen = np.abs(obs[-model.nv :]).max()
        clip = np.inf if seen == np.abs(qvel).max() else float(seen)
        if np.array_equal(obs, np.concatenate([qpos[skipped:], qvel.clip(-clip, clip)])):
            return skipped, clip
    has = f"{size} numbers, which are not qpos ({model.nq} numbers, the first of which may be missing) and qvel ({model.nv})"
    raise ValueError(f"env={type(env).__name__} is not allowed; its observation holds {has}: write a `Simulator` of its own")


def _unclipped(batch, qpos, qvel, actions, clip, dt):
    """qvel [B, T, nv], as observed, with its clipped numbers as they were; qpos [B, T, nq], where nq = nv."""
    beyond = np.abs(qvel) >= clip
    if not beyond.any():
        return qvel
    simulations, observed = batch(len(qpos)), qvel.copy()

    def after(t):
        """(qpos, qvel) after step t; what the simulator gives up on stays as it is observed there."""
        simulations.place(qpos[:, t], qvel[:, t])
        lost = np.isnan(simulations.step(actions[:, t])).any(1, keepdims=True)
        return tuple(np.where(lost, x[:, t + 1], new) for x, new in zip((qpos, observed), simulations.state()))

    def put(t, found):
        """Take `found` for what was clipped at t, as far as it is clipped to the same."""
        fits = beyond[:, t] & (found * observed[:, t] > clip * clip)
        qvel[:, t] = np.where(fits, found, observed[:, t])

    for _ in range(ROUNDS * (beyond[:, 0].any() and qpos.shape[1] > 1)):
        put(0, qvel[:, 0] + (qpos[:, 1] - after(0)[0]) / dt)
    for t in range(1, qpos.shape[1]):
        if beyond[:, t].any():
            put(t, after(t - 1)[1])
    return qvel


def _upright(obs, lowest, highest, tilt):
    """Whether the root's height (m) and angle (rad) are such that the environment goes on."""
    return (lowest < obs[..., 0]) & (obs[..., 0] < highest) & (np.abs(obs[..., 1]) < tilt)


RUNNERS = {  # name: environment, whether it goes on, reward for that, cost of an action, D4RL's reference returns
    "hopper": ("Hopper-v5", partial(_upright, lowest=0.7, highest=np.inf, tilt=0.2), 1.0, 1e-3, (-20.272305, 3234.3)),
    "walker2d": ("Walker2d-v5", partial(_upright, lowest=0.8, highest=2.0, tilt=1.0), 1.0, 1e-3, (1.629008, 4592.3)),
    "halfcheetah": ("HalfCheetah-v5", lambda obs: np.ones(obs.shape[:-1], bool), 0.0, 0.1, (-280.178953, 12135.0)),
}


@cache
def runner(name: str) -> Simulator:
    """The `Simulator` of "hopper", "walker2d" or "halfcheetah", as version 5 of gymnasium has them.

    Reward: speed, and 1 where Hopper or Walker2d goes on, less the cost of the action. The environment takes the speed from
    the way of the root, which is not observed; here it is the mean of its velocities before and after.
    """
    env_id, goes_on, alive, cost, references = RUNNERS[name]
    forward = {"hopper": 5}.get(name, 8)  # where the root's velocity along x stands; before it all but the root's x

    def reward(obs, actions, next_obs):
        speed = (obs[..., forward] + next_obs[..., forward]) / 2
        return speed + alive * goes_on(next_obs) - cost * np.square(actions).sum(-1)

    parts = {"root position": 2, "joint angles": forward - 2, "root velocity": 3, "joint velocities": forward - 2}
    ends = np.cumsum([0, *parts.values()]).tolist()
    groups = {part: slice(*where) for part, where in zip(parts, zip(ends, ends[1:]))}
    return from_gym(env_id, partial(gymnasium.make, env_id), groups, reward, lambda obs: ~goes_on(obs), references)
