"""Guidance: pushing the actions of a trajectory, while it is denoised, toward a target policy.

A rule is a pure function of trajectories x [B, T, width] (normalised space) that gives a shift of their actions
[B, T, action_dim]; a `Guide` puts one into the sampler. Below, a, μ and s are an action, the policy's mean and std, σ is the
noise level, all in normalised units. Rules need a policy with a differentiable `log_prob(obs, actions)`; for a Gaussian one
(`is_gaussian`) they are closed forms, and natural units need its std (`has_moments`).
"""

import math

import torch
from torch import Tensor, nn

from pgdlib.data import Normaliser
from pgdlib.policies import fast_moments, has_moments, is_gaussian

RULES = ("explicit", "normalised_linear", "normalised_cosine", "proximal", "smoothed", "annealed")
NOISED = ("explicit", "annealed")  # rules that are taken on noised trajectories by default
WARMED = ("explicit", "proximal", "annealed")  # rules that leave the highest noise unguided; the others begin there


class Guide:
    """A rule with its policy and its weight, as a hook for `sampler.sample`.

    rule      of `RULES`
    lam       the guidance weight λ: a number, or one for each trajectory [B]; 0 is no guidance. Not comparable across rules.
    steps     of the sampler; only the normalised rules look at it
    warmup    steps at the highest noise that are not guided
    units     "natural" or "raw", for explicit, proximal and annealed: whether λ counts in the policy's own variance
    on        "noised" or "denoised": whether the rule is taken on the noised trajectory, before every step, as the paper's
              is, or on every denoised estimate. The default is noised for `NOISED`, denoised for the others.
    """

    def __init__(
        self, rule: str, policy: nn.Module, normaliser: Normaliser, lam: float | Tensor, steps: int, warmup: int = 0,
        units: str = "natural", on: str | None = None,
    ):  # fmt: skip
        on = on or ("noised" if rule in NOISED else "denoised")
        choices = dict(rule=(rule, RULES), units=(units, ("natural", "raw")), on=(on, ("noised", "denoised")))
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not allowed; it must be one of {', '.join(map(repr, allowed))}")
        if not hasattr(policy, "log_prob"):
            raise ValueError(f"policy={type(policy).__name__} is not allowed as a guide; it must have a density (log_prob)")
        self.lam = torch.as_tensor(lam, dtype=torch.float32)
        if self.lam.ndim > 1 or not (self.lam.isfinite() & (self.lam >= 0)).all():
            raise ValueError(f"lam={lam!r} is not allowed; it must be one number or one a trajectory, finite and at least 0")
        if units == "natural" and rule in ("explicit", "proximal", "annealed") and not has_moments(policy):
            raise ValueError(f"units='natural' is not allowed for rule={rule!r} and a policy without a std; use 'raw'")
        self.rule, self.policy, self.normaliser, self.units, self.on = rule, policy, normaliser, units, on
        self.steps, self.warmup = steps, warmup
        self._idle, self.lam = not self.lam.any(), self.lam.to(normaliser.mean.device)  # in every step a GPU would wait

    @torch.no_grad()
    def __call__(self, x: Tensor, denoised: Tensor | None, sigma: float, step: int) -> Tensor:
        """The shift [B, T, width] of x or of the denoised estimate at noise level `sigma` and `step`."""
        shift = torch.zeros_like(x)
        if step < self.warmup or self._idle:
            return shift
        at, lam = x if self.on == "noised" else denoised, self.lam.to(x)
        lam = lam[:, None, None] if lam.ndim else lam
        args = self.policy, self.normaliser, at
        if self.rule == "explicit":
            actions = explicit(*args, lam, self.units)
        elif self.rule == "proximal":
            actions = proximal(*args, lam, self.units)
        elif self.rule == "smoothed":
            actions = smoothed(*args, lam, sigma)
        elif self.rule == "annealed":
            actions = annealed(*args, lam, sigma, self.units)
        else:
            bump = 0.3 if self.rule == "normalised_cosine" else 0.0
            actions = normalised(*args, lam * schedule(step, self.steps, bump))
        shift[..., self.normaliser.spec.actions] = torch.where(lam > 0, actions, 0.0)
        return shift


def explicit(policy: nn.Module, normaliser: Normaliser, x: Tensor, lam: float | Tensor, units: str = "natural") -> Tensor:
    """The paper's rule (Eq. 3): λ ∇_a log π(a|s).

    With units="natural" the gradient is preconditioned by the policy's own variance, which makes it the natural gradient in
    the policy's mean: for a Gaussian policy λ (μ - a). λ then has no unit and means the same for every policy; repeated, the
    step is a contraction for λ < 2. With units="raw" it is λ (μ - a) / s², with the limit 2 s² in each action dimension.
    """
    return lam * action_gradient(policy, normaliser, x, units)


def normalised(policy: nn.Module, normaliser: Normaliser, x: Tensor, lam: float | Tensor) -> Tensor:
    """λ g / |g| with g = ∇_a log π, its norm over a whole trajectory: the form of the authors' later code."""
    gradient = action_gradient(policy, normaliser, x, "raw")
    return lam * gradient / (gradient.square().sum((1, 2), keepdim=True).sqrt() + 1e-6)


def schedule(step: int, steps: int, bump: float) -> float:
    """1 - k/N + bump sin(π(k+1)/N) at step k of N, none on the last: the authors' later λ schedule, with bump 0 or 0.3."""
    if step >= steps - 1:
        return 0.0
    return 1 - step / steps + bump * math.sin(math.pi * (step + 1) / steps)


