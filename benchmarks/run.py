"""The benchmarks: what pgdlib's paths cost against plain baselines and against the machine's limits, in one run.

python -m benchmarks.run [--only NAME ...] [--seconds 2] [--threads N] [--device cpu|cuda] [--stages] [--list]

Only ratios are reported: both sides run in turn, a ratio is taken in every round, and the table has its median and quartiles
over the rounds. It is how many times the rate of what it is `against` ours is. Nothing fails by a target that is not met.
"""

import argparse
import csv
import math
import os
import sys
import time

import torch

from benchmarks import networks, simulations
from benchmarks.limits import Limits
from pgdlib import fast, simulators
from pgdlib.lab import artifacts

PATHS = dict(
    denoiser=networks.denoiser,
    training=networks.training,
    sampler=networks.guided,
    iql=networks.iql,
    simulation=simulations.simulation,
    dynamics=simulations.dynamics_error,
    ppo=simulations.ppo_steps,
    data=simulations.datasets,
    scaling=networks.scaling,
    stages=simulations.stages,
)
COLUMNS = ("path", "size", "against", "ratio", "quartiles", "ours", "other", "unit", "share of limit", "target")
PARTS, BLANK = ("median", "lower_quartile", "upper_quartile"), ("", "", "")


def main(argv=None):
    given = options(argv)
    if given.list:
        print("\n".join(f"{name:12}{path.__doc__.splitlines()[0]}" for name, path in PATHS.items()))
        return
    torch.set_num_threads(given.threads)
    precision = "bfloat16" if fast.has_bfloat16(torch.device(given.device)) else "float32"
    print(
        f"{given.device}, {given.threads} threads of {simulators.default_threads()} cores, load {os.getloadavg()[0]:.1f}; "
        f"torch {torch.__version__}; pgdlib's precision here: {precision}; {given.seconds:g} s for each measurement\n"
    )
    rows = []
    for row in measured(given):
        print(f"  {row.path}: {row.size}: {row.ratio[0]:.3g}", flush=True)
        rows.append(row)
    print(f"\n{table(rows)}\n\nwritten to {written(rows, given)}")


def measured(given):
    """All rows, as they are measured; the limits come first."""
    limits = Limits(given.device, min(given.seconds, 1.0))
    yield from limits.rows
    bench = networks.Bench(given.device, given.threads, given.seconds, limits)
    for name in given.only:
        yield from PATHS[name](bench)


def options(argv):
    """The checked options; a bad value ends the program with a line that says what is allowed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    cores = simulators.default_threads()
    default = [name for name in PATHS if name != "stages"]
    parser.add_argument("--only", nargs="+", choices=PATHS, metavar="NAME", help=f"of {', '.join(PATHS)}")
    parser.add_argument("--seconds", type=_number(float, 0.01, 600), default=2.0, help="for each measurement (2)")
    parser.add_argument("--threads", type=_number(int, 1, cores), default=cores, help=f"1 to {cores}, all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--stages", action="store_true", help="also the stages of a small run, end to end")
    parser.add_argument("--list", action="store_true", help="list the paths and stop")
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: 'cuda' is not allowed here: PyTorch finds no CUDA device; use 'cpu'")
    given.only = list(dict.fromkeys((given.only or default) + ["stages"] * given.stages))
    return given


def _number(kind, low, high):
    def parsed(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be {what} from {low:g} to {high:g}")
        return value

    return parsed


def table(rows):
    """The rows as text, in columns."""
    cells = [COLUMNS, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in cells)


def _cells(row):
    middle, low, high = row.ratio
    rates = ["" if value is None else f"{value:,.{0 if value >= 100 else 1}f}" for value in (row.ours, row.other)]
    share = "" if row.share is None else f"{row.share[0]:.0%} of {row.limit}"
    return row.path, row.size, row.against, f"{middle:.3g}", f"{low:.3g} to {high:.3g}", *rates, row.unit, share, row.verdict


def written(rows, given):
    """The CSV file, in runs/bench/, with `rows` and the conditions of the run in every line."""
    path = artifacts.root() / "bench" / f"{time.strftime('%Y%m%d-%H%M%S')}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    conditions = dict(device=given.device, threads=given.threads, cores=simulators.default_threads(), seconds=given.seconds)
    with path.open("w", newline="") as file:
        lines = [{**_values(row), **conditions, **artifacts.versions()} for row in rows]
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    return path


def _values(row):
    triples = {
        f"{name}_{part}": value for name in ("ratio", "share") for part, value in zip(PARTS, getattr(row, name) or BLANK)
    }
    plain = {k: v for k, v in vars(row).items() if k not in ("ratio", "share")}
    return {**plain, **triples, "verdict": row.verdict}


if __name__ == "__main__":
    sys.exit(main())
