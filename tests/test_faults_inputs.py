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


@pytest.fixture(scope="module")
def told(request):
    """Kind of input -> what became of how many; printed at the end."""
    counts = {}
    yield counts
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print()
        for kind, found in counts.items():
            refused, accepted, total = found["refused"], found["accepted"], found.total()
            print(f"{kind}: {total:,} inputs tried; {refused:,} refused with a clear error, ", end="")
            print(f"{accepted:,} accepted and consistent, {total - refused - accepted} anything else")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_parameters(path, told):
    notebook, found = Checked(path), Counter()
    for name in notebook.defaults:
        found += tried(notebook.outcome, st.just(name), VALUES, examples=100, **MANY)
    found += tried(notebook.unknown, names(notebook.defaults), PLAIN, examples=100, **MANY)
    told[f"{path.stem}, {len(notebook.defaults)} parameters and unknown ones"] = found
    assert found.total() == found["refused"] + found["accepted"]


def test_datasets(told, runs):
    inputs = LENGTHS, SOME_FAULTS, HORIZONS, st.sampled_from(["raw", "arctanh"])
    told["datasets"] = tried(outcome, *inputs, examples=1_000, **MANY)


def test_minari_files(told, minari_file, tmp_path):
    def reading(faults, moved):
        return read(minari_file, tmp_path / "damaged", faults, moved)

    inputs = st.lists(FAULTS, max_size=3), st.sampled_from([0, 0, 0, -1, 2])
    told["Minari files"] = tried(reading, *inputs, examples=1_000, **MANY)
