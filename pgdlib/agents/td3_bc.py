"""TD3+BC (Fujimoto & Gu 2021) of R stacked runs."""

import copy
import math

import torch
from torch import Tensor, nn

from pgdlib.agents.stack import Critics, draws, generators, policies
from pgdlib.data import Spec


class TD3BC(nn.Module):
    """TD3 with a term that keeps the policy near the data's actions; defaults are the authors'.

    The policy is deterministic. Where a density is asked of it, as by guidance, it is a Gaussian of std `guide_std` around
    its action.
    """

    alpha, discount, polyak, noise, noise_clip, delay, guide_std = 2.5, 0.99, 0.005, 0.2, 0.5, 2, 0.2
    activation = staticmethod(torch.relu_)  # of the critics

    def __init__(self, spec: Spec, seeds: list, obs_mean: Tensor, obs_std: Tensor, hidden: tuple = (256, 256)):
        super().__init__()
        self.spec, self.moves, drawn = spec, False, generators(seeds)
        self.policy = policies(spec, drawn, obs_mean, obs_std, hidden, math.log(self.guide_std))
        self.policy.log_std.requires_grad_(False)
        self.q = Critics(spec, hidden, drawn, activation=self.activation)
        self.target_q, self.target_policy = (copy.deepcopy(m).requires_grad_(False) for m in (self.q, self.policy))

    def target_noise(self, batch: Tensor, step: int, seeds: list) -> Tensor:
        """The clipped noise on the target's actions [R, B, action_dim], each run's own."""
        drawn = draws(batch, step, seeds, 1, self.spec.action_dim)[0]
        return (self.noise * drawn).clamp(-self.noise_clip, self.noise_clip)

    def losses(self, batch: Tensor, step: int, seeds: list) -> tuple[dict[str, Tensor], Tensor]:
        """Those of Q and, every `delay` steps, of the policy, [R] each, and the mean Q [R]; batch [R, B, ...]."""
        spec, reward, terminal = self.spec, batch[..., self.spec.reward], batch[..., self.spec.terminal]
        obs, next_obs = (self.policy.normalise(batch[..., s]) for s in (spec.obs, spec.next_obs))
        with torch.no_grad():
            next_actions = self.target_policy(batch[..., spec.next_obs])[0] + self.target_noise(batch, step, seeds)
            next_actions = next_actions.clamp(-1, 1)
            slow = self.target_q(torch.cat([next_obs, next_actions], -1)).amin(0) - self.penalty(batch, next_actions)
            aim = reward + self.discount * (1 - terminal) * slow
        q = self.q(torch.cat([obs, batch[..., spec.actions]], -1))
        parts = dict(q=(q - aim).square().mean(2).sum(0))
        self.moves = step % self.delay == 0
        if self.moves:
            actions = self.policy(batch[..., spec.obs])[0]
            own = self.q(torch.cat([obs, actions], -1), frozen=True)
            parts["policy"] = self.policy_loss(own, (actions - batch[..., spec.actions]).square())
        return parts, q.detach()[0].mean(1)

    def penalty(self, batch: Tensor, next_actions: Tensor) -> Tensor | float:
        """What the targets lose [R, B] for `next_actions` [R, B, action_dim]: nothing."""
        return 0.0

    def policy_loss(self, q: Tensor, squared: Tensor) -> Tensor:
        """[R], of the twins [2, R, B] at the policy's actions and the `squared` way to the data's [R, B, action_dim]."""
        return -self.alpha / q[0].detach().abs().mean(1) * q[0].mean(1) + squared.mean((1, 2))

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the targets, when the policy has moved."""
        if self.moves:
            for slow, fast in ((self.target_q, self.q), (self.target_policy, self.policy)):
                torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), self.polyak)
