"""`make paper`: notebooks side by side, the last one alone, and what happens when one fails."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tools import paper, promote

pytestmark = pytest.mark.notebook  # they start kernels
SLEEPY = "import os, time; print(os.environ['OMP_NUM_THREADS'], time.time()); time.sleep(1.5); print(time.time())"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Three notebooks that tell when they ran, and an empty runs/."""
    monkeypatch.setenv("PGD_RUNS", str(tmp_path / "runs"))
    for name in paper.run.THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(paper, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(paper, "FIRST", ["two"])
    monkeypatch.setattr(paper, "LAST", "last")
    monkeypatch.setattr(paper.run, "CORES", 6)
    for name in ("one", "two", "last"):
        write(tmp_path, name, SLEEPY)
    return tmp_path


def write(place, name, source):
    cells = [new_code_cell("scale = 'quick'", metadata={"tags": ["parameters"]}), new_code_cell(source)]
    nbformat.write(new_notebook(cells=cells, metadata=promote.METADATA), place / f"{name}.ipynb")


def ran(place, name):
    """(threads, when it began, when it ended)"""
    notebook = nbformat.read(place / f"runs/notebooks/{name}.ipynb", 4)
    threads, begun, ended = "".join(o.text for o in notebook.cells[-1].outputs).split()
    return int(threads), float(begun), float(ended)


def test_two_run_side_by_side_and_the_last_alone(place, capsys):
    assert paper.main([]) == 0
    one, two, last = (ran(place, name) for name in ("one", "two", "last"))
    assert max(one[1], two[1]) < min(one[2], two[2]) and max(one[2], two[2]) < last[1]
    assert (one[0], two[0], last[0]) == (3, 3, 6)
    told = capsys.readouterr().out
    assert told.startswith("== two, scale quick, 3 threads\n== one,") and told.count(" is done after ") == 3
    assert told.strip().endswith("figures/quick/")


def test_at_papers_scale_and_chosen_alone_none_has_company(place):
    assert paper.main(["--scale", "paper", "one", "two"]) == 0
    one, two = ran(place, "one"), ran(place, "two")
    assert two[2] < one[1] and (one[0], two[0]) == (6, 6) and not (place / "runs/notebooks/last.ipynb").exists()


def test_one_that_fails_ends_the_rest(place, capsys):
    write(place, "one", "raise ValueError('so it is')")
    write(place, "two", "import time; time.sleep(60)")
    assert paper.main([]) == 1
    told = capsys.readouterr().err
    assert "so it is" in told and "one FAILED" in told
    assert not (place / "runs/notebooks/last.log").exists()


def test_an_unknown_notebook_is_refused(capsys):
    with pytest.raises(SystemExit):
        paper.main(["07_other"])
    assert "'07_other' is not known; it must be one of 03_ppo_guide, 02_diffusion" in capsys.readouterr().err
