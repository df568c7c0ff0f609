"""Observation to simulator state: what Adroit Pen's observation does not say, computed from its neighbours in time."""

from functools import cache

import numpy as np

from pgdlib.simulators.pen import CONTROL_DT, SUBSTEP_DT, PenBatch, pen_rest_pose


def state_from_observations(obs, actions=None):
    """Joint positions and velocities [..., T, 30] of consecutive observations [..., T, 45] (environment space).

    The pen's pose and velocity are exact but for the roll about its own axis, which the observation does not hold: roll is
    integrated from its rate, from zero at the first observation. Hand velocities are central differences of the joint
    angles, one-sided at both ends; with the `actions` [..., T, 24] taken at the observations, they are corrected for the
    change of action in the middle (`kick_response`). An observation right after a reset is no special case for the pen.
    """
    qpos, qvel = np.zeros((2, *obs.shape[:-1], 30))
    hand = obs[..., :24]
    qpos[..., :24] = hand
    if obs.shape[-2] > 2:
        qvel[..., :24] = np.gradient(hand, CONTROL_DT, axis=-2, edge_order=2)
        if actions is not None:
            change = np.diff(np.clip(actions, -1.0, 1.0), axis=-2)
            qvel[..., 1:-1, :24] += change[..., :-1, :] @ kick_response()
            qvel[..., 0, :24] -= change[..., 0, :] @ kick_response()
    elif obs.shape[-2] == 2:
        qvel[..., :24] = np.gradient(hand, CONTROL_DT, axis=-2)
    rates = obs[..., 27:33]
    qvel[..., 24:] = rates

    origin, rest = pen_rest_pose()  # the frame in which the pen's joints count
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


@cache
def kick_response():
    """[24, 24]: what to add to a central difference of the hand's joint angles, for each unit of change of each action.

    Where the action changes, the acceleration jumps by Δ, and the central difference over one step h on both sides is off by
    Δ h / 4. Δ is measured: a hand at rest, one action kicked at a time, the true velocity against the difference.
    """
    batch, actions, size = PenBatch(25, threads=1), np.zeros((25, 24)), 0.2
    batch.reset(np.tile([1.0, 0.0, 0.0, 0.0], (25, 1)))
    for _ in range(10):
        batch.step(actions)
    before, _, _ = batch.state()
    batch.step(actions)
    _, velocity, _ = batch.state()
    actions[1:] += size * np.eye(24)
    batch.step(actions)
    after, _, _ = batch.state()
    missing = (velocity - (after - before) / (2 * CONTROL_DT))[:, :24]
    return (missing[1:] - missing[0]) / size
