"""Guidance: pushing the actions of a trajectory, while it is denoised, toward a target policy.

A rule is a function (x, denoised, σ, step) -> shift of x [B, T, 71], normalised space, that moves action channels only.
"""

import torch

from pgdlib.data import ACTIONS


class Explicit:
    """The paper's rule (Eq. 3): before each denoising step, a += λ ∇_a log π(a|s), at the noised states and actions.

    With units="natural" the gradient is preconditioned by the policy's own variance, which makes it the natural gradient in
    the policy's mean: for a Gaussian policy a += λ (μ(s) - a). λ then has no unit and means the same for every policy; this
    step is a contraction for λ < 2. With units="raw" it is the gradient in normalised actions as it stands, whose limit is
    2 (std/d)² for a policy of standard deviation std and actions of standard deviation d in the data, dimension by dimension.
    The first `warmup` steps, at the highest noise, are not guided.
    """

    on = "noised"

    def __init__(self, policy, normaliser, lam, warmup, units="natural"):
        if units not in ("natural", "raw"):
            raise ValueError(f"units={units!r} is not allowed; it must be 'natural' or 'raw'")
        self.policy, self.normaliser, self.lam, self.warmup, self.units = policy, normaliser, lam, warmup, units

    def __call__(self, x, denoised, sigma, step):
        shift = torch.zeros_like(x)
        if step >= self.warmup and self.lam != 0:
            shift[..., ACTIONS] = self.lam * action_gradient(self.policy, self.normaliser, x, self.units)
        return shift


def action_gradient(policy, normaliser, x, units):
    """∇ log π(a|s) by the normalised actions of x [B, T, 71]: [B, T, 24]; in natural units times the policy's variance.

    The step a + std² ∇_a log π ends at a Gaussian policy's mean; natural units take it in environment space and give its end's
    distance in normalised actions, which arctanh, that has no slope to divide by where actions saturate, leaves finite.
    """
    obs, actions = normaliser.obs(x).detach(), normaliser.actions(x).detach()
    with torch.enable_grad():
        actions.requires_grad_()
        (gradient,) = torch.autograd.grad(policy.log_prob(obs, actions).sum(), actions)
    if units == "raw":
        return gradient * normaliser.action_slope(x).detach()
    with torch.no_grad():
        _, std = policy(obs)
        return normaliser.normalise_actions(actions + std.square() * gradient) - x[..., ACTIONS]
