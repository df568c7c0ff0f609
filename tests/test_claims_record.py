"""The record of claims and verdicts, and its table."""

import json
import math
import multiprocessing
import pathlib

import numpy as np
import pytest

from pgdlib.lab import claims
from pgdlib.lab.claims import NOT, PARTLY, UNTESTED, Claim


def some(id="C2 a", effect=1.5, verdict=PARTLY, high=2.0):
    return Claim(id, "measure", effect, 1.0, high, verdict, "rule")


def strict(path):
    """The file, which must be JSON in the narrow sense."""

    def refuse(word):
        raise ValueError(f"{word} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_a_record_is_read_back(runs):
    path = claims.record([some("C3 λ", np.float64(0.5)), some("C1")], "stand-in pen-toy", "standin-toy", "ci")
    assert path == runs / "results" / "ci" / "claims_standin-toy.json"
    rows = claims.load(path)
    assert rows == strict(path) and list(rows) == ["C1", "C3 λ"]
    assert rows["C3 λ"] == dict(
        id="C3 λ",
        measure="measure",
        effect=0.5,
        low=1.0,
        high=2.0,
        verdict=PARTLY,
        rule="rule",
        claim=claims.CLAIMS["C3"],
        dataset="stand-in pen-toy",
        scale="ci",
    )
    assert "λ" in path.read_text(encoding="utf-8")
    assert claims.load(runs / "nothing.json") == {}


def test_a_claim_is_replaced_by_its_id_and_others_stay(runs):
    path = claims.record([some("C2 a"), some("C2 b"), some("C6")], "toy", "toy", "ci")
    before = claims.load(path)
    assert claims.record([some("C2 b", 7.0, NOT), some("C9")], "toy, once more", "toy", "ci") == path
    after = claims.load(path)
    assert list(after) == ["C2 a", "C2 b", "C6", "C9"]
    assert after["C2 a"] == before["C2 a"] and after["C6"] == before["C6"]
    assert (after["C2 b"]["effect"], after["C2 b"]["verdict"], after["C2 b"]["dataset"]) == (7.0, NOT, "toy, once more")
    assert not [f for f in path.parent.iterdir() if "partial" in f.name]


def test_scales_and_datasets_have_records_of_their_own(runs):
    for i, (slug, scale) in enumerate((("a", "ci"), ("b", "ci"), ("a", "quick"))):
        claims.record([some(effect=i)], "toy", slug, scale)
    found = [claims.load(runs / "results" / f"{name}.json") for name in ("ci/claims_a", "ci/claims_b", "quick/claims_a")]
    assert [rows["C2 a"]["effect"] for rows in found] == [0, 1, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_what_is_not_finite_is_null(runs, bad):
    path = claims.record([some("C9", 0.5, high=bad), some("C3", bad)], "toy", "toy", "ci")
    rows = strict(path)
    assert rows["C9"]["high"] is None and rows["C3"]["effect"] is None and rows["C9"]["effect"] == 0.5
    claims.record([some("C1")], "toy", "toy", "ci")  # null stays null
    assert strict(path)["C3"] == rows["C3"]


def test_an_interrupted_record_leaves_the_old_one(runs, monkeypatch):
    path = claims.record([some()], "toy", "toy", "ci")
    before = path.read_bytes()
    with pytest.raises(TypeError):
        claims.record([some("C1", effect=object())], "toy", "toy", "ci")
    with pytest.raises(KeyError):
        claims.record([some("C11")], "toy", "toy", "ci")

    def half(self, text, **how):
        with open(self, "w") as f:
            f.write(text[:20])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pathlib.Path, "write_text", half)
        claims.record([some("C1")], "toy", "toy", "ci")
    assert path.read_bytes() == before and not [f for f in path.parent.iterdir() if "partial" in f.name]
    claims.record([some("C1")], "toy", "toy", "ci")  # the lock is free again
    assert list(claims.load(path)) == ["C1", "C2 a"]


def write_many(letter):
    for i in range(25):
        claims.record([some(f"C2 {letter}{i:02}", i)], "toy", "toy", "ci")


def test_processes_that_record_at_once_lose_nothing(runs):
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=write_many, args=(letter,)) for letter in "ab"]
    for one in both:
        one.start()
    for one in both:
        one.join(60)
    rows = claims.load(runs / "results" / "ci" / "claims_toy.json")
    assert list(rows) == [f"C2 {letter}{i:02}" for letter in "ab" for i in range(25)]


