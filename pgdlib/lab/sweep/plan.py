"""What a sweep consists of: its points, and what is checked before anything starts.

A point is one run of a notebook with one set of parameters. Its key names all that decides its result, so that a point which
is done is done for every sweep.
"""

import ast
import hashlib
import itertools
import json
import re
import statistics
from dataclasses import dataclass
from datetime import timedelta
from os.path import expanduser, isfile  # Path.is_file fails for a name that is too long
from pathlib import Path

import papermill
import yaml
from IPython.core.inputtransformer2 import TransformerManager
from papermill.iorw import load_notebook_node

from pgdlib.lab import artifacts
from pgdlib.lab.settings import listed

FOLDER = "points"  # in the folder of all runs
# Points that agree in these use the same data and, mostly, the same models.
SHARED = ("dataset", "source", "data_steps", "scale", "seed", "transform", "horizon")
SHARED += ("denoiser", "features", "blocks", "train_steps")


class BadSweep(ValueError):
    """A sweep that cannot be run, and why."""


@dataclass
class Point:
    """One run of a notebook, as plain values."""

    key: str
    name: str  # for people
    settings: dict
    given: dict  # of the settings, those that are not the notebook's own defaults
    notebook: str
    modules: list  # those of pgdlib that it imports
    identity: dict  # all that decides its result beside the settings

    @property
    def folder(self):
        return artifacts.root() / FOLDER / self.notebook / self.key

    @property
    def record(self):
        """What was noted of it when it was done, or None."""
        path = self.folder / "done.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


class Notebook:
    """A notebook to sweep, as its file is now. Raises `BadSweep` if it is none, or has no cell tagged `parameters`."""

    def __init__(self, path):
        try:
            self.node = load_notebook_node(str(path))
            self.defaults = {k: _literal(v["default"]) for k, v in papermill.inspect_notebook(str(path)).items()}
        except (OSError, ValueError, AttributeError) as e:
            raise BadSweep(f"{path} cannot be read as a notebook: {e}") from e
        self.name = Path(path).stem
        if not self.defaults:
            raise BadSweep(f"{path} has no parameters: one of its code cells must have the tag `parameters`")
        code = [c for c in self.node.cells if c.cell_type == "code"]
        self.parameters = next(i for i, c in enumerate(code) if "parameters" in c.metadata.get("tags", []))
        self.cells = [_python(c.source) for c in code]
        try:
            self.code = [compile(cell, f"{self.name}, cell {i}", "exec") for i, cell in enumerate(self.cells)]
        except SyntaxError as e:
            raise BadSweep(f"{path} is not all Python: {e}") from e
        self.modules = sorted(set().union(*map(artifacts.imported, self.cells)))
        self.identity = {"cells": artifacts.key(cells=[c.source for c in code])} | identity(self.modules)  # text does not count
        for cell in code:
            cell.outputs, cell.execution_count = [], None

    def keep(self):
        """Write it, without outputs, to where its points run it from: the file may change while they do."""
        with artifacts.replacing(artifacts.root() / FOLDER / self.name / f"{self.identity['cells']}.ipynb") as partial:
            partial.write_text(json.dumps(self.node), encoding="utf-8")


def identity(modules):
    """What decides a result on this machine: the code of the `modules`, what the package ships, and versions."""
    assets = [(p.name, _digest(p)) for p in sorted((artifacts.PACKAGE / "assets").iterdir())] if modules else []
    versions = {k: v for k, v in artifacts.versions().items() if k != "git"}  # a commit need not touch what runs
    return {"code": artifacts.code_version(*modules), "assets": artifacts.key(assets=assets), "versions": versions}


