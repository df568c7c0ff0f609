"""The simulator on its own from a trajectory's state: its own actions played on, and rollouts of a policy."""

from functools import partial

import numpy as np
import pytest
from conftest import pairs, replay
from gymnasium_robotics.envs.adroit_hand import AdroitHandPenEnv

from pgdlib import dynamics
from pgdlib.dynamics import OpenLoopError
from pgdlib.simulators.pen import PEN

dynamics_error, open_loop_error, rollout_from, play = (
    partial(f, PEN) for f in (dynamics.dynamics_error, dynamics.open_loop_error, dynamics.rollout_from, dynamics.replay)
)
state_from_observations = PEN.states["reconstructed"]

ONES = np.ones(45)
MOVING = np.r_[0:36, 39:42]  # what a step of the simulator gives, whatever the target


def test_open_loop_begins_with_the_one_step_error(real):
    obs, actions = pairs(real)
    error = open_loop_error(obs, actions, ONES, 4)
    np.testing.assert_array_equal(error.squared[:, 0], dynamics_error(obs, actions, ONES).squared[:, 1])
    assert error.squared.shape == (8, 4, 45) and (error.squared[:, 1:] != error.squared[:, :1]).any((0, 2)).all()


def stays_near(episodes):
    """Far below the error of standing still, up to ten steps; measured 1/200 of it or less."""
    obs, actions = (np.concatenate(x) for x in zip(*(pairs(episodes, 16, 12, first) for first in (0, 20, 50))))
    error = open_loop_error(obs, actions, obs.var((0, 1)), 10)
    nothing = ((obs[:, 2:] - obs[:, 1:2]) ** 2 / error.variance).mean((0, 2))
    assert not error.unjudged.any() and (error.by_step() < nothing / 100).all()


def test_open_loop_stays_near_random_episodes(real):
    stays_near(real)


def test_open_loop_stays_near_the_guides_episodes(guided):
    stays_near(guided)


