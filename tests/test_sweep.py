"""Sweeps: what they consist of, what is checked before they start, in which order they run, and what they leave."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import Future
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
from conftest import kept
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from scipy import stats

from pgdlib.lab import artifacts
from pgdlib.lab.sweep import __main__ as command
from pgdlib.lab.sweep import plan, point, results, run
from pgdlib.simulators import default_threads

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = 'scale = "ci"\nx = 1.0\nseed = 0\nmany = [1, 2]\nnote = "auto"\ndevice = "auto"'
CHECK = """%matplotlib inline
from pgdlib.lab import settings
p = settings.check(globals(), x=settings.number(0), many=settings.NUMBERS, note=settings.TEXT)"""
BODY = """import os, pathlib
folder = pathlib.Path(os.environ["PGD_RUNS"]) / "results" / p.scale
folder.mkdir(parents=True)
assert p.x != 3, "three is bad"
(folder / "square_standin-human.csv").write_text(f"x,square\\n{p.x},{p.x**2}\\n{-p.x},{p.x**2}\\n")"""


def write(path, parameters=PARAMETERS, check=CHECK, body=BODY, text="# A toy", tags=("parameters",)):
    """A tiny notebook at `path`."""
    codes = (new_code_cell(parameters, metadata={"tags": list(tags)}), new_code_cell(check), new_code_cell(body))
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(new_notebook(cells=[new_markdown_cell(text), *codes], metadata=metadata), path)
    return path


@pytest.fixture
def toy(tmp_path, runs):
    return plan.Notebook(write(tmp_path / "toy.ipynb"))


def planned(notebook, *texts, fixed=()):
    return plan.points(notebook, plan.parse(notebook, fixed, texts))


# What a sweep consists of


def test_the_points_are_the_full_product(toy):
    found = planned(toy, "x: [0, 0.5]\nnote: [a, b, c]", "seed: 7", fixed=[("scale", "quick")])
    assert [(p.settings["x"], p.settings["note"]) for p in found] == [(x, n) for x in (0, 0.5) for n in "abc"]
    assert {(p.settings["seed"], p.settings["scale"], str(p.settings["many"])) for p in found} == {(7, "quick", "[1, 2]")}
    assert found[1].name == "x=0 note=b" and found[1].given == {"scale": "quick", "x": 0, "note": "b", "seed": 7}
    assert len({p.key for p in found}) == 6


def test_points_with_the_same_models_lie_far_apart(toy):
    found = planned(toy, "x: [0, 1]", "seed: [0, 1, 2]")
    assert [(p.settings["x"], p.settings["seed"]) for p in found] == [(x, s) for x in (0, 1) for s in (0, 1, 2)]
    found = planned(toy, "seed: [0, 1, 2]", "x: [0, 1]")
    assert [(p.settings["x"], p.settings["seed"]) for p in found] == [(x, s) for x in (0, 1) for s in (0, 1, 2)]


def test_lists_of_lists_sweep_lists_and_fixed_values_are_literals(toy):
    assert [p.settings["many"] for p in planned(toy, "many: [[1], [2, 3]]")] == [[1], [2, 3]]
    (one,) = planned(toy, fixed=[("many", "[4, 5]"), ("x", "1e-3"), ("note", "None of it")])
    assert (one.settings["many"], one.settings["x"], one.settings["note"]) == ([4, 5], 1e-3, "None of it")


def test_the_same_values_twice_are_one_point(toy):
    assert len(planned(toy, "seed: [1, 1, 2]")) == 2
    (default,), (said,) = planned(toy), planned(toy, fixed=[("x", "1.0")])
    assert default.key == said.key


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["lamb: [1]"], "unknown parameter lamb; toy takes scale, x, seed, many, note, device"),
        (["see-d: 1"], "unknown parameter see-d; toy takes scale, x, seed, many, note, device; perhaps seed is meant"),
        (["x: []"], "parameter x=[] has no value to sweep over"),
        (["just text"], "-y 'just text' is not allowed; it must be a name and its values"),
        (["x: [1"], "-y 'x: [1' is no YAML"),
    ],
)
def test_what_is_no_sweep_is_refused(toy, texts, message):
    with pytest.raises(plan.BadSweep) as refused:
        planned(toy, *texts)
    assert str(refused.value).startswith(message)


def test_a_file_that_is_no_notebook_to_sweep_is_refused(tmp_path):
    (tmp_path / "bad.ipynb").write_text("{")
    for path, message in (
        (tmp_path / "none.ipynb", "cannot be read as a notebook"),
        (tmp_path / "bad.ipynb", "cannot be read as a notebook"),
        (write(tmp_path / "untagged.ipynb", tags=()), "one of its code cells must have the tag `parameters`"),
        (write(tmp_path / "broken.ipynb", body="if"), "is not all Python"),
    ):
        with pytest.raises(plan.BadSweep, match=message):
            plan.Notebook(path)


def test_a_key_names_all_that_decides_the_result_and_nothing_else(tmp_path, runs, monkeypatch):
    def key(fixed=(), **cells):
        return planned(plan.Notebook(write(tmp_path / "toy.ipynb", **cells)), fixed=fixed)[0].key

    first, guide = key(), tmp_path / "guide.zip"
    assert key() == first == key(text="# Another text") and len(first) == 12
    guide.write_text("one")
    others = [key(check="%magic\n" + CHECK), key(body="?what"), key(body="%%bash\nls"), key(body=BODY + "\n")]
    others += [key(parameters=PARAMETERS.replace("1.0", "2.0")), key([("seed", "1")]), key([("note", str(guide))])]
    guide.write_text("two")
    others += [key([("note", str(guide))])]
    versions = artifacts.versions()
    monkeypatch.setattr(artifacts, "versions", lambda: {**versions, "git": "another commit"})
    assert key() == first
    monkeypatch.setattr(artifacts, "versions", lambda: {**versions, "torch": "0.1"})
    others += [key()]
    monkeypatch.setattr(artifacts, "code_version", lambda *modules: " ".join(modules))
    others += [key()]
    assert len({first, *others}) == len(others) + 1


def test_the_code_of_a_notebook_is_what_it_imports(toy, tmp_path):
    assert toy.modules == ["lab", "lab.settings"]  # and, by `code_version`, what these import
    assert plan.Notebook(write(tmp_path / "toy.ipynb", check="import numpy", body="x")).modules == []


# What is checked before anything starts


def test_all_values_that_are_not_allowed_are_named_at_once(toy):
    with pytest.raises(plan.BadSweep) as refused:
        plan.check(toy, planned(toy, "x: [1, -1, abc]", "seed: [0, 1]"))
    assert str(refused.value).splitlines() == [
        "parameter x=-1 is not allowed; it must be a number of at least 0",
        "parameter x='abc' is not allowed; it must be a number of at least 0",
    ]
    with pytest.raises(plan.BadSweep, match="many=1 is not allowed"):
        plan.check(toy, planned(toy, "many: [1, 2]"))
    plan.check(toy, planned(toy, "scale: [ci, quick]", "many: [[1, 2]]"))


def test_cuda_is_left_to_the_machine_that_runs_the_point(toy, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = planned(toy, "device: cuda")
    with pytest.raises(plan.BadSweep, match="PyTorch finds no CUDA device"):
        plan.check(toy, found)
    plan.check(toy, found, elsewhere=True)
    with pytest.raises(plan.BadSweep, match="device='gpu' is not allowed"):
        plan.check(toy, planned(toy, "device: gpu"), elsewhere=True)


def test_a_notebook_whose_first_cells_fail_is_refused(toy, tmp_path, monkeypatch):
    notebook = plan.Notebook(write(tmp_path / "toy.ipynb", check="nowhere\n" + CHECK))
    with pytest.raises(plan.BadSweep, match="toy fails before it checks its parameters: NameError: name 'nowhere'"):
        plan.check(notebook, planned(notebook))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(plan.BadSweep, match=r"^\[Errno 13\] .* cannot be written: .* PGD_RUNS can name another"):
        plan.check(toy, planned(toy))


def test_a_notebook_that_checks_nothing_is_swept_by_names_alone(tmp_path, runs):
    notebook = plan.Notebook(write(tmp_path / "toy.ipynb", check="", body="raise ValueError"))
    plan.check(notebook, planned(notebook, "x: [-1]"))


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_notebook_of_the_repository_is_checked(runs, path):
    notebook = plan.Notebook(path)
    plan.check(notebook, planned(notebook))
    with pytest.raises(plan.BadSweep, match="scale='huge' is not allowed"):
        plan.check(notebook, planned(notebook, "scale: huge"))


def test_what_the_library_keeps_is_common_or_the_points_own():
    code = "\n".join(p.read_text() for p in (ROOT / "pgdlib").rglob("*.py") if p.parent.name != "sweep")
    folders = set(re.findall(r'\broot\(\) / "(\w+)"', code))
    assert folders - set(point.COMMON) == {"figures", "results"}


# The order of the run


class Backend(contextlib.AbstractContextManager):
    """One whose points end as `outcomes` says, name -> list of statuses; all others well. All are over at once."""

    def __init__(self, outcomes=None, most=2):
        self.outcomes, self.most, self.started, self.stopped = outcomes or {}, most, [], False

    def __enter__(self):
        return self.start, self.most

    def start(self, text, folder):
        name, future = json.loads(text)["name"], Future()
        self.started.append(name)
        status = self.outcomes[name].pop(0) if self.outcomes.get(name) else 0
        Path(folder, "log.txt").write_text("[IPKernelApp] warning\nTraceback\nso it was\n")
        if isinstance(status, Exception):
            future.set_exception(status)
        else:
            future.set_result((status, "killed" if status < 0 else ""))
        return future

    def __exit__(self, *_):
        self.stopped = True


def a_point(name, **settings):
    return plan.Point(name, name, {"scale": "ci", **settings}, {}, "toy", [], {"code": "c0de"})


def go(names, backend, retries=2):
    said = []
    failed = run.sweep([a_point(name) for name in names], backend, retries, said.append)
    assert backend.stopped
    return failed, said


def test_a_failure_stops_no_other_point_and_its_log_is_told(runs):
    failed, said = go("abc", backend := Backend({"a": [1]}, most=1))
    assert backend.started == ["a", "b", "c"] and said[0] == "FAILED  a" and said[-1].startswith("done    c; 2 of 3 done")
    assert failed.keys() == {"a"} and failed["a"][1] == "  Traceback\n  so it was"


def test_a_lost_point_is_run_again_but_not_for_ever_and_a_failed_one_is_not(runs):
    outcomes = {"a": [-9, point.LOST, 0], "b": [-9, OSError("the node"), -9, 0], "c": [1, 0]}
    failed, said = go("abc", backend := Backend(outcomes, most=1))
    assert backend.started == ["a"] * 3 + ["b"] * 3 + ["c"] and failed.keys() == {"b", "c"}
    assert "killed" in failed["b"][1] and sum(line.startswith("again") for line in said) == 4
    assert "again   b: lost: OSError" in said


def test_no_more_run_at_once_than_may_and_what_runs_is_told():
    futures, told = {}, []

    def start(name):
        futures[name] = Future()
        return futures[name]

    def tell(running):  # nothing is over until it was told once
        told.append("".join(sorted(running)))
        futures[running[0]].set_result((0, ""))

    over = [name for name, _ in run.side_by_side(deque("abcd"), start, 2, tell, every=0.01)]
    assert sorted(over) == list("abcd") and told[0] == "ab" and max(map(len, told)) == 2


def test_costs_are_those_of_the_points_most_alike(toy, runs):
    for i, (seconds, x) in enumerate([(10, 8), (20, 8), (30, 8), (999, 256)]):
        done(f"old {i}", {}, seconds=seconds, x=x, seed=i)
    (new,), (other,) = planned(toy, "x: 8", "seed: 9"), planned(toy, "scale: quick")
    new.name, other.name = "new", "other"
    assert list(plan.forecast(toy, [new, other])) == [
        "  new: 0:00:20",
        "  other: unknown",
        "2 to run: 0:00:20 on one worker, and 1 of unknown cost: nothing like them has run yet",
    ]


def test_the_users_number_of_threads_holds_for_every_library(runs, monkeypatch):
    for name in run.THREADS:
        monkeypatch.delenv(name, raising=False)
    assert {run.environment(3)[name] for name in run.THREADS} == {"3"}
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert {run.environment(3)[name] for name in run.THREADS} == {"7"}
    monkeypatch.setenv("MKL_NUM_THREADS", "2")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "")
    assert [run.environment(3)[name] for name in run.THREADS] == ["7", "2", "7", "7"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    for asked, threads in {"3": 3, "3,1": 3, " 2 , 1": 2, "99": 8, "": 8, "many": 8}.items():
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert default_threads() == threads


@pytest.mark.parametrize(
    ("cores", "workers", "points", "most"), [(8, 3, 99, 3), (4, None, 99, 4), (4, None, 2, 2), (2, 3, 99, 3)]
)
def test_workers_share_the_cores(runs, monkeypatch, cores, workers, points, most):
    monkeypatch.setattr(run, "CORES", cores)
    monkeypatch.setattr(run.Processes, "point", lambda self, text, environment: environment)
    for name in run.THREADS:
        monkeypatch.delenv(name, raising=False)
    with run.here(workers, points) as (start, found):
        assert found == most and start("text")["OMP_NUM_THREADS"] == str(max(1, cores // most))


# The outcome


def done(name, tables, seconds=2.5, **settings):
    """A point that is done, with `tables`, path -> text."""
    one = a_point(name, **settings)
    for path, text in tables.items():
        (one.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (one.folder / path).write_text(text)
    one.folder.mkdir(parents=True, exist_ok=True)
    card = {**vars(one), "seconds": seconds, "threads": 1, "versions": {"git": "abc", "torch": "2.0"}}
    (one.folder / "done.json").write_text(json.dumps(card))
    return one


def test_all_rows_of_all_points_are_in_one_tidy_file(runs, tmp_path):
    claims = {"C1": {"effect": 1.5, "verdict": "partly"}, "C2": {"effect": None, "verdict": "reproduced"}}
    first = {
        "figures/ci/04_a_standin-human.csv": "lam,y\n0,1.5\n1,2.5\n",
        "results/ci/claims_standin-human.json": json.dumps(claims),
        "results/ci/findings_08_standin-human.json": '["It rises."]',
        "results/ci/one.json": '{"y": 7}',
        "figures/ci/04_a_standin-human.png": "no table",
    }
    points = [
        done("a", first, lam="auto", lams=[1, 2], gone=None),
        done("b", {"results/05_t_d4rl-expert_5seeds.csv": "y\n3\n"}, lam=2),
    ]
    points += [done("nothing", {}, lam=0.5), a_point("not done")]
    results.write(results.gather(points), path := tmp_path / "out" / "x.parquet")
    frame = pd.read_parquet(path)
    assert kept(path.parent) == ["x.parquet"]
    shown = frame[["run.point", "run.table", "run.row", "run.data", "p.lam", "lam", "y", "effect"]]
    assert shown.astype(object).where(shown.notna(), None).to_numpy().tolist() == [
        ["a", "04_a", 0, "standin-human", "auto", 0, 1.5, None],
        ["a", "04_a", 1, "standin-human", "auto", 1, 2.5, None],
        ["a", "claims", 0, "standin-human", "auto", None, None, 1.5],
        ["a", "claims", 1, "standin-human", "auto", None, None, None],
        ["a", "findings_08", 0, "standin-human", "auto", None, None, None],
        ["a", "one", 0, None, "auto", None, 7, None],
        ["b", "05_t_5seeds", 0, "d4rl-expert", "2", None, 3, None],
        ["nothing", None, 0, None, "0.5", None, None, None],
    ]
    assert frame["finding"].dropna().tolist() == ["It rises."]
    assert (frame["run.seconds"] == 2.5).all() and set(frame["run.git"]) == {"abc"} and set(frame["run.code"]) == {"c0de"}
    assert frame["p.lams"][0] == "[1, 2]" and frame["p.gone"].isna().all()


def test_a_file_that_cannot_be_written_leaves_the_old_one(runs, tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    results.write(pd.DataFrame({"a": [1]}), path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        results.write(pd.DataFrame({"a": [2]}), path)
    assert pd.read_parquet(path)["a"].tolist() == [1] and kept(tmp_path) == ["x.parquet"]


def test_a_sweep_is_read_by_its_path_or_as_the_newest(runs, tmp_path):
    files = [("old", "04", "ci"), ("new", "04", "ci"), ("paper", "04", "paper"), ("other", "02", "ci")]
    for i, (name, table, scale) in enumerate(files):
        path = runs / "points" / f"{name}.parquet"
        results.write(pd.DataFrame({"run.table": [table], "p.scale": [scale]}), path)
        os.utime(path, (i, i))
    found = [results.read("newest", *which)[0].stem for which in (("04", "ci"), ("04", "paper"), ("02", "ci"))]
    assert found == ["new", "paper", "other"]
    assert results.read(str(path), "02", "quick")[1]["run.table"].tolist() == ["02"]
    wrong = {
        "newest": "is not allowed: runs/ has no sweep at scale 'quick' with the table 04",
        path: "has no table 04; it has 02",
    }
    wrong |= {
        tmp_path / "none.parquet": "is not a file; it must be",
        Path(__file__): "is not a file that a sweep has written: ",
    }
    for given, message in wrong.items():
        with pytest.raises(ValueError) as refused:
            results.read(given, "04", "quick")
        assert str(refused.value).startswith(f"sweep={str(given)!r} {message}")


def test_a_table_may_be_named_by_its_beginning(runs):
    path = runs / "points" / "x.parquet"
    results.write(pd.DataFrame({"run.table": ["table1_iql_5seeds", None, "04"], "p.scale": "ci", "y": [1, 2, 3]}), path)
    _, frame = results.read("newest", "table1_", "ci", "benchmark")
    assert results.table(frame, "table1_", y="y")["y"].tolist() == [1]
    assert results.table(frame, ("table1_", "04"), y="y")["y"].tolist() == [1, 3]
    with pytest.raises(
        ValueError, match="benchmark='newest' is not allowed: runs/ has no sweep at scale 'ci' with the table 1_"
    ):
        results.read("newest", "1_", "ci", "benchmark")


def test_gains_are_paired_by_agent_within_each_run():
    """Two runs, the second without its first agent's world-model row; the third has no baseline at all."""
    rows = []
    for seed, base, world in ((0, [100, 200, 600], [101, 203, 605]), (1, [10, 20, 30], [math.nan, 120, 132])):
        for row, values in (("λ = 0", base), ("world", world)):
            rows += [("human", row, seed, 1_000 * seed + i, value) for i, value in enumerate(values)]
    rows += [("cloned", "world", 0, 0, 5.0)]
    returns = pd.DataFrame(rows[::-1], columns=["dataset", "row", "seed", "agent", "value"])  # in any order
    found = results.gains(returns, "λ = 0").sort_values("seed")
    assert found[["dataset", "row", "seed", "agents"]].to_numpy().tolist() == [
        ["human", "world", 0, 3],
        ["human", "world", 1, 2],
    ]
    for (_, row), differences in zip(found.iterrows(), ([1, 3, 5], [100, 102])):
        low, high = stats.t.interval(0.95, len(differences) - 1, np.mean(differences), stats.sem(differences))
        assert row[["gain", "low", "high"]].tolist() == pytest.approx([np.mean(differences), low, high])
    with pytest.raises(ValueError, match="and seed=0 have several runs"):
        results.gains(pd.concat([returns, returns[returns["seed"] == 0]]), "λ = 0")


