"""The guidance rules against closed forms, finite differences, quadrature and brute-force search, alone and in the sampler."""

import math

import pytest
import torch
from conftest import SMALL, SPEC, a_policy, draw

from pgdlib import edm, fast, sampler
from pgdlib.data import ACTION_LIMIT, Normaliser
from pgdlib.guidance import RULES, Guide, action_gradient, newton, proximal, smoothed
from pgdlib.policies import GaussianPolicy

STEPS = 10
WAYS = [(rule, "raw") for rule in RULES] + [(rule, "natural") for rule in ("explicit", "proximal", "annealed")]
KINDS = [(*way, kind) for way in WAYS for kind in ("Gaussian", "laplace") if kind == "Gaussian" or way[1] == "raw"]
every_way = pytest.mark.parametrize("rule, units", WAYS)
every_kind = pytest.mark.parametrize("rule, units, kind", KINDS)
every_transform = pytest.mark.parametrize("transform", ["raw", "arctanh"])


@pytest.fixture(params=[SPEC, SMALL], ids=["pen", "small"])
def spec(request):
    return request.param


@pytest.fixture
def policy(spec):
    return a_policy(spec)


@pytest.fixture(params=["raw", "arctanh"])
def normaliser(request, spec):
    return fitted(request.param, spec)


@pytest.fixture
def x(spec):
    return draw(2, 3, 5, spec.width, dtype=torch.float64)


def fitted(transform, spec=SMALL):
    """A float64 normaliser of random steps, every action of another mean and spread."""
    steps, n = draw(1, 500, spec.width, dtype=torch.float64), spec.action_dim
    steps[:, spec.actions] = (steps[:, spec.actions] * torch.linspace(0.1, 0.5, n) + torch.linspace(-0.3, 0.3, n)).clamp(-1, 1)
    return Normaliser(spec, transform).double().fit(steps)


def rest(x, spec):
    """All that is not actions."""
    return torch.cat([x[..., spec.obs], x[..., spec.reward :]], -1)


class Shaped:
    """A policy that is not Gaussian, known by its `log_prob` alone: the sum of `shape` at (a - mean) / std of `moments(s)`."""

    def __init__(self, moments, shape):
        self.moments, self.shape = moments, shape

    def log_prob(self, obs, actions):
        mean, std = self.moments(obs)
        return self.shape((actions - mean) / std).sum(-1)


SHAPES = dict(
    gaussian=lambda z: -0.5 * z.square(),
    laplace=lambda z: -(1 + z.square()).sqrt(),
    student=lambda z: -1.5 * torch.log1p(z.square() / 2),
    mixture=lambda z: torch.logaddexp(-0.5 * (z - 3).square(), -0.5 * (z + 3).square()),
)
LOG_CONCAVE, OTHER_SHAPES = ("gaussian", "laplace"), ("student", "mixture")


def shaped(policy, kind):
    """A `Shaped` with the means and stds of a Gaussian policy; for "Gaussian" that policy itself."""
    return policy if kind == "Gaussian" else Shaped(policy, SHAPES[kind])


def mu_hat(policy, normaliser, x):
    """The policy's mean at the states of x, in normalised actions, and what lies within arctanh's reach."""
    steps, s = normaliser.denormalise(x), normaliser.spec
    steps[..., s.actions] = policy(steps[..., s.obs])[0].detach()
    return normaliser.normalise(steps)[..., s.actions]


def way_to_the_mean(policy, normaliser, x):
    """μ̂ - â"""
    return mu_hat(policy, normaliser, x) - x[..., normaliser.spec.actions]


def std_hat(policy, normaliser):
    """The policy's std in normalised actions; of the raw transform."""
    return (policy.std[0] / normaliser.std[normaliser.spec.actions]).detach()


def differences(value, actions, k, h=1e-5):
    """∂ value / ∂ actions[..., k] by finite differences."""
    step = torch.zeros(actions.shape[-1], dtype=torch.float64)
    step[k] = h
    return ((value(actions + step) - value(actions - step)) / (2 * h)).detach()


