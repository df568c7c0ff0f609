"""The vectorised environment against gymnasium's, the observation moments against numpy, a tiny training, and one stopped."""

import time

import numpy as np
import pytest
import torch
from conftest import cut, kept
from stable_baselines3.common.vec_env import VecCheckNan, VecNormalize

from pgdlib.lab import artifacts, pipeline, ppo
from pgdlib.simulators import pen as adroit

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


@pytest.mark.slow
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


def test_environments_go_on_from_their_arrays():
    """Mid-episode, one simulation broken, into environments with a past of their own: the same stream, bit for bit."""
    rng = np.random.default_rng(0)
    env, other = ppo.PenVecEnv(N, seed=0), ppo.PenVecEnv(N, seed=1)
    for e, steps in ((env, 70), (other, 15)):
        e.reset()
        for t in range(steps):
            e.step(actions(t, rng))
    env.step(np.where(np.arange(N)[:, None] == 1, np.nan, actions(0, rng)))
    assert env.arrays()["broken"].tolist() == [False, True] + [False] * (N - 2)
    for name, array in env.arrays().items():
        other.arrays()[name][:] = array
    other._rng.bit_generator.state = env._rng.bit_generator.state
    ended = 0
    for t in range(120):
        a = actions(t, rng)
        (*mine, infos), (*theirs, other_infos) = env.step(a), other.step(a)
        for x, y in zip(mine, theirs):
            np.testing.assert_array_equal(x, y)
        for x, y in zip(infos, other_infos):
            assert x.keys() == y.keys()
            if x:
                ended += 1
                np.testing.assert_array_equal(x["terminal_observation"], y["terminal_observation"])
                np.testing.assert_equal([x["episode"][k] for k in "rl"], [y["episode"][k] for k in "rl"])
    assert ended > N


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


@pytest.mark.slow
def test_training_is_deterministic(tiny, short):
    model, curve = ppo.train(**TINY)
    assert curve == tiny[1]
    for (name, mine), theirs in zip(model.policy.state_dict().items(), tiny[0].policy.state_dict().values()):
        assert torch.equal(mine, theirs), name


# A training that is stopped

ROLLOUT = 16 * 8
STOPPED = {**TINY, "steps": 6 * ROLLOUT, "n_steps": 16, "batch_size": 32, "n_epochs": 2, "evaluate_every": ROLLOUT}


