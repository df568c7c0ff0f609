"""No result is typed by hand: what a run finds stands in a cell's output or in a block of README that `make figures` writes.

A result is told by its form: a decimal number, a percentage, an interval, `±`, `p =`. What has such a form and yet is no
result is allowed, each by its words.
"""

import json
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pgdlib.lab import settings
from tools import promote, readme

NO_PROSE = re.compile(r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|(?<=\])\([^)\s]*\)|<[^>\n]*>", re.DOTALL)
NUMBER = r"[+−-]?\d[\d,.]*"
TYPED = re.compile(
    rf"(?:{NUMBER} ?)?\[{NUMBER}, ?{NUMBER}\]|(?:{NUMBER} ?)?±|\bp ?[=<>≈] ?{NUMBER}|{NUMBER} ?%|[+−-]?(?<![\w.])\d+\.\d+"
)
ALLOWED = [  # no run can change these
    r"Python 3\.11 to 3\.13",
    r"95% (?:\w+ )?interval",
    r"\bmean ± standard error",
    r"power of 80%|two-sided 5%",
    r"[λσ] = \d\.\d(?!\d)",  # a parameter; what is calibrated has three digits
    r"more than 5%",  # the rule by which 02 chooses a sampler
    r"within 5% of that value",  # how exactly 04 calibrates
    r"more than 0\.41 a step",  # √2 − 1
    r"so 1\.5 stands for the paper's 2",
]


def typed(text):
    """The results in Markdown that no run has written and that are neither code nor mathematics nor an address."""
    return TYPED.findall(re.sub("|".join(ALLOWED), "", NO_PROSE.sub(" ", readme.BLOCK.sub("", text))))


def texts():
    yield "README", (promote.ROOT / "README.md").read_text("utf-8")
    for path in sorted((promote.ROOT / "notebooks").glob("*.ipynb")):
        yield path.stem, "\n\n".join(c.source for c in promote.read(path).cells if c.cell_type == "markdown")


@pytest.mark.parametrize("name", dict(texts()))
def test_no_result_is_typed(name):
    assert typed(dict(texts())[name]) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("is as good (0.98 [0.92, 1.03] times)", ["0.98 [0.92, 1.03]"]),
        ("gains 0 [−67, +68], the other −92 [−195, +11]", ["0 [−67, +68]", "−92 [−195, +11]"]),
        ("returns 1,420 ± 76", ["1,420 ±"]),
        ("better by 5% (p = 0.01)", ["5%", "p = 0.01"]),
        ("up to 1.36 times, at λ = 0.317", ["1.36", "0.317"]),
        ("| IQL | 1.2 |", ["1.2"]),
        ("the mean ± 2", ["±"]),
    ],
)
def test_the_search_finds_what_it_is_for(text, found):
    assert typed(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "95% intervals, 45 observations, 1,024 features, port 6379, in 2024",
        "at λ = 1.5 and σ = 0.1",
        "`-p lam 2.0`, $S = 1.003$, [one](https://arxiv.org/abs/2404.06356)",
        "```\npip install torch==2.13.0\n```",
        "<!-- benchmark: made by `make figures` -->\n| IQL | 1.2 ± 3 |\n\n<!-- end of benchmark -->",
    ],
)
def test_the_search_leaves_what_is_no_result(text):
    assert typed(text) == []


# The blocks


def test_the_readme_is_that_of_the_figures():
    text = dict(texts())["README"]
    assert readme.written(text, promote.ROOT / "figures") == text


SWEEP = {0.0: -2.5, 0.0730548: -0.125, 1.5: 0.00125}  # λ -> all means; intervals are 0.5 to each side


