"""pyproject.toml, environment.yml, constraints.txt and the imports agree with one another."""

import ast
import importlib.metadata
import json
import re
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from test_notebooks import papermill

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = [Requirement(r) for r in PROJECT["dependencies"]]
EXTRAS = {extra: [Requirement(r) for r in rs] for extra, rs in PROJECT["optional-dependencies"].items()}
PEERS = [Requirement(r.partition("#")[0]) for r in (ROOT / "benchmarks/peers.txt").read_text().splitlines() if r[0] != "#"]
CAUGHT = {("minari_files.py", "huggingface_hub")}  # whose absence a caller handles
CONDA = {"torch", "jupyterlab", "papermill", "minari", "gymnasium-robotics", "mujoco", "matplotlib", "seaborn", "ipywidgets"}


def names(requirements):
    return {canonicalize_name(r.name) for r in requirements}


def constraints():
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_environment_yml_agrees_with_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "pgd"
    (pip,) = (d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert "-e ." in pip
    requirements = [Requirement(line) for line in pip if line != "-e ."]
    assert names(requirements) == CONDA
    declared = {canonicalize_name(r.name): r for r in DEPENDENCIES}
    for requirement in requirements:
        wanted = declared[canonicalize_name(requirement.name)]
        assert (requirement.specifier, requirement.extras) == (wanted.specifier, wanted.extras), requirement.name
    (python,) = (d for d in environment["dependencies"] if isinstance(d, str) and d.startswith("python="))
    assert f"{python.removeprefix('python=')}.0" in SpecifierSet(PROJECT["requires-python"])


def test_constraints_are_exact_pins_and_nothing_else():
    for line in constraints():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line), line  # no address, no option, no local version
    pinned = names(Requirement(line) for line in constraints())
    assert len(pinned) == len(constraints())
    assert not [name for name in pinned if name.startswith(("nvidia", "triton", "cuda"))]


def test_constraints_pin_every_declared_package_within_its_range():
    pins = {canonicalize_name(r.name): next(iter(r.specifier)).version for r in map(Requirement, constraints())}
    for requirement in [*DEPENDENCIES, *(r for extra in EXTRAS.values() for r in extra)]:
        assert pins.get(canonicalize_name(requirement.name), "nothing") in requirement.specifier, requirement


def test_constraints_pin_what_the_declared_packages_need():
    """Follows the installed packages' own metadata, which no constraint file can influence."""
    pinned, seen = names(map(Requirement, constraints())), set()
    queue = [(r.name, r.extras) for r in [*DEPENDENCIES, *EXTRAS["dev"]]]
    while queue:
        name, extras = queue.pop()
        if (name, frozenset(extras)) in seen or canonicalize_name(name).startswith(("nvidia", "triton", "cuda")):
            continue
        seen.add((name, frozenset(extras)))
        assert canonicalize_name(name) in pinned, name
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # not installed here, so there is nothing to follow
            continue
        for requirement in map(Requirement, requires):
            environments = [{"extra": extra} for extra in ["", *extras]]
            if requirement.marker is None or any(requirement.marker.evaluate(e) for e in environments):
                queue.append((requirement.name, requirement.extras))


def python_sources(folder):
    """(file name, source) of the .py files under `folder` and of the code cells of its notebooks."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield path.name, path.read_text()
    for path in sorted((ROOT / folder).glob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code":
                yield path.name, re.sub(r"^\s*[%!].*$", "", "".join(cell["source"]), flags=re.MULTILINE)


def imported(node, optional=False):
    """(module, whether its absence is handled by `except ImportError`) of every import under `node`."""
    if isinstance(node, ast.Import):
        yield from ((alias.name.split(".")[0], optional) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
        yield node.module.split(".")[0], optional
    elif isinstance(node, ast.Try):
        handled = any(isinstance(h.type, ast.Name) and h.type.id == "ImportError" for h in node.handlers)
        for child in node.body:
            yield from imported(child, optional or handled)
        for child in [*node.handlers, *node.orelse, *node.finalbody]:
            yield from imported(child, optional)
    else:
        for child in ast.iter_child_nodes(node):
            yield from imported(child, optional)


@pytest.mark.parametrize("folder", ["pgdlib", "notebooks", "tools", "benchmarks", "tests"])
def test_every_import_is_declared(folder):
    declared = names([*DEPENDENCIES, *(EXTRAS["dev"] if folder not in ("pgdlib", "notebooks") else [])])
    anywhere = names([*DEPENDENCIES, *(r for extra in EXTRAS.values() for r in extra)])
    providers = importlib.metadata.packages_distributions()  # module -> the distributions that install it
    ours = {"pgdlib", "tools", "tests", "benchmarks", *(p.stem for p in (ROOT / "tests").glob("*.py"))}
    of_file = {"peers.py": declared | names(PEERS)}  # it runs in an environment of its own
    undeclared = {
        (file, module)
        for file, source in python_sources(folder)
        for module, optional in imported(ast.parse(source))
        if module not in sys.stdlib_module_names | ours
        and not (anywhere if optional else of_file.get(file, declared))
        & {canonicalize_name(d) for d in providers.get(module, [module])}
    }
    assert undeclared <= CAUGHT


@pytest.mark.notebook
def test_a_wheel_holds_all_rooms_and_the_guides(wheel):
    wheel, source = wheel
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("pgdlib/")}
    assert held == {str(p.relative_to(source)) for p in (source / "pgdlib").rglob("*") if p.is_file()}
    assert {"pgdlib/lab/__init__.py", "pgdlib/assets/ppo_pen.safetensors", "pgdlib/agents/iql.py"} <= held


@pytest.mark.notebook
def test_notebook_07_beside_a_wheel_says_what_it_lacks(beside_wheel, tmp_path):
    """The others run there with hopper's data, in test_notebooks."""
    mine, site = beside_wheel
    lacks = papermill(mine, "07_sweep.ipynb", tmp_path / "07.ipynb", tmp_path / "runs", ["-p", "scale", "ci"], PYTHONPATH=site)
    assert lacks.code and f"sweep='{site}/figures/07_sweep.parquet' is not a file; it must be " in lacks.stderr
    assert "those that ship are in a checkout's figures/ alone" in lacks.stderr
