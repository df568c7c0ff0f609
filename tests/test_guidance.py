"""The paper's rule against closed forms, finite differences, and the contraction that it is."""

import math

import pytest
import torch

from pgdlib import data, edm
from pgdlib.data import ACTIONS, CHANNELS, Normaliser
from pgdlib.guidance import Explicit, action_gradient
from pgdlib.policies import GaussianPolicy

OTHERS = [i for i in range(CHANNELS) if not ACTIONS.start <= i < ACTIONS.stop]


@pytest.fixture
def policy():
    """A small policy in float64, of another std in each action."""
    generator = torch.Generator().manual_seed(0)
    policy = GaussianPolicy(45, 24, hidden=[16]).double()
    with torch.no_grad():
        for parameter in policy.net.parameters():
            parameter.normal_(std=0.3, generator=generator)
        policy.log_std.uniform_(-1.5, 0.0, generator=generator)
        policy.obs_mean.normal_(generator=generator)
        policy.obs_std.uniform_(0.5, 2.0, generator=generator)
    return policy


@pytest.fixture(params=["raw", "arctanh"])
def normaliser(request):
    return fitted(request.param)


def fitted(transform):
    """A float64 normaliser of random steps, every action of another mean and spread."""
    generator = torch.Generator().manual_seed(1)
    steps = torch.randn(500, CHANNELS, generator=generator, dtype=torch.float64)
    steps[:, ACTIONS] = (steps[:, ACTIONS] * torch.linspace(0.1, 0.5, 24) + torch.linspace(-0.3, 0.3, 24)).clamp(-1, 1)
    return Normaliser(transform).double().fit(steps)


