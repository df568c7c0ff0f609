"""Synthetic data against Python loops over hand-made and random trajectories, the sampler itself, and a model that tells."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, SPEC, Ideal, a_denoiser, a_policy, draw, toy

from pgdlib import measures, sampler, synthetic, worldmodel
from pgdlib.fast import generator
from pgdlib.guidance import RULES, WARMED, Guide

SPECS = pytest.mark.parametrize("spec", [SPEC, SMALL], ids=["45 and 24", "7 and 3"])
T, STEPS = 6, 5
SEEDS = [5, 0, 3]  # of three runs
NAMES = ("kept", "ended", "diverged", "log_likelihood", "on_policy")


def stack(spec=SMALL):
    """Three policies that differ in all that is their own."""
    return a_policy(spec, 3).float().requires_grad_(False)


def broken(policy, run=1):
    """The same policies, one of them lost to NaN."""
    for parameter in policy.parameters():
        parameter.data[run] = math.nan
    return policy


class Losing(Ideal):
    """Trajectories whose last reward is above a number by the end come out as NaN."""

    def __init__(self, beyond, *sizes):
        super().__init__(*sizes)
        self.beyond = beyond

    def forward(self, x, sigma):
        out = super().forward(x, sigma)
        lost = (out[:, -1, self.spec.reward] > self.beyond) & (sigma < 1.0)
        return torch.where(lost[:, None, None], torch.nan, out)


def network(spec=SMALL):
    return a_denoiser(spec, 4, 1).requires_grad_(False)


def diffusion(denoiser=None, **changes):
    how = dict(solver="multistep", steps=STEPS, churn=0.0, warmup=1)
    return synthetic.Diffusion(denoiser or Ideal(SMALL, T), **{**how, **changes})


# Transitions of trajectories


def loop(spec, steps):
    """[(trajectory, step)] of all transitions and their packed values, step by step."""
    ids, lines = [], []
    for b, trajectory in enumerate(steps.numpy()):
        for t, step in enumerate(trajectory):
            end = step[spec.terminal] > 0.5
            if not end and t + 1 == len(trajectory):
                break
            ids.append((b, t))
            following = (step if end else trajectory[t + 1])[: spec.obs_dim]
            lines.append([*step[spec.obs], *step[spec.actions].clip(-1, 1), step[spec.reward], float(end), *following])
            if end:
                break
    return ids, np.array(lines, dtype=np.float32).reshape(-1, spec.transition_width)


@pytest.mark.parametrize(
    "flags, expected",
    {
        "no end": ([0, 0, 0, 0], [0, 1, 2]),
        "an end in the middle": ([0, 1, 0, 0], [0, 1]),
        "only the first counts": ([0, 1, 0, 1], [0, 1]),
        "at the first step": ([1, 0, 0, 0], [0]),
        "at the last": ([0, 0, 0, 1], [0, 1, 2, 3]),
        "just above one half": ([0, 0.50001, 0, 0], [0, 1]),
        "at one half": ([0, 0.5, 0, 0], [0, 1, 2]),
        "far out": ([-3, 0.2, 7, -3], [0, 1, 2]),
    }.values(),
)
def test_which_steps_are_transitions(flags, expected):
    steps = torch.zeros(1, 4, SMALL.width)
    steps[..., SMALL.terminal] = torch.tensor([flags])
    taken = synthetic.successors(SMALL, steps, measures.alive(steps[..., SMALL.terminal]))
    assert taken[0].nonzero()[:, 0].tolist() == expected
    assert [t for _, t in loop(SMALL, steps)[0]] == expected


@SPECS
@pytest.mark.parametrize("n, share", [(40, 0.0), (40, 0.1), (40, 0.5), (40, 1.0), (0, 0.5)])
def test_transitions_are_those_of_a_loop(n, share, spec):
    steps = draw(0, n, T, spec.width)  # a third of the actions are out of range
    steps[..., spec.terminal] = 0.1 + 0.8 * (torch.rand(n, T, generator=torch.Generator().manual_seed(1)) < share).float()
    alive = measures.alive(steps[..., spec.terminal])
    ids, lines = loop(spec, steps)
    assert [tuple(i) for i in synthetic.successors(spec, steps, alive).nonzero().tolist()] == ids
    np.testing.assert_array_equal(synthetic.cut(spec, steps, alive), lines)


# Drawing


@SPECS
@pytest.mark.parametrize("n, chunk", [(1, 512), (33, 1), (70, 200)])
def test_each_run_has_its_block(n, chunk, spec):
    """The proximal rule with a huge weight ends on the mean of the policy: of each run's own, whatever the chunks."""
    policy = a_policy(spec, 3).requires_grad_(False)
    x, diverged = diffusion(Ideal(spec, T), chunk=chunk).draw(policy, "proximal", [1e8] * 3, n, SEEDS, 0)
    assert x.shape == (3 * n, T, spec.width) and diverged.tolist() == [False] * 3 * n
    normaliser = Ideal(spec).normaliser
    for r, block in enumerate(x.split(n)):
        for other in range(3):
            mean = policy.select([other])(normaliser.obs(block))[0]
            error = (normaliser.actions(block) - mean).abs().max()
            assert error < 1e-4 if other == r else error > 0.1
    assert len(torch.unique(x[:, 0, 0])) == 3 * n  # no noise comes twice


