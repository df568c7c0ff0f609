"""Sweeps: what they consist of, what is checked before they start, in which order they run, and what they leave."""

import ast
import contextlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import assert_labelled, drawn, kept, line, texts
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from scipy import stats

from pgdlib.lab import figures, pipeline, store
from pgdlib.lab.sweep import (
    sweep,
    sweep_plan,
    sweep_pools,
    sweep_results,
    sweep_run,
    sweep_shared,
    sweep_task,
)

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = 'scale = "ci"\nx = 1.0\nseed = 0\nmany = [1, 2]\nnote = "auto"\ndevice = "auto"'
CHECK = """%matplotlib inline
from pgdlib.lab import params
p = params.check(globals(), scale=params.one_of("ci", "quick"), x=params.number(0), seed=params.integer(0),
    many=params.numbers(), note=params.text(), device=params.one_of(*params.DEVICES))"""
BODY = """import os, pathlib
folder = pathlib.Path(os.environ["PGD_RUNS"]) / "results" / p.scale
folder.mkdir(parents=True)
assert p.x != 3, "three is bad"
(folder / "square_standin-human.csv").write_text(f"x,square\\n{p.x},{p.x**2}\\n{-p.x},{p.x**2}\\n")"""


def write(path, parameters=PARAMETERS, check=CHECK, body=BODY, text="# A toy", tags=("parameters",)):
    """A tiny notebook at `path`."""
    cells = [
        new_markdown_cell(text),
        new_code_cell(parameters, metadata={"tags": list(tags)}),
        new_code_cell(check),
        new_code_cell(body),
    ]
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(new_notebook(cells=cells, metadata=metadata), path)
    return path


@pytest.fixture
def toy(tmp_path, runs):
    return sweep_plan.Notebook(write(tmp_path / "toy.ipynb"))


def planned(notebook, *texts, fixed=()):
    return sweep_plan.points(notebook, sweep_plan.parse(notebook, fixed, texts))


# What a sweep consists of


def test_the_points_are_the_full_product(toy):
    tasks = planned(toy, "x: [0, 0.5]\nseed: [0, 1, 2]", "note: a", fixed=[("scale", "quick")])
    assert [(t.settings["x"], t.settings["seed"]) for t in tasks] == [(x, s) for x in (0, 0.5) for s in (0, 1, 2)]
    assert {(t.settings["note"], t.settings["scale"], str(t.settings["many"])) for t in tasks} == {("a", "quick", "[1, 2]")}
    assert tasks[1].name == "x=0 seed=1" and tasks[1].given == {"scale": "quick", "x": 0, "seed": 1, "note": "a"}
    assert len({t.key for t in tasks}) == 6


def test_lists_of_lists_sweep_lists_and_fixed_values_are_literals(toy):
    assert [t.settings["many"] for t in planned(toy, "many: [[1], [2, 3]]")] == [[1], [2, 3]]
    (task,) = planned(toy, fixed=[("many", "[4, 5]"), ("x", "1e-3"), ("note", "None of it")])
    assert (task.settings["many"], task.settings["x"], task.settings["note"]) == ([4, 5], 1e-3, "None of it")


def test_the_same_values_twice_are_one_point(toy):
    assert len(planned(toy, "seed: [1, 1, 2]")) == 2
    (default,), (said,) = planned(toy), planned(toy, fixed=[("x", "1.0")])
    assert default.key == said.key


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["lamb: [1]"], "unknown parameter lamb; toy takes scale, x, seed, many, note, device"),
        (["x: []"], "parameter x=[] has no value to sweep over"),
        (["just text"], "-y 'just text' is not allowed; it must be a name and its values"),
        (["x: [1"], "-y 'x: [1' is no YAML"),
    ],
)
def test_what_is_no_sweep_is_refused(toy, texts, message):
    with pytest.raises(sweep_plan.BadSweep) as refused:
        planned(toy, *texts)
    assert str(refused.value).startswith(message)


def test_a_file_that_is_no_notebook_to_sweep_is_refused(tmp_path):
    (tmp_path / "bad.ipynb").write_text("{")
    for path, message in (
        (tmp_path / "none.ipynb", "cannot be read as a notebook"),
        (tmp_path / "bad.ipynb", "cannot be read as a notebook"),
        (
            write(tmp_path / "untagged.ipynb", tags=()),
            "has no parameters: one of its code cells must have the tag `parameters`",
        ),
    ):
        with pytest.raises(sweep_plan.BadSweep, match=message):
            sweep_plan.Notebook(path)