def test_means_over_seeds_have_students_interval():
    rows = [("a", 0, 1.0), ("a", 1, 2.0), ("a", 2, 6.0), ("a", 2, 8.0), ("b", 0, 5.0)]  # a's last seed twice, 7 in the mean
    study = results.over_seeds(pd.DataFrame(rows, columns=["rule", "seed", "y"]), ["rule"], ["y"])
    assert study[["rule", "seeds", "y.mean"]].to_numpy().tolist() == [["a", 3, 10 / 3], ["b", 1, 5]]
    low, high = stats.t.interval(0.95, 2, 10 / 3, stats.sem([1, 2, 7]))
    assert study[["y.low", "y.high"]].to_numpy()[0].tolist() == pytest.approx([low, high])
    assert study[["y.low", "y.high"]].iloc[1].isna().all()


def test_the_rows_of_a_table_are_taken_once_under_other_names():
    frame = pd.DataFrame({"run.table": ["a", "a", "b", "a"], "p.seed": [0, 0, 0, 1], "y": [1, 1, 2, 3], "rest": [1, 2, 3, 4]})
    rows = results.table(frame, "a", seed="p.seed", value="y")
    assert rows.columns.tolist() == ["seed", "value"] and rows.to_numpy().tolist() == [[0, 1], [1, 3]]


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "--workers 0 is not allowed; it must be a whole number of at least 1"),
        (["--gpus", "0.5"], "--address, --cpus and --gpus are of --backend ray"),
        (["--backend", "slurm"], "invalid choice: 'slurm'"),
        (["--retries", "-1"], "--retries at least 0"),
    ],
)
def test_a_wrong_argument_is_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as refused:
        command.main(["toy.ipynb", *arguments])
    assert refused.value.code == 2 and message in capsys.readouterr().err


