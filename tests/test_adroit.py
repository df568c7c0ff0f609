"""The simulator room against gymnasium's own Adroit Pen."""

from functools import partial

import numpy as np
import pytest
from conftest import at, replay, smooth, still, white
from gymnasium_robotics.envs.adroit_hand import AdroitHandPenEnv
from gymnasium_robotics.utils import rotations

from benchmarks.baselines import make_env
from pgdlib import simulators
from pgdlib.simulators import pen as adroit
from pgdlib.simulators import pen_states
from pgdlib.simulators.pen import PEN, PenBatch

advance = partial(simulators.advance, PEN)


def start(env, target, qpos=None, qvel=None):
    """Reset a gym environment to `target` and a state (the start by default); the observation."""
    sim = env.unwrapped
    state = {
        "qpos": sim.init_qpos if qpos is None else qpos,
        "qvel": sim.init_qvel if qvel is None else qvel,
        "desired_orien": target,
    }
    return env.reset(seed=0, options={"initial_state_dict": state})[0]


def play(env, target, actions):
    """A gym episode as arrays obs, reward, success, qpos, qvel, and whether it was terminated, truncated at its end."""
    obs, states, rewards, successes = [start(env, target)], [env.unwrapped.get_env_state()], [], []
    for action in actions:
        o, reward, terminated, truncated, info = env.step(action)
        obs.append(o)
        states.append(env.unwrapped.get_env_state())
        rewards.append(reward)
        successes.append(info["success"])
        if terminated or truncated:
            break
    qpos, qvel = (np.array([s[k] for s in states]) for k in ("qpos", "qvel"))
    return np.array(obs), np.array(rewards), np.array(successes), qpos, qvel, terminated, truncated


@pytest.fixture(scope="module")
def env():
    return AdroitHandPenEnv()


@pytest.fixture(scope="module")
def mixed():
    """Eight native episodes from three kinds of actions; the last has its target where the quiet pen lies."""
    rng = np.random.default_rng(1)
    actions = np.concatenate([white(rng, 2, 200), smooth(rng, 5, 200), still(rng, 1, 200)])
    targets = adroit.sample_targets(8, rng)
    targets[-1] = rotations.euler2quat([0, 1.3, 0])
    return adroit.rollout(replay(actions), 8, None, targets=targets)


def test_rollout_equals_the_gym_environment(env, mixed):
    seen_success = seen_fall = 0
    for i, target in enumerate(mixed.goals):
        obs, reward, success, qpos, qvel, *_ = play(env, target, mixed.actions[i])
        np.testing.assert_allclose(mixed.obs[i], obs, rtol=0, atol=1e-9)
        np.testing.assert_allclose(mixed.rewards[i], reward, rtol=0, atol=1e-9)
        np.testing.assert_allclose(mixed.qpos[i], qpos, rtol=0, atol=1e-9)
        np.testing.assert_allclose(mixed.qvel[i], qvel, rtol=0, atol=1e-9)
        np.testing.assert_array_equal(adroit.outcome(obs[1:])[1], success)
        np.testing.assert_array_equal(mixed.ended[i], obs[1:, 26] < 0.075)
        seen_success, seen_fall = seen_success + success.any(), seen_fall + mixed.ended[i].any()
    assert seen_success >= 1 and 2 <= seen_fall < 8  # else the test saw too little


def test_outcome_at_every_threshold(env):
    """Pens let go of near their targets, at heights about the fall: gym's reward and success from gym's observation."""
    rng = np.random.default_rng(5)
    similarity, distance, rewards = [], [], []
    for _ in range(600):
        qpos = env.init_qpos.copy()
        qpos[24:27] = rng.normal(size=3)
        qpos[24:27] *= rng.uniform(0.05, 0.1) / np.linalg.norm(qpos[24:27])
        qpos[24] += rng.choice([0, rng.uniform(0.15, 0.2)])  # the pen's own x points down
        start(env, rotations.euler2quat([0, np.pi / 2 + rng.uniform(0.2, 0.55), 0]), qpos)
        obs, reward, _, _, info = env.step(np.zeros(24))
        mine, success, fallen = adroit.outcome(obs)
        assert mine == pytest.approx(reward, abs=1e-9) and success == info["success"] and fallen == (obs[26] < 0.075)
        similarity.append(obs[33:36] @ obs[36:39])
        distance.append(np.linalg.norm(obs[39:42]))
        rewards.append(np.round(reward))
    assert min(similarity) < 0.9 < 0.95 < max(similarity) and min(distance) < 0.075 < max(distance)
    assert {-4, 1, 11, 61} <= set(rewards)


