"""Implicit Q-learning (Kostrikov et al. 2021) of R stacked runs."""

import copy

import torch
from torch import nn

from pgdlib.agents.stack import ACTIONS, NEXT_OBS, OBS, REWARD, TERMINAL, StackedMLP, StackedPolicy, generators
from pgdlib.simulators.pen import ACTION_DIM, OBS_DIM


class IQL(nn.Module):
    """Twin Q with slow targets, V by expectile regression, and a policy by advantage-weighted regression.

    Defaults are the paper's Table 4 and, where it is silent, those of IQL's authors.
    """

    def __init__(
        self,
        seeds,
        obs_mean,
        obs_std,
        hidden=(256, 256),
        expectile=0.7,
        temperature=3.0,
        discount=0.99,
        polyak=0.005,
        max_weight=100.0,
    ):
        super().__init__()
        self.expectile, self.temperature, self.discount = expectile, temperature, discount
        self.polyak, self.max_weight, self.runs = polyak, max_weight, len(seeds)
        drawn = generators(seeds)
        self.policy = StackedPolicy(hidden, drawn, obs_mean, obs_std)
        self.q = StackedMLP([OBS_DIM + ACTION_DIM, *hidden, 1], drawn + drawn)  # first all first twins, then the second
        self.v = StackedMLP([OBS_DIM, *hidden, 1], drawn)
        self.target_q = copy.deepcopy(self.q).requires_grad_(False)

    def losses(self, batch, step, seeds):
        """The sum of the three losses of each run [R], which share no weights, and the mean V [R]; batch [R, B, 116]."""
        parts, value = self.parts(batch)
        return sum(parts.values()), value

    def parts(self, batch):
        """The losses of V, Q and the policy by name, [R] each, and the mean V [R] (Eqs. 5, 6, 7)."""
        obs, next_obs = (self.policy.normalise(batch[..., s]) for s in (OBS, NEXT_OBS))
        pairs = torch.cat([obs, batch[..., ACTIONS]], -1)
        with torch.no_grad():
            slow = self._twins(self.target_q, pairs).amin(0)
            next_v = self.v(next_obs)[..., 0]
            aim = batch[..., REWARD] + self.discount * (1 - batch[..., TERMINAL]) * next_v
        v = self.v(obs)[..., 0]
        advantage = slow - v
        weight = (self.temperature * advantage.detach()).exp().clamp_max(self.max_weight)
        parts = dict(
            v=(expectile_weight(advantage.detach(), self.expectile) * advantage.square()).mean(1),
            q=(self._twins(self.q, pairs) - aim).square().mean(2).sum(0),
            policy=-(weight * self.policy.log_prob(batch[..., OBS], batch[..., ACTIONS])).mean(1),
        )
        return parts, v.detach().mean(1)

    @torch.no_grad()
    def after_step(self):
        """Move the targets toward the twins."""
        torch._foreach_lerp_(list(self.target_q.parameters()), list(self.q.parameters()), self.polyak)

    def _twins(self, q, pairs):
        return q(pairs.repeat(2, 1, 1)).reshape(2, self.runs, -1)


def expectile_weight(difference, expectile):
    """|τ - 1(difference < 0)|: the weight of a squared difference whose minimum is the τ-expectile."""
    return torch.where(difference < 0, 1 - expectile, expectile)
