"""Behaviour cloning of R stacked runs: maximum likelihood of the data's actions."""

from torch import Tensor, nn

from pgdlib.agents.stack import generators, policies
from pgdlib.data import Spec


class BC(nn.Module):
    """Behaviour cloning."""

    def __init__(self, spec: Spec, seeds: list, obs_mean: Tensor, obs_std: Tensor, hidden: tuple = (256, 256)):
        super().__init__()
        self.spec, self.policy = spec, policies(spec, generators(seeds), obs_mean, obs_std, hidden)

    def losses(self, batch: Tensor, step: int, seeds: list) -> tuple[dict[str, Tensor], None]:
        """The loss of each run [R]; batch [R, B, transition_width]. There is no value."""
        log_prob = self.policy.log_prob(batch[..., self.spec.obs], batch[..., self.spec.actions])
        return dict(policy=-log_prob.mean(1)), None

    def after_step(self) -> None:
        """Nothing follows an optimiser's step here."""