def test_open_loop_and_its_replay_are_gym_playing_the_actions(real):
    obs, actions = pairs(real, 3, 10, first=50)
    variance = np.linspace(0.5, 9, 45)
    error = open_loop_error(obs, actions, variance, 8)
    qpos, qvel = state_from_observations(obs, actions)
    env = AdroitHandPenEnv()
    for i in range(3):
        state = dict(qpos=qpos[i, 1], qvel=qvel[i, 1], desired_orien=real.goals[i])
        env.reset(seed=0, options={"initial_state_dict": state})
        steps = [(env.step(actions[i, 1 + k])[0] - obs[i, 2 + k], env.data.qpos.copy()) for k in range(8)]
        expected, joints = (np.stack(x) for x in zip(*steps))
        np.testing.assert_allclose(error.squared[i], expected**2, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(error.plain[i], (expected**2).mean(1), rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(error.normalised[i], (expected**2 / variance).mean(1), rtol=1e-5, atol=1e-9)
        played = play(obs[i], actions[i], variance)
        np.testing.assert_allclose(played.imagined, qpos[i, 1:], rtol=1e-12)
        np.testing.assert_array_equal(played.simulated[0], played.imagined[0])
        np.testing.assert_allclose(played.simulated[1:], joints, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(played.error, [0, *error.normalised[i]])
        np.testing.assert_array_equal(played.start, obs[i, 1])


def test_open_loop_measures_a_jump_from_its_step_on(real):
    """The simulator does not follow, so the error is off by δ, up to what it was."""
    obs, actions = pairs(real, 8, 14)
    before, delta = open_loop_error(obs, actions, ONES, 12), np.array([2.0, -3, 4])
    wrong = obs.copy()
    wrong[:, 7:, 27:30] += delta
    after = open_loop_error(wrong, actions, ONES, 12)
    np.testing.assert_array_equal(after.squared[:, :5], before.squared[:, :5])  # k = 6 is the first to see step 7
    own, found = (np.sqrt(e.squared[:, 5:]) for e in (before, after))
    assert (np.abs(found[..., 27:30] - np.abs(delta)) <= own[..., 27:30] + 1e-9).all()
    assert (after.plain[:, 5:] > before.plain[:, 5:]).all()
    np.testing.assert_array_equal(np.delete(found, np.r_[27:30], 2), np.delete(own, np.r_[27:30], 2))


def test_open_loop_keeps_the_target_of_its_start(real):
    obs, actions = pairs(real, 3, 8)
    plain = open_loop_error(obs, actions, ONES, 6).squared
    np.testing.assert_array_equal(plain[..., 36:39], 0)
    obs[..., 36:39] = np.random.default_rng(0).normal(size=(3, 8, 3))
    moved = open_loop_error(obs, actions, ONES, 6).squared
    np.testing.assert_allclose(moved[..., 36:39], (obs[:, 2:, 36:39] - obs[:, 1:2, 36:39]) ** 2)
    np.testing.assert_array_equal(moved[..., MOVING], plain[..., MOVING])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("garbage", [3.0, np.nan, 1e9])
def test_open_loop_ends_with_the_trajectory(real, garbage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    obs, actions = pairs(real, 7, 20, first=60)
    lengths = np.array([20, 17, 9, 4, 3, 2, 1])
    alive = (np.arange(20) < lengths[:, None]).astype(float)
    for values in (obs, actions):
        values[alive == 0] = garbage
    error = open_loop_error(obs, actions, ONES, 18, alive)
    for i, n in enumerate(lengths):
        lived = max(n - 2, 0)  # k up to the trajectory's last step
        assert error.lasts[i].tolist() == [True] * lived + [False] * (18 - lived)
        assert np.isnan(error.squared[i, lived:]).all()
        if lived:
            expected = open_loop_error(obs[i : i + 1, :n], actions[i : i + 1, :n], ONES, lived)
            np.testing.assert_array_equal(error.squared[i, :lived], expected.squared[0])
    assert not list(tmp_path.iterdir())  # MuJoCo had nothing to log: it never saw what stands beyond an end
    assert not error.unjudged.any()  # they ended; no error is missing


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_open_loop_is_nan_where_it_cannot_be_judged(quiet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo logs its warnings in the working folder
    clean = open_loop_error(*quiet, ONES, 10)
    for which, place, value, lost in (
        (0, (1, 1, 3), 30.0, range(10)),  # a start with a joint far beyond its limits
        (0, (1, 1, 29), np.nan, range(10)),
        (0, (1, 1, 32), 301.0, range(10)),  # a start that is too fast
        (0, (1, 7, 30), np.nan, [5]),  # nothing to compare with, at k = 6
        (0, (1, 7, 30), np.inf, [5]),
        (1, (1, 7, 3), np.nan, range(6, 10)),  # the simulator gives up on the action after step 7
    ):
        broken = [x.copy() for x in quiet]
        broken[which][place] = value
        error, lost = open_loop_error(*broken, ONES, 10), list(lost)
        assert np.flatnonzero(np.isnan(error.plain[1])).tolist() == lost, (place, value)
        assert np.flatnonzero(error.unjudged).tolist() == lost and set(error.unjudged) <= {0, 1}
        for row in (0, 2, 3):
            np.testing.assert_array_equal(error.squared[row], clean.squared[row])
        np.testing.assert_array_equal(np.delete(error.squared[1], lost, 0), np.delete(clean.squared[1], lost, 0))
    obs, actions = quiet
    nowhere = open_loop_error(np.full_like(obs, np.nan), actions, ONES, 10)
    assert np.isnan(nowhere.squared).all() and nowhere.unjudged.tolist() == [4] * 10


def test_open_loop_means_by_hand():
    squared, variance = np.random.default_rng(0).random((3, 2, 45)), np.full(45, 0.5)
    squared[0], squared[1, 1] = np.nan, np.nan
    error = OpenLoopError(squared, variance, {}, np.array([[True, True], [True, False], [True, True]]))
    np.testing.assert_allclose(error.normalised, 2 * squared.mean(2))
    np.testing.assert_allclose(error.plain, squared.mean(2))
    np.testing.assert_allclose(error.by_step(), [2 * squared[1:, 0].mean(), 2 * squared[2, 1].mean()])
    assert error.unjudged.tolist() == [1, 1]  # the second has ended


@pytest.mark.parametrize("steps", [0, 39])
def test_open_loop_needs_steps_to_play(quiet, steps):
    assert np.isfinite(open_loop_error(*quiet, ONES, 38).plain).all()  # to the last step
    with pytest.raises(ValueError, match=f"steps={steps} is not allowed; it must be 1 to 38, for trajectories of 40 steps"):
        open_loop_error(*quiet, ONES, steps)


def test_open_loop_of_no_trajectory_is_empty(quiet):
    assert open_loop_error(*(x[:0] for x in quiet), ONES, 5).normalised.shape == (0, 5)


# Replays: the same as joint positions


def test_replay_of_a_true_trajectory_stays_near_it(guided):
    """Hand joints and pen position, to a tenth of how far they move; measured 1/20 or less."""
    obs, actions = pairs(guided, 8, 12, first=20)
    for i in range(8):
        played, true = play(obs[i], actions[i], ONES), guided.qpos[i, 21:32, :27]
        np.testing.assert_allclose(played.imagined[:, :27], true, rtol=0, atol=1e-6)
        assert np.abs(played.simulated[:, :27] - true).mean() < np.abs(true - true[0]).mean() / 10


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_replay_shows_what_there_is(quiet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo logs its warnings in the working folder
    K = 38
    for which, place, value, gone in (
        (0, (1, 3), 30.0, range(K + 1)),  # a start with a joint far beyond its limits
        (1, (7, 3), np.nan, range(7, K + 1)),  # the simulator gives up on the action of step 7
        (1, (1, 3), np.nan, range(K + 1)),  # no velocity at the start
    ):
        broken = [x[1].copy() for x in quiet]
        broken[which][place] = value
        played = play(*broken, ONES)
        assert np.isfinite(played.imagined).all() and len(played.imagined) == K + 1
        for values in (played.simulated, played.error[:, None]):
            np.testing.assert_array_equal(np.flatnonzero(np.isnan(values).all(1)), gone)
            assert np.isfinite(np.delete(values, gone, 0)).all()
    obs, actions = (x[1].copy() for x in quiet)
    obs[7, 3] = np.nan
    played = play(obs, actions, ONES)
    assert np.isfinite(played.simulated).all() and np.flatnonzero(np.isnan(played.error)).tolist() == [6]
    assert np.flatnonzero(np.isnan(played.imagined).any(1)).tolist()[0] <= 6  # its velocity, too


# Rollouts from given trajectories


def test_rollout_from_a_trajectory_with_its_own_actions_is_that_trajectory(real):
    """What a true episode's own actions do from its middle is what happened, to the accuracy of the reconstruction."""
    obs, actions = real.obs[:, 3:20], real.actions[:, 3:20]
    seen, acted = rollout_from(obs, actions, replay(actions[:, 1:]), 8)
    assert seen.shape == (16, 8, 45) and np.array_equal(acted, actions[:, 1:9])
    np.testing.assert_array_equal(seen[:, 0], obs[:, 1])
    variance = real.obs.reshape(-1, 45).var(0) + 1e-12
    expected = open_loop_error(obs, actions, variance, 7).squared
    np.testing.assert_allclose((seen[:, 1:] - obs[:, 2:9]) ** 2, expected, rtol=1e-9, atol=1e-18)


def test_rollout_from_gives_the_policy_what_it_sees_and_nan_out_of_reach(real):
    obs, actions, asked = real.obs[:4, :10].copy(), real.actions[:4, :10], []
    obs[2, :, 24:27] = 50.0  # a pen 50 m away

    def act(o):
        asked.append(o.copy())
        return np.zeros((4, 24))

    seen, acted = rollout_from(obs, actions, act, 5)
    np.testing.assert_array_equal(np.stack(asked, 1)[[0, 1, 3]], seen[[0, 1, 3]])
    assert np.isnan(seen[2]).all() and np.isnan(acted[2]).all() and np.isfinite(seen[[0, 1, 3]]).all()
    np.testing.assert_array_equal(seen[0, :, 36:39], np.tile(obs[0, 1, 36:39], (5, 1)))
    np.testing.assert_allclose(seen[0, :, 42:45], seen[0, :, 33:36] - seen[0, :, 36:39])
