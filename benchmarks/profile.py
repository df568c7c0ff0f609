"""Where the time of the networks' paths goes, by kind of operation, and at which rate the products run.

python -m benchmarks.profile [--threads 1] [--calls 20]

A kind's share is of the time in torch's operations; bookkeeping is what moves no data. The rate is that of all
matrix products and convolutions, of the work that `counts` knows, over that of a square product of 2,048 in the same type.
"""

import argparse
import time

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import counts, networks, stacked_seeds, timing
from pgdlib import fast

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


if __name__ == "__main__":
    main()
