"""What an observation of Adroit Pen says, and the simulator's state made from it and its neighbours in time.

An observation (45 numbers, environment space) is, with the slices of `GROUPS`:
hand joint angles, pen position, pen velocity (linear, angular), pen axis, target axis, pen-target position, pen-target axis.
"""

from typing import Any

import numpy as np

OBS_DIM, ACTION_DIM, STATE_DIM = 45, 24, 30  # of an observation, an action, and each of qpos and qvel
CONTROL_DT = 0.01  # s between observations (100 Hz)
SUBSTEP_DT = 0.002  # s between physics steps
N_SUBSTEPS = 5
GROUPS = {
    "hand joints": slice(0, 24),
    "pen position": slice(24, 27),
    "pen linear velocity": slice(27, 30),
    "pen angular velocity": slice(30, 33),
    "pen axis": slice(33, 36),
    "target axis": slice(36, 39),
    "pen - target position": slice(39, 42),
    "pen - target axis": slice(42, 45),
}
PEN_HEIGHT = 26  # index of the pen's height, m
FALL_HEIGHT = 0.075  # m; below it the pen has fallen
STATE_DIMS = slice(0, 36)  # what a state is made from; the rest is the target, and differences from it


def outcome(obs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reward, success and fall of the step that led to `obs` [..., 45]: in Adroit Pen all three are functions of it."""
    distance = np.linalg.norm(obs[..., 39:42], axis=-1)
    similarity = (obs[..., 33:36] * obs[..., 36:39]).sum(-1)
    near, fallen = distance < 0.075, obs[..., PEN_HEIGHT] < FALL_HEIGHT
    success = near & (similarity > 0.95)
    reward = similarity - distance + 10.0 * (near & (similarity > 0.9)) + 50.0 * success - 5.0 * fallen
    return reward, success, fallen


def with_goal(obs: np.ndarray, start: np.ndarray) -> np.ndarray:
    """`obs` [..., 45] of a simulation with any target, as with the target axis of `start` [..., 45]; changed in place."""
    obs[..., 36:39] = start[..., 36:39]
    obs[..., 42:45] = obs[..., 33:36] - start[..., 36:39]
    return obs


def perturb(obs: np.ndarray, size: float, rng: np.random.Generator, variance: np.ndarray) -> np.ndarray:
    """`obs` [..., 45] (environment space) with independent Gaussian noise: how large an error does an estimator see?

    The noise has `size` standard deviations of the data, whose `variance` [45] is given, in the dimensions `STATE_DIMS`. The
    result is a possible observation again, so that only the dynamics are wrong: the pen's axis keeps its length, and the
    differences from the target, entries 39 to 44, follow the pen.
    """
    obs, std = np.asarray(obs, dtype=np.float64), np.sqrt(np.asarray(variance, dtype=np.float64))
    std[STATE_DIMS.stop :] = 0.0
    noisy = obs + size * std * rng.normal(size=obs.shape)
    length, noisy_length = (np.linalg.norm(x[..., 33:36], axis=-1, keepdims=True) for x in (obs, noisy))
    noisy[..., 33:36] *= length / noisy_length
    for own, difference in ((slice(24, 27), slice(39, 42)), (slice(33, 36), slice(42, 45))):
        noisy[..., difference] += noisy[..., own] - obs[..., own]
    return noisy


def state_from_observations(
    obs: np.ndarray, actions: np.ndarray, origin: np.ndarray, rest: np.ndarray, kick: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Joint positions and velocities [..., T, 30] of consecutive observations [..., T, 45] (environment space).

    The pen's pose and velocity are exact but for the roll about its own axis, which the observation does not hold: roll is
    integrated from its rate, from zero at the first observation. Hand velocities are central differences of the joint
    angles, one-sided at both ends, corrected for the change in the middle of the `actions` [..., T, 24], taken at the
    observations, by `kick` [24, 24] (`kick_response`). `origin` [3] and `rest` [3, 3] are the frame in which the pen's
    joints count. An observation right after a reset is no special case for the pen.
    """
    qpos, qvel = np.zeros((2, *obs.shape[:-1], STATE_DIM))
    hand = obs[..., :24]
    qpos[..., :24] = hand
    if obs.shape[-2] > 2:
        qvel[..., :24] = np.gradient(hand, CONTROL_DT, axis=-2, edge_order=2)
        change = np.diff(np.clip(actions, -1.0, 1.0), axis=-2)
        qvel[..., 1:-1, :24] += change[..., :-1, :] @ kick
        qvel[..., 0, :24] -= change[..., 0, :] @ kick
    elif obs.shape[-2] == 2:
        qvel[..., :24] = np.gradient(hand, CONTROL_DT, axis=-2)
    rates = obs[..., 27:33]
    qvel[..., 24:] = rates

    # Body positions lag the joints by one substep of semi-implicit Euler, q += dt v: add it back.
    qpos[..., 24:27] = (obs[..., 24:27] - origin) @ rest + SUBSTEP_DT * rates[..., :3]
    n = obs[..., 33:36] @ rest
    n = n / np.maximum(np.linalg.norm(n, axis=-1, keepdims=True), 1e-12)
    qpos[..., 27:29] = _pen_hinges(n, rates[..., 3:5]) + SUBSTEP_DT * rates[..., 3:5]
    # Trapezoid rule from the first observation.
    roll = rates[..., 5]
    qpos[..., 1:, 29] = np.cumsum((roll[..., 1:] + roll[..., :-1]) / 2 * CONTROL_DT, -1)
    return qpos, qvel


def _pen_hinges(n, rates):
    """Hinge angles x, y [..., T, 2] of the pen axis n [..., T, 3] in its rest frame, R_x R_y e_z = n; `rates` are theirs.

    (x, y) and (x + pi, pi - y) give the same axis; of all such pairs, up to full turns, the one nearest to where the rates
    lead is taken, and nearest zero at the first. If y then runs against its rate, the window began on the other branch.
    """
    y = np.arcsin(np.clip(n[..., 0], -1.0, 1.0))
    x = np.arctan2(-n[..., 1], n[..., 2])
    branches = np.stack([np.stack([x, y], -1), np.stack([x + np.pi, np.pi - y], -1)], -2)  # [..., T, 2 branches, 2]
    turns = CONTROL_DT * (rates[..., 1:, :] + rates[..., :-1, :]) / 2

    def follow(direction):
        path, guess, misfit = [], np.zeros_like(branches[..., 0, 0, :]), 0.0
        for t in range(n.shape[-2]):
            if t:
                guess = path[-1] + direction * turns[..., t - 1, :]
            turned = branches[..., t, :, :]
            turned = turned + 2 * np.pi * np.round((guess[..., None, :] - turned) / (2 * np.pi))
            away = np.abs(turned - guess[..., None, :]).sum(-1)
            path.append(np.take_along_axis(turned, away.argmin(-1)[..., None, None], -2)[..., 0, :])
            misfit = misfit + (away.min(-1) if t else 0.0)
        return np.stack(path, -2), np.asarray(misfit)[..., None, None]

    (same, misfit), (other, other_misfit) = follow(np.array([1, 1])), follow(np.array([1, -1]))
    return np.where(other_misfit < misfit, [np.pi, np.pi] + other * [1, -1], same)


def kick_response(batch: Any) -> np.ndarray:
    """[24, 24]: what to add to a central difference of the hand's joint angles, for each unit of change of each action.

    Where the action changes, the acceleration jumps by Δ, and the central difference over one step h on both sides is off by
    Δ h / 4. Δ is measured, in a `batch` of 25 simulations at rest: one action kicked at a time, the true velocity
    against the difference.
    """
    actions, size = np.zeros((25, ACTION_DIM)), 0.2
    for _ in range(10):
        batch.step(actions)
    before, _, _ = batch.state()
    batch.step(actions)
    _, velocity, _ = batch.state()
    actions[1:] += size * np.eye(ACTION_DIM)
    batch.step(actions)
    after, _, _ = batch.state()
    missing = (velocity - (after - before) / (2 * CONTROL_DT))[:, :ACTION_DIM]
    return (missing[1:] - missing[0]) / size
