"""Hopper, Walker2d and HalfCheetah against gymnasium's own environments, and an environment of the reader's own."""

import re
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from conftest import replay

from pgdlib import dynamics
from pgdlib.simulators import advance, locomotion
from pgdlib.simulators.episodes import rollout

IDS = {"hopper": "Hopper-v5", "walker2d": "Walker2d-v5", "halfcheetah": "HalfCheetah-v5"}
every = pytest.mark.parametrize("name", IDS)


def actions_of(simulator, n, steps, seed=0):
    """Random actions that change slowly enough to move, some out of range."""
    drawn = np.random.default_rng(seed).normal(0, 0.8, (n, steps + 1, simulator.action_dim))
    return 0.7 * drawn[:, 1:] + 0.5 * drawn[:, :-1]


def played(simulator, n=24, steps=60, seed=0, whole=True):
    """`Episodes` of random actions, whatever ends where they are `whole`."""
    actions, rng = actions_of(simulator, n, steps, seed), np.random.default_rng(seed)
    return rollout(simulator, replay(actions), n, rng, steps, threads=1, whole=whole)


@every
def test_a_batch_is_the_gym_environment_over_whole_episodes(name):
    simulator, n = locomotion.runner(name), 3
    actions, rng = actions_of(simulator, n, simulator.horizon), np.random.default_rng(7)
    batch, starts = simulator.batch(n, 2), simulator.start(n, np.random.default_rng(7))
    ours = [batch.set_state(*starts)] + [batch.step(actions[:, t]) for t in range(simulator.horizon)]
    for i, seed in enumerate(rng.integers(2**31, size=n).tolist()):
        env = gymnasium.make(IDS[name]).unwrapped
        obs, _ = env.reset(seed=seed)
        np.testing.assert_array_equal(ours[0][i], obs)
        for t in range(simulator.horizon):
            obs = env.step(actions[i, t].clip(-1, 1))[0]
            np.testing.assert_allclose(ours[t + 1][i], obs, rtol=0, atol=1e-9)
    assert simulator.horizon == 1_000 and np.std(ours[-1][:, 2:]) > 0.1


def windows(name, steps=32):
    """obs, actions [72, 32, ...] and qvel of rollouts as data hold them, in float32; and the variance."""
    simulator = locomotion.runner(name)
    parts = (vars(played(simulator, steps=3 * steps))[k].astype(np.float32) for k in ("obs", "actions", "qvel"))
    obs, actions, qvel = (x[:, : 3 * steps].reshape(-1, steps, x.shape[-1]) for x in parts)
    return simulator, obs, actions, qvel, obs.reshape(-1, obs.shape[-1]).var(0)


@every
def test_the_floor_of_the_dynamics_error_is_rounding(name):
    """Also where velocities are clipped in the observation, as most steps of Walker2d are."""
    simulator, obs, actions, qvel, variance = windows(name)
    velocities = slice(simulator.obs_dim - simulator.qvel_dim, None)
    clipped = (obs[..., velocities] != qvel).any(-1)
    assert clipped.mean() > (0.7 if name == "walker2d" else 0.02) or (name == "halfcheetah" and not clipped.any())
    error = dynamics.dynamics_error(simulator, obs, actions, variance)
    exact = error.normalised < 1e-10
    assert error.unjudged == 0 and (exact.all() or name == "walker2d")
    assert exact.mean() > 0.95  # two velocities of a joint at its limit can lead to one position
    assert dynamics.dynamics_error(simulator, obs, actions[:, ::-1], variance).normalised.min() > 1e-4
    if name != "halfcheetah":  # whose many steps in contact amplify what float32 leaves out
        assert np.median(dynamics.open_loop_error(simulator, obs, actions, variance, 10).normalised) < 1e-10
    found = simulator.states["reconstructed"](obs.astype(float), actions)[1]
    np.testing.assert_allclose(found[clipped & exact[:, None]], qvel[clipped & exact[:, None]], rtol=1e-3)


def test_a_clipped_velocity_goes_no_way_that_its_observation_excludes():
    simulator, obs, actions, _, variance = windows("walker2d")
    broken = obs.copy()
    broken[..., -3:] = -broken[..., -3:]
    found = simulator.states["reconstructed"](broken.astype(float), actions)[1]
    shown = broken[..., -9:]
    assert (found.clip(-10, 10) == shown).all()
    assert dynamics.dynamics_error(simulator, broken, actions, variance).normalised.min() > 1e-3
    broken[0, 3], broken[1, 0] = np.nan, 1e9  # neither stops what can be judged
    error = dynamics.dynamics_error(simulator, broken, actions, variance)
    assert error.unjudged == 2 and np.isnan(error.normalised[:2]).all()