def grid_argmin(value, low, high, points=65, rounds=12):
    """argmin of a convex function of one number, elementwise in low and high [N], by grids each within the last one's cells."""
    for _ in range(rounds):
        grid = low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, points, dtype=low.dtype)
        best = grid.gather(1, value(grid).argmin(1, keepdim=True))[:, 0]
        width = (high - low) / (points - 1)
        low, high = best - width, best + width
    return best


# Closed forms and gradients


@pytest.mark.parametrize("kind", ["Gaussian", "laplace", "student", "mixture"])
def test_the_raw_gradient_against_finite_differences(policy, normaliser, x, kind):
    target, s = shaped(policy, kind), normaliser.spec
    gradient = action_gradient(target, normaliser, x, "raw")

    def value(actions):
        y = torch.cat([x[..., s.obs], actions, x[..., s.reward :]], -1)
        return target.log_prob(normaliser.obs(y), normaliser.actions(y))

    for k in (0, 1, s.action_dim - 1):
        expected = differences(value, x[..., s.actions], k)
        torch.testing.assert_close(gradient[..., k], expected, rtol=1e-6, atol=1e-7)


SHARES = {  # of the way to the mean that a rule goes, of λ, σ and the policy's variance s², for a Gaussian policy
    ("explicit", "natural"): lambda lam, sigma, v: lam,
    ("explicit", "raw"): lambda lam, sigma, v: lam / v,
    ("proximal", "natural"): lambda lam, sigma, v: lam / (1 + lam),
    ("proximal", "raw"): lambda lam, sigma, v: lam / (lam + v),
    ("smoothed", "raw"): lambda lam, sigma, v: lam * sigma**2 / ((1 + lam) * sigma**2 + v),
    ("annealed", "natural"): lambda lam, sigma, v: 1 - 1 / (1 + lam * math.sqrt(sigma / (1 + sigma))),
    ("annealed", "raw"): lambda lam, sigma, v: 1 - 1 / (1 + lam * math.sqrt(sigma / (1 + sigma)) / v),
}


@pytest.mark.parametrize("rule, units", SHARES)
def test_a_rule_in_closed_form(spec, policy, x, rule, units):
    """Natural units are the default."""
    normaliser, named = fitted("raw", spec), {} if units == "natural" else dict(units=units)
    way, variance = way_to_the_mean(policy, normaliser, x), std_hat(policy, normaliser) ** 2
    for lam in (1e-3, 0.5, 1.0, 40.0):
        for sigma in (0.05, 1.0, 30.0):
            shift = Guide(rule, policy, normaliser, lam, STEPS, **named)(x, x, sigma, 0)[..., spec.actions]
            share = SHARES[rule, units](lam, sigma, variance)
            torch.testing.assert_close(shift, share * way, rtol=1e-6, atol=1e-9)


