"""Synthetic data against Python loops over hand-made and random trajectories, closed-form curves, and a model that tells."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import SPEC, toy
from torch import nn

from pgdlib import data, edm, measures, sampler, synthetic, worldmodel
from pgdlib.agents import stack as agents
from pgdlib.agents.stack import (
    ACTIONS,
    NEXT_OBS,
    OBS,
    REWARD,
    TERMINAL,
    WIDTH,
    StackedPolicy,
    generators,
    of_trajectories,
    td3_bc,
)
from pgdlib.edm import Denoiser, seeded
from pgdlib.guidance import RULES, Guide
from pgdlib.simulators import pen as adroit

T, STEPS = 6, 5
SEEDS = [5, 0, 3]  # of three runs
NAMES = ("kept", "ended", "diverged", "log_likelihood", "on_policy")


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_policy(runs=3, log_std=-1.0, spread=2.0):
    """Policies that differ much: random networks, each with another constant in its actions."""
    policy = StackedPolicy((8,), generators(range(runs)), draw(1, 45), draw(2, 45).abs() + 0.5, log_std)
    with torch.no_grad():
        policy.net.biases[-1] += spread * draw(3, runs, 1, 24)
    return policy.requires_grad_(False)


class Ideal(nn.Module):
    """The denoiser of data whose normalised channels are independent N(0, 1), each step for itself.

    With a number `beyond`, trajectories whose last reward is above it by the end come out as NaN.
    """

    horizon = T

    def __init__(self, beyond=math.inf, transform="raw"):
        super().__init__()
        self.normaliser, self.beyond = data.Normaliser(SPEC, transform).fit(toy([40]).packed()), beyond

    def forward(self, x, sigma):
        out = x / (1 + torch.as_tensor(sigma, dtype=x.dtype) ** 2)
        lost = (out[:, -1, SPEC.reward] > self.beyond) & (sigma < 1.0)
        return torch.where(lost[:, None, None], torch.nan, out)


def network(transform="raw"):
    """A small U-Net with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = Denoiser(4, 8, 1, transform=transform)
    denoiser.normaliser.fit(toy([40]).packed())
    return denoiser.requires_grad_(False)


def noise_of(seeds, round, n, block=0):
    """Where the noise of the runs' n trajectories of one block comes from."""
    return [(seeded("cpu", 2_000_000 + seed, 1_000 * round + block), n) for seed in seeds]


def diffusion(denoiser=None, **changes):
    return synthetic.Diffusion(denoiser or Ideal(), **{**dict(solver="multistep", steps=STEPS, churn=0.0, warmup=1), **changes})


# Transitions of trajectories


def trajectories(terminal, seed=0):
    """Random steps [B, T, 71] with such terminal flags [B, T]; a third of the actions out of range."""
    terminal = torch.as_tensor(terminal, dtype=torch.float32)
    steps = draw(seed, *terminal.shape, 71)
    steps[..., SPEC.terminal] = terminal
    return steps


def loop(steps):
    """[(trajectory, step)] of all transitions and their packed values, step by step."""
    ids, lines = [], []
    for b, trajectory in enumerate(steps.numpy()):
        for t, step in enumerate(trajectory):
            end = step[70] > 0.5
            if not end and t + 1 == len(trajectory):
                break
            following = step[:45] if end else trajectory[t + 1][:45]
            ids.append((b, t))
            lines.append([*step[:45], *step[45:69].clip(-1, 1), step[69], float(end), *following])
            if end:
                break
    return ids, np.array(lines, dtype=np.float32).reshape(-1, WIDTH)


