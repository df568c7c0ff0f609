"""Table 1: agents on every source of data, trained through `pgd.Rounds`, tested in the simulator, and their table."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm

from pgdlib import pgd, sampler
from pgdlib.agents.stack import Learner
from pgdlib.lab import artifacts, budget, resumable
from pgdlib.lab.parts import Parts
from pgdlib.simulators.episodes import rollout

SETTINGS = ("hidden", "polyak", "resample_every", "windows", "real_fraction")  # beside agent_*, draw_*, ...
LONG = 20.0  # seconds of drawing after which a row's data are kept until the training is over


def evaluate(simulator, policy, episodes, seeds, threads=None, chunk=512, horizon=None):
    """Returns on D4RL's scale and whether episodes end by themselves, [R, episodes] each, of the mean actions.

    The initial states of a run follow from its seed, of `seeds` [R]: other rows' runs of that seed meet the same ones, while
    what is common to all seeds, and so in no standard error over seeds, is kept small. Episodes have the simulator's `horizon`,
    or less. NaN where it is `simulators.unknown`.
    """
    if simulator.batch is None:
        return np.full((2, policy.runs, episodes), np.nan)
    begun, parts = [simulator.start(episodes, np.random.default_rng([s, 5])) for s in seeds], []
    most = max(1, chunk // policy.runs)
    for first in range(0, episodes, most):
        some = [np.concatenate([each[first : first + most] for each in of]) for of in zip(*begun)]
        played = rollout(simulator, policy.act, len(some[0]), None, horizon, some, threads, whole=False)
        parts.append(np.stack([played.returns(), played.ended.any(1)]).reshape(2, policy.runs, -1))
    return np.concatenate(parts, 2)


@dataclass
class Result:
    """Trained and tested agents, R = rows x seeds runs, row by row."""

    rows: list
    seeds: list
    marks: list  # training steps of the curve
    curve: np.ndarray  # [P, R]: the mean of a few returns
    facts: np.ndarray  # [rounds, 6, R]: `pgd.FACTS`, NaN where data are real
    returns: np.ndarray  # [R, n] on D4RL's scale
    falls: np.ndarray  # [R, n]
    diverged_at: np.ndarray  # [R]: the training step, or -1
    policy: torch.nn.Module  # the R trained policies

    def by_row(self, values):
        """row name -> the part of `values` [..., R] that belongs to it [..., S]."""
        parts = np.split(np.asarray(values), len(self.rows), axis=-1)
        return {row.name: part for row, part in zip(self.rows, parts, strict=True)}

    @property
    def means(self):
        """[R]: the mean return of each run, NaN where it diverged."""
        return np.where(self.diverged_at < 0, self.returns.mean(1), np.nan)


class Training:
    """All agents' training as a loop for `resumable.run`: rounds of data, the steps on them, and tests at the steps `marks`.

    A round's data whose drawing took `LONG` are kept beside the `checkpoint`, which is saved before: a training that goes on
    must come to the same policies, or these data are not for it. `p` and `card` as `train` has them.
    """

    def __init__(self, learner, rows, sources, p, checkpoint, card):
        self.learner, self.p, self.checkpoint, self.card, self.steps = learner, p, checkpoint, card, learner.steps
        self.rounds, self.simulator = pgd.Rounds(learner, rows, sources, p.resample_every, self.kept), sources.simulator
        self.marks = [round(p.agent_steps * i / p.curve_points) for i in range(p.curve_points + 1)]
        self.curve = torch.full((len(self.marks), len(learner.seeds)), torch.nan)

    step = property(lambda self: self.learner.step, lambda self, step: setattr(self.learner, "step", step))

    def state(self):
        """All that changes, live: name -> tensor."""
        return {**self.rounds.state(), "curve": self.curve}

    def __iter__(self):
        self.test()
        for round in self.rounds:
            for step in self.learner.train(round.data, round.end):
                self.test()
                yield step

    def test(self):
        """A point of the curve, if a mark is reached and was not before."""
        if self.step in self.marks and (point := self.curve[self.marks.index(self.step)]).isnan().all():
            starts = [10 * seed + 1 for seed in self.learner.seeds]
            returns, _ = evaluate(self.simulator, self.learner.agent.policy, self.p.curve_episodes, starts)
            point.copy_(torch.as_tensor(returns.mean(1)))

    def kept(self, name, make):
        """A hook for `pgd.Rounds`: a row's data of a round, drawn or found."""
        number, row = map(int, name.split("-"))
        if self.rounds.rows[row].source == "real":
            return make()

        def packed():
            made, facts = make()
            return torch.cat(made), torch.tensor([len(d) for d in made]), facts

        def before():
            self.save()
            Parts(f"{self.checkpoint.stem}/{number - 1}").discard()  # that round is over

        parts = Parts(f"{self.checkpoint.stem}/{number}", self.learner.diverged_at.device, LONG, before)
        target = artifacts.digest(self.rounds.target.state_dict())[:12]
        made, sizes, facts = parts.keep(f"{row}-{target}", packed)
        return list(made.split(sizes.tolist())), facts.cpu()

    def save(self):
        """Save the checkpoint now."""
        resumable.save(self.checkpoint, self.state(), {**self.card, "step": self.step})

    def result(self):
        """The arrays of a `Result` by name, tested at last, and the policy's tensors."""
        policy, p, starts = self.learner.agent.policy, self.p, [10 * seed + 2 for seed in self.learner.seeds]
        returns, falls = evaluate(self.simulator, policy, p.test_episodes, starts)
        arrays = dict(curve=self.curve, facts=self.rounds.facts, returns=returns, falls=falls)
        arrays |= {f"policy.{k}": v for k, v in policy.state_dict().items()} | dict(diverged_at=self.learner.diverged_at)
        return {k: torch.as_tensor(v) for k, v in arrays.items()}


