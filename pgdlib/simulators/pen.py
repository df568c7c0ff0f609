"""Adroit Pen in batches, on D4RL's scale and the native one. What its observation holds: `pen_states`."""

import contextlib
import io
from collections.abc import Callable
from functools import cache

import numpy as np

from pgdlib.simulators import Simulator, episodes, import_mujoco, pen_states
from pgdlib.simulators.batch import Batch
from pgdlib.simulators.pen_states import ACTION_DIM, CONTROL_DT, GROUPS, N_SUBSTEPS, OBS_DIM, STATE_DIM, outcome

D4RL_HORIZON, NATIVE_HORIZON = 100, 200  # steps
D4RL_RANDOM_RETURN, D4RL_EXPERT_RETURN = 96.262799, 3076.833073  # D4RL's reference returns of pen-*-v1


@cache
def _gym_env():
    import_mujoco()
    with contextlib.redirect_stderr(io.StringIO()):  # importing it prints a notice about other environments
        from gymnasium_robotics.envs.adroit_hand.adroit_pen import AdroitHandPenEnv
    return AdroitHandPenEnv()


def pen_rest_pose() -> tuple[np.ndarray, np.ndarray]:
    """Position [3] and rotation [3, 3] of the pen's body where all its joints are zero."""
    body, matrix = _gym_env().model.body("Object"), np.empty(9)
    import_mujoco().mju_quat2Mat(matrix, body.quat)
    return body.pos, matrix.reshape(3, 3)


def sample_targets(n: int, rng: np.random.Generator) -> np.ndarray:
    """Target orientations [n, 4] (quaternions) as the environment draws them: x and y Euler angles uniform in [-1, 1]."""
    half = rng.uniform(-1.0, 1.0, (n, 2)) / 2
    (cx, cy), (sx, sy) = np.cos(half).T, np.sin(half).T
    return np.stack([cx * cy, sx * cy, cx * sy, sx * sy], -1)


def start(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The states that n episodes begin with: qpos, qvel [n, 30], always the same, and targets [n, 4]."""
    env = _gym_env()
    qpos, qvel = (np.tile(of, (n, 1)) for of in (env.init_qpos, env.init_qvel))
    return qpos, qvel, sample_targets(n, rng)


class PenBatch(Batch):
    """`n` Adroit Pen simulations with a target each, stepped in closed loop on `threads` threads.

    It gives the observations of the gym environment, fed the same targets and actions. As there, body positions in the
    observation after a step lie one physics substep behind the joint angles.
    """

    def __init__(self, n: int, threads: int | None = None):
        env = _gym_env()
        super().__init__(env.model, n, threads, N_SUBSTEPS, env.act_mean, env.act_rng)
        self._pen = env.obj_body_id
        self._sites = env.obj_t_site_id, env.obj_b_site_id, env.tar_t_site_id, env.tar_b_site_id, env.eps_ball_site_id
        self._target_quat = self._batch.expand("body_quat")[:, env.target_obj_body_id]
        self._xpos, self._site = self._batch.bind("xpos"), self._batch.bind("site_xpos")

    def begin(self, qpos: np.ndarray, qvel: np.ndarray, targets: np.ndarray, ids: np.ndarray | None = None) -> np.ndarray:
        """`Batch.begin`, with `targets` [k, 4] (quaternions)."""
        self._target_quat[slice(None) if ids is None else ids] = targets  # before the rest, which shows the target
        return super().begin(qpos, qvel, ids=ids)

    def place(self, qpos: np.ndarray, qvel: np.ndarray, targets: np.ndarray | None = None) -> None:
        """`Batch.place`, with `targets` [n, 4] or those that are."""
        super().place(qpos, qvel)
        if targets is not None:
            self._target_quat[:] = targets

    def state(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Copies of qpos, qvel [n, 30] and of the targets [n, 4]."""
        return *super().state(), self._target_quat.copy()

    def _observe(self):
        pen_top, pen_bottom, target_top, target_bottom, goal = (self._site[:, i] for i in self._sites)
        axis, target_axis = (
            d / np.linalg.norm(d, axis=-1, keepdims=True) for d in (pen_top - pen_bottom, target_top - target_bottom)
        )
        position = self._xpos[:, self._pen]
        parts = [self._qpos[:, :24], position, self._qvel[:, -6:], axis, target_axis, position - goal, axis - target_axis]
        return np.concatenate(parts, -1)


def rollout(
    act: Callable, n: int, rng: np.random.Generator | None, horizon: int = NATIVE_HORIZON,
    targets: np.ndarray | None = None, threads: int | None = None,
) -> episodes.Episodes:  # fmt: skip
    """`episodes.rollout` of the pen: `n` episodes of `horizon` steps, with `targets` [n, 4] or those that `rng` draws."""
    begun = None if targets is None else (*start(n, np.random.default_rng(0))[:2], targets)
    return episodes.rollout(PEN, act, n, rng, horizon, begun, threads)


def within_reach(qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    """[n]: whether the states qpos, qvel [n, 30] are such that simulating them means something.

    Finite; hand joints at most 1 rad beyond their limits and slower than 100 rad/s; pen within 2 m of its origin and slower
    than 50 m/s and 300 rad/s. In real data nothing comes near these bounds.
    """
    low, high = _gym_env().model.jnt_range[:24].T
    hand, pen = qpos[:, :24], qpos[:, 24:27]
    with np.errstate(invalid="ignore"):
        near = ((hand > low - 1) & (hand < high + 1)).all(-1) & (np.abs(pen) < 2).all(-1)
        slow = (np.abs(qvel) < np.repeat([100.0, 50.0, 300.0], [24, 3, 3])).all(-1)
    return near & slow & np.isfinite(qpos).all(-1)


@cache
def _kick():
    batch = PenBatch(25, threads=1)
    batch.begin(*start(25, np.random.default_rng(0)))  # at rest; the target does not matter
    return pen_states.kick_response(batch)


def reconstructed(obs: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """qpos, qvel [B, T, 30] of trajectories obs [B, T, 45], actions [B, T, 24] by `pen_states.state_from_observations`."""
    return pen_states.state_from_observations(obs, actions, *pen_rest_pose(), _kick())


def appendix_b(obs: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The paper's Appendix B: hand joint angles from the observation, the pen's pose and all velocities zero."""
    qpos, qvel = np.zeros((2, *obs.shape[:-1], STATE_DIM))
    qpos[..., GROUPS["hand joints"]] = obs[..., GROUPS["hand joints"]]
    return qpos, qvel


PEN = Simulator(
    name="Adroit Pen",
    obs_dim=OBS_DIM,
    action_dim=ACTION_DIM,
    qpos_dim=STATE_DIM,
    qvel_dim=STATE_DIM,
    dt=CONTROL_DT,
    horizon=D4RL_HORIZON,
    groups=GROUPS,
    batch=PenBatch,
    start=start,
    states={"reconstructed": reconstructed, "appendix_b": appendix_b},
    within_reach=within_reach,
    reward=lambda obs, actions, next_obs: outcome(next_obs)[0],
    ended=lambda obs: outcome(obs)[2],
    with_goal=pen_states.with_goal,
    references=(D4RL_RANDOM_RETURN, D4RL_EXPERT_RETURN),
)
