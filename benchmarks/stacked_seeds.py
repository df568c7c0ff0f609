"""What S stacked seeds of IQL cost against one, at quick's and at the paper's sizes: seconds a step, alternating in one run.

python -m benchmarks.stacked_seeds [--seeds 1 5 20] [--rounds 5]
"""

import argparse
import statistics
import time

import torch

from benchmarks import counts
from pgdlib.agents import iql
from pgdlib.agents import stack as agents

STEPS = 10  # in a measurement


def learner(runs, width, batch_size, device="cpu"):
    """A learner of `runs` seeds, and data of the shape of a run's synthetic data."""
    spec = counts.SPEC
    agent = iql.IQL(spec, range(runs), torch.zeros(spec.obs_dim), torch.ones(spec.obs_dim), (width, width)).to(device)
    data = [torch.randn(12_000, spec.transition_width, generator=torch.Generator().manual_seed(0)).to(device)] * runs
    return agents.Learner(agent, range(runs), 1_000_000, batch_size), data


def seconds(made):
    """Seconds of one training step."""
    one, data = made
    started = time.perf_counter()
    list(one.train(data, one.step + STEPS))
    return (time.perf_counter() - started) / STEPS


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(f"{torch.get_num_threads()} threads; medians of {given.rounds} rounds of {STEPS} steps")
    print(f"{'sizes':28} {'seeds':>5} {'ms a step':>10} {'against 1 seed':>15} {'seed-steps/s':>13}")
    for name, width, batch_size in (("quick: width 128, batch 256", 128, 256), ("paper: width 256, batch 512", 256, 512)):
        made = {runs: learner(runs, width, batch_size) for runs in given.seeds}
        for each in made.values():
            seconds(each)
        times = {runs: [] for runs in made}
        for _ in range(given.rounds):
            for runs, each in made.items():
                times[runs].append(seconds(each))
        first = given.seeds[0]
        for runs, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(values, times[first])) * first
            median = statistics.median(values)
            print(f"{name:28} {runs:5} {1e3 * median:10.1f} {ratio:15.2f} {runs / median:13.0f}")


if __name__ == "__main__":
    main()