def train(kind, make_agent, rows, seeds, sources, p, device, inputs, progress=tqdm):
    """The `Result` of `make_agent(seeds)` on all rows and seeds; kept in runs/agents/, made if missing.

    `kind` names the agent, `inputs` (plain JSON values) what the sources rest on. `p` has the settings of notebook 05
    (agent_*, hidden, polyak, resample_every, windows, draw_*, curve_*, test_episodes). `progress` makes the bar, as tqdm does;
    what its update raises ends the training, which goes on from there with the next call.
    """
    stack, agent = list(seeds) * len(rows), make_agent(list(seeds) * len(rows))
    settings = {k: v for k, v in vars(p).items() if k.startswith(("agent_", "draw_", "curve_", "test_")) or k in SETTINGS}
    card = dict(kind=kind, stack=stack, rows=[vars(row) for row in rows], settings=settings)
    modules = {c.__module__.removeprefix("pgdlib.") for c in type(agent).__mro__ if c.__module__.startswith("pgdlib.")}
    code = artifacts.code_version("lab.table1", *sorted(modules))
    sources_of = [[v for k, v in vars(row).items() if k != "name"] for row in rows]  # whatever they are called
    name = artifacts.key(**inputs, kind=kind, rows=sources_of, seeds=list(seeds), settings=settings, code=code)
    path = artifacts.root() / "agents" / f"{kind}-{p.scale}-{name}.safetensors"
    checkpoint = artifacts.root() / "checkpoints" / path.name
    learner = Learner(agent.to(device), stack, p.agent_steps, p.agent_batch, p.agent_rate)
    loop = Training(learner, rows, sources, p, checkpoint, card)

    def make():
        with progress(total=loop.steps, desc=f"training {len(stack)} agents ({kind})", mininterval=5) as bar:
            resumable.run(loop, checkpoint, lambda step: bar.update(step - bar.n))
        loop.save()  # the tests take long, too
        return loop.result(), card

    tensors, _ = artifacts.artifact(path, make)
    artifacts.discard(checkpoint)  # not before the result is kept
    Parts(checkpoint.stem).discard()
    policy = agent.policy.requires_grad_(False)
    policy.load_state_dict({k.removeprefix("policy."): v for k, v in tensors.items() if k.startswith("policy.")})
    arrays = {k: v.numpy() for k, v in tensors.items() if not k.startswith("policy.")}
    return Result(rows, list(seeds), loop.marks, **arrays, policy=policy)