def test_a_wrong_value_starts_nothing(toy, tmp_path, capsys, runs):
    assert command.main([str(tmp_path / "toy.ipynb"), "-y", "x: [-1]"]) == 2
    assert "parameter x=-1 is not allowed" in capsys.readouterr().err and not runs.exists()


def test_without_ray_its_backend_says_how_to_install_it(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert command.main([str(tmp_path / "toy.ipynb"), "--backend", "ray"]) == 2
    assert "pip install -e '.[cluster]'" in capsys.readouterr().err


def test_a_dry_run_shows_the_plan_and_runs_nothing(toy, tmp_path, capsys, runs):
    assert command.main([str(tmp_path / "toy.ipynb"), "-y", "x: [1, 2]", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "toy: 2 points, 0 of them are done\n  x=1: unknown\n  x=2: unknown\n2 to run" in told and not runs.exists()


def swept(path, *arguments, **environment):
    """The finished process of a sweep, as a user starts it."""
    call = [sys.executable, "-m", "pgdlib.lab.sweep", str(path), *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(call, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300, check=False)


@pytest.mark.notebook
def test_a_sweep_from_end_to_end(toy, tmp_path, runs):
    path, out = tmp_path / "toy.ipynb", tmp_path / "out.parquet"
    first = swept(path, "-y", "x: [1, 2, 3]", "--workers", "2", "--out", str(out))
    assert first.returncode == 1 and "2 of 3 points, 4 rows" in first.stdout
    told = first.stdout.split("FAILED x=3:")[1]
    assert "notebook.ipynb" in told and "AssertionError: three is bad" in told
    frame = pd.read_parquet(out).sort_values(["p.x", "run.row"])
    assert frame[["p.x", "x", "square"]].to_numpy().tolist() == [[1, 1, 1], [1, -1, 1], [2, 2, 4], [2, -2, 4]]
    assert set(frame["run.data"]) == {"standin-human"} and set(frame["run.table"]) == {"square"}
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("done.json")}
    assert len(before) == 2
    again = swept(path, "-y", "x: [1, 2, 4]", "--out", str(out))
    assert again.returncode == 0 and "3 points, 2 of them are done" in again.stdout and again.stdout.count("done    ") == 1
    assert {p: p.stat().st_mtime_ns for p in before} == before and set(pd.read_parquet(out)["p.x"]) == {1, 2, 4}
    failed = next(p for p in runs.glob("points/toy/*/notebook.ipynb") if not (p.parent / "done.json").exists())
    assert "x = 3" in failed.read_text()


@pytest.mark.notebook
def test_code_that_changed_since_the_plan_is_not_run(toy, runs):
    toy.keep()
    (one,) = planned(toy)
    one.identity = {**one.identity, "code": "another"}
    one.folder.mkdir()
    call = [sys.executable, "-m", "pgdlib.lab.sweep.point", json.dumps(vars(one)), str(os.getpid())]
    ran = subprocess.run(call, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and "code differ from those that the sweep was planned with: start it again" in ran.stderr
    assert not one.record


def listening(pid):
    """The addresses on which a process, or one that it has started, listens."""
    found = set()
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        for one in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            found |= {c.laddr.ip for c in one.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.notebook
def test_a_sweep_on_ray_runs_and_listens_on_the_loopback_interface_alone(toy, tmp_path, runs):
    pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[cluster]'")
    arguments = ["-y", "x: [1, 2, 3]", "--backend", "ray", "--workers", "2", "--out", str(tmp_path / "out.parquet")]
    call = [sys.executable, "-m", "pgdlib.lab.sweep", str(tmp_path / "toy.ipynb"), *arguments]
    process = subprocess.Popen(call, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    found = set()
    while process.poll() is None:
        found |= listening(process.pid)
        time.sleep(1)
    told = process.stdout.read()
    assert process.returncode == 1 and "three is bad" in told and "2 of 3 points, 4 rows" in told
    assert sorted(pd.read_parquet(tmp_path / "out.parquet")["square"]) == [1, 1, 4, 4]
    assert found and found <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


@pytest.mark.notebook
def test_a_ray_cluster_that_is_not_there_is_an_error_and_no_traceback(toy, tmp_path, runs):
    pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[cluster]'")
    refused = swept(tmp_path / "toy.ipynb", "--backend", "ray", "--address", "127.0.0.1:1")
    assert refused.returncode == 2 and "Ray cannot be reached at 127.0.0.1:1: " in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.notebook
def test_notebook_07_draws_the_sweeps_that_came_with_it(tmp_path, runs):
    call = [sys.executable, "-m", "papermill", "-k", "python3", "-p", "scale", "ci", ROOT / "notebooks/07_sweep.ipynb"]
    subprocess.run([*call, tmp_path / "out.ipynb"], check=True, stdin=subprocess.DEVNULL, capture_output=True)
    drawn = [f"{name}.{kind}" for name in ("claims", "fronts", "gains", "rules") for kind in ("csv", "png")]
    assert kept(runs) == [*(f"figures/ci/07_{name}" for name in sorted([*drawn, "lam.png"])), "results/ci/findings_07_all.json"]
    shipped = pd.read_parquet(ROOT / "figures/07_sweep.parquet").query("`run.table` == '04_fronts' and `p.dataset` == 'human'")
    own = shipped[shipped["rule"] == "annealed"].pivot(index="p.seed", columns="lam", values="normalised.mean")
    table = pd.read_csv(runs / "figures/ci/07_fronts.csv").set_index(["dataset", "rule", "lam"]).sort_index()
    assert len(table) > 80 and (table.loc["standin-human", "seeds"] == shipped["p.seed"].nunique()).all()
    assert table.loc[("standin-human", "annealed", 0.1), "relative.mean"] == pytest.approx((own[0.1] / own[0.0]).mean())
    gains = pd.read_csv(runs / "figures/ci/07_gains.csv").set_index(["dataset", "row"])["gain.mean"]
    shipped = pd.read_parquet(ROOT / "figures/07_table1.parquet").query("`run.table` == 'table1_iql_5seeds'")
    each = shipped.groupby(["run.data", "row"])["d4rl_return"].mean()
    assert len(gains) == 10
    for (dataset, row), gain in gains.items():  # no agent was lost, so differences of means are means of differences
        assert gain == pytest.approx(each[dataset, row] - each[dataset, "IQL, unguided (λ = 0)"])
