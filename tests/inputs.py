"""Inputs of all kinds, drawn by hypothesis, for notebooks' parameters; and what their rules allow, read from their messages.

A `Checked` notebook is run up to its check of parameters once; then only the check is, with other values.
"""

import ast
import contextlib
import functools
import json
import keyword
import os
import re
import string
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from papermill.translators import PythonTranslator

from tools import promote

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

PLACES = (
    "../x ../../../../etc/passwd /etc/passwd / ~ ~/x a/../../b .. . /dev/zero //x \\\\x\\y x.zip x.safetensors -p $HOME $(ls) λ"
)
PATHS = st.sampled_from([*PLACES.split(), "a\0b", "\ud800", "a" * 300, "a/" * 3_000, "file:///etc/passwd", " "])
CHOICES = "auto human cloned quick ci paper d4rl local cpu cuda raw natural heun multistep iql explicit annealed shipped"
WORDS = st.sampled_from([*CHOICES.split(), "Human", "auto ", "nan", "1", "True", "None", "", "[1.0]"])
NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.integers(),
    st.floats(),
    st.sampled_from([2**32 - 1, 2**32, 10**20, 1e308, 5e-324, -0.0]),
    st.builds(lambda n, sign: sign * 10**n, st.integers(1, 5_000), st.sampled_from([-1, 1])),
)
TEXTS = st.one_of(WORDS, PATHS, st.text(), st.text(min_size=2_000, max_size=3_000))
PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS, st.text(max_size=20)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # what papermill can write into a notebook


def tried(function, *inputs, examples, always_the_same=True):
    """How often `function` returned what, of so many `examples` of its inputs; the fewest that it fails with are shown."""
    counts = Counter()

    @settings(
        max_examples=examples,
        derandomize=always_the_same,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.tuples(*inputs))
    def each(drawn):
        counts[function(*drawn)] += 1

    each()
    return counts


def deep(depth):
    """A list in a list in a list ..."""
    return functools.reduce(lambda inner, _: [inner], range(depth), 0)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    TEXTS,
    st.lists(NUMBERS, max_size=5),
    PLAIN,
    st.tuples(NUMBERS),
    st.sets(st.integers(), max_size=2),
    st.binary(max_size=5),
    st.complex_numbers(),
    st.decimals(),
    st.builds(np.float64, st.floats()),
    st.builds(lambda n: np.linspace(0, 1, n), st.integers(0, 3)),
    st.builds(lambda n: torch.zeros(n), st.integers(0, 3)),
    st.builds(deep, st.just(5_000)),
    st.just(int),
)  # what a user can type into the parameters cell


def names(known):
    """Names that papermill can assign and that are none of the parameters `known`."""
    first, rest = string.ascii_letters + "_", string.ascii_letters + string.digits + "_"
    drawn = st.builds(lambda a, b: a + b, st.sampled_from(first), st.text(rest, max_size=12))
    beside = st.sampled_from(
        ["torch", "params", "pd", "print", "lamb", "Seed", "data_set", "p", "_", "λ", *sys.stdlib_module_names]
    )
    # IPython's own In, and globals, are what the check is made with.
    return (drawn | beside).filter(lambda n: n not in known and not keyword.iskeyword(n) and n not in ("In", "globals"))


