"""Inputs of all kinds by the thousand, other ones each time: parameters of every notebook, datasets, Minari files, paths.

An input is survived if it is refused by a clear error, or accepted and everything that follows is right; the tests of
`test_inputs.py` say which. Anything else fails here, with the smallest example.
"""

from collections import Counter

import pytest
from faulty_data import HORIZONS, LENGTHS, SOME_FAULTS
from faulty_files import FAULTS, read
from hypothesis import strategies as st
from inputs import NOTEBOOKS, PLAIN, VALUES, Checked, names, tried
from used_data import outcome

pytestmark = pytest.mark.faults
MANY = dict(always_the_same=False)


def counts(found):
    refused, accepted, total = found["refused"], found["accepted"], found.total()
    return {"inputs tried": total, "refused": refused, "accepted": accepted, "anything else": total - refused - accepted}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_parameters(path, told):
    notebook, found = Checked(path), Counter()
    for name in notebook.defaults:
        found += tried(notebook.outcome, st.just(name), VALUES, examples=100, **MANY)
    found += tried(notebook.unknown, names(notebook.defaults), PLAIN, examples=100, **MANY)
    told(f"{path.stem}, {len(notebook.defaults)} parameters and unknown ones", **counts(found))
    assert found.total() == found["refused"] + found["accepted"]


def test_datasets(told, runs):
    inputs = LENGTHS, SOME_FAULTS, HORIZONS, st.sampled_from(["raw", "arctanh"])
    told("datasets", **counts(tried(outcome, *inputs, examples=1_000, **MANY)))


def test_minari_files(told, minari_file, tmp_path):
    def reading(faults, moved):
        return read(minari_file, tmp_path / "damaged", faults, moved)

    inputs = st.lists(FAULTS, max_size=3), st.sampled_from([0, 0, 0, -1, 2])
    told("Minari files", **counts(tried(reading, *inputs, examples=1_000, **MANY)))
