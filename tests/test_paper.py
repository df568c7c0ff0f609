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
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(paper, "ROOT", tmp_path)
    monkeypatch.setattr(paper, "ORDER", ["one", "two"])
    monkeypatch.setattr(paper, "LAST", ["last"])
    monkeypatch.setattr(paper.adroit, "default_threads", lambda: 6)
    (tmp_path / "notebooks").mkdir()
    for name in ("one", "two", "last"):
        write(tmp_path, name, SLEEPY)
    return tmp_path


def write(place, name, source):
    nbformat.write(new_notebook(cells=[new_code_cell(source)], metadata=promote.METADATA), place / f"notebooks/{name}.ipynb")


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
    assert told.count(" took ") == 4 and told.strip().endswith("figures/quick/")


def test_a_chosen_one_has_all_cores(place):
    assert paper.main(["two"]) == 0
    assert ran(place, "two")[0] == 6 and not (place / "runs/notebooks/one.ipynb").exists()


def test_at_papers_scale_none_has_company(place):
    for name in ("one", "two"):
        notebook = nbformat.read(place / f"notebooks/{name}.ipynb", 4)
        notebook.cells.insert(0, new_code_cell("scale = 'quick'", metadata={"tags": ["parameters"]}))
        nbformat.write(notebook, place / f"notebooks/{name}.ipynb")
    assert paper.main(["--scale", "paper", "one", "two"]) == 0
    one, two = ran(place, "one"), ran(place, "two")
    assert one[2] < two[1] and (one[0], two[0]) == (6, 6)


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
    assert "'07_other' is not known; it must be one of 01_data" in capsys.readouterr().err
