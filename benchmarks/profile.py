"""Where the time of the networks' paths goes, by kind of operation, and at which rate the products run; and that of judging.

python -m benchmarks.profile [--threads 1] [--calls 20]

A kind's share is of the time in torch's operations; bookkeeping is what moves no data. The rate is that of all
matrix products and convolutions, of the work that `counts` knows, over that of a square product of 2,048 in the same type.
Judging is `dynamics.dynamics_error` of trajectories that random actions made; what is not MuJoCo's own step is ours to mend.
"""

import argparse
import cProfile
import pstats
import time

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import counts, networks, stacked_seeds, timing
from pgdlib import dynamics, fast
from pgdlib.simulators import locomotion, pen
from pgdlib.simulators.episodes import rollout

KINDS = {  # by the beginning of an operation's name
    "products": "mm bmm addmm baddbmm linear mkldnn_ convolution _convolution",
    "sums": "sum mean amax amin max min norm linalg",
    "copies": "copy_ cat stack index repeat pad constant_pad clone fill_ zero_ gather",
    "optimiser": "_fused_adam _foreach",
    "bookkeeping": "Optimizer autograd view as_strided unsqueeze squeeze transpose expand slice select reshape permute detach "
    "resize_ empty unflatten flatten split chunk narrow unbind _to",
    "random": "randn rand randint normal_ uniform_ random_",
}
WIDTHS = (64, 128, 256)
SHAPE = 64, 64  # trajectories, steps


def kind_of(name):
    """The kind of an operation, "elementwise" where it is no other."""
    own = name.removeprefix("aten::")
    return next((kind for kind, starts in KINDS.items() if own.startswith(tuple(starts.split()))), "elementwise")


def profiled(call, calls):
    """(seconds of each kind, wall seconds) of one call."""
    for _ in range(3):
        call()
    started = time.perf_counter()
    for _ in range(calls):
        call()
    wall = (time.perf_counter() - started) / calls
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(calls):
            call()
    seconds = dict.fromkeys((*KINDS, "elementwise"), 0.0)
    for event in found.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6 / calls
    return seconds, wall


def paths():
    """name -> (a call, the floating-point operations of its products)."""
    n, length = SHAPE
    for width in WIDTHS:
        made = networks.make_denoiser(width, length, "cpu").requires_grad_(False)
        x = torch.randn(n, length, counts.SPEC.width)
        yield f"denoiser, width {width}", lambda made=made, x=x: made(x, 1.0), counts.denoiser(n, length, width, levels=1)
    for seeds in (1, 5):
        one, rows = stacked_seeds.learner(seeds, 128, 256)
        step = lambda one=one, rows=rows: list(one.train(rows, one.step + 1))  # noqa: E731
        yield f"IQL, {seeds} seeds, width 128", step, counts.iql(seeds, 256, 128)


def judged(simulator, threads, n=512, steps=8):
    """Of short trajectories, so that nothing falls: (microseconds for each judged step, share in MuJoCo's own)."""
    rng = np.random.default_rng(0)
    made = rollout(simulator, lambda obs: rng.uniform(-1, 1, (n, simulator.action_dim)), n, rng, steps, threads=threads)
    given = made.obs[:, :-1], made.actions, np.ones(simulator.obs_dim)
    with cProfile.Profile() as profiler:
        dynamics.dynamics_error(simulator, *given, threads=threads)
    of = pstats.Stats(profiler).stats
    total = sum(own for _, _, own, _, _ in of.values())
    stepping = sum(own for (*_, name), (_, _, own, _, _) in of.items() if "_batch.step" in name)
    return 1e6 * total / (n * (steps - 1)), stepping / total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calls", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    kind = torch.bfloat16 if fast.has_bfloat16("cpu") else torch.float32
    a, b = (torch.randn(2048, 2048).to(kind) for _ in range(2))
    names = [*KINDS, "elementwise"]
    print(f"{given.threads} threads, {kind}; {SHAPE[0]} x {SHAPE[1]} steps; shares of the time in operations\n")
    print(f"| path | ms | {' | '.join(names)} | products' rate |\n|{'---|' * (len(names) + 3)}")
    for name, call, work in paths():
        seconds, wall = profiled(call, given.calls)
        best = counts.matmul(2048, 2048, 2048) / min(timing.alternate({"best": lambda: a @ b}, 0.5)["best"])
        total = sum(seconds.values())
        shares = [f"{seconds[k] / total:.0%}" for k in names]
        rate = f"{work / seconds['products'] / best:.0%}"
        print(f"| {name} | {1e3 * wall:.1f} | {' | '.join(shares)} | {rate} |", flush=True)
    print("\n| judging | microseconds a step | in MuJoCo's own step |\n|---|---|---|")
    for simulator in (pen.PEN, *map(locomotion.runner, locomotion.RUNNERS)):
        judged(simulator, given.threads)  # the first is slower
        each, share = judged(simulator, given.threads)
        print(f"| {simulator.name} | {each:.0f} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    main()