def announce(make_agent, rows, seeds, sources, p, device, say=print):
    """Say what `train` is to do, and what it takes (`budget.announce`), by one step of each part.

    Raises ValueError, as `budget.require`, if the denoiser does not fit.
    """
    runs, diffusion, rounds = len(rows) * len(seeds), sources.diffusion, math.ceil(p.agent_steps / p.resample_every)
    searches = sum(row.lam == "calibrated" for row in rows) * (rounds - 1) * 10 * pgd.CALIBRATION
    draws = len(seeds) * (sum(row.source == "diffusion" for row in rows) * rounds * p.windows + searches)
    episodes, simulator = runs * (p.test_episodes + (p.curve_points + 1) * p.curve_episodes), sources.simulator
    say(f"{len(rows)} rows x {len(seeds)} seeds = {runs} agents, {p.agent_steps:,} steps each, batches of {p.agent_batch}")
    say(f"{rounds} rounds of synthetic data: {draws:,} trajectories in all; {episodes:,} test episodes")
    learner = Learner(make_agent([0] * runs).to(device), [0] * runs, p.agent_steps, p.agent_batch, p.agent_rate)

    def seconds(call):  # of one call, after others
        return Timer("call()", globals=dict(call=call), num_threads=torch.get_num_threads()).timeit(1).mean

    training = seconds(lambda: list(learner.train([sources.real] * runs, learner.step + 1))) * p.agent_steps
    few = seconds(lambda: evaluate(simulator, learner.agent.policy, 8, learner.seeds, horizon=10))
    tests = few / (80 * runs) * episodes * simulator.horizon
    memory = runs * p.windows * diffusion.denoiser.horizon * sources.real[0].nbytes
    works = [("training", f"{p.agent_steps:,} steps", training, memory), ("tests", f"{episodes:,} episodes", tests, 0.0)]
    if hasattr(diffusion.denoiser, "config"):  # else it is no network of ours: a formula
        config, asked = diffusion.denoiser.config, sampler.evaluations(diffusion.solver, diffusion.steps)
        at_once = len(seeds) * sum(size for _, size in sampler.chunks(p.windows, diffusion.chunk // len(seeds))[0])
        memory = budget.require(config, at_once, device)
        works.insert(1, ("data", f"{draws:,} trajectories", budget.pace(config, device) * asked * draws, memory))
    budget.announce(works, p.scale, device, say)


def save_table(table, name, scale):
    """Write the per-seed table to runs/results/<scale>/<name>.csv; the path."""
    path = artifacts.root() / "results" / scale / f"{name}.csv"
    with artifacts.replacing(path) as partial:
        table.to_csv(partial, index=False)
    return path


def per_seed(result, dataset, simulator):
    """The table that everything else follows from: one line for each row and seed (`DataFrame`).

    A run that has diverged has no return (NaN), and the step at which it did.
    """
    rows, alive, n = [row for row in result.rows for _ in result.seeds], result.diverged_at < 0, result.returns.shape[1]
    table = pd.DataFrame([dict(dataset=dataset, row=row.name, source=row.source, rule=row.rule) for row in rows])
    lived = np.where(alive, 1.0, np.nan)
    return table.assign(
        seed=result.seeds * len(result.rows),
        d4rl_return=result.means,
        standard_error=lived * result.returns.std(1, ddof=1) / math.sqrt(n),
        score=simulator.score(result.means),
        fell=lived * result.falls.mean(1),
        episodes=n,
        diverged_at=np.where(alive, np.nan, result.diverged_at),
        **{f"data_{k}": result.facts[-1, i].astype(float) for i, k in enumerate(pgd.FACTS)},
    )
