"""How large the house is, as a table: `python -m tools.sizes` exits with 1 where a limit is broken. Lines as `wc -l` counts."""

import ast
import importlib
import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parent.parent
FURTHER = "penalties.py"  # other model-based methods
FIRST = {"__init__.py", "stack.py", "squashed.py", "bc.py", "iql.py", "td3_bc.py"}  # agents that count as core
LIMITS = {
    "lines of the core": 3_345,  # to come: 2,600
    "lines of the longest further agent": 110,
    "lines of the further model-based methods": 140,
    "lines of pgdlib/lab": 6_044,  # to come: 3,600
    "rooms on the first level of pgdlib": 17,
    "modules on a circle of imports": 0,
    "imports from core to lab": 0,
    "lines of the longest file": 266,  # claims: the rules of all ten stand in one place
    "functions over 40 lines": 0,
    "public functions of the core without types or docstring": 0,
    "lines of pgdlib that pgdlib.guidance loads": 775,
    "lines of tests": 19_471,  # to come: 13,000
}


def lines(*paths):
    return sum(Path(path).read_bytes().count(b"\n") for path in paths)


def unexplained(path):
    """The public functions and methods in a file that lack a docstring or a type."""
    module = ast.parse(path.read_text("utf-8"))
    bodies = [module.body, *(n.body for n in module.body if isinstance(n, ast.ClassDef) and n.name[0] != "_")]
    named = [n for body in bodies for n in body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"]
    taken = {f: [a for a in ast.walk(f.args) if isinstance(a, ast.arg) and a.arg not in ("self", "cls")] for f in named}
    return [f for f in named if not (ast.get_docstring(f) and f.returns and all(a.annotation for a in taken[f]))]


def measured():
    """In the order of `LIMITS`: a number and, where it is of things with names, these; None is their number."""
    lab = sorted((ROOT / "pgdlib/lab").rglob("*.py"))
    agents = [path for path in sorted((ROOT / "pgdlib/agents").glob("*.py")) if path.name not in FIRST]
    core = [path for path in sorted((ROOT / "pgdlib").rglob("*.py")) if path not in lab]
    rooms = [p for p in (ROOT / "pgdlib").iterdir() if (p / "__init__.py").exists() or p.match("[!_]*.py")]
    functions = {
        p: [f for f in ast.walk(ast.parse(p.read_text("utf-8"))) if isinstance(f, ast.FunctionDef)] for p in core + lab
    }
    graph = grimp.build_graph("pgdlib", cache_dir=None)
    imported = {m: graph.find_modules_directly_imported_by(m) for m in sorted(graph.modules)}
    importlib.import_module("pgdlib.guidance")
    loaded = [m.__file__ for name, m in sys.modules.items() if name.split(".")[0] == "pgdlib"]
    longest = max(core + lab, key=lines)
    further = ROOT / "pgdlib" / FURTHER
    yield lines(*core) - lines(*agents, further), []
    yield max(map(lines, agents)), [max(agents, key=lines).stem]
    yield lines(further), []
    yield lines(*lab), []
    yield None, [p.stem for p in rooms]
    yield None, [m for m in imported if any(graph.chain_exists(importer=i, imported=m) for i in imported[m])]
    yield None, [f"{m} → {i}" for m in imported for i in imported[m] if ".lab" in i and ".lab" not in m]
    yield lines(longest), [longest.stem]
    yield None, [f"{p.stem}.{f.name}" for p, fs in functions.items() for f in fs if f.end_lineno - f.lineno >= 40]
    yield None, [f"{p.stem}.{f.name}" for p in core for f in unexplained(p)]
    yield lines(*loaded), []
    yield lines(*(ROOT / "tests").rglob("*.py")), []


broken = False
for (name, limit), (number, of) in zip(LIMITS.items(), measured()):
    number = len(of) if number is None else number
    broken |= number > limit
    print(f"{name:56}{number:7,} of {limit:6,}" + f"  TOO MUCH  {', '.join(of[:5])}" * (number > limit))
sys.exit(broken)
