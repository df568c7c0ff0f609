"""Inputs of all kinds, drawn by hypothesis, for notebooks' parameters; and what is allowed, stated once more."""

import contextlib
import functools
import keyword
import os
import re
import string
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import hypothesis
import nbformat
import numpy as np
import torch
from hypothesis import strategies as st
from papermill.translators import PythonTranslator

from pgdlib.lab import settings, tasks
from tools import promote

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

RULES = ("explicit", "normalised_linear", "normalised_cosine", "proximal", "smoothed", "annealed")
CHOICES = dict(
    source=("auto", "d4rl", "local"),
    scale=("ci", "quick", "paper"),
    device=("auto", "cpu", "cuda"),
    transform=("raw", "arctanh"),
    units=("natural", "raw"),
    retrain=(True, False),
    rule=RULES,
    calibrated_rule=RULES,
    solver=("heun", "multistep"),
    draw_solver=("heun", "multistep"),
    optimiser=("adam", "muon"),
)
LISTS = dict(
    agents=("iql", "td3_bc", "rebrac", "cql", "edac", "bcq"),
    sources=("real", "synther", "pgd", "mbpo", "mopo", "morel", "rambo"),
)
FILES = ("guide", "denoiser", "sweep", "benchmark")
REAL = dict(churn=(0, None), draw_churn=(0, None), real_fraction=(0, 1), agent_rate=(1e-8, 1), polyak=(1e-6, 1))
WHOLE = dict(seed=(0, 2**32 - 1), seeds=(1, 1000), horizon=(4, 10_000), long=(8, 2**32 - 1), data_steps=(2_000, 2**32 - 1))
WHOLE |= dict.fromkeys(("steps", "draw_steps", "samples", "episodes", "test_episodes"), (2, 2**32 - 1))
WHOLE |= {"warmup": (0, 2**32 - 1), "draw_warmup": (0, 2**32 - 1), "features": (8, 2**32 - 1)}  # of others: from 1

PLACES = (
    "../x ../../../../etc/passwd /etc/passwd / ~ ~/x a/../../b .. . /dev/zero //x \\\\x\\y x.zip x.safetensors -p $HOME $(ls) λ"
)
PATHS = st.sampled_from([*PLACES.split(), "a\0b", "\ud800", "a" * 300, "a/" * 3_000, "file:///etc/passwd", " "])
KNOWN = "auto human cloned quick ci paper d4rl local cpu cuda raw natural heun multistep iql explicit annealed shipped"
WORDS = st.sampled_from([*KNOWN.split(), "1e-4", "Human", "auto ", "nan", "1", "True", "None", "", "[1.0]"])
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


def tried(function, *inputs, examples, many=False):
    """How often `function` returned what, of so many `examples` of its inputs, other ones each time if they are `many`."""
    counts = Counter()

    @hypothesis.settings(
        max_examples=examples,
        derandomize=not many,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.tuples(*inputs))
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
    st.lists(WORDS, max_size=3),
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
        ["torch", "settings", "pd", "print", "lamb", "Seed", "data_set", "p", "_", "λ", *sys.stdlib_module_names]
    )
    # IPython's own In, and globals, are what the check is made with.
    return (drawn | beside).filter(lambda n: n not in known and not keyword.iskeyword(n) and n not in ("In", "globals"))


