"""What a sweep adds to papermill's own time for a point, and how it scales with workers.

python -m benchmarks.sweep [--points 12] [--seconds 0] [--workers 1 2 4] [--backend ray]

A point is a notebook of two cells that computes for `--seconds`. Beside it, as many runs of papermill alone, one after another.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pgdlib.lab import artifacts

METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
CELLS = ["seed = 0\nseconds = 0.0", "import time\nend = time.process_time() + seconds\nwhile time.process_time() < end: pass"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--workers", type=int, nargs="+", default=[1])
    parser.add_argument("--backend", default="local")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        notebook, first = write(Path(folder) / "point.ipynb"), None
        alone = [papermill(notebook, given.seconds, seed) for seed in range(given.points)]
        wall, cpu = (statistics.median(values) for values in zip(*alone))
        print(f"papermill alone, median of {given.points} runs: {wall:.2f} s, {cpu:.2f} s of CPU time", flush=True)
        for workers in given.workers:
            taken, between, each = sweep(notebook, Path(folder) / f"runs-{workers}", given, workers)
            first = first or taken
            print(f"{workers} workers, {given.points} points: {taken:.1f} s, {first / taken:.2f} times as fast as the first")
            print(f"  each {each:.2f} s of CPU time, {each - cpu:+.2f} s beside papermill's", flush=True)
            if workers == 1:
                print(f"  one every {between:.2f} s (median), {between - wall:+.2f} s beside papermill's", flush=True)


def write(path):
    """The notebook of a point."""
    cells = [{"cell_type": "code", "id": f"c{i}", "metadata": {}, "outputs": [], "execution_count": None} for i in range(2)]
    for cell, source in zip(cells, CELLS):
        cell["source"] = source
    cells[0]["metadata"] = {"tags": ["parameters"]}
    path.write_text(json.dumps({"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}))
    return path


def papermill(notebook, seconds, seed):
    """(seconds, CPU seconds) of one run."""
    call = [sys.executable, "-m", "papermill", "-k", "python3", "--no-progress-bar", str(notebook), f"{notebook}.out"]
    return run([*call, "-p", "seconds", str(seconds), "-p", "seed", str(seed)], {})


def sweep(notebook, runs, given, workers):
    """Seconds of a sweep; of those between the ends of two points, the median; and CPU seconds of a point, in the mean."""
    call = [
        sys.executable,
        "-m",
        "pgdlib.lab.sweep",
        str(notebook),
        "-p",
        "seconds",
        str(given.seconds),
        "--workers",
        str(workers),
    ]
    call += ["-y", f"seed: {list(range(given.points))}", "--backend", given.backend]
    wall, cpu = run(call, {"PGD_RUNS": str(runs)})
    ends = sorted(path.stat().st_mtime for path in runs.glob("points/point/*/done.json"))
    _, idle = run(call, {"PGD_RUNS": str(runs)})  # nothing is left to do: its start and its end
    return wall, statistics.median(b - a for a, b in zip(ends, ends[1:])), (cpu - idle) / given.points


def run(call, environment):
    own = {"PYTHONPATH": str(artifacts.PACKAGE.parent), "JUPYTER_PREFER_ENV_PATH": "1", **environment}
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(call, env={**os.environ, **own}, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - begun, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
