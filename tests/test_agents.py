"""Stacks of agents against separate ones, their batches and schedules, and against interruption."""

import math

import numpy as np
import pytest
import torch
from conftest import SMALL, SPEC, assert_same, draw, random_batch, scales
from scipy import stats
from torch import nn

from pgdlib import fast
from pgdlib.agents import stack
from pgdlib.agents.bc import BC
from pgdlib.agents.bcq import BCQ
from pgdlib.agents.cql import CQL
from pgdlib.agents.edac import EDAC
from pgdlib.agents.iql import IQL
from pgdlib.agents.rebrac import ReBRAC
from pgdlib.agents.sac import SAC
from pgdlib.agents.stack import DIVERGED, Learner
from pgdlib.agents.td3_bc import TD3BC
from pgdlib.policies import is_gaussian


def fewer(kind, **settings):
    """The agent with less to compute."""
    return type(kind.__name__, (kind,), settings)


KINDS = {"bc": BC, "iql": IQL, "td3_bc": TD3BC, "rebrac": ReBRAC, "sac": SAC, "bcq": BCQ}
KINDS |= {"cql": fewer(CQL, samples=3), "edac": fewer(EDAC, critics=5)}
DETERMINISTIC = ("td3_bc", "rebrac")  # Gaussians of a fixed std where a density is asked
SEEDS, COUNTS = (3, 0, 11), (50, 7, 300)
every_agent = pytest.mark.parametrize("kind", KINDS)


def packed(counts, seed=0, spec=SMALL):
    """Random transitions for runs of such counts."""
    return [random_batch(1, n, seed + i, spec)[0].float() for i, n in enumerate(counts)]


def learner(kind, seeds=SEEDS, steps=200, spec=SMALL, dtype=torch.float32):
    agent = KINDS[kind](spec, seeds, *scales(spec), hidden=(16, 12)).to(dtype)
    return Learner(agent, seeds, steps, batch_size=16, learning_rate=1e-3)


def train(loop, data, until):
    return list(loop.train(data, until))


def run_of(module, i, runs=3):
    """The parameters of run `i` by name; twins are stacked [2 R, ...], all else [R, ...]."""
    return {name: p.detach().unflatten(0, (-1, runs))[:, i].clone() for name, p in module.named_parameters()}


def same(a, b):
    return [torch.equal(p, b[name]) for name, p in a.items()]


@pytest.mark.parametrize("spec", [SPEC, SMALL], ids=["pen", "small"])
@every_agent
def test_runs_start_as_their_seeds_say(kind, spec):
    agent, (mean, std) = learner(kind, (3, 0, 3), spec=spec).agent, scales(spec)
    assert all(same(run_of(agent, 0), run_of(agent, 2)))
    assert all(same(run_of(agent, 1), run_of(learner(kind, (0,), spec=spec).agent, 0, 1)))
    policy, critics = agent.policy, getattr(agent, "q", None) if hasattr(agent, "target_q") else None
    assert torch.equal(policy.obs_mean, mean) and torch.equal(policy.obs_std, std)
    if is_gaussian(policy):
        torch.testing.assert_close(policy.std, torch.full((3, spec.action_dim), 0.2 if kind in DETERMINISTIC else math.exp(-1)))
        assert policy.log_std.requires_grad == (kind not in DETERMINISTIC)
        obs = 5 * draw(0, 6, spec.obs_dim)
        network = policy.net(((obs - mean) / std).clamp(-10, 10).reshape(3, 2, -1)).tanh()
        torch.testing.assert_close(policy(obs)[0], network.flatten(0, 1))
    if critics:
        each = {"edac": 5}.get(kind, 2)
        assert all(len(torch.unique(p.flatten(1), dim=0)) == 2 * each for p in critics.weights)  # of two seeds
        assert_same(agent.target_q.state_dict(), critics.state_dict())
        assert not any(p.requires_grad for p in agent.target_q.parameters())


