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
        """TD3+BC's and "clone", the clone's."""
        parts, value = super().losses(batch, step, seeds)
        cloned = self.clone.log_prob(batch[..., self.spec.obs], batch[..., self.spec.actions])
        return {**parts, "clone": -cloned.mean(1)}, value

    def penalty(self, batch: Tensor, next_actions: Tensor) -> Tensor:
        """What the targets lose [R, B] for the mean square distance of `next_actions` from the clone's."""
        mean, std = self.clone(batch[..., self.spec.next_obs])
        return self.beta_critic * ((next_actions - mean).square() + std.square()).sum(-1)

    def policy_loss(self, q: Tensor, squared: Tensor) -> Tensor:
        """[R], of the lesser of the twins [2, R, B]; `squared` [R, B, action_dim] is summed over dimensions."""
        own = q.amin(0)
        return self.beta_policy * squared.sum(-1).mean(1) - own.mean(1) / own.detach().abs().mean(1)
