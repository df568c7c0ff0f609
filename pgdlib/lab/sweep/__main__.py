"""A whole study with one command: a notebook, run for every combination of lists of parameters, side by side.

python -m pgdlib.lab.sweep notebooks/04_guidance.ipynb -y 'dataset: [human, cloned]' -y 'seed: [0, 1, 2]' -p scale ci

What several points need is made once: by the first of them, while the others wait for it. The same command again does only
what is missing; a point that fails does not stop the others. The outcome is one Parquet file; each point's notebook, figures
and tables lie in a folder of its own.
"""

import argparse
import signal
import sys
from functools import partial
from pathlib import Path

from pgdlib.lab import artifacts
from pgdlib.lab.sweep import plan, results, run


def main(argv=None):
    """Run the sweep that the command line asks for; the exit status is 0, 1 if a point failed, 2 if refused, 130 by Ctrl-C."""
    given, say = _arguments(argv), partial(print, flush=True)
    try:
        notebook = plan.Notebook(given.notebook)
        points = plan.points(notebook, plan.parse(notebook, given.parameters, given.yaml))
        missing = [point for point in points if point.record is None]
        plan.check(notebook, missing, given.backend == "ray")
        say(f"{notebook.name}: {len(points)} points, {len(points) - len(missing)} of them are done")
        if given.dry_run:
            say(*plan.forecast(notebook, missing), sep="\n")
            return 0
        failed = {}
        if missing:
            notebook.keep()
            ray = given.workers, given.address, given.cpus, given.gpus
            backend = run.here(given.workers, len(missing)) if given.backend == "local" else run.on_ray(*ray)
            failed = run.sweep(missing, backend, given.retries, say)
        frame = results.gather(points)
        own = f"{notebook.name}-{artifacts.key(points=sorted(point.key for point in points))}.parquet"
        path = Path(given.out or artifacts.root() / plan.FOLDER / own)
        results.write(frame, path)
    except plan.BadSweep as reason:
        print(reason, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        return 128 + signal.SIGINT
    except OSError as reason:  # of the file system: disk full, no permission
        say(f"stopped: {reason}; what is done is kept, and the same command goes on from here")
        return 1
    say(f"{len(points) - len(failed)} of {len(points)} points, {len(frame):,} rows, in {path}")
    for point, why in failed.values():
        say(f"\nFAILED {point.name}: {point.folder / 'notebook.ipynb'}\n{why}")
    return 1 if failed else 0


def _arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("notebook", help="the notebook to run")
    add("-y", dest="yaml", action="append", default=[], metavar="YAML", help="'name: [values]' to sweep, 'name: value' to fix")
    add("-p", dest="parameters", action="append", default=[], nargs=2, metavar=("NAME", "VALUE"), help="fix a parameter")
    add("--backend", choices=("local", "ray"), default="local", help="processes on this machine, or a Ray cluster")
    add("--workers", type=int, metavar="N", help="points at once; by default as many as cores, or as Ray has room for")
    add("--address", help="of a Ray cluster; without it, one on this machine alone")
    add("--cpus", type=float, default=1.0, help="Ray: cores for each point (1)")
    add("--gpus", type=float, default=0.0, help="Ray: GPUs for each point, such as 0.25 (0)")
    add("--retries", type=int, default=2, help="how often a point is run again whose process or machine was lost (2)")
    add("--out", metavar="FILE", help="the Parquet file; by default in runs/points/")
    add("--dry-run", action="store_true", help="show what would run and what it costs, by the times of earlier points")
    given = parser.parse_args(argv)
    if given.backend == "local" and (given.address or given.gpus or given.cpus != 1.0):
        parser.error("--address, --cpus and --gpus are of --backend ray")
    if given.workers is not None and given.workers < 1:
        parser.error(f"--workers {given.workers} is not allowed; it must be a whole number of at least 1")
    if not (given.cpus > 0 and given.gpus >= 0 and given.retries >= 0):
        parser.error("--cpus must be above 0, --gpus and --retries at least 0")
    return given


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as batch systems stop a job
    sys.exit(main())
