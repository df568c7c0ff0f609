"""What S stacked seeds of IQL cost against one, and other agents against IQL: seconds a step, alternating in one run.

python -m benchmarks.stacked_seeds [--seeds 1 5 20] [--seconds 60]
"""

import argparse
import statistics

import torch

from benchmarks import counts, timing
from pgdlib.agents import bc, bcq, cql, edac, iql, rebrac, sac, td3_bc
from pgdlib.agents import stack as agents

SIZES = {"quick": (128, 256), "paper": (256, 512)}  # width and batch
AGENTS = {
    "IQL": iql.IQL, "cloning": bc.BC, "TD3+BC": td3_bc.TD3BC, "ReBRAC": rebrac.ReBRAC, "SAC": sac.SAC, "BCQ": bcq.BCQ,
    "CQL": cql.CQL, "EDAC": edac.EDAC,
}  # fmt: skip


def learner(runs, width, batch_size, device="cpu", kind=iql.IQL):
    """A learner of `runs` seeds, and data of the shape of a run's synthetic data."""
    spec = counts.SPEC
    agent = kind(spec, range(runs), torch.zeros(spec.obs_dim), torch.ones(spec.obs_dim), (width, width)).to(device)
    data = [torch.randn(12_000, spec.transition_width, generator=torch.Generator().manual_seed(0)).to(device)] * runs
    return agents.Learner(agent, range(runs), 1_000_000, batch_size), data


def compared(title, made, work, seconds):
    """Print name -> learner `made` against the first of them, `work` being the seeds of each."""
    calls = {name: lambda each=each, rows=rows: list(each.train(rows, each.step + 1)) for name, (each, rows) in made.items()}
    taken, first = timing.alternate(calls, seconds), next(iter(made))
    for name, own in taken.items():
        ratio, _, _ = timing.ratio(taken, name, first, work[first] / work[name])
        step, rate = 1e3 * statistics.median(own), timing.rate(taken, name, work[name])
        print(f"| {title} | {name} | {step:.1f} | {rate:,.0f} | {ratio:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--agent-seeds", type=int, default=5, help="of each of the agents")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--seconds", type=float, default=60, help="of each table")
    given = parser.parse_args()
    print(f"{torch.get_num_threads()} threads; medians over rounds\n")
    print(f"| sizes | seeds, agent | ms a step | seed-steps/s | time of a seed's step over the first's |\n{'|---' * 5}|")
    for name in given.sizes:
        width, batch_size = SIZES[name]
        title = f"{name}: width {width}, batch {batch_size}"
        made = {f"IQL, {runs}": learner(runs, width, batch_size) for runs in given.seeds}
        compared(title, made, dict(zip(made, given.seeds)), given.seconds)
        made = {label: learner(given.agent_seeds, width, batch_size, kind=kind) for label, kind in AGENTS.items()}
        compared(title, made, dict.fromkeys(made, given.agent_seeds), given.seconds)


if __name__ == "__main__":
    main()