def test_findings_are_kept_and_shown(runs):
    """Where the next run of the same cell puts its own."""
    for sentences in (["a long one", "another"], ["λ = 0.3 is enough"]):
        shown = claims.note("guidance", sentences, "toy", "ci")
        assert strict(runs / "results" / "ci" / "findings_guidance_toy.json") == sentences
    assert shown.data == "* λ = 0.3 is enough"


# The table


def recorded(*given):
    return claims.load(claims.record(given, "toy", "toy", "ci"))


def test_every_claim_has_a_row(runs):
    empty = claims.table({})
    assert [(r[""], r["claim"]) for r in empty] == list(claims.CLAIMS.items())
    assert {(r["measure"], r["effect"], r["verdict"]) for r in empty} == {("", "", "not measured yet")}
    full = claims.table(recorded(*(some(name, verdict=UNTESTED) for name in reversed(claims.CLAIMS))))
    assert [(r[""], r["claim"]) for r in full] == list(claims.CLAIMS.items())
    assert {(r["measure"], r["effect"], r["verdict"]) for r in full} == {("measure", "1.5 [1, 2]", UNTESTED)}


def test_a_claim_that_was_not_measured_is_shown(runs):
    rows = recorded(*(some(name) for name in claims.CLAIMS if name != "C4"))
    assert [row["verdict"] for row in claims.table(rows)] == [*[PARTLY] * 3, "not measured yet", *[PARTLY] * 6]


def test_several_rows_of_one_claim_are_kept_in_their_place(runs):
    rows = claims.table(recorded(some("C8", verdict=NOT), some("C2 b", 2.0), some("C2 a", 1.0), some("C2 a b", 3.0)))
    assert [r[""] for r in rows] == ["C1", "C2", "C2", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "C9", "C10"]
    assert [r["effect"][0] for r in rows[1:4]] == ["1", "3", "2"]  # in the order of their ids
    verdicts = {r[""]: r["verdict"] for r in rows}
    assert (verdicts["C2"], verdicts["C8"], verdicts["C9"]) == (PARTLY, NOT, "not measured yet")


@pytest.mark.parametrize(
    "effect, low, high, words",
    [
        (0.123456, 0.1, 0.2, "0.123 [0.1, 0.2]"),
        (1234.5, -1e-5, 1e7, "1.23e+03 [-1e-05, 1e+07]"),
        (0.0, 0.0, 0.0, "0 [0, 0]"),
        (0.25, math.nan, math.nan, "0.25"),
        (0.25, 0.1, math.inf, "0.25"),
        (math.nan, 4.0, math.nan, ""),
    ],
)
def test_the_effect_in_words(runs, effect, low, high, words):
    claim = Claim("C3", "m", effect, low, high, NOT, "r")
    assert claims.effect(claim) == words
    assert claims.table(recorded(claim))[2]["effect"] == words


def test_a_table_takes_what_another_dataset_adds_and_says_so(runs):
    claims.record([some("C1"), some("C2 a")], "toy", "toy", "ci")
    claims.record([some("C1", verdict=NOT), some("C2 b"), some("C4 a"), some("C4 b", verdict=NOT)], "other", "other", "ci")
    rows = claims.of_scale("ci", "toy")
    assert list(rows) == ["C1", "C2 a", "C2 b", "C4 a", "C4 b"] and rows["C1"]["verdict"] != NOT
    measures = {row[""]: row["measure"] for row in claims.table(rows)}
    assert measures["C1"] == "measure" and measures["C4"] == "measure, on other" and measures["C9"] == ""
    others = claims.of_scale("ci", "other")
    assert list(others) == ["C1", "C2 b", "C4 a", "C4 b", "C2 a"] and others["C1"]["verdict"] == NOT
    assert claims.of_scale("quick", "toy") == {}