@pytest.fixture
def figures(tmp_path):
    """A folder with all that the blocks are made from."""
    table = pd.DataFrame({"lam": SWEEP.keys()})
    for measure in readme.MEASURES:
        for name, off in {"mean": 0, "low": -0.5, "high": 0.5}.items():
            table[f"{measure}.{name}"] = np.array([*SWEEP.values()]) + off
    for name in ("", "annealed_"):
        table.to_csv(tmp_path / f"04_figure1_{name}toy.csv", index=False)
    runs = [("toy", row, seed, x) for row, xs in RETURNS.items() for seed, x in enumerate(xs)]
    columns = ["dataset", "row", "seed", "d4rl_return"]
    pd.DataFrame(runs, columns=columns).to_csv(tmp_path / "05_table1_iql_toy-human_3seeds.csv", index=False)
    verdict = dict(id="C1", claim="Up", measure="m", effect=1.5, verdict="reproduced", dataset="toy", scale="ci")
    of_task = dict(floor=1e-14, error=0.25, motion=0.5, effect=-1.5, low=[-2.0, np.nan], high=[-1.0, np.nan])
    tasks = pd.DataFrame(dict(variant=["toy", "other"], id=["C1", "C9"], verdict="partly") | of_task)
    tasks.to_csv(tmp_path / "07_claims.csv", index=False)
    results = tmp_path / "results"
    results.mkdir()
    (results / "claims_toy.json").write_text(json.dumps({"C1": verdict}))
    (results / "floors_toy.json").write_text(json.dumps({measure: [1.25, 0.5, 2] for measure in readme.MEASURES}))
    (results / "findings_04_toy.json").write_text(json.dumps(["It rises by 2.", "It falls."]))
    readme.gather(results, tmp_path)
    return tmp_path


RETURNS = {"IQL, unguided (λ = 0)": [1000.0, 1200.0, 1100.0], "IQL, guided": [900.0, 1150.0, 1300.0]}


def blocks(figures):
    return {name: block(figures) for name, block in readme.BLOCKS.items()}


def test_blocks_hold_the_numbers_of_their_files(figures):
    made = blocks(figures)
    assert "| C1 | Up | m | 1.5 | reproduced |" in made["claims"] and "On toy, scale `ci`" in made["claims"]
    assert made["findings"] == "* It rises by 2.\n* It falls."
    assert "| 1e-14 | 1e-14 |" in made["by_task"] and "| C9 |  | −1.5, partly |" in made["by_task"]
    assert "| C1 | −1.5 [−2, −1], partly |  |" in made["by_task"]
    first, *_, last = [line.split(" | ")[:2] for line in made["guidance"].splitlines()[4:]]
    assert first == ["| real data (the floor)", "1.25 [0.500, 2.00]"]
    assert last == ["| the paper's rule: λ = 1.5", "0.00125 [−0.499, 0.501]"]
    assert "| annealed, calibrated: λ = 0.0731 | −0.125 [−0.625, 0.375]" in made["guidance"]


def test_a_gain_has_the_interval_of_the_paired_t_test(figures):
    gains = np.subtract(*reversed(RETURNS.values()))
    half = stats.t.ppf(0.975, 2) * gains.std(ddof=1) / np.sqrt(3)
    expected = f"{gains.mean():+,.0f} [{gains.mean() - half:+,.0f}, {gains.mean() + half:+,.0f}]".replace("-", "−")
    assert f"| IQL, guided | 1,117 ± 117 | {expected} |" in blocks(figures)["benchmark"]


def test_the_table_of_parameters_is_that_of_the_check():
    """What it says of each is what a notebook takes, and the words of a refusal."""
    head, _, *rows = [line.strip("| ").split(" | ") for line in readme.parameters(None).splitlines()]
    known = settings.PARAMETERS | settings.SETTINGS
    assert [row[0].strip("`") for row in rows] == list(known) and head[3:] == list(settings.SCALES)
    for name, _, allowed, *values in (row for row in rows if len(row) == len(head)):
        with pytest.raises(ValueError, match=re.escape(allowed.replace("2³² − 1", "4294967295"))):
            settings.check({"scale": "ci", name.strip("`"): object()})
        taken = [str(vars(settings.check({"scale": scale}))[name.strip("`")]) for scale in settings.SCALES]
        assert [value.replace(",", "") for value in values] == taken
    assert sum(len(row) == len(head) for row in rows) == len(settings.SETTINGS)


def test_other_files_are_another_readme_and_a_missing_mark_is_an_error(figures):
    text = dict(texts())["README"]
    other = readme.written(text, figures)
    assert "It rises by 2." in other and readme.written(other, promote.ROOT / "figures") == text
    for mark in ("<!-- end of claims -->", "<!-- guidance: made by `make figures` -->"):
        with pytest.raises(ValueError, match="it must have each of"):
            readme.written(text.replace(mark, ""), figures)
