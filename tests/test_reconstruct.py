"""Simulator states from observations, against the states that the simulator had."""

import mujoco
import numpy as np
import pytest
from conftest import replay, white
from gymnasium_robotics.envs.adroit_hand import AdroitHandPenEnv

from pgdlib.simulators import pen as adroit
from pgdlib.simulators.episodes import Episodes
from pgdlib.simulators.pen import PenBatch
from pgdlib.simulators.pen_states import kick_response


def state_from_observations(obs, actions=None):
    """Without actions, as of the same action all the time."""
    return adroit.reconstructed(obs, np.zeros((*obs.shape[:-1], 24)) if actions is None else actions)


def one_step_error(episodes, qpos, qvel, first=0, n=8):
    """MSE over the observation [n, T] of one step from the states qpos, qvel [n, T + 1, 30] of steps `first` onwards."""
    qpos, qvel = qpos[:n], qvel[:n]
    actions, successors = episodes.actions[:n, first:], episodes.obs[:n, first + 1 :]
    steps = actions.shape[1]
    batch = PenBatch(n * steps)
    batch.set_state(qpos[:, :-1].reshape(-1, 30), qvel[:, :-1].reshape(-1, 30), np.repeat(episodes.goals[:n], steps, 0))
    return np.square(batch.step(actions.reshape(-1, 24)).reshape(successors.shape) - successors).mean(-1)


def turns_apart(a, b):
    """|a - b| of angles, up to full turns."""
    return np.abs((a - b + np.pi) % (2 * np.pi) - np.pi)


