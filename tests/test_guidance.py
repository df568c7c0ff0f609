"""The guidance rules against closed forms, finite differences, quadrature and brute-force search, alone and in the sampler."""

import math

import pytest
import torch
from conftest import SPEC

from pgdlib import edm, sampler
from pgdlib.data import ACTIONS, CHANNELS, Normaliser
from pgdlib.guidance import RULES, Guide, action_gradient, newton, normalised, proximal, schedule, smoothed
from pgdlib.policies import GaussianPolicy, Stacked

OTHERS = [i for i in range(CHANNELS) if not ACTIONS.start <= i < ACTIONS.stop]
STEPS = 10
WAYS = [(rule, "raw") for rule in RULES] + [(rule, "natural") for rule in ("explicit", "proximal", "annealed")]
KINDS = [(*way, kind) for way in WAYS for kind in ("Gaussian", "laplace") if kind == "Gaussian" or way[1] == "raw"]
every_way = pytest.mark.parametrize("rule, units", WAYS)
every_transform = pytest.mark.parametrize("transform", ["raw", "arctanh"])


def a_policy(seed=0, scale=1.0):
    """A small policy in float64, of another std in each action."""
    generator = torch.Generator().manual_seed(seed)
    policy = GaussianPolicy(45, 24, hidden=[16]).double()
    with torch.no_grad():
        for parameter in policy.net.parameters():
            parameter.normal_(std=0.3, generator=generator)
        policy.log_std.uniform_(-1.5, 0.0, generator=generator).add_(math.log(scale))
        policy.obs_mean.normal_(generator=generator)
        policy.obs_std.uniform_(0.5, 2.0, generator=generator)
    return policy


@pytest.fixture
def policy():
    return a_policy()


@pytest.fixture(params=["raw", "arctanh"])
def normaliser(request):
    return fitted(request.param)


def fitted(transform):
    """A float64 normaliser of random steps, every action of another mean and spread."""
    generator = torch.Generator().manual_seed(1)
    steps = torch.randn(500, CHANNELS, generator=generator, dtype=torch.float64)
    steps[:, ACTIONS] = (steps[:, ACTIONS] * torch.linspace(0.1, 0.5, 24) + torch.linspace(-0.3, 0.3, 24)).clamp(-1, 1)
    return Normaliser(SPEC, transform).double().fit(steps)


@pytest.fixture
def x():
    return torch.randn(3, 5, CHANNELS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Shaped:
    """A policy that is not Gaussian, known by its `log_prob` alone: the sum of `shape` at (a - mean(s)) / std."""

    def __init__(self, mean, std, shape):
        self.mean, self.std, self.shape = mean, std, shape

    def log_prob(self, obs, actions):
        return self.shape((actions - self.mean(obs)) / self.std).sum(-1)


SHAPES = dict(
    gaussian=lambda z: -0.5 * z.square(),
    laplace=lambda z: -(1 + z.square()).sqrt(),
    student=lambda z: -1.5 * torch.log1p(z.square() / 2),
    mixture=lambda z: torch.logaddexp(-0.5 * (z - 3).square(), -0.5 * (z + 3).square()),
)
LOG_CONCAVE, OTHER_SHAPES = ("gaussian", "laplace"), ("student", "mixture")


def shaped(policy, kind):
    """A `Shaped` with the mean and std of a Gaussian policy; for "Gaussian" that policy itself."""
    if kind == "Gaussian":
        return policy
    return Shaped(lambda obs: policy(obs)[0], policy.log_std.exp().detach(), SHAPES[kind])


class Wrapped:
    """A Gaussian policy that does not say so."""

    def __init__(self, policy):
        self.log_prob = policy.log_prob


def with_actions(normaliser, x, actions):
    """The normalised actions of x with `actions`, in environment space, in the place of its own, within arctanh's reach."""
    steps = normaliser.denormalise(x)
    steps[..., ACTIONS] = actions.detach()
    return normaliser.normalise(steps)[..., ACTIONS]


def mu_hat(policy, normaliser, x):
    """The policy's mean at the states of x, in normalised actions, and what lies within arctanh's reach."""
    return with_actions(normaliser, x, policy(normaliser.denormalise(x)[..., SPEC.obs])[0])


def differences(policy, obs, actions, k, h=1e-5):
    """∂ log π / ∂ actions[..., k] by finite differences."""
    step = torch.zeros(24, dtype=torch.float64)
    step[k] = h
    return ((policy.log_prob(obs, actions + step) - policy.log_prob(obs, actions - step)) / (2 * h)).detach()


def grid_argmin(value, low, high, points=65, rounds=12):
    """argmin of a convex function of one number, elementwise in low and high [N], by grids each within the last one's cells."""
    for _ in range(rounds):
        grid = low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, points, dtype=low.dtype)
        best = grid.gather(1, value(grid).argmin(1, keepdim=True))[:, 0]
        width = (high - low) / (points - 1)
        low, high = best - width, best + width
    return best


