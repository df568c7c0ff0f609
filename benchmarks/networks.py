"""The paths that are mostly matrix products: denoiser, its training, the guided sampler, IQL; each beside its baseline."""

from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import baselines, counts, stacked_seeds, timing
from benchmarks.limits import Limits
from pgdlib import data, edm, guidance, sampler
from pgdlib.lab import load

DENOISERS = ((64, 64, 64), (128, 64, 32), (1024, 16, 128))  # width, trajectories, length; the last as the paper trains
SAMPLED = dict(width=64, trajectories=256, length=64, steps=6, warmup=1, churn=2.5, lam=0.3)
WIDTH, BATCH = 256, 512  # of IQL: the paper's sizes
SEEDS = 1, 5, 20
IQL_STEPS = 4  # in a call


@dataclass
class Bench:
    """Where and for how long everything is measured."""

    device: str
    threads: int
    seconds: float
    limits: Limits

    def compare(self, path, size, ours, plain, units, unit, kind=None, work=None, scale=1.0, **more):
        """A `Row` of the calls `ours` and `plain`. One of ours makes `units` of `unit`, `scale` times what one of plain makes.

        `work`: FLOPs or bytes of a call of ours, to be given as a share of the limit `kind`. `more` goes into the row.
        """
        calls = {"ours": ours, "plain": plain}
        if kind:
            calls["anchor"] = self.limits.anchor(kind)
        taken = timing.alternate(calls, self.seconds, self.device)
        return timing.Row(
            path,
            size,
            **{"against": "plain loop", **more},
            ratio=timing.ratio(taken, "plain", "ours", scale),
            ours=timing.rate(taken, "ours", units),
            other=timing.rate(taken, "plain", units / scale),
            unit=f"{unit}/s",
            share=self.limits.share(kind, taken, "ours", work) if kind else None,
            limit=f"best {kind}" if kind else "",
            rounds=len(taken["ours"]),
        )


def make_denoiser(width, length, device):
    """An untrained denoiser; random weights cost what trained ones do."""
    torch.manual_seed(0)
    return edm.Denoiser(counts.SPEC.obs_dim, counts.SPEC.action_dim, length, width, 2).to(device)


def denoiser(bench):
    """One evaluation of the denoiser, without gradients."""
    for width, n, length in DENOISERS:
        made = make_denoiser(width, length, bench.device).requires_grad_(False)
        x, sigma = torch.randn(n, length, counts.SPEC.width, device=bench.device), torch.ones(n, device=bench.device)
        w, work = baselines.weights(made.net), counts.denoiser(n, length, width)
        target = dict(target=0.7, judged="share") if width == 1024 else {}
        for precision, context in timing.precisions(bench.device).items():
            ours = timing.within(context, partial(made, x, sigma))
            size = f"width {width}, {n} x {length} steps, {precision}"
            plain = partial(baselines.denoise, w, x, sigma)
            yield bench.compare(
                "denoiser", size, ours, plain, n, "trajectories", precision, work, against="eager f32", **target
            )


def training(bench):
    """A few training steps of the denoiser, with their draws, Adam, the average of the weights, and setting these up."""
    for width, n, length in DENOISERS:
        made = make_denoiser(width, length, bench.device)
        steps = torch.randn(4_000, counts.SPEC.width)
        spec, lengths = counts.SPEC, torch.full((40,), 100)
        columns = [steps[:, s] for s in (spec.obs, spec.actions, spec.reward)]
        episodes = data.Trajectories(*columns, torch.zeros(4_000), steps[:, spec.obs], lengths)
        windows = data.Windows(episodes, made.normaliser, length, bench.device)
        how, w = edm.Recipe(3, n, 1e-4), baselines.weights(made.net)
        for precision, context in timing.precisions(bench.device).items():
            ours = timing.within(context, lambda windows=windows, how=how, made=made: list(edm.Training(made, windows, how)))
            size = f"width {width}, {n} x {length} steps, {precision}"
            work = how.steps * counts.training(n, length, width)
            plain = partial(baselines.train, w, windows, how)
            yield bench.compare("training", size, ours, plain, how.steps, "steps", precision, work, against="eager f32")


