"""Offline agents in stacks: R runs (seeds, and everything else that shares shapes) trained as one batch, each as if alone.

Runs share nothing: weights, data and random draws are their own, so that one that diverges leaves the others untouched.
Shapes: R runs, B transitions a batch. Observations and actions are in environment space; networks see normalised ones.
An agent is a module with `policy` and the methods `losses(batch, step, seeds)`, which gives losses by name, [R] each, of which
the sum is trained, and a mean value [R] or None, and `after_step()`.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from pgdlib.data import Spec
from pgdlib.fast import StackedMLP, adam, generator, optimiser_state
from pgdlib.policies import GaussianPolicy

DIVERGED = 1e6  # a mean value of states beyond it is no return
CHUNK = 64  # training steps whose batches are drawn together


def policies(
    spec: Spec, drawn: list, obs_mean: Tensor, obs_std: Tensor, hidden: tuple, log_std: float = -1.0
) -> GaussianPolicy:
    """A stack of policies N(tanh μ(s), diag(std²)) with initial weights from the generators `drawn`, one a run.

    Observations are normalised by obs_mean, obs_std [obs_dim].
    """
    how = dict(squash=True, low=True, log_std_range=(-5, 2), generators=drawn)
    made = GaussianPolicy(spec.obs_dim, spec.action_dim, hidden, "relu", **how)
    scales = dict(obs_mean=obs_mean, obs_std=obs_std)
    made.load_state_dict({**scales, "log_std": torch.full_like(made.log_std, log_std)}, strict=False)
    return made


def generators(seeds: list, *key: int) -> list[torch.Generator]:
    """A generator for the initial weights of each run; runs of one seed start alike. `key`: of further networks."""
    return [generator("cpu", "weights", seed, *key) for seed in seeds]


def draws(batch: Tensor, step: int, seeds: list, n: int, width: int, *key: int) -> Tensor:
    """N(0, 1) [n, R, B, width] for a batch [R, B, ...], each run's by its seed, the step and the `key` alone."""
    shape, device = (n, batch.shape[1], width), batch.device
    drawn = [torch.randn(shape, generator=generator(device, "targets", s, step, *key), device=device) for s in seeds]
    return torch.stack(drawn, 1).to(batch.dtype)


class Critics(StackedMLP):
    """N = `count` Q networks of each run, two by default: [N, R, B] at pairs [R, B, obs_dim + action_dim] of normalised
    observations and actions, or at pairs [N R, B, ...], for each network its own.
    """

    def __init__(self, spec: Spec, hidden: tuple, drawn: list, count: int = 2, activation: Callable = torch.relu_):
        # The first networks of all runs come first, then the second.
        super().__init__([spec.obs_dim + spec.action_dim, *hidden, 1], drawn * count, activation)
        self.count = count

    def forward(self, pairs: Tensor, frozen: bool = False) -> Tensor:
        """As described; frozen: no gradient reaches the weights."""
        each = pairs if len(pairs) == len(self.weights[0]) else pairs.repeat(self.count, 1, 1)
        return super().forward(each, frozen).reshape(self.count, -1, pairs.shape[1])


class Learner:
    """An agent in training: Adam, its step, and which runs have diverged; it goes on exactly from a saved state.

    The learning rate of the policy falls along a cosine to zero at `steps`, the others stay (as in the code of IQL).
    """

    def __init__(self, agent: nn.Module, seeds: list, steps: int, batch_size: int = 512, learning_rate: float = 3e-4):
        self.agent, self.seeds, self.steps, self.step = agent, list(seeds), steps, 0
        self.batch_size, self.learning_rate = batch_size, learning_rate
        actor = list(agent.policy.parameters())
        known = {id(p) for p in actor}
        critic = [p for p in agent.parameters() if id(p) not in known]
        groups = [dict(params=[p for p in group if p.requires_grad]) for group in (actor, critic)]
        self.optimiser = adam(groups, learning_rate)
        self.diverged_at = torch.full((len(self.seeds),), -1, device=agent.policy.obs_mean.device)

    def train(self, data: list[Tensor], until: int | None = None) -> Iterator[int]:
        """Go on to step `until` (the last) on `data`, packed transitions [N, transition_width] for each run (which may share
        tensors). Iterate it: the number of steps that are done comes after each of them.
        """
        ids, until = None, self.steps if until is None else until
        while self.step < until:
            if ids is None or self.step % CHUNK == 0:
                ids = self._draw([len(d) for d in data])
            self._advance(torch.stack([d.index_select(0, i[self.step % CHUNK]) for d, i in zip(data, ids, strict=True)]))
            yield self.step

    def _draw(self, counts):
        """Transitions for the CHUNK steps around the present one, [CHUNK, B] for each run, by its seed and the step alone."""
        device, chunk = self.diverged_at.device, self.step // CHUNK
        ids = []
        for seed, count in zip(self.seeds, counts, strict=True):
            u = torch.rand(CHUNK, self.batch_size, generator=generator(device, "training", seed, chunk), device=device)
            ids.append((u * count).long().clamp_max(count - 1))
        return ids

    def _advance(self, batch):
        self.optimiser.param_groups[0]["lr"] = self.learning_rate * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        self.optimiser.zero_grad()
        losses, value = self.agent.losses(batch, self.step, self.seeds)
        loss = sum(losses.values())
        loss.sum().backward()
        self.optimiser.step()
        self.agent.after_step()
        self.step += 1
        bad = ~loss.isfinite() if value is None else ~(loss.isfinite() & (value.abs() < DIVERGED))
        self.diverged_at.masked_fill_(bad.detach() & (self.diverged_at < 0), self.step)

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on beside `step` and the data, live: name -> tensor, to save or to copy into."""
        tensors = {f"agent.{k}": v for k, v in self.agent.state_dict().items()}
        return {**tensors, **optimiser_state(self.optimiser), "diverged_at": self.diverged_at}
