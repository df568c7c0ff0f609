"""Papermill's parameters: what is refused, in which words, and what the scales fill in."""

import functools
import math

import numpy as np
import papermill.translators
import pytest
import torch

from pgdlib import sampler
from pgdlib.lab import params

DEFAULTS = dict(
    lam=1.0, dataset="cloned", source="auto", scale="quick", seed=0, guide="shipped", device="auto", lams=[0.5], samples=None
)
RULES = dict(
    lam=params.number(0),
    dataset=params.one_of(*params.DATASETS),
    source=params.one_of(*params.SOURCES),
    scale=params.one_of(*params.SCALES),
    seed=params.integer(0),
    guide=params.text(),
    device=params.one_of(*params.DEVICES),
    lams=params.numbers(0),
    **params.optional_settings("samples"),
)


def notebook(**injected):
    """The globals of a notebook that papermill ran with `injected`, at its import cell; with its history in `In`."""
    cell = papermill.translators.PythonTranslator.codify(injected)  # papermill's own text of the injected cell
    namespace = {**DEFAULTS, "In": ["", "# defaults\nlam = 1.0", *([cell] if injected else []), "import torch"], "torch": torch}
    exec(cell, {}, namespace)
    return namespace


def test_defaults_pass():
    p = params.check(notebook(), **RULES)
    assert {k: getattr(p, k) for k in DEFAULTS if k != "samples"} == {k: v for k, v in DEFAULTS.items() if k != "samples"}


def test_injected_values_pass():
    p = params.check(notebook(lam=2, dataset="human", scale="ci", seed=7, lams=[0, 1, 2.5], samples=3), **RULES)
    assert (p.lam, p.dataset, p.scale, p.seed, p.lams, p.samples) == (2, "human", "ci", 7, [0, 1, 2.5], 3)


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("lam", -1, "a number of at least 0"),
        ("lam", -1e-9, "a number of at least 0"),
        ("lam", "abc", "a number of at least 0"),
        ("lam", "2.0", "a number"),
        ("lam", True, "a number"),
        ("lam", None, "a number"),
        ("lam", [1.0], "a number"),
        ("lam", math.nan, "a number"),
        ("lam", math.inf, "a number"),
        ("lam", 10**400, "a number"),
        ("lam", np.arange(2.0), "a number"),
        ("dataset", "pen", "one of 'human', 'cloned', 'expert'"),
        ("dataset", "Human", "'human'"),
        ("dataset", None, "'human'"),
        ("dataset", ["human"], "'human'"),
        ("source", "web", "one of 'auto', 'd4rl', 'local'"),
        ("scale", "huge", "one of 'ci', 'quick', 'paper'"),
        ("seed", -1, "a whole number from 0 to 4294967295"),
        ("seed", 1.0, "a whole number"),
        ("seed", False, "a whole number"),
        ("guide", "", "a text that is not empty"),
        ("guide", 3, "a text"),
        ("device", "tpu", "one of 'auto', 'cpu', 'cuda'"),
        ("lams", [], "a list, not empty, of a number of at least 0"),
        ("lams", [1.0, -0.5], "a list"),
        ("lams", [1.0, math.nan], "a list"),
        ("lams", "[1.0]", "a list"),
        ("lams", 1.0, "a list"),
        ("samples", 1, "a whole number from 2 to 4294967295, or None for the scale's own value"),
        ("samples", 2.5, "a whole number"),
    ],
)
def test_refused(name, value, allowed):
    with pytest.raises(ValueError) as error:
        params.check({**notebook(), name: value}, **RULES)
    assert f"parameter {name}={value!r} " in str(error.value) and allowed in str(error.value)


@pytest.mark.parametrize(
    "value, shown",
    [
        (10**5_000, "(int, too large to be shown)"),
        ("a" * 1_000, f"'{'a' * 499}... (1,002 characters)"),
        (functools.reduce(lambda inner, _: [inner], range(5_000), 0), "(list, too large to be shown)"),
    ],
    ids=["number", "text", "list"],
)
def test_a_long_value_is_cut_in_the_message(value, shown):
    with pytest.raises(ValueError) as error:
        params.check({**notebook(), "seed": value}, **RULES)
    assert str(error.value) == f"parameter seed={shown} is not allowed; it must be a whole number from 0 to 4294967295"


def test_true_and_false_are_no_numbers_and_numbers_are_not_them():
    accepts, _ = params.one_of(True, False)
    assert [accepts(v) for v in (True, False, 1, 0, 1.0, None, "True")] == [True, True] + 5 * [False]


def test_unknown_parameters_are_named_with_those_that_exist():
    with pytest.raises(ValueError) as error:
        params.check(notebook(lamb=2.0, dataset="human"), **RULES)
    assert "unknown parameter lamb=2.0" in str(error.value) and str(error.value).endswith(", ".join(RULES))
    assert "dataset=" not in str(error.value)


def test_a_name_that_the_notebook_uses_otherwise_is_unknown_too():
    with pytest.raises(ValueError, match="unknown parameter torch='1'"):
        params.check(notebook(torch="1"), **RULES)