@pytest.mark.slow
@every_agent
@pytest.mark.parametrize(
    "dtype, tolerance, spec", [(torch.float64, 1e-9, SPEC), (torch.float32, 2e-3, SMALL)], ids=["float64", "default"]
)
def test_stacked_runs_train_as_separate_ones(kind, dtype, tolerance, spec):
    runs = [run.to(dtype) for run in packed(COUNTS, spec=spec)]
    stacked = learner(kind, spec=spec, dtype=dtype)
    before = run_of(stacked.agent, 0)
    train(stacked, runs, 100)
    assert max((p - before[name]).abs().max() for name, p in run_of(stacked.agent, 0).items()) > 0.02
    for i, seed in enumerate(SEEDS):
        alone = learner(kind, [seed], spec=spec, dtype=dtype)
        train(alone, runs[i : i + 1], 100)
        theirs = run_of(stacked.agent, i)
        for name, p in run_of(alone.agent, 0, 1).items():
            # Adam's first steps are the gradient's sign, so that in low precision a few weights go their own way.
            error = (p - theirs[name]).square().mean().sqrt()
            assert error < tolerance, (name, error)
    assert (stacked.diverged_at == -1).all()


@every_agent
def test_a_diverging_run_is_marked_and_leaves_the_others_untouched(kind):
    runs = packed(COUNTS)
    spoilt = [runs[0], torch.full_like(runs[1], math.nan), runs[2]]
    clean, dirty = learner(kind), learner(kind)
    live = dirty.state()
    for loop, later in ((clean, runs), (dirty, spoilt)):
        train(loop, runs, 10)
        train(loop, later, 13)
        train(loop, runs, 20)
    assert clean.diverged_at.tolist() == [-1, -1, -1]
    assert dirty.diverged_at.tolist() == [-1, 11, -1]  # and is not moved by what follows
    assert_same(live, dirty.state())
    for i in range(3):
        ours, theirs = (run_of(loop.agent, i) for loop in (dirty, clean))
        assert all(same(ours, theirs)) == (i != 1)
    first = next(p for name, p in run_of(dirty.agent, 1).items() if name.endswith("weights.0"))
    assert not first.isfinite().any()


@pytest.mark.parametrize("kind, bias", [("iql", "v"), ("td3_bc", "q"), ("sac", "q"), ("edac", "q")])
@pytest.mark.parametrize("sign", [1, -1])
def test_values_that_no_return_has_are_marked(kind, bias, sign):
    loop = learner(kind)
    with torch.no_grad():
        last = getattr(loop.agent, bias).biases[-1].unflatten(0, (-1, 3))
        last[:, 1], last[:, 2] = sign * 0.99 * DIVERGED, sign * 1.01 * DIVERGED
    train(loop, packed((50, 50, 50)), 2)
    assert loop.diverged_at.tolist() == [-1, -1, 1]
    assert all(p.isfinite().all() for p in loop.agent.parameters())


@pytest.mark.slow
@every_agent
def test_a_state_copied_into_a_fresh_learner_goes_on_to_the_same_weights(kind):
    first, second, kept = packed(COUNTS), packed((20, 30, 10), 9), {}
    whole = learner(kind)
    whole.diverged_at[1] = 5
    live = whole.state()
    for data, until in ((first, 90), (second, 130)):  # data change in the midst of a chunk
        for step in whole.train(data, until):
            if step in (70, 97):
                kept[step] = {name: tensor.clone() for name, tensor in live.items()}
    assert_same(live, whole.state())
    for step, saved in kept.items():
        fresh = learner(kind)
        train(fresh, second, 5)  # to be forgotten
        for name, tensor in fresh.state().items():
            tensor.copy_(saved[name])
        fresh.step = step
        train(fresh, first, 90)
        assert train(fresh, second, 130) == list(range(max(step, 90) + 1, 131))
        assert fresh.diverged_at.tolist() == [-1, 5, -1]
        assert_same(fresh.state(), whole.state())


class Probe(nn.Module):
    """An agent that learns nothing and keeps the first column of every batch."""

    def __init__(self, runs):
        super().__init__()
        self.policy, self.seen = stack.policies(SMALL, stack.generators(range(runs)), *scales(SMALL), []), []

    def losses(self, batch, step, seeds):
        self.seen.append(batch[..., 0].long())
        return dict(nothing=0 * self.policy.log_std.sum((1, 2))), None

    def after_step(self):
        pass