def test_a_key_names_all_that_decides_the_result_and_nothing_else(tmp_path, runs, monkeypatch):
    def key(fixed=(), **cells):
        return planned(sweep_plan.Notebook(write(tmp_path / "toy.ipynb", **cells)), fixed=fixed)[0].key

    first, guide = key(), tmp_path / "guide.zip"
    assert key() == first == key(text="# Another text") and len(first) == 12
    guide.write_text("one")
    others = [
        key(check="%magic\n" + CHECK),
        key(body="?what"),
        key(body=BODY + "\n"),
        key(parameters=PARAMETERS.replace("1.0", "2.0")),
        key([("seed", "1")]),
    ]
    others += [key([("note", str(guide))])]
    guide.write_text("two")
    others += [key([("note", str(guide))])]
    versions = store.versions()
    with monkeypatch.context() as patch:
        patch.setattr(store, "versions", lambda: {**versions, "git": "another commit"})
        assert key() == first
        patch.setattr(store, "versions", lambda: {**versions, "torch": "0.1"})
        others += [key()]
        patch.undo()
        patch.setattr(store, "code_version", lambda *rooms: " ".join(rooms))
        others += [key()]
    assert len({first, *others}) == len(others) + 1


def test_the_code_of_a_notebook_is_what_it_imports_and_what_that_imports(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "PACKAGE", tmp_path)
    sources = {
        "a": "from pgdlib import b, nowhere",
        "b": "def f():\n    import pgdlib.c",
        "c": "from pgdlib.a import x",
        "d": "",
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    assert sweep_plan.rooms(["import os\nfrom pgdlib import a"]) == ["a", "b", "c"]
    assert sweep_plan.rooms(["import numpy"]) == []


# What is checked before anything starts


def test_all_values_that_are_not_allowed_are_named_at_once(toy):
    with pytest.raises(sweep_plan.BadSweep) as refused:
        sweep_plan.check(toy, planned(toy, "x: [1, -1, abc]", "seed: [0, 1]"))
    assert str(refused.value).splitlines() == [
        "parameter x=-1 is not allowed; it must be a number of at least 0",
        "parameter x='abc' is not allowed; it must be a number of at least 0",
    ]
    with pytest.raises(
        sweep_plan.BadSweep, match=r"many=1 is not allowed[^(]*\(lists are swept: .* write 'many: \[\[...\]\]'\)"
    ):
        sweep_plan.check(toy, planned(toy, "many: [1, 2]"))


def test_the_check_gives_the_settings_of_the_scale(toy):
    tasks = planned(toy, "scale: [ci, quick]", "x: [2]")
    checked = sweep_plan.check(toy, tasks)
    assert [(checked[t.key]["x"], checked[t.key]["horizon"]) for t in tasks] == [(2, 16), (2, 32)]


def test_cuda_is_left_to_the_machine_that_runs_the_point(toy, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    tasks = planned(toy, "device: cuda")
    with pytest.raises(sweep_plan.BadSweep, match="PyTorch finds no CUDA device"):
        sweep_plan.check(toy, tasks)
    assert sweep_plan.check(toy, tasks, elsewhere=True)[tasks[0].key]["device"] == "cuda"
    with pytest.raises(sweep_plan.BadSweep, match="device='gpu' is not allowed"):
        sweep_plan.check(toy, planned(toy, "device: gpu"), elsewhere=True)


def test_a_notebook_whose_first_cells_fail_is_refused(tmp_path, runs):
    notebook = sweep_plan.Notebook(write(tmp_path / "toy.ipynb", check="nowhere\n" + CHECK))
    with pytest.raises(sweep_plan.BadSweep, match="toy fails before it checks its parameters: NameError: name 'nowhere'"):
        sweep_plan.check(notebook, planned(notebook))


def test_a_notebook_that_checks_nothing_is_swept_by_names_alone(tmp_path, runs):
    notebook = sweep_plan.Notebook(write(tmp_path / "toy.ipynb", check="", body=""))
    tasks = planned(notebook, "x: [-1]")
    assert sweep_plan.check(notebook, tasks) == {}
    assert sweep_shared.stages(notebook, tasks, {}) == tasks


def test_every_notebook_of_the_repository_is_checked_at_its_defaults(runs):
    made = {}
    for path in sorted((ROOT / "notebooks").glob("0[1-6]*.ipynb")):
        notebook = sweep_plan.Notebook(path)
        made[path.stem[:2]] = sweep_shared.makes(notebook)
        (task,) = planned(notebook)
        assert sweep_plan.check(notebook, [task])[task.key]["scale"] == "quick"
    models = ["data", "denoiser", "world model"]
    assert made == {"01": models[:1], "02": models[:2], "03": [], "04": models[:2], "05": models, "06": models}


# What is made before the points


def wants(notebook, *texts):
    tasks = planned(notebook, *texts)
    found = sweep_shared.stages(notebook, tasks, sweep_plan.check(notebook, tasks))
    return [(t.kind, t.name, [next(o.name for o in found if o.key == n) for n in t.needs]) for t in found]


def test_what_several_points_need_is_made_once_before_them(runs):
    notebook = sweep_plan.Notebook(ROOT / "notebooks/04_guidance.ipynb")
    found = wants(notebook, "lam: [0, 1, 2]", "dataset: [human, cloned]", "scale: ci")
    makers, points = found[:4], found[4:]
    assert makers == [
        ("data", "data: dataset=human", []),
        ("denoiser", "denoiser: dataset=human scale=ci seed=0", ["data: dataset=human"]),
        ("data", "data: dataset=cloned", []),
        ("denoiser", "denoiser: dataset=cloned scale=ci seed=0", ["data: dataset=cloned"]),
    ]
    assert len(points) == 6
    for _, name, needs in points:
        dataset = name.split("dataset=")[1].split()[0]
        assert len(needs) == 2 and all(f"dataset={dataset}" in n for n in needs)
    assert [name.split("dataset=")[1] for _, name, _ in points[:2]] == ["human", "cloned"]  # far apart


def test_what_one_point_alone_needs_it_makes_itself(runs):
    notebook = sweep_plan.Notebook(ROOT / "notebooks/04_guidance.ipynb")
    found = wants(notebook, "seed: [0, 1]", "scale: ci")
    assert [(kind, len(needs)) for kind, _, needs in found] == [("data", 0), ("point", 1), ("point", 1)]


def test_a_denoiser_that_is_handed_in_is_not_made(runs, tmp_path):
    notebook = sweep_plan.Notebook(ROOT / "notebooks/05_iql_benchmark.ipynb")
    kinds = [[kind for kind, *_ in wants(notebook, "agent: [iql, td3_bc]", f"denoiser: {d}")] for d in ("auto", tmp_path / "x")]
    assert kinds[0] == ["data", "denoiser", "world model", "point", "point"]
    assert kinds[1] == ["data", "world model", "point", "point"]


@pytest.mark.parametrize(("function", "kind"), sweep_shared.MAKERS.items())
def test_the_settings_of_a_maker_are_those_that_its_function_reads(function, kind):
    tree = ast.parse(inspect.getsource(getattr(pipeline, function)))
    attributes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
    read = {n.attr for n in attributes if n.value.id == "p"}
    if kind == "data":
        read = set(inspect.signature(pipeline.load_data).parameters) - {"progress", "say"} | {"data_steps"}
        read.remove("steps")  # is p.data_steps
    else:
        read |= {*sweep_shared.DATA, "device"}
    assert set(sweep_shared.SHARED[kind][1]) == read


def test_what_the_library_keeps_is_common_or_the_points_own():
    code = "\n".join(p.read_text() for p in (ROOT / "pgdlib").glob("*.py") if not p.name.startswith("sweep"))
    folders = set(re.findall(r'store\.root\(\) / "(\w+)"', code))
    assert folders - set(sweep_task.COMMON) == {"figures", "results", "films"}
    assert set(sweep_task.COMMON) <= folders


# The order of the run


class Fake:
    """A pool whose tasks end as `outcomes` says, name -> list of statuses; all others well. One look at it ends one task."""

    def __init__(self, outcomes=None, workers=2):
        self.outcomes, self.workers, self.running, self.started, self.stopped = outcomes or {}, workers, [], [], False

    @property
    def free(self):
        return len(self.running) < self.workers

    def start(self, task):
        self.started.append(task.name)
        self.running.append(task)

    def ended(self):
        if not self.running:
            return []
        task = self.running.pop(0)
        status = self.outcomes.get(task.name, [0]).pop(0) if self.outcomes.get(task.name) else 0
        (task.folder / "log.txt").write_text("Traceback\nso it was\n")
        if status == 0:
            (task.folder / "done.json").write_text(json.dumps({**vars(task), "seconds": 60.0}))
        return [(task.key, status, "killed" if status < 0 else "")]

    def stop(self):
        self.stopped = True


def task(name, *needs, kind="point"):
    return sweep_plan.Task(name, kind, name, {"scale": "ci"}, {}, "toy", [], {}, list(needs))


def go(tasks, pool, retries=2):
    said = []
    console = sweep.Console(file=open(os.devnull, "w"))  # noqa: SIM115
    failed = sweep_run.Run(tasks, sweep_run.History(tasks), console, said.append).go(lambda: pool, retries)
    assert pool.stopped
    return failed, said


def test_tasks_start_when_what_they_need_is_done(runs):
    pool = Fake(workers=3)
    failed, said = go([task("maker"), task("a", "maker"), task("b"), task("c", "a", "b")], pool)
    assert not failed and pool.started == ["maker", "b", "a", "c"]
    assert said[-1].startswith("done    c") and "4 of 4 done" in said[-1]
    left = [re.search("about (.*) left", line)[1] for line in said[:-1]]  # each takes 60 s; at most two can run at once
    assert left == ["60 s", "60 s", "60 s"]


def test_a_failure_stops_only_what_needs_it(runs):
    pool = Fake({"maker": [1]})
    failed, _ = go([task("maker"), task("a", "maker"), task("b"), task("c", "a")], pool)
    assert pool.started == ["maker", "b"] and set(failed) == {"maker", "a", "c"}
    assert "so it was" in failed["maker"][1] and failed["a"][1] == "  not run: maker failed"


def test_a_lost_task_is_run_again_but_not_for_ever_and_a_failed_one_is_not(runs):
    pool = Fake({"a": [-9, sweep_task.LOST, 0], "b": [-9] * 9, "c": [1, 0]}, workers=1)
    failed, said = go([task("a"), task("b"), task("c")], pool)
    assert pool.started == ["a"] * 3 + ["b"] * 3 + ["c"] and set(failed) == {"b", "c"}
    assert "killed" in failed["b"][1] and sum(line.startswith("again") for line in said) == 4


def test_costs_are_those_of_the_tasks_most_alike(runs):
    def ran(name, seconds, **settings):
        one = task(name)
        one.settings |= settings
        one.prepare()
        (one.folder / "done.json").write_text(json.dumps({**vars(one), "seconds": seconds}))

    for i, (seconds, samples) in enumerate([(10, 8), (20, 8), (30, 8), (999, 256)]):
        ran(f"old {i}", seconds, samples=samples, seed=i)
    new, other, foreign = task("new"), task("other"), task("foreign", kind="data")
    new.settings |= {"samples": 8, "seed": 9}
    other.settings["scale"] = "paper"
    history = sweep_run.History([new])
    assert (history.seconds(new), history.seconds(other), history.seconds(foreign)) == (20, None, None)
    assert list(history.plan([new, other])) == [
        "  new: 20 s",
        "  other: unknown",
        "2 to run: 20 s on one worker, and 1 of unknown cost: nothing like them has run yet",
    ]


@pytest.mark.parametrize(
    ("cores", "workers", "points", "shares"),
    [(8, 3, 99, [2, 2, 2]), (4, None, 99, [1] * 4), (4, None, 2, [2, 2]), (2, 3, 99, [1, 1, 1])],
)
def test_workers_share_the_cores(monkeypatch, cores, workers, points, shares):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(10, 10 + cores)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    pool = sweep_pools.Local(workers, points)
    assert [len(s) for s in pool.slots] == shares and pool.threads == shares[0]
    used = [core for slot in pool.slots for core in slot]
    assert set(used) <= set(range(10, 10 + cores)) and max(map(used.count, used)) == -(-sum(shares) // cores)
    assert sweep_pools.environment(pool.threads)["OMP_NUM_THREADS"] == str(shares[0])
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert sweep_pools.environment(pool.threads)["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (150, "2 min"), (3 * 3600 + 65, "3 h 01 min")])
def test_times_are_for_people(seconds, text):
    assert sweep_run.words(seconds) == text


# The outcome


def done(name, tables, **settings):
    """A point that is done, with `tables`, path -> text."""
    one = task(name)
    one.settings |= settings
    one.identity = {"code": "c0de"}
    one.prepare()
    for path, text in tables.items():
        (one.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (one.folder / path).write_text(text)
    card = {**vars(one), "seconds": 2.5, "threads": 1, "versions": {"git": "abc", "torch": "2.0"}}
    (one.folder / "done.json").write_text(json.dumps(card))
    return one


def test_all_rows_of_all_points_are_in_one_tidy_file(runs, tmp_path):
    claims = {"C1": {"effect": 1.5, "verdict": "partly"}, "C2": {"effect": None, "verdict": "reproduced"}}
    first = {
        "figures/ci/04_a_standin-human.csv": "lam,y\n0,1.5\n1,2.5\n",
        "results/ci/claims_standin-human.json": json.dumps(claims),
        "results/ci/one.json": '{"y": 7}',
        "figures/ci/04_a_standin-human.png": "no table",
    }
    tasks = [
        done("a", first, lam="auto", lams=[1, 2], gone=None),
        done("b", {"results/05_t_d4rl-expert_5seeds.csv": "y\n3\n"}, lam=2),
    ]
    tasks += [done("nothing", {}, lam=0.5), task("not done")]
    sweep_results.write(sweep_results.gather(tasks), path := tmp_path / "out" / "x.parquet")
    frame = pd.read_parquet(path)
    assert kept(path.parent) == ["x.parquet"]
    shown = frame[["run.point", "run.table", "run.row", "run.data", "p.lam", "lam", "y", "effect"]]
    assert shown.astype(object).where(shown.notna(), None).to_numpy().tolist() == [
        ["a", "04_a", 0, "standin-human", "auto", 0, 1.5, None],
        ["a", "04_a", 1, "standin-human", "auto", 1, 2.5, None],
        ["a", "claims", 0, "standin-human", "auto", None, None, 1.5],
        ["a", "claims", 1, "standin-human", "auto", None, None, None],
        ["a", "one", 0, None, "auto", None, 7, None],
        ["b", "05_t_5seeds", 0, "d4rl-expert", "2", None, 3, None],
        ["nothing", None, 0, None, "0.5", None, None, None],
    ]
    assert (frame["run.seconds"] == 2.5).all() and set(frame["run.git"]) == {"abc"} and set(frame["run.code"]) == {"c0de"}
    assert frame["p.lams"][0] == "[1, 2]" and frame["p.gone"].isna().all()


def test_a_file_that_cannot_be_written_leaves_the_old_one(runs, tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    sweep_results.write(pd.DataFrame({"a": [1]}), path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        sweep_results.write(pd.DataFrame({"a": [2]}), path)
    assert pd.read_parquet(path)["a"].tolist() == [1] and kept(tmp_path) == ["x.parquet"]


def test_a_sweep_is_read_by_its_path_or_as_the_newest(runs, tmp_path):
    files = [("old", "04", "ci"), ("new", "04", "ci"), ("paper", "04", "paper"), ("other", "02", "ci")]
    for i, (name, table, scale) in enumerate(files):
        path = runs / "points" / f"{name}.parquet"
        sweep_results.write(pd.DataFrame({"run.table": [table], "p.scale": [scale]}), path)
        os.utime(path, (i, i))
    found = [sweep_results.read("newest", *which)[0].stem for which in (("04", "ci"), ("04", "paper"), ("02", "ci"))]
    assert found == ["new", "paper", "other"]
    assert sweep_results.read(str(path), "02", "quick")[1]["run.table"].tolist() == ["02"]
    wrong = {
        "newest": "is not allowed: runs/ has no sweep at scale 'quick' with the table 04",
        path: "has no table 04; it has 02",
    }
    wrong |= dict.fromkeys((tmp_path / "none.parquet", Path(__file__)), "is not a file that a sweep has written: ")
    for given, message in wrong.items():
        with pytest.raises(ValueError) as refused:
            sweep_results.read(given, "04", "quick")
        assert str(refused.value).startswith(f"sweep={str(given)!r} {message}")


def test_a_table_may_be_named_by_its_beginning(runs):
    path = runs / "points" / "x.parquet"
    sweep_results.write(pd.DataFrame({"run.table": ["table1_iql_5seeds", None, "04"], "p.scale": "ci", "y": [1, 2, 3]}), path)
    _, frame = sweep_results.read("newest", "table1_", "ci", "benchmark")
    assert sweep_results.table(frame, "table1_", y="y")["y"].tolist() == [1]
    with pytest.raises(
        ValueError, match="benchmark='newest' is not allowed: runs/ has no sweep at scale 'ci' with the table 1_"
    ):
        sweep_results.read("newest", "1_", "ci", "benchmark")


def test_gains_are_paired_by_agent_within_each_run():
    """Two runs, the second without its first agent's world-model row; the third has no baseline at all."""
    rows = []
    for seed, base, world in ((0, [100, 200, 600], [101, 203, 605]), (1, [10, 20, 30], [math.nan, 120, 132])):
        for row, values in (("λ = 0", base), ("world", world)):
            rows += [("human", row, seed, 1_000 * seed + i, value) for i, value in enumerate(values)]
    rows += [("cloned", "world", 0, 0, 5.0)]
    returns = pd.DataFrame(rows[::-1], columns=["dataset", "row", "seed", "agent", "value"])  # in any order
    found = sweep_results.gains(returns, "λ = 0").sort_values("seed")
    assert found[["dataset", "row", "seed", "agents"]].to_numpy().tolist() == [
        ["human", "world", 0, 3],
        ["human", "world", 1, 2],
    ]
    for (_, row), differences in zip(found.iterrows(), ([1, 3, 5], [100, 102])):
        low, high = stats.t.interval(0.95, len(differences) - 1, np.mean(differences), stats.sem(differences))
        assert row[["gain", "low", "high"]].tolist() == pytest.approx([np.mean(differences), low, high])
    with pytest.raises(ValueError, match="and seed=0 have several runs"):
        sweep_results.gains(pd.concat([returns, returns[returns["seed"] == 0]]), "λ = 0")


def test_means_over_seeds_have_students_interval():
    rows = [("a", 0, 1.0), ("a", 1, 2.0), ("a", 2, 6.0), ("a", 2, 8.0), ("b", 0, 5.0)]  # a's last seed twice, 7 in the mean
    study = sweep_results.over_seeds(pd.DataFrame(rows, columns=["rule", "seed", "y"]), ["rule"], ["y"])
    assert study[["rule", "seeds", "y.mean"]].to_numpy().tolist() == [["a", 3, 10 / 3], ["b", 1, 5]]
    low, high = stats.t.interval(0.95, 2, 10 / 3, stats.sem([1, 2, 7]))
    assert study[["y.low", "y.high"]].to_numpy()[0].tolist() == pytest.approx([low, high])
    assert study[["y.low", "y.high"]].iloc[1].isna().all()


def test_the_rows_of_a_table_are_taken_once_under_other_names():
    frame = pd.DataFrame({"run.table": ["a", "a", "b", "a"], "p.seed": [0, 0, 0, 1], "y": [1, 1, 2, 3], "rest": [1, 2, 3, 4]})
    rows = sweep_results.table(frame, "a", seed="p.seed", value="y")
    assert rows.columns.tolist() == ["seed", "value"] and rows.to_numpy().tolist() == [[0, 1], [1, 3]]


# Its figures


def study():
    """Two rules on two datasets; the first rule falls, and then diverges, past its third λ."""
    rows = []
    for dataset, shift in (("human", 0.0), ("cloned", 1.0)):
        for rule, last in (("explicit", -500.0), ("annealed", 0.0)):
            for lam, x in zip((0.0, 0.1, 1.0, 3.0), (-2.0, -1.0, -0.5, last)):
                y = 0.1 * (1 + lam) + shift
                row = [dataset, rule, lam, x, x - 0.1, x + 0.1, *((math.nan,) * 3 if x < -9 else (y, y - 0.05, y + 0.05))]
                rows.append(row)
    names = [f"{m}.{k}" for m in ("log_likelihood", "relative") for k in ("mean", "low", "high")]
    return pd.DataFrame(rows, columns=["dataset", "rule", "lam", *names])


@pytest.mark.usefixtures("style")
def test_fronts_show_every_mean_up_to_where_the_likelihood_falls():
    fig = drawn(figures.sweep, "fronts", study())
    assert_labelled(fig, ["log-likelihood"] * 2)
    assert {"human", "cloned", "explicit", "annealed", "λ = 0"} <= set(texts(fig))
    for ax, shift in zip(fig.axes, (0.0, 1.0)):
        assert np.allclose(line(ax, "annealed")[:, 1], np.array([0.1, 0.11, 0.2, 0.4]) + shift)
        assert line(ax, "explicit")[:, 0].tolist() == [-2, -1, -0.5]
        assert np.allclose(line(ax, "λ = 0"), [[-2, 0.1 + shift]])


def at_likelihood():
    rows = [("human", "explicit", -2.0, 1.1), ("human", "explicit", -0.4, 0.9), ("cloned", "explicit", -2.0, 1.2)]
    rows += [("cloned", "explicit", -0.4, 1.0), ("cloned", "smoothed", -2.0, 1.5)]
    table = pd.DataFrame(rows, columns=["dataset", "rule", "log_likelihood", "ratio.mean"])
    return table.assign(**{"ratio.low": table["ratio.mean"] - 0.1, "ratio.high": table["ratio.mean"] + 0.2})


@pytest.mark.usefixtures("style")
def test_at_likelihood_shows_a_mark_with_its_interval_for_each_rule():
    fig = figures.sweep.at_likelihood(at_likelihood(), "annealed", "A study")
    fig.canvas.draw()
    assert {"human", "cloned", "explicit", "smoothed", "-2 nats", "-0.4 nats"} <= set(texts(fig))
    for ax, marks in zip(fig.axes, ({-2: [1.1], -0.4: [0.9]}, {-2: [1.2, 1.5], -0.4: [1.0]})):
        assert "error / that of annealed" in ax.get_xlabel()
        for container in ax.containers:
            level = float(container.get_label().split()[0])
            assert container[0].get_xdata().tolist() == marks[level]
            assert np.allclose(np.round(container[0].get_ydata()), range(len(marks[level])))
            ends = np.array(container[2][0].get_segments())[:, :, 0]
            assert np.allclose(ends, np.array(marks[level])[:, None] + [-0.1, 0.2])


def gains():
    """Two rows of two runs each on human, one row of one run on cloned."""
    rows = [
        ("human", "guided", 0, 50.0),
        ("human", "guided", 1, 150.0),
        ("human", "world", 0, -10.0),
        ("human", "world", 1, -30.0),
    ]
    runs = pd.DataFrame([*rows, ("cloned", "world", 0, 7.0)], columns=["dataset", "row", "seed", "gain"])
    return runs.assign(low=runs["gain"] - 20, high=runs["gain"] + 25)


@pytest.mark.usefixtures("style")
def test_gains_show_each_run_their_mean_and_the_papers():
    means = sweep_results.over_seeds(gains(), ["dataset", "row"], ["gain"])
    fig = drawn(figures.sweep, "gains", gains(), means, {"human": 216})
    assert {"human", "cloned", "guided", "world", "mean over runs", "the paper's gain"} <= set(texts(fig))
    assert_labelled(fig, ["return less that of unguided"] * 2)
    for ax, runs, mean in zip(fig.axes, ({50, 150, -10, -30}, {7}), ([100, -20], [7])):
        drawn_runs = [c for c in ax.containers if c.get_label().startswith("one run")]
        assert {x for c in drawn_runs for x in c[0].get_xdata()} == runs
        for c in drawn_runs:
            ends = np.array(c[2][0].get_segments())[:, :, 0]
            assert ends.tolist() == [[x - 20, x + 25] for x in c[0].get_xdata()]
        (over,) = [c for c in ax.containers if c.get_label() == "mean over runs"]
        assert over[0].get_xdata().tolist() == mean
        rows = [fig.axes[0].get_yticklabels()[round(y)].get_text() for y in over[0].get_ydata()]
        assert rows == (["guided", "world"] if len(mean) == 2 else ["world"])
    assert line(fig.axes[0], "the paper's gain")[:, 0].tolist() == [216, 216]
    assert "the paper's gain" not in {artist.get_label() for artist in fig.axes[1].lines}


@pytest.mark.usefixtures("style")
def test_over_lam_shows_both_measures_and_what_is_unguided():
    fig = drawn(figures.sweep, "over_lam", study())
    assert_labelled(fig, ["λ, in each rule's own sense"] * 2)
    above, below = fig.axes[0], fig.axes[2]
    assert np.allclose(line(above, "explicit"), [[0.1, -1], [1, -0.5], [3, -500]])
    assert np.allclose(line(below, "annealed"), [[0.1, 0.11], [1, 0.2], [3, 0.4]])
    assert above.get_ylim()[0] > -3 and above.get_ylim()[1] > 0  # what diverged does not decide what is seen
    band = above.collections[1].get_paths()[0].vertices
    assert np.isclose(band[:, 1].max(), 0.1) and np.allclose(line(above, "λ = 0")[:, 1], -2)


@pytest.mark.slow
@pytest.mark.usefixtures("style")
@pytest.mark.parametrize("figure", ["fronts", "over_lam"])
def test_one_seed_and_nothing_but_nan_can_be_drawn(figure):
    frame = study()
    frame.loc[:, [c for c in frame if c.endswith(("low", "high"))]] = math.nan  # one seed has no interval
    drawn(figures.sweep, figure, frame)
    frame[["log_likelihood.mean", "relative.mean"]] = math.nan
    drawn(figures.sweep, figure, frame)
    table = at_likelihood().assign(**{"ratio.low": math.nan, "ratio.high": math.nan})
    figures.sweep.at_likelihood(table, "annealed", "One seed").canvas.draw()
    one = gains().drop_duplicates(["dataset", "row"]).assign(low=math.nan, high=math.nan)
    drawn(figures.sweep, "gains", one, sweep_results.over_seeds(one, ["dataset", "row"], ["gain"]), {})


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "'0' is not allowed; it must be a whole number of at least 1"),
        (["--gpus", "0.5"], "--address, --cpus and --gpus are of --backend ray"),
        (["--backend", "slurm"], "invalid choice: 'slurm'"),
        (["--retries", "-1"], "--retries at least 0"),
    ],
)
def test_a_wrong_argument_is_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as refused:
        sweep.main(["toy.ipynb", *arguments])
    assert refused.value.code == 2 and message in capsys.readouterr().err


def test_a_wrong_value_starts_nothing(toy, tmp_path, capsys, runs):
    assert sweep.main([str(tmp_path / "toy.ipynb"), "-y", "x: [-1]"]) == 2
    assert "parameter x=-1 is not allowed" in capsys.readouterr().err and not runs.exists()


def test_without_ray_its_backend_says_how_to_install_it(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert sweep.main([str(tmp_path / "toy.ipynb"), "--backend", "ray"]) == 2
    assert "pip install -e '.[cluster]'" in capsys.readouterr().err


def test_a_dry_run_shows_the_plan_and_runs_nothing(toy, tmp_path, capsys, runs):
    assert sweep.main([str(tmp_path / "toy.ipynb"), "-y", "x: [1, 2]", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "toy: 2 points, 0 of them are done\n  x=1: unknown\n  x=2: unknown\n2 to run" in told and not runs.exists()


def command(path, *arguments, **environment):
    """The finished process of a sweep, as a user starts it."""
    call = [sys.executable, "-m", "pgdlib.lab.sweep.sweep", str(path), *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(call, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300, check=False)


@pytest.mark.notebook
def test_a_sweep_from_end_to_end(toy, tmp_path, runs):
    path, out = tmp_path / "toy.ipynb", tmp_path / "out.parquet"
    first = command(path, "-y", "x: [1, 2, 3]", "--workers", "2", "--out", str(out))
    assert first.returncode == 1 and "2 of 3 points, 4 rows" in first.stdout
    told = first.stdout.split("FAILED x=3:")[1]
    assert "notebook.ipynb" in told and "AssertionError: three is bad" in told
    frame = pd.read_parquet(out).sort_values(["p.x", "run.row"])
    assert frame[["p.x", "x", "square"]].to_numpy().tolist() == [[1, 1, 1], [1, -1, 1], [2, 2, 4], [2, -2, 4]]
    assert set(frame["run.data"]) == {"standin-human"} and set(frame["run.table"]) == {"square"}
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("done.json")}
    assert len(before) == 2
    again = command(path, "-y", "x: [1, 2, 4]", "--out", str(out))
    assert again.returncode == 0 and "3 points, 2 of them are done" in again.stdout and again.stdout.count("done    ") == 1
    assert {p: p.stat().st_mtime_ns for p in before} == before and set(pd.read_parquet(out)["p.x"]) == {1, 2, 4}
    failed = next(p for p in runs.rglob("task.json") if json.loads(p.read_text())["settings"]["x"] == 3).parent
    assert (failed / "notebook.ipynb").exists() and not (failed / "done.json").exists()


@pytest.mark.notebook
def test_code_that_changed_since_the_plan_is_not_run(toy, tmp_path, runs):
    toy.keep()
    (one,) = planned(toy)
    one.identity = {**one.identity, "code": "another"}
    one.prepare()
    call = [sys.executable, "-m", "pgdlib.lab.sweep.sweep_task", str(one.folder), str(os.getpid())]
    ran = subprocess.run(call, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and "code differ from those that the sweep was planned with: start it again" in ran.stderr
    assert not (one.folder / "done.json").exists()


def listening(pid):
    """The addresses, as the kernel writes them, on which a process or one that it has started listens (TCP)."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    sockets = set()
    for folder in (Path(f"/proc/{one}/fd") for one in family):
        with contextlib.suppress(OSError):
            sockets |= {os.readlink(fd) for fd in folder.iterdir()}
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets}


@pytest.mark.notebook
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
def test_a_sweep_on_ray_runs_and_listens_on_the_loopback_interface_alone(toy, tmp_path, runs):
    pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[cluster]'")
    arguments = ["-y", "x: [1, 2, 3]", "--backend", "ray", "--workers", "2", "--out", str(tmp_path / "out.parquet")]
    call = [sys.executable, "-m", "pgdlib.lab.sweep.sweep", str(tmp_path / "toy.ipynb"), *arguments]
    process = subprocess.Popen(call, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    found = set()
    while process.poll() is None:
        found |= listening(process.pid)
        time.sleep(1)
    told = process.stdout.read()
    assert process.returncode == 1 and "three is bad" in told and "2 of 3 points, 4 rows" in told
    assert sorted(pd.read_parquet(tmp_path / "out.parquet")["square"]) == [1, 1, 4, 4]
    loopback = {"0100007F", "0" * 16 + "FFFF00000100007F", "0" * 24 + "01000000"}  # IPv4, the same in IPv6, IPv6
    assert found and found <= loopback


@pytest.mark.notebook
def test_a_ray_cluster_that_is_not_there_is_an_error_and_no_traceback(toy, tmp_path, runs):
    pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[cluster]'")
    refused = command(tmp_path / "toy.ipynb", "--backend", "ray", "--address", "127.0.0.1:1")
    assert refused.returncode == 2 and "Ray cannot be reached at 127.0.0.1:1: " in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.notebook
def test_notebook_07_draws_the_sweep_that_came_with_it(tmp_path, runs):
    call = [
        sys.executable,
        "-m",
        "papermill",
        "-k",
        "python3",
        str(ROOT / "notebooks/07_sweep.ipynb"),
        str(tmp_path / "out.ipynb"),
    ]
    subprocess.run([*call, "-p", "scale", "ci"], check=True, stdin=subprocess.DEVNULL, capture_output=True)
    names = ("fronts.csv", "fronts.png", "gains.csv", "gains.png", "lam.png", "rules.csv", "rules.png")
    assert kept(runs) == [f"figures/ci/07_{name}" for name in names]
    table = pd.read_csv(runs / "figures/ci/07_fronts.csv")
    shipped = pd.read_parquet(ROOT / "figures/07_sweep.parquet")
    shipped = shipped[shipped["run.table"] == "04_fronts"]
    assert set(table["dataset"]) == set(shipped["run.data"]) and set(table["rule"]) == set(shipped["rule"])
    assert (table["seeds"] == shipped["p.seed"].nunique()).all() and len(table) > 80
    where = shipped[(shipped["rule"] == "annealed") & (shipped["run.data"] == "standin-human")].set_index("p.seed")
    ratios = where["normalised.mean"][where["lam"] == 0.1] / where["normalised.mean"][where["lam"] == 0]
    row = table[(table["rule"] == "annealed") & (table["lam"] == 0.1) & (table["dataset"] == "standin-human")]
    assert float(row["relative.mean"].iloc[0]) == pytest.approx(ratios.mean())
    gains = pd.read_csv(runs / "figures/ci/07_gains.csv").set_index(["dataset", "row"])["gain.mean"]
    shipped = pd.read_parquet(ROOT / "figures/07_table1.parquet")
    each = shipped[shipped["run.table"] == "table1_iql_5seeds"].groupby(["run.data", "row"])["d4rl_return"].mean()
    assert len(gains) == 10
    for (dataset, row), gain in gains.items():  # no agent was lost, so differences of means are means of differences
        assert gain == pytest.approx(each[dataset, row] - each[dataset, "IQL, unguided (λ = 0)"])
    wrong = subprocess.run(
        [*call, "-p", "sweep", "newest"], check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert wrong.returncode and "sweep='newest' is not allowed: runs/ has no sweep at scale 'quick'" in wrong.stderr
