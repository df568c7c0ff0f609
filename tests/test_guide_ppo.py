"""The vectorised environment against gymnasium's, the observation moments against numpy, a tiny training, and one stopped."""

import functools

import numpy as np
import pytest
import torch
from conftest import kept, shorter
from stable_baselines3.common.vec_env import VecCheckNan, VecNormalize

from benchmarks.baselines import make_env
from pgdlib.lab import artifacts, load
from pgdlib.lab import guide_ppo as ppo
from pgdlib.simulators import pen as adroit

N = 6


def actions(step, rng):
    """Half of the environments get no action, so that the pen stays in the hand; the other half random ones."""
    return np.where(np.arange(N)[:, None] < N // 2, 0.0, rng.uniform(-1.5, 1.5, (N, 24))).astype(np.float32)


def test_spaces_shapes_and_types():
    env = ppo.SimulatorVecEnv(adroit.PEN, N, seed=0)
    assert (env.num_envs, env.observation_space.shape, env.action_space.shape) == (N, (45,), (24,))
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    obs = env.reset()
    assert obs.shape == (N, 45) and obs.dtype == env.observation_space.dtype == np.float32
    obs, rewards, dones, infos = env.step(np.zeros((N, 24), np.float32))
    assert obs.shape == (N, 45) and obs.dtype == np.float32
    assert rewards.shape == (N,) and rewards.dtype == np.float32
    assert dones.shape == (N,) and dones.dtype == bool and infos == [{}] * N


@pytest.mark.slow
def test_the_stream_equals_gyms_d4rl_environment():
    """Observation, reward, end, its reason, and the restart, step by step, over several episodes."""
    env, rng = ppo.SimulatorVecEnv(adroit.PEN, N, seed=0), np.random.default_rng(0)
    gyms = [make_env("d4rl") for _ in range(N)]

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
        env, rng = ppo.SimulatorVecEnv(adroit.PEN, N, seed=0), np.random.default_rng(0)
        env.reset()
        for t in range(100):
            *_, dones, infos = env.step(actions(t, rng))
            if dones.any():
                return t + 1, dones, infos

    horizon, fallen, _ = run()
    assert horizon < 100 and not fallen.all()
    shorter(monkeypatch, horizon)  # now it is the last step for all of them
    _, dones, infos = run()
    assert dones.all() and [info["TimeLimit.truncated"] for info in infos] == [not f for f in fallen]


def test_seeds():
    def stream(env):
        rng = np.random.default_rng(0)
        return np.stack([env.reset()] + [env.step(actions(t, rng))[0] for t in range(60)])

    first = stream(ppo.SimulatorVecEnv(adroit.PEN, N, seed=3))
    np.testing.assert_array_equal(stream(ppo.SimulatorVecEnv(adroit.PEN, N, seed=3)), first)
    targets = [stream(ppo.SimulatorVecEnv(adroit.PEN, N, seed=4))[0], first[0]]
    assert len(np.unique(np.concatenate(targets)[:, 36:39].round(6), axis=0)) == 2 * N


def test_reset_begins_new_episodes():
    env, rng = ppo.SimulatorVecEnv(adroit.PEN, N, seed=0), np.random.default_rng(0)
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
    env = VecNormalize(VecCheckNan(ppo.SimulatorVecEnv(adroit.PEN, N, seed=0), raise_exception=True), norm_obs=False)
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
    normaliser = ppo.ObservationNormaliser(ppo.SimulatorVecEnv(adroit.PEN, 1).observation_space)
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
        shorter(patch, 20)
        yield


@pytest.fixture(scope="module")
def tiny(short):
    """A training of two rollouts: the loop, what it yielded, the emitted observations and the moments' data."""
    emitted, merged = [], []
    with pytest.MonkeyPatch.context() as patch:
        reset, step_wait, update = ppo.SimulatorVecEnv.reset, ppo.SimulatorVecEnv.step_wait, ppo.ObservationNormaliser.update

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

        patch.setattr(ppo.SimulatorVecEnv, "reset", spy_reset)
        patch.setattr(ppo.SimulatorVecEnv, "step_wait", spy_step)
        patch.setattr(ppo.ObservationNormaliser, "update", spy_update)
        training = ppo.Training(adroit.PEN, **TINY)
        done = list(training)
    return training, done, np.stack(emitted), merged


def test_tiny_training_gives_a_curve(tiny):
    training, done, *_ = tiny
    assert done == [256, 512] and (training.step, training.steps, training.model.num_timesteps) == (512, 512, 512)
    assert [steps for steps, *_ in training.curve] == [0, 512]
    assert all(-200 < mean < 1000 and 0 < se < 200 for _, mean, se in training.curve)
    moved = training.model.policy.log_std.detach() - ppo.DEFAULTS["initial_log_std"]
    assert 0 < moved.abs().max() < 0.1


def test_moments_are_those_of_the_observations_seen(tiny):
    training, _, emitted, merged = tiny
    assert len(merged) == 3  # random actions before the first rollout, and each rollout after its updates
    for seen, rollout in zip(merged[1:], (emitted[:32], emitted[32:64])):
        rollout = rollout.reshape(-1, 45).astype(np.float64)
        assert seen.shape == rollout.shape
        np.testing.assert_allclose(np.sort(seen, 0), np.sort(rollout, 0), atol=1e-6)
    whole, found = np.concatenate(merged), training.model.policy.features_extractor
    np.testing.assert_allclose(found.mean, whole.mean(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.var, whole.var(0), rtol=1e-3, atol=1e-5)


def test_the_update_sees_the_moments_of_its_rollout(tiny):
    """With one epoch of one batch the probability ratio is 1, unless the normalisation changed in between."""
    values = tiny[0].model.logger.name_to_value
    assert abs(values["train/approx_kl"]) < 1e-6 and values["train/clip_fraction"] == 0


def test_the_policy_is_that_of_the_model(tiny):
    obs = np.random.default_rng(0).normal(size=(50, 45)).astype(np.float32)
    expected, _ = tiny[0].model.predict(obs, deterministic=True)
    mean, std = tiny[0].policy()(torch.from_numpy(obs))
    np.testing.assert_allclose(mean.detach().clip(-1, 1), expected, atol=1e-5)
    np.testing.assert_allclose(std[0].detach(), tiny[0].model.policy.log_std.detach().exp(), rtol=1e-6)


@pytest.mark.slow
def test_training_is_deterministic(tiny, short):
    training = ppo.Training(adroit.PEN, **TINY)
    list(training)
    assert training.curve == tiny[0].curve
    for (name, mine), theirs in zip(training.state().items(), tiny[0].state().values()):
        assert torch.equal(mine, theirs) or name == "curve", name


def test_the_learning_rate_falls_to_its_end(short):
    training = ppo.Training(adroit.PEN, **{**TINY, "steps": 1_000, "n_envs": 4, "batch_size": 128})
    rates = [training.model.policy.optimizer.param_groups[0]["lr"] for _ in training]
    assert training.steps == 1_024  # whole rollouts
    np.testing.assert_allclose(rates, np.linspace(3e-4, 3e-5, 9)[1:], rtol=1e-6)


# A training that is stopped

ROLLOUT = 16 * 8
STOPPED = {**TINY, "steps": 6 * ROLLOUT, "n_steps": 16, "batch_size": 32, "n_epochs": 2, "evaluate_every": ROLLOUT}


@pytest.fixture(scope="module")
def cut_short(short):
    """Episodes of 6 steps: a rollout ends within them, but for each third one, which ends with them."""
    with pytest.MonkeyPatch.context() as patch:
        shorter(patch, 6)
        yield


def stopped_after(rollouts, **changes):
    training = ppo.Training(adroit.PEN, **{**STOPPED, **changes})
    for _, _ in zip(range(rollouts), training):
        pass
    return training


def test_a_training_goes_on_from_its_state(cut_short):
    """To the end, with its curve, Adam's moments and the scale of the rewards, in episodes of its own."""
    first, second = stopped_after(3), ppo.Training(adroit.PEN, **STOPPED)
    kept = {name: tensor.clone() for name, tensor in first.state().items()}
    assert [steps for steps, *_ in first.curve] == [0, ROLLOUT, 2 * ROLLOUT, 3 * ROLLOUT]
    for name, tensor in second.state().items():
        tensor.copy_(kept[name])
    second.step = 3 * ROLLOUT
    assert second.curve == first.curve
    obs = np.random.default_rng(0).normal(size=(9, 45)).astype(np.float32)
    assert np.array_equal(*(t.model.predict(obs, deterministic=True)[0] for t in (first, second)))
    second._begin()
    assert [second._env.ret_rms.mean, second._env.ret_rms.var, second._env.ret_rms.count] == kept["rewards"].tolist()
    (adam,) = {float(t) for name, t in second.state().items() if name.endswith(".step")}
    assert adam == 3 * 2 * ROLLOUT / 32  # updates so far
    assert list(second) == [4 * ROLLOUT, 5 * ROLLOUT, 6 * ROLLOUT]
    assert second.curve[:4] == first.curve and [steps for steps, *_ in second.curve[4:]] == [
        4 * ROLLOUT,
        5 * ROLLOUT,
        6 * ROLLOUT,
    ]
    whole = stopped_after(6)
    targets = [t._env.venv._batch.state()[2] for t in (whole, second)]
    assert not np.isclose(targets[0], targets[1]).all(1).any()


def test_the_state_is_all_that_changes(cut_short):
    """Each tensor of the policy is there once, is live, and is changed by training."""
    training = ppo.Training(adroit.PEN, **STOPPED)
    before = {name: tensor.clone() for name, tensor in training.state().items()}
    assert len({t.data_ptr() for t in training.state().values()}) == len(before)
    own = {t.data_ptr() for t in training.model.policy.state_dict().values()}
    assert own == {t.data_ptr() for name, t in training.state().items() if name.startswith("policy.")}
    next(iter(training))
    assert [name for name, tensor in training.state().items() if torch.equal(tensor, before[name])] == []


@pytest.mark.slow
def test_a_guide_that_was_stopped_is_finished(cut_short, runs, monkeypatch):
    """Its checkpoint goes when the guide is kept, not before; what was done is not done again."""
    small = {k: v for k, v in STOPPED.items() if k not in ("seed", "steps")}
    taken, step_wait, run = [], ppo.SimulatorVecEnv.step_wait, load.resumable.run
    monkeypatch.setattr(ppo.evaluation, "__defaults__", (4,))
    monkeypatch.setattr(ppo.SimulatorVecEnv, "step_wait", lambda self: taken.append(1) or step_wait(self))
    monkeypatch.setattr(ppo, "Training", functools.partial(ppo.Training, **small))

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(load.resumable, "run", lambda loop, path, report: run(loop, path, stopped, save_every=0))
        load.train_guide(2 * ROLLOUT, seed=5)
    (checkpoint,) = kept(runs)
    assert checkpoint.startswith("checkpoints/") and artifacts.load(runs / checkpoint)[1]["step"] == ROLLOUT
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ppo, "evaluation", stopped)
        load.train_guide(2 * ROLLOUT, seed=5)
    assert kept(runs) == [checkpoint]
    policy, card = load.train_guide(2 * ROLLOUT, seed=5)
    (file,) = kept(runs)
    assert file.startswith("guides/ppo-") and [steps for steps, *_ in card["curve"]] == [0, ROLLOUT, 2 * ROLLOUT]
    assert 2 <= len(taken) / 16 <= 3  # the last rollout anew, if its checkpoint was not due
    assert torch.equal(load.load_guide(str(runs / file))[0].log_std, policy.log_std)
