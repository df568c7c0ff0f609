"""Papermill's parameters: what is refused, in which words; what the scales fill in; what a notebook says of them itself."""

import functools
import math
from pathlib import Path

import numpy as np
import papermill
import pytest
import torch
import yaml
from papermill.translators import PythonTranslator

from pgdlib.lab import settings

CELL = 'lam = 1.0\ndataset = "cloned"  # type: str  of pens\nscale = "quick"\nseed = 0\nguide = "shipped"\ndevice = "auto"\n'
CELL += "lams = [0.5]\nretrain = False\nagent_rate = None\nsamples = None"
NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def notebook(**injected):
    """The globals of a notebook that papermill ran with `injected`, at its cell of imports."""
    cell = PythonTranslator.codify(injected)
    namespace = {"In": ["", CELL, *([cell] if injected else []), "import torch"], "torch": torch}
    exec(CELL, {}, namespace)
    exec(cell, {}, namespace)
    return namespace


def refusal(name, value):
    with pytest.raises(ValueError) as error:
        settings.check({**notebook(), name: value})
    return str(error.value)


def test_what_is_given_is_what_comes_back():
    given = dict(lam=2, dataset="human", scale="ci", seed=7, lams=[0, 1, 2.5], samples=3, retrain=True)
    p = settings.check(notebook(**given))
    assert {k: getattr(p, k) for k in given} == given and type(p.lam) is int and type(p.lams[0]) is int
    assert (p.guide, p.device, p.horizon) == ("shipped", "auto", 16)


@pytest.mark.parametrize("scale", settings.SCALES)
def test_none_takes_the_scales_own_value(scale):
    p = settings.check(notebook(scale=scale))
    assert vars(p).items() >= settings.of_scale(scale).items() and p.samples is not None
    assert vars(settings.defaults(scale, samples=7)) == {**settings.of_scale(scale), "samples": 7, "scale": scale}


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("lam", -1e-9, "'auto' or a number of at least 0"),
        ("lam", True, "'auto' or a number of at least 0"),
        ("lam", 10**400, "'auto' or a number of at least 0"),
        ("lam", np.array(1.0), "'auto' or a number of at least 0"),
        ("dataset", "hopper", settings.PARAMETERS["dataset"][0].__metadata__[-1]),
        ("seed", 1.0, "a whole number from 0 to 4294967295"),
        ("guide", "", "a text that is not empty"),
        ("lams", [1.0, math.nan], "a list, not empty, of a number of at least 0"),
        ("retrain", 1, "one of True, False"),
        ("samples", 1, "a whole number from 2 to 4294967295, or None for the scale's own value"),
        ("agent_rate", 2, "a number from 1e-08 to 1, or None for the scale's own value"),
    ],
)
def test_refused(name, value, allowed):
    assert refusal(name, value) == f"parameter {name}={value!r} is not allowed; it must be {allowed}"


@pytest.mark.parametrize(
    "value, shown",
    [
        (10**5_000, "(int, too large to be shown)"),
        ("a" * 1_000, f"'{'a' * 499}... (1,002 characters)"),
        (functools.reduce(lambda inner, _: [inner], range(100_000), 0), "(list, too large to be shown)"),
    ],
    ids=["number", "text", "list"],
)
def test_a_long_value_is_cut_in_the_message(value, shown):
    expected = "is not allowed; it must be a whole number from 0 to 4294967295"
    assert refusal("seed", value) == f"parameter seed={shown} {expected}"


@pytest.mark.parametrize("written, better", [("1e-4", "1.0e-4"), ("2.5e3", "2.5e+3"), ("-1e-4", "-1.0e-4")])
def test_what_yaml_takes_for_a_text_is_explained(written, better):
    """YAML 1.1, so papermill's -y, needs a point and a sign in numbers with an exponent."""
    assert yaml.safe_load(written) == written and yaml.safe_load(better) == float(written)
    for name, value in (("agent_rate", written), ("lams", [1.0, written])):
        assert refusal(name, value).endswith(f"; write {better}, YAML takes {written} for a text")
    assert "write" not in refusal("seed", written) + refusal("dataset", written) + refusal("agent_rate", "fast")