def test_the_natural_gradient_is_the_way_to_the_policys_mean(policy, normaliser, x):
    expected = way_to_the_mean(policy, normaliser, x)
    torch.testing.assert_close(action_gradient(policy, normaliser, x, "natural"), expected)
    for units in ("natural", "raw"):  # where a proximal step of infinite weight ends too
        torch.testing.assert_close(proximal(policy, normaliser, x, 1e12, units), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("units", ["natural", "raw"])
@every_transform
def test_the_gradient_is_finite_at_every_noise_level(transform, units):
    """In float32, as the sampler calls it: at high noise tanh saturates."""
    normaliser, policy = fitted(transform, SPEC).float(), a_policy().float()
    for sigma in (0.0, 1.0, 10.0, 80.0):
        gradient = action_gradient(policy, normaliser, sigma * draw(0, 8, 5, 71), units)
        assert gradient.isfinite().all(), sigma
        if units == "natural":
            assert gradient.abs().max() < 10 * (sigma + 10), sigma  # no further than the mean is away


# What holds for every rule


@every_way
@pytest.mark.parametrize("on", [None, "noised", "denoised"])
def test_only_actions_are_shifted_and_nothing_in_the_warm_up(policy, normaliser, x, rule, units, on):
    guide, s = Guide(rule, policy, normaliser, 0.75, STEPS, warmup=3, units=units, on=on), normaliser.spec
    assert guide.on == (on or ("noised" if rule in ("explicit", "annealed") else "denoised"))
    denoised = 0.5 * x.flip(0)
    before = x.clone(), denoised.clone()
    shift = guide(x, None if guide.on == "noised" else denoised, 1.0, 3)
    assert shift.shape == x.shape and not rest(shift, s).any() and (shift[..., s.actions] != 0).all()
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


@every_kind
def test_no_graph_is_left_and_the_policys_weights_are_left_alone(policy, normaliser, x, rule, units, kind):
    guide = Guide(rule, shaped(policy, kind), normaliser, 0.75, STEPS, units=units)
    weights = {name: p.clone() for name, p in policy.state_dict().items()}
    assert not guide(x.requires_grad_(), x, 1.0, 0).requires_grad
    assert x.grad is None and all(p.grad is None and p.requires_grad for p in policy.parameters())
    assert all(torch.equal(p, weights[name]) for name, p in policy.state_dict().items())


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_gradient_no_shift(rule, units, dtype):
    """Actions exactly at the mean, in all trajectories or in one of them: no 0/0."""
    policy, normaliser = GaussianPolicy(7, 3, hidden=[]).to(dtype), Normaliser(SMALL, "raw").to(dtype)
    for parameter in policy.net.parameters():
        torch.nn.init.zeros_(parameter)
    x = draw(0, 3, 5, 12, dtype=dtype)
    x[:2, :, SMALL.actions] = 0.0
    for lam in (0.75, 1e4, torch.tensor([0.75, 0.0, 2.0])):
        shift = Guide(rule, policy, normaliser, lam, STEPS, units=units)(x, x, 1.0, 0)
        assert torch.equal(shift[:2], torch.zeros_like(x[:2])) and (shift[2, :, SMALL.actions].abs() > 0).all()
        assert shift.isfinite().all()


@every_kind
def test_each_trajectory_has_its_own_lam_and_each_run_of_a_stack_its_own_block(spec, normaliser, rule, units, kind):
    stack, x = a_policy(spec, runs=3), draw(3, 6, 5, spec.width, dtype=torch.float64)

    def shift(policy, lam, x):
        return Guide(rule, shaped(policy, kind), normaliser, lam, STEPS, units=units)(x, x, 0.7, 2)

    lams = [0.1, 0.5, 0.0, 2.0, 20.0, 0.9]
    together = shift(stack, torch.tensor(lams), x)
    for i, lam in enumerate(lams):
        row, run = x[i : i + 1], i // 2
        torch.testing.assert_close(together[i : i + 1], shift(stack.select([run]), lam, row), rtol=1e-6, atol=1e-6)
        if lam:  # so the blocks are told apart
            other = shift(stack.select([run - 1]), lam, row)
            assert not torch.allclose(together[i : i + 1], other, rtol=1e-3, atol=1e-3)
    assert torch.equal(together[2], torch.zeros_like(x[2])) and torch.equal(shift(stack, lams, x), together)


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("rule", "implicit", "'explicit', 'normalised_linear', 'normalised_cosine', 'proximal', 'smoothed'"),
        ("units", "metric", "'natural', 'raw'"),
        ("on", "both", "'noised', 'denoised'"),
        ("lam", -0.1, "at least 0"),
        ("lam", math.nan, "finite"),
        ("lam", math.inf, "finite"),
        ("lam", [0.5, -1.0], "at least 0"),
        ("lam", [0.5, math.nan], "finite"),
        ("lam", [[0.5]], "one number or one a trajectory"),
    ],
)
def test_what_is_not_allowed_is_named(name, value, allowed):
    good = dict(policy=a_policy(SMALL), normaliser=fitted("raw"), rule="explicit", lam=1.0, steps=9, units="raw", on="noised")
    Guide(**good)
    with pytest.raises(ValueError) as error:
        Guide(**{**good, name: value})
    assert str(error.value).startswith(f"{name}={value!r} is not allowed") and allowed in str(error.value)


@pytest.mark.parametrize("rule", RULES)
def test_natural_units_need_a_policy_with_a_std(rule):
    given = rule, shaped(a_policy(SMALL), "gaussian"), fitted("raw"), 1.0, STEPS
    Guide(*given, units="raw")
    if rule in ("explicit", "proximal", "annealed"):
        reason = f"units='natural' is not allowed for rule='{rule}' and a policy without a std"
        with pytest.raises(ValueError, match=reason):
            Guide(*given)
    else:  # these have no units
        Guide(*given)


