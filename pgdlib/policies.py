"""Policies that carry their observation normalisation, one or a stack of them: what all share, and Gaussian ones."""

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pgdlib.fast import StackedMLP, tanh

ACTIVATIONS = {"tanh": tanh, "relu": torch.relu_}


class Policy(nn.Module):
    """R policies as one module, each with a block of the batch: the first B/R rows belong to the first.

    Observations and actions are in environment space; (s - obs_mean) / obs_std, clipped to ±obs_clip, enters the networks.
    """

    def __init__(self, obs_dim: int, action_dim: int, runs: int = 1, obs_clip: float = 10.0):
        super().__init__()
        self.runs, self.action_dim, self.obs_clip = runs, action_dim, obs_clip
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))

    def normalise(self, obs: Tensor) -> Tensor:
        """Observations [..., obs_dim] as the networks see them."""
        return ((obs - self.obs_mean) / self.obs_std).clamp(-self.obs_clip, self.obs_clip)

    def blocks(self, obs: Tensor) -> Tensor:
        """Normalised observations [R, n, obs_dim] of obs [B, ..., obs_dim]; ValueError if B is no multiple of R."""
        if self.runs > 1 and len(obs) % self.runs:
            raise ValueError(f"batch={len(obs)} is not allowed; it must be a multiple of the {self.runs} stacked policies")
        return self.normalise(obs).reshape(self.runs, -1, obs.shape[-1])

    def select(self, runs: Sequence[int]) -> "Policy":
        """The policies of the `runs` (indices) as a stack of their own, a copy without gradients."""
        other = selected(self, runs, self.runs)
        other.runs = len(runs)
        return other


def selected(module: nn.Module, runs: Sequence[int], of: int) -> nn.Module:
    """A copy without gradients of the `runs` (indices) of a module whose parameters are those of `of` runs, [n of, ...]."""
    other = copy.deepcopy(module).requires_grad_(False)
    for p in other.parameters():
        each = p.data.unflatten(0, (-1, of)).unbind(1)
        p.data = torch.stack([each[r] for r in runs], 1).flatten(0, 1)  # a list of indices would be copied to the device
    return other


class GaussianPolicy(Policy):
    """R policies π(a|s) = N(μ(s), diag(std²)): an MLP mean, a std that does not depend on the state. R = 1 by default.

    As a target of guidance a stack is one policy for a batch whose blocks belong to its runs. Actions are not squashed: the
    environment clips them. `squash`: the mean is a tanh. `low`: hidden layers in bfloat16 where the device multiplies it, in
    likelihoods too. `generators`, one a run, give the initial weights.
    """

    is_gaussian = True  # a call gives mean and std

    def __init__(
        self, obs_dim: int, action_dim: int, hidden: Sequence = (256, 256), activation: str = "tanh", obs_clip: float = 10.0,
        squash: bool = False, low: bool = False, log_std_range: tuple = (-math.inf, math.inf), generators=(None,),
    ):  # fmt: skip
        super().__init__(obs_dim, action_dim, len(generators), obs_clip)
        self.config = dict(obs_dim=obs_dim, action_dim=action_dim, hidden=list(hidden), activation=activation)
        self.config |= dict(obs_clip=obs_clip, squash=squash, low=low)
        self.log_std_range, self.squash, self.low = log_std_range, squash, low
        self.net = StackedMLP([obs_dim, *hidden, action_dim], generators, ACTIVATIONS[activation])
        self.log_std = nn.Parameter(torch.zeros(self.runs, 1, action_dim))

    @property
    def std(self) -> Tensor:
        """[R, action_dim]"""
        return self._log_std[:, 0].exp()

    @property
    def _log_std(self):
        return self.log_std.clamp(*self.log_std_range)

    def forward(self, obs: Tensor, low: bool | None = None) -> tuple[Tensor, Tensor]:
        """Mean and std, both [B, ..., action_dim], at obs [B, ..., obs_dim]; ValueError if B is no multiple of R."""
        mean = self.net(self.blocks(obs), low=self.low if low is None else low)
        mean, std = mean.tanh() if self.squash else mean, self._log_std.exp().expand_as(mean)
        shape = (*obs.shape[:-1], self.action_dim)
        return mean.reshape(shape), std.reshape(shape)

    def log_prob(self, obs: Tensor, actions: Tensor) -> Tensor:
        """log π(a|s) [B, ...] of each row under its own policy, the sum over action dimensions; differentiable in both."""
        mean, std = self(obs)
        return (-0.5 * ((actions - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self, obs: Tensor | None = None) -> Tensor:
        """H(π) of each run [R], in nats, in whatever states; -H(π) is the mean log-likelihood of the policy's own actions."""
        return (self._log_std + 0.5 * math.log(2 * math.pi * math.e)).sum((1, 2)).detach()

    def sample(self, obs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One action [B, ..., action_dim] for every observation."""
        mean, std = self(obs)
        return mean + std * torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)

    @torch.no_grad()
    def act(self, obs: np.ndarray, generator: torch.Generator | None = None) -> np.ndarray:
        """On numpy arrays, [R n, obs_dim] -> [R n, action_dim]: the mean actions, or with a generator sampled ones."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.obs_mean.device)
        return (self(obs)[0] if generator is None else self.sample(obs, generator)).cpu().numpy()

    def widen(self, factor: float) -> None:
        """Multiply the std by `factor`, in place."""
        self.log_std += math.log(factor)


def is_gaussian(policy: nn.Module) -> bool:
    """Whether `policy` is a diagonal Gaussian, of which a call gives mean and std."""
    return getattr(policy, "is_gaussian", False)


def has_moments(policy: nn.Module) -> bool:
    """Whether `policy(obs)` gives mean and std of its actions, be they Gaussian or not."""
    return isinstance(policy, GaussianPolicy) or is_gaussian(policy)


@torch.no_grad()
def fast_moments(policy: GaussianPolicy, obs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of a Gaussian policy as a call gives them, without gradients and in less precision: for guidance alone.

    Where the device multiplies bfloat16 the mean is off by a hundredth of a typical std: little beside the noise that guidance
    works in, but a likelihood must come from `log_prob`.
    """
    mean, std = policy(obs, low=True)
    return mean.to(obs.dtype), std.to(obs.dtype)


def sharpened(policy: GaussianPolicy, factor: float) -> GaussianPolicy:
    """A copy of the policy whose std is `factor` times as large; the mean is the same."""
    other = policy.select(range(policy.runs))
    other.widen(factor)
    return other