@pytest.mark.parametrize("n, chunk, expected", [(33, 1, [32, 1]), (70, 192, [64, 6]), (70, 191, [32, 32, 6]), (99, 576, [99])])
def test_chunks_are_as_large_as_allowed(n, chunk, expected, monkeypatch):
    """In whole blocks of 32 trajectories for each of three runs, of which one always fits."""
    shapes, sample = [], sampler.sample
    monkeypatch.setattr(sampler, "sample", lambda denoise, shape, *a: shapes.append(shape) or sample(denoise, shape, *a))
    x, _ = diffusion(chunk=chunk).draw(stack(), "smoothed", [1.0] * 3, n, SEEDS, 0)
    assert shapes == [(3 * count, T, SMALL.width) for count in expected] and len(x) == 3 * n


@SPECS
@pytest.mark.parametrize("rule", RULES)
def test_guidance_is_the_samplers_with_each_runs_weight_and_policy(rule, spec):
    """A block is what it is if all runs have its policy and weight; without a weight it is unguided."""
    policy, lam, n = stack(spec), [0.7, 0.0, 1.3], 4
    ours, shape = diffusion(network(spec), solver="heun", churn=2.0), (3 * n, 4, spec.width)

    def noise():
        return [(generator("cpu", "rounds", seed, 5, 0), n) for seed in SEEDS]

    x, _ = ours.draw(policy, rule, lam, n, SEEDS, 5)
    unguided, _ = sampler.sample(network(spec), shape, STEPS, 2.0, noise())
    for r, block in enumerate(x.split(n)):
        guide = Guide(rule, policy.select([r] * 3), ours.denoiser.normaliser, lam[r], STEPS, 1 if rule in WARMED else 0)
        expected, _ = sampler.sample(network(spec), shape, STEPS, 2.0, noise(), guide)
        torch.testing.assert_close(block, expected.split(n)[r], rtol=1e-4, atol=1e-4)
        assert torch.equal(block, unguided.split(n)[r]) == (lam[r] == 0)
        assert (block - unguided.split(n)[r]).abs().max() > 1e-2 or lam[r] == 0


@pytest.mark.parametrize("rule", RULES)
def test_only_the_papers_rules_and_their_kin_are_warmed(rule):
    none = diffusion().draw(stack(), rule, [0.0] * 3, 3, SEEDS, 0)[0]
    guided = diffusion(warmup=STEPS).draw(stack(), rule, [0.5] * 3, 3, SEEDS, 0)[0]
    assert torch.equal(guided, none) == (rule in ("explicit", "proximal", "annealed"))


