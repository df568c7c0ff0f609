"""Gaussian policies against torch.distributions and against Stable-Baselines3 itself."""

import math

import gymnasium
import numpy as np
import pytest
import torch

from pgdlib import edm
from pgdlib.agents import stack as agents
from pgdlib.lab import load
from pgdlib.policies import GaussianPolicy, Stacked, Tanh, quick, sharpened

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


@pytest.fixture
def policy():
    return randomise(GaussianPolicy(OBS, ACTIONS, hidden=[16, 8]))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 4, OBS, generator=generator), torch.randn(5, 4, ACTIONS, generator=generator)


def test_log_prob_is_torchs(policy, batch):
    mean, std = policy(batch[0])
    assert mean.shape == std.shape == (5, 4, ACTIONS) and mean.std() > 0.1
    torch.testing.assert_close(std, policy.log_std.exp().expand(5, 4, ACTIONS))
    expected = torch.distributions.Independent(torch.distributions.Normal(mean, std), 1).log_prob(batch[1])
    torch.testing.assert_close(policy.log_prob(*batch), expected)


def test_entropy_is_torchs_and_the_mean_surprise_of_own_samples(policy):
    obs = torch.zeros(200_000, OBS)
    expected = torch.distributions.Normal(*policy(obs[0])).entropy().sum()
    torch.testing.assert_close(policy.entropy(), expected)
    surprise = -policy.log_prob(obs, policy.sample(obs, torch.Generator().manual_seed(0)))
    assert abs(surprise.mean() - expected) < 5 * surprise.std() / math.sqrt(len(obs))


def test_gradients(policy, batch):
    policy, (obs, actions) = policy.double(), (x.double() for x in batch)
    actions.requires_grad_()
    (gradient,) = torch.autograd.grad(policy.log_prob(obs, actions).sum(), actions)
    mean, std = policy(obs)
    torch.testing.assert_close(gradient, (mean - actions) / std**2)
    assert torch.autograd.gradcheck(policy.log_prob, (obs[0].requires_grad_(), actions[0].detach().requires_grad_()))


def test_observations_are_normalised_inside_and_clipped(policy, batch):
    bare = GaussianPolicy(OBS, ACTIONS, hidden=[16, 8])
    bare.load_state_dict({**policy.state_dict(), "obs_mean": torch.zeros(OBS), "obs_std": torch.ones(OBS)})
    obs, _ = batch
    torch.testing.assert_close(policy(policy.obs_mean + policy.obs_std * obs)[0], bare(obs)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(policy(obs)[0], bare(obs)[0], atol=1e-2)
    wild = torch.tensor([12.0, -500, 3, -3, 9.9, 1e9, -10])
    tame = torch.tensor([10.0, -10, 3, -3, 9.9, 10, -10])
    torch.testing.assert_close(policy(policy.obs_mean + policy.obs_std * wild)[0], bare(tame)[0], rtol=1e-4, atol=1e-5)


def test_the_normalisation_is_saved_with_the_weights(policy, batch):
    other = GaussianPolicy(**policy.config)
    other.load_state_dict(policy.state_dict())
    torch.testing.assert_close(other.log_prob(*batch), policy.log_prob(*batch), rtol=0, atol=0)


def test_samples_and_act(policy):
    obs = torch.ones(100_000, OBS)
    samples = policy.sample(obs, torch.Generator().manual_seed(0))
    mean, std = (x[0].detach() for x in policy(obs))
    assert ((samples.mean(0) - mean).abs() < 5 * std / math.sqrt(len(obs))).all()
    torch.testing.assert_close(samples.std(0), std, rtol=0.02, atol=0)
    drawn = [policy.act(torch.Generator().manual_seed(s))(obs.double().numpy()) for s in (0, 0, 1)]
    assert isinstance(drawn[0], np.ndarray) and drawn[0].shape == (100_000, ACTIONS)
    assert (drawn[0] == drawn[1]).all() and (drawn[0] == samples.detach().numpy()).all() and (drawn[0] != drawn[2]).any()
    np.testing.assert_array_equal(policy.act()(obs[:3].numpy()), policy(obs[:3])[0].detach().numpy())


@pytest.mark.parametrize("factor", [1 / 3, 4.0])
def test_a_sharpened_policy_has_another_std_and_the_same_mean(policy, batch, factor):
    """In the number format of the policy, which stays as it is."""
    policy, (obs, actions) = policy.double(), (x.double() for x in batch)
    policy.obs_clip = policy.config["obs_clip"] = math.inf
    kept, sharp = {k: v.clone() for k, v in policy.state_dict().items()}, sharpened(policy, factor)
    mean, std = policy(1e3 * obs)
    assert torch.equal(sharp(1e3 * obs)[0], mean) and sharp.config == policy.config and sharp.is_gaussian
    expected = torch.distributions.Independent(torch.distributions.Normal(mean, factor * std), 1).log_prob(actions)
    torch.testing.assert_close(sharp.log_prob(1e3 * obs, actions), expected)
    assert not any(p.requires_grad for p in sharp.parameters()) and all(p.requires_grad for p in policy.parameters())
    for parameter in sharp.parameters():  # a copy: neither changes the other
        parameter.zero_()
    assert all(torch.equal(v, kept[k]) for k, v in policy.state_dict().items())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-15)], ids=["float32", "float64"])
