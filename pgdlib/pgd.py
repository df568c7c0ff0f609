"""Policy-Guided Diffusion's loop: agents trained on synthetic data that are drawn anew, guided toward their own policies.

Every source of data is a `Row`; all rows and all their seeds are one stack of agents.
"""

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pgdlib import synthetic
from pgdlib.lab import artifacts, resumable
from pgdlib.simulators import pen as adroit

FACTS = ("lam", "log_likelihood", "on_policy", "kept", "ended", "diverged")  # of `synthetic.Batch`, kept for every round
CALIBRATION = 32  # trajectories of each run for one step of the search for its λ
LONG = 20.0  # seconds of drawing after which a row's data are kept until their round is over


@dataclass
class Row:
    """A row of the table: where the data of its agents come from. `rule` and `lam` are those of guided data."""

    name: str
    source: str  # "real", "diffusion" or "world model"
    rule: str | None = None
    lam: float | str | None = None  # a weight, or "calibrated"


@dataclass
class Sources:
    """Where each row finds its data: packed real transitions [N, 116], the diffusion model, and the world model or None.

    All that is drawn for a run follows from its seed, of `seeds` [S], and the round, whatever else is in the stack.
    """

    real: torch.Tensor
    diffusion: synthetic.Diffusion
    world_model: torch.nn.Module | None
    behaviour: torch.nn.Module | None  # S policies cloned from the data, which the world model follows in the first round
    windows: int  # generated for each run, every time
    real_fraction: float
    seeds: list
    _first: tuple = (None, None)  # which policies they were for, and the data of the first round

    def __call__(self, row, policy, round):
        """(packed transitions of each run of `policy`, the `synthetic.Batch` or None) for a round.

        The first round knows no policy yet: both models give what is like the data, the diffusion model unguided.
        """
        if row.source == "real":
            return [self.real] * policy.runs, None
        if row.source == "world model":
            starts, length = self.real[:, : adroit.OBS_DIM], self.diffusion.denoiser.horizon - 1
            target = self.behaviour if round == 0 else policy
            batch = synthetic.from_world_model(self.world_model, target, starts, self.windows, length, self.seeds, round)
        elif round == 0:  # runs of one seed start alike, so these are the same for every row
            if self._first[0] != (start := artifacts.digest(policy.state_dict())):
                unguided = self.diffusion.generate(policy, row.rule, torch.zeros(policy.runs), self.windows, self.seeds, 0)
                self._first = start, unguided
            batch = self._first[1]
        else:
            self._first = None, None
            lam = self.weights(row, policy, round)
            batch = self.diffusion.generate(policy, row.rule, lam, self.windows, self.seeds, round)
        # A run whose policy is no longer finite gets no data: with NaN it stays marked as diverged, and stops no other.
        made = [d if len(d) else d.new_full((1, d.shape[1]), math.nan) for d in batch.data]
        drawn = zip(made, self.seeds, strict=True)
        return [synthetic.mixed(d, self.real, self.real_fraction, seed, round) for d, seed in drawn], batch

    def weights(self, row, policy, round):
        """λ of each run [R]: the row's, or the one at which trajectories are as likely as the policy's own actions."""
        if row.lam != "calibrated":
            return torch.full((policy.runs,), float(row.lam))

        def likelihoods(lam):
            return self.diffusion.log_likelihoods(policy, row.rule, lam, CALIBRATION, self.seeds, 500 + round)

        return synthetic.calibrate(likelihoods, synthetic.on_policy(policy).double())


