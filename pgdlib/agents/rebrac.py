"""ReBRAC (Tarasov et al. 2023, arXiv 2305.09836) of R stacked runs: TD3+BC, refined."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pgdlib.agents.stack import generators, policies
from pgdlib.agents.td3_bc import TD3BC
from pgdlib.data import Spec


def relu_norm(z: Tensor) -> Tensor:
    """relu, then layer norm, whose scale and shift the next layer has."""
    return F.layer_norm(torch.relu_(z), z.shape[-1:])


class ReBRAC(TD3BC):
    """TD3 with a penalty for leaving the data's actions in the policy and another in the targets, critics with layer norm.

    Defaults are those of pen-human (the paper's table of coefficients; pen-cloned has 0.05 and 0.5, pen-expert 0.01 and 0.01).
    It differs in that the targets' penalty needs the action that the data took next: what is generated may not have one, so
    that its mean square distance is that of a cloned Gaussian, the `clone`, trained beside. And in that the policy's learning
    rate falls.
    """

    beta_policy, beta_critic, activation = 0.1, 0.5, staticmethod(relu_norm)

    def __init__(self, spec: Spec, seeds: list, obs_mean: Tensor, obs_std: Tensor, hidden: tuple = (256, 256, 256)):
        super().__init__(spec, seeds, obs_mean, obs_std, hidden)
        self.clone = policies(spec, generators(seeds, 1), obs_mean, obs_std, hidden)

    def losses(self, batch: Tensor, step: int, seeds: list) -> tuple[dict[str, Tensor], Tensor]:
        """Those of Q, the clone and, every `delay` steps, the policy, [R], and the mean Q [R]; batch [R, B, ...]."""
        spec, reward, terminal = self.spec, batch[..., self.spec.reward], batch[..., self.spec.terminal]
        obs, next_obs = (self.policy.normalise(batch[..., s]) for s in (spec.obs, spec.next_obs))
        with torch.no_grad():
            noise = self.target_noise(batch, step, seeds)
            next_actions = (self.target_policy(batch[..., spec.next_obs])[0] + noise).clamp(-1, 1)
            mean, std = self.clone(batch[..., spec.next_obs])
            away = ((next_actions - mean).square() + std.square()).sum(-1)
            slow = self.target_q(torch.cat([next_obs, next_actions], -1)).amin(0) - self.beta_critic * away
            aim = reward + self.discount * (1 - terminal) * slow
        q = self.q(torch.cat([obs, batch[..., spec.actions]], -1))
        cloned = self.clone.log_prob(batch[..., spec.obs], batch[..., spec.actions])
        parts = dict(q=(q - aim).square().mean(2).sum(0), clone=-cloned.mean(1))
        self.moves = step % self.delay == 0
        if self.moves:
            actions = self.policy(batch[..., spec.obs])[0]
            own = self.q(torch.cat([obs, actions], -1), frozen=True).amin(0)
            away = (actions - batch[..., spec.actions]).square().sum(-1)
            parts["policy"] = self.beta_policy * away.mean(1) - own.mean(1) / own.detach().abs().mean(1)
        return parts, q.detach()[0].mean(1)
