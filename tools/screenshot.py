"""Picture of the λ explorer, in JupyterLab, for the README: python tools/screenshot.py, after `make paper`.

It shows the sweep of notebook 04 that is in runs/, and needs a Chromium. -> figures/explorer.png
"""

import sys
from pathlib import Path

from pgdlib.lab import store

ROOT = Path(__file__).resolve().parent.parent
CELL = """
from pgdlib.lab import figures, params, store, study
from pgdlib.lab.explorer import explorer
figures.style.use_style()
settings = dict(dataset="cloned", source="local", seed=0, guide="shipped", device="auto", units="natural", transform="raw")
lab = study.Study.open(params.defaults("quick", **settings))
found = (store.root() / "sweeps").glob("*-cloned-quick-explicit-natural/*.safetensors")
panel = explorer.Explorer(lab, {"explicit": [float(path.stem.partition("-")[2]) for path in found]})
panel.widget
"""


def main():
    sys.path.append(str(ROOT / "tests"))
    from browser import one_cell

    with one_cell(CELL, {"PGD_RUNS": store.root()}, (1440, 1000)) as notebook:
        notebook.wait_for("document.querySelector('.pgd-curve')?.naturalWidth > 0")
        notebook.page.locator(".pgd-explorer").screenshot(path=ROOT / "figures/explorer.png")
    print("figures/explorer.png")


if __name__ == "__main__":
    main()
