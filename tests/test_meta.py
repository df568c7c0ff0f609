"""A dry run of every path that a GPU takes, without one: tensors on torch's meta device have a place, but no values.

A GPU works behind the program, which loses its lead wherever it waits: to see a value, for a size that values decide, or to
copy. Where that is needed, and how often, stands here.
"""

import sys
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from conftest import SMALL, a_denoiser, a_policy, toy
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pgdlib import data, edm, fast, guidance, pgd, sampler, synthetic, worldmodel
from pgdlib.agents import squashed
from pgdlib.agents.bc import BC
from pgdlib.agents.bcq import BCQ
from pgdlib.agents.cql import CQL
from pgdlib.agents.edac import EDAC
from pgdlib.agents.iql import IQL
from pgdlib.agents.rebrac import ReBRAC
from pgdlib.agents.stack import Learner
from pgdlib.agents.td3_bc import TD3BC
from pgdlib.simulators import unknown

META = torch.device("meta")
SEEDS, STEPS = [0, 7], 3
EVERY_WAY = [(rule, "raw") for rule in guidance.RULES] + [(rule, "natural") for rule in ("explicit", "proximal", "annealed")]


class Operations(TorchDispatchMode):
    """Counts in `waits`, by "module.function", where the program would wait for a GPU, and goes on with made-up values.

    AssertionError for tensors of two devices in one operation. As on a GPU, a number on the CPU is at home everywhere.
    """

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, op.overloadpacket.__name__
        tensors = tensors_of(*args, *kwargs.values())
        if name in ("_to_copy", "copy_"):
            return self._copied(op, name, args, kwargs)
        if all(v.device != META for v in tensors):
            return op(*args, **kwargs)
        if name in ("_local_scalar_dense", "equal"):
            self.waits[place()] += 1
            return True if name == "equal" else torch.ones((), dtype=args[0].dtype).item()
        if name == "nonzero":
            return torch.stack(self._found(args[0] != 0), 1)
        if name in ("index", "index_put_") and args[0].device == META:
            args = args[0], [v for i in args[1] for v in self._found(i)], *args[2:]
            tensors = tensors_of(*args)
        numbers = {id(v) for v in args if isinstance(v, Tensor) and v.ndim == 0}
        strangers = [v for v in tensors if v.device != META and id(v) not in numbers]
        assert not strangers, f"{op}, in {place()}, is of two devices"
        return op(*args, **kwargs)

    def _copied(self, op, name, args, kwargs):
        into = args[0] if name == "copy_" else torch.empty(0, device=kwargs.get("device") or args[0].device)
        if into.device == args[name == "copy_"].device:
            return op(*args, **kwargs)
        self.waits[place()] += 1
        if into.device == META:
            return op(*args, **kwargs)
        return into if name == "copy_" else torch.zeros_like(args[0], dtype=kwargs.get("dtype"), device=into.device)

    def _found(self, index):
        """Half of the places of a mask; another index itself, on the device."""
        if index is None or (index.device == META and index.dtype != torch.bool):
            return [index]
        self.waits[place()] += 1
        size, count = (index.numel() // 2, index.ndim) if index.dtype == torch.bool else (index.shape, 1)
        return [torch.zeros(size, dtype=torch.long, device=META)] * count


def tensors_of(*args):
    """Those among the arguments of an operation, which may be lists of them."""
    return [v for arg in args for v in (arg if isinstance(arg, list | tuple) else [arg]) if isinstance(v, Tensor)]


class Calls(TorchFunctionMode):
    """Counts in `waits` what is no operation on meta: copies of Python's numbers and lists to the device."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, call, types, args=(), kwargs=None):
        kwargs, copied = kwargs or {}, False
        if call in (torch.tensor, torch.as_tensor):
            copied = torch.device(kwargs.get("device") or "cpu") == META and isinstance(args[0], float | int | list | tuple)
        elif call in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device == META:
            copied = any(isinstance(v, list) for v in (args[1] if isinstance(args[1], tuple) else args[1:2]))
        self.waits[place()] += copied
        return call(*args, **kwargs)


def place():
    """The module and the function of the library that are at work; None without one."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_globals["__name__"].startswith("pgdlib."):
        frame = frame.f_back
    names = frame and (frame.f_globals["__name__"].removeprefix("pgdlib."), frame.f_code.co_qualname.partition(".<locals>")[0])
    return names and ".".join(names)


@contextmanager
def watched(allowed=None):
    """Inside, everything is watched; AssertionError for other waits than `allowed`, place -> number."""
    waits = Counter()
    with Operations(waits), Calls(waits):
        yield
    assert +waits == (allowed or {})


class Generator(torch.Generator):
    """Of any device: meta has none of its own."""

    def __new__(cls, device=META):
        made = super().__new__(cls)
        made.place = torch.device(device)
        return made

    device = property(lambda self: self.place)


@pytest.fixture(autouse=True)
def on_meta(monkeypatch):
    """Generators there are; networks compute in bfloat16, but the world model, whose autocast meta does not know."""
    monkeypatch.setattr(torch, "Generator", Generator)
    for module in (edm, fast):
        monkeypatch.setattr(module, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(worldmodel, "has_bfloat16", lambda device: False)


def squashed_policy():
    policy = squashed.SquashedGaussian(7, 3, (16,)).requires_grad_(False).to(META)
    policy(torch.zeros(1, 7, device=META))  # its quadrature comes to the device with the first call
    return policy


def denoiser():
    return a_denoiser().requires_grad_(False).to(META)


def windows(model):
    return data.Windows(toy([40, 30], spec=SMALL), model.normaliser, model.horizon, META)


# The watch itself: what it must find, and what is none

X = torch.ones(4, 3, device=META)
WAITS = {
    "item": lambda: X.sum().item(),
    "if": lambda: 1 if X.any() else 0,
    "float": lambda: float(X.sum()),
    "tolist": lambda: X.tolist(),
    "equal": lambda: torch.equal(X, X),
    "nonzero": lambda: X.nonzero(),
    "mask": lambda: X[X > 0],
    "to the host": lambda: X.cpu(),
    "to the host, a value": lambda: torch.zeros(5).__setitem__(2, X.sum()),
    "from the host": lambda: torch.ones(4).to(META),
    "from the host, into": lambda: X.copy_(torch.ones(4, 3)),
    "a number": lambda: torch.as_tensor(1.0, device=META),
    "a list": lambda: torch.tensor([1.0, 2.0], device=META),
    "an array": lambda: torch.as_tensor(torch.ones(2).numpy(), device=META),
    "a list of indices": lambda: X[[0, 2]],
    "indices on the host": lambda: X[torch.tensor([0, 2])],
}
NONE = {
    "where": lambda: torch.where(X > 0, 1.0, X),
    "a number": lambda: X + torch.tensor(2.0),
    "filled": lambda: X.new_full((2,), 0.1),
    "masked": lambda: X.masked_fill_(X > 2, 1.0),
    "indices": lambda: X[torch.zeros(2, dtype=torch.long, device=META)],
    "on the host": lambda: torch.ones(3)[torch.ones(3) > 0].sum().item(),
}
TWO_DEVICES = {
    "sum": lambda: X + torch.ones(4, 3),
    "product": lambda: X @ torch.ones(3, 2),
    "linear": lambda: torch.nn.functional.linear(X, torch.ones(2, 3)),
    "cat": lambda: torch.cat([X, torch.ones(4, 3)]),
    "numbers in a list": lambda: torch._foreach_add_([X], [torch.ones(())]),
    "average": lambda: torch._foreach_lerp_([X], [torch.ones(4, 3)], 0.5),
    "index on the device": lambda: torch.ones(4)[torch.zeros(2, dtype=torch.long, device=META)],
    "select": lambda: torch.ones(4).index_select(0, torch.zeros(2, dtype=torch.long, device=META)),
}


@pytest.mark.parametrize("call", WAITS.values(), ids=WAITS)
def test_a_wait_is_found_where_it_is(call):
    with watched({"sampler.sample": 2 * STEPS - 1}):
        sampler.sample(lambda x, sigma: (call(), x)[1], (4, 8, 12), STEPS, 2.0, Generator())


@pytest.mark.parametrize("call", NONE.values(), ids=NONE)
def test_what_is_no_wait(call):
    with watched():
        sampler.sample(lambda x, sigma: (call(), x)[1], (4, 8, 12), STEPS, 2.0, Generator())


@pytest.mark.parametrize("call", TWO_DEVICES.values(), ids=TWO_DEVICES)
def test_a_tensor_left_behind_is_found(call):
    with pytest.raises(AssertionError, match=r"in sampler\.sample, is of two devices"), watched():
        sampler.sample(lambda x, sigma: (call(), x)[1], (4, 8, 12), STEPS, 2.0, Generator())


# The paths


@pytest.mark.parametrize("optimiser", ["adam", "muon"])
def test_training_of_the_denoiser(optimiser):
    model = a_denoiser().to(META)
    training = edm.Training(model, windows(model), edm.Recipe(STEPS, 4, 1e-3, optimiser=optimiser))
    with watched({"edm.Training.__iter__": 1}):  # for the losses, at the end
        assert list(training)[-1] == STEPS


def test_validation_of_the_denoiser():
    model = denoiser()
    seen = windows(model)
    with watched():
        edm.validation_loss(model, seen, torch.tensor([0.1, 1.0]), 4, 0)


@pytest.mark.parametrize("kind, solver", [*zip(("Gaussian", "squashed"), sampler.SOLVERS)])
@pytest.mark.parametrize("rule, units", EVERY_WAY)
def test_guided_sampling(rule, units, kind, solver):
    """A guide looks at its λ when it is made."""
    policy = squashed_policy() if kind == "squashed" else a_policy(SMALL, low=True).float().requires_grad_(False).to(META)
    model = denoiser()
    with watched({"guidance.Guide.__init__": 2}):
        guide = guidance.Guide(rule, policy, model.normaliser, torch.ones(6, device=META), STEPS, 1, units)
        x, diverged = sampler.sample(model, (6, 8, 12), STEPS, 2.0, [(Generator(), 4), (Generator(), 2)], guide, solver)
    assert x.device == diverged.device == META


def agents(kind, seeds=SEEDS, steps=STEPS):
    agent = kind(SMALL, seeds, torch.zeros(7), torch.ones(7), (8,)).to(META)
    return Learner(agent, seeds, steps, batch_size=4)


@pytest.mark.parametrize("kind", [IQL, TD3BC, BC, ReBRAC, CQL, EDAC, BCQ])
def test_training_of_agents(kind):
    learner, transitions = agents(kind), toy([40], spec=SMALL).transitions().to(META)
    with watched():
        assert list(learner.train([transitions] * 2))[-1] == STEPS


def test_the_world_model():
    """The data of its validation come to the device at the end of its training, and its losses from there."""
    ensemble = worldmodel.Ensemble(7, 3, 3, 2, (8, 8)).to(META)
    recipe = worldmodel.Recipe(STEPS, 4, weight_decay=(1e-5,) * 3)
    training = worldmodel.Training(ensemble, toy([40], spec=SMALL), toy([20], seed=1, spec=SMALL), recipe)
    with watched({"worldmodel.Ensemble.pairs": 1, "worldmodel.Training.__iter__": 1}):
        assert list(training)[-1] == STEPS
    policy = a_policy(SMALL).float().requires_grad_(False).to(META)
    with watched():
        worldmodel.rollout(ensemble, policy, X.new_zeros(5, 7), STEPS, Generator(), lambda obs: obs[..., 0] > 1)


def test_rounds_of_policy_guided_diffusion():
    """A round waits for the data that it makes, a few times whatever the number of steps; its training does not."""
    real, steps = toy([40], spec=SMALL).transitions().to(META), 2 * STEPS
    ensemble = worldmodel.Ensemble(7, 3, 3, 2, (8, 8)).requires_grad_(False).to(META)
    rows = [pgd.Row("real", "real"), pgd.Row("guided", "diffusion", "explicit", 0.5), pgd.Row("world", "world model")]
    rows.append(pgd.Row("calibrated", "diffusion", "annealed", "calibrated"))
    learner = agents(TD3BC, SEEDS * len(rows), steps)
    diffusion = synthetic.Diffusion(denoiser(), "heun", STEPS, 2.0, 1)
    simulator, behaviour = unknown("other", 7, 3, 10), agents(BC).agent.policy
    draws = 1 + 1 + 10 + 1  # one for all in the first round; then guided, and calibrated after the search for its λ
    allowed = {
        "guidance.Guide.__init__": 2 * draws,  # whether its λ is one
        "synthetic.Diffusion.draw": draws + 2,  # whether a λ is above zero; λ, which the row knows
        "synthetic.cut": 3 * len(SEEDS),  # how many transitions there are
        "synthetic._batch": 5 * 2 + 1,  # the facts, and the λ found
        "synthetic._own": 2 * (3 * len(SEEDS)),  # to the simulator and back, for each run and all
        "synthetic.from_world_model": 2 * len(SEEDS),  # how many transitions there are
        "pgd.Sources.__post_init__": 1,  # whether the world model is of these data
        "pgd.Sources._unguided": 1,  # whether the policies of two rows begin alike
    }
    with watched(allowed):
        sources = pgd.Sources(real, diffusion, ensemble, behaviour, 4, 0.25, SEEDS, simulator)
        for now in pgd.Rounds(learner, rows, sources, STEPS):
            list(learner.train(now.data, now.end))