def evaluate(policy, episodes, horizon, seeds, threads=None, chunk=512):
    """Returns on D4RL's scale, native returns (NaN if horizon < 200) and falls, [R, episodes] each, of the mean actions.

    The initial states of a run follow from its seed, of `seeds` [R]: other rows' runs of that seed meet the same ones, while
    what is common to all seeds, and so in no standard error over seeds, is kept small.
    """
    targets, parts = np.stack([adroit.sample_targets(episodes, np.random.default_rng([s, 5])) for s in seeds]), []
    most = max(1, chunk // policy.runs)
    for first in range(0, episodes, most):
        some = targets[:, first : first + most]
        played = adroit.rollout(policy.act, some[..., 0].size, None, horizon, some.reshape(-1, 4), threads)
        native = played.native_returns if horizon >= adroit.NATIVE_HORIZON else np.full(len(played.rewards), np.nan)
        values = np.stack([played.d4rl_returns, native, played.fallen[:, : adroit.D4RL_HORIZON].any(1)])
        parts.append(values.reshape(3, policy.runs, -1))
    return np.concatenate(parts, 2)


def run(learner, rows, sources, resample_every, marks, score, checkpoint=None, save_every=120.0, report=lambda step: None):
    """The PGD loop: train every row's agents, generating their data anew under their own policies.

    The runs of `learner` are the rows' seeds, row by row. Every `resample_every` steps the policies are fixed as targets,
    and `sources(row, policy, round)` gives each row its data. Returns the curve, `score(policy)` [R] at each of the steps
    `marks`, and the `FACTS` of the generated data [rounds, 6, R]. With a `checkpoint` path a run that was killed goes on to
    the same result; a file that is damaged or of another run is set aside. Data whose drawing took `LONG` lie beside it, a
    file for each row, until their round is over.
    """
    agent, each = learner.agent, len(learner.seeds) // len(rows)
    kept = dict(
        curve=torch.full((len(marks), len(learner.seeds)), torch.nan),
        facts=torch.full((math.ceil(learner.steps / resample_every), len(FACTS), len(learner.seeds)), torch.nan),
    )
    target = copy.deepcopy(agent.policy).requires_grad_(False)
    inputs = dict(seeds=learner.seeds, steps=learner.steps, batch_size=learner.batch_size, learning_rate=learner.learning_rate)
    inputs.update(rows=[vars(row) for row in rows], resample_every=resample_every, marks=marks)

    def state():
        return {**learner.state()[0], **{f"target.{k}": v for k, v in target.state_dict().items()}, **kept}

    if checkpoint is not None:
        learner.step = resumable.restore(checkpoint, state(), inputs) or learner.step
    paths = [] if checkpoint is None else [Path(checkpoint).with_suffix(f".row{i}.safetensors") for i in range(len(rows))]
    saved = time.monotonic()

    def save():
        nonlocal saved
        saved = time.monotonic()
        return resumable.save(checkpoint, state(), {**inputs, "step": learner.step})

    def after(step):
        if checkpoint is not None and time.monotonic() - saved > save_every:
            save()
        report(step)

    def drawn(i, policy, number):
        card = dict(row=vars(rows[i]), round=number, target=artifacts.digest(policy.state_dict()))
        if paths and (found := _kept(paths[i], card, learner.diverged_at.device)):
            return found
        started = time.monotonic()
        made, batch = sources(rows[i], policy, number)
        facts = None if batch is None else torch.stack([getattr(batch, name) for name in FACTS])
        if paths and facts is not None and time.monotonic() - started > LONG:
            save()  # a run that goes on must come to the same targets, or these data are not for it
            sizes = torch.tensor([len(d) for d in made])
            resumable.save(paths[i], dict(data=torch.cat([d.cpu() for d in made]), sizes=sizes, facts=facts), card)
        return made, facts

    def forget():
        for path in paths:
            artifacts.discard(path)

    data, known = None, None
    while True:
        step = learner.step
        if step in marks and kept["curve"][marks.index(step)].isnan().all():
            kept["curve"][marks.index(step)] = torch.as_tensor(score(agent.policy), dtype=torch.float32)
        if step >= learner.steps:
            forget()
            return kept["curve"], kept["facts"]
        number = step // resample_every
        if step % resample_every == 0:
            target.load_state_dict(agent.policy.state_dict())
        if number != known:
            data, known = [], number
            for i in range(len(rows)):
                first, end = i * each, (i + 1) * each
                made, facts = drawn(i, target.select(range(first, end)), number)
                data += made
                if facts is not None:
                    kept["facts"][number, :, first:end] = facts
        over = min((number + 1) * resample_every, learner.steps)
        learner.train(data, min(m for m in (*marks, over) if m > step), after)
        is_kept = learner.step == over and any(path.exists() for path in paths)
        if is_kept and save():  # if not, what an older checkpoint goes on with are these data
            forget()


def _kept(path, card, device):
    """(transitions of each run, facts) in the file `path` if they are those of `card`, or None; set aside if damaged."""
    try:
        tensors, found = artifacts.load(path, own=True)
    except FileNotFoundError:
        return None
    except artifacts.CorruptArtifact as e:
        artifacts.set_aside(path, e)
        return None
    return (tensors["data"].to(device).split(tensors["sizes"].tolist()), tensors["facts"]) if found == card else None
