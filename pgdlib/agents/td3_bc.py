"""TD3+BC (Fujimoto & Gu 2021) of R stacked runs."""

import copy

import torch
from torch import nn

from pgdlib.agents.stack import ACTIONS, NEXT_OBS, OBS, REWARD, TERMINAL, StackedMLP, StackedPolicy, generators
from pgdlib.edm import seeded
from pgdlib.simulators.pen import ACTION_DIM, OBS_DIM


class TD3BC(nn.Module):
    """TD3 with a term that keeps the policy near the data's actions; defaults are the authors'.

    The policy is deterministic. Where a density is asked of it, as by guidance, it is a Gaussian of std `guide_std` around
    its action.
    """

    def __init__(
        self,
        seeds,
        obs_mean,
        obs_std,
        hidden=(256, 256),
        alpha=2.5,
        discount=0.99,
        polyak=0.005,
        noise=0.2,
        noise_clip=0.5,
        delay=2,
        guide_std=0.2,
    ):
        super().__init__()
        self.alpha, self.discount, self.polyak, self.runs = alpha, discount, polyak, len(seeds)
        self.noise, self.noise_clip, self.delay = noise, noise_clip, delay
        drawn = generators(seeds)
        log_std = torch.tensor(guide_std).log()
        self.policy = StackedPolicy(hidden, drawn, obs_mean, obs_std, log_std, learn_std=False)
        self.q = StackedMLP([OBS_DIM + ACTION_DIM, *hidden, 1], drawn + drawn)  # first all first twins, then the second
        self.target_q, self.target_policy = (copy.deepcopy(m).requires_grad_(False) for m in (self.q, self.policy))

    def losses(self, batch, step, seeds):
        """The loss of each run [R], the policy's only every `delay` steps, and the mean Q [R]; batch [R, B, 116]."""
        parts, value = self.parts(batch, self.target_noise(batch, step, seeds), with_policy=step % self.delay == 0)
        self.moves = "policy" in parts
        return sum(parts.values()), value

    def target_noise(self, batch, step, seeds):
        """The clipped noise on the target's actions [R, B, 24], each run's own."""
        shape = batch.shape[1], ACTION_DIM
        drawn = [torch.randn(shape, generator=seeded(batch.device, 1_000_000 + s, step), device=batch.device) for s in seeds]
        return (self.noise * torch.stack(drawn)).clamp(-self.noise_clip, self.noise_clip)

    def parts(self, batch, noise, with_policy=True):
        """The losses of Q and of the policy by name, [R] each, and the mean Q [R]."""
        obs, next_obs = (self.policy.normalise(batch[..., s]) for s in (OBS, NEXT_OBS))
        with torch.no_grad():
            next_actions = (self.target_policy(batch[..., NEXT_OBS])[0] + noise).clamp(-1, 1)
            slow = self._twins(self.target_q, torch.cat([next_obs, next_actions], -1)).amin(0)
            aim = batch[..., REWARD] + self.discount * (1 - batch[..., TERMINAL]) * slow
        q = self._twins(self.q, torch.cat([obs, batch[..., ACTIONS]], -1))
        parts = dict(q=(q - aim).square().mean(2).sum(0))
        if with_policy:
            actions = self.policy(batch[..., OBS])[0]
            own = self._twins(self.q, torch.cat([obs, actions], -1), frozen=True)[0]
            scale = self.alpha / own.detach().abs().mean(1)
            parts["policy"] = -scale * own.mean(1) + (actions - batch[..., ACTIONS]).square().mean((1, 2))
        return parts, q.detach()[0].mean(1)

    @torch.no_grad()
    def after_step(self):
        """Move the targets, when the policy has moved."""
        if self.moves:
            for slow, fast in ((self.target_q, self.q), (self.target_policy, self.policy)):
                torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), self.polyak)

    def _twins(self, q, pairs, frozen=False):
        return q(pairs.repeat(2, 1, 1), frozen).reshape(2, self.runs, -1)
