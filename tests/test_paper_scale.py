"""The pipeline in slices: to the same results as in one go, whenever it is stopped."""

import json

import pandas as pd
import pytest
import torch
from conftest import kept

from benchmarks import paper_scale
from pgdlib.lab import artifacts, study

FLAGS = "--scale ci --dataset human --source local --samples 40 --features 8 --train-steps 9 --steps 3 --warmup 1 --lams [1.0]"
FLAGS += " --seeds 2 --test-episodes 2"

pytestmark = pytest.mark.notebook  # slow


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A function that runs slices of so many watched events each until all is done; in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(study, "GRIDS", {"explicit": [1.0], "annealed": [0.1, 0.3]})
    monkeypatch.setattr(study.Study, "most", lambda lab, n: 32)

    def check(part, *_):
        part.events = getattr(part, "events", 0) + 1
        if part.events > limit:
            raise paper_scale.TimeIsUp

    def run(name, events):
        nonlocal limit
        limit = events
        monkeypatch.setenv("PGD_RUNS", str(tmp_path / name))
        slices = []
        while not slices or (slices[-1] == paper_scale.MORE_LEFT and len(slices) < 60):
            slices.append(paper_scale.main([*FLAGS.split(), "--out", str(tmp_path / name / "out")]))
        return slices, tmp_path / name

    limit = 0
    monkeypatch.setattr(paper_scale.Slice, "check", check)
    return run


def test_slices_give_what_one_run_gives(small):
    (once, whole), (slices, parts) = small("whole", 10**9), small("parts", 55)
    assert once == [0] and slices[-1] == 0 and len(slices) > 3 and set(slices[:-1]) == {paper_scale.MORE_LEFT}
    files = [f for f in kept(whole) if f.split("/")[0] in ("sweeps", "denoisers", "agents")]
    assert files == [f for f in kept(parts) if f.split("/")[0] in ("sweeps", "denoisers", "agents")] and len(files) > 5
    for name in files:
        (a, _), (b, _) = (artifacts.load(folder / name) for folder in (whole, parts))
        assert a.keys() == b.keys() and all(torch.equal(v.nan_to_num(), b[k].nan_to_num()) for k, v in a.items()), name
    assert not [f for f in kept(parts) if f.startswith("checkpoints")]
    cards = [json.loads((folder / "out/card.json").read_text()) for folder in (whole, parts)]
    assert cards[0]["claims"] == cards[1]["claims"] and [c["id"][:2] for c in cards[0]["claims"]] == [
        *("C1", "C2", "C2", "C2", "C3", "C5", "C7", "C8", "C9"),
        *("C4", "C4"),
    ]
    assert cards[1]["complete"] and cards[1]["slices"] == len(slices) and cards[1]["data"] == "stand-in pen-human"
    assert {"data", "training", "Figure 1", "front of annealed", "calibration", "claims", "Table 1"} == set(cards[1]["seconds"])
    made = {f.name for f in (parts / "out").iterdir()}
    assert made >= {
        "figure1.png",
        "fronts.png",
        "training.png",
        "sweep_explicit.csv",
        "sweep_annealed.csv",
        "claims.csv",
        "table1.csv",
    }
    assert pd.read_csv(parts / "out/sweep_annealed.csv").lam.tolist() == [0.0, 0.1, 0.3]


def test_bad_arguments_are_named(small, capsys):
    assert paper_scale.main(["--minutes", "soon"]) == 1
    assert "minutes='soon' is not allowed; it must be a number of at least" in capsys.readouterr().err