def test_reconstruction_of_whole_episodes(real):
    qpos, qvel = state_from_observations(real.obs)
    np.testing.assert_array_equal(qpos[..., :24], real.qpos[..., :24])
    np.testing.assert_allclose(qpos[..., 24:29], real.qpos[..., 24:29], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(qvel[..., 24:], real.qvel[..., 24:])
    assert (np.abs(real.qpos[..., 28]) > np.pi / 2).mean() > 0.1  # the pen did turn past the arcsin's branch
    assert np.abs(real.qpos[..., 29]).max() > 1  # and rolled
    assert np.abs(qpos[..., 29] - real.qpos[..., 29]).max() < 0.05  # measured 0.02 rad


@pytest.mark.slow
def test_one_step_error(real):
    still = np.square(np.diff(real.obs, axis=1)).mean()
    assert one_step_error(real, real.qpos, real.qvel).mean() < 1e-8
    error = one_step_error(real, *state_from_observations(real.obs))
    assert error.mean() < 1e-3 and error.mean() < still / 20
    assert error[:, 0].mean() < 1e-3  # the first step, with a one-sided difference
    window = Episodes(**{**vars(real), "actions": real.actions[:, :20], "obs": real.obs[:, :21]})
    state = state_from_observations(real.obs[:, :20])  # ends before its last successor: one-sided there
    padded = [np.concatenate([s, s[:, -1:]], 1) for s in state]
    assert one_step_error(window, *padded, n=16)[:, -1].mean() < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("first", [20, 60, 100, 150])
def test_reconstruction_from_mid_episode(real, first):
    qpos, qvel = state_from_observations(real.obs[:, first:])
    np.testing.assert_allclose(qpos[..., 24:27], real.qpos[:, first:, 24:27], rtol=0, atol=1e-6)
    assert turns_apart(qpos[..., 27:29], real.qpos[:, first:, 27:29]).max() < 1e-6
    rolled = [q[..., 29] - q[..., :1, 29] for q in (qpos, real.qpos[:, first:])]  # only the change of roll is observable
    assert np.abs(rolled[0] - rolled[1]).max() < 0.05
    assert one_step_error(real, qpos, qvel, first).mean() < 1e-3


def test_reconstruction_of_one_observation(real):
    qpos, qvel = state_from_observations(real.obs[:, :1])  # right after a reset
    np.testing.assert_allclose(qpos, real.qpos[:, :1], atol=1e-9)
    np.testing.assert_allclose(qvel, 0, atol=1e-9)
    qpos, qvel = state_from_observations(real.obs[:, 10:11])
    np.testing.assert_allclose(qpos[..., :29], real.qpos[:, 10:11, :29], atol=1e-6)
    np.testing.assert_array_equal(qvel[..., 24:], real.qvel[:, 10:11, 24:])
    np.testing.assert_array_equal(qvel[..., :24], 0)  # unknown


def test_reconstruction_of_any_leading_dimensions(real):
    flat = state_from_observations(real.obs[:6, :40])
    for whole, folded in zip(flat, state_from_observations(real.obs[:6, :40].reshape(2, 3, 40, 45))):
        np.testing.assert_array_equal(folded.reshape(6, 40, 30), whole)
    for whole, single in zip(flat, state_from_observations(real.obs[4, :40])):
        np.testing.assert_array_equal(single, whole[4])


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -1e12, 0.0])
def test_garbage_stays_where_it_is(real, garbage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo logs its warnings in the working folder
    clean = state_from_observations(real.obs[:4, :20])
    obs = real.obs[:4, :20].copy()
    obs[1] = garbage
    qpos, qvel = state_from_observations(obs)
    for state, expected in ((qpos, clean[0]), (qvel, clean[1])):
        np.testing.assert_array_equal(state[[0, 2, 3]], expected[[0, 2, 3]])
    batch = PenBatch(4)
    batch.set_state(qpos[:, 5], qvel[:, 5], real.goals[:4])
    after = [batch.step(real.actions[:4, 5 + k]) for k in range(2)][-1]
    if garbage != 0:
        assert np.isnan(after[1]).all()  # not MuJoCo's silent return to the start
    batch.set_state(qpos[:, 5][[0, 0, 2, 3]], qvel[:, 5][[0, 0, 2, 3]], real.goals[[0, 0, 2, 3]])
    again = [batch.step(real.actions[[0, 0, 2, 3], 5 + k]) for k in range(2)][-1]  # usable afterwards
    np.testing.assert_array_equal(again[[0, 2, 3]], after[[0, 2, 3]])
    np.testing.assert_array_equal(again[1], again[0])


def with_last(actions):
    """Actions at all T + 1 observations: the last one is the agent's to choose, and has no successor."""
    return np.concatenate([actions, -actions[:, -1:]], 1)


def test_actions_correct_the_hand_velocity():
    rng = np.random.default_rng(4)
    played = adroit.rollout(replay(white(rng, 8, 100)), 8, rng, 100)
    without, given = (
        np.abs(state_from_observations(played.obs, a)[1] - played.qvel)[..., :24] for a in (None, with_last(played.actions))
    )
    assert given[:, 1:-1].mean() < without[:, 1:-1].mean() / 3  # measured a fifth
    assert given[:, 0].mean() < without[:, 0].mean()  # one-sided, after the reset
    np.testing.assert_array_equal(given[:, -1], without[:, -1])  # nothing after it is known


def test_actions_change_nothing_but_the_hand_velocity(real):
    plain, given = (state_from_observations(real.obs[:4], a) for a in (None, with_last(real.actions[:4])))
    np.testing.assert_array_equal(given[0], plain[0])
    np.testing.assert_array_equal(given[1][..., 24:], plain[1][..., 24:])
    constant = state_from_observations(real.obs[:4], np.full((4, 201, 24), 0.7))
    np.testing.assert_array_equal(constant[1], plain[1])
    clipped = state_from_observations(real.obs[:4], with_last(real.actions[:4]).clip(-1, 1))  # as the simulator clips them
    assert np.abs(real.actions[:4]).max() > 1
    np.testing.assert_array_equal(clipped[1], given[1])


@pytest.mark.slow
def test_one_step_error_of_the_guide(guided):
    """Measured 1.5e-4 for sampled actions and 4e-5 for mean ones."""
    without, given = (
        one_step_error(guided, *state_from_observations(guided.obs, a)).mean() for a in (None, with_last(guided.actions))
    )
    assert given <= 1e-3 and given < without


def test_kick_response_is_that_of_the_equations_of_motion():
    """An action moves the acceleration by M⁻¹ F (with the integrator's implicit damping), the difference by a quarter of it."""
    env = AdroitHandPenEnv()
    env.reset(seed=0)
    for _ in range(10):
        env.step(np.zeros(24))
    model, data, inertia = env.model, env.data, np.zeros((30, 30))
    mujoco.mj_fullM(model, data, inertia)
    force = np.zeros((30, 24))
    force[model.jnt_dofadr[model.actuator_trnid[:, 0]], range(24)] = model.actuator_gainprm[:, 0] * env.act_rng
    expected = -np.linalg.solve(inertia + model.opt.timestep * np.diag(model.dof_damping), force)[:24].T * 0.01 / 4
    response = kick_response(PenBatch(25, threads=1))
    assert response.shape == (24, 24) and np.isfinite(response).all()
    assert (np.diag(response) < 0).all()
    assert (np.abs(response).argmax(1) == np.arange(24)).all()  # an action moves its own joint most
    assert np.corrcoef(response.ravel(), expected.ravel())[0, 1] > 0.95  # measured 0.99; the rest is contact
    assert np.median(np.diag(response) / np.diag(expected)) == pytest.approx(1, abs=0.15)  # measured 1.05