def batches(seeds, counts, until, batch_size=16):
    """The rows [steps, R, B] that training looks at, with calls of `train` up to each step of `until`."""
    rows = [torch.arange(n).float()[:, None].expand(n, SMALL.transition_width) for n in counts]
    loop = Learner(Probe(len(seeds)), seeds, 200, batch_size=batch_size)
    for step in until:
        train(loop, rows, step)
    return torch.stack(loop.agent.seen)


def test_batches_depend_on_seed_and_step_alone():
    whole = batches((5, 9), (100, 1000), [None])  # to the last step
    assert whole.shape == (200, 2, 16)
    assert torch.equal(whole, batches((5, 9), (100, 1000), [3, 64, 65, 127, 199, 200]))
    assert torch.equal(whole[:, 1:], batches((9,), (1000,), [200]))
    assert torch.equal(whole[:, 0], batches((9, 5), (1000, 100), [200])[:, 1])
    same = batches((5, 5, 9), (1000, 1000, 1000), [200])
    assert torch.equal(same[:, 0], same[:, 1])
    assert len(torch.unique(same[:, 1:].reshape(-1, 16), dim=0)) == 400  # no two seeds or steps share a batch


def test_transitions_are_drawn_uniformly_from_the_runs_own():
    seen = batches((0, 1, 2), (10, 3, 1), [128], batch_size=512)
    for i, count in enumerate((10, 3, 1)):
        found = torch.bincount(seen[:, i].reshape(-1), minlength=count)
        assert len(found) == count  # none beyond the run's own
        if count > 1:
            assert stats.chisquare(found).pvalue > 1e-3


@every_agent
def test_no_two_draws_share_a_stream(kind, monkeypatch):
    """Initial weights, batches and noise of all runs each have a stream, or a key in it, of their own."""
    started = []
    monkeypatch.setattr(stack, "generator", lambda *args: started.append(args[1:]) or fast.generator(*args))
    train(learner(kind, (0, 1, 2)), packed((50, 50, 50)), 70)
    noisy = {"bc": 0, "iql": 0, "cql": 2}.get(kind, 1)
    assert len(set(started)) == len(started) == 9 + 210 * noisy + 3 * (kind == "rebrac")


@every_agent
def test_only_the_policys_learning_rate_falls(kind):
    loop, data = learner(kind, steps=40), packed((50, 50, 50))
    actor, critic = loop.optimiser.param_groups
    rates = np.array([[actor["lr"], critic["lr"]] for _ in loop.train(data)])
    np.testing.assert_allclose(rates[:, 0], 0.5e-3 * (1 + np.cos(np.pi * np.arange(40) / 40)))
    assert (rates[:, 1] == 1e-3).all()
    trained = {n: p for n, p in loop.agent.named_parameters() if not n.startswith("target") and p.requires_grad}
    for group, of_policy in ((actor, True), (critic, False)):
        expected = {id(p) for n, p in trained.items() if n.startswith("policy.") == of_policy}
        assert {id(p) for p in group["params"]} == expected


def test_behaviour_cloning_fits_the_datas_gaussian():
    mean, std = torch.linspace(-0.5, 0.5, 24), torch.linspace(0.05, 0.2, 24)
    runs = packed((2000, 2000), spec=SPEC)
    for seed, run in enumerate(runs):
        run[:, SPEC.actions] = (mean * (1 - 2 * seed) + std * draw(seed + 50, 2000, 24)).clamp(-1, 1)
    agent = BC(SPEC, (0, 1), torch.zeros(45), torch.ones(45), hidden=(8,))
    train(Learner(agent, (0, 1), 500, batch_size=128, learning_rate=2e-2), runs, 500)
    for seed, run in enumerate(runs):
        found, spread = (x.detach() for x in agent.policy.select([seed])(run[:, SPEC.obs]))
        torch.testing.assert_close(found.mean(0), run[:, SPEC.actions].mean(0), rtol=0, atol=0.02)
        torch.testing.assert_close(spread[0], run[:, SPEC.actions].std(0), rtol=0.1, atol=0)
