"""What a sweep consists of: its points, and what is checked before anything starts.

A point is one run of a notebook with one set of parameters. Its key names all that decides its result, so that a point which
is done is done for every sweep.
"""

import ast
import hashlib
import itertools
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from os.path import isfile  # Path.is_file fails for a name that is too long
from pathlib import Path

import papermill
import yaml
from papermill.iorw import load_notebook_node

from pgdlib.lab import artifacts

FOLDER = "points"  # in the folder of all runs


class BadSweep(ValueError):
    """A sweep that cannot be run, and why."""


@dataclass
class Task:
    """One thing to run: a point, or what several points need. `needs` are the keys of what comes before it."""

    key: str
    kind: str  # "point", or one of `sweep_shared.SHARED`
    name: str  # for people
    settings: dict
    given: dict  # of the settings, those that are not the notebook's own defaults
    source: str  # the notebook's name, or "shared"
    rooms: list  # the modules of pgdlib that it runs
    identity: dict  # all that decides its result beside the settings
    needs: list = field(default_factory=list)

    @property
    def folder(self):
        return artifacts.root() / FOLDER / self.source / self.key

    @property
    def record(self):
        """What `sweep_task` has written of it when it was done, or None."""
        path = self.folder / "done.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def prepare(self):
        """Write its folder's task.json, from which a process of its own runs it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "log.txt").unlink(missing_ok=True)
        with artifacts.replacing(self.folder / "task.json") as partial:
            partial.write_text(json.dumps(vars(self), indent=1), encoding="utf-8")


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
        self.sources, self.cells = [c.source for c in code], [_python(c.source) for c in code]
        self.parameters = next(i for i, c in enumerate(code) if "parameters" in c.metadata.get("tags", []))
        for cell in self.node.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None

    def keep(self):
        """Write it, without outputs, to where its points run it from: the file may change while they do."""
        folder = artifacts.root() / FOLDER / self.name
        folder.mkdir(parents=True, exist_ok=True)
        with artifacts.replacing(folder / f"{self.identity['cells']}.ipynb") as partial:
            partial.write_text(json.dumps(self.node), encoding="utf-8")

    @cached_property
    def rooms(self):
        """The modules of pgdlib that the notebook runs, those that they import among them."""
        return rooms(self.cells)

    @cached_property
    def identity(self):
        """All that decides a result beside the parameters. Text cells do not."""
        return {"cells": artifacts.key(cells=self.sources), **identity(self.rooms)}

    @cached_property
    def check(self):
        """(the cells up to the one with `settings.check`, the name that it gives its result), or ([], None)."""
        for i, cell in enumerate(self.cells):
            for node in ast.walk(ast.parse(cell)):
                if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("settings.check("):
                    return self.cells[: i + 1], node.targets[0].id
        return [], None


def rooms(sources):
    """The modules of pgdlib that Python `sources` import, directly or not."""
    return artifacts.closure(*sorted(set().union(*map(artifacts.imported, sources))))


def identity(rooms):
    """What decides a result on this machine: the code of the `rooms`, what the package ships, and versions."""
    assets = [(p.name, _digest(p)) for p in sorted((artifacts.PACKAGE / "assets").iterdir())] if rooms else []
    versions = {k: v for k, v in artifacts.versions().items() if k != "git"}  # a commit need not touch what runs
    return {"code": artifacts.code_version(*rooms), "assets": artifacts.key(assets=assets), "versions": versions}


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
            raise BadSweep(f"unknown parameter {name}; {notebook.name} takes {', '.join(notebook.defaults)}")
        if not values:
            raise BadSweep(f"parameter {name}=[] has no value to sweep over")
    return given


def points(notebook, given):
    """The `Task` of each point of the full product of `given`, name -> values."""
    swept = [name for name, values in given.items() if len(values) > 1]
    found = {}
    for values in itertools.product(*given.values()):
        chosen = dict(zip(given, values))
        settings = {**notebook.defaults, **chosen}
        files = {k: _digest(v) for k, v in settings.items() if isinstance(v, str) and isfile(v)}
        key = artifacts.key(parameters=settings, files=files, **notebook.identity)
        name = " ".join(f"{k}={chosen[k]}" for k in swept) or notebook.name
        found[key] = Task(key, "point", name, settings, chosen, notebook.name, notebook.rooms, notebook.identity)
    return list(found.values())


def check(notebook, tasks, elsewhere=False):
    """Key -> settings with the scale's own values, as the notebook itself checks them; nothing if it does not.

    Its first cells are run here, up to the one that calls `settings.check`. With `elsewhere` the points will run on other
    machines, which may have CUDA where this one has none. Raises `BadSweep` with all that is not allowed.
    """
    cells, result = notebook.check
    code = [compile(cell, f"{notebook.name}, cell {i}", "exec") for i, cell in enumerate(cells)]
    found, wrong = {}, {}
    for task in tasks if result else []:
        given = {k: "auto" if elsewhere and (k, v) == ("device", "cuda") else v for k, v in task.given.items()}
        namespace = {"__name__": "__main__", "In": [notebook.cells[notebook.parameters]]}
        try:
            for i, cell in enumerate(code):
                exec(cell, namespace)
                if i == notebook.parameters:
                    namespace.update(given)
            found[task.key] = {**vars(namespace[result]), "device": task.settings.get("device", "auto")}
        except ValueError as e:
            wrong[str(e)] = None
        except Exception as e:
            raise BadSweep(f"{notebook.name} fails before it checks its parameters: {type(e).__name__}: {e}") from e
    if wrong:
        lists = [k for k, v in notebook.defaults.items() if isinstance(v, list)]
        lists = [k for k in lists if any(f"parameter {k}=" in text for text in wrong)]
        hint = [f"(lists are swept: to give {k} a list, write '{k}: [[...]]')" for k in lists]
        raise BadSweep("\n".join([*wrong, *hint]))
    return found


def _digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def _python(source):
    """A cell without its lines for IPython; nothing where what is left is no Python."""
    source = re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE)
    try:
        ast.parse(source)
    except SyntaxError:
        return ""
    return source


def _literal(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