def proximal(policy: nn.Module, normaliser: Normaliser, x: Tensor, lam: float | Tensor, units: str = "natural") -> Tensor:
    """The implicit step: to argmin |a' - a|² / (2 λ) - log π(a'|s), stable for every λ, for λ to infinity the policy's mean.

    For a Gaussian policy λ/(λ + s²) (μ - a), and in natural units, where λ counts in s², λ/(1 + λ) (μ - a).
    """
    return nearby(policy, normaliser, x, lam, units) - x[..., normaliser.spec.actions]


def smoothed(policy: nn.Module, normaliser: Normaliser, x: Tensor, lam: float | Tensor, sigma: float) -> Tensor:
    """The score of the policy convolved with the noise level, as an implicit step of weight λ: stable for every λ.

    For a Gaussian policy the score is (μ - a) / (s² + σ²), a shift of the denoised estimate by f (μ - a) with
    f = σ² / (s² + σ²); the implicit step is λf/(1 + λf) (μ - a). It fades where the noise is below the policy's own std. For
    other policies the Moreau envelope of -log π stands in for the convolution: equal for a Gaussian, and its implicit step is
    known, λ/(1 + λ) of the way to the proximal point of weight (1 + λ) σ².
    """
    return lam / (1 + lam) * (nearby(policy, normaliser, x, (1 + lam) * sigma**2, "raw") - x[..., normaliser.spec.actions])


def annealed(
    policy: nn.Module, normaliser: Normaliser, x: Tensor, lam: float | Tensor, sigma: float, units: str = "natural"
) -> Tensor:
    """The proximal step with the weight λ √(σ / (1 + σ)): like the paper's, but gentler as the noise falls below the data.

    By then the states have settled and can no longer follow. The form was found on the fronts of notebook 04, not derived.
    """
    return proximal(policy, normaliser, x, lam * math.sqrt(sigma / (1 + sigma)), units)


def action_gradient(policy: nn.Module, normaliser: Normaliser, x: Tensor, units: str) -> Tensor:
    """∇ log π(a|s) by the normalised actions of x [B, T, width]: [B, T, action_dim]; in natural units times the variance.

    The step a + s² ∇_a log π ends at a Gaussian policy's mean; natural units take it in environment space and give its end's
    distance in normalised actions, which arctanh, that has no slope to divide by where actions saturate, leaves finite.
    """
    obs, actions = normaliser.obs(x).detach(), normaliser.actions(x).detach()
    if units == "raw":
        return _gradient(policy, obs, actions) * normaliser.action_slope(x).detach()
    with torch.no_grad():
        mean, std = fast_moments(policy, obs)
        end = mean if is_gaussian(policy) else actions + std.square() * _gradient(policy, obs, actions)
        return normaliser.normalise_actions(end) - x[..., normaliser.spec.actions]


def nearby(policy: nn.Module, normaliser: Normaliser, x: Tensor, weight: float | Tensor, units: str) -> Tensor:
    """argmin_a' |a' - a|² / (2 weight) - log π(a'|s): [B, T, action_dim], normalised; weight a number or [B, 1, 1].

    In natural units the weight counts in the policy's variance. It is worked out in environment space, where the policy lives.
    """
    with torch.no_grad():
        obs, actions = normaliser.obs(x), normaliser.actions(x)
        mean, std = fast_moments(policy, obs) if has_moments(policy) else (None, None)
        weight = weight * (std if units == "natural" else normaliser.action_slope(x)).square()
        if is_gaussian(policy):
            nearest = actions + (mean - actions) / (1 + std.square() / weight)  # for an infinite weight too
        else:
            nearest = newton(policy, obs, actions, weight)
        return normaliser.normalise_actions(nearest)


def newton(policy: nn.Module, obs: Tensor, actions: Tensor, weight: Tensor, iterations: int = 32) -> Tensor:
    """Solve a - actions = weight ∇ log π(a|obs) for a [..., action_dim], all in environment space, by damped Newton steps.

    The curvature of log π is taken dimension by dimension from the last two gradients, and bounded where log π is not
    concave. Steps are at most 1 long, the reach of an action, then 2 and so on until one goes too far, then half of that one.
    Beyond ±`policy.limit`, if there is one, log π is flat: from there it begins at the limit, and stays within, if already
    that is better. Noise far outside is not worth the way.
    """
    limit = getattr(policy, "limit", math.inf)
    a = actions.clamp(-limit, limit)
    way = ((a - actions).square() / (2 * weight)).sum(-1)
    enters = (policy.log_prob(obs, a) - policy.log_prob(obs, actions) >= way)[..., None]
    a, limit = torch.where(enters, a, actions), torch.where(enters, limit, math.inf)
    gradient = _gradient(policy, obs, a)
    curvature = (gradient - _gradient(policy, obs, a + 1e-2)) / 1e-2  # the first
    step, reach, growth = torch.zeros_like(a), torch.full_like(a, 0.5), torch.full_like(a, 2.0)
    for _ in range(iterations):
        newest = (actions + weight * gradient - a) / (1 + weight * curvature).clamp_min(0.1)
        too_far = newest * step < 0
        growth = torch.where(too_far, 1.0, growth)
        reach = torch.where(too_far, step.abs() / 2, growth * reach)
        step = (a + newest.clamp(-reach, reach)).clamp(-limit, limit) - a
        before, a = gradient, a + step
        gradient = _gradient(policy, obs, a)
        moved = step.abs() > 1e-6  # of smaller steps the difference of gradients says nothing
        curvature = torch.where(moved, (before - gradient) / torch.where(moved, step, 1.0), curvature)
    return a


def _gradient(policy, obs, actions):
    with torch.enable_grad():
        actions = actions.detach().requires_grad_()
        return torch.autograd.grad(policy.log_prob(obs, actions).sum(), actions)[0]
