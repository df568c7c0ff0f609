"""BCQ (Fujimoto et al. 2019, arXiv 1812.02900) of R stacked runs: Q-learning over the actions that a VAE of the data gives."""

import copy

import numpy as np
import torch
from torch import Tensor, nn

from pgdlib import fast
from pgdlib.agents.stack import Critics, draws, generators
from pgdlib.data import Spec
from pgdlib.fast import StackedMLP
from pgdlib.policies import Policy


class BestOfSamples(Policy):
    """Of `samples` actions of a decoder, shifted by at most `reach`, that of the highest Q. It has no density to guide with."""

    samples, reach = 10, 0.05

    def __init__(self, spec: Spec, hidden: tuple, drawn: list):
        super().__init__(spec.obs_dim, spec.action_dim, len(drawn))
        self.latent_dim, inputs = 2 * spec.action_dim, spec.obs_dim + spec.action_dim
        self.decoder = StackedMLP([spec.obs_dim + self.latent_dim, *hidden, spec.action_dim], drawn)
        self.perturbation = StackedMLP([inputs, *hidden, spec.action_dim], drawn)
        self.q = Critics(spec, hidden, drawn)

    def decode(self, obs: Tensor, latents: Tensor) -> Tensor:
        """Actions [R, B, action_dim] at normalised obs [R, B, obs_dim] for latents [R, B, latent_dim]."""
        return self.decoder(torch.cat([obs, latents], -1)).tanh()

    def perturbed(self, obs: Tensor, actions: Tensor) -> Tensor:
        """The pairs [R, B, obs_dim + action_dim] of normalised obs with what the perturbation makes of `actions`."""
        shift = self.reach * self.perturbation(torch.cat([obs, actions], -1)).tanh()
        return torch.cat([obs, (actions + shift).clamp(-1, 1)], -1)

    def proposed(self, obs: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised obs and the decoded actions [R, n B, ...] for latents [n, R, B, latent_dim], kept within ±0.5."""
        obs = obs.repeat(1, len(latents), 1)
        return obs, self.decode(obs, latents.clamp(-0.5, 0.5).movedim(0, 1).flatten(1, 2))

    @torch.no_grad()
    def sample(self, obs: Tensor, generator: torch.Generator | None = None, same: bool = False) -> Tensor:
        """One action [B, ..., action_dim] for every observation; same: all choose among the same latents."""
        inputs = self.blocks(obs)
        shape = (1, 1) if same else inputs.shape[:2]
        latents = torch.randn(self.samples, *shape, self.latent_dim, generator=generator, device=obs.device, dtype=obs.dtype)
        pairs = self.perturbed(*self.proposed(inputs, latents.expand(-1, *inputs.shape[:2], -1)))
        values, actions = (v.unflatten(1, (self.samples, -1)) for v in (self.q(pairs)[0], pairs[..., obs.shape[-1] :]))
        best = values.argmax(1, keepdim=True)[..., None].expand(-1, -1, -1, self.action_dim)
        return actions.gather(1, best).reshape(*obs.shape[:-1], self.action_dim)

    def act(self, obs: np.ndarray, generator: torch.Generator | None = None) -> np.ndarray:
        """On numpy arrays, [R n, obs_dim] -> [R n, action_dim]. Without a generator the action depends on the state alone."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.obs_mean.device)
        noise = fast.generator(obs.device, "fresh", 0) if generator is None else generator
        return self.sample(obs, noise, same=generator is None).cpu().numpy()


class BCQ(nn.Module):
    """Twin Q whose targets take the best of actions like the data's: those of a conditional VAE, perturbed.

    Defaults are the paper's, but one width and learning rate for all, which falls for the policy's parts, its Q too.
    """

    discount, polyak, least = 0.99, 0.005, 0.75  # least: the weight λ of the lesser of the twins, of the greater 1 - λ
    q = property(lambda self: self.policy.q)  # no module of its own: what is saved holds every tensor once

    def __init__(self, spec: Spec, seeds: list, obs_mean: Tensor, obs_std: Tensor, hidden: tuple = (256, 256)):
        super().__init__()
        self.spec, drawn = spec, generators(seeds)
        self.policy = BestOfSamples(spec, hidden, drawn)
        self.policy.load_state_dict(dict(obs_mean=obs_mean, obs_std=obs_std), strict=False)
        self.encoder = StackedMLP([spec.obs_dim + spec.action_dim, *hidden, 2 * self.policy.latent_dim], drawn)
        self.target = copy.deepcopy(self.policy).requires_grad_(False)

    def losses(self, batch: Tensor, step: int, seeds: list) -> tuple[dict[str, Tensor], Tensor]:
        """Those of the VAE, Q and the perturbation (Algorithm 1), [R] each, and the mean Q [R]; batch [R, B, ...]."""
        spec, policy = self.spec, self.policy
        obs, actions = policy.normalise(batch[..., spec.obs]), batch[..., spec.actions]
        latents, pairs = draws(batch, step, seeds, 2 + policy.samples, policy.latent_dim), torch.cat([obs, actions], -1)
        with torch.no_grad():
            proposed = policy.proposed(obs, latents[1:2])
        q = policy.q(pairs)
        q_loss = (q - self.aim(batch, latents[2:])).square().mean(2).sum(0)
        perturbation = -policy.q(policy.perturbed(*proposed), frozen=True)[0].mean(1)
        return dict(q=q_loss, vae=self.vae_loss(pairs, latents[0]), policy=perturbation), q.detach()[0].mean(1)

    def vae_loss(self, pairs: Tensor, noise: Tensor) -> Tensor:
        """[R]: the mean square error of what is decoded plus half the mean divergence of the latents from N(0, 1)."""
        mean, log_std = self.encoder(pairs).chunk(2, -1)
        log_std = log_std.clamp(-4, 15)
        decoded = self.policy.decode(pairs[..., self.spec.obs], mean + log_std.exp() * noise)
        divergence = 0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std
        return (decoded - pairs[..., self.spec.actions]).square().mean((1, 2)) + 0.5 * divergence.mean((1, 2))

    @torch.no_grad()
    def aim(self, batch: Tensor, latents: Tensor) -> Tensor:
        """What the twins regress on [R, B]: the best of the next actions for latents [n, R, B, ...]."""
        spec = self.spec
        proposed = self.policy.proposed(self.policy.normalise(batch[..., spec.next_obs]), latents)
        slow = self.target.q(self.target.perturbed(*proposed))
        slow = self.least * slow.amin(0) + (1 - self.least) * slow.amax(0)
        best = slow.unflatten(1, (len(latents), -1)).amax(1)
        return batch[..., spec.reward] + self.discount * (1 - batch[..., spec.terminal]) * best

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the targets toward the twins and the perturbation; the target's decoder is not used."""
        torch._foreach_lerp_(list(self.target.parameters()), list(self.policy.parameters()), self.polyak)
