"""The benchmark of Table 1: agents on every source of data, trained by `pgd.run`, tested in the simulator, and their table."""

import math
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from pgdlib import data, pgd, sampler
from pgdlib.agents.stack import WIDTH, Learner
from pgdlib.lab import budget, pipeline, store
from pgdlib.simulators import pen as adroit

SETTINGS = ("hidden", "polyak", "resample_every", "windows", "real_fraction")  # beside agent_*, draw_*, ...
ROOMS = ("agents.iql", "agents.td3_bc", "pgd", "lab.table1")


def read_denoiser(path, dataset, device):
    """The denoiser in the file `path`, as `load_denoiser` keeps them, if it was trained on `dataset`.

    Raises ValueError that names the parameter `denoiser` for a file that is missing, damaged, or of other data.
    """
    try:
        tensors, card = store.load(path)
        tensors.pop("losses")
        denoiser = pipeline.restored(tensors, card)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as e:  # a foreign file breaks these in many ways
        raise ValueError(f"denoiser={str(path)!r} cannot be used: {type(e).__name__}: {e}") from e
    own = data.Normaliser(denoiser.normaliser.transform).fit(pipeline.train_val(dataset)[0].packed())
    if card.get("data_key") != dataset.key:
        found = f"{card.get('data')} ({card.get('data_key')})"
        raise ValueError(f"denoiser={str(path)!r} is not allowed; it was trained on {found}, needed is {dataset.key}")
    if not all(torch.allclose(v, denoiser.normaliser.state_dict()[k]) for k, v in own.state_dict().items()):
        raise ValueError(f"denoiser={str(path)!r} is not allowed; its normaliser is not that of the data {dataset.key}")
    return denoiser.to(device)


def return_of(score):
    """The return on D4RL's scale of a normalised score."""
    return adroit.D4RL_RANDOM_RETURN + score / 100 * (adroit.D4RL_EXPERT_RETURN - adroit.D4RL_RANDOM_RETURN)


@dataclass
class Result:
    """Trained and tested agents, R = rows x seeds runs, row by row."""

    rows: list
    seeds: list
    marks: list  # training steps of the curve
    curve: np.ndarray  # [P, R]: the mean of a few returns
    facts: np.ndarray  # [rounds, 6, R]: `pgd.FACTS`, NaN where data are real
    returns: np.ndarray  # [R, n] on D4RL's scale
    native: np.ndarray  # [R, m]: native returns, of the first m episodes
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


def train(kind, make_agent, rows, seeds, sources, p, device, inputs, progress=tqdm):
    """The `Result` of `make_agent(seeds)` on all rows and seeds; kept in runs/agents/, made if missing.

    `kind` names the agent, `inputs` (plain JSON values) what the sources rest on. `p` has the settings of the benchmark
    (`params.SETTINGS`: agent_*, hidden, polyak, resample_every, windows, draw_*, curve_*, test_episodes). `progress` makes the
    bar, as tqdm does; what its update raises ends the training, which goes on from there with the next call.
    """
    settings = {k: v for k, v in vars(p).items() if k.startswith(("agent_", "draw_", "curve_", "test_")) or k in SETTINGS}
    inputs = dict(inputs, kind=kind, rows=[(r.source, r.rule, r.lam) for r in rows], seeds=list(seeds), settings=settings)
    path = store.root() / "agents" / f"{kind}-{p.scale}-{store.key(**inputs, code=store.code_version(*ROOMS))}.safetensors"
    curve_seeds, test_seeds = ([10 * seed + i for seed in seeds] * len(rows) for i in (1, 2))
    stack, checkpoint = list(seeds) * len(rows), store.root() / "checkpoints" / path.name
    marks = [round(p.agent_steps * i / p.curve_points) for i in range(p.curve_points + 1)]

    def make():
        learner = Learner(make_agent(stack).to(device), stack, p.agent_steps, p.agent_batch, p.agent_rate)
        with progress(total=p.agent_steps, desc=f"training {len(stack)} agents ({kind})", mininterval=5) as bar:
            curve, facts = pgd.run(
                learner,
                rows,
                sources,
                p.resample_every,
                marks,
                lambda policy: pgd.evaluate(policy, p.curve_episodes, adroit.D4RL_HORIZON, curve_seeds)[0].mean(1),
                checkpoint,
                report=lambda step: bar.update(step - bar.n),
            )
        policy = learner.agent.policy
        returns, _, falls = pgd.evaluate(policy, p.test_episodes, adroit.D4RL_HORIZON, test_seeds)
        native = pgd.evaluate(policy, native_episodes(p), adroit.NATIVE_HORIZON, test_seeds)[1]
        arrays = dict(curve=curve, facts=facts, returns=returns, native=native, falls=falls, diverged_at=learner.diverged_at)
        tensors = {k: torch.as_tensor(v) for k, v in arrays.items()}
        card = dict(kind=kind, stack=stack, rows=[vars(r) for r in rows], settings=settings)
        return {**{f"policy.{k}": v for k, v in policy.state_dict().items()}, **tensors}, card

    tensors, _ = store.artifact(path, make)
    store.discard(checkpoint)  # not before the result is kept
    policy = make_agent(stack).policy.requires_grad_(False)
    policy.load_state_dict({k.removeprefix("policy."): v for k, v in tensors.items() if k.startswith("policy.")})
    arrays = {k: v.numpy() for k, v in tensors.items() if not k.startswith("policy.")}
    return Result(rows, list(seeds), marks, **arrays, policy=policy.to(device))