def parse(notebook, pairs, texts):
    """Name -> list of values, from `pairs` (name, value) that are fixed and YAML `texts`, in which lists are swept.

    Raises `BadSweep` for what is no such mapping, and for names that the notebook does not know.
    """
    given = {name: [_literal(value)] for name, value in pairs}
    for text in texts:
        try:
            swept = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise BadSweep(f"-y {text!r} is no YAML: {' '.join(str(e).split())}") from e
        if not isinstance(swept, dict):
            raise BadSweep(f"-y {text!r} is not allowed; it must be a name and its values, such as 'seed: [0, 1, 2]'")
        given |= {name: values if isinstance(values, list) else [values] for name, values in swept.items()}
    for name, values in given.items():
        if name not in notebook.defaults:
            raise BadSweep(f"unknown parameter {name}; {notebook.name} takes {listed(name, notebook.defaults)}")
        if not values:
            raise BadSweep(f"parameter {name}=[] has no value to sweep over")
    return given


def points(notebook, given):
    """The `Point`s of the full product of `given`, name -> values.

    Those that share data and models lie far apart: what the first of them makes, the others should find, not wait for.
    """
    swept = [name for name, values in given.items() if len(values) > 1]
    found, groups = {}, {}
    for values in itertools.product(*given.values()):
        chosen = dict(zip(given, values))
        settings = {**notebook.defaults, **chosen}
        files = {k: _digest(f) for k, v in settings.items() if isinstance(v, str) and isfile(f := expanduser(v))}
        key = artifacts.key(parameters=settings, files=files, **notebook.identity)
        name = " ".join(f"{k}={chosen[k]}" for k in swept) or notebook.name
        found[key] = Point(key, name, settings, chosen, notebook.name, notebook.modules, notebook.identity)
    for point in found.values():
        groups.setdefault(artifacts.key(shared=[point.settings.get(k) for k in SHARED]), []).append(point)
    return [point for turn in itertools.zip_longest(*groups.values()) for point in turn if point]


def check(notebook, points, elsewhere=False):
    """Let the notebook check each point's parameters: its first cells run here, up to the one that sets `p` to the outcome.

    With `elsewhere` the points will run on other machines, which may have CUDA where this one has none. Raises `BadSweep` with
    all that is not allowed. A notebook without a `p` checks nothing.
    """
    last = next((i for i, cell in enumerate(notebook.code) if "p" in cell.co_names), -1)
    wrong = {}
    for point in points:
        given = {k: "auto" if elsewhere and (k, v) == ("device", "cuda") else v for k, v in point.given.items()}
        namespace = {"__name__": "__main__", "In": [notebook.cells[notebook.parameters]]}  # as IPython has it
        try:
            for i, cell in enumerate(notebook.code[: last + 1]):
                exec(cell, namespace)
                namespace.update(given if i == notebook.parameters else {})
        except (ValueError, artifacts.NotSaved) as e:
            wrong[str(e)] = None
        except Exception as e:
            raise BadSweep(f"{notebook.name} fails before it checks its parameters: {type(e).__name__}: {e}") from e
    if wrong:
        raise BadSweep("\n".join(wrong))


def forecast(notebook, points):
    """Lines that tell what the points will cost: the median of the earlier ones of their scale that are most alike."""
    records = [json.loads(path.read_text()) for path in (artifacts.root() / FOLDER / notebook.name).glob("*/done.json")]
    costs = {}
    for point in points:
        alike = {}
        for r in (r for r in records if r["settings"].get("scale") == point.settings.get("scale")):
            same = sum(r["settings"].get(k, point) == v for k, v in point.settings.items())
            alike.setdefault(same, []).append(r["seconds"])
        if alike:
            costs[point.key] = round(statistics.median(alike[max(alike)]))
        yield f"  {point.name}: {timedelta(seconds=costs[point.key]) if alike else 'unknown'}"
    unknown = f", and {len(points) - len(costs)} of unknown cost: nothing like them has run yet" * (len(costs) < len(points))
    yield f"{len(points)} to run: {timedelta(seconds=sum(costs.values()))} on one worker{unknown}"


def _digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def _python(source):
    """A cell as plain Python, with None in place of what only IPython can do."""
    return re.sub(r"get_ipython\(\)\..*", "None", TransformerManager().transform_cell(source))


def _literal(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