@pytest.mark.parametrize(
    "terminal, expected",
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
def test_transitions_of_one_trajectory(terminal, expected):
    steps = trajectories([terminal])
    alive = measures.alive(steps[..., SPEC.terminal])
    assert synthetic.successors(steps, alive)[0].nonzero()[:, 0].tolist() == expected
    cut = synthetic.cut(steps, alive)
    assert cut.shape == (len(expected), WIDTH)
    for line, t in zip(cut, expected, strict=True):
        end = terminal[t] > 0.5
        assert torch.equal(line[OBS], steps[0, t, SPEC.obs]) and line[REWARD] == steps[0, t, SPEC.reward]
        assert torch.equal(line[ACTIONS], steps[0, t, SPEC.actions].clip(-1, 1)) and line[TERMINAL] == end
        assert torch.equal(line[NEXT_OBS], steps[0, t if end else t + 1, SPEC.obs])


@pytest.mark.parametrize("seed, share", [(0, 0.0), (1, 0.1), (2, 0.5), (3, 1.0)])
def test_transitions_are_those_of_a_loop(seed, share):
    steps = trajectories(0.1 + 0.8 * (torch.rand(40, T, generator=torch.Generator().manual_seed(seed)) < share).float(), seed)
    alive = measures.alive(steps[..., SPEC.terminal])
    ids, lines = loop(steps)
    assert [tuple(i) for i in synthetic.successors(steps, alive).nonzero().tolist()] == ids
    np.testing.assert_array_equal(synthetic.cut(steps, alive), lines)
    blocks = steps.unflatten(0, (4, 10)), alive.unflatten(0, (4, 10))
    assert torch.equal(synthetic.successors(*blocks).flatten(0, 1), synthetic.successors(steps, alive))


def test_no_trajectory_gives_no_transition():
    steps = trajectories(torch.zeros(0, T))
    assert synthetic.cut(steps, measures.alive(steps[..., SPEC.terminal])).shape == (0, WIDTH)


# Drawing


@pytest.mark.parametrize("n, chunk", [(1, 512), (5, 512), (5, 1), (32, 96), (33, 1), (70, 200), (96, 192)])
def test_each_run_has_its_block(monkeypatch, n, chunk):
    """The proximal rule with a huge weight ends on the mean of the policy: of each run's own, whatever the chunks."""
    monkeypatch.setattr(edm, "has_bfloat16", lambda device: False)  # the mean in full precision
    policy = a_policy()
    x, diverged = diffusion(chunk=chunk).draw(policy, "proximal", [1e8] * 3, n, SEEDS, 0)
    assert x.shape == (3 * n, T, 71) and diverged.tolist() == [False] * 3 * n
    normaliser = Ideal().normaliser
    for r, block in enumerate(x.split(n)):
        for other in range(3):
            mean = policy.select([other])(normaliser.obs(block))[0]
            error = (normaliser.actions(block) - mean).abs().max()
            assert error < 1e-4 if other == r else error > 0.1
    assert len(torch.unique(x[:, 0, 0])) == 3 * n  # no noise comes twice


@pytest.mark.parametrize(
    "n, chunk, expected",
    [
        (5, 512, [5]),
        (5, 1, [5]),
        (32, 1, [32]),
        (70, 512, [70]),
        (70, 192, [64, 6]),
        (70, 191, [32, 32, 6]),
        (160, 192, [64, 64, 32]),
        (161, 480, [160, 1]),
        (161, 576, [161]),
    ],
)
def test_chunks_are_as_large_as_allowed(n, chunk, expected, monkeypatch):
    """In whole blocks of 32 trajectories for each of three runs, of which one always fits."""
    shapes, sample = [], sampler.sample
    monkeypatch.setattr(
        sampler, "sample", lambda denoise, shape, *a, **k: shapes.append(shape) or sample(denoise, shape, *a, **k)
    )
    x, diverged = diffusion(chunk=chunk).draw(a_policy(), "smoothed", [1.0] * 3, n, SEEDS, 0)
    assert shapes == [(3 * count, T, 71) for count in expected] and x.shape == (3 * n, T, 71) and diverged.shape == (3 * n,)


@pytest.mark.parametrize("rule", RULES)
def test_guidance_is_the_samplers_with_each_runs_weight_and_policy(rule):
    """A block is what it is if all runs have its policy and weight; without a weight it is unguided."""
    policy, lam, n = a_policy(), [0.7, 0.0, 1.3], 4
    ours = diffusion(network(), solver="heun", churn=2.0)
    x, _ = ours.draw(policy, rule, lam, n, SEEDS, 5)
    unguided, _ = sampler.sample(network(), (3 * n, 4, 71), STEPS, 2.0, noise_of(SEEDS, 5, n))
    for r, block in enumerate(x.split(n)):
        alike = policy.select([r] * 3)
        guide = Guide(rule, alike, ours.denoiser.normaliser, lam[r], STEPS, 1 if rule in synthetic.WARMED else 0)
        expected, _ = sampler.sample(network(), (3 * n, 4, 71), STEPS, 2.0, noise_of(SEEDS, 5, n), guide)
        torch.testing.assert_close(block, expected.split(n)[r], rtol=1e-4, atol=1e-4)
        assert torch.equal(block, unguided.split(n)[r]) == (lam[r] == 0)
        assert (block - unguided.split(n)[r]).abs().max() > 1e-2 or lam[r] == 0


@pytest.mark.parametrize("rule", RULES)
def test_only_the_papers_rules_and_their_kin_are_warmed(rule):
    policy, none = a_policy(), diffusion().draw(a_policy(), rule, [0.0] * 3, 3, SEEDS, 0)[0]
    guided = diffusion(warmup=STEPS).draw(policy, rule, [0.5] * 3, 3, SEEDS, 0)[0]
    assert torch.equal(guided, none) == (rule in ("explicit", "proximal", "annealed"))


def test_noise_depends_on_seed_and_round_and_on_no_global_state():
    policy = a_policy()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a = diffusion().draw(policy, "explicit", [0.0] * 3, 40, SEEDS, 0)[0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(a, diffusion().draw(policy, "smoothed", [0.0] * 3, 40, SEEDS, 0)[0])
    others = [([6, 1, 4], 0), (SEEDS, 1), (SEEDS, 2), (SEEDS, 500), (SEEDS, 501)]
    drawn = [a, *(diffusion().draw(policy, "explicit", [0.0] * 3, 40, *other)[0] for other in others)]
    assert all((x != y).any((1, 2)).all() for x, y in itertools.combinations(drawn, 2))
    assert len(torch.cat(drawn)[:, 0, 0].unique()) == 6 * 3 * 40  # nowhere the same trajectory


# Runs in other company: alone, between others, in another order, with another chunk

STACKS = [[0], [2], [0, 1, 2], [2, 0], [1, 2, 0], [0, 0, 2], [2, 1, 1, 0, 2]]  # of which runs


def stack_of(runs):
    """The policies, weights and seeds of those of three runs."""
    return a_policy().select(runs), [[0.7, 0.3, 1.3][r] for r in runs], [SEEDS[r] for r in runs]


@pytest.mark.parametrize("solver, churn", [("multistep", 0.0), ("heun", 2.0)])
@pytest.mark.parametrize("n", [3, 32, 70])
def test_the_noise_of_a_run_is_its_own_in_any_company(n, solver, churn):
    """Bit for bit, as a denoiser that works on each value for itself shows it without guidance."""
    whole, _ = diffusion(solver=solver, churn=churn).draw(a_policy(), "explicit", [0.0] * 3, n, SEEDS, 2)
    for runs, chunk in itertools.product(STACKS, (1, 200, 512)):
        policy, _, seeds = stack_of(runs)
        ours = diffusion(solver=solver, churn=churn, chunk=chunk)
        x, _ = ours.draw(policy, "explicit", [0.0] * len(runs), n, seeds, 2)
        for r, block in zip(runs, x.split(n), strict=True):
            assert torch.equal(block, whole.split(n)[r])
    a, b = (v[:, 0, 0].unique() for v in whole.split(n)[:2])
    assert len(a) == len(b) == n and not set(a.tolist()) & set(b.tolist())


def test_whole_blocks_do_not_depend_on_how_many_follow():
    short, long = (diffusion().draw(a_policy(), "explicit", [0.0] * 3, n, SEEDS, 0)[0].split(n) for n in (64, 100))
    assert all(torch.equal(a, b[:64]) for a, b in zip(short, long))


@pytest.mark.parametrize("rule", RULES)
def test_what_a_run_is_given_does_not_depend_on_its_company(rule):
    """To float precision: networks multiply matrices of other sizes. Across chunks too."""
    ours = diffusion(network(), solver="heun", churn=2.0)
    policy, lam, seeds = stack_of([0, 1, 2])
    n = 40
    whole, _ = ours.draw(policy, rule, lam, n, seeds, 2)
    batch, likelihood = ours.generate(policy, rule, lam, n, seeds, 2), ours.log_likelihoods(policy, rule, lam, n, seeds, 2)
    for runs, chunk in (([1], 512), ([2, 0], 1), ([1, 2, 0, 1], 512), ([0, 1, 2], 1)):
        policy, lam, seeds = stack_of(runs)
        other = diffusion(network(), solver="heun", churn=2.0, chunk=chunk)
        x, _ = other.draw(policy, rule, lam, n, seeds, 2)
        made = other.generate(policy, rule, lam, n, seeds, 2)
        found = other.log_likelihoods(policy, rule, lam, n, seeds, 2)
        for i, r in enumerate(runs):
            torch.testing.assert_close(x.split(n)[i], whole.split(n)[r], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(made.data[i], batch.data[r], rtol=1e-3, atol=1e-2)
            assert found[i].item() == pytest.approx(likelihood[r].item(), rel=1e-3)
            for name in NAMES:
                assert getattr(made, name)[i].item() == pytest.approx(getattr(batch, name)[r].item(), rel=1e-3), name


@pytest.mark.parametrize("runs", STACKS, ids=str)
def test_a_runs_rollouts_and_real_transitions_do_not_depend_on_its_company(runs):
    """Bit for bit: every run is rolled out for itself. Its likelihood, of a stacked policy, to float precision."""
    whole = synthetic.from_world_model(Telling(), a_policy(), starts(), 20, LENGTH, SEEDS, 3)
    policy, _, seeds = stack_of(runs)
    batch = synthetic.from_world_model(Telling(), policy, starts(), 20, LENGTH, seeds, 3)
    real = draw(1, 40, WIDTH)
    for i, r in enumerate(runs):
        assert torch.equal(batch.data[i], whole.data[r])
        assert all(getattr(batch, name)[i] == getattr(whole, name)[r] for name in ("kept", "ended", "diverged", "on_policy"))
        assert batch.log_likelihood[i].item() == pytest.approx(whole.log_likelihood[r].item(), rel=1e-4)
        mixed = (synthetic.mixed(b.data[k], real, 0.5, SEEDS[r], 3) for b, k in ((batch, i), (whole, r)))
        assert torch.equal(*mixed)


def test_no_two_draws_share_a_generator(monkeypatch):
    """Of trajectories, of the search for λ, of rollouts and of real transitions, of neighbouring seeds, in all rounds."""
    started = []

    def recorded(device, seed, step):
        generator = seeded(device, seed, step)
        started.append(generator.initial_seed())
        return generator

    monkeypatch.setattr(synthetic, "seeded", recorded)
    policy, seeds, made = a_policy(), [0, 1, 2], draw(0, 9, WIDTH)
    for round in (*range(12), *range(500, 512)):
        diffusion().draw(policy, "explicit", [0.0] * 3, 200, seeds, round)
        synthetic.from_world_model(Telling(), policy, starts(), 4, LENGTH, seeds, round)
        for seed in seeds:
            synthetic.mixed(made, made, 0.5, seed, round)
    assert len(set(started)) == len(started) == 24 * 3 * (7 + 1 + 1)
    monkeypatch.setattr(agents, "seeded", recorded)
    monkeypatch.setattr(td3_bc, "seeded", recorded)
    agent = td3_bc.TD3BC(seeds, torch.zeros(45), torch.ones(45), hidden=(4,))
    before = len(started)
    agents.Learner(agent, seeds, 70, batch_size=4, learning_rate=1e-3).train([made] * 3, 70)
    assert len(set(started)) == len(started) > before  # nor do they with the training of these agents


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("solver", sampler.SOLVERS)
def test_a_nan_policy_leaves_the_other_runs_untouched(rule, solver):
    whole, broken = a_policy(), a_policy()
    for p in broken.parameters():
        p.data[1] = math.nan
    ours, lam = diffusion(network(), solver=solver), [0.5] * 3
    clean = ours.generate(whole, rule, lam, 4, SEEDS, 0)
    batch = ours.generate(broken, rule, lam, 4, SEEDS, 0)
    (x, _), (y, diverged) = (ours.draw(policy, rule, lam, 4, SEEDS, 0) for policy in (whole, broken))
    assert y.isfinite().all() and diverged.tolist() == [False] * 4 + [True] * 4 + [False] * 4
    for r in (0, 2):
        assert torch.equal(x.split(4)[r], y.split(4)[r]) and torch.equal(clean.data[r], batch.data[r])
        assert all(getattr(clean, name)[r] == getattr(batch, name)[r] for name in NAMES)
    assert batch.data[1].shape == (0, WIDTH)
    assert (batch.diverged.tolist(), batch.kept[1], batch.ended[1]) == ([0, 1, 0], 0, 0) and batch.log_likelihood[1].isnan()
    unguided = ours.generate(broken, rule, [0.5, 0.0, 0.5], 4, SEEDS, 0)  # where a NaN policy guides nothing, nothing diverges
    assert unguided.diverged.tolist() == [0, 0, 0] and len(unguided.data[1]) > 0


@pytest.mark.parametrize("transform", ["raw", "arctanh"])
def test_what_is_generated_and_its_facts(transform):
    """By hand from what was drawn; some trajectories diverge."""
    policy, n = a_policy(), 30
    ours = diffusion(Ideal(1.0, transform))
    batch = ours.generate(policy, "explicit", [0.0, 0.5, 1.0], n, SEEDS, 3)
    x, diverged = ours.draw(policy, "explicit", [0.0, 0.5, 1.0], n, SEEDS, 3)
    assert 5 < diverged.sum() < 60
    steps = ours.denoiser.normaliser.denormalise(x).split(n)
    assert (steps[0][..., SPEC.actions].abs() > 1).any() == (transform == "raw")
    for r, (block, lost) in enumerate(zip(steps, diverged.split(n))):
        ids, lines = loop(block[~lost])
        np.testing.assert_array_equal(batch.data[r], lines)
        assert batch.kept[r].item() == pytest.approx(len(ids) / (n * T))
        assert batch.diverged[r].item() == pytest.approx(lost.float().mean().item())
        flags = (block[~lost][..., SPEC.terminal] > 0.5).numpy()
        assert batch.ended[r].item() == pytest.approx(flags.any(1).sum() / n) and flags.any()
        likelihoods, own = [], policy.select([r])
        for trajectory, flag in zip(block[~lost], flags):
            lived = trajectory[: flag.argmax() + 1] if flag.any() else trajectory
            mean, std = own(lived[None, :, SPEC.obs])
            log_prob = torch.distributions.Normal(mean[0], std[0]).log_prob(lived[:, SPEC.actions])
            likelihoods.append(log_prob.sum(-1).mean().item() / 24)
        assert batch.log_likelihood[r].item() == pytest.approx(np.mean(likelihoods), rel=1e-4)
        entropy = torch.distributions.Normal(*own(lived[None, :1, SPEC.obs])).entropy().mean().item()
        assert batch.on_policy[r].item() == pytest.approx(-entropy)
    assert batch.lam.tolist() == [0.0, 0.5, 1.0] and batch.lam.dtype == torch.float32
    assert batch.data[0][:, TERMINAL].unique().tolist() == [0, 1]


def test_log_likelihoods_are_means_over_trajectories():
    policy, ours = a_policy(), diffusion()
    x, _ = ours.draw(policy, "smoothed", [0.0, 1.0, 4.0], 6, SEEDS, 2)
    found = ours.log_likelihoods(policy, "smoothed", [0.0, 1.0, 4.0], 6, SEEDS, 2)
    assert found.shape == (3,)
    for r, block in enumerate(ours.denoiser.normaliser.denormalise(x).split(6)):
        mean, std = policy.select([r])(block[..., SPEC.obs])
        expected = torch.distributions.Normal(mean, std).log_prob(block[..., SPEC.actions]).mean()
        assert found[r].item() == pytest.approx(expected.item(), rel=1e-4)
    unguided, guided = (ours.log_likelihoods(policy, "smoothed", [lam] * 3, 6, SEEDS, 2) for lam in (0.0, 4.0))
    assert (guided > unguided).all()


# Calibration


class Curve:
    """Log-likelihoods that rise with λ, `value(λ)` [R]; it remembers what it was asked."""

    def __init__(self, value):
        self.value, self.asked = value, []

    def __call__(self, lam):
        self.asked.append(lam.clone())
        return self.value(lam)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_calibration_meets_another_target_in_each_run(dtype):
    """λ/(1 + λ) and log(1 + λ): found to within half of the last interval of the bisection, 2% after 8 rounds."""
    true = torch.tensor([0.002, 0.05, 0.3, 1.0, 2.0, 7.0, 29.0], dtype=dtype)
    precision = (30 / 1e-3) ** (1 / 2**9)
    assert precision < 1.021
    for value in (lambda lam: lam / (1 + lam), torch.log1p):
        curve = Curve(value)
        found = synthetic.calibrate(curve, value(true))
        assert (found / true).log().abs().max() < math.log(precision) * 1.001
        assert all(lam.shape == (7,) for lam in curve.asked) and len(curve.asked) == 10
        finer = synthetic.calibrate(value, value(true), rounds=14)
        assert (finer / true - 1).abs().max() < 1e-3
    narrow = synthetic.calibrate(torch.log1p, torch.log1p(true), lowest=0.1, highest=5.0, rounds=12)
    assert (narrow / true - 1)[2:5].abs().max() < 0.01 and narrow[-1] == 5


def test_calibration_at_its_ends():
    """0 where the target is reached without guidance, even exactly; the highest weight where it never is; a NaN too."""
    targets = torch.tensor([-1.0, 0.0, 0.9, 30 / 31, 0.99, math.nan, 1e-5])
    found = synthetic.calibrate(lambda lam: lam / (1 + lam), targets)
    assert found[:2].tolist() == [0, 0] and found[4:6].tolist() == [30, 30] and found.isfinite().all()
    assert found[2].item() == pytest.approx(9, rel=0.021) and 29 < found[3] <= 30
    assert 1e-3 <= found[6] < 1.05e-3  # nothing below the lowest is tried
    nothing = synthetic.calibrate(lambda lam: torch.full_like(lam, math.nan), torch.zeros(2))
    assert nothing.tolist() == pytest.approx([1e-3, 1e-3], rel=0.05)  # a run of which nothing is known counts as too far


def test_calibration_stays_below_the_limit_of_a_rule():
    """The explicit rule diverges from λ = 2 on: trajectories become less likely than unguided ones, which is too far."""

    def likelihoods(lam):
        return torch.where(lam < 2, lam / (1 + lam), -300.0 * lam)

    true = torch.tensor([0.01, 0.3, 1.0, 1.9])
    found = synthetic.calibrate(likelihoods, likelihoods(true))
    assert (found / true).log().abs().max() < math.log(1.021)
    assert 1.9 < synthetic.calibrate(likelihoods, torch.tensor([0.9]))[0] < 2.04  # out of reach


def test_the_papers_rule_can_be_calibrated():
    policy, ours = a_policy(spread=0.5), diffusion(warmup=0, steps=16)
    targets = -policy.entropy().double() / 24
    lam = synthetic.calibrate(lambda lam: ours.log_likelihoods(policy, "explicit", lam, 32, SEEDS, 1), targets)
    assert (lam < 2).all() and (ours.log_likelihoods(policy, "explicit", lam, 32, SEEDS, 1) - targets).abs().max() < 0.1


def test_calibrated_trajectories_are_as_likely_as_the_policys_actions():
    """The proximal rule in the sampler itself, for three policies of one std and means apart."""
    policy, ours = a_policy(spread=0.5), diffusion(warmup=0)
    targets = -policy.entropy().double() / 24

    def likelihoods(lam):
        return ours.log_likelihoods(policy, "proximal", lam, 64, SEEDS, 1)

    lam = synthetic.calibrate(likelihoods, targets, rounds=12)
    assert ((lam > 0) & (lam < 30)).all() and (likelihoods(torch.zeros(3)) < targets - 0.5).all()
    assert (likelihoods(lam) - targets).abs().max() < 0.02


# Real transitions among them


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_share_of_real_transitions(fraction):
    made, real = draw(0, 100, WIDTH), draw(1, 40, WIDTH)
    mixed = synthetic.mixed(made, real, fraction, 0, 0)
    is_real = (mixed[:, None] == real).all(-1).any(1)
    assert is_real.float().mean().item() == pytest.approx(fraction, abs=0.005)
    assert torch.equal(mixed[~is_real], made if fraction < 1 else made[:0])
    if fraction == 1:
        assert torch.equal(mixed, real)
    if 0 < fraction < 1:
        again, *others = (synthetic.mixed(made, real, fraction, *named) for named in ((0, 0), (1, 0), (0, 1), (1, 1), (0, 2)))
        assert torch.equal(again, mixed) and all(other.shape == mixed.shape for other in others)
        assert not any(torch.equal(a, b) for a, b in itertools.combinations((mixed, *others), 2))
        assert len(mixed[is_real].unique(dim=0)) > 0.6 * min(is_real.sum(), 40)


# The world model

LENGTH = 5
EXPLODES = 25  # above zero where the model explodes


class Telling:
    """A model whose next state holds the action, counts the steps, loses height, and explodes in the third step for some.

    Its own rewards have nothing to do with the environment's.
    """

    elites = torch.arange(2)
    mean, std = torch.zeros(115), torch.ones(115)

    def predict(self, obs, actions):
        new = obs.clone()
        new[:, :24] = actions
        new[:, 43] += 1
        new[:, 26] -= 0.1
        new[:, 27] = torch.where((obs[:, EXPLODES] > 0) & (obs[:, 43] == 2), 1e6, 0.0)
        return new.expand(2, -1, -1), torch.full((2, len(obs)), -50.0), torch.zeros(2, len(obs), 46)


def starts():
    """States numbered in their last place: they fall in step 1, 2, ..., 8 (5 are rolled out); every fourth explodes.

    The pen is at one of two distances from the target's place, and at one of four angles to it.
    """
    obs, i = torch.zeros(16, 45), torch.arange(16)
    obs[:, 44] = i
    obs[:, 26] = 0.075 + 0.1 * (i % 8) + 0.05
    obs[:, EXPLODES] = (i % 4 == 3).float()
    cosine = torch.tensor([0.99, 0.92, -0.5, 0.7])[(i // 2) % 4]
    obs[:, 33], obs[:, 34], obs[:, 36] = cosine, (1 - cosine**2).sqrt(), 1.0
    obs[:, 40] = torch.tensor([0.05, 0.2])[i % 2]
    return obs


def reward(obs):
    """The environment's reward of the step that leads to `obs` [45], written out."""
    near, similarity, distance = obs[40] < 0.075, float(obs[33]), float(obs[40])
    value = similarity - distance + 10 * (near and similarity > 0.9) + 50 * (near and similarity > 0.95)
    return value - 5 * (obs[26] < 0.075)


def lived(i):
    """The steps of a rollout from state i of `starts`, or None where it diverges."""
    length = min(i % 8 + 1, LENGTH)
    return None if i % 4 == 3 and length >= 3 else length


def test_rollouts_in_the_world_model():
    policy, n = a_policy(log_std=-5.0, spread=0.5), 400
    batch = synthetic.from_world_model(Telling(), policy, starts(), n, LENGTH, SEEDS, 0)
    assert len(batch.data) == 3 and batch.lam.isnan().all()
    drawn = []
    for r, made in enumerate(batch.data):
        number, step = made[:, 44].long().tolist(), made[:, 43].long().tolist()
        firsts = [i for i, t in zip(number, step) if t == 0]
        assert sorted(zip(number, step)) == sorted((i, t) for i in firsts for t in range(lived(i)))
        drawn.append(firsts)
        assert set(firsts) == {i for i in range(16) if lived(i)} and len(firsts) == round(n * (1 - batch.diverged[r].item()))
        assert batch.diverged[r].item() == pytest.approx(0.25, abs=0.09)  # four std
        assert batch.kept[r].item() == pytest.approx(len(made) / (n * LENGTH))
        falls = torch.tensor([t + 1 == i % 8 + 1 for i, t in zip(number, step)])
        assert torch.equal(made[:, TERMINAL], falls.float())
        assert batch.ended[r].item() == pytest.approx(falls.sum().item() / n) and 0.3 < batch.ended[r] < 0.7
        expected = [float(reward(obs)) for obs in made[:, NEXT_OBS]]
        np.testing.assert_allclose(made[:, REWARD], expected, rtol=1e-5)
        assert max(expected) > 55 and min(expected) < -5 and sum(5 < e < 12 for e in expected) > 4
        # Actions are those of the run's own policy, and lead to the next state.
        mean, std = policy.select([r])(made[None, :, OBS])
        z = (made[:, NEXT_OBS][:, :24] - mean[0]) / std[0]
        assert z.abs().max() < 6 and z.std().item() == pytest.approx(1, abs=0.05)
        assert torch.equal(made[:, ACTIONS], made[:, NEXT_OBS][:, :24].clip(-1, 1))
        assert torch.equal(made[:, NEXT_OBS][:, 43], made[:, 43] + 1)
        assert batch.on_policy[r].item() == pytest.approx(5 - 0.5 * math.log(2 * math.pi * math.e))  # of std e⁻⁵
        assert batch.log_likelihood[r].item() == pytest.approx(batch.on_policy[r].item(), abs=0.05)
    assert drawn[0] != drawn[1] != drawn[2]


def test_rollouts_depend_on_seed_and_round_alone():
    policy = a_policy()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a = synthetic.from_world_model(Telling(), policy, starts(), 20, LENGTH, SEEDS, 0)
    assert torch.equal(torch.get_rng_state(), state)
    named = (SEEDS, 0), ([1, 2, 4], 0), (SEEDS, 1), (SEEDS, 2)
    b, *others = (synthetic.from_world_model(Telling(), policy, starts(), 20, LENGTH, *each) for each in named)
    assert all(torch.equal(x, y) for x, y in zip(a.data, b.data))
    for r in range(3):
        assert not any(torch.equal(x.data[r], y.data[r]) for x, y in itertools.combinations((a, *others), 2))
    alike = synthetic.from_world_model(Telling(), policy.select([1, 1]), starts(), 20, LENGTH, [7, 7], 0)
    assert torch.equal(*alike.data)


def test_a_nan_policy_leaves_other_rollouts_untouched():
    real = toy([40])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ensemble = worldmodel.Ensemble(3, 2, (16,))
    ensemble.fit_normalisation(real)
    ensemble.requires_grad_(False)
    whole, broken = a_policy(), a_policy()
    broken.net.weights[0].data[1] = math.nan
    clean, batch = (
        synthetic.from_world_model(ensemble, p, of_trajectories(real)[:, :45], 10, LENGTH, SEEDS, 0) for p in (whole, broken)
    )
    for r in (0, 2):
        assert torch.equal(clean.data[r], batch.data[r]) and len(batch.data[r]) > 10
        assert all(getattr(clean, name)[r] == getattr(batch, name)[r] for name in NAMES)
    assert batch.data[1].shape == (0, WIDTH) and (batch.diverged[1], batch.kept[1], batch.ended[1]) == (1, 0, 0)


def test_the_parts_of_a_batch_are_on_the_cpu_and_of_one_type():
    batches = [
        diffusion().generate(a_policy(), "explicit", torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), 3, SEEDS, 0),
        synthetic.from_world_model(Telling(), a_policy(), starts(), 3, LENGTH, SEEDS, 0),
    ]
    for batch, name in itertools.product(batches, (*NAMES, "lam")):
        value = getattr(batch, name)
        assert value.shape == (3,) and value.dtype == torch.float32 and value.device.type == "cpu", name
    assert adroit.OBS_DIM == 45 and all(d.shape[1] == WIDTH and d.isfinite().all() for b in batches for d in b.data)


def test_every_run_needs_a_seed():
    with pytest.raises(ValueError, match=r"seeds=\[1, 2\] is not allowed; it must hold one for each of the 3 runs"):
        diffusion().draw(a_policy(), "smoothed", [1.0] * 3, 2, [1, 2], 0)
