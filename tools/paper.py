"""Run the notebooks with papermill, up to four at a time where there are cores for it: `make paper`.

A core for each of several notebooks is faster than all cores for one after the other: networks this small leave the
second core idle a third of the time. What two of them need is made once, the other waits for it.
"""

import argparse
import sys
import time
from collections import deque
from pathlib import Path

from pgdlib.lab import artifacts, settings
from pgdlib.lab.sweep import run

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
FIRST = ["03_ppo_guide", "02_diffusion", "05_iql_benchmark", "08_rules", "06_world_model"]  # figures soon, then the longest
LAST = "04_guidance"  # alone, with all cores: it gathers the verdicts of the others


def together(names, scale, folder):
    """Run the notebooks side by side, each with its share of the cores; the name of one that failed, or None."""
    most = max(1, min(len(names), run.CORES, 1 if scale == "paper" else 4))  # at paper's scale one plans with all the memory
    more = run.environment(max(1, run.CORES // most))
    command = [sys.executable, "-m", "papermill", "-k", "python3", *("-p", "scale", scale) * (scale != "quick")]

    def start(name):
        print(f"== {name}, scale {scale}, {more['OMP_NUM_THREADS']} threads", flush=True)
        return processes.start([*command, NOTEBOOKS / f"{name}.ipynb", folder / f"{name}.ipynb"], folder / f"{name}.log", more)

    def tell(running):
        print("\n".join(f"   {name}: {''.join(run.tail(folder / f'{name}.log', 1))}" for name in running), flush=True)

    begun = time.monotonic()
    with run.Processes(most) as processes:
        for name, future in run.side_by_side(deque(names), start, most, tell, every=30):
            if future.result()[0]:
                return name
            print(f"== {name} is done after {time.monotonic() - begun:.0f} s", flush=True)


def main(argv=None):
    known = sorted((path.stem for path in NOTEBOOKS.glob("*.ipynb")), key=lambda name: ([*FIRST, name].index(name), name))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=settings.SCALES, default="quick")
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help=f"of {', '.join(known)}; all by default")
    given, begun, folder = parser.parse_args(argv), time.monotonic(), artifacts.root() / "notebooks"
    if unknown := set(given.notebooks) - {*known}:
        parser.error(f"notebook {min(unknown)!r} is not known; it must be one of {', '.join(known)}")
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in known if name in (given.notebooks or known)]
    for names in ([name for name in chosen if name != LAST], [LAST] * (LAST in chosen)):
        if failed := together(names, given.scale, folder):
            log = folder / f"{failed}.log"
            print(*run.tail(log, 40), f"== {failed} FAILED, see {log.with_suffix('.ipynb')}", sep="\n", file=sys.stderr)
            return 1
    print(f"== all took {time.monotonic() - begun:.0f} s; figures are in {folder.parent}/figures/{given.scale}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
