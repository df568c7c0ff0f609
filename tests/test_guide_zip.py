"""Guides from Stable-Baselines3's zips: the same function as there, or a refusal that says what it is; nothing is unpickled."""

import base64
import contextlib
import io
import json
import math
import pickle
import zipfile
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from conftest import sb3_zip
from stable_baselines3 import A2C, DDPG, PPO, SAC, TD3
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from pgdlib.agents.squashed import SquashedGaussian
from pgdlib.lab import guide_zip, load
from pgdlib.lab.guide_ppo import ObservationNormaliser

OBS, ACTIONS = 7, 3


class Nothing(gymnasium.Env):
    """An environment for its spaces alone."""

    def __init__(self, obs_dim=OBS, action_space=None):
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = action_space or gymnasium.spaces.Box(-1.0, 1.0, (ACTIONS,), np.float32)


def randomise(module, scale=0.5, seed=0):
    """Draw all parameters and the observation moments, so that nothing is at its neutral value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=scale, generator=generator)
        for name, buffer in module.named_buffers():
            if name.split(".")[-1] in ("mean", "obs_mean"):
                buffer.normal_(generator=generator)
            elif name.split(".")[-1] in ("var", "obs_std"):
                buffer.uniform_(0.05, 4.0, generator=generator)
    return module


def sb3_ppo(path, env=None, policy="MlpPolicy", use_sde=False, **policy_kwargs):
    """A randomised SB3 PPO, saved at `path`."""
    how = dict(n_steps=8, batch_size=8, use_sde=use_sde, policy_kwargs=policy_kwargs, device="cpu")
    model = PPO(policy, env or Nothing(), **how)
    randomise(model.policy)
    model.save(path)
    return model


@pytest.fixture
def path(tmp_path):
    return tmp_path / "guide.zip"


@pytest.mark.parametrize(
    "kwargs",
    [
        {},  # SB3's own default: tanh, 64 and 64, one net for the policy and one for the value
        {"activation_fn": torch.nn.Tanh, "net_arch": [32, 32]},
        {"activation_fn": torch.nn.ReLU, "net_arch": {"pi": [32], "vf": [64]}},
        {"net_arch": []},
        {"net_arch": [256, 256], "features_extractor_class": ObservationNormaliser, "log_std_init": -0.7},
        {"net_arch": [9, 8, 7], "activation_fn": torch.nn.ReLU, "features_extractor_class": ObservationNormaliser},
        {
            "net_arch": {"pi": [32], "vf": [16]},
            "features_extractor_class": ObservationNormaliser,
            "share_features_extractor": False,
        },
    ],
    ids=["default", "tanh", "relu split", "linear", "normaliser", "normaliser relu deep", "normaliser not shared"],
)
def test_import_equals_sb3(path, kwargs):
    model = sb3_ppo(path, **kwargs)
    generator = torch.Generator().manual_seed(3)
    obs, actions = torch.randn(64, OBS, generator=generator), torch.randn(64, ACTIONS, generator=generator)
    obs[:8] *= 100  # beyond the clip
    policy = guide_zip.from_zip(path, OBS, ACTIONS)
    theirs = model.policy.get_distribution(obs)
    mean, std = policy(obs)
    assert mean.std() > 0.1
    tight = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(mean, theirs.distribution.mean, **tight)
    torch.testing.assert_close(std, theirs.distribution.stddev, **tight)
    torch.testing.assert_close(policy.log_prob(obs, actions), theirs.log_prob(actions), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(policy.act(obs).clip(-1, 1), model.predict(obs.numpy(), deterministic=True)[0], atol=1e-5)


def of(path, algorithm, **policy_kwargs):
    """A randomised model of another algorithm, saved at `path`."""
    more = {} if algorithm is A2C else dict(buffer_size=10)
    model = algorithm("MlpPolicy", Nothing(), policy_kwargs=policy_kwargs, device="cpu", **more)
    randomise(model.policy, 0.3)
    model.save(path)
    return model


def asked(n=64):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, OBS, generator=generator), 0.95 * torch.tanh(torch.randn(n, ACTIONS, generator=generator))


@pytest.mark.parametrize("kwargs", [{}, {"net_arch": [32], "activation_fn": torch.nn.Tanh}, {"net_arch": dict(pi=[9], qf=[8])}])
def test_sac_is_the_same_distribution_with_the_same_gradient(path, kwargs):
    model, (obs, actions) = of(path, SAC, **kwargs), asked()
    policy, actions = guide_zip.from_zip(path, OBS, ACTIONS), actions.requires_grad_()
    mean, log_std, _ = model.actor.get_action_dist_params(obs)
    theirs = model.actor.action_dist.proba_distribution(mean, log_std).log_prob(actions)
    assert theirs.std() > 1
    ours = policy.log_prob(obs, actions)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    gradients = [torch.autograd.grad(v.sum(), actions)[0] for v in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(policy.act(obs), model.predict(obs.numpy(), deterministic=True)[0], atol=1e-5)
    edge = policy.log_prob(obs, torch.full_like(actions, 3.0))
    torch.testing.assert_close(edge, policy.log_prob(obs, torch.ones_like(actions)))


@pytest.mark.parametrize("algorithm", [TD3, DDPG])
def test_td3_is_its_mean_with_the_std_that_is_stated(path, algorithm):
    model, (obs, _) = of(path, algorithm, net_arch=[32, 16]), asked()
    mean, std = guide_zip.from_zip(path, OBS, ACTIONS)(obs)
    torch.testing.assert_close(mean, model.actor(obs), rtol=1e-5, atol=1e-6)
    assert mean.std() > 0.1 and torch.allclose(std, torch.tensor(guide_zip.TD3_STD))


def test_a2c_is_read_as_ppo_is(path):
    model, (obs, actions) = of(path, A2C), asked()
    policy = guide_zip.from_zip(path, OBS, ACTIONS)
    theirs = model.policy.get_distribution(obs).log_prob(actions)
    torch.testing.assert_close(policy.log_prob(obs, actions), theirs, rtol=1e-5, atol=1e-4)


class Halved(VecNormalize):
    """Another normalisation, with the same attributes."""

    def normalize_obs(self, obs):
        return super().normalize_obs(obs) / 2


def normalised(path, name, obs_dim=OBS, of=VecNormalize, **how):
    """A `VecNormalize` with random moments, saved beside the zip."""
    env = of(DummyVecEnv([lambda: Nothing(obs_dim)]), clip_obs=2.0, epsilon=1e-3, **how)
    rng = np.random.default_rng(0)
    if how.get("norm_obs", True):
        env.obs_rms.mean, env.obs_rms.var = rng.normal(size=obs_dim), rng.uniform(0.05, 4, obs_dim)
    env.save(path.with_name(name))
    return env


@pytest.mark.parametrize(
    "zipped, beside",
    [
        ("a.zip", "vecnormalize.pkl"),
        ("a.zip", "a_vecnormalize.pkl"),
        ("a_40_steps.zip", "a_vecnormalize_40_steps.pkl"),  # as SB3's own checkpoints
    ],
)
@pytest.mark.parametrize("algorithm", [A2C, SAC, TD3])
def test_a_vecnormalize_beside_the_zip_is_found(path, algorithm, zipped, beside, capsys):
    path = path.with_name(zipped)
    model, (obs, _) = of(path, algorithm), asked()
    plain = guide_zip.from_zip(path, OBS, ACTIONS).act(obs)
    assert "no VecNormalize is saved beside it" in capsys.readouterr().out
    env = normalised(path, beside)
    seen = env.normalize_obs(obs.numpy())
    assert (np.abs(seen) == 2).any()
    ours = guide_zip.from_zip(path, OBS, ACTIONS).act(obs)
    said = capsys.readouterr().out
    assert ("arctanh" in said) == (algorithm is SAC) and "VecNormalize" not in said and np.abs(ours - plain).max() > 0.1
    np.testing.assert_allclose(ours.clip(-1, 1), model.predict(seen, deterministic=True)[0], atol=1e-4)


def test_a_vecnormalize_of_another_kind(path, capsys):
    model, (obs, _) = of(path, SAC), asked()
    normalised(path, "vecnormalize.pkl", norm_obs=False)
    ours = guide_zip.from_zip(path, OBS, ACTIONS).act(obs)
    np.testing.assert_allclose(ours, model.predict(obs.numpy(), deterministic=True)[0], atol=1e-5)
    assert "VecNormalize" not in capsys.readouterr().out
    normalised(path, "vecnormalize.pkl", OBS + 2)
    refused(path, f"vecnormalize.pkl, is of {OBS + 2} observations")
    for how in ({}, dict(norm_obs=False)):
        normalised(path, "vecnormalize.pkl", of=Halved, **how)
        refused(path, r"vecnormalize.pkl, cannot be used: .* holds a test_guide_zip.Halved; known are only stable_base")
    path.with_name("vecnormalize.pkl").write_bytes(b"no pickle")
    refused(path, "the VecNormalize beside it, vecnormalize.pkl, cannot be used: UnpicklingError")


def test_nothing_of_a_vecnormalize_is_run(path, tmp_path):
    of(path, SAC)
    path.with_name("vecnormalize.pkl").write_bytes(pickle.dumps(dict(norm_obs=Evil(tmp_path / "executed"))))
    refused(path, "the VecNormalize beside it")
    assert not (tmp_path / "executed").exists()


def test_a_sac_guide_is_saved_and_found_again(tmp_path):
    policy = SquashedGaussian(45, 24, (16,))
    randomise(policy)
    load.save_guide(tmp_path / "mine.safetensors", policy, {})
    saved, _ = load.load_guide(tmp_path / "mine.safetensors")
    obs, actions = torch.randn(9, 45), torch.rand(9, 24)
    assert torch.equal(saved.log_prob(obs, actions), policy.log_prob(obs, actions))


def rewrite(path, **members):
    """Replace members of a zip; None removes one."""
    with zipfile.ZipFile(path) as z:
        old = {name: z.read(name) for name in z.namelist()}
    with zipfile.ZipFile(path, "w") as z:
        for name, content in {**old, **{name.replace("_pth", ".pth"): c for name, c in members.items()}}.items():
            if content is not None:
                z.writestr(name, content)


def torch_bytes(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def refused(path, reason, obs_dim=OBS, action_dim=ACTIONS):
    with pytest.raises(ValueError, match=reason) as error:
        guide_zip.from_zip(path, obs_dim, action_dim)
    assert str(error.value).startswith(f"guide={str(path)!r} ")


def test_files_that_cannot_be_read(path, tmp_path):
    refused(path, "FileNotFoundError")
    refused(tmp_path, "not a readable")  # a folder
    path.write_bytes(b"")
    refused(path, "not a readable")
    path.write_text("a zip, honestly\n" * 100)
    refused(path, "BadZipFile")
    sb3_ppo(path)
    whole = path.read_bytes()
    for length in (10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        refused(path, "not a readable")
    middle = whole.index(b"mlp_extractor") + 5000
    path.write_bytes(whole[:middle] + bytes(b ^ 255 for b in whole[middle : middle + 8]) + whole[middle + 8 :])
    refused(path, "CRC")


@pytest.mark.parametrize(
    "members, reason",
    [
        ({"policy_pth": None}, "policy.pth"),
        ({"policy_pth": b"not torch"}, "not a readable"),
        ({"policy_pth": torch_bytes({})[:300]}, "not a readable"),
        ({"policy_pth": torch_bytes(torch.zeros(3))}, "holds no"),
        ({"policy_pth": torch_bytes([1, 2])}, "holds no"),
        ({"policy_pth": torch_bytes({})}, "action_net"),
        ({"policy_pth": torch_bytes({"action_net.weight": 1, "action_net.bias": 2, "log_std": 3})}, "holds no"),
        ({"policy_pth": torch_bytes({"mlp_extractor.policy_net.x.weight": torch.zeros(1)})}, "holds no"),
        ({"data": None}, "data"),
        ({"data": b"{"}, "not a readable"),
        ({"data": b"[]"}, "holds no"),
        ({"data": b'{"policy_kwargs": null}'}, "holds no"),
    ],
)
def test_zips_that_hold_something_else(path, members, reason):
    sb3_ppo(path)
    rewrite(path, **members)
    refused(path, reason)


def test_policies_that_do_not_fit(path):
    sb3_ppo(path)
    refused(path, f"{OBS} observations and {ACTIONS} actions; needed are 45 and 24", 45, 24)
    refused(path, "another environment", OBS, ACTIONS + 1)
    sb3_ppo(path, Nothing(obs_dim=9))
    refused(path, "9 observations")
    sb3_ppo(path, Nothing(action_space=gymnasium.spaces.Discrete(ACTIONS)))
    refused(path, "continuous actions.*log_std")
    sb3_ppo(path, Nothing(action_space=gymnasium.spaces.Box(-0.4, 0.4, (ACTIONS,), np.float32)))
    refused(path, r"its actions go from \{'-0.4'\} to \{'0.4'\}; needed are -1 to 1")
    one_hot = Nothing()
    one_hot.observation_space = gymnasium.spaces.Discrete(OBS)
    sb3_ppo(path, one_hot)
    refused(path, r"its observations have the shape \[\]; needed is a Box")
    SAC("MlpPolicy", Nothing(), use_sde=True, buffer_size=10, device="cpu").save(path)
    refused(path, "state-dependent")


class Louder(ActorCriticPolicy):
    """A policy of the user's own, whose weights are those of an MlpPolicy."""

    def _get_action_dist_from_latent(self, latent):
        return super()._get_action_dist_from_latent(2 * latent)