@every
def test_reward_and_end_are_the_environments(name):
    """But for the speed, which it takes from the way of the root; the ends of episodes that go on after one, too."""
    simulator, env, seen = locomotion.runner(name), gymnasium.make(IDS[name]).unwrapped, []
    actions = actions_of(simulator, 1, 200)[0]
    obs, _ = env.reset(seed=0)
    for action in actions:
        after, reward, ended, _, info = env.step(action)
        seen.append((obs, after, reward, ended, info["x_velocity"], env.data.qvel[0]))
        obs = after
    before, after, reward, ended, speed, at_end = (np.array(of) for of in zip(*seen))
    ours = simulator.reward(before, actions, after)
    mean = (np.append(env.init_qvel[0], at_end[:-1]) + at_end)[1:] / 2
    np.testing.assert_allclose((ours - reward)[1:], mean - speed[1:], atol=1e-9)
    assert np.std(mean - speed[1:]) < 0.3 * np.std(speed)
    np.testing.assert_array_equal(simulator.ended(after), ended)
    assert ended.any() == (name != "halfcheetah")
    assert simulator.ended(after[None, :3]).shape == (1, 3)


@pytest.mark.parametrize("name, random", [("walker2d", 1.629008), ("halfcheetah", -280.178953)])
def test_random_actions_return_what_d4rl_says(name, random):
    """Of Hopper's random policy D4RL says -20, and the fifth version gives 16: each step in which it stands counts 1 there."""
    simulator, rng = locomotion.runner(name), np.random.default_rng(0)
    act = lambda obs: rng.uniform(-1, 1, (len(obs), simulator.action_dim))  # noqa: E731
    returns = rollout(simulator, act, 64, rng, whole=False).returns()
    assert simulator.references[0] == random and abs(returns.mean() - random) < 4 * returns.std() / 8


def test_an_episode_that_has_ended_stands_still():
    whole, short = (played(locomotion.runner("hopper"), whole=whole) for whole in (True, False))
    lengths = whole.lengths().tolist()
    assert lengths == short.lengths().tolist() and len({*lengths}) > 5 and short.rewards.shape[1] == max(lengths) < 60
    for made, own, n in zip(whole.obs, short.obs, lengths):
        assert (own[: n + 1] == made[: n + 1]).all() and (own[n:] == own[n]).all()


def test_readmes_environment_of_ones_own():
    text = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "from_gym" in code]
    assert len(block.splitlines()) <= 14
    own = {}
    exec(block, own)
    assert own["obs"].shape == (16, 32, 8) and own["error"].normalised.max() < 1e-10


def test_quaternions_and_actions_of_another_range():
    simulator = locomotion.from_gym("Ant", lambda: gymnasium.make("Ant-v5", include_cfrc_ext_in_observation=False))
    obs, actions = (made := played(simulator, 4, 20)).obs, made.actions
    assert dynamics.dynamics_error(simulator, obs[:, :20], actions, obs.var((0, 1))).normalised.max() < 1e-10
    env = gymnasium.make("Humanoid-v5").unwrapped  # of actions to 0.4
    bare = dict.fromkeys(("cinert", "cvel", "qfrc_actuator", "cfrc_ext"), False)
    bare = {f"include_{of}_in_observation": no for of, no in bare.items()}
    simulator, one = locomotion.from_gym("Humanoid", lambda: gymnasium.make("Humanoid-v5", **bare)), np.ones((1, 17))
    batch = simulator.batch(1, 1)
    batch.set_state(*(x[None] for x in (env.init_qpos, env.init_qvel)))
    env.reset(seed=0)
    env.set_state(env.init_qpos, env.init_qvel)
    env.step(0.4 * one[0])
    np.testing.assert_allclose(batch.step(one)[0, -23:], env.data.qvel, atol=1e-9)
    assert np.isnan(simulator.reward(obs, actions, obs)).all() and not simulator.ended(obs).any()


@pytest.mark.parametrize("env_id, size", [("Ant-v5", 105), ("InvertedDoublePendulum-v5", 9), ("Reacher-v5", 10)])
def test_other_observations_are_refused(env_id, size):
    with pytest.raises(ValueError, match=rf"env=\w+ is not allowed; its observation holds {size} numbers, which are not qpos"):
        locomotion.from_gym("other", lambda: gymnasium.make(env_id))


def test_what_cannot_be_simulated_is_nan():
    simulator = locomotion.runner("hopper")
    qpos, qvel = simulator.start(3, np.random.default_rng(0))
    qvel[1, 2], actions = 1e4, np.zeros((3, 3))
    actions[2, 0] = np.nan
    after = advance(simulator, qpos, qvel, actions)
    assert np.isfinite(after[0]).all() and np.isnan(after[1:]).all()
