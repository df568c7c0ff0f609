"""EDAC (An et al. 2021, arXiv 2110.01548) of R stacked runs: SAC with many critics whose gradients are kept apart."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pgdlib.agents.sac import SAC


class EDAC(SAC):
    """SAC-N, the least of N critics, with a loss on how alike their gradients by the action are, of weight `eta`.

    N and η are those of pen-human in the paper's appendix (pen-cloned has η = 10; 0 is SAC-N). It differs in
    two layers for three, one learning rate for two, and in rewards that are not normalised, as the paper's are on Adroit: to
    have its η, divide rewards by their standard deviation.
    """

    critics, eta = 20, 1000.0

    def critic_losses(
        self, pairs: Tensor, aim: Tensor, batch: Tensor, step: int, seeds: list
    ) -> tuple[dict[str, Tensor], Tensor]:
        """As SAC's, and "alike": the mean cosine of two critics' gradients (Sec. 4), times η."""
        each = pairs.repeat(self.critics, 1, 1).requires_grad_()
        q = self.q(each)
        (slope,) = torch.autograd.grad(q.sum(), each, create_graph=True)
        unit = F.normalize(slope[..., self.spec.actions], dim=-1, eps=1e-10).unflatten(0, q.shape[:2])  # [N, R, B, action_dim]
        # The sum over pairs of different critics is the square of the sum without the squares.
        cosines = unit.sum(0).square().sum(-1) - unit.square().sum((0, -1))
        alike = cosines.mean(1) / (self.critics - 1)
        return dict(q=(q - aim).square().mean(2).sum(0), alike=self.eta * alike), q
