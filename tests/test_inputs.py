"""Inputs of all kinds, few of each and always the same ones; `test_faults_inputs.py` draws many."""

import functools

import pytest
from faulty_data import HORIZONS, LENGTHS, SOME_FAULTS
from faulty_files import FAULTS, read
from hypothesis import strategies as st
from inputs import NOTEBOOKS, PLAIN, VALUES, Checked, names, tried
from used_data import outcome

checked = functools.cache(Checked)
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


@notebooks
def test_a_parameter_is_what_its_rule_says_or_refused(path):
    notebook = checked(path)
    assert vars(notebook.check()).keys() >= notebook.defaults.keys()
    tried(notebook.outcome, st.sampled_from(list(notebook.defaults)), VALUES, examples=100)


@notebooks
def test_an_unknown_parameter_is_refused_by_name(path):
    notebook = checked(path)
    tried(notebook.unknown, names(notebook.defaults), PLAIN, examples=20)


def test_a_dataset_is_used_or_refused_by_name(runs):
    counts = tried(outcome, LENGTHS, SOME_FAULTS, HORIZONS, st.sampled_from(["raw", "arctanh"]), examples=40)
    assert counts["accepted"] and counts["refused"]  # of both, or it would prove little


def test_a_minari_file_is_read_as_it_is_or_refused_by_name(minari_file, tmp_path):
    def reading(faults, moved):
        return read(minari_file, tmp_path / "damaged", faults, moved)

    counts = tried(reading, st.lists(FAULTS, max_size=2), st.sampled_from([0, 0, 0, -1, 2]), examples=40)
    assert counts["accepted"] and counts["refused"]  # of both, or it would prove little