# The gradient, and the paper's rule


def test_raw_gradient_in_closed_form(policy, normaliser, x):
    mean, std = policy(normaliser.obs(x))
    a, d = normaliser.actions(x), normaliser.std[ACTIONS]
    slope = d if normaliser.transform == "raw" else d * (1 - a**2)
    torch.testing.assert_close(action_gradient(policy, normaliser, x, "raw"), ((mean - a) / std**2 * slope).detach())


@pytest.mark.parametrize("kind", ["Gaussian", "laplace", "student", "mixture"])
def test_raw_gradient_against_finite_differences(policy, normaliser, x, kind):
    policy = shaped(policy, kind)
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
    normaliser, k = fitted("raw"), 7
    d = normaliser.std[ACTIONS.start + k]
    variance = (policy.log_std[k].exp().detach() / d) ** 2
    expected = differences(policy, normaliser.obs(x), normaliser.actions(x), k) * d * variance
    torch.testing.assert_close(action_gradient(policy, normaliser, x, "natural")[..., k], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("units", ["natural", "raw"])
@every_transform
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
def test_explicit_is_lam_times_the_gradient(policy, normaliser, x, units):
    shift = Guide("explicit", policy, normaliser, 0.7, STEPS, units=units)(x, None, 1.0, 3)[..., ACTIONS]
    torch.testing.assert_close(shift, 0.7 * action_gradient(policy, normaliser, x, units), rtol=1e-6, atol=0)
    if units == "natural":  # the default, and so much of the way to the mean
        torch.testing.assert_close(shift, Guide("explicit", policy, normaliser, 0.7, STEPS)(x, None, 1.0, 3)[..., ACTIONS])
        torch.testing.assert_close(shift, 0.7 * (mu_hat(policy, normaliser, x) - x[..., ACTIONS]), rtol=1e-6, atol=1e-9)


# What holds for every rule


@every_way
@pytest.mark.parametrize("on", [None, "noised", "denoised"])
def test_only_actions_are_shifted_and_nothing_in_the_warm_up(policy, normaliser, x, rule, units, on):
    guide = Guide(rule, policy, normaliser, 0.75, STEPS, warmup=3, units=units, on=on)
    assert guide.on == (on or ("noised" if rule in ("explicit", "annealed") else "denoised"))
    denoised = 0.5 * x.flip(0)
    before = x.clone(), denoised.clone()
    shift = guide(x, None if guide.on == "noised" else denoised, 1.0, 3)
    assert shift.shape == x.shape and (shift[..., OTHERS] == 0).all() and (shift[..., ACTIONS] != 0).all()
    assert torch.equal(x, before[0]) and torch.equal(denoised, before[1])
    for step in range(3):
        assert torch.equal(guide(x, denoised, 80.0, step), torch.zeros_like(x))
    for lam in (0.0, torch.zeros(3)):
        none = Guide(rule, policy, normaliser, lam, STEPS, units=units, on=on)
        assert torch.equal(none(x, denoised, 1.0, 5), torch.zeros_like(x))
    # The rule is taken at one of the two alone.
    other = (x, denoised + 1) if guide.on == "noised" else (x + 1, denoised)
    assert torch.equal(guide(*other, 1.0, 3), shift)
    same = (x + 1, denoised) if guide.on == "noised" else (x, denoised + 1)
    assert not torch.equal(guide(*same, 1.0, 3), shift)


@every_way
def test_only_the_rules_that_should_look_at_step_and_noise_level(policy, normaliser, x, rule, units):
    guide = Guide(rule, policy, normaliser, 0.75, STEPS, units=units)
    assert torch.equal(guide(x, x, 1.0, 2), guide(x, x, 1.0, 7)) != rule.startswith("normalised")
    assert torch.equal(guide(x, x, 1.0, 2), guide(x, x, 3.0, 2)) != (rule in ("smoothed", "annealed"))


@pytest.mark.parametrize("rule, units, kind", KINDS)
def test_the_policys_weights_are_left_alone(policy, normaliser, x, rule, units, kind):
    guide = Guide(rule, shaped(policy, kind), normaliser, 0.75, STEPS, units=units)
    weights = {name: p.clone() for name, p in policy.state_dict().items()}
    assert all(p.requires_grad for p in policy.parameters())
    guide(x.requires_grad_(), x, 1.0, 0)
    assert x.grad is None and all(p.grad is None and p.requires_grad for p in policy.parameters())
    assert all(torch.equal(p, weights[name]) for name, p in policy.state_dict().items())


@pytest.mark.parametrize("rule, units, kind", KINDS)
def test_the_shift_holds_no_graph(policy, x, rule, units, kind):
    guide = Guide(rule, shaped(policy, kind), fitted("arctanh"), 0.75, STEPS, units=units)
    assert not guide(x.requires_grad_(), x, 1.0, 0).requires_grad


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_gradient_no_shift(rule, units, dtype):
    """Actions exactly at the mean, in all trajectories or in one of them: no 0/0."""
    policy, normaliser = GaussianPolicy(45, 24, hidden=[]).to(dtype), Normaliser(SPEC, "raw").to(dtype)
    torch.nn.init.zeros_(policy.net[0].weight)
    torch.nn.init.zeros_(policy.net[0].bias)
    x = torch.randn(3, 5, CHANNELS, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x[:2, :, ACTIONS] = 0.0
    for lam in (0.75, 1e4, torch.tensor([0.75, 0.0, 2.0])):
        guide = Guide(rule, policy, normaliser, lam, STEPS, units=units)
        shift = guide(x, x, 1.0, 0)
        assert torch.equal(shift[:2], torch.zeros_like(x[:2])) and (shift[2, :, ACTIONS].abs() > 0).all()
        assert shift.isfinite().all()


@every_way
def test_each_trajectory_has_its_own_lam(policy, normaliser, x, rule, units):
    lams = [0.0, 0.3, 20.0]
    together = Guide(rule, policy, normaliser, torch.tensor(lams), STEPS, units=units)(x, x, 0.7, 2)
    for i, lam in enumerate(lams):
        one = x[i : i + 1]
        torch.testing.assert_close(
            together[i : i + 1], Guide(rule, policy, normaliser, lam, STEPS, units=units)(one, one, 0.7, 2)
        )
    assert torch.equal(together[0], torch.zeros_like(x[0])) and (together[1:, :, ACTIONS] != 0).all()
    listed = Guide(rule, policy, normaliser, lams, STEPS, units=units)(x, x, 0.7, 2)
    assert torch.equal(listed, together)


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("rule", "implicit", "'explicit', 'normalised_linear', 'normalised_cosine', 'proximal', 'smoothed'"),
        ("units", "metric", "'natural', 'raw'"),
        ("on", "both", "'noised', 'denoised'"),
        ("lam", -0.1, "at least 0"),
        ("lam", math.nan, "finite"),
        ("lam", math.inf, "finite"),
        ("lam", -math.inf, "finite"),
        ("lam", [0.5, -1.0], "at least 0"),
        ("lam", [0.5, math.nan], "finite"),
    ],
)
def test_what_is_not_allowed_is_named(policy, normaliser, name, value, allowed):
    good = dict(rule="explicit", policy=policy, normaliser=normaliser, lam=1.0, steps=STEPS, units="raw", on="noised")
    Guide(**good)
    with pytest.raises(ValueError) as error:
        Guide(**{**good, name: value})
    assert str(error.value).startswith(f"{name}={value!r} is not allowed") and allowed in str(error.value)