class Quiet(ActorCriticPolicy):
    pass


@pytest.mark.parametrize("policy, name", [(Louder, "test_guide_zip.Louder"), (Quiet, "test_guide_zip."), ("MlpPolicy", None)])
def test_a_policy_class_of_the_users_own_is_refused_by_name(path, policy, name):
    sb3_ppo(path, policy=policy)
    if name is None:
        guide_zip.from_zip(path, OBS, ACTIONS)
    else:
        refused(path, f"its policy is a {name}.*only Stable-Baselines3's own MlpPolicy.*log_prob.*save_guide")


def test_a_policy_class_that_is_pickled_whole_is_refused_by_name(path, monkeypatch):
    monkeypatch.setattr(Louder, "__module__", "__main__")  # so it is in a notebook
    sb3_ppo(path, policy=Louder)
    refused(path, "its policy is a __main__.Louder")


def test_an_extractor_with_the_name_of_ours_is_refused(path):
    sb3_ppo(path, features_extractor_class=type("ObservationNormaliser", (FlattenExtractor,), {"__module__": "mine"}))
    refused(path, r"its features extractor is mine\.ObservationNormaliser")


class Doubled(FlattenExtractor):
    """A features extractor that has no parameters, so that the weights alone do not betray it."""

    def forward(self, obs):
        return 2 * super().forward(obs)