def test_tanh_is_torchs(dtype, tolerance):
    z = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([-math.inf, -1e30, -1e-30, 1e-30, 1e30, math.inf])]).to(dtype)
    kept, z = z.clone(), z.requires_grad_()
    ours, theirs = Tanh()(z), torch.tanh(z)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    slopes = (torch.autograd.grad(tanh.sum(), z)[0] for tanh in (ours, theirs))
    torch.testing.assert_close(*slopes, rtol=0, atol=tolerance)
    with torch.no_grad():
        again = kept.clone()
        assert torch.equal(Tanh()(again), ours) and torch.equal(again, ours) and torch.equal(z, kept)


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_quick_is_near_the_call(monkeypatch, low):
    """Its mean is off by far less than a std, for the shipped guide, a stack of it, and stacked agents, whatever the device."""
    guide = load.load_guide()[0]
    agent = agents.StackedPolicy((256, 256), agents.generators((0, 1)), guide.obs_mean, guide.obs_std)
    obs = guide.obs_mean + guide.obs_std * torch.randn(64, 16, 45, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(agents, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(edm, "has_bfloat16", lambda device: low)
    for policy in (guide, Stacked([guide, sharpened(guide, 2.0)]), agent):
        (mean, std), (exact, exact_std) = quick(policy, obs), policy(obs)
        assert mean.dtype == std.dtype == torch.float32 and not mean.requires_grad
        assert torch.equal(std, exact_std)
        error = (mean - exact) / std
        assert 1e-4 < error.square().mean().sqrt() < 0.015 if low else torch.equal(mean, exact)
        assert error.mean((0, 1)).abs().max() < 0.005  # it does not lean to a side
    guide, obs = guide.double(), obs.double()
    assert all(map(torch.equal, quick(guide, obs), guide(obs)))  # float64 stays


class NotGaussian:
    """A policy known by its `log_prob` alone."""

    def log_prob(self, obs, actions):
        return -(1 + (actions - obs[..., :ACTIONS]).square()).sqrt().sum(-1)


@pytest.fixture
def policies():
    return [randomise(GaussianPolicy(OBS, ACTIONS, hidden=[8]), seed=seed) for seed in range(3)]


@pytest.mark.parametrize("shape", [(6,), (6, 4), (3, 2, 5)])
def test_stacked_policies_each_have_their_block_of_the_batch(policies, shape):
    generator = torch.Generator().manual_seed(1)
    obs, actions = torch.randn(*shape, OBS, generator=generator), torch.randn(*shape, ACTIONS, generator=generator)
    stacked = Stacked(iter(policies))
    (mean, std), log_prob = stacked(obs), stacked.log_prob(obs, actions)
    assert stacked.is_gaussian and mean.shape == std.shape == actions.shape and log_prob.shape == shape
    rows = shape[0] // 3
    for row in range(shape[0]):
        own = policies[row // rows]
        for found, expected in zip((mean, std), own(obs[row])):
            torch.testing.assert_close(found[row], expected)
        torch.testing.assert_close(log_prob[row], own.log_prob(obs[row], actions[row]))
        other = policies[row // rows - 1]
        assert not torch.allclose(mean[row], other(obs[row])[0], atol=1e-2)
        assert not torch.allclose(log_prob[row], other.log_prob(obs[row], actions[row]), atol=1e-2)


def test_stacked_log_prob_is_differentiable_in_both(policies):
    stacked, generator = Stacked([p.double() for p in policies]), torch.Generator().manual_seed(1)
    both = [torch.randn(3, n, generator=generator, dtype=torch.float64, requires_grad=True) for n in (OBS, ACTIONS)]
    assert torch.autograd.gradcheck(stacked.log_prob, both)


def test_a_stack_is_gaussian_if_all_its_policies_are(policies):
    assert Stacked(policies).is_gaussian and Stacked(policies[:1]).is_gaussian
    for kinds in ([NotGaussian()], [*policies, NotGaussian()], [NotGaussian(), *policies]):
        assert not Stacked(kinds).is_gaussian
    assert Stacked([Stacked(policies[:2]), policies[2]]).is_gaussian
    assert not Stacked([Stacked([policies[0], NotGaussian()]), policies[2]]).is_gaussian


def test_a_mixed_stack_has_a_log_prob(policies, batch):
    obs, actions = (x[:4] for x in batch)
    mixed = Stacked([policies[0], NotGaussian()]).log_prob(obs, actions)
    torch.testing.assert_close(mixed[:2], policies[0].log_prob(obs[:2], actions[:2]))
    torch.testing.assert_close(mixed[2:], NotGaussian().log_prob(obs[2:], actions[2:]))


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 7])
def test_a_batch_that_cannot_be_shared_out(policies, rows):
    obs, actions = torch.zeros(rows, OBS), torch.zeros(rows, ACTIONS)
    for use in (lambda s: s(obs), lambda s: s.log_prob(obs, actions)):
        with pytest.raises(ValueError, match=f"batch={rows} is not allowed; it must be a multiple of the 3 stacked policies"):
            use(Stacked(policies))


def test_an_empty_stack():
    with pytest.raises(ValueError, match=r"policies=\[\] is not allowed"):
        Stacked([])
