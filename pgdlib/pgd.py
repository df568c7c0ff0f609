"""Policy-Guided Diffusion's loop: agents trained on synthetic data that are drawn anew, guided toward their own policies.

    for round in pgd.Rounds(learner, rows, sources, resample_every):  # fresh data under the policies as they are now
        for step in learner.train(round.data, round.end):  # until they are drawn anew
            ...

Every source of data is a `Row`; all rows and all their seeds are one stack of agents.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pgdlib import synthetic
from pgdlib.agents.stack import Learner
from pgdlib.calibrate import bisect
from pgdlib.measures import on_policy_log_likelihood
from pgdlib.policies import GaussianPolicy
from pgdlib.simulators import Simulator

FACTS = ("lam", "log_likelihood", "on_policy", "kept", "ended", "diverged")  # of `synthetic.Batch`, kept for every round
CALIBRATION = 32  # trajectories of each run for one step of the search for its λ


@dataclass
class Row:
    """A row of the table: where the data of its agents come from. `rule` and `lam` are those of guided data."""

    name: str
    source: str  # "real", "diffusion" or "world model"
    rule: str | None = None
    lam: float | str | None = None  # a weight, or "calibrated"


@dataclass
class Sources:
    """Where each row finds its data: packed real transitions, the diffusion model, and the world model or None.

    All that is drawn for a run follows from its seed, of `seeds` [S], and the round, whatever else is in the stack.
    """

    real: Tensor  # [N, transition_width]
    diffusion: synthetic.Diffusion
    world_model: torch.nn.Module | None
    behaviour: GaussianPolicy | None  # S policies cloned from the data, which the world model follows in the first round
    windows: int  # generated for each run, every time
    real_fraction: float
    seeds: list
    simulator: Simulator | None = None  # for reward and end of the world model's rollouts
    _first: list = field(default_factory=list, init=False)  # (the policies of the first round, its data)

    def __call__(self, row: Row, policy: GaussianPolicy, number: int) -> tuple[list[Tensor], synthetic.Batch | None]:
        """(packed transitions of each run of `policy`, the `synthetic.Batch` or None) for the round `number`.

        The first round knows no policy yet: both models give what is like the data, the diffusion model unguided.
        """
        if row.source == "real":
            return [self.real] * policy.runs, None
        if row.source == "world model":
            starts, length = self.real[:, self.diffusion.denoiser.spec.obs], self.diffusion.denoiser.horizon - 1
            target, settings = self.behaviour if number == 0 else policy, (self.windows, length, self.seeds, number)
            batch = synthetic.from_world_model(self.world_model, target, starts, *settings, self.simulator)
        elif number == 0:
            batch = self._unguided(row, policy)
        else:
            self._first.clear()
            lam = self.weights(row, policy, number)
            batch = self.diffusion.generate(policy, row.rule, lam, self.windows, self.seeds, number)
        # A run whose policy is no longer finite gets no data: with NaN it stays marked as diverged, and stops no other.
        made = [d if len(d) else d.new_full((1, d.shape[1]), math.nan) for d in batch.data]
        drawn = zip(made, self.seeds, strict=True)
        return [synthetic.mixed(d, self.real, self.real_fraction, seed, number) for d, seed in drawn], batch

    def _unguided(self, row, policy):
        """Runs of one seed start alike, so these are the same for every row."""
        start = torch.cat([p.detach().flatten() for p in policy.parameters()])
        if not (self._first and torch.equal(self._first[0], start)):  # waits for a GPU, in the first round alone
            zero = torch.zeros(policy.runs)
            self._first[:] = start, self.diffusion.generate(policy, row.rule, zero, self.windows, self.seeds, 0)
        return self._first[1]

    def weights(self, row: Row, policy: GaussianPolicy, number: int) -> Tensor:
        """λ of each run [R]: the row's, or the one at which trajectories are as likely as the policy's own actions."""
        if row.lam != "calibrated":
            return torch.full((policy.runs,), float(row.lam))

        def likelihoods(lam):
            return self.diffusion.log_likelihoods(policy, row.rule, lam, CALIBRATION, self.seeds, number)

        return bisect(likelihoods, on_policy_log_likelihood(policy).double())


@dataclass
class Round:
    """What the agents learn from until the next round."""

    number: int
    data: list[Tensor]  # packed transitions of each run
    end: int  # the training step up to which they serve


class Rounds:
    """The rounds of the loop: iterate it, and train the `learner` to each round's end before the next is asked for.

    The runs of `learner` are the rows' seeds, row by row. Every `resample_every` steps the policies are fixed as targets,
    and `sources(row, policy, number)` gives each row its data. `facts` [rounds, 6, R] are the `FACTS`, NaN for real data. With
    the state and the step copied back, also in mid-round, the rounds go on as if nothing had been.
    `keep(name, make)` gives what `make()` does, (transitions of each run, facts [6, R] or None), or what it knows of that name.
    """

    def __init__(self, learner: Learner, rows: list[Row], sources: Callable, resample_every: int, keep: Callable | None = None):
        self.learner, self.rows, self.sources, self.resample_every = learner, list(rows), sources, resample_every
        self.keep = keep or (lambda name, make: make())
        self.target = copy.deepcopy(learner.agent.policy).requires_grad_(False)
        rounds = math.ceil(learner.steps / resample_every)
        self.facts = torch.full((rounds, len(FACTS), len(learner.seeds)), torch.nan)

    def __iter__(self) -> Iterator[Round]:
        learner = self.learner
        while learner.step < learner.steps:
            number, within = divmod(learner.step, self.resample_every)
            if within == 0:
                self.target.load_state_dict(learner.agent.policy.state_dict())
            end = min((number + 1) * self.resample_every, learner.steps)
            yield Round(number, self._data(number), end)
            if learner.step < end:
                raise ValueError(f"step={learner.step} is not allowed; it must be {end}, the end of round {number}")

    def _data(self, number):
        data, each = [], len(self.learner.seeds) // len(self.rows)
        for i, row in enumerate(self.rows):
            runs = range(i * each, (i + 1) * each)
            made, facts = self.keep(f"{number}-{i}", lambda row=row, runs=runs: self._drawn(row, runs, number))
            data += made
            if facts is not None:
                self.facts[number][:, list(runs)] = facts
        return data

    def _drawn(self, row, runs, number):
        made, batch = self.sources(row, self.target.select(runs), number)
        return made, None if batch is None else torch.stack([getattr(batch, name) for name in FACTS])

    def state(self) -> dict[str, Tensor]:
        """All that the rest depends on beside the learner's `step` and the sources, live: name -> tensor."""
        targets = {f"target.{k}": v for k, v in self.target.state_dict().items()}
        return {**self.learner.state(), **targets, "facts": self.facts}
