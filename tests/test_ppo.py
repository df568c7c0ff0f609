"""The vectorised environment against gymnasium's, the observation moments against numpy, and a tiny training."""

import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import VecCheckNan, VecNormalize

from pgdlib import adroit, ppo

N = 6


def actions(step, rng):
    """Half of the environments get no action, so that the pen stays in the hand; the other half random ones."""
    return np.where(np.arange(N)[:, None] < N // 2, 0.0, rng.uniform(-1.5, 1.5, (N, 24))).astype(np.float32)


def test_spaces_shapes_and_types():
    env = ppo.PenVecEnv(N, seed=0)
    assert (env.num_envs, env.observation_space.shape, env.action_space.shape) == (N, (45,), (24,))
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    obs = env.reset()
    assert obs.shape == (N, 45) and obs.dtype == env.observation_space.dtype == np.float32
    obs, rewards, dones, infos = env.step(np.zeros((N, 24), np.float32))
    assert obs.shape == (N, 45) and obs.dtype == np.float32
    assert rewards.shape == (N,) and rewards.dtype == np.float32
    assert dones.shape == (N,) and dones.dtype == bool and infos == [{}] * N


def test_the_stream_equals_gyms_d4rl_environment():
    """Observation, reward, end, its reason, and the restart, step by step, over several episodes."""
    env, rng = ppo.PenVecEnv(N, seed=0), np.random.default_rng(0)
    gyms = [adroit.make_env("d4rl") for _ in range(N)]

    def start(i):
        sim = gyms[i].unwrapped
        target = env._batch.state()[2][i]
        state = {"qpos": sim.init_qpos, "qvel": sim.init_qvel, "desired_orien": target}
        return gyms[i].reset(options={"initial_state_dict": state})[0], target

    close = {"rtol": 1e-6, "atol": 1e-6}  # the VecEnv gives float32
    for i, obs in enumerate(env.reset()):
        np.testing.assert_allclose(obs, start(i)[0], **close)
    totals, lengths, ends, targets = np.zeros(N), np.zeros(N, int), [], []
    for t in range(250):
        a = actions(t, rng)
        obs, rewards, dones, infos = env.step(a)
        for i in range(N):
            expected, reward, terminated, truncated, _ = gyms[i].step(a[i])
            totals[i], lengths[i] = totals[i] + reward, lengths[i] + 1
            np.testing.assert_allclose(rewards[i], reward, **close)
            assert dones[i] == (terminated or truncated)
            if not dones[i]:
                assert infos[i] == {}
                np.testing.assert_allclose(obs[i], expected, **close)
                continue
            np.testing.assert_allclose(infos[i]["terminal_observation"], expected, **close)
            assert infos[i]["terminal_observation"].dtype == np.float32
            assert infos[i]["TimeLimit.truncated"] is (truncated and not terminated)
            assert infos[i]["episode"]["r"] == pytest.approx(totals[i], abs=1e-6)
            assert infos[i]["episode"]["l"] == lengths[i]
            first, target = start(i)
            np.testing.assert_allclose(obs[i], first, **close)
            targets.append(tuple(target))
            ends.append((terminated, truncated))
            totals[i], lengths[i] = 0, 0
    assert set(ends) == {(True, False), (False, True)} and len(ends) > 10
    assert len(set(targets)) == len(targets)  # each episode has a target of its own


def test_a_fall_on_the_last_step_is_no_truncation(monkeypatch):
    def run():
        env, rng = ppo.PenVecEnv(N, seed=0), np.random.default_rng(0)
        env.reset()
        for t in range(100):
            *_, dones, infos = env.step(actions(t, rng))
            if dones.any():
                return t + 1, dones, infos

    horizon, fallen, _ = run()
    assert horizon < 100 and not fallen.all()
    monkeypatch.setattr(adroit, "D4RL_HORIZON", horizon)  # now it is the last step for all of them
    _, dones, infos = run()
    assert dones.all() and [info["TimeLimit.truncated"] for info in infos] == [not f for f in fallen]


def test_seeds():
    def stream(env):
        rng = np.random.default_rng(0)
        return np.stack([env.reset()] + [env.step(actions(t, rng))[0] for t in range(60)])

    first = stream(ppo.PenVecEnv(N, seed=3))
    np.testing.assert_array_equal(stream(ppo.PenVecEnv(N, seed=3)), first)
    targets = [stream(ppo.PenVecEnv(N, seed=4))[0], first[0]]
    assert len(np.unique(np.concatenate(targets)[:, 36:39].round(6), axis=0)) == 2 * N


def test_reset_begins_new_episodes():
    env, rng = ppo.PenVecEnv(N, seed=0), np.random.default_rng(0)
    start = env.reset()
    for t in range(7):
        env.step(actions(t, rng))
    again = env.reset()
    np.testing.assert_allclose(again[:, :36], start[:, :36], atol=1e-6)
    lengths = []
    while len(lengths) < N // 2:
        *_, infos = env.step(np.zeros((N, 24)))
        lengths += [info["episode"]["l"] for info in infos if info]
    assert set(lengths) == {100}


def test_stable_baselines3s_wrappers_accept_it():
    env = VecNormalize(VecCheckNan(ppo.PenVecEnv(N, seed=0), raise_exception=True), norm_obs=False)
    env.reset()
    rng = np.random.default_rng(0)
    seen = 0
    for t in range(101):
        _, rewards, _, infos = env.step(actions(t, rng))
        assert np.isfinite(rewards).all()
        seen += sum("terminal_observation" in info for info in infos)
    assert seen >= N
    env.close()


def test_moments_are_numpys():
    rng = np.random.default_rng(0)
    scale, shift = rng.uniform(0.01, 20, 45), rng.normal(size=45) * 5
    chunks = [(rng.normal(size=(n, 45)) * scale + shift + k).astype(np.float32) for k, n in enumerate((1, 7, 500, 64, 3))]
    normaliser = ppo.ObservationNormaliser(ppo.PenVecEnv(1).observation_space)
    obs = torch.randn(4, 45)
    torch.testing.assert_close(normaliser(obs), obs)  # before any data
    for k, chunk in enumerate(chunks):
        normaliser.update(chunk if k % 2 else torch.as_tensor(chunk))
        whole = np.concatenate(chunks[: k + 1]).astype(np.float64)
        np.testing.assert_allclose(normaliser.mean, whole.mean(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(normaliser.var, whole.var(0), rtol=1e-3, atol=1e-4)
        assert normaliser.count == len(whole)
    expected = (whole - whole.mean(0)) / whole.std(0)
    np.testing.assert_allclose(normaliser(torch.as_tensor(whole, dtype=torch.float32)), expected, atol=1e-2)
    far = torch.full((1, 45), 1e6)
    assert (normaliser(far) == 10).all() and (normaliser(-far) == -10).all()
    assert {"count", "mean", "var"} <= set(normaliser.state_dict())


TINY = {"seed": 5, "steps": 2 * 32 * 8, "n_envs": 8, "n_steps": 32, "batch_size": 32 * 8, "n_epochs": 1, "hidden": [16, 16]}


@pytest.fixture(scope="module")
def short():
    """Episodes of 20 steps: most of a tiny training is its three times 64 episodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adroit, "D4RL_HORIZON", 20)
        yield


@pytest.fixture(scope="module")
def tiny(short):
    """A training of two rollouts: the model, its curve, what was reported, the emitted observations and the moments' data."""
    emitted, merged, reported = [], [], []
    with pytest.MonkeyPatch.context() as patch:
        reset, step_wait, update = ppo.PenVecEnv.reset, ppo.PenVecEnv.step_wait, ppo.ObservationNormaliser.update

        def spy_reset(self):
            emitted.append(reset(self))
            return emitted[-1].copy()

        def spy_step(self):
            result = step_wait(self)
            emitted.append(result[0].copy())
            return result

        def spy_update(self, obs):
            merged.append(np.array(obs, dtype=np.float64))
            update(self, obs)

        patch.setattr(ppo.PenVecEnv, "reset", spy_reset)
        patch.setattr(ppo.PenVecEnv, "step_wait", spy_step)
        patch.setattr(ppo.ObservationNormaliser, "update", spy_update)
        model, curve = ppo.train(report=lambda *point: reported.append(point), **TINY)
    return model, curve, reported, np.stack(emitted), merged


def test_tiny_training_gives_a_curve(tiny):
    model, curve, reported, *_ = tiny
    assert curve == reported and [steps for steps, *_ in curve] == [0, 512]
    assert all(-200 < mean < 1000 and 0 < se < 200 for _, mean, se in curve)
    assert model.num_timesteps == 512
    moved = model.policy.log_std.detach() - ppo.DEFAULTS["initial_log_std"]
    assert 0 < moved.abs().max() < 0.1


def test_moments_are_those_of_the_observations_seen(tiny):
    model, _, _, emitted, merged = tiny
    assert len(merged) == 2  # random actions before the first rollout, and the first rollout before the second
    rollout = emitted[:32].reshape(-1, 45).astype(np.float64)
    assert merged[1].shape == rollout.shape
    np.testing.assert_allclose(np.sort(merged[1], 0), np.sort(rollout, 0), atol=1e-6)
    whole = np.concatenate(merged)
    np.testing.assert_allclose(model.policy.features_extractor.mean, whole.mean(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(model.policy.features_extractor.var, whole.var(0), rtol=1e-3, atol=1e-5)


def test_the_update_sees_the_moments_of_its_rollout(tiny):
    """With one epoch of one batch the probability ratio is 1, unless the normalisation changed in between."""
    values = tiny[0].logger.name_to_value
    assert abs(values["train/approx_kl"]) < 1e-6 and values["train/clip_fraction"] == 0


def test_training_is_deterministic(tiny, short):
    model, curve = ppo.train(**TINY)
    assert curve == tiny[1]
    for (name, mine), theirs in zip(model.policy.state_dict().items(), tiny[0].policy.state_dict().values()):
        assert torch.equal(mine, theirs), name
