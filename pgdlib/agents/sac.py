"""Soft actor-critic (Haarnoja et al. 2018, arXiv 1812.05905) of R stacked runs, offline: the base of CQL and EDAC."""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pgdlib.agents.squashed import SquashedGaussian
from pgdlib.agents.stack import Critics, draws, generators
from pgdlib.data import Spec


class Actor(SquashedGaussian):
    """A `SquashedGaussian` that draws for its own training."""

    def draw(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [..., B, ..., action_dim] made of `noise` like them, N(0, 1), and their log π(a|s) [..., B, ...].

        Differentiable in the weights. The density is taken at u, where it stays exact however near to ±1 the action is.
        """
        mean, log_std = self.latent(obs)
        u = mean + log_std.exp() * noise
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh² u)
        return u.tanh(), (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi) - log_slope).sum(-1)


class SAC(nn.Module):
    """N critics with slow targets, a tanh-Gaussian policy, and a temperature that holds its entropy at -action_dim.

    Defaults are the paper's Table 1. It differs in that the policy's learning rate falls (`stack.Learner`).
    """

    critics, discount, polyak, soft_target = 2, 0.99, 0.005, True

    def __init__(self, spec: Spec, seeds: list, obs_mean: Tensor, obs_std: Tensor, hidden: tuple = (256, 256)):
        super().__init__()
        self.spec, drawn = spec, generators(seeds)
        self.policy = Actor(spec.obs_dim, spec.action_dim, hidden, low=True, generators=drawn)
        self.policy.load_state_dict(dict(obs_mean=obs_mean, obs_std=obs_std), strict=False)
        self.q = Critics(spec, hidden, drawn, self.critics)
        self.target_q = copy.deepcopy(self.q).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.zeros(len(seeds)))

    def losses(self, batch: Tensor, step: int, seeds: list) -> tuple[dict[str, Tensor], Tensor]:
        """Those of Q, policy and temperature (Eqs. 5, 7, 18), [R] each, and the mean Q [R]; batch [R, B, ...]."""
        spec, temperature = self.spec, self.log_temperature.detach().exp()[:, None]
        noise, obs = draws(batch, step, seeds, 2, spec.action_dim), self.policy.normalise(batch[..., spec.obs])
        own, log_prob = self.policy.draw(batch[..., spec.obs], noise[0])
        value = self.q(torch.cat([obs, own], -1), frozen=True).amin(0)
        aim = self.aim(batch, noise[1], temperature)
        parts, q = self.critic_losses(torch.cat([obs, batch[..., spec.actions]], -1), aim, batch, step, seeds)
        parts["policy"] = (temperature * log_prob - value).mean(1)
        parts["temperature"] = -self.log_temperature * (log_prob.detach().mean(1) - spec.action_dim)
        return parts, q.detach()[0].mean(1)

    @torch.no_grad()
    def aim(self, batch: Tensor, noise: Tensor, temperature: Tensor) -> Tensor:
        """What the critics regress on [R, B]: the least of the targets' values in the next state, its entropy added."""
        spec, next_obs = self.spec, batch[..., self.spec.next_obs]
        actions, log_prob = self.policy.draw(next_obs, noise)
        slow = self.target_q(torch.cat([self.policy.normalise(next_obs), actions], -1)).amin(0)
        slow = slow - temperature * log_prob if self.soft_target else slow
        return batch[..., spec.reward] + self.discount * (1 - batch[..., spec.terminal]) * slow

    def critic_losses(
        self, pairs: Tensor, aim: Tensor, batch: Tensor, step: int, seeds: list
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The losses of the critics, [R] each, and their values [N, R, B] at pairs [R, B, ...] (see `Critics`); aim [R, B]."""
        q = self.q(pairs)
        return dict(q=(q - aim).square().mean(2).sum(0)), q

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the targets toward the critics."""
        torch._foreach_lerp_(list(self.target_q.parameters()), list(self.q.parameters()), self.polyak)