@pytest.mark.parametrize("rule", RULES)
def test_natural_units_need_a_gaussian_policy(policy, normaliser, rule):
    for other in (Wrapped(policy), Stacked([policy, Wrapped(policy)])):
        Guide(rule, other, normaliser, 1.0, STEPS, units="raw")
        if rule in ("explicit", "proximal", "annealed"):
            with pytest.raises(
                ValueError, match=r"units='natural' is not allowed for rule='\w+' and a policy that is not Gaussian"
            ):
                Guide(rule, other, normaliser, 1.0, STEPS)
        else:  # these have no units
            Guide(rule, other, normaliser, 1.0, STEPS)
    Guide(rule, Stacked([policy, policy]), normaliser, 1.0, STEPS)


# The normalised rules


@every_transform
def test_the_normalised_shift_is_of_length_lam_and_along_the_gradient(policy, transform, x):
    normaliser = fitted(transform)
    lam = torch.tensor([0.5, 1.0, 30.0], dtype=torch.float64)
    y = x.clone().requires_grad_()
    policy.log_prob(normaliser.obs(y).detach(), normaliser.actions(y)).sum().backward()
    gradient = y.grad[..., ACTIONS].flatten(1)
    shift = normalised(policy, normaliser, x, lam[:, None, None]).flatten(1)
    torch.testing.assert_close(shift.norm(dim=1), lam, rtol=1e-6, atol=0)
    torch.testing.assert_close((shift * gradient).sum(1), lam * gradient.norm(dim=1), rtol=1e-6, atol=0)


def test_the_schedule():
    for k, n, bump, expected in (
        (0, 10, 0.0, 1.0),
        (5, 10, 0.0, 0.5),
        (8, 10, 0.0, 0.2),
        (4, 10, 0.3, 0.6 + 0.3),
        (0, 4, 0.3, 1 + 0.3 * math.sqrt(0.5)),
        (1, 6, 0.3, 5 / 6 + 0.3 * math.sqrt(3) / 2),
        (9, 10, 0.0, 0.0),
        (9, 10, 0.3, 0.0),
        (127, 128, 0.3, 0.0),
    ):
        assert schedule(k, n, bump) == pytest.approx(expected, abs=1e-12), (k, n, bump)