def test_named_slices_of_the_observation(env, mixed):
    obs = play(env, mixed.goals[0], mixed.actions[0][:50])[0][-1]
    part = {name: obs[s] for name, s in adroit.GROUPS.items()}
    data, sim = env.data, env
    goal = data.site("eps_ball").xpos
    np.testing.assert_array_equal(part["hand joints"], data.qpos[:24])
    np.testing.assert_array_equal(part["pen position"], data.xpos[sim.obj_body_id])
    np.testing.assert_array_equal(np.r_[part["pen linear velocity"], part["pen angular velocity"]], data.qvel[24:])
    for name, body in (("pen axis", sim.obj_body_id), ("target axis", sim.target_obj_body_id)):
        np.testing.assert_allclose(part[name], data.xmat[body].reshape(3, 3)[:, 2], atol=1e-12)  # along its own z
    np.testing.assert_allclose(part["pen - target position"], part["pen position"] - goal, atol=1e-12)
    np.testing.assert_allclose(part["pen - target axis"], part["pen axis"] - part["target axis"], atol=1e-12)
    assert sum(s.stop - s.start for s in adroit.GROUPS.values()) == adroit.OBS_DIM == len(obs)
    assert part["pen position"][2] == obs[pen_states.PEN_HEIGHT]
    assert sim.dt == PEN.dt == adroit.N_SUBSTEPS * pen_states.SUBSTEP_DT


def test_the_number_of_threads_changes_nothing(mixed):
    again = adroit.rollout(replay(mixed.actions), 8, None, 100, targets=mixed.goals, threads=3)
    np.testing.assert_array_equal(again.obs, mixed.obs[:, :101])


def test_reset_of_some_leaves_the_others_untouched(env):
    rng = np.random.default_rng(3)
    old, new, actions = adroit.sample_targets(4, rng), adroit.sample_targets(2, rng), smooth(rng, 4, 60)
    batch = PenBatch(4)
    batch.begin(*at(old))
    stream = [batch.step(actions[:, t]) for t in range(30)]
    first = batch.begin(*at(new), ids=[1, 3])
    np.testing.assert_array_equal(batch.observe()[[0, 2]], stream[-1][[0, 2]])
    stream = np.stack(stream + [batch.step(actions[:, t]) for t in range(30, 60)], 1)
    for i in (0, 2):
        np.testing.assert_allclose(stream[i], play(env, old[i], actions[i])[0][1:], rtol=0, atol=1e-9)
    for k, i in enumerate((1, 3)):
        obs = play(env, new[k], actions[i, 30:])[0]
        np.testing.assert_allclose(first[k], obs[0], rtol=0, atol=1e-9)
        np.testing.assert_allclose(stream[i, 30:], obs[1:], rtol=0, atol=1e-9)


def test_set_state_equals_gym(env, mixed):
    qpos, qvel, targets = mixed.qpos[:, 90], mixed.qvel[:, 90], mixed.goals[::-1]
    batch = PenBatch(8)
    batch.begin(*at(mixed.goals))
    batch.step(mixed.actions[:, 0])  # something to forget
    obs = batch.set_state(qpos, qvel, targets)
    after = batch.step(mixed.actions[:, 90])
    for i in range(8):
        np.testing.assert_allclose(obs[i], start(env, targets[i], qpos[i], qvel[i]), rtol=0, atol=1e-9)
        np.testing.assert_allclose(after[i], env.step(mixed.actions[i, 90])[0], rtol=0, atol=1e-9)
    for mine, theirs in zip(PenBatch.state(batch), (env.get_env_state()[k] for k in ("qpos", "qvel", "desired_orien"))):
        np.testing.assert_allclose(mine[-1], theirs, rtol=0, atol=1e-9)


def test_targets_are_drawn_as_gym_draws_them():
    quat = adroit.sample_targets(20_000, np.random.default_rng(0))
    euler = rotations.quat2euler(quat)
    np.testing.assert_allclose(rotations.euler2quat(euler * [1, 1, 0]), quat, atol=1e-12)
    x, y, _ = euler.T
    for angle in (x, y):
        np.testing.assert_allclose(np.quantile(angle, [0, 0.25, 0.5, 0.75, 1]), [-1, -0.5, 0, 0.5, 1], atol=0.03)
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.03
    begun = adroit.PenBatch(3, 1).set_state(*adroit.PEN.start(3, np.random.default_rng(1)))
    reset = adroit.PenBatch(3, 1).begin(*adroit.PEN.start(3, np.random.default_rng(1)))
    np.testing.assert_array_equal(begun, reset)