# Single rules


@pytest.mark.parametrize("rule, bump", [("normalised_linear", 0.0), ("normalised_cosine", 0.3)])
def test_the_normalised_rules_are_along_the_gradient_and_as_long_as_the_schedule_says(policy, normaliser, x, rule, bump):
    lam = torch.tensor([0.5, 1.0, 30.0], dtype=torch.float64)
    guide = Guide(rule, policy, normaliser, lam, STEPS)
    gradient = action_gradient(policy, normaliser, x, "raw").flatten(1)
    for k in range(STEPS):
        expected = lam * (1 - k / STEPS + bump * math.sin(math.pi * (k + 1) / STEPS)) * (k < STEPS - 1)
        shift = guide(x, x, 1.0, k)[..., normaliser.spec.actions].flatten(1)
        torch.testing.assert_close(shift.norm(dim=1), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close((shift * gradient).sum(1), expected * gradient.norm(dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind, units", [("Gaussian", "natural"), ("Gaussian", "raw"), ("laplace", "raw"), ("student", "raw")])
def test_proximal_satisfies_its_first_order_condition(policy, normaliser, x, kind, units):
    """(a' - a) / λ = ∇ log π(a'), by finite differences; with arctanh in environment space, the metric taken at a."""
    lam, s, raw = 0.3, normaliser.spec, normaliser.transform == "raw"
    target, y = shaped(policy, kind), x.clone()
    y[..., s.actions] += proximal(target, normaliser, x, lam, units)
    obs, a, a_new = normaliser.obs(x), normaliser.actions(x), normaliser.actions(y)
    d = normaliser.std[s.actions] * (1 if raw else 1 - a**2)
    metric = (policy.std[0].detach() if units == "natural" else d) ** 2 * torch.ones_like(a)
    for k in (0, 1, s.action_dim - 1):
        pull = lam * metric[..., k] * differences(lambda actions: target.log_prob(obs, actions), a_new, k)
        within = torch.ones_like(pull, dtype=torch.bool) if raw else a_new[..., k].abs() < 0.998
        assert within.sum() > 5
        torch.testing.assert_close((a_new - a)[..., k][within], pull[within], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sigma", [0.1, 0.6, 2.0])
def test_smoothed_starts_as_the_score_of_the_convolved_policy(spec, policy, x, sigma):
    """Its derivative at λ = 0 is σ² d/da ln ∫ π(u) N(a; u, σ²) du, the integral by quadrature."""
    normaliser, h = fitted("raw", spec), 1e-4
    mean, s, a = mu_hat(policy, normaliser, x), std_hat(policy, normaliser), x[..., spec.actions]

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
    policy, sigmas = shaped(policy, kind), (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
    largest = [float(smoothed(policy, normaliser, x, 2.0, sigma).abs().max()) for sigma in sigmas]
    assert largest == sorted(largest, reverse=True) and largest[0] > 0.1 and largest[-1] < 1e-6, largest


def test_smoothed_is_the_implicit_step_on_the_moreau_envelope(spec, policy, x):
    """argmin over a' and u of |a' - a|² / (2 λσ²) + |u - a'|² / (2 σ²) - log π(u), by grids in both."""
    normaliser, lam, sigma = fitted("raw", spec), 1.5, 0.8
    a, mean = x[..., spec.actions], mu_hat(policy, normaliser, x)
    start, centre, width = (v.reshape(-1)[:72, None, None] for v in (a, mean, std_hat(policy, normaliser).expand_as(a)))
    lows, highs = [torch.minimum(start, centre) - 1] * 2, [torch.maximum(start, centre) + 1] * 2
    fraction = torch.linspace(0, 1, 41, dtype=torch.float64)
    for _ in range(9):
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


@pytest.mark.parametrize("rule", ["proximal", "smoothed"])
def test_a_vanishing_pull_takes_saturated_actions_to_the_edge_at_most(spec, policy, x, rule):
    """Actions so large that arctanh cannot give them back: what the environment sees moves by no more than that loses."""
    normaliser, s = fitted("arctanh", spec), spec.actions
    x[..., s] = (4.5 * x[..., s].sign() - normaliser.mean[s]) / normaliser.std[s]
    before = normaliser.actions(x)
    assert (before.abs() > ACTION_LIMIT).all()
    given = policy, normaliser, x
    x[..., s] += proximal(*given, 1e-9) if rule == "proximal" else smoothed(*given, 1.0, 1e-4)
    assert (normaliser.actions(x) - before).abs().max() < 1.01 * (1 - ACTION_LIMIT)


# Policies that are not Gaussian


@pytest.fixture
def full_precision(monkeypatch):
    """As on a device without bfloat16."""
    for module in (fast, edm):
        monkeypatch.setattr(module, "has_bfloat16", lambda device: False)


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_a_gaussian_policy_that_does_not_say_so_is_guided_to_alike(policy, normaliser, x, rule, dtype):
    policy, normaliser, x = policy.to(dtype), normaliser.to(dtype), x.to(dtype)
    for lam in (1e-2, 1.0, 1e4):
        for sigma in (0.1, 1.0, 40.0):
            shifts = [
                Guide(rule, p, normaliser, lam, STEPS, units="raw", on="noised")(x, None, sigma, 2)
                for p in (policy, shaped(policy, "gaussian"))
            ]
            torch.testing.assert_close(*shifts, rtol=1e-4, atol=1e-4)


def around(shape, std, reach, dtype=torch.float64):
    """A policy of one mean for each of [8, 24] actions, and starts up to `reach` away from it."""
    generator = torch.Generator().manual_seed(0)
    mean, away = (2 * torch.rand(8, 24, generator=generator, dtype=torch.float64) - 1 for _ in range(2))
    return Shaped(lambda obs: (mean.to(dtype), std), SHAPES[shape]), mean, (mean + reach * away).to(dtype)


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
        gradient = torch.stack([differences(lambda v: policy.log_prob(None, v), a, k, 1e-6) for k in range(24)], -1)
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
    policy, _, start = around("laplace", 0.1, 1.0, torch.float32)
    torch.testing.assert_close(newton(policy, None, start, weight.float()).double(), together, rtol=0, atol=1e-5)


# In the sampler


def drawn(denoise, guide=None, steps=8, churn=2.0, n=2, dtype=torch.float32):
    return sampler.sample(denoise, (n, 8, 12), steps, churn, torch.Generator().manual_seed(0), guide, dtype=dtype)


def small_denoiser(transform):
    torch.manual_seed(0)
    denoiser = edm.Denoiser(7, 3, 8, features=8, blocks=2, transform=transform)
    denoiser.normaliser.load_state_dict(fitted(transform).float().state_dict())
    return denoiser


def exact(x, sigma):
    """The exact denoiser of N(0, 1) data."""
    return x / (1 + sigma**2)


@every_way
@pytest.mark.parametrize("on", ["noised", "denoised"])
@every_transform
def test_lam_0_is_the_unguided_sampler_bit_for_bit(transform, rule, units, on):
    normaliser, policy = fitted(transform).float(), a_policy(SMALL).float()

    def guided(lam, warmup=0):
        return drawn(exact, Guide(rule, policy, normaliser, lam, 4, warmup, units, on), steps=4)[0]

    unguided, _ = drawn(exact, steps=4)
    # No guidance, none for all, none but warm-up.
    for lam, warmup in ((0.0, 0), (torch.zeros(2), 0), (0.5, 4)):
        assert torch.equal(guided(lam, warmup), unguided)
    late = guided(0.01, 2)  # the last two steps alone, for the normalised rules leave the last
    assert not torch.equal(late, unguided)
    assert not torch.equal(guided(0.01, 1), late)
    mixed = guided(torch.tensor([0.0, 0.01]))
    assert torch.equal(mixed[0], unguided[0]) and not torch.equal(mixed[1], unguided[1])


@pytest.mark.parametrize("units", ["natural", "raw"])
def test_each_guided_step_contracts_by_one_minus_lam(units, monkeypatch):
    """Where a denoiser believes everything, and so nothing else moves, â - μ̂ shrinks by 1 - λ a step; raw by 1 - λ (d/s)²."""
    monkeypatch.setattr(sampler, "DIVERGED", 1e20)  # x keeps the size of its first noise, or grows
    policy, normaliser, steps, warmup = a_policy(SMALL), fitted("raw"), 12, 3
    how = dict(denoise=lambda x, sigma: x, steps=steps, churn=0.0, dtype=torch.float64)
    start, sharp = drawn(**how)[0], 1.0 if units == "natural" else std_hat(policy, normaliser) ** -2
    for lam in (0.25, 1.0, 1.875):
        x, _ = drawn(guide=Guide("explicit", policy, normaliser, lam, steps, warmup, units), **how)
        way = way_to_the_mean(policy, normaliser, start)
        expected = start[..., SMALL.actions] + (1 - (1 - lam * sharp) ** (steps - warmup)) * way
        torch.testing.assert_close(x[..., SMALL.actions], expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(rest(x, SMALL), rest(start, SMALL))  # the states do not hear of it


@every_way
def test_each_lam_and_each_run_of_a_stack_is_in_the_sampler_as_if_alone(rule, units):
    """Noise and all."""
    stack, normaliser, lams = a_policy(SMALL, runs=3), fitted("arctanh"), [0.0625, 0.0625, 0.5, 0.0, 0.03, 0.0625]

    def guided(policy, lam):
        return drawn(exact, Guide(rule, policy, normaliser, lam, 8, 1, units), n=6, dtype=torch.float64)[0]

    together, each = guided(stack, lams), {}
    for i, lam in enumerate(lams):
        for run in (i // 2, i // 2 - 1):
            each[run] = guided(stack.select([run]), lam)[i]
        torch.testing.assert_close(together[i], each[i // 2])
        assert torch.allclose(together[i], each[i // 2 - 1], atol=1e-4) == (lam == 0)


@every_transform
def test_lam_2_is_the_limit_of_explicit(transform):
    policy, normaliser = a_policy(SMALL), fitted(transform)

    def guided(lam):
        guide = Guide("explicit", policy, normaliser, lam, 64, 5)
        return drawn(exact, guide, steps=64, churn=0.0, dtype=torch.float64)

    for lam, diverges in ((1.0, False), (1.9, False), (2.5, True), (5.0, True)):
        x, diverged = guided(lam)
        assert x.isfinite().all() and diverged.tolist() == [diverges] * 2, lam
    away = [way_to_the_mean(policy, normaliser, guided(lam)[0]).abs().mean() for lam in (0.0, 1.0)]
    assert away[1] < 0.05 * away[0]


@every_transform
def test_explicit_with_a_network_diverges_beyond_its_limit_and_is_counted(transform):
    denoiser, policy = small_denoiser(transform), a_policy(SMALL).float()
    for lam, diverges in ((0.5, False), (2.5, True), (1e6, True), (1e38, True)):
        x, diverged = drawn(denoiser, Guide("explicit", policy, denoiser.normaliser, lam, 32), steps=32)
        assert x.isfinite().all() and diverged.tolist() == [diverges] * 2, lam


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
    """Beside a policy of common std one of a hundredth of it; for a Gaussian one to the largest floats."""
    denoiser, policy = small_denoiser(transform), a_policy(SMALL, runs=2).float().requires_grad_(False)
    policy.log_std[1] -= math.log(100)
    lams = [0.0, 1e-3, 1.0, 100.0, 10_000.0, *[1e38] * (kind == "Gaussian")]
    guide = Guide(rule, shaped(policy, kind), denoiser.normaliser, 2 * lams, 12, units=units)
    x, diverged = drawn(denoiser, guide, steps=12, n=2 * len(lams))
    assert x.isfinite().all() and not diverged.any()


@pytest.mark.usefixtures("full_precision")
@every_transform
def test_proximal_for_a_large_lam_draws_the_policys_mean_at_its_own_states(transform):
    denoiser, policy = small_denoiser(transform), a_policy(SMALL).float()
    guided, plain = (drawn(denoiser, g)[0] for g in (Guide("proximal", policy, denoiser.normaliser, 1e5, 8), None))
    away = [way_to_the_mean(policy, denoiser.normaliser, x).abs().max() for x in (guided, plain)]
    assert away[0] < 1e-3 and away[1] > 1.0