class Checked:
    """A notebook's cells up to the one that checks its parameters, after they have run with the defaults."""

    def __init__(self, path):
        cells = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        cells = cells[: 1 + next(i for i, source in enumerate(cells) if "params.check(" in source)]
        self.namespace = {"__name__": "__main__"}
        for source in cells:
            exec(compile(source, path.name, "exec"), self.namespace)
        (check,) = (s for s in ast.parse(cells[-1]).body if "params.check(" in ast.unparse(s))
        self.code, self.target = compile(ast.Module([check], []), path.name, "exec"), check.targets[0].id
        with path.open() as f:
            self.defaults = promote.parameters(promote.nbformat.read(f, 4))
        self.namespace |= self.defaults  # the cell of the check gives `device` another meaning
        self.words = {name: self._words(name) for name in self.defaults}

    def check(self, given=None, injected=None):
        """The parameters where some are `given`, or `injected` by papermill; raises what the check does."""
        namespace = dict(self.namespace)
        if injected is not None:  # the imports follow the injected cell
            cell = PythonTranslator.codify(injected)
            before = {}
            exec(cell, before)
            namespace = {**before, **namespace, "In": ["", cell]}
        namespace |= given or {}
        exec(self.code, namespace)
        return namespace[self.target]

    def _words(self, name):
        """What the message says is allowed, to somebody who gives what nothing allows."""
        try:
            self.check({name: object()})
        except ValueError as e:
            return re.fullmatch(rf"parameter {name}=<object object at \w+> is not allowed; it must be (.+)", str(e))[1]
        raise AssertionError(f"{name} may be anything")

    def outcome(self, name, value):
        """Of the parameter `name` with a value: "accepted" or "refused", as its words say; AssertionError otherwise."""
        allowed = allows(self.words[name], value)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(no_writes())
                p = self.check({name: value})
        except ValueError as e:
            assert str(e).startswith(f"parameter {name}={shown(value)} is not allowed"), str(e)[:1_000]
            if allowed:
                assert name == "device" and value == "cuda" and not torch.cuda.is_available(), str(e)[:1_000]
                return "refused"
            assert str(e).endswith(f"it must be {self.words[name]}") and len(str(e)) < 2_000
            return "refused"
        assert allowed, f"{name}={shown(value)} is accepted; allowed is {self.words[name]}"
        kept = getattr(p, name)
        assert kept is value or (value is None and allows(self.words[name], kept))
        return "accepted"

    def unknown(self, name, value):
        """Of a parameter that the notebook does not have: "refused"; AssertionError otherwise."""
        try:
            with no_writes():
                self.check(injected={name: value})
        except ValueError as e:
            assert str(e).startswith(f"unknown parameter {name}=") and all(own in str(e) for own in self.defaults), e
            return "refused"
        raise AssertionError(f"the unknown parameter {name} is accepted")


def shown(value):
    """How a message writes a value: short, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"({type(value).__name__}, too large to be shown)"
    return text if len(text) <= 500 else f"{text[:500]}... ({len(text):,} characters)"


def allows(words, value):
    """Whether `words`, what a message says of a parameter, allow a value; the rules restated, without their code."""
    if words.endswith(own := ", or None for the scale's own value"):
        return value is None or allows(words.removesuffix(own), value)
    if words.startswith(auto := "'auto' or "):
        return (type(value) is str and value == "auto") or allows(words.removeprefix(auto), value)
    if words.startswith(each := "a list, not empty, of "):
        return isinstance(value, list) and len(value) > 0 and all(allows(words.removeprefix(each), v) for v in value)
    if words == "a text that is not empty":
        return isinstance(value, str) and len(value) > 0
    if words.startswith(one := "one of "):
        return type(value) in (str, bool) and repr(value) in words.removeprefix(one).split(", ")
    found = re.fullmatch(r"a (whole )?number (?:of any size|of at least (\S+)|from (\S+) to (\S+))", words)
    assert found, f"no test knows what {words!r} allows; restate it here"
    whole, least, low, high = found.groups()
    if type(value) is bool or not isinstance(value, int if whole else (int, float)):
        return False
    if isinstance(value, float) and not np.isfinite(value):
        return False
    low, high = least or low, high or Fraction(sys.float_info.max)
    return (Fraction(low) if low else -Fraction(sys.float_info.max)) <= Fraction(value) <= Fraction(high)


_writes = {"watched": False, "seen": []}


def _note(event, arguments):
    if not _writes["watched"]:
        return
    if event == "open":
        path, mode, flags = arguments
        if set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            _writes["seen"].append((event, path))
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"):
        _writes["seen"].append((event, *arguments))


@functools.cache
def _audited():
    sys.addaudithook(_note)  # for as long as the process lives


@contextlib.contextmanager
def no_writes():
    """Within the block nothing may make, open for writing, rename or delete a file."""
    _audited()
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    _writes.update(watched=True, seen=[])
    try:
        yield
    finally:
        _writes["watched"], sys.dont_write_bytecode = False, bytecode
        assert not _writes["seen"], _writes["seen"]