def test_d4rl_environment_ends_on_the_fall_and_counts_it(mixed):
    env, native = make_env("d4rl"), make_env("native")
    ends = set()
    for i, target in enumerate(mixed.goals):
        obs, reward, _, _, _, terminated, truncated = play(env, target, mixed.actions[i])
        fallen = obs[1:, 26] < 0.075
        ends.add((terminated, truncated))
        if terminated:
            assert fallen[-1] and not fallen[:-1].any() and len(reward) <= 100
            distance, similarity = np.linalg.norm(obs[-1, 39:42]), obs[-1, 33:36] @ obs[-1, 36:39]
            assert distance > 0.075  # so no bonus
            assert reward[-1] == pytest.approx(similarity - distance - 5, abs=1e-9)
        else:
            assert truncated and not fallen.any() and len(reward) == 100
        assert len(play(native, target, mixed.actions[i])[1]) == 200  # with or without a fall
    assert ends == {(True, False), (False, True)}


def test_native_environment_is_only_truncated(mixed):
    *_, terminated, truncated = play(make_env("native"), mixed.goals[0], np.concatenate([mixed.actions[0]] * 2))
    assert mixed.ended[0].any() and not terminated and truncated


def test_bad_scale_is_named():
    with pytest.raises(ValueError, match=r"scale must be one of d4rl, native; got 'huge'"):
        make_env("huge")


def test_returns_follow_from_native_episodes(mixed):
    env, native = make_env("d4rl"), make_env("native")
    d4rl = [play(env, target, actions)[1] for target, actions in zip(mixed.goals, mixed.actions)]
    np.testing.assert_array_equal(mixed.lengths(100), [len(r) for r in d4rl])
    np.testing.assert_allclose(mixed.returns(100), [r.sum() for r in d4rl], atol=1e-9)
    np.testing.assert_allclose(
        mixed.rewards.sum(1), [play(native, t, a)[1].sum() for t, a in zip(mixed.goals, mixed.actions)], atol=1e-9
    )


def test_normalised_score_at_the_reference_points():
    np.testing.assert_allclose(adroit.PEN.score(np.array([96.262799, 3076.833073])), [0, 100], atol=1e-9)
    assert adroit.PEN.score(2 * 3076.833073 - 96.262799) == pytest.approx(200)


def test_actions_that_are_not_finite_give_no_observation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    batch = PenBatch(2)
    targets = adroit.sample_targets(2, np.random.default_rng(0))
    batch.begin(*at(targets))
    actions = np.zeros((2, 24))
    actions[0, 3] = np.nan
    obs = batch.step(actions)
    assert np.isnan(obs[0]).all() and np.isfinite(obs[1]).all()
    assert np.isnan(batch.step(0 * actions[[1, 1]])[0]).all()  # until it is reset
    assert np.isfinite(batch.begin(*at(targets[:1]), ids=[0])).all()
    assert np.isfinite(batch.step(0 * actions[[1, 1]])).all()


def test_advance_is_one_gym_step_from_each_state(env, mixed):
    qpos, qvel, actions = mixed.qpos[:, 40:44].reshape(-1, 30), mixed.qvel[:, 40:44].reshape(-1, 30), mixed.actions[:, 40:44]
    after = advance(qpos, qvel, actions.reshape(-1, 24))
    own = np.r_[0:36, 39:42]  # all but the target's axis
    for i, action in enumerate(actions.reshape(-1, 24)):
        start(env, mixed.goals[0], qpos[i], qvel[i])
        np.testing.assert_allclose(after[i][own], env.step(action)[0][own], rtol=0, atol=1e-9)
    np.testing.assert_array_equal(advance(qpos, qvel, actions.reshape(-1, 24), chunk=7), after)
    assert advance(qpos[:0], qvel[:0], actions.reshape(-1, 24)[:0]).shape == (0, 45)


def test_advance_marks_what_cannot_be_simulated(mixed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    qpos, qvel, actions = mixed.qpos[:, 40].copy(), mixed.qvel[:, 40].copy(), mixed.actions[:, 40].copy()
    clean = advance(qpos, qvel, actions)
    qpos[0, 3], qpos[2, 25], qvel[3, 29], actions[5, 0] = np.nan, 50.0, np.inf, np.nan
    after, bad = advance(qpos, qvel, actions), [0, 2, 3, 5]
    assert np.isnan(after[bad]).all()
    np.testing.assert_array_equal(np.delete(after, bad, 0), np.delete(clean, bad, 0))
    assert np.isnan(advance(qpos * np.nan, qvel, actions)).all()


def test_real_states_are_within_reach(real):
    assert adroit.within_reach(real.qpos.reshape(-1, 30), real.qvel.reshape(-1, 30)).all()