def test_unknown_parameters_are_named_with_those_that_exist():
    with pytest.raises(ValueError) as error:
        settings.check(notebook(lamb=2.0, dataset="human"))
    known = "lam, dataset, scale, seed, guide, device, lams, retrain, agent_rate, samples"
    assert str(error.value) == f"unknown parameter lamb=2.0; this notebook takes {known}; perhaps lam is meant"
    for name in ("torch", "horizon"):  # that the notebook uses otherwise, or that other notebooks have
        with pytest.raises(ValueError, match=f"unknown parameter {name}='1'"):
            settings.check(notebook(**{name: "1"}))


def test_papermills_texts_are_read_as_it_writes_them():
    """Values with line breaks, quotes, `=` and comments in them do not confuse the reading of the injected cell."""
    wild = "a = 1\nlamb = 2  # 'x' \"y\" = {z}"
    assert settings.check(notebook(guide=wild)).guide == wild
    with pytest.raises(ValueError, match="unknown parameter lamb="):
        settings.check(notebook(guide=wild, lamb=[wild, {"a": None}, math.inf]))


def test_a_session_may_hold_anything_else():
    """Run again by hand, late in an interactive session: other globals and other cells are no parameters."""
    namespace = notebook(lam=2.0)
    namespace["In"] += ["lamb = 3", "horizon = 3", "%matplotlib inline", "?settings", "def f(:", "a, b = 1, 2", "x.y = 1"]
    namespace.update(lamb=3, horizon="far", agent=torch, p=settings.check(namespace), Out={}, _i="lamb = 3")
    p = settings.check(namespace)
    assert p.lam == 2.0 and p.horizon == 32 and not hasattr(p, "agent")
    namespace["lam"] = 3.0  # changed by hand, after the injected cell
    assert settings.check(namespace).lam == 3.0
    assert vars(settings.check({"lam": 3.0, "x": 1})) == {"lam": 3.0}  # a plain script


def test_a_notebook_may_have_parameters_of_its_own():
    kinds = dict(x=settings.number(0, 1), many=settings.NUMBERS)
    assert settings.check({"x": 0.5, "many": [1]}, **kinds).x == 0.5
    with pytest.raises(ValueError, match="parameter x=2 is not allowed; it must be a number from 0 to 1"):
        settings.check({"x": 2}, **kinds)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda():
    expected = "parameter device='cuda' is not allowed here: PyTorch finds no CUDA device; use 'cpu' or 'auto'"
    assert refusal("device", "cuda") == expected


def test_settings_fit_together_at_every_scale():
    for scale in settings.SCALES:
        p = settings.defaults(scale)
        assert settings.check(vars(p)) == p
        assert (p.train_steps is None) != (p.epochs is None)
        assert p.warmup < p.steps and p.features % 8 == 0
        assert all(length % 2 ** (p.blocks - 1) == 0 for length in (p.horizon, p.long)) and p.long >= p.horizon
    for name, (_, *values, _) in settings.SETTINGS.items():
        assert len(set(values)) > 1 or name == "blocks", f"{name} has one value: no setting, but for users"


def test_the_paper_scale_is_the_papers():
    table_2 = dict(solver="heun", steps=400, warmup=64, churn=80.0)
    table_3 = dict(epochs=512, batch_size=16, learning_rate=1e-3, blocks=2, features=1024, horizon=128)
    assert settings.of_scale("paper").items() >= {**table_2, **table_3}.items()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_help_notebook_says_what_the_schema_says(path):
    types = {"a whole number": "int", "a number": "float", "one of True": "bool", "one of": "str", "a text": "str"}
    types |= {"a list": "list", "'auto' or a number": "str|float"}
    for name, found in papermill.inspect_notebook(str(path)).items():
        kind, *_, words = (settings.PARAMETERS | settings.SETTINGS)[name]
        type_ = next(short for begin, short in types.items() if kind.__metadata__[-1].startswith(begin))
        assert found["inferred_type_name"] == type_ + "|None" * (name in settings.SETTINGS) and found["help"] == words, name
        assert (found["default"] == "None") == (name in settings.SETTINGS)
