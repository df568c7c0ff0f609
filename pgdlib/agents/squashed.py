"""The policy of SAC: a Gaussian whose draws pass through tanh, one or a stack."""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from pgdlib.policies import GaussianPolicy


class SquashedGaussian(GaussianPolicy):
    """tanh(u), u ~ N(μ(s), diag(σ(s)²)), of an MLP that ends in μ and log σ: the policy of SAC (Haarnoja et al. 2018).

    Its log-likelihood is exact, with the change of variables. A call gives mean and std of the actions, by quadrature, which
    say little of the density: of a wide σ it is highest at -1 and 1. Observations, stacks, `low` and `generators` as in
    `GaussianPolicy`.
    """

    is_gaussian, limit = False, 0.999  # guidance's implicit steps stay within, beyond tanh has no slope

    def __init__(
        self, obs_dim: int, action_dim: int, hidden: Sequence = (256, 256), activation: str = "relu", obs_clip: float = 10.0,
        low: bool = False, generators=(None,),
    ):  # fmt: skip
        super().__init__(obs_dim, 2 * action_dim, hidden, activation, obs_clip, low=low, generators=generators)
        del self.log_std
        self.config = {k: self.config[k] for k in ("obs_dim", "hidden", "activation", "obs_clip")} | dict(action_dim=action_dim)
        self.action_dim = action_dim

    def latent(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """μ and log σ, both [B, ..., action_dim], at obs [B, ..., obs_dim]; log σ within SAC's bounds."""
        mean, log_std = self.net(self.blocks(obs), low=self.low).chunk(2, -1)
        shape = (*obs.shape[:-1], self.action_dim)
        return mean.reshape(shape), log_std.clamp(-20, 2).reshape(shape)

    def _mean_of(self, function, obs):
        """The mean [B, ..., action_dim] of function(u), dimension by dimension."""
        (mean, log_std), (nodes, weights) = self.latent(obs), _quadrature(obs.device, obs.dtype)
        return (function(mean[..., None] + log_std.exp()[..., None] * nodes) * weights).sum(-1)

    def forward(self, obs: Tensor, low: bool | None = None) -> tuple[Tensor, Tensor]:
        """Mean and std of the actions, both [B, ..., action_dim], at obs [B, ..., obs_dim]."""
        mean = self._mean_of(torch.tanh, obs)
        return mean, self._mean_of(lambda u: (u.tanh() - mean[..., None]).square(), obs).clamp_min(1e-8).sqrt()

    def log_prob(self, obs: Tensor, actions: Tensor) -> Tensor:
        """log π(a|s) [B, ...], the sum over action dimensions; of actions at or beyond ±1, that of those just within."""
        (mean, log_std), edge = self.latent(obs), 1 - torch.finfo(actions.dtype).eps
        actions = actions.clamp(-edge, edge)
        z = (actions.atanh() - mean) / log_std.exp()
        return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi) - _log_slope(actions)).sum(-1)

    def entropy(self, obs: Tensor) -> Tensor:
        """H(π) of each run [R], in nats, the mean over the states obs [B, obs_dim], of which each run has its block."""
        gaussian = self.latent(obs)[1] + 0.5 * math.log(2 * math.pi * math.e)
        return (gaussian + self._mean_of(lambda u: _log_slope(u.tanh()), obs)).sum(-1).reshape(self.runs, -1).mean(1).detach()

    def sample(self, obs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One action [B, ..., action_dim] for every observation."""
        mean, log_std = self.latent(obs)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return (mean + log_std.exp() * noise).tanh()

    def widen(self, factor: float) -> None:
        """Multiply σ by `factor`, in place."""
        self.net.biases[-1][..., self.action_dim :] += math.log(factor)

    @torch.no_grad()
    def act(self, obs: np.ndarray, generator: torch.Generator | None = None) -> np.ndarray:
        """As `GaussianPolicy.act`, but for the mean action tanh(μ) stands, as in SAC's tests."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.obs_mean.device)
        return (self.latent(obs)[0].tanh() if generator is None else self.sample(obs, generator)).cpu().numpy()


@cache
def _quadrature(device, dtype):
    """Nodes and weights of a mean over N(0, 1); kept, for a copy to a GPU waits for it."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(16))
    return nodes.to(device, dtype), weights.to(device, dtype) / weights.sum()


def _log_slope(actions):
    """log of the derivative of tanh where it is `actions`; kept finite as Stable-Baselines3 does."""
    return (1 - actions.square() + 1e-6).log()
