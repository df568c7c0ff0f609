"""A whole study with one command: a notebook, run for every combination of lists of parameters, side by side.

python -m pgdlib.lab.sweep.sweep notebooks/04_guidance.ipynb -y 'dataset: [human, cloned]' -y 'seed: [0, 1, 2]' -p scale ci

What several points need is made once, before them. The same command again does only what is missing; a point that fails does
not stop the others. The outcome is one Parquet file; each point's notebook, figures and tables lie in a folder of its own.
"""

import argparse
import signal
import sys
from functools import partial
from pathlib import Path

from rich.console import Console

from pgdlib.lab import artifacts
from pgdlib.lab.sweep import sweep_plan, sweep_pools, sweep_results, sweep_run, sweep_shared

STOPPED = 128 + signal.SIGINT


def main(argv=None):
    """Run the sweep that the command line asks for; the exit status is 0, 1 if a point failed, 2 if refused, 130 by Ctrl-C."""
    given, console = _arguments(argv), Console()
    say = partial(console.print, soft_wrap=True, markup=False, highlight=False)
    try:
        notebook = sweep_plan.Notebook(given.notebook)
        points = sweep_plan.points(notebook, sweep_plan.parse(notebook, given.parameters, given.yaml))
        missing = [task for task in points if task.record is None]
        tasks = sweep_shared.stages(notebook, missing, sweep_plan.check(notebook, missing, given.backend == "ray"))
        say(f"{notebook.name}: {len(points)} points, {len(points) - len(missing)} of them are done")
        history = sweep_run.History(tasks)
        if given.dry_run:
            for line in history.plan(tasks):
                say(line)
            return 0
        failed = {}
        if tasks:
            notebook.keep()
            failed = sweep_run.Run(tasks, history, console, say).go(lambda: _pool(given, len(points)), given.retries)
        frame = sweep_results.gather(points)
        own = f"{notebook.name}-{artifacts.key(points=sorted(_keys(points)))}.parquet"
        path = Path(given.out or artifacts.root() / sweep_plan.FOLDER / own)
        sweep_results.write(frame, path)
    except (sweep_plan.BadSweep, sweep_pools.Unfit) as reason:
        print(reason, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        return STOPPED
    except OSError as reason:  # of the file system: disk full, no permission
        say(f"stopped: {reason}; what is done is kept, and the same command goes on from here")
        return 1
    lost = len({*_keys(points)} & failed.keys())
    say(f"{len(points) - lost} of {len(points)} points, {len(frame):,} rows, in {path}")
    for task, why in failed.values():
        say(f"\nFAILED {task.name}: {task.folder / ('notebook.ipynb' if task.kind == 'point' else 'log.txt')}\n{why}")
    return 1 if failed else 0


def _keys(tasks):
    return [task.key for task in tasks]


def _pool(given, points):
    if given.backend == "local":
        return sweep_pools.Local(given.workers, points)
    return sweep_pools.Ray(given.workers, given.address, given.cpus, given.gpus)


def _arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("notebook", help="the notebook to run")
    add("-y", dest="yaml", action="append", default=[], metavar="YAML", help="'name: [values]' to sweep, 'name: value' to fix")
    add("-p", dest="parameters", action="append", default=[], nargs=2, metavar=("NAME", "VALUE"), help="fix a parameter")
    add("--backend", choices=("local", "ray"), default="local", help="processes on this machine, or a Ray cluster")
    add("--workers", type=_whole, metavar="N", help="points at once; by default as many as cores, or as Ray has room for")
    add("--address", help="of a Ray cluster; without it, one on this machine alone")
    add("--cpus", type=float, default=1.0, help="Ray: cores for each point (1)")
    add("--gpus", type=float, default=0.0, help="Ray: GPUs for each point, such as 0.25 (0)")
    add("--retries", type=int, default=2, help="how often a point is run again whose process or machine was lost (2)")
    add("--out", metavar="FILE", help="the Parquet file; by default in runs/points/")
    add("--dry-run", action="store_true", help="show what would run and what it costs, by the times of earlier points")
    given = parser.parse_args(argv)
    if given.backend == "local" and (given.address or given.gpus or given.cpus != 1.0):
        parser.error("--address, --cpus and --gpus are of --backend ray")
    if not (given.cpus > 0 and given.gpus >= 0 and given.retries >= 0):
        parser.error("--cpus must be above 0, --gpus and --retries at least 0")
    return given


def _whole(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as batch systems stop a job
    sys.exit(main())