@pytest.fixture
def x():
    return torch.randn(3, 5, CHANNELS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def mu_hat(policy, normaliser, x):
    """The policy's mean at the states of x, in normalised actions, and what lies within arctanh's reach."""
    steps = normaliser.denormalise(x)
    steps[..., ACTIONS] = policy(steps[..., data.OBS])[0].detach()
    return normaliser.normalise(steps)[..., ACTIONS]


def test_raw_gradient_in_closed_form(policy, normaliser, x):
    mean, std = policy(normaliser.obs(x))
    a, d = normaliser.actions(x), normaliser.std[ACTIONS]
    slope = d if normaliser.transform == "raw" else d * (1 - a**2)
    torch.testing.assert_close(action_gradient(policy, normaliser, x, "raw"), ((mean - a) / std**2 * slope).detach())


def test_raw_gradient_against_finite_differences(policy, normaliser, x):
    gradient, h = action_gradient(policy, normaliser, x, "raw"), 1e-5
    for k in (0, 11, 23):
        step = torch.zeros(CHANNELS, dtype=torch.float64)
        step[ACTIONS.start + k] = h
        high, low = (policy.log_prob(normaliser.obs(y), normaliser.actions(y)) for y in (x + step, x - step))
        torch.testing.assert_close(gradient[..., k], ((high - low) / (2 * h)).detach(), rtol=1e-6, atol=1e-7)


def test_natural_gradient_is_the_way_to_the_policys_mean(policy, normaliser, x):
    expected = mu_hat(policy, normaliser, x) - x[..., ACTIONS]
    torch.testing.assert_close(action_gradient(policy, normaliser, x, "natural"), expected)


def test_natural_gradient_is_the_raw_one_times_the_policys_variance(policy, x):
    """In normalised units, where the policy's std is s / d; against finite differences of its log-probability."""
    normaliser, h, k = fitted("raw"), 1e-5, 7
    step = torch.zeros(CHANNELS, dtype=torch.float64)
    step[ACTIONS.start + k] = h
    high, low = (policy.log_prob(normaliser.obs(y), normaliser.actions(y)) for y in (x + step, x - step))
    variance = (policy.log_std[k].exp() / normaliser.std[ACTIONS.start + k]) ** 2
    expected = ((high - low) / (2 * h) * variance).detach()
    torch.testing.assert_close(action_gradient(policy, normaliser, x, "natural")[..., k], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("units", ["natural", "raw"])
@pytest.mark.parametrize("transform", ["raw", "arctanh"])
def test_the_gradient_is_finite_at_every_noise_level(transform, units):
    """In float32, as the sampler calls it: at high noise tanh saturates."""
    normaliser, policy = fitted(transform).float(), GaussianPolicy(45, 24, hidden=[16])
    noise = torch.randn(8, 5, CHANNELS, generator=torch.Generator().manual_seed(0))
    for sigma in (0.0, 1.0, 10.0, 80.0):
        gradient = action_gradient(policy, normaliser, sigma * noise, units)
        assert gradient.isfinite().all(), sigma
        if units == "natural":
            assert gradient.abs().max() < 10 * (sigma + 10), sigma  # no further than the mean is away


@pytest.mark.parametrize("units", ["natural", "raw"])
def test_the_shift(policy, normaliser, x, units):
    """λ times the gradient, in the action channels alone; nothing in the warm-up and at λ = 0."""
    rule = Explicit(policy, normaliser, 0.7, warmup=3, units=units)
    assert rule.on == "noised"
    before = x.clone()
    shift = rule(x, None, 1.0, 3)
    torch.testing.assert_close(shift[..., ACTIONS], 0.7 * action_gradient(policy, normaliser, x, units))
    assert (shift[..., OTHERS] == 0).all() and (shift[..., ACTIONS] != 0).all() and torch.equal(x, before)
    for step in range(3):
        assert torch.equal(rule(x, None, 80.0, step), torch.zeros_like(x))
    assert torch.equal(Explicit(policy, normaliser, 0.0, 0, units)(x, None, 1.0, 9), torch.zeros_like(x))


def test_natural_units_are_the_default_and_move_by_lam_of_the_way(policy, normaliser, x):
    shift = Explicit(policy, normaliser, 0.7, 0)(x, None, 1.0, 0)
    torch.testing.assert_close(shift[..., ACTIONS], 0.7 * (mu_hat(policy, normaliser, x) - x[..., ACTIONS]))


@pytest.mark.parametrize("units", ["natural", "raw"])
def test_the_policys_weights_are_left_alone(policy, normaliser, x, units):
    assert all(p.requires_grad for p in policy.parameters())
    x.requires_grad_()
    shift = Explicit(policy, normaliser, 0.7, 0, units)(x, None, 1.0, 0)
    assert not shift.requires_grad
    assert x.grad is None and all(p.grad is None for p in policy.parameters())


def test_unknown_units_are_named(policy, normaliser):
    with pytest.raises(ValueError, match=r"units='metric' is not allowed.*'natural' or 'raw'"):
        Explicit(policy, normaliser, 1.0, 0, "metric")


# In the sampler


def draw(denoise, guide=None, steps=8, churn=2.0, shape=(2, 8, CHANNELS), dtype=torch.float32):
    return edm.sample(denoise, shape, steps, churn, torch.Generator().manual_seed(0), guide=guide, dtype=dtype)


@pytest.mark.parametrize("transform", ["raw", "arctanh"])
def test_lam_0_is_the_unguided_sampler_bit_for_bit(transform):
    torch.manual_seed(0)
    denoiser = edm.Denoiser(8, features=8, blocks=2, transform=transform)
    denoiser.normaliser.load_state_dict(fitted(transform).float().state_dict())
    policy = GaussianPolicy(45, 24, hidden=[16])
    unguided, _ = draw(denoiser)
    for lam, warmup in ((0.0, 0), (0.5, 8)):  # no guidance, or none but warm-up
        assert torch.equal(draw(denoiser, Explicit(policy, denoiser.normaliser, lam, warmup))[0], unguided)
    guided, diverged = draw(denoiser, Explicit(policy, denoiser.normaliser, 0.5, 7))  # the last step alone
    assert not torch.equal(guided, unguided) and not diverged.any()


def untouched(x, sigma):
    """A denoiser that believes everything: the sampler leaves x as it is."""
    return x


@pytest.mark.parametrize("units", ["natural", "raw"])
def test_each_guided_step_contracts_by_one_minus_lam(policy, units, monkeypatch):
    """Where nothing else moves, â - μ̂ shrinks by 1 - λ a step, in raw units by 1 - λ (d/s)²."""
    monkeypatch.setattr(edm, "DIVERGED", 1e9)  # x keeps the size of its first noise
    normaliser, steps, warmup = fitted("raw"), 12, 3
    (start, _), sharp = draw(untouched, steps=steps, churn=0.0, dtype=torch.float64), 1.0
    if units == "raw":
        sharp = (normaliser.std[ACTIONS] / policy.log_std.exp()).detach() ** 2
    for lam in (0.3, 1.0, 1.9):
        rule = Explicit(policy, normaliser, lam, warmup, units)
        x, _ = draw(untouched, rule, steps=steps, churn=0.0, dtype=torch.float64)
        target = mu_hat(policy, normaliser, start)
        expected = target + (1 - lam * sharp) ** (steps - warmup) * (start[..., ACTIONS] - target)
        torch.testing.assert_close(x[..., ACTIONS], expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(x[..., OTHERS], start[..., OTHERS])  # the states do not hear of it


def exact(x, sigma):
    """The exact denoiser of N(0, 1) data."""
    return x / (1 + sigma**2)


@pytest.mark.parametrize("transform", ["raw", "arctanh"])
def test_lam_2_is_the_limit(policy, transform):
    normaliser = fitted(transform)
    for lam, diverges in ((1.0, False), (1.9, False), (2.5, True), (5.0, True)):
        x, diverged = draw(exact, Explicit(policy, normaliser, lam, 5), steps=64, churn=0.0, dtype=torch.float64)
        assert x.isfinite().all() and diverged.tolist() == [diverges] * 2, lam
    unguided, _ = draw(exact, steps=64, churn=0.0, dtype=torch.float64)
    x, _ = draw(exact, Explicit(policy, normaliser, 1.0, 5), steps=64, churn=0.0, dtype=torch.float64)
    away = [(v[..., ACTIONS] - mu_hat(policy, normaliser, v)).abs().mean() for v in (unguided, x)]
    assert away[1] < 0.05 * away[0]


def test_the_limit_in_raw_units_is_that_of_the_sharpest_action(policy):
    normaliser = fitted("raw")
    limits = (2 * (policy.log_std.exp() / normaliser.std[ACTIONS]) ** 2).detach()
    for share, diverges in ((0.8, False), (1.4, True)):
        rule = Explicit(policy, normaliser, share * float(limits.min()), 5, "raw")
        x, diverged = draw(exact, rule, steps=64, churn=0.0, dtype=torch.float64)
        assert x.isfinite().all() and diverged.all() == diverged.any() == diverges, share
        if diverges:  # in that action first
            assert x[..., ACTIONS].abs().amax((0, 1)).argmax() == limits.argmin()


def test_a_huge_lam_in_float32_is_counted_and_finite():
    torch.manual_seed(0)
    denoiser, policy = edm.Denoiser(8, features=8, blocks=2), GaussianPolicy(45, 24, hidden=[16])
    for lam in (3.0, 1e6, 1e38):
        x, diverged = draw(denoiser, Explicit(policy, denoiser.normaliser, lam, 0), steps=24)
        assert x.isfinite().all() and diverged.all() and math.isfinite(float(x.abs().max()))
