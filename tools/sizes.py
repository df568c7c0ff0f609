"""How large the house is, as a table: `python -m tools.sizes` exits with 1 where a limit is broken. Lines as `wc -l` counts."""

import ast
import importlib
import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {
    "lines of the core": 2_600,
    "lines of pgdlib/lab": 3_600,
    "rooms on the first level of pgdlib": 16,
    "modules on a circle of imports": 0,
    "imports from core to lab": 0,
    "lines of the longest file": 250,
    "functions over 40 lines": 0,
    "public functions of the core without types or docstring": 0,
    "lines of pgdlib that pgdlib.guidance loads": 800,
    "lines of tests": 13_000,
}


def lines(*paths):
    return sum(Path(path).read_bytes().count(b"\n") for path in paths)


def functions(path, public=False):
    """All functions in a file; or those of its public functions and methods that lack a docstring or a type."""
    module = ast.parse(path.read_text("utf-8"))
    if not public:
        return [n for n in ast.walk(module) if isinstance(n, ast.FunctionDef)]
    bodies = [module.body, *(n.body for n in module.body if isinstance(n, ast.ClassDef) and n.name[0] != "_")]
    named = [n for body in bodies for n in body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"]
    taken = {f: [a for a in ast.walk(f.args) if isinstance(a, ast.arg) and a.arg not in ("self", "cls")] for f in named}
    return [f for f in named if not (ast.get_docstring(f) and f.returns and all(a.annotation for a in taken[f]))]


def measured(package=ROOT / "pgdlib"):
    """In the order of `LIMITS`: a number and, where it is of things with names, these; the number is then how many."""
    lab = sorted((package / "lab").rglob("*.py"))
    core = [path for path in sorted(package.rglob("*.py")) if path not in lab]
    graph = grimp.build_graph("pgdlib", cache_dir=None)
    imported = {m: graph.find_modules_directly_imported_by(m) for m in sorted(graph.modules)}
    importlib.import_module("pgdlib.guidance")
    loaded = [m.__file__ for name, m in sys.modules.items() if name.split(".")[0] == "pgdlib"]
    longest = max([*core, *lab], key=lines)
    yield lines(*core), []
    yield lines(*lab), []
    yield len([p for p in package.iterdir() if (p / "__init__.py").exists() or p.match("[!_]*.py")]), []
    yield None, [m for m in imported if any(graph.chain_exists(importer=i, imported=m) for i in imported[m])]
    yield None, [f"{m} → {i}" for m in imported for i in imported[m] if ".lab" in i and ".lab" not in m]
    yield lines(longest), [longest.stem]
    yield None, [f"{p.stem}.{f.name}" for p in (*core, *lab) for f in functions(p) if f.end_lineno - f.lineno >= 40]
    yield None, [f"{p.stem}.{f.name}" for p in core for f in functions(p, public=True)]
    yield lines(*loaded), []
    yield lines(*(ROOT / "tests").rglob("*.py")), []


def main():
    rows = [(name, len(of) if n is None else n, limit, of) for (name, limit), (n, of) in zip(LIMITS.items(), measured())]
    for name, number, limit, of in rows:
        names = f"  {', '.join(of[:4])}{', ...' * (len(of) > 4)}" if number > limit else ""
        print(f"{name:56}{number:7,} of {limit:6,}{'  TOO MUCH' * (number > limit)}{names}")
    sys.exit(any(number > limit for _, number, limit, _ in rows))


if __name__ == "__main__":
    main()