class Checked:
    """A notebook's check of its parameters, as IPython does it after the cell of parameters."""

    def __init__(self, path):
        notebook = nbformat.read(path, 4)
        self.defaults = promote.parameters(notebook)
        self.cell, *later = (c.source for c in promote.code_cells(notebook))
        self.own = (
            dict(dataset=settings.one_of(*tasks.DATASETS)) if path.stem.startswith("03") else {}
        )  # that a guide may be of
        own = ", dataset=settings.one_of(*tasks.DATASETS)" * bool(self.own)
        checks = [line for cell in later for line in cell.splitlines() if ".check(" in line]
        assert checks == [f"p = settings.check(globals(){own})"]

    def check(self, given=None, injected=None):
        """The parameters where some are `given`, or `injected` by papermill; raises what the check does."""
        cell, before = PythonTranslator.codify(injected or {}), {}
        exec(cell, before)
        namespace = {**before, **self.defaults, **(given or {})}
        return settings.check({**namespace, "In": ["", self.cell, *([cell] if injected else [])]}, **self.own)

    def outcome(self, name, value):
        """Of the parameter `name` with a value: "accepted" or "refused", as `ALLOWED` says; AssertionError otherwise."""
        allowed = (value is None and self.defaults[name] is None) or allows(name, value)
        allowed &= name not in self.own or not (isinstance(value, str) and "-v" in value)  # no Minari id
        try:
            with no_writes():
                p = self.check({name: value})
        except ValueError as e:
            assert str(e).startswith(f"parameter {name}={shown(value)} is not allowed"), str(e)[:1_000]
            assert not allowed or (name, value) == ("device", "cuda"), str(e)[:1_000]
            assert len(str(e)) < 2_000
            return "refused"
        assert allowed, f"{name}={shown(value)} is accepted"
        kept = getattr(p, name)
        assert kept is value or value is None
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


def allows(name, value):
    """Whether a parameter may be `value`: all rules in one table, without the library's code."""
    if name in CHOICES:
        return type(value) in (str, bool) and any(value is c or value == c for c in CHOICES[name] if type(c) is type(value))
    if name == "dataset" and isinstance(value, str):  # a name, or Minari's id of a dataset
        *folders, last = value.split("/")
        kinds = ("medium", "medium-replay", "medium-expert", "random", "expert")
        runners = [f"{runner}-{kind}" for runner in ("hopper", "walker2d", "halfcheetah") for kind in kinds]
        is_id = all(re.fullmatch(r"\w[\w.-]*", part) for part in folders) and re.fullmatch(r"\w[\w.-]*-v\d+", last)
        return value in ("human", "cloned", "expert", *runners) or bool(is_id)
    if name in (*FILES, "dataset"):
        return isinstance(value, str) and value != "" and "\ud800" not in value  # half a character is none
    if name == "verdicts":
        return isinstance(value, list) and value != [] and all(allows("sweep", v) for v in value)
    if name in ("lams", "conservatism"):
        range_ = (0, None) if name == "lams" else (Fraction(0.001), 1000)
        return isinstance(value, list) and value != [] and all(within(v, *range_) for v in value)
    if name in LISTS:
        return isinstance(value, list) and value != [] and all(isinstance(v, str) and v in LISTS[name] for v in value)
    if name == "lam":
        return within(value, 0, None) or (type(value) is str and value == "auto")
    if name in REAL:
        return within(value, *REAL[name])
    return isinstance(value, int) and within(value, *WHOLE.get(name, (1, 2**32 - 1)))


def within(value, low, high):
    """Whether it is a number from `low` to `high`, None: to the largest float."""
    if type(value) is bool or not isinstance(value, (int, float)) or not np.isfinite(value if isinstance(value, float) else 0):
        return False
    return low <= Fraction(value) <= Fraction(sys.float_info.max if high is None else high)


_seen = None  # what was written since `no_writes` began
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


def _note(event, arguments):
    if _seen is None:
        return
    path, mode, flags = arguments if event == "open" else (None, "", 0)
    writes = set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if event in CHANGES or writes:
        _seen.append((event, path, arguments))


@functools.cache
def _audited():
    sys.addaudithook(_note)  # for as long as the process lives


@contextlib.contextmanager
def no_writes():
    """Within the block nothing may make, open for writing, rename or delete a file."""
    global _seen
    _audited()
    bytecode, sys.dont_write_bytecode, _seen = sys.dont_write_bytecode, True, []
    try:
        yield
    finally:
        seen, _seen, sys.dont_write_bytecode = _seen, None, bytecode
        assert not seen, seen
