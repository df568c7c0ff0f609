"""Conservative Q-learning, CQL(H) (Kumar et al. 2020, arXiv 2006.04779), of R stacked runs."""

import math

import torch
from torch import Tensor, nn

from pgdlib.agents.sac import SAC
from pgdlib.agents.stack import draws
from pgdlib.data import Spec


class CQL(SAC):
    """SAC whose critics are pushed down at actions the policy may take and up at the data's (Eq. 4), with weight `alpha`.

    The paper fixes no α for Adroit (its code's default is 5); 1, with 10 samples of each kind and a target without entropy, is
    CORL's for pen. lagrange: the gap τ to which α is tuned instead (Appendix F; 5 is usual for pen), None for a fixed α.
    It differs in two layers for three and one learning rate for two: the paper's policy has a tenth of its critics'.
    """

    alpha, samples, soft_target = 1.0, 10, False

    def __init__(
        self, spec: Spec, seeds: list, obs_mean: Tensor, obs_std: Tensor, hidden: tuple = (256, 256),
        lagrange: float | None = None,
    ):  # fmt: skip
        super().__init__(spec, seeds, obs_mean, obs_std, hidden)
        self.lagrange = lagrange
        if lagrange is not None:
            self.log_multiplier = nn.Parameter(torch.zeros(len(seeds)))

    def critic_losses(
        self, pairs: Tensor, aim: Tensor, batch: Tensor, step: int, seeds: list
    ) -> tuple[dict[str, Tensor], Tensor]:
        """As SAC's, and "gap", how much more the critics value what might be done than what was, times its weight."""
        parts, q = super().critic_losses(pairs, aim, batch, step, seeds)
        gap = self.alpha * (self.soft_maximum(batch, step, seeds) - q).mean(2)  # [N, R]
        if self.lagrange is None:
            return {**parts, "gap": gap.sum(0)}, q
        multiplier, over = self.log_multiplier.exp().clamp_max(1e6), (gap - self.lagrange).sum(0)
        return {**parts, "gap": multiplier.detach() * over, "multiplier": -0.5 * multiplier * over.detach()}, q

    def soft_maximum(self, batch: Tensor, step: int, seeds: list) -> Tensor:
        """log ∑ exp Q(s, a) / density of a (Appendix F) [N, R, B], over uniform actions, the policy's, and its next ones."""
        spec, n = self.spec, self.samples
        noise = draws(batch, step, seeds, 3 * n, spec.action_dim, 1)
        with torch.no_grad():
            uniform = torch.erf(noise[:n] / math.sqrt(2))  # of N(0, 1), on [-1, 1]
            here, log_here = self.policy.draw(batch[..., spec.obs], noise[n : 2 * n])
            there, log_there = self.policy.draw(batch[..., spec.next_obs], noise[2 * n :])
            log_uniform = torch.full_like(log_here, -spec.action_dim * math.log(2))
            log_density = torch.cat([log_uniform, log_here, log_there]).movedim(0, 1)  # [R, 3n, B]
        obs = self.policy.normalise(batch[..., spec.obs]).expand(3 * n, -1, -1, -1)
        many = torch.cat([obs, torch.cat([uniform, here, there])], -1).movedim(0, 1).flatten(1, 2)
        return (self.q(many).unflatten(2, (3 * n, -1)) - log_density).logsumexp(2)