def test_papermills_texts_are_read_as_it_writes_them():
    """Values with line breaks, quotes, `=` and comments in them do not confuse the reading of the injected cell."""
    wild = "a = 1\nlamb = 2  # 'x' \"y\" = {z}"
    assert params.check(notebook(guide=wild), **RULES).guide == wild
    with pytest.raises(ValueError, match="unknown parameter lamb="):
        params.check(notebook(guide=wild, lamb=[wild, {"a": None}]), **RULES)


def test_a_session_may_hold_anything_else():
    """Run again by hand, late in an interactive session: other globals and other cells are no parameters."""
    namespace = notebook(lam=2.0)
    namespace["In"] += ["lamb = 3", "# Parameters of the plot\nx = 1", "%matplotlib inline", "?params", "def f(:"]
    namespace.update(lamb=3, x=1, p=params.check(namespace, **RULES), Out={}, _i="lamb = 3")
    assert params.check(namespace, **RULES).lam == 2.0
    namespace["lam"] = 3.0  # changed by hand, after the injected cell
    assert params.check(namespace, **RULES).lam == 3.0
    del namespace["In"]  # a plain script
    assert params.check(namespace, **RULES).lam == 3.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda():
    with pytest.raises(ValueError, match=r"device='cuda' is not allowed here.*'cpu' or 'auto'"):
        params.check(notebook(device="cuda"), **RULES)
    assert params.check(notebook(device="cpu"), **RULES).device == "cpu"


@pytest.mark.parametrize("scale", params.SCALES)
def test_none_takes_the_scales_own_value(scale):
    p = params.check(notebook(scale=scale), **RULES)
    assert vars(p) == {**DEFAULTS, **params.settings(scale), "scale": scale}
    assert p.samples is not None
    assert params.check(notebook(scale=scale, samples=5), **RULES).samples == 5


def test_every_setting_has_every_scale_and_passes_its_own_rule():
    for name, row in params.SETTINGS.items():
        assert set(row) == set(params.SCALES), name
        accepts, _ = params.optional_settings(name)[name]
        assert all(accepts(value) or name == "learning_rate" for value in row.values()), name
    for scale in params.SCALES:
        p = params.settings(scale)
        assert (p["train_steps"] is None) != (p["epochs"] is None)
        assert p["warmup"] < p["steps"] and p["features"] % 8 == 0
        assert all(p[length] % 2 ** (p["blocks"] - 1) == 0 for length in ("horizon", "long")) and p["long"] >= p["horizon"]
        assert p["solver"] in sampler.SOLVERS and (p["solver"] == "heun" or p["churn"] == 0)  # multistep takes no churn


def test_the_paper_scale_is_the_papers():
    p = params.settings("paper")
    table_2 = dict(solver="heun", steps=400, warmup=64, churn=80.0)
    table_3 = dict(epochs=512, batch_size=16, learning_rate=1e-3, blocks=2, features=1024, horizon=128)
    assert {**p, **table_2, **table_3} == p


@pytest.mark.parametrize(
    "name, accepted, refused, words",
    [
        ("solver", sampler.SOLVERS, ("euler", "Heun", "", 1, ["heun"]), "one of 'heun', 'multistep'"),
        ("long", (8, 64), (7, 0, 8.0, "64", True), "a whole number from 8 to 4294967295"),
        ("model_steps", (1, 60), (0, -1, 1.5, math.nan), "a whole number from 1 to 4294967295"),
    ],
)
def test_settings_of_the_sampler_and_the_world_model(name, accepted, refused, words):
    rule = params.optional_settings(name)
    for value in (*accepted, None):
        p = params.check({"scale": "quick", name: value}, scale=params.one_of(*params.SCALES), **rule)
        assert getattr(p, name) == (params.settings("quick")[name] if value is None else value)
    for value in refused:
        with pytest.raises(ValueError) as error:
            params.check({name: value}, **rule)
        expected = f"parameter {name}={value!r} is not allowed; it must be {words}, or None for the scale's own value"
        assert str(error.value) == expected


@pytest.mark.parametrize("rule", [params.number(0), params.one_of("a", "b"), params.numbers(0)])
def test_auto_or_a_value(rule):
    accepts, words = params.auto_or(rule)
    assert words == f"'auto' or {rule[1]}" and accepts("auto")
    for value in (0, 1.5, -1, "a", "Auto", "auto ", "", None, math.nan, True, [0.5], [-0.5], []):
        assert accepts(value) == rule[0](value), value
    rules = {**RULES, "lam": (accepts, words)}
    assert params.check({**notebook(), "lam": "auto"}, **rules).lam == "auto"
    with pytest.raises(ValueError) as error:
        params.check({**notebook(), "lam": "automatic"}, **rules)
    assert str(error.value) == f"parameter lam='automatic' is not allowed; it must be {words}"


def test_rules_with_an_upper_end():
    accepts, words = params.number(0, 1)
    assert [accepts(v) for v in (-0.1, 0, 0.5, 1, 1.1)] == [False, True, True, True, False] and words == "a number from 0 to 1"
    accepts, words = params.integer(1, 3)
    assert [accepts(v) for v in (0, 1, 3, 4)] == [False, True, True, False] and words == "a whole number from 1 to 3"
    assert params.number()[1] == "a number of any size"
