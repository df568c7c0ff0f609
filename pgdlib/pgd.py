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

from pgdlib import penalties, synthetic
from pgdlib.agents.stack import Critics, Learner
from pgdlib.calibrate import bisect
from pgdlib.measures import on_policy_log_likelihood
from pgdlib.penalties import METHODS
from pgdlib.policies import GaussianPolicy, Policy, selected
from pgdlib.simulators import Simulator

FACTS = ("lam", "log_likelihood", "on_policy", "kept", "ended", "diverged")  # of `synthetic.Batch`, kept for every round
PLACES = 256  # real states, evenly spread, in which a policy's own likelihood is taken, if it depends on them
FOREIGN = 0.2  # std between the means of a world model's data and of others; a part of the same data is nearer
CALIBRATION = 32  # trajectories of each run for one step of the search for its λ


@dataclass
class Row:
    """A row of the table: where its agents' data come from. ValueError for a source that is none, or a number out of range."""

    name: str
    source: str  # "real", "diffusion", or of `penalties.METHODS`: "world model" (MBPO), "mopo", "morel", "rambo"
    rule: str | None = None  # of guided data
    lam: float | str | None = None  # a weight, or "calibrated"
    penalty: float | None = None  # λ of mopo or rambo, or what morel's halt costs; None: the method's own
    length: int | None = None  # steps of a rollout; None: the method's own
    real_fraction: float | None = None  # share of real transitions; None: that of the sources

    def __post_init__(self):
        sources = ("real", "diffusion", *METHODS)
        allowed = dict(
            source=(self.source in sources, f"one of {', '.join(map(repr, sources))}"),
            penalty=(self.penalty is None or 0 <= self.penalty < math.inf, "finite and at least 0"),
            length=(self.length is None or self.length >= 1, "1 or more"),
            real_fraction=(self.real_fraction is None or 0 <= self.real_fraction <= 1, "from 0 to 1"),
        )
        for name, (right, needed) in allowed.items():
            if not right:
                raise ValueError(f"{name}={getattr(self, name)!r} of row {self.name!r} is not allowed; it must be {needed}")


