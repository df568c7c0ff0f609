"""Inputs of all kinds, parameters of every notebook, datasets, Minari files: few of each, always the same; or thousands.

An input is survived if it is refused by a clear error, or accepted and everything that follows is right; the modules that are
imported here say which. Anything else fails, with the smallest example. `make test-faults` draws the thousands, other ones
each time, and counts them.
"""

import functools
import math

import faulty_data
import pytest
from faulty_data import HORIZONS, LENGTHS, SOME_FAULTS
from faulty_files import FAULTS, read
from hypothesis import strategies as st
from inputs import NOTEBOOKS, PLAIN, VALUES, Checked, names, tried
from used_data import outcome

checked = functools.cache(Checked)
many = pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.faults)], ids=["few", "many"])


def tell(told, kind, found):
    assert found.keys() == {"refused", "accepted"}  # both, or it would prove little
    if told:
        told(kind, **{"inputs tried": found.total(), **found, "anything else": 0})


@many
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_parameter_is_what_its_rule_says_or_refused_by_name(path, many, told):
    notebook = checked(path)
    assert vars(notebook.check()).keys() >= notebook.defaults.keys()
    found = tried(notebook.unknown, names(notebook.defaults), PLAIN, examples=100 if many else 20, many=many)
    for which in map(st.just, notebook.defaults) if many else [st.sampled_from([*notebook.defaults])]:
        found += tried(notebook.outcome, which, VALUES, examples=100, many=many)
    tell(many and told, f"{path.stem}, {len(notebook.defaults)} parameters and unknown ones", found)


@many
def test_a_dataset_is_used_or_refused_by_name(runs, many, told):
    inputs = LENGTHS, SOME_FAULTS, HORIZONS, st.sampled_from(["raw", "arctanh"])
    tell(many and told, "datasets", tried(outcome, *inputs, examples=1_000 if many else 40, many=many))


def test_two_faults_at_once_are_refused_by_the_first(runs):
    """Found by drawing many: a value that is not finite, beside an array that is too short to say in which episode."""
    faults = [((faulty_data.put, "actions", math.nan), 34), ((faulty_data.reshaped, "rewards", None), 98)]
    assert outcome([1, 2], faults, 4) == "refused"


@many
def test_a_minari_file_is_read_as_it_is_or_refused_by_name(minari_file, tmp_path, many, told):
    def reading(faults, moved):
        return read(minari_file, tmp_path / "damaged", faults, moved)

    inputs = st.lists(FAULTS, max_size=3 if many else 2), st.sampled_from([0, 0, 0, -1, 2])
    tell(many and told, "Minari files", tried(reading, *inputs, examples=1_000 if many else 40, many=many))