def native_episodes(p):
    """Native episodes for each agent: they are twice as long, and stand beside the others only for comparison."""
    return max(2, p.test_episodes // 5)


def announce(make_agent, rows, seeds, sources, p, device):
    """Print what `train` is to do, with its time and memory as measured on one training step, draw and control step each.

    A draw is measured with few trajectories and three steps. Raises ValueError, as `budget.require`, if the denoiser does not
    fit.
    """
    runs, diffusion = len(rows) * len(seeds), sources.diffusion
    rounds = math.ceil(p.agent_steps / p.resample_every)
    guided = sum(row.source == "diffusion" for row in rows)
    draws = guided * rounds * p.windows + sum(row.lam == "calibrated" for row in rows) * (rounds - 1) * 10 * pgd.CALIBRATION
    episodes = p.test_episodes + 2 * native_episodes(p) + (p.curve_points + 1) * p.curve_episodes
    print(f"{len(rows)} rows x {len(seeds)} seeds = {runs} agents, {p.agent_steps:,} steps each, batches of {p.agent_batch}")
    print(f"{rounds} rounds of synthetic data: {len(seeds) * draws:,} trajectories in all; {runs * episodes:,} test episodes")

    config, memory, few = getattr(diffusion.denoiser, "config", None), 0.0, max(1, min(64, p.windows))
    if config is not None:  # else it is no network of ours: a formula
        at_once = sum(size for _, size in sampler.chunks(p.windows, diffusion.chunk // len(seeds))[0])
        memory = budget.require(config, at_once * len(seeds), device)
        flops = budget.count(config, 1, device)[0] * len(seeds)
        few = int(max(1, min(few, budget.TEST[torch.device(device).type] // flops)))
    learner = Learner(make_agent([0] * runs).to(device), [0] * runs, p.agent_steps, p.agent_batch, p.agent_rate)
    policy, quick = learner.agent.policy.select(range(len(seeds))), replace(diffusion, steps=3, warmup=0)
    asked = sampler.evaluations(diffusion.solver, diffusion.steps) / sampler.evaluations(diffusion.solver, 3)

    def draw(n):
        quick.draw(policy, "explicit", [1.0] * len(seeds), n, seeds, 0)

    learner.train([sources.real] * runs, 2)  # of everything, what comes first takes longer
    pgd.evaluate(learner.agent.policy, 1, 1, learner.seeds)
    draw(1)
    each = [
        _seconds(lambda: learner.train([sources.real] * runs, learner.step + 3)) / 3 * p.agent_steps,
        _seconds(lambda: draw(few)) / few * asked * draws,
        _seconds(lambda: pgd.evaluate(learner.agent.policy, 8, 10, learner.seeds)) / 80 * episodes * adroit.D4RL_HORIZON,
    ]
    size = sum(t.numel() * t.element_size() for t in learner.state()[0].values())
    memory += 2 * size + runs * p.windows * diffusion.denoiser.horizon * WIDTH * 4
    words = ", ".join(f"{name} {s / 60:.1f}" for name, s in zip(("training", "synthetic data", "tests"), each))
    print(f"estimated: {sum(each) / 60:.1f} minutes ({words}), {memory / 1e9:.2f} GB of memory", file=sys.stderr)


def _seconds(call):
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    started = time.monotonic()
    call()
    wait()
    return time.monotonic() - started


def save_table(table, name, scale):
    """Write the per-seed table to runs/results/<scale>/<name>.csv; the path."""
    path = store.root() / "results" / scale / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with store.replacing(path) as partial:
        table.to_csv(partial, index=False)
    return path


def per_seed(result, dataset):
    """The table that everything else follows from: one line for each row and seed (`DataFrame`).

    A run that has diverged has no return (NaN), and the step at which it did.
    """
    lines = []
    for r, (row, seed) in enumerate((row, seed) for row in result.rows for seed in result.seeds):
        mean, died = float(result.means[r]), int(result.diverged_at[r])
        lived = 1.0 if died < 0 else math.nan
        lines.append(
            dict(
                dataset=dataset,
                row=row.name,
                source=row.source,
                rule=row.rule,
                seed=seed,
                d4rl_return=mean,
                standard_error=lived * float(result.returns[r].std(ddof=1) / math.sqrt(result.returns.shape[1])),
                score=float(adroit.normalised_score(mean)),
                native_return=lived * float(result.native[r].mean()),
                fell=lived * float(result.falls[r].mean()),
                episodes=result.returns.shape[1],
                diverged_at=died if died >= 0 else math.nan,
                **{f"data_{k}": float(v) for k, v in zip(pgd.FACTS, result.facts[-1, :, r])},
            )
        )
    return pd.DataFrame(lines)