@pytest.mark.parametrize(
    "kwargs, reason",
    [
        ({"activation_fn": torch.nn.ELU}, "(?i)elu"),
        ({"activation_fn": torch.nn.LeakyReLU}, "(?i)leakyrelu"),
        ({"use_sde": True}, "(?i)sde|state-dependent"),
        ({"features_extractor_class": Doubled}, "(?i)features.extractor"),
        (
            {"features_extractor_class": ObservationNormaliser, "features_extractor_kwargs": {"clip": 0.5}},
            "(?i)features.extractor",
        ),
    ],
    ids=["elu", "leaky relu", "state-dependent exploration", "features extractor", "another clip"],
)
def test_policies_that_a_gaussian_policy_cannot_hold(path, kwargs, reason):
    """A network that is another function must not be read as if it were a tanh MLP."""
    sb3_ppo(path, **kwargs)
    refused(path, reason)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["mlp_extractor.policy_net.0.weight", "log_std", "features_extractor.var"])
def test_values_that_are_not_finite(path, name, value):
    model = sb3_ppo(path, features_extractor_class=ObservationNormaliser)
    model.policy.state_dict()[name].view(-1)[1] = value
    model.save(path)
    refused(path, "not finite")


def test_layers_that_are_no_plain_mlp_are_named(path):
    """As old versions of Stable-Baselines3, or policies of a user's own, saved them."""
    state = sb3_ppo(path).policy.state_dict()
    rewrite(path, policy_pth=torch_bytes({**state, "mlp_extractor.shared_net.0.weight": torch.zeros(64, OBS)}))
    refused(path, "policy and value share layers of it .mlp_extractor.shared_net")
    norm = {f"mlp_extractor.policy_net.1.{part}": torch.ones(64) for part in ("weight", "bias")}
    rewrite(path, policy_pth=torch_bytes({**state, **norm}))
    refused(path, r"mlp_extractor.policy_net.1 is no linear layer, but a normalisation \(such as LayerNorm\)")


