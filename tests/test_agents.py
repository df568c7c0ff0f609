"""Stacks of agents against separate ones, against torch's own layers and distributions, and against interruption."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import SPEC, plain_network, toy
from scipy import stats
from torch import nn
from torch.distributions import Independent, Normal

from pgdlib import data, policies
from pgdlib.agents import stack as agents
from pgdlib.agents.iql import IQL
from pgdlib.agents.stack import (
    ACTIONS,
    BC,
    DIVERGED,
    NEXT_OBS,
    OBS,
    REWARD,
    TERMINAL,
    WIDTH,
    Learner,
    StackedMLP,
    StackedPolicy,
    td3_bc,
    transitions,
)
from pgdlib.agents.td3_bc import TD3BC
from pgdlib.guidance import RULES, Guide
from pgdlib.lab import store

KINDS = {"bc": BC, "iql": IQL, "td3_bc": TD3BC}
MEAN, STD = torch.linspace(-1, 1, 45), torch.linspace(0.5, 2, 45)
SEEDS, COUNTS = (3, 0, 11), (50, 7, 300)
every_agent = pytest.mark.parametrize("kind", KINDS)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(n, seed=0):
    """`n` random transitions, a fifth of them terminal."""
    x = draw(seed, n, 116)
    return transitions(x[:, OBS], x[:, ACTIONS], x[:, REWARD], (x[:, TERMINAL] > 0.84).float(), x[:, NEXT_OBS])


def learner(kind, seeds=SEEDS, steps=200, dtype=torch.float32):
    agent = KINDS[kind](seeds, MEAN, STD, hidden=(16, 12)).to(dtype)
    return Learner(agent, seeds, steps, batch_size=16, learning_rate=1e-3)


def run_of(module, i, runs):
    """The parameters of run `i` by name; twins are stacked [2 R, ...], all else [R, ...]."""
    return {name: p.detach().unflatten(0, (-1, runs))[:, i].clone() for name, p in module.named_parameters()}


def assert_same_state(a, b):
    for (name, x), y in zip(a.state()[0].items(), b.state()[0].values(), strict=True):
        assert torch.equal(x, y), name


def test_transitions_are_packed_as_the_slices_say():
    obs, actions, rewards, terminals, next_obs = (draw(i, 5, *d) for i, d in enumerate([(45,), (24,), (), (), (45,)]))
    whole = transitions(obs, 2 * actions, rewards, terminals, next_obs)
    assert whole.shape == (5, WIDTH)
    columns = np.arange(WIDTH)
    parts = [np.atleast_1d(columns[s]) for s in (OBS, ACTIONS, REWARD, TERMINAL, NEXT_OBS)]
    assert sorted(itertools.chain(*parts)) == columns.tolist()
    assert torch.equal(whole[:, OBS], obs) and torch.equal(whole[:, NEXT_OBS], next_obs)
    assert torch.equal(whole[:, REWARD], rewards) and torch.equal(whole[:, TERMINAL], terminals)
    assert torch.equal(whole[:, ACTIONS], (2 * actions).clip(-1, 1)) and (actions.abs() > 0.5).any()
    trajectories = toy([3, 4])
    parts = (getattr(trajectories, name) for name in ("obs", "actions", "rewards", "terminals", "next_obs"))
    assert torch.equal(agents.of_trajectories(trajectories), transitions(*parts))


# Networks


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_a_stack_is_separate_networks(frozen):
    mlp = StackedMLP([7, 9, 5, 3], agents.generators(SEEDS)).double()
    x = draw(0, 3, 11, 7).double().requires_grad_()
    up = draw(1, 3, 11, 3).double()
    out = mlp(x, frozen)
    (out * up).sum().backward()
    for i in range(3):
        network, own = plain_network(mlp, i), x[i].detach().requires_grad_()
        expected = network(own)
        (expected * up[i]).sum().backward()
        torch.testing.assert_close(out[i], expected)
        torch.testing.assert_close(x.grad[i], own.grad)
        for layer, weight, bias in zip(network[::2], mlp.weights, mlp.biases):
            if frozen:
                assert weight.grad is None and bias.grad is None
            else:
                torch.testing.assert_close(weight.grad[i], layer.weight.grad.T)
                torch.testing.assert_close(bias.grad[i, 0], layer.bias.grad)


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_low_precision_stays_near_float64(monkeypatch, low):
    monkeypatch.setattr(agents, "has_bfloat16", lambda device: low)
    mlp, x = StackedMLP([69, 256, 256, 24], agents.generators(SEEDS)), draw(0, 3, 100, 69)
    with torch.no_grad():
        out = mlp(x)
        exact = mlp.double()(x.double())
    # Bfloat16 rounds to 1 part in 512 at each of weights, inputs, sums, of which errors average out; hidden layers only.
    error = (out - exact).square().mean().sqrt() / exact.std()
    assert out.dtype == torch.float32
    assert 1e-4 < error < 0.01 if low else error < 1e-6, error


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_large_values_and_their_gradients_keep_their_precision(monkeypatch, low):
    """Values near 1,000, which bfloat16 alone would round to steps of 4."""
    monkeypatch.setattr(agents, "has_bfloat16", lambda device: low)
    mlp, x = StackedMLP([69, 256, 256, 1], agents.generators(SEEDS)), draw(0, 3, 512, 69).requires_grad_()
    with torch.no_grad():
        mlp.weights[-1].mul_(100)
        mlp.biases[-1].add_(1000)
    aim = 1000 + 10 * draw(1, 3, 512, 1)

    def found(dtype):
        values, inputs = mlp.to(dtype)(x.to(dtype)), [*mlp.parameters(), x]
        return values.detach(), torch.autograd.grad((values - aim).square().mean(), inputs)

    (values, gradients), (exact, expected) = found(torch.float32), found(torch.float64)
    assert values.dtype == torch.float32 and exact.mean().item() == pytest.approx(1000, rel=0.05) and exact.std() > 5
    assert (values / exact - 1).abs().max() < (3e-4 if low else 1e-6)
    errors = [(g - right).norm() / right.norm() for g, right in zip(gradients, expected, strict=True)]
    assert all(g.dtype == torch.float32 for g in gradients)
    assert max(errors) < (0.08 if low else 1e-5), errors  # most of it from hidden units that rounding turns on or off
    assert max(errors[2], errors[5]) < 0.01, errors  # the last layer's own


def test_initial_weights_are_those_of_linear_layers():
    widths = [69, 200, 100, 1]
    mlp = StackedMLP(widths, agents.generators((0, 1, 0)))
    for weight, bias, i, o in zip(mlp.weights, mlp.biases, widths, widths[1:]):
        assert weight.shape == (3, i, o) and bias.shape == (3, 1, o)
        assert torch.equal(weight[0], weight[2]) and torch.equal(bias[0], bias[2])  # of one seed
        assert not (weight[0] == weight[1]).any()
        both = torch.cat([weight, bias], 1)[:2].detach().reshape(-1)
        assert both.abs().max() <= 1 / math.sqrt(i)
        assert stats.kstest(both * math.sqrt(i), stats.uniform(-1, 2).cdf).pvalue > 1e-3
        torch.manual_seed(0)
        linear = nn.Linear(i, o)
        assert stats.ks_2samp(weight[:2].detach().reshape(-1), linear.weight.detach().reshape(-1)).pvalue > 1e-3
    for i, seed in enumerate((0, 1, 0)):
        alone = StackedMLP(widths, agents.generators([seed]))
        assert all(torch.equal(p[i], q[0]) for p, q in zip(mlp.parameters(), alone.parameters()))


def test_first_and_second_twins_start_differently():
    for kind in (IQL, TD3BC):
        agent = kind(SEEDS, MEAN, STD, hidden=(16, 12))
        for p, slow in zip(agent.q.weights, agent.target_q.weights):
            assert len(torch.unique(p.flatten(1), dim=0)) == 6  # three runs, two twins
            assert torch.equal(p, slow)


# Policies


def stacked_policy(hidden=(16, 12), seeds=SEEDS):
    """In float64, each run with stds of its own, a few of them beyond the bounds."""
    policy = StackedPolicy(hidden, agents.generators(seeds), MEAN, STD).double().requires_grad_(False)
    policy.log_std.copy_(draw(5, len(seeds), 1, 24) - 1)
    policy.log_std[:, :, 0], policy.log_std[:, :, 1] = -7.0, 3.0
    return policy


def plain_distribution(policy, i, obs):
    z = ((obs - policy.obs_mean) / policy.obs_std).clamp(-10, 10)
    std = policy.log_std[i, 0].clamp(-5, 2).exp()
    mean = torch.tanh(plain_network(policy.net, i)(z))
    return Independent(Normal(mean, std.expand_as(mean)), 1)


@pytest.mark.parametrize("inner", [(), (5,)], ids=["rows", "trajectories"])
@torch.no_grad()
def test_a_stacked_policy_is_separate_gaussians_for_blocks_of_a_batch(inner):
    policy = stacked_policy()
    obs, actions = 5 * draw(0, 12, *inner, 45).double(), draw(1, 12, *inner, 24).double()
    obs[0] *= 1000  # beyond what the network is shown
    mean, std = policy(obs)
    each = [plain_distribution(policy, i, obs[4 * i : 4 * i + 4]) for i in range(3)]
    torch.testing.assert_close(mean, torch.cat([d.mean for d in each]))
    torch.testing.assert_close(std, torch.cat([d.stddev for d in each]))
    expected = torch.cat([d.log_prob(actions[4 * i : 4 * i + 4]) for i, d in enumerate(each)])
    torch.testing.assert_close(policy.log_prob(obs, actions), expected)
    torch.testing.assert_close(policy.entropy(), torch.stack([d.entropy().reshape(-1)[0] for d in each]))


def test_log_prob_has_the_gradients_of_separate_gaussians():
    policy = stacked_policy().requires_grad_()
    obs, actions = (draw(i, 6, d).double().requires_grad_() for i, d in enumerate((45, 24)))
    inputs = obs, actions
    ours = torch.autograd.grad(policy.log_prob(obs, actions).sum(), (*inputs, policy.log_std, policy.net.weights[0]))
    expected = [plain_distribution(policy, i, obs[2 * i : 2 * i + 2]).log_prob(actions[2 * i : 2 * i + 2]) for i in range(3)]
    theirs = torch.autograd.grad(torch.cat(expected).sum(), (*inputs, policy.log_std))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)
    assert (ours[3].flatten(1).norm(dim=1) > 0).all()
    assert (ours[2][..., :2] == 0).all()  # stds at their bounds


def test_a_batch_must_be_a_multiple_of_the_runs():
    with pytest.raises(ValueError, match=r"batch=7 .* multiple of the 3"):
        stacked_policy()(torch.zeros(7, 45))


def test_samples_have_the_policys_mean_and_std():
    policy, n = stacked_policy(), 20_000
    obs = draw(0, 3, 45).double()
    mean, std = policy(obs)
    rows = obs.repeat_interleave(n, 0)
    drawn = policy.sample(rows, torch.Generator().manual_seed(0)).reshape(3, n, 24)
    assert ((drawn.mean(1) - mean) / std).abs().max() < 4.5 / math.sqrt(n)
    assert (drawn.std(1) / std - 1).abs().max() < 4.5 / math.sqrt(2 * n)
    assert torch.equal(drawn.reshape(-1, 24), policy.sample(rows, torch.Generator().manual_seed(0)))
    correlation = np.corrcoef(((drawn - mean[:, None]) / std[:, None]).transpose(1, 2).reshape(72, n))
    assert np.abs(correlation - np.eye(72)).max() < 5 / math.sqrt(n)  # no two runs or dimensions share noise


def test_act_is_the_mean_on_arrays():
    policy = stacked_policy().float()
    obs = draw(0, 6, 45)
    actions = policy.act(obs.double().numpy())
    assert actions.dtype == np.float32
    np.testing.assert_array_equal(actions, policy(obs)[0].numpy())


def test_select_copies_the_chosen_runs():
    policy, obs = stacked_policy().requires_grad_(), draw(0, 6, 45).double()
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    chosen = policy.select([2, 0])
    assert chosen.runs == 2 and not any(p.requires_grad for p in chosen.parameters())
    assert all(p.requires_grad for p in policy.parameters())
    mean, std = (x.detach().unflatten(0, (3, 2)) for x in policy(obs))
    for ours, theirs in zip((mean, std), chosen(torch.cat([obs[4:], obs[:2]]))):
        torch.testing.assert_close(theirs.unflatten(0, (2, 2)), ours[[2, 0]])
    torch.testing.assert_close(chosen.entropy(), policy.entropy()[[2, 0]])
    for tensor in (*chosen.parameters(), *chosen.buffers()):
        tensor.data.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())


@pytest.mark.parametrize("rule", RULES)
def test_a_stack_guides_as_separate_policies_do(rule):
    stack = stacked_policy()
    x = draw(0, 6, 8, 71).double()
    normaliser = data.Normaliser(SPEC).double().fit(draw(1, 50, 71).double())
    separate = policies.Stacked([stack.select([i]) for i in range(3)])
    assert policies.is_gaussian(stack)
    ours, theirs = (Guide(rule, p, normaliser, 0.3, 10)(x, x / 2, 0.7, 2) for p in (stack, separate))
    assert ours.abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs)
    # Blocks are trajectories, not steps.
    first = Guide(rule, stack.select([0]), normaliser, 0.3, 10)(x[:2], x[:2] / 2, 0.7, 2)
    torch.testing.assert_close(ours[:2], first)


# Training


@pytest.mark.slow
@every_agent
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-3)], ids=["float64", "default"])
def test_stacked_runs_train_as_separate_ones(kind, dtype, tolerance):
    runs = [packed(n, seed).to(dtype) for seed, n in enumerate(COUNTS)]
    stack = learner(kind, dtype=dtype)
    before = run_of(stack.agent, 0, 3)
    stack.train(runs, 100)
    moved = [(p - before[name]).abs().max() for name, p in run_of(stack.agent, 0, 3).items()]
    assert max(moved) > 0.02
    for i, seed in enumerate(SEEDS):
        alone = learner(kind, [seed], dtype=dtype)
        alone.train(runs[i : i + 1], 100)
        theirs = run_of(stack.agent, i, 3)
        for name, p in run_of(alone.agent, 0, 1).items():
            # Adam's first steps are the gradient's sign, so that in low precision a few weights go their own way.
            error = (p - theirs[name]).square().mean().sqrt()
            assert error < tolerance, (name, error)
    assert (stack.diverged_at == -1).all()


@every_agent
def test_a_diverging_run_is_marked_and_leaves_the_others_untouched(kind):
    runs = [packed(n, seed) for seed, n in enumerate(COUNTS)]
    spoilt = [runs[0], torch.full_like(runs[1], math.nan), runs[2]]
    clean, dirty = learner(kind), learner(kind)
    for L, later in ((clean, runs), (dirty, spoilt)):
        L.train(runs, 10)
        L.train(later, 13)
        L.train(runs, 20)
    assert clean.diverged_at.tolist() == [-1, -1, -1]
    assert dirty.diverged_at.tolist() == [-1, 11, -1]  # and is not moved by what follows
    for i in range(3):
        ours, theirs = (run_of(L.agent, i, 3) for L in (dirty, clean))
        assert all(torch.equal(p, theirs[name]) for name, p in ours.items()) == (i != 1)
    assert ours["policy.net.weights.0"].isfinite().all()
    assert not run_of(dirty.agent, 1, 3)["policy.net.weights.0"].isfinite().any()


@pytest.mark.parametrize("kind, bias", [("iql", "v"), ("td3_bc", "q")])
@pytest.mark.parametrize("sign", [1, -1])
def test_values_that_no_return_has_are_marked(kind, bias, sign):
    stack = learner(kind)
    with torch.no_grad():
        last = getattr(stack.agent, bias).biases[-1].unflatten(0, (-1, 3))
        last[:, 1], last[:, 2] = sign * 0.99 * DIVERGED, sign * 1.01 * DIVERGED
    stack.train([packed(50)] * 3, 2)
    assert stack.diverged_at.tolist() == [-1, -1, 1]
    assert all(p.isfinite().all() for p in stack.agent.parameters())


@pytest.mark.slow
@every_agent
def test_resume_is_exact(kind, tmp_path):
    first, second = ([packed(n, seed + k) for seed, n in enumerate(counts)] for k, counts in ((0, COUNTS), (9, (20, 30, 10))))
    path = "{}.safetensors"

    def save(step):
        if step in (70, 97):
            store.save(tmp_path / path.format(step), *whole.state())

    whole = learner(kind)
    whole.diverged_at[1] = 5
    whole.train(first, 90, save)  # data change in the midst of a chunk
    whole.train(second, 130, save)
    for step in (70, 97):
        resumed = learner(kind, seeds=SEEDS)
        resumed.train(second, 5)  # to be forgotten
        tensors, card = store.load(tmp_path / path.format(step))
        resumed.load_state(tensors, card)
        assert resumed.step == step
        resumed.train(first, 90)
        resumed.train(second, 130)
        assert resumed.step == 130
        assert resumed.diverged_at.tolist() == [-1, 5, -1]
        assert_same_state(whole, resumed)


class Probe(nn.Module):
    """An agent that learns nothing and keeps the first column of every batch."""

    def __init__(self, runs):
        super().__init__()
        self.policy = StackedPolicy([], agents.generators(range(runs)), MEAN, STD)
        self.seen = []

    def losses(self, batch, step, seeds):
        self.seen.append(batch[..., 0].long())
        return 0 * self.policy.log_std.sum((1, 2)), None

    def after_step(self):
        pass


def batches(seeds, counts, until, batch_size=16):
    """The rows [steps, R, B] that training looks at, with calls of `train` up to each step of `until`."""
    rows = [torch.arange(n).float()[:, None].expand(n, WIDTH) for n in counts]
    L = Learner(Probe(len(seeds)), seeds, 1000, batch_size=batch_size)
    for step in until:
        L.train(rows, step)
    return torch.stack(L.agent.seen)


def test_batches_depend_on_seed_and_step_alone():
    whole = batches((5, 9), (100, 1000), [200])
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
def test_no_two_draws_share_a_generator(kind, monkeypatch):
    """Runs of neighbouring seeds are independent: initial weights, batches and noise all start from seeds of their own."""
    started, seeded = [], agents.seeded

    def recorded(device, seed, step):
        generator = seeded(device, seed, step)
        started.append(generator.initial_seed())
        return generator

    monkeypatch.setattr(agents, "seeded", recorded)
    monkeypatch.setattr(td3_bc, "seeded", recorded)
    learner(kind, (0, 1, 2)).train([packed(50)] * 3, 70)
    assert len(set(started)) == len(started) >= 9


@every_agent
def test_only_the_policys_learning_rate_falls(kind):
    rates = []
    L = learner(kind, steps=40)
    actor = {id(p) for p in L.agent.policy.parameters() if p.requires_grad}
    L.train([packed(50)] * 3, 40, lambda step: rates.append([g["lr"] for g in L.optimiser.param_groups]))
    assert {id(p) for p in L.optimiser.param_groups[0]["params"]} == actor
    np.testing.assert_allclose([r[0] for r in rates], 0.5e-3 * (1 + np.cos(np.pi * np.arange(40) / 40)))
    assert all(r[1] == 1e-3 for r in rates)
    others = {id(p) for p in L.optimiser.param_groups[1]["params"]}
    trained = {id(p) for name, p in L.agent.named_parameters() if not name.startswith("target") and p.requires_grad}
    assert actor | others == trained and not actor & others


def test_behaviour_cloning_fits_the_datas_gaussian():
    mean, std = torch.linspace(-0.5, 0.5, 24), torch.linspace(0.05, 0.2, 24)
    runs = [packed(2000, seed) for seed in range(2)]
    for seed, run in enumerate(runs):
        run[:, ACTIONS] = (mean * (1 - 2 * seed) + std * draw(seed + 50, 2000, 24)).clamp(-1, 1)
    agent = BC((0, 1), torch.zeros(45), torch.ones(45), hidden=(8,))
    L = Learner(agent, (0, 1), 500, batch_size=128, learning_rate=2e-2)
    L.train(runs, 500)
    for seed, run in enumerate(runs):
        found, spread = (x.detach() for x in agent.policy.select([seed])(run[:, OBS]))
        torch.testing.assert_close(found.mean(0), run[:, ACTIONS].mean(0), rtol=0, atol=0.02)
        torch.testing.assert_close(spread[0], run[:, ACTIONS].std(0), rtol=0.1, atol=0)
