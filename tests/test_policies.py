"""Gaussian policies, one and a stack, against torch's layers and distributions."""

import math

import numpy as np
import pytest
import torch
from conftest import SMALL, SPEC, a_policy, draw, plain_network, toy
from torch import nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from pgdlib import data, fast, guidance, measures
from pgdlib.agents.squashed import SquashedGaussian
from pgdlib.policies import GaussianPolicy, fast_moments, is_gaussian, sharpened

KINDS = {
    "tanh": (dict(), [nn.Tanh, nn.Identity]),
    "relu": (dict(activation="relu"), [nn.ReLU, nn.Identity]),
    "squashed": (dict(activation="relu", squash=True, low=True), [nn.ReLU, nn.Tanh]),
}


@pytest.fixture
def policy():
    return a_policy(SMALL, hidden=(16, 8))


@pytest.fixture
def batch():
    return pair(5, 4)


def pair(*shape, spec=SMALL):
    """Observations and actions [*shape, ...]."""
    return draw(1, *shape, spec.obs_dim).double(), draw(2, *shape, spec.action_dim).double()


@pytest.mark.parametrize("spec", [SPEC, SMALL], ids=["pen", "small"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_is_torchs_layers_and_normal(spec, kind):
    how, (activation, last) = KINDS[kind]
    policy, (obs, actions) = a_policy(spec, hidden=(16, 8), **how), pair(5, 4, spec=spec)
    mean, std = policy(obs)
    network = plain_network(policy.net, 0, last(), activation=activation)
    torch.testing.assert_close(mean, network(((obs - policy.obs_mean) / policy.obs_std).clamp(-10, 10)))
    torch.testing.assert_close(std, policy.log_std[0, 0].exp().expand(5, 4, spec.action_dim))
    assert torch.equal(policy.std, std[:1, 0]) and is_gaussian(policy) and mean.std() > 0.1
    expected = Independent(Normal(mean, std), 1)
    torch.testing.assert_close(policy.log_prob(obs, actions), expected.log_prob(actions))
    torch.testing.assert_close(policy.entropy(), expected.entropy()[0, :1])
    other = GaussianPolicy(**policy.config).double()  # what is saved beside the weights makes it again
    other.load_state_dict(policy.state_dict())
    assert torch.equal(other.log_prob(obs, actions), policy.log_prob(obs, actions))


def test_the_entropy_is_the_mean_surprise_of_own_samples(policy):
    obs = torch.zeros(200_000, 7).double()
    surprise = -policy.log_prob(obs, policy.sample(obs, torch.Generator().manual_seed(0)))
    assert abs(surprise.mean() - policy.entropy()) < 5 * surprise.std() / math.sqrt(len(obs))


def test_gradients(policy, batch):
    assert torch.autograd.gradcheck(policy.log_prob, [x[0].requires_grad_() for x in batch])


def test_observations_beyond_the_clip_are_at_it(policy):
    wild = torch.tensor([12.0, -500, 3, -3, 9.9, 1e9, -10]).double()
    tame = torch.tensor([10.0, -10, 3, -3, 9.9, 10, -10]).double()
    obs = (policy.obs_mean + policy.obs_std * x for x in (wild, tame))
    torch.testing.assert_close(*(policy(o[None])[0] for o in obs))


def test_the_log_std_stays_in_its_range():
    policy = a_policy(SMALL, log_std_range=(-1.0, -0.5))
    policy.log_std.data[:] = torch.tensor([-7.0, -0.7, 3.0])
    expected = torch.tensor([[-1.0, -0.7, -0.5]]).double().exp()
    obs = torch.zeros(1, 7).double()
    torch.testing.assert_close(policy.std, expected)
    torch.testing.assert_close(policy(obs)[1], expected)
    torch.testing.assert_close(policy.entropy(), Normal(0.0, expected).entropy().sum(1))


def test_samples_and_act(policy):
    policy, obs = policy.float(), torch.ones(100_000, 7)
    samples = policy.sample(obs, torch.Generator().manual_seed(0))
    mean, std = (x[0].detach() for x in policy(obs))
    assert ((samples.mean(0) - mean).abs() < 5 * std / math.sqrt(len(obs))).all()
    torch.testing.assert_close(samples.std(0), std, rtol=0.02, atol=0)
    drawn = [policy.act(obs.double().numpy(), torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert isinstance(drawn[0], np.ndarray) and drawn[0].shape == (100_000, 3)
    assert (drawn[0] == drawn[1]).all() and (drawn[0] == samples.detach().numpy()).all() and (drawn[0] != drawn[2]).any()
    np.testing.assert_array_equal(policy.act(obs[:3].numpy()), policy(obs[:3])[0].detach().numpy())


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("factor", [1 / 3, 4.0])
def test_a_sharpened_policy_has_another_std_and_the_same_mean(factor, runs):
    """In the number format of the policy, which stays as it is."""
    policy, (obs, actions) = a_policy(SMALL, runs, obs_clip=math.inf), pair(6, 4)
    kept, sharp = {k: v.clone() for k, v in policy.state_dict().items()}, sharpened(policy, factor)
    mean, std = policy(1e3 * obs)
    assert torch.equal(sharp(1e3 * obs)[0], mean) and sharp.config == policy.config and sharp.is_gaussian
    expected = Independent(Normal(mean, factor * std), 1).log_prob(actions)
    torch.testing.assert_close(sharp.log_prob(1e3 * obs, actions), expected)
    assert not any(p.requires_grad for p in sharp.parameters()) and all(p.requires_grad for p in policy.parameters())
    for parameter in sharp.parameters():  # a copy: neither changes the other
        parameter.zero_()
    assert all(torch.equal(v, kept[k]) for k, v in policy.state_dict().items())


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_fast_moments_are_near_the_call(monkeypatch, guide, low):
    """The mean is off by far less than a std, for the shipped guide and for a stack like the agents', whatever the device."""
    made = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    agents = GaussianPolicy(45, 24, (256, 256), "relu", squash=True, low=False, generators=made)
    agents.load_state_dict({**agents.state_dict(), "obs_mean": guide.obs_mean, "obs_std": guide.obs_std})
    obs = guide.obs_mean + guide.obs_std * draw(0, 64, 16, 45)
    monkeypatch.setattr(fast, "has_bfloat16", lambda device: low)
    for policy in (guide, agents):
        (mean, std), (exact, exact_std) = fast_moments(policy, obs), policy(obs)
        assert mean.dtype == std.dtype == torch.float32 and not mean.requires_grad
        assert torch.equal(std, exact_std)
        error = (mean - exact) / std
        assert 1e-4 < error.square().mean().sqrt() < 0.015 if low else torch.equal(mean, exact)
        assert error.mean((0, 1)).abs().max() < 0.005  # it does not lean to a side
    policy, (obs, _) = a_policy(low=True), pair(6, 4, spec=SPEC)
    assert all(map(torch.equal, fast_moments(policy, obs), policy(obs)))  # float64 stays


# Stacks


@pytest.mark.parametrize("shape", [(6,), (6, 4), (3, 2, 5)])
def test_each_run_has_its_block_of_the_batch(shape):
    stack, (obs, actions) = a_policy(SMALL, 3), pair(*shape)
    (mean, std), log_prob = stack(obs), stack.log_prob(obs, actions)
    samples = stack.sample(obs, torch.Generator().manual_seed(0))
    assert mean.shape == std.shape == samples.shape == actions.shape and log_prob.shape == shape
    noise = torch.randn(actions.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(samples, mean + std * noise)
    for row in range(shape[0]):
        run = row // (shape[0] // 3)
        own, other = stack.select([run]), stack.select([run - 1])
        for found, expected in zip((mean, std), own(obs[row : row + 1])):
            torch.testing.assert_close(found[row], expected[0])
        torch.testing.assert_close(log_prob[row], own.log_prob(obs[row : row + 1], actions[row : row + 1])[0])
        assert not torch.allclose(mean[row], other(obs[row : row + 1])[0][0], atol=1e-2)
        assert torch.equal(stack.std[run], own.std[0]) and torch.equal(stack.entropy()[run], own.entropy()[0])
    two = stack.select([2, 0])
    assert torch.equal(two.std, stack.std[[2, 0]]) and not any(p.requires_grad for p in two.parameters())


def test_a_stacked_log_prob_is_differentiable_in_both():
    assert torch.autograd.gradcheck(a_policy(SMALL, 3).log_prob, [x.requires_grad_() for x in pair(3)])


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 7])
def test_a_batch_that_cannot_be_shared_out_is_named(rows):
    stack, (obs, actions) = a_policy(SMALL, 3), pair(rows)
    for use in (lambda: stack(obs), lambda: stack.log_prob(obs, actions), lambda: stack.act(obs.numpy())):
        with pytest.raises(ValueError, match=f"batch={rows} is not allowed; it must be a multiple of the 3 stacked policies"):
            use()


def test_a_squashed_gaussian_by_its_samples():
    """Moments, entropy and density, from draws of tanh of a normal distribution and its transformed density."""
    torch.manual_seed(0)
    policy = SquashedGaussian(7, 3, (16,)).double()
    obs = 2 * draw(1, 3, 7, dtype=torch.float64)
    mean, log_std = policy.latent(obs)
    theirs = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
    drawn = policy.sample(obs.expand(200_000, 3, 7), torch.Generator().manual_seed(2))
    assert drawn.abs().max() < 1
    found, std = policy(obs)
    assert ((found - drawn.mean(0)).abs() < 5 * std / 200_000**0.5).all() and torch.allclose(std, drawn.std(0), rtol=0.02)
    surprise = -theirs.log_prob(drawn).sum(-1)
    error = surprise.std(0) / 200_000**0.5
    each = torch.cat([policy.entropy(state[None]) for state in obs])
    assert ((each - surprise.mean(0)).abs() < 5 * error).all() and torch.equal(policy.entropy(obs)[0], each.mean())
    torch.testing.assert_close(policy.log_prob(obs, drawn[0]), theirs.log_prob(drawn[0]).sum(-1), rtol=1e-4, atol=1e-4)
    on_policy = measures.on_policy_log_likelihood(policy, obs)
    assert abs(on_policy + surprise.mean() / 3) < 5 * error.max() / 3


def test_squashed_gaussians_in_a_stack_are_each_its_own():
    made = [torch.Generator().manual_seed(seed) for seed in range(3)]
    stack, (obs, actions) = SquashedGaussian(7, 3, (16,), generators=made).double(), pair(6, 4)
    whole = [stack.log_prob(obs, actions.tanh()), *stack(obs), stack.sample(obs, torch.Generator().manual_seed(0))]
    entropies = stack.entropy(obs)
    assert entropies.shape == (3,) and len(entropies.unique()) == 3
    for run in range(3):
        own, rows = stack.select([run]), slice(2 * run, 2 * run + 2)
        found = [own.log_prob(obs[rows], actions[rows].tanh()), *own(obs[rows])]
        for a, b in zip(found, whole):
            torch.testing.assert_close(a, b[rows])
        torch.testing.assert_close(own.entropy(obs[rows])[0], entropies[run])
        assert not torch.allclose(stack.select([run - 1])(obs[rows])[0], found[1], atol=1e-2)
    with pytest.raises(ValueError, match="batch=5 is not allowed; it must be a multiple of the 3 stacked policies"):
        stack.log_prob(obs[:5], actions[:5])


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("rule", guidance.RULES)
def test_every_rule_pushes_toward_a_squashed_gaussian(rule, runs):
    made = [torch.Generator().manual_seed(seed) for seed in range(runs)]
    policy, spec = SquashedGaussian(7, 3, (16,), generators=made), SMALL
    normaliser = data.Normaliser(spec).fit(toy([40], spec=spec).packed())
    x = 0.3 * draw(3, 4, 6, spec.width)
    moved = x + guidance.Guide(rule, policy, normaliser, 0.1, 10)(x, x, 0.5, 3)
    before, after = (measures.log_likelihood(policy, normaliser.obs(v), normaliser.actions(v)) for v in (x, moved))
    assert (after > before).all() and torch.equal(moved[..., spec.obs], x[..., spec.obs])


@pytest.mark.parametrize("weight", [1e-3, 0.01, 0.1])
@pytest.mark.parametrize("start", [-1.2, -1.0, -0.9, 1.0, 1.001, 60.0])
def test_the_implicit_step_leaves_the_edge_of_a_squashed_gaussian(start, weight):
    """Against a grid that holds the start, too: where tanh is flat nothing holds an action, unless the way is too long."""
    policy, obs = SquashedGaussian(7, 1, (16,), generators=[torch.Generator().manual_seed(0)]).double(), draw(0, 32, 7).double()
    policy.requires_grad_(False).widen(0.3)  # of a wide one there would be several minima
    found = guidance.newton(policy, obs, torch.full((32, 1), start, dtype=torch.float64), torch.tensor(weight))
    grid = torch.cat([torch.linspace(-0.9999, 0.9999, 4_001, dtype=torch.float64), torch.tensor([start])]).expand(32, -1)
    cost = [
        (a - start).square() / (2 * weight) - policy.log_prob(obs[:, None].expand(-1, a.shape[1], -1), a[..., None])
        for a in (found, grid)
    ]
    assert (cost[0][:, 0] <= cost[1].amin(1) + 1e-3).all() and bool((found.abs() < 1).all()) == (start != 60)
