"""Implicit Q-learning (Kostrikov et al. 2021) of R stacked runs."""

import copy

import torch
from torch import Tensor, nn

from pgdlib.agents.stack import Critics, generators, policies
from pgdlib.data import Spec
from pgdlib.fast import StackedMLP


class IQL(nn.Module):
    """Twin Q with slow targets, V by expectile regression, and a policy by advantage-weighted regression.

    Defaults are the paper's Table 4 and, where it is silent, those of IQL's authors.
    """

    expectile, temperature, discount, max_weight = 0.7, 3.0, 0.99, 100.0

    def __init__(
        self, spec: Spec, seeds: list, obs_mean: Tensor, obs_std: Tensor, hidden: tuple = (256, 256), polyak: float = 0.005
    ):
        super().__init__()
        self.spec, self.polyak, drawn = spec, polyak, generators(seeds)
        self.policy = policies(spec, drawn, obs_mean, obs_std, hidden)
        self.q, self.v = Critics(spec, hidden, drawn), StackedMLP([spec.obs_dim, *hidden, 1], drawn)
        self.target_q = copy.deepcopy(self.q).requires_grad_(False)

    def losses(self, batch: Tensor, step: int, seeds: list) -> tuple[dict[str, Tensor], Tensor]:
        """Those of V, Q and the policy (Eqs. 5, 6, 7), [R] each, which share no weights; the mean V [R]; batch [R, B, ...]."""
        spec, reward, terminal = self.spec, batch[..., self.spec.reward], batch[..., self.spec.terminal]
        obs, next_obs = (self.policy.normalise(batch[..., s]) for s in (spec.obs, spec.next_obs))
        pairs = torch.cat([obs, batch[..., spec.actions]], -1)
        with torch.no_grad():
            slow, next_v = self.target_q(pairs).amin(0), self.v(next_obs)[..., 0]
            aim = reward + self.discount * (1 - terminal) * next_v
        v = self.v(obs)[..., 0]
        advantage = slow - v
        weight = (self.temperature * advantage.detach()).exp().clamp_max(self.max_weight)
        of_expectile = torch.where(advantage.detach() < 0, 1 - self.expectile, self.expectile)
        parts = dict(
            v=(of_expectile * advantage.square()).mean(1),
            q=(self.q(pairs) - aim).square().mean(2).sum(0),
            policy=-(weight * self.policy.log_prob(batch[..., spec.obs], batch[..., spec.actions])).mean(1),
        )
        return parts, v.detach().mean(1)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the targets toward the twins."""
        torch._foreach_lerp_(list(self.target_q.parameters()), list(self.q.parameters()), self.polyak)