@pytest.fixture(scope="module")
def shorter(short):
    """Episodes of 6 steps: a rollout ends within them, but for each third one, which ends with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adroit, "D4RL_HORIZON", 6)
        yield


def everything(model):
    """All that training changes, as tensors and plain values."""
    env, (kind, key, *rest) = model.env, np.random.get_state()  # noqa: NPY002
    adam = model.policy.optimizer.state_dict()
    tensors = {
        **model.policy.state_dict(),
        **{f"{i}.{k}": v for i, state in adam["state"].items() for k, v in state.items()},
        **{k: torch.tensor(v) for k, v in env.venv.arrays().items()},
        "obs": torch.tensor(model._last_obs),
        "starts": torch.tensor(model._last_episode_starts),
        "discounted": torch.tensor(env.returns),
        "torch": torch.get_rng_state(),
    }
    moments = [float(x) for x in (env.ret_rms.mean, env.ret_rms.var, env.ret_rms.count)]
    counts = [model.num_timesteps, model._n_updates, model._current_progress_remaining, adam["param_groups"][0]["lr"]]
    return tensors, [moments, counts, kind, key.tolist(), rest, env.venv._rng.bit_generator.state]


def assert_same(one, other):
    (tensors, values), (others, other_values) = everything(one), other
    assert tensors.keys() == others.keys() and values == other_values
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


@pytest.fixture(scope="module")
def whole(shorter):
    """Everything of an uninterrupted training without checkpoints of six rollouts, and its curve."""
    model, curve = ppo.train(**STOPPED)
    return everything(model), curve


class Stop(Exception):
    pass


def stop_at(steps):
    def report(done, mean, se):
        if done == steps:
            raise Stop

    return report


@pytest.mark.slow
def test_a_stopped_training_goes_on_to_the_same_result(whole, tmp_path, monkeypatch, capsys):
    """Stopped four times, by its report; every rollout is made once, and the curve is reported anew."""
    taken, step_wait = [], ppo.PenVecEnv.step_wait
    monkeypatch.setattr(ppo.PenVecEnv, "step_wait", lambda self: taken.append(1) or step_wait(self))
    how = dict(**STOPPED, checkpoint=tmp_path / "checkpoint.safetensors", save_every=0)
    digests = []
    for steps in (2 * ROLLOUT, 2 * ROLLOUT, 3 * ROLLOUT, 3 * ROLLOUT):
        with pytest.raises(Stop):
            ppo.train(report=stop_at(steps), **how)
        assert len(taken) == steps / 8 and artifacts.load(how["checkpoint"])[1]["steps"] == steps
        digests.append(artifacts.digest(*artifacts.load(how["checkpoint"])))
    assert digests[0] == digests[1] != digests[2] == digests[3]  # read and written anew
    reported = []
    model, curve = ppo.train(report=lambda *point: reported.append(point), **how)
    assert len(taken) == STOPPED["steps"] / 8
    assert curve == reported == whole[1]
    assert_same(model, whole[0])
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == [
        "256 of 768 steps are done",
        "256 of 768 steps are done",
        "384 of 768 steps are done",
        "384 of 768 steps are done",
    ]


def test_checkpoints_change_nothing_and_are_two_minutes_apart_at_most(whole, tmp_path, monkeypatch):
    """On a clock where a rollout takes 32 s; with the seconds that are the default."""
    now, saved = [0.0], [(0.0, 0)]
    save, step_wait = artifacts.save, ppo.PenVecEnv.step_wait

    def step(self):
        now[0] += 2
        return step_wait(self)

    def spy(path, tensors, card):
        saved.append((now[0], card["steps"]))
        save(path, tensors, card)

    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now[0])
        patch.setattr(artifacts, "save", spy)
        patch.setattr(ppo.PenVecEnv, "step_wait", step)
        model, curve = ppo.train(checkpoint=str(tmp_path / "checkpoint.safetensors"), **STOPPED)
    assert saved == [(0.0, 0), (64.0, 2 * ROLLOUT), (128.0, 4 * ROLLOUT)] and now[0] - saved[-1][0] <= 120
    assert curve == whole[1]
    assert_same(model, whole[0])


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside(whole, tmp_path):
    path, said = tmp_path / "checkpoint.safetensors", []
    with pytest.raises(Stop):
        ppo.train(report=stop_at(ROLLOUT), checkpoint=path, save_every=0, **STOPPED)
    cut(path)
    damaged = path.read_bytes()
    model, curve = ppo.train(checkpoint=path, say=said.append, **STOPPED)
    (aside,) = kept(tmp_path)
    assert aside.endswith(".damaged") and (tmp_path / aside).read_bytes() == damaged
    (words,) = said
    assert words.startswith(f"{path} is damaged") and aside in words and words.endswith("begins anew.")
    assert curve == whole[1]
    assert_same(model, whole[0])


def test_a_checkpoint_of_another_training_is_set_aside(shorter, tmp_path):
    path, said = tmp_path / "checkpoint.safetensors", []
    with pytest.raises(Stop):
        ppo.train(report=stop_at(0), checkpoint=path, save_every=0, **{**TINY, "hidden": (16, 16)})
    before = path.read_bytes()
    for number, (change, words) in enumerate(
        (
            ({"seed": 6}, "seed=5, not 6. Set aside as "),
            ({"lr": 1e-3, "steps": 9}, "steps=512, not 9, lr=0.0003, not 0.001. Set aside as "),
        ),
        1,
    ):
        with pytest.raises(Stop):
            ppo.train(report=stop_at(0), checkpoint=path, say=said.append, **{**TINY, **change})
        assert f"{path} is of another training: {words}" in said[-1] and len(said) == number
        (aside,) = [name for name in kept(tmp_path) if name in said[-1]]
        assert (tmp_path / aside).read_bytes() == before and not path.exists()
        path.write_bytes(before)
    artifacts.save(tmp_path / "denoiser.safetensors", {}, {"step": 3})
    with pytest.raises(Stop):
        ppo.train(report=stop_at(0), checkpoint=tmp_path / "denoiser.safetensors", say=said.append, **TINY)
    assert "of another training: steps=None, not 512, n_envs=None" in said[-1]
    with pytest.raises(Stop):  # a list is what a tuple becomes
        ppo.train(report=stop_at(0), checkpoint=path, **TINY)


@pytest.mark.slow
def test_a_guide_that_was_stopped_is_finished(shorter, runs, monkeypatch):
    """Its checkpoint goes when the guide is kept, not before."""
    train, changes = ppo.train, {k: v for k, v in STOPPED.items() if k not in ("seed", "steps")}
    monkeypatch.setattr(pipeline._evaluation, "__defaults__", (4,))

    def guide(stop=None, **more):
        def tiny_train(report, **how):
            return train(report=stop_at(stop) if stop else report, **how, **changes, **more)

        with monkeypatch.context() as patch:
            patch.setattr(ppo, "train", tiny_train)
            return pipeline.train_guide(2 * ROLLOUT, seed=5)

    def stopped(*_):
        raise Stop

    with pytest.raises(Stop):
        guide(stop=ROLLOUT, save_every=0)
    (checkpoint,) = kept(runs)
    assert checkpoint.startswith("checkpoints/ppo-") and artifacts.load(runs / checkpoint)[1]["steps"] == ROLLOUT
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(pipeline, "_evaluation", stopped)
        guide()
    assert kept(runs) == [checkpoint]
    policy, card = guide()
    (file,) = kept(runs)
    assert file == checkpoint.replace("checkpoints/", "guides/")
    (runs / file).unlink()
    expected, expected_card = guide()
    assert card == expected_card
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
