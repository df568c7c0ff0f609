"""How long the λ explorer of notebook 04 lets one wait: a move of the slider, in a real browser; drawing; *Sample now*.

python benchmarks/explorer.py [--scale quick] [--moves 50]

It uses notebook 04's own data, denoiser and sweep in runs/, and makes them if they are missing.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from pgdlib.lab import figures, params, store, study
from pgdlib.lab.explorer import plots_explorer, shelf, widgets

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = dict(dataset="cloned", source="auto", seed=0, guide="shipped", device="auto", units="natural", transform="raw")
CELL = """
from pgdlib.lab import figures, params, study
from pgdlib.lab.explorer import explorer, widgets
figures.style.use_style()
lab = study.Study.open(params.defaults({scale!r}, **{settings!r}))
panel = explorer.Explorer(lab)
panel.widget
"""
# The ms from a key to the moment when both pictures have been loaded.
CLOCK = """() => {
  window.waits = [];
  let pressed = null, loaded = new Set();
  document.querySelector('.pgd-lam').addEventListener('keydown', () => {pressed = performance.now(); loaded.clear()}, true);
  for (const name of ['.pgd-cloud', '.pgd-curve'])
    document.querySelector(name).addEventListener('load', () => {
      if (pressed !== null && loaded.add(name).size === 2) {window.waits.push(performance.now() - pressed); pressed = null}
    })
}"""


def seconds(work, rounds):
    """Median seconds of work(i), after a first one that does not count."""
    times = []
    for i in range(rounds + 1):
        started = time.perf_counter()
        work(i)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def moves(scale, n):
    """Yield (what is moved to, the ms of `n` moves of the slider)."""
    sys.path.append(str(ROOT / "tests"))
    from browser import one_cell

    with one_cell(CELL.format(scale=scale, settings=SETTINGS), {"PGD_RUNS": store.root()}) as notebook:
        notebook.execute("widgets.live = lambda: False")  # from now on nothing is drawn ahead
        notebook.page.evaluate(CLOCK)
        handle = notebook.page.locator(".pgd-lam .noUi-handle")
        at, last = (int(float(handle.get_attribute(f"aria-value{name}"))) for name in ("now", "max"))
        keys = itertools.cycle(["ArrowRight"] * last + ["ArrowLeft"] * last)
        for _ in range(at):
            next(keys)

        def waits(n, before=""):
            for _ in range(n):
                notebook.execute(before)
                done = notebook.page.evaluate("window.waits.length")
                handle.press(next(keys))
                notebook.wait_for(f"window.waits.length > {done}")
            return notebook.page.evaluate(f"window.waits.slice(-{n})")

        yield "pictures not yet drawn", waits(n, "panel._album = widgets.Album(panel._draw)")
        waits(2 * last)
        yield "pictures already drawn", waits(n)
        assert not (errors := notebook.errors()), errors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=["ci", "quick"], default="quick")
    parser.add_argument("--moves", type=int, default=50)
    given = parser.parse_args()
    figures.style.use_style()
    lab = study.Study.open(params.defaults(given.scale, **SETTINGS))
    lab.sweep("explicit", lab.grid("explicit"))
    print(f"scale {given.scale}, {lab.dataset.label}, {lab.p.samples} trajectories a λ; {torch.get_num_threads()} threads")

    print(f"\n{f'{given.moves} moves of the slider, in the browser':45} {'median ms':>10} {'90% within':>11}")
    for name, waits in moves(given.scale, given.moves):
        print(f"{name:45} {np.median(waits):10.0f} {np.quantile(waits, 0.9):11.0f}")

    shown = shelf.Shelf(lab)
    shown.choose(lab.p.dataset, "explicit")
    views = [shown.view(stop, "normalised") for stop in shown.stops]
    parts = {
        "cloud": lambda view: widgets.png(plots_explorer.cloud(view)),
        "curve": lambda view: widgets.png(plots_explorer.curve(view, frame=shown.frame)),
        "numbers": lambda view: plots_explorer.numbers(view).to_html(),
    }
    print(f"\n{'drawing a stop anew':45} {'median ms':>10}")
    for name, draw in parts.items():
        print(f"{name:45} {1e3 * seconds(lambda i, draw=draw: draw(views[i % len(views)]), 30):10.0f}")
    together = seconds(lambda i: [draw(views[i % len(views)]) for draw in parts.values()], 30)
    print(f"{'all three':45} {1e3 * together:10.0f}")

    def sample(i):
        lab.judge(*lab.draw("explicit", 0.1, shelf.FRESH, lab.p.seed + 1_000_000 + i))

    print(f"\n{f'sample now: {shelf.FRESH} trajectories, drawn and judged':45} {seconds(sample, 5):8.2f} s (median of 5)")


if __name__ == "__main__":
    main()