@pytest.mark.parametrize("rule, bump", [("normalised_linear", 0.0), ("normalised_cosine", 0.3)])
def test_the_normalised_rules_follow_the_schedule(policy, normaliser, x, rule, bump):
    guide = Guide(rule, policy, normaliser, 0.5, STEPS)
    for k in range(STEPS):
        expected = 0.5 * (1 - k / STEPS + bump * math.sin(math.pi * (k + 1) / STEPS)) * (k < STEPS - 1)
        length = guide(x, x, 1.0, k).flatten(1).norm(dim=1)
        torch.testing.assert_close(length, torch.full_like(length, expected), rtol=1e-6, atol=0)


# Proximal


def std_hat(policy, normaliser):
    """The policy's std in normalised actions; of the raw transform."""
    return (policy.log_std.exp() / normaliser.std[ACTIONS]).detach()


@pytest.mark.parametrize("lam", [1e-3, 0.5, 1.0, 40.0])
def test_proximal_in_closed_form(policy, x, lam):
    normaliser = fitted("raw")
    way, s = mu_hat(policy, normaliser, x) - x[..., ACTIONS], std_hat(policy, normaliser)
    torch.testing.assert_close(proximal(policy, normaliser, x, lam), lam / (1 + lam) * way)
    torch.testing.assert_close(proximal(policy, normaliser, x, lam, "raw"), lam / (lam + s**2) * way)
    for units, share in (("natural", lam / (1 + lam)), ("raw", lam / (lam + s**2))):
        guide = Guide("proximal", policy, normaliser, lam, STEPS, units=units)
        torch.testing.assert_close(guide(x, x, 1.0, 0)[..., ACTIONS], share * way, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind, units", [("Gaussian", "natural"), ("Gaussian", "raw"), ("laplace", "raw"), ("student", "raw")])
def test_proximal_satisfies_its_first_order_condition(policy, normaliser, x, kind, units):
    """(a' - a) / λ = ∇ log π(a'), by finite differences; with arctanh in environment space, the metric taken at a."""
    lam = 0.3
    target = shaped(policy, kind)
    y = x.clone()
    y[..., ACTIONS] += proximal(target, normaliser, x, lam, units)
    obs, a, a_new = normaliser.obs(x), normaliser.actions(x), normaliser.actions(y)
    d = normaliser.std[ACTIONS] * (1 if normaliser.transform == "raw" else 1 - a**2)
    metric = (policy.log_std.exp().detach() if units == "natural" else d) ** 2 * torch.ones_like(a)
    for k in (0, 11, 23):
        pull = lam * metric[..., k] * differences(target, obs, a_new, k)
        within = torch.ones_like(pull, dtype=torch.bool) if normaliser.transform == "raw" else a_new[..., k].abs() < 0.998
        assert within.sum() > 5
        torch.testing.assert_close((a_new - a)[..., k][within], pull[within], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("units", ["natural", "raw"])
def test_proximal_for_lam_to_infinity_is_the_mean(policy, normaliser, x, units):
    way = mu_hat(policy, normaliser, x) - x[..., ACTIONS]
    torch.testing.assert_close(proximal(policy, normaliser, x, 1e12, units), way, rtol=1e-6, atol=1e-6)


# Smoothed


@pytest.mark.parametrize("sigma", [0.05, 1.0, 30.0])
def test_smoothed_in_closed_form(policy, x, sigma):
    normaliser = fitted("raw")
    way, s = mu_hat(policy, normaliser, x) - x[..., ACTIONS], std_hat(policy, normaliser)
    for lam in (1e-3, 0.5, 40.0):
        share = lam * sigma**2 / ((1 + lam) * sigma**2 + s**2)
        torch.testing.assert_close(smoothed(policy, normaliser, x, lam, sigma), share * way)
        shift = Guide("smoothed", policy, normaliser, lam, STEPS)(x, x, sigma, 0)[..., ACTIONS]
        torch.testing.assert_close(shift, share * way, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sigma", [0.1, 0.6, 2.0])
def test_smoothed_starts_as_the_score_of_the_convolved_policy(policy, x, sigma):
    """Its derivative at λ = 0 is σ² d/da ln ∫ π(u) N(a; u, σ²) du, the integral by quadrature."""
    normaliser, h = fitted("raw"), 1e-4
    mean, s, a = mu_hat(policy, normaliser, x), std_hat(policy, normaliser), x[..., ACTIONS]

    def log_convolved(a):
        u = mean[..., None] + s[:, None] * torch.linspace(-12, 12, 2001, dtype=torch.float64)
        density = torch.distributions.Normal(mean[..., None], s[:, None]).log_prob(u)
        noise = torch.distributions.Normal(u, sigma).log_prob(a[..., None])
        return torch.logsumexp(density + noise, -1)  # the spacing of u does not depend on a

    score = (log_convolved(a + h) - log_convolved(a - h)) / (2 * h)
    derivative = smoothed(policy, normaliser, x, 1e-7, sigma) / 1e-7
    torch.testing.assert_close(derivative, sigma**2 * score, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["Gaussian", "laplace"])
def test_smoothed_fades_with_the_noise(policy, normaliser, x, kind):
    policy, largest = shaped(policy, kind), []
    for sigma in (1.0, 1e-1, 1e-2, 1e-3, 1e-4):
        largest.append(float(smoothed(policy, normaliser, x, 2.0, sigma).abs().max()))
    assert largest == sorted(largest, reverse=True) and largest[0] > 0.1 and largest[-1] < 1e-6, largest


@pytest.mark.parametrize("sigma", [0.01, 1.0, 50.0])
def test_annealed_in_closed_form(policy, x, sigma):
    """λw / (1 + λw) (μ - a) with w = √(σ / (1 + σ)): all of λ at high noise, 0.7 of it where the noise is the data's std."""
    normaliser, lam = fitted("raw"), 2.5
    weight = lam * {0.01: math.sqrt(1 / 101), 1.0: math.sqrt(1 / 2), 50.0: math.sqrt(50 / 51)}[sigma]
    shift = Guide("annealed", policy, normaliser, lam, STEPS)(x, None, sigma, 0)[..., ACTIONS]
    torch.testing.assert_close(shift, weight / (1 + weight) * (mu_hat(policy, normaliser, x) - x[..., ACTIONS]))


@pytest.mark.parametrize("rule", ["proximal", "smoothed"])
def test_a_vanishing_pull_takes_saturated_actions_to_the_edge_at_most(policy, x, rule):
    """Actions so large that arctanh cannot give them back: what the environment sees moves by no more than that loses."""
    normaliser = fitted("arctanh")
    x[..., ACTIONS] = (4.5 * x[..., ACTIONS].sign() - normaliser.mean[ACTIONS]) / normaliser.std[ACTIONS]
    before = normaliser.actions(x)
    assert (before.abs() > Normaliser.ACTION_LIMIT).all()
    x[..., ACTIONS] += (
        proximal(policy, normaliser, x, 1e-9) if rule == "proximal" else smoothed(policy, normaliser, x, 1.0, 1e-4)
    )
    assert (normaliser.actions(x) - before).abs().max() < 1.01 * (1 - Normaliser.ACTION_LIMIT)


def test_smoothed_is_the_implicit_step_on_the_moreau_envelope(policy, x):
    """argmin over a' and u of |a' - a|² / (2 λσ²) + |u - a'|² / (2 σ²) - log π(u), by grids in both."""
    normaliser, lam, sigma, n = fitted("raw"), 1.5, 0.8, 9
    a, s = x[..., ACTIONS], std_hat(policy, normaliser)
    mean = mu_hat(policy, normaliser, x)
    start, centre, width = (v.reshape(-1)[:72, None, None] for v in (a, mean, s.expand_as(a)))
    lows, highs = [torch.minimum(start, centre) - 1] * 2, [torch.maximum(start, centre) + 1] * 2
    fraction = torch.linspace(0, 1, 41, dtype=torch.float64)
    for _ in range(n):
        moved, u = (low + (high - low) * fraction for low, high in zip(lows, highs))
        moved = moved.mT
        value = (moved - start) ** 2 / (2 * lam * sigma**2) + (u - moved) ** 2 / (2 * sigma**2)
        best = (value - SHAPES["laplace"]((u - centre) / width)).flatten(1).argmin(1)
        found = [moved[:, :, 0].gather(1, (best // 41)[:, None]), u[:, 0].gather(1, (best % 41)[:, None])]
        # Four cells to each side, for the valley may lie across the grid.
        spans = [(high - low) / 10 for low, high in zip(lows, highs)]
        lows, highs = ([f[..., None] + sign * span for f, span in zip(found, spans)] for sign in (-1, 1))
    shift = smoothed(shaped(policy, "laplace"), normaliser, x, lam, sigma).reshape(-1)[:72]
    torch.testing.assert_close(shift, found[0][:, 0] - start[:, 0, 0], rtol=1e-3, atol=1e-4)


# Policies that are not Gaussian


@pytest.fixture
def full_precision(monkeypatch):
    """As on a device without bfloat16."""
    monkeypatch.setattr(edm, "has_bfloat16", lambda device: False)


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_a_gaussian_policy_that_does_not_say_so_is_guided_to_alike(policy, normaliser, x, rule, dtype):
    policy, normaliser, x = policy.to(dtype), normaliser.to(dtype), x.to(dtype)
    for lam in (1e-2, 1.0, 1e4):
        for sigma in (0.1, 1.0, 40.0):
            shifts = [
                Guide(rule, p, normaliser, lam, STEPS, units="raw", on="noised")(x, None, sigma, 2)
                for p in (policy, Wrapped(policy))
            ]
            torch.testing.assert_close(*shifts, rtol=1e-4, atol=1e-4)


def around(shape, std, reach, seed=0):
    """A policy of one mean for each of [8, 24] actions, and starts up to `reach` away from it."""
    generator = torch.Generator().manual_seed(seed)
    mean, away = (2 * torch.rand(8, 24, generator=generator, dtype=torch.float64) - 1 for _ in range(2))
    return Shaped(lambda obs: mean, std, SHAPES[shape]), mean, mean + reach * away


WEIGHTS = (0.0, 1e-4, 1e-2, 0.1, 1.0, 100.0, 1e4)


@pytest.mark.parametrize("reach", [1.0, 5.0, 25.0])
@pytest.mark.parametrize("std", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("shape", LOG_CONCAVE)
def test_newton_finds_the_minimum(shape, std, reach):
    """Against a search on a grid, to a thousandth of the policy's std."""
    policy, mean, start = around(shape, std, reach)
    for weight in WEIGHTS:
        expected = start
        if weight > 0:

            def value(a, weight=weight):
                return (a - start.view(-1, 1)) ** 2 / (2 * weight) - SHAPES[shape]((a - mean.view(-1, 1)) / std)

            bounds = torch.minimum(start, mean).view(-1) - 1, torch.maximum(start, mean).view(-1) + 1
            expected = grid_argmin(value, *bounds).view_as(start)
        error = (newton(policy, None, start, weight) - expected).abs().max()
        assert error < 1e-3 * std, (weight, float(error))


@pytest.mark.parametrize("reach", [1.0, 5.0])
@pytest.mark.parametrize("std", [0.1, 0.5])
@pytest.mark.parametrize("shape", [*LOG_CONCAVE, *OTHER_SHAPES])
def test_newton_solves_its_equation_and_goes_downhill(shape, std, reach):
    """a - start = weight ∇ log π(a), the gradient by finite differences; at a point no worse than the start."""
    policy, _, start = around(shape, std, reach)
    for weight in WEIGHTS:
        a = newton(policy, None, start, weight)
        gradient = torch.stack([differences(policy, None, a, k, 1e-6) for k in range(24)], -1)
        # The residual as a distance, to first order, for where log π is as curved as 1 / std².
        distance = (a - start - weight * gradient).abs() / (1 + weight / std**2)
        assert distance.max() < 1e-3 * std, (weight, float(distance.max()))
        cost = [(v - start).square().sum(-1) / 2 - weight * policy.log_prob(None, v) for v in (a, start)]
        assert (cost[0] <= cost[1] + 1e-9).all(), weight


def test_newton_takes_a_weight_for_each_trajectory_and_float32():
    policy, _, start = around("laplace", 0.1, 1.0)
    weight = torch.tensor([0.0, 0.1, 1.0, 10.0, 0.0, 0.1, 1.0, 10.0], dtype=torch.float64)[:, None]
    together = newton(policy, None, start, weight)
    for i in range(8):
        torch.testing.assert_close(together[i], newton(policy, None, start, float(weight[i]))[i], rtol=0, atol=1e-9)
    mean = policy.mean(None).float()
    single = newton(Shaped(lambda obs: mean, 0.1, SHAPES["laplace"]), None, start.float(), weight.float())
    torch.testing.assert_close(single.double(), together, rtol=0, atol=1e-5)


# In the sampler


def draw(denoise, guide=None, steps=8, churn=2.0, shape=(2, 8, CHANNELS), dtype=torch.float32):
    return sampler.sample(denoise, shape, steps, churn, torch.Generator().manual_seed(0), guide=guide, dtype=dtype)


def small_denoiser(transform):
    torch.manual_seed(0)
    denoiser = edm.Denoiser(45, 24, 8, features=8, blocks=2, transform=transform)
    denoiser.normaliser.load_state_dict(fitted(transform).float().state_dict())
    return denoiser


def exact(x, sigma):
    """The exact denoiser of N(0, 1) data."""
    return x / (1 + sigma**2)


@every_way
@pytest.mark.parametrize("on", ["noised", "denoised"])
@every_transform
def test_lam_0_is_the_unguided_sampler_bit_for_bit(transform, rule, units, on):
    normaliser, policy = fitted(transform).float(), a_policy().float()

    def guided(lam, warmup=0):
        return draw(exact, Guide(rule, policy, normaliser, lam, 4, warmup, units, on), steps=4)

    unguided, _ = draw(exact, steps=4)
    # No guidance, none for all, none but warm-up.
    for lam, warmup in ((0.0, 0), (torch.zeros(2), 0), (0.5, 4)):
        assert torch.equal(guided(lam, warmup)[0], unguided)
    late, _ = guided(0.01, 2)  # the last two steps alone, for the normalised rules leave the last
    assert not torch.equal(late, unguided)
    assert not torch.equal(guided(0.01, 1)[0], late)
    mixed, _ = guided(torch.tensor([0.0, 0.01]))
    assert torch.equal(mixed[0], unguided[0]) and not torch.equal(mixed[1], unguided[1])


def untouched(x, sigma):
    """A denoiser that believes everything: the sampler leaves x as it is."""
    return x


@pytest.mark.parametrize("units", ["natural", "raw"])
def test_each_guided_step_contracts_by_one_minus_lam(policy, units, monkeypatch):
    """Where nothing else moves, â - μ̂ shrinks by 1 - λ a step, in raw units by 1 - λ (d/s)²."""
    monkeypatch.setattr(sampler, "DIVERGED", 1e9)  # x keeps the size of its first noise
    normaliser, steps, warmup = fitted("raw"), 12, 3
    (start, _), sharp = draw(untouched, steps=steps, churn=0.0, dtype=torch.float64), 1.0
    if units == "raw":
        sharp = (normaliser.std[ACTIONS] / policy.log_std.exp()).detach() ** 2
    for lam in (0.25, 1.0, 1.875):
        guide = Guide("explicit", policy, normaliser, lam, steps, warmup, units)
        x, _ = draw(untouched, guide, steps=steps, churn=0.0, dtype=torch.float64)
        target = mu_hat(policy, normaliser, start)
        expected = target + (1 - lam * sharp) ** (steps - warmup) * (start[..., ACTIONS] - target)
        torch.testing.assert_close(x[..., ACTIONS], expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(x[..., OTHERS], start[..., OTHERS])  # the states do not hear of it


@every_way
def test_a_lam_for_each_trajectory_in_the_sampler(policy, normaliser, rule, units):
    """Each is what it is where all have its λ, noise and all."""
    lams = [0.5, 0.0625, 0.0]

    def guided(lam):
        guide = Guide(rule, policy, normaliser, lam, 8, 1, units)
        return draw(exact, guide, shape=(3, 8, CHANNELS), dtype=torch.float64)[0]

    together, alike = guided(torch.tensor(lams)), [guided(lam) for lam in lams]
    for i, each in enumerate(alike):
        torch.testing.assert_close(together[i], each[i])
    assert torch.equal(together[2], alike[2][2])
    assert not torch.allclose(alike[0], alike[1], atol=1e-3) and not torch.allclose(alike[1], alike[2], atol=1e-3)


@every_transform
def test_lam_2_is_the_limit_of_explicit(policy, transform):
    normaliser = fitted(transform)

    def guided(lam):
        guide = Guide("explicit", policy, normaliser, lam, 64, 5)
        return draw(exact, guide, steps=64, churn=0.0, dtype=torch.float64)

    for lam, diverges in ((1.0, False), (1.9, False), (2.5, True), (5.0, True)):
        x, diverged = guided(lam)
        assert x.isfinite().all() and diverged.tolist() == [diverges] * 2, lam
    unguided, _ = draw(exact, steps=64, churn=0.0, dtype=torch.float64)
    away = [(v[..., ACTIONS] - mu_hat(policy, normaliser, v)).abs().mean() for v in (unguided, guided(1.0)[0])]
    assert away[1] < 0.05 * away[0]


def test_the_limit_in_raw_units_is_that_of_the_sharpest_action(policy):
    normaliser = fitted("raw")
    limits = 2 * std_hat(policy, normaliser) ** 2
    for share, diverges in ((0.8, False), (1.4, True)):
        guide = Guide("explicit", policy, normaliser, share * float(limits.min()), 64, 5, "raw")
        x, diverged = draw(exact, guide, steps=64, churn=0.0, dtype=torch.float64)
        assert x.isfinite().all() and diverged.all() == diverged.any() == diverges, share
        if diverges:  # in that action first
            assert x[..., ACTIONS].abs().amax((0, 1)).argmax() == limits.argmin()


def test_a_huge_lam_of_explicit_in_float32_is_counted_and_finite():
    denoiser, policy = small_denoiser("raw"), GaussianPolicy(45, 24, hidden=[16])
    for lam in (3.0, 1e6, 1e38):
        x, diverged = draw(denoiser, Guide("explicit", policy, denoiser.normaliser, lam, 24), steps=24)
        assert x.isfinite().all() and diverged.all() and math.isfinite(float(x.abs().max()))


LAMS = (0.0, 1e-3, 1.0, 100.0, 10_000.0)


@pytest.mark.slow
@every_transform
@pytest.mark.parametrize(
    "rule, units, kind",
    [
        ("proximal", "natural", "Gaussian"),
        ("proximal", "raw", "Gaussian"),
        ("smoothed", "raw", "Gaussian"),
        ("proximal", "raw", "laplace"),
        ("smoothed", "raw", "laplace"),
        ("smoothed", "raw", "student"),
        ("smoothed", "raw", "mixture"),
        ("annealed", "natural", "Gaussian"),
        ("annealed", "raw", "Gaussian"),
        ("annealed", "raw", "laplace"),
    ],
)
def test_implicit_rules_are_stable_for_every_lam(rule, units, kind, transform):
    """Beside a policy of common std one of a hundredth of it."""
    denoiser, policies = small_denoiser(transform), [a_policy().float(), a_policy(scale=0.01).float()]
    policy = Stacked(policies)
    if kind != "Gaussian":  # both in one, which differ in their std alone
        std = torch.stack([p.log_std.exp().detach() for p in policies]).repeat_interleave(len(LAMS), 0)[:, None]
        policy = Shaped(lambda obs: policies[0](obs)[0].detach(), std, SHAPES[kind])
    guide = Guide(rule, policy, denoiser.normaliser, torch.tensor(2 * LAMS), 12, units=units)
    x, diverged = draw(denoiser, guide, steps=12, shape=(2 * len(LAMS), 8, CHANNELS))
    assert x.isfinite().all() and not diverged.any()


@every_transform
def test_where_explicit_is_not(transform):
    denoiser, policy = small_denoiser(transform), a_policy().float()
    for lam, diverges in ((0.5, False), (2.5, True)):
        x, diverged = draw(denoiser, Guide("explicit", policy, denoiser.normaliser, lam, 32), steps=32)
        assert x.isfinite().all() and diverged.tolist() == [diverges] * 2, lam


@every_transform
@pytest.mark.parametrize("rule, units", [("proximal", "natural"), ("proximal", "raw"), ("smoothed", "raw")])
def test_implicit_rules_are_stable_to_the_largest_float(rule, units, transform):
    denoiser, policy = small_denoiser(transform), a_policy().float()
    x, diverged = draw(denoiser, Guide(rule, policy, denoiser.normaliser, 1e38, 12, units=units), steps=12)
    assert x.isfinite().all() and not diverged.any()


@pytest.mark.usefixtures("full_precision")
@every_transform
def test_proximal_for_a_large_lam_draws_the_policys_mean_at_its_own_states(transform):
    denoiser, policy = small_denoiser(transform), a_policy().float()

    def away(x):
        return (x[..., ACTIONS] - mu_hat(policy, denoiser.normaliser, x)).abs().max()

    x, _ = draw(denoiser, Guide("proximal", policy, denoiser.normaliser, 1e5, 8))
    assert away(x) < 1e-3 and away(draw(denoiser)[0]) > 1.0


# Stacked policies


def stack(*kinds):
    """Policies of such kinds, each with another mean."""
    return [shaped(a_policy(seed), kind) for seed, kind in enumerate(kinds)]


@pytest.mark.parametrize("rule, units, kind", KINDS)
def test_stacked_policies_guide_each_its_own_block(normaliser, rule, units, kind):
    policies = stack("Gaussian", kind, "Gaussian")
    x = torch.randn(6, 5, CHANNELS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    lam = torch.tensor([0.1, 0.5, 0.0, 2.0, 0.3, 0.9])
    together = Guide(rule, Stacked(policies), normaliser, lam, STEPS, units=units)(x, x, 0.7, 2)
    for i, policy in enumerate(policies):
        block = slice(2 * i, 2 * i + 2)
        alone = Guide(rule, policy, normaliser, lam[block], STEPS, units=units)(x[block], x[block], 0.7, 2)
        torch.testing.assert_close(together[block], alone, rtol=1e-6, atol=1e-6)
        if i:  # so the blocks are told apart
            other = Guide(rule, policies[0], normaliser, lam[block], STEPS, units=units)(x[block], x[block], 0.7, 2)
            assert not torch.allclose(together[block], other, rtol=1e-3, atol=1e-3)


@every_way
def test_stacked_policies_in_the_sampler(normaliser, rule, units):
    policies = stack(*["Gaussian"] * 3)

    def guided(policy):
        guide = Guide(rule, policy, normaliser, 0.0625, 8, 1, units)
        return draw(exact, guide, shape=(6, 8, CHANNELS), dtype=torch.float64)[0]

    together, each = guided(Stacked(policies)), [guided(policy) for policy in policies]
    for i in range(3):
        block = slice(2 * i, 2 * i + 2)
        torch.testing.assert_close(together[block], each[i][block])
        assert not torch.allclose(together[block], each[i - 1][block], atol=1e-3)


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_that_cannot_be_shared_out_is_named(normaliser, x, rule):
    guide = Guide(rule, Stacked(stack("Gaussian", "Gaussian")), normaliser, 0.5, STEPS)
    with pytest.raises(ValueError, match="batch=3 is not allowed; it must be a multiple of the 2 stacked policies"):
        guide(x, x, 1.0, 0)