def test_an_import_can_be_saved_as_a_guide(path, tmp_path):
    model = sb3_zip(path)
    policy, _ = load.load_guide(path)
    load.save_guide(tmp_path / "mine.safetensors", policy, {})
    saved, _ = load.load_guide(tmp_path / "mine.safetensors")
    obs = 100 * torch.randn(9, 45)  # where a clip would show
    torch.testing.assert_close(
        saved(obs)[0], model.policy.get_distribution(obs).distribution.mean.detach(), rtol=1e-5, atol=1e-6
    )


def test_tensors_of_the_wrong_shape(path):
    state = sb3_ppo(path).policy.state_dict()
    rewrite(path, policy_pth=torch_bytes({**state, "log_std": torch.zeros(ACTIONS + 1)}))
    refused(path, "log_std")
    rewrite(path, policy_pth=torch_bytes({**state, "mlp_extractor.policy_net.2.weight": torch.zeros(64, 5)}))
    refused(path, "5, 64")


class Evil:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_nothing_is_unpickled(path, tmp_path):
    trace = tmp_path / "executed"
    evil = pickle.dumps(Evil(trace))
    pickle.loads(evil)
    assert trace.exists()  # so the attack works where it is let in
    trace.unlink()

    state = sb3_ppo(path).policy.state_dict()
    for payload in (evil, torch_bytes({**state, "log_std": Evil(trace)}), torch_bytes(Evil(trace))):
        rewrite(path, policy_pth=payload)
        refused(path, "not a readable")
        assert not trace.exists()

    model = sb3_ppo(path)
    with zipfile.ZipFile(path) as z:
        data = json.loads(z.read("data"))
    serialised = [value for value in data.values() if isinstance(value, dict) and ":serialized:" in value]
    assert data["policy_class"] in serialised
    for value in [*serialised, data["policy_kwargs"]]:
        value[":serialized:"] = base64.b64encode(evil).decode()
    rewrite(path, data=json.dumps(data), pytorch_variables_pth=evil)
    assert serialised
    policy = guide_zip.from_zip(path, OBS, ACTIONS)
    assert not trace.exists()
    torch.testing.assert_close(
        policy(torch.ones(OBS))[0], model.policy.get_distribution(torch.ones(1, OBS)).distribution.mean[0]
    )
    with contextlib.suppress(Exception):
        PPO.load(path, device="cpu")
    assert trace.exists()  # SB3 itself does execute it
