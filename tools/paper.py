"""Run the notebooks with papermill, up to four at a time where there are cores for it: `make paper`.

python tools/paper.py [--scale quick] [--lanes N] [NOTEBOOK ...]

A core for each of several notebooks is faster than all cores for one after the other: networks this small leave the
second core idle a third of the time. What two of them need is made once, the other waits for it.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from pgdlib.lab import artifacts, params
from pgdlib.simulators import pen as adroit

ROOT = Path(__file__).resolve().parent.parent
ORDER = ["02_diffusion", "05_iql_benchmark", "06_world_model", "01_data", "03_ppo_guide", "07_sweep"]  # the longest first
LANES = {"ci": 4, "quick": 4, "paper": 1}  # at most; at paper's scale each notebook plans with all of the device's memory
EVERY = 30  # s between two lines of progress
LAST = ["04_guidance"]  # alone, with all cores: it gathers the verdicts of the others


def start(name, scale, threads):
    """A running papermill, which writes into runs/notebooks/; its progress goes into a log beside the notebook."""
    folder = artifacts.root() / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    scales = [] if scale == "quick" else ["-p", "scale", scale]  # the default needs no injected cell
    paths = ROOT / "notebooks" / f"{name}.ipynb", folder / f"{name}.ipynb"
    command = [sys.executable, "-m", "papermill", "-k", "python3", *scales, *map(str, paths)]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    print(f"== {name}, scale {scale}, {threads} threads", flush=True)
    return process


def run(names, scale, lanes, threads):
    """Run the notebooks `names`, at most `lanes` at once with `threads` each; the name of one that failed, or None."""
    waiting, running, told = list(names), {}, time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < lanes:
                running[waiting[0]] = start(waiting[0], scale, threads), time.monotonic()
                del waiting[0]
            for name, (process, begun) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    return name
                print(f"== {name} took {time.monotonic() - begun:.0f} s", flush=True)
            if time.monotonic() - told > EVERY:
                told = time.monotonic()
                print("\n".join(f"   {name}: {last_line(name)}" for name in running), flush=True)
            time.sleep(0.2)
    finally:
        for process, _ in running.values():  # after a failure or Ctrl-C; asked so, papermill ends its kernel
            process.send_signal(signal.SIGTERM)
        for process, _ in running.values():
            process.wait()
    return None


def last_line(name):
    """What papermill's bar shows at present."""
    lines = re.split(r"[\r\n]+", (artifacts.root() / "notebooks" / f"{name}.log").read_text().strip())
    return lines[-1]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=params.SCALES, default="quick")
    parser.add_argument("--lanes", type=int, choices=(1, 2, 3, 4), help="notebooks at once; a core for each by default")
    parser.add_argument(
        "notebooks", nargs="*", metavar="NOTEBOOK", help=f"of {', '.join(sorted(ORDER + LAST))}; all by default"
    )
    given = parser.parse_args(argv)
    if unknown := set(given.notebooks) - {*ORDER, *LAST}:
        parser.error(f"notebook {sorted(unknown)[0]!r} is not known; it must be one of {', '.join(sorted(ORDER + LAST))}")
    cores, begun = adroit.default_threads(), time.monotonic()
    lanes = given.lanes or min(LANES[given.scale], cores)
    chosen = given.notebooks or ORDER + LAST
    for names, most in (([n for n in ORDER if n in chosen], lanes), ([n for n in LAST if n in chosen], 1)):
        at_once = max(1, min(most, len(names)))
        if failed := run(names, given.scale, at_once, max(1, cores // at_once)):
            log = artifacts.root() / "notebooks" / f"{failed}.log"
            print(f"{log.read_text()[-3000:]}\n== {failed} FAILED, see {log.with_suffix('.ipynb')}", file=sys.stderr)
            return 1
    figures = artifacts.root() / "figures" / given.scale
    print(f"== all notebooks took {time.monotonic() - begun:.0f} s; figures are in {os.path.relpath(figures)}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