def test_noise_depends_on_seed_number_and_stream_and_on_no_global_state():
    def drawn(*named):
        return diffusion().draw(stack(), "explicit", [0.0] * 3, 40, *named)[0]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    a = drawn(SEEDS, 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(a, drawn(SEEDS, 0)) and torch.equal(a, drawn(SEEDS, 0, "rounds"))
    every = [a, drawn([6, 1, 4], 0), drawn(SEEDS, 1), drawn(SEEDS, 500), drawn(SEEDS, 0, "calibration")]
    assert len(torch.cat(every)[:, 0, 0].unique()) == 5 * 3 * 40  # nowhere the same trajectory


STACKS = [[2], [2, 0], [1, 2, 0], [2, 1, 1, 0, 2]]  # of which of the three runs


@pytest.mark.parametrize("solver, churn", [("multistep", 0.0), ("heun", 2.0)])
def test_the_noise_of_a_run_is_its_own_in_any_company(solver, churn):
    """Alone, between others, in another order, in other chunks, with more to follow: bit for bit without guidance."""
    n, how = 70, dict(solver=solver, churn=churn)
    whole, _ = diffusion(**how).draw(stack(), "explicit", [0.0] * 3, n, SEEDS, 2)
    for runs, chunk in itertools.product(STACKS, (1, 200, 512)):
        ours, seeds = diffusion(**how, chunk=chunk), [SEEDS[r] for r in runs]
        x, _ = ours.draw(stack().select(runs), "explicit", [0.0] * len(runs), n, seeds, 2)
        assert all(torch.equal(block, whole.split(n)[r]) for r, block in zip(runs, x.split(n), strict=True))
        shorter, _ = ours.draw(stack().select(runs), "explicit", [0.0] * len(runs), 64, seeds, 2)
        assert all(torch.equal(a, b[:64]) for a, b in zip(shorter.split(64), x.split(n), strict=True))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("solver", sampler.SOLVERS)
def test_a_nan_policy_leaves_the_other_runs_untouched(rule, solver):
    ours, given = diffusion(network(), solver=solver), ([0.5] * 3, 4, SEEDS, 0)
    clean, batch = (ours.generate(policy, rule, *given) for policy in (stack(), broken(stack())))
    (x, _), (y, diverged) = (ours.draw(policy, rule, *given) for policy in (stack(), broken(stack())))
    assert y.isfinite().all() and diverged.tolist() == [False] * 4 + [True] * 4 + [False] * 4
    for r in (0, 2):
        assert torch.equal(x.split(4)[r], y.split(4)[r]) and torch.equal(clean.data[r], batch.data[r])
        assert all(getattr(clean, name)[r] == getattr(batch, name)[r] for name in NAMES)
    assert batch.data[1].shape == (0, SMALL.transition_width)
    assert (batch.diverged.tolist(), batch.kept[1], batch.ended[1]) == ([0, 1, 0], 0, 0) and batch.log_likelihood[1].isnan()
    unguided = ours.generate(broken(stack()), rule, [0.5, 0.0, 0.5], *given[1:])  # where it guides nothing, nothing diverges
    assert unguided.diverged.tolist() == [0, 0, 0] and len(unguided.data[1]) > 0


@SPECS
@pytest.mark.parametrize("transform", ["raw", "arctanh"])
def test_what_is_generated_and_its_facts(transform, spec):
    """By hand from what was drawn; some trajectories diverge."""
    policy, n = stack(spec), 30
    ours, given = diffusion(Losing(1.0, spec, T, transform)), ("explicit", torch.tensor([0.0, 0.5, 1.0]).double(), n, SEEDS, 3)
    batch, (x, diverged) = ours.generate(policy, *given), ours.draw(policy, *given)
    assert 2 < diverged.sum() < 60
    steps = ours.denoiser.normaliser.denormalise(x).split(n)
    assert (steps[0][..., spec.actions].abs() > 1).any() == (transform == "raw")
    for r, (block, lost) in enumerate(zip(steps, diverged.split(n))):
        ids, lines = loop(spec, block[~lost])
        np.testing.assert_array_equal(batch.data[r], lines)
        assert batch.kept[r].item() == pytest.approx(len(ids) / (n * T))
        assert batch.diverged[r].item() == pytest.approx(lost.float().mean().item())
        flags = (block[~lost][..., spec.terminal] > 0.5).numpy()
        assert batch.ended[r].item() == pytest.approx(flags.any(1).sum() / n) and flags.any()
        likelihoods, own = [], policy.select([r])
        for trajectory, flag in zip(block[~lost], flags):
            lived = trajectory[: flag.argmax() + 1] if flag.any() else trajectory
            normal = torch.distributions.Normal(*own(lived[:, spec.obs]))
            likelihoods.append(normal.log_prob(lived[:, spec.actions]).mean().item())
        assert batch.log_likelihood[r].item() == pytest.approx(np.mean(likelihoods), rel=1e-4)
        assert batch.on_policy[r].item() == pytest.approx(-normal.entropy().mean().item())
    assert batch.lam.tolist() == [0.0, 0.5, 1.0] and batch.data[0][:, spec.terminal].unique().tolist() == [0, 1]
    assert all(getattr(batch, name).shape == (3,) and getattr(batch, name).dtype == torch.float32 for name in (*NAMES, "lam"))


def test_log_likelihoods_are_means_over_the_trajectories_that_are_finite():
    policy, ours = stack(), diffusion(Losing(1.0, SMALL, T))
    given = "smoothed", [0.0, 1.0, 4.0], 12, SEEDS, 2
    (x, diverged), found = ours.draw(policy, *given, "calibration"), ours.log_likelihoods(policy, *given)
    assert found.shape == (3,) and diverged.any()
    for r, (block, lost) in enumerate(zip(ours.denoiser.normaliser.denormalise(x).split(12), diverged.split(12))):
        normal = torch.distributions.Normal(*policy.select([r])(block[~lost][..., SMALL.obs]))
        assert found[r].item() == pytest.approx(normal.log_prob(block[~lost][..., SMALL.actions]).mean().item(), rel=1e-4)


def test_every_run_needs_a_seed():
    with pytest.raises(ValueError, match=r"seeds=\[1, 2\] is not allowed; it must hold one for each of the 3 runs"):
        diffusion().draw(stack(), "smoothed", [1.0] * 3, 2, [1, 2], 0)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_share_of_real_transitions(fraction):
    made, real = draw(0, 100, SMALL.transition_width), draw(1, 40, SMALL.transition_width)
    mixed = synthetic.mixed(made, real, fraction, 0, 0)
    is_real = (mixed[:, None] == real).all(-1).any(1)
    assert is_real.float().mean().item() == pytest.approx(fraction, abs=0.005)
    assert torch.equal(mixed[~is_real], made if fraction < 1 else made[:0])
    if fraction == 1:
        assert torch.equal(mixed, real)
    elif fraction > 0:
        again, *others = (synthetic.mixed(made, real, fraction, *named) for named in ((0, 0), (1, 0), (0, 1), (1, 1), (0, 2)))
        assert torch.equal(again, mixed) and all(other.shape == mixed.shape for other in others)
        assert not any(torch.equal(a, b) for a, b in itertools.combinations((mixed, *others), 2))
        assert len(mixed[is_real].unique(dim=0)) > 0.6 * min(is_real.sum(), 40)


# The world model

LENGTH = 5
HEIGHT, EXPLODES, COUNT, NUMBER = range(3, 7)  # what observations hold after the three actions


class Telling:
    """A model whose next state holds the action, counts the steps, loses height, and explodes in the third step for some.

    Its own rewards have nothing to do with the environment's.
    """

    obs_dim, elites, out = 7, torch.arange(2), slice(10, 18)
    mean, std = torch.zeros(18), torch.ones(18)

    def predict(self, obs, actions):
        new = obs.clone()
        new[:, :3] = actions
        new[:, COUNT] += 1
        new[:, HEIGHT] -= 0.1
        new[:, EXPLODES] = torch.where((obs[:, EXPLODES] > 0) & (obs[:, COUNT] == 2), 1e6, obs[:, EXPLODES])
        return new.expand(2, -1, -1), torch.full((2, len(obs)), -50.0), torch.zeros(2, len(obs), 8)


def starts():
    """Numbered states: they fall in step 1, 2, ..., 8 (5 are rolled out); every fourth explodes."""
    obs, i = torch.zeros(16, 7), torch.arange(16)
    obs[:, HEIGHT], obs[:, EXPLODES], obs[:, NUMBER] = 0.1 * (i % 8) + 0.05, (i % 4 == 3).float(), i.float()
    return obs


def checked(of):
    """The function `of` of arrays, which takes no others."""

    def call(*arrays):
        assert all(isinstance(x, np.ndarray) and x.dtype == np.float64 for x in arrays)
        return of(*arrays)

    return call


OUTCOME = SimpleNamespace(
    reward=checked(lambda obs, actions, after: obs[..., NUMBER] + after[..., 0] ** 2 + 3 * actions[..., 1]),
    ended=checked(lambda obs: obs[..., HEIGHT] < 0),
    states={"reconstructed": None},
)


def lived(i):
    """The steps of a rollout from state i of `starts`, or None where it diverges."""
    length = min(i % 8 + 1, LENGTH)
    return None if i % 4 == 3 and length >= 3 else length


def rollouts(policy, n=20, seeds=SEEDS, number=0, model=None):
    return synthetic.from_world_model(model or Telling(), policy, starts(), n, LENGTH, seeds, number, OUTCOME)


def test_rollouts_in_the_world_model():
    policy, n = stack(), 400
    batch = rollouts(policy, n)
    assert len(batch.data) == 3 and batch.lam.isnan().all()
    assert all(getattr(batch, name).shape == (3,) and getattr(batch, name).dtype == torch.float32 for name in (*NAMES, "lam"))
    for r, made in enumerate(batch.data):
        number, step = made[:, NUMBER].long().tolist(), made[:, COUNT].long().tolist()
        firsts = [i for i, t in zip(number, step) if t == 0]
        assert sorted(zip(number, step)) == sorted((i, t) for i in firsts for t in range(lived(i)))
        assert set(firsts) == {i for i in range(16) if lived(i)} and len(firsts) == round(n * (1 - batch.diverged[r].item()))
        assert batch.diverged[r].item() == pytest.approx(0.25, abs=0.09)  # four std
        assert batch.kept[r].item() == pytest.approx(len(made) / (n * LENGTH))
        falls = torch.tensor([t + 1 == i % 8 + 1 for i, t in zip(number, step)])
        assert torch.equal(made[:, SMALL.terminal], falls.float())
        assert batch.ended[r].item() == pytest.approx(falls.sum().item() / n) and 0.3 < batch.ended[r] < 0.7
        # Actions are those of the run's own policy, and lead to the next state, which gives the reward.
        following = made[:, SMALL.next_obs]
        rewards = made[:, NUMBER] + following[:, 0] ** 2 + 3 * made[:, SMALL.actions][:, 1]  # of actions as they are clipped
        np.testing.assert_allclose(made[:, SMALL.reward], rewards, rtol=1e-5)
        mean, std = policy.select([r])(made[:, SMALL.obs])
        z = (following[:, :3] - mean) / std
        assert z.abs().max() < 6 and z.std().item() == pytest.approx(1, abs=0.05)
        assert torch.equal(made[:, SMALL.actions], following[:, :3].clip(-1, 1))
        assert torch.equal(following[:, COUNT], made[:, COUNT] + 1)
        entropy = torch.distributions.Normal(mean[0], std[0]).entropy().mean().item()
        assert batch.on_policy[r].item() == pytest.approx(-entropy)
        assert batch.log_likelihood[r].item() == pytest.approx(-entropy, abs=4 / math.sqrt(6 * n))


def test_rollouts_depend_on_seed_and_round_alone():
    """Bit for bit in any company: every run is rolled out for itself. Its likelihood, of a stack, to float precision."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole = rollouts(stack())
    assert torch.equal(torch.get_rng_state(), state)
    for runs in STACKS:
        batch = rollouts(stack().select(runs), seeds=[SEEDS[r] for r in runs])
        for i, r in enumerate(runs):
            assert torch.equal(batch.data[i], whole.data[r])
            assert all(getattr(batch, name)[i] == getattr(whole, name)[r] for name in NAMES if name != "log_likelihood")
            assert batch.log_likelihood[i].item() == pytest.approx(whole.log_likelihood[r].item(), rel=1e-4)
    others = [rollouts(stack(), seeds=[1, 2, 4]), rollouts(stack(), number=1), rollouts(stack(), number=2)]
    for x, y in itertools.combinations((whole, *others), 2):
        assert not any(torch.equal(a, b) for a, b in zip(x.data, y.data))


def test_a_nan_policy_leaves_other_rollouts_untouched():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ensemble = worldmodel.Ensemble(7, 3, 3, 2, (16,)).requires_grad_(False)
    ensemble.fit_normalisation(toy([40], spec=SMALL))
    clean, batch = (rollouts(policy, model=ensemble) for policy in (stack(), broken(stack())))
    for r in (0, 2):
        assert torch.equal(clean.data[r], batch.data[r]) and len(batch.data[r]) > 10
        assert all(getattr(clean, name)[r] == getattr(batch, name)[r] for name in NAMES)
    assert batch.data[1].shape == (0, SMALL.transition_width)
    assert (batch.diverged[1], batch.kept[1], batch.ended[1]) == (1, 0, 0)
