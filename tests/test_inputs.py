"""Inputs of all kinds, few of each and always the same ones; `test_faults_inputs.py` draws many."""

import functools

import pytest
from faulty_data import HORIZONS, LENGTHS, SOME_FAULTS, outcome
from hypothesis import strategies as st
from inputs import NOTEBOOKS, VALUES, Checked, tried

checked = functools.cache(Checked)
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


@notebooks
def test_a_parameter_is_what_its_rule_says_or_refused(path):
    notebook = checked(path)
    assert vars(notebook.check()).keys() >= notebook.defaults.keys()
    tried(notebook.outcome, st.sampled_from(list(notebook.defaults)), VALUES, examples=100)


def test_a_dataset_is_used_or_refused_by_name(runs):
    counts = tried(outcome, LENGTHS, SOME_FAULTS, HORIZONS, st.sampled_from(["raw", "arctanh"]), examples=60)
    assert min(counts["accepted"], counts["refused"]) >= 5