def sampling(device, width, trajectories, length, steps, warmup, churn, lam):
    """(ours, plain): calls that draw guided trajectories with the shipped guide by the paper's rule."""
    made = make_denoiser(width, length, device).requires_grad_(False)
    policy = load.load_guide()[0].to(device)
    shape = trajectories, length, counts.SPEC.width
    hook = guidance.Guide("explicit", policy, made.normaliser, lam, steps, warmup)
    generator, w = torch.Generator(device).manual_seed(0), baselines.weights(made.net)
    return (
        lambda: sampler.sample(made, shape, steps, churn, generator, hook),
        lambda: baselines.sample(w, made.normaliser, policy, shape, steps, churn, warmup, lam, generator, device),
    )


def guided(bench):
    """Guided trajectories a second: network, sampler and policy together."""
    ours, plain = sampling(bench.device, **SAMPLED)
    n, length, steps = (SAMPLED[k] for k in ("trajectories", "length", "steps"))
    guides = (steps - SAMPLED["warmup"]) * counts.policy(n * length, [256, 256])
    work = sampler.evaluations("heun", steps) * counts.denoiser(n, length, SAMPLED["width"], levels=1) + guides
    for number, (precision, context) in enumerate(timing.precisions(bench.device).items()):
        size = f"width {SAMPLED['width']}, {n} x {length}, {steps} steps, {precision}"
        target = dict(target=2.5) if number == 0 else {}
        call = timing.within(context, ours)
        yield bench.compare("sampler", size, call, plain, n, "trajectories", precision, work, against="eager f32", **target)


def learning(device, seeds):
    """A call that trains `seeds` stacked agents for IQL_STEPS steps."""
    made, rows = stacked_seeds.learner(seeds, WIDTH, BATCH, device)
    return lambda: list(made.train(rows, made.step + IQL_STEPS))


def iql(bench):
    """Steps of training, counted for each seed, of stacks against a loop over one."""
    made, rows = stacked_seeds.learner(1, WIDTH, BATCH, bench.device)
    loop = baselines.PlainIQL(made.agent, 0, made.steps)
    plain = partial(loop.train, rows[0], BATCH, IQL_STEPS, torch.Generator(bench.device).manual_seed(0))
    for seeds in SEEDS:
        ours = learning(bench.device, seeds)
        for number, (precision, context) in enumerate(timing.precisions(bench.device).items()):
            size = f"{seeds} seeds, width {WIDTH}, batch {BATCH}, {precision}"
            target = dict(target=5.0) if seeds == 5 and number == 0 else {}
            yield bench.compare(
                "iql",
                size,
                timing.within(context, ours),
                plain,
                seeds * IQL_STEPS,
                "seed-steps",
                precision,
                IQL_STEPS * counts.iql(seeds, BATCH, WIDTH),
                scale=seeds,
                against="one seed, f32",
                **target,
            )


def scaling(bench):
    """How cost grows: each size against the smallest, and the exponent p of cost ~ size^p."""
    curves = {
        "trajectories": (16, 32, 64, 128, 256),
        "length": (16, 32, 64, 128),
        "width": (32, 64, 128, 256),
        "steps": (4, 8, 16, 32),
    }
    small = dict(width=64, trajectories=32, length=32, steps=3, warmup=1, churn=2.5, lam=0.3)
    for name, sizes in curves.items():
        calls = {size: sampling(bench.device, **{**small, name: size})[0] for size in sizes}
        yield from _curve(bench, f"sampler by {name}", calls)
    yield from _curve(bench, "iql by seeds", {seeds: learning(bench.device, seeds) for seeds in (1, 2, 5, 10, 20)})


def _curve(bench, path, calls):
    taken = timing.alternate(calls, bench.seconds, bench.device)
    first, *others = taken
    for size in others:
        cost = timing.ratio(taken, size, first)
        yield timing.Row(f"scaling {path}", str(size), f"cost at {first}", cost, rounds=len(taken[size]))
    yield timing.Row(f"scaling {path}", f"{first} to {size}", "exponent", timing.exponent(taken), rounds=len(taken[size]))