@dataclass
class Sources:
    """Where each row finds its data: packed real transitions, the diffusion model, and the world model of these data or None.

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

    def __post_init__(self):
        if self.world_model is None:
            return
        of, inputs = self.world_model, self.real[:, : self.world_model.into.stop]
        apart = ((inputs.mean(0) - of.mean[of.into]) / of.std[of.into]).abs().max()
        if not apart < FOREIGN:  # waits for a GPU, once
            raise ValueError(f"world_model is not allowed: it is of other data, with means up to {apart:.2g} std from these")

    def __call__(
        self, row: Row, policy: Policy, number: int, critics: Critics | None = None
    ) -> tuple[list[Tensor], synthetic.Batch | None]:
        """(packed transitions of each run of `policy`, the `synthetic.Batch` or None) for the round `number`.

        The first round knows no policy yet: both models give what is like the data, the diffusion model unguided. `critics`,
        those of the same runs, are what rambo's model works against.
        """
        if row.source == "real":
            return [self.real] * policy.runs, None
        if row.source in METHODS:
            if self.world_model is None:
                raise ValueError(f"source={row.source!r} of row {row.name!r} is not allowed without a world model")
            target, steps = self.behaviour if number == 0 else policy, self.diffusion.denoiser.horizon - 1
            how = self.windows, steps, self.seeds, number, self.simulator, row.penalty, row.length
            batch = penalties.imagined(row.source, self.world_model, target, critics, self.real, *how)
        elif number == 0:
            batch = self._unguided(row, policy)
        else:
            self._first.clear()
            lam = self.weights(row, policy, number)
            batch = self.diffusion.generate(policy, row.rule, lam, self.windows, self.seeds, number)
        # A run whose policy is no longer finite gets no data: with NaN it stays marked as diverged, and stops no other.
        made = [d if len(d) else d.new_full((1, d.shape[1]), math.nan) for d in batch.data]
        share = self.real_fraction if row.real_fraction is None else row.real_fraction
        drawn = zip(made, self.seeds, strict=True)
        return [synthetic.mixed(d, self.real, share, seed, number) for d, seed in drawn], batch

    def _unguided(self, row, policy):
        """Runs of one seed start alike, so these are the same for every row."""
        start = torch.cat([p.detach().flatten() for p in policy.parameters()])
        if not (self._first and torch.equal(self._first[0], start)):  # waits for a GPU, in the first round alone
            zero = torch.zeros(policy.runs)
            self._first[:] = start, self.diffusion.generate(policy, row.rule, zero, self.windows, self.seeds, 0)
        return self._first[1]

    def weights(self, row: Row, policy: Policy, number: int) -> Tensor:
        """λ of each run [R]: the row's, or the one at which trajectories are as likely as the policy's own actions."""
        if row.lam != "calibrated":
            return torch.full((policy.runs,), float(row.lam))

        def likelihoods(lam):
            return self.diffusion.log_likelihoods(policy, row.rule, lam, CALIBRATION, self.seeds, number)

        places = self.real[:: -(-len(self.real) // PLACES), self.diffusion.denoiser.spec.obs].repeat(policy.runs, 1)
        return bisect(likelihoods, on_policy_log_likelihood(policy, places).double())


@dataclass
class Round:
    """What the agents learn from until the next round."""

    number: int
    data: list[Tensor]  # packed transitions of each run
    end: int  # the training step up to which they serve


class Rounds:
    """The rounds of the loop: iterate it, and train the `learner` to each round's end before the next is asked for.

    The runs of `learner` are the rows' seeds, row by row. Every `resample_every` steps the policies are fixed as targets,
    and `sources(row, policy, number)` gives each row its data; for rambo's the critics are fixed, too, and given as a fourth.
    `facts` [rounds, 6, R] are the `FACTS`, NaN for real data. With the state and the step copied back, also in mid-round, the
    rounds go on as if nothing had been.
    `keep(name, make)` gives what `make()` does, (transitions of each run, facts [6, R] or None), or what it knows of that name.
    """

    def __init__(self, learner: Learner, rows: list[Row], sources: Callable, resample_every: int, keep: Callable | None = None):
        self.learner, self.rows, self.sources, self.resample_every = learner, list(rows), sources, resample_every
        self.keep = keep or (lambda name, make: make())
        self.target = copy.deepcopy(learner.agent.policy).requires_grad_(False)
        self.critics = self._critics(learner.agent)
        rounds = math.ceil(learner.steps / resample_every)
        self.facts = torch.full((rounds, len(FACTS), len(learner.seeds)), torch.nan)

    def _critics(self, agent):
        """A copy of the agents' critics where a row needs them; ValueError for a row that these agents cannot have."""
        needed = any(row.source == "rambo" for row in self.rows)
        for row in self.rows:
            found = f"row {row.name!r} is not allowed for {type(agent).__name__}"
            if row.source == "diffusion" and row.lam != 0 and not hasattr(agent.policy, "log_prob"):
                raise ValueError(f"{found}: a policy without a density (log_prob) cannot guide; its lam must be 0")
            if row.source == "rambo" and not hasattr(agent, "q"):
                raise ValueError(f"{found}: rambo's model works against critics (q), and it has none")
        return copy.deepcopy(agent.q).requires_grad_(False) if needed else None

    def __iter__(self) -> Iterator[Round]:
        learner = self.learner
        while learner.step < learner.steps:
            number, within = divmod(learner.step, self.resample_every)
            if within == 0:
                self.target.load_state_dict(learner.agent.policy.state_dict())
                if self.critics:
                    self.critics.load_state_dict(learner.agent.q.state_dict())
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
        critics = [selected(self.critics, runs, self.target.runs)] if row.source == "rambo" else []
        made, batch = self.sources(row, self.target.select(runs), number, *critics)
        return made, None if batch is None else torch.stack([getattr(batch, name) for name in FACTS])

    def state(self) -> dict[str, Tensor]:
        """All that the rest depends on beside the learner's `step` and the sources, live: name -> tensor."""
        targets = {f"target.{k}": v for k, v in self.target.state_dict().items()}
        critics = {f"critics.{k}": v for k, v in self.critics.state_dict().items()} if self.critics else {}
        return {**self.learner.state(), **targets, **critics, "facts": self.facts}
