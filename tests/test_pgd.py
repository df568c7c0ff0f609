"""The loop: who gets which data when, on what policy; copied in mid-way it goes on to the same bits."""

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, Ideal, a_policy, assert_same, on, toy

from pgdlib import fast, penalties, pgd, synthetic, worldmodel
from pgdlib.agents.bc import BC
from pgdlib.agents.iql import IQL
from pgdlib.agents.sac import SAC
from pgdlib.agents.stack import Critics, Learner, generators
from pgdlib.agents.td3_bc import TD3BC
from pgdlib.fast import generator
from pgdlib.pgd import FACTS, Row, Sources
from pgdlib.policies import selected

KINDS = {"bc": BC, "iql": IQL, "td3_bc": TD3BC, "sac": SAC}
MEAN, STD = torch.linspace(-1, 1, 7), torch.linspace(0.5, 2, 7)
ROWS = [Row("a", "real"), Row("b", "diffusion", "explicit", 0.5), Row("c", "diffusion", "annealed", "calibrated")]
IMAGINED = [Row("w", method) for method in penalties.METHODS]
WORLD = IMAGINED[0]
SEEDS = [4, 9]
STEPS, EVERY = 14, 5
PLACES = MEAN + STD * torch.randn(2, 7, generator=torch.Generator().manual_seed(0))  # where policies are looked at


def learner(kind="bc", rows=ROWS, steps=STEPS):
    stack = SEEDS * len(rows)
    return Learner(KINDS[kind](SMALL, stack, MEAN, STD, hidden=(6,)), stack, steps, batch_size=4, learning_rate=1e-2)


def looked_at(policy):
    """[R, 2, 3]: the mean actions of each run at `PLACES`."""
    return torch.as_tensor(policy.act(PLACES.repeat(policy.runs, 1).numpy())).unflatten(0, (policy.runs, 2))


class Noted:
    """Sources whose data depend on the row, the run, the round and the target policy, drawn at random; all calls are kept."""

    def __init__(self):
        self.calls, self.given = [], []

    def __call__(self, row, policy, number):
        seen = looked_at(policy)
        self.calls.append((row.name, number, seen))
        made = []
        for r in range(policy.runs):
            draws = generator("cpu", "fresh", number, 10 * ord(row.name) + r)
            x = torch.randn(9 + r, SMALL.transition_width, generator=draws)
            x[:, SMALL.actions] = (0.3 * x[:, SMALL.actions] + seen[r, 0]).clamp(-1, 1)
            x[:, SMALL.terminal] = (x[:, SMALL.terminal] > 1).float()
            made.append(x)
        self.given.append(made)
        facts = torch.arange(policy.runs) + 10 * number + 100.0 * ord(row.name)
        batch = SimpleNamespace(**{name: facts + 0.1 * i for i, name in enumerate(FACTS)})
        return made, None if row.source == "real" else batch


def run(agent, sources, rows=ROWS, every=EVERY, until=math.inf, keep=None):
    return on(pgd.Rounds(agent, rows, sources, every, keep), until)


def test_every_row_is_trained_on_its_own_data_drawn_for_the_policies_at_the_rounds_start():
    agent, sources, before = learner(), Noted(), []
    rounds, seen = pgd.Rounds(agent, ROWS, sources, EVERY), []
    for now in rounds:
        before.append(looked_at(agent.agent.policy))
        seen.append((agent.step, now.number, now.end))
        expected = [d for made in sources.given[3 * now.number : 3 * now.number + 3] for d in made]
        assert len(now.data) == 6 and all(a is b for a, b in zip(now.data, expected, strict=True))
        assert [*agent.train(now.data, now.end)] == [*range(seen[-1][0] + 1, now.end + 1)]
    assert seen == [(0, 0, 5), (5, 1, 10), (10, 2, 14)]
    assert [(name, number) for name, number, _ in sources.calls] == [(n, k) for k in range(3) for n in "abc"]
    for i, (_, number, policies) in enumerate(sources.calls):
        assert torch.equal(policies, before[number].split(2)[i % 3])
    assert not torch.equal(before[0], before[1]) and not torch.equal(before[1], before[2])
    assert rounds.facts.shape == (3, len(FACTS), 6) and rounds.facts[..., :2].isnan().all()
    expected = [
        [[0.1 * f + r + 10 * k + 100 * ord(n) for f in range(len(FACTS))] for n in "bc" for r in (0, 1)] for k in range(3)
    ]
    torch.testing.assert_close(rounds.facts[..., 2:], torch.tensor(expected).mT)


def test_the_targets_are_no_part_of_the_training():
    """They have no gradients, share no memory with the agents, and the agents none with their copies."""

    class Grasping(Noted):
        def __call__(self, row, policy, number):
            assert not any(p.requires_grad for p in policy.parameters()) and policy.runs == len(SEEDS)
            out = super().__call__(row, policy, number)
            for p in policy.parameters():
                p.data.fill_(math.nan)
            return out

    assert_same(run(learner(), Grasping()).state(), run(learner(), Noted()).state())


@pytest.mark.parametrize("every, steps", [(20, 8), (8, 8), (1, 4), (3, 7)])
def test_rounds_of_any_size(every, steps):
    agent, sources = learner(steps=steps), Noted()
    facts = run(agent, sources, every=every).facts
    assert agent.step == steps and len(facts) == math.ceil(steps / every)
    assert [k for _, k, _ in sources.calls[::3]] == [*range(math.ceil(steps / every))]


def test_a_round_must_be_trained_to_its_end():
    rounds = iter(pgd.Rounds(learner(), ROWS, Noted(), EVERY))
    next(rounds)
    with pytest.raises(ValueError, match="step=0 is not allowed; it must be 5, the end of round 0"):
        next(rounds)


# Interruption


def resumed(state, step, sources, kind, keep=None):
    """Fresh rounds into which `state` is copied, at `step`; not yet gone on with."""
    rounds = pgd.Rounds(learner(kind), ROWS, sources, EVERY, keep)
    for name, tensor in rounds.state().items():
        tensor.copy_(state[name])
    rounds.learner.step = step
    return rounds


@pytest.mark.parametrize("kind", KINDS)
def test_copied_at_any_step_it_goes_on_to_the_same_bits(kind):
    expected = run(learner(kind), whole := Noted()).state()
    for at in range(1, STEPS + 1) if kind == "bc" else (2, 5, 7, 13):
        state = run(learner(kind), Noted(), until=at).state()
        assert_same(on(resumed(state, at, again := Noted(), kind)).state(), expected)
        left = whole.calls[3 * (at // EVERY) :] if at < STEPS else []  # a round is drawn again for the policies of its start
        for (name, k, seen), (name_2, k_2, seen_2) in zip(again.calls, left, strict=True):
            assert (name, k) == (name_2, k_2) and torch.equal(seen, seen_2)


def test_what_is_kept_is_not_drawn_again_and_is_used():
    kept, expected = {}, run(learner("iql"), Noted())

    def keep(name, make):
        if name not in kept:
            kept[name] = make()
        return kept[name]

    half = run(learner("iql"), Noted(), until=7, keep=keep)
    assert [*kept] == [f"{number}-{i}" for number in (0, 1) for i in range(3)]
    assert kept["0-0"][1] is None and kept["1-2"][1].shape == (len(FACTS), 2)
    state = {name: tensor.clone() for name, tensor in half.state().items()}
    sources = Noted()
    assert_same(on(resumed(state, 7, sources, "iql", keep)).state(), expected.state())
    assert [(name, number) for name, number, _ in sources.calls] == [(n, 2) for n in "abc"]
    # Other data and facts under the same name make other agents of that row, and of no other.
    kept["1-1"] = [d + 1 for d in kept["1-1"][0]], kept["1-1"][1] + 1
    other = on(resumed(state, 7, Noted(), "iql", keep))
    mine, theirs = (looked_at(r.learner.agent.policy) for r in (other, expected))
    assert torch.equal(mine[[0, 1, 4, 5]], theirs[[0, 1, 4, 5]]) and not torch.isclose(mine[2:4], theirs[2:4]).any()
    torch.testing.assert_close(other.facts[1, :, 2:4], expected.facts[1, :, 2:4] + 1)


def assert_others_are_untouched(rounds, clean, others):
    """The runs `others` have the policies and facts of the clean rounds, bit for bit."""
    mine, theirs = (looked_at(r.learner.agent.policy)[others] for r in (rounds, clean))
    assert torch.equal(mine, theirs) and mine.isfinite().all()
    torch.testing.assert_close(rounds.facts[..., others], clean.facts[..., others], rtol=0, atol=0, equal_nan=True)


# Sources

REAL = toy([40], spec=SMALL).transitions()
WINDOWS = 6


def test_a_diverged_run_is_marked_and_leaves_the_others_untouched():
    class Poisoned(Noted):
        def __call__(self, row, policy, number):
            made, batch = super().__call__(row, policy, number)
            if row.name == "b" and number == 1:
                made[1][:, SMALL.reward] = math.nan
            return made, batch

    rounds = run(learner("iql"), Poisoned())
    assert rounds.learner.diverged_at.tolist() == [-1, -1, -1, 6, -1, -1]
    assert_others_are_untouched(rounds, run(learner("iql"), Noted()), [0, 1, 2, 4, 5])
    assert looked_at(rounds.learner.agent.policy)[3].isnan().all()


@pytest.fixture(scope="module")
def ensemble():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = worldmodel.Ensemble(7, 3, 2, 1, (8,))
    model.fit_normalisation(toy([40], spec=SMALL))
    return model.requires_grad_(False)


OUTCOME = SimpleNamespace(reward=lambda obs, actions, after: after[..., 0], ended=lambda obs: obs[..., 1] > 1, states=["any"])


def sources(ensemble=None, real_fraction=0.0, seeds=SEEDS):
    model = synthetic.Diffusion(Ideal(SMALL), "multistep", 5, 0.0, 1)
    return Sources(REAL, model, ensemble, stack(len(seeds), 50), WINDOWS, real_fraction, seeds, OUTCOME)


def stack(runs=2, seed=0, scale=0.3):
    return a_policy(SMALL, runs, seed, scale=scale).float().requires_grad_(False)


def rollouts(ensemble, policy, number):
    return synthetic.from_world_model(ensemble, policy, REAL[:, SMALL.obs], WINDOWS, 10 - 1, SEEDS, number, OUTCOME)


def test_real_data_are_the_real_data(ensemble):
    for number in (0, 3):
        made, batch = sources(ensemble, 0.5)(Row("r", "real"), stack(), number)
        assert len(made) == 2 and all(d is REAL for d in made) and batch is None


def test_the_first_round_is_unguided_and_drawn_once_for_all_rules(monkeypatch):
    ours = sources()
    expected = ours.diffusion.generate(stack(), "smoothed", [0.0, 0.0], WINDOWS, SEEDS, 0)
    first = ours(ROWS[1], stack(), 0)[1]
    assert first.lam.tolist() == [0, 0] and all(torch.equal(a, b) for a, b in zip(first.data, expected.data, strict=True))
    assert ours(ROWS[2], stack(), 0)[1] is first
    other = stack(scale=0.5)  # has another likelihood of its own
    expected = ours.diffusion.generate(other, "explicit", [0.0, 0.0], WINDOWS, SEEDS, 0)
    assert torch.equal(ours(ROWS[2], other, 0)[1].on_policy, expected.on_policy)


def test_a_fixed_weight_is_that_of_all_runs():
    ours, row = sources(), Row("g", "diffusion", "proximal", 0.7)
    made, batch = ours(row, stack(), 3)
    expected = ours.diffusion.generate(stack(), "proximal", [0.7, 0.7], WINDOWS, SEEDS, 3)
    assert batch.lam.tolist() == pytest.approx([0.7, 0.7]) and ours.weights(row, stack(), 0).tolist() == batch.lam.tolist()
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(made, batch.data, expected.data, strict=True))
    others = [*(ours(row, stack(), k)[0] for k in (1, 2)), sources(seeds=[5, 8])(row, stack(), 3)[0]]
    assert not any(torch.equal(other[0][:9], made[0][:9]) for other in others)


@pytest.mark.parametrize("rule", ["proximal", "explicit"])
def test_a_calibrated_weight_makes_trajectories_as_likely_as_the_policys_own_actions(rule):
    """Runs of other stds, each at its own target, on average over other noise than that of the search."""
    policy, seeds = stack(3), [4, 9, 2]
    policy.log_std.data[:] = torch.tensor([-1.2, -0.7, 5.0])[:, None, None]  # the last is so broad that nothing is needed
    ours, row = sources(seeds=seeds), Row("c", "diffusion", rule, "calibrated")
    ours.diffusion.warmup, ours.diffusion.steps = 0, 16
    lam = ours.weights(row, policy, 1)
    targets = -torch.distributions.Normal(0, policy.log_std.exp()).entropy().mean((1, 2))
    assert lam[0] > 0 and lam[1] > 0 and lam[2] == 0 and lam[0] != lam[1]
    found = ours.diffusion.log_likelihoods(policy, rule, lam, 256, seeds, 9)
    assert (found - targets).abs()[:2].max() < 0.1 and found[2] > targets[2]
    assert (ours.diffusion.log_likelihoods(policy, rule, lam * 0, 256, seeds, 9) < targets - 0.3)[:2].all()
    assert ours(row, policy, 1)[1].lam.tolist() == pytest.approx(lam.tolist())


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("row", [*ROWS[1:], *IMAGINED], ids=lambda row: row.rule or row.source)
def test_a_run_is_given_what_it_is_given_alone(row, number, ensemble, monkeypatch):
    """Between other runs, in any order, with real transitions among them.

    Rollouts and real transitions are the same bit for bit, and so are unguided trajectories; guided ones to float precision.
    """
    monkeypatch.setattr(penalties, "UPDATES", 2)
    policy, whole, critics = stack(3), sources(ensemble, 0.4, [4, 9, 2]), Critics(SMALL, (4,), generators([4, 9, 2]))
    made, batch = whole(row, policy, number, critics)
    exact = dict(rtol=0, atol=0) if row in IMAGINED or number == 0 else dict(rtol=1e-3, atol=1e-2)
    for order in ([0], [1], [2], [2, 0, 1]):
        behaviour, seeds = whole.behaviour.select(order), [whole.seeds[r] for r in order]
        ours = Sources(REAL, whole.diffusion, ensemble, behaviour, WINDOWS, 0.4, seeds, OUTCOME)
        found, facts = ours(row, policy.select(order), number, selected(critics, order, 3))
        for i, r in enumerate(order):
            torch.testing.assert_close(found[i], made[r], **exact)
            count = len(batch.data[r])
            torch.testing.assert_close(facts.data[i], found[i][:count], rtol=0, atol=0)
            assert len(found[i]) > count and torch.equal(found[i][count:], made[r][count:])
            for name in FACTS:
                a, b = getattr(facts, name)[i].item(), getattr(batch, name)[r].item()
                assert a == pytest.approx(b, rel=1e-3, nan_ok=True), name


def test_no_draw_of_a_loop_comes_twice(ensemble, monkeypatch):
    """Within a row; all rows' runs of one seed are given the same noise. But the search for a λ repeats its own."""
    drawn, names = {}, []

    def recorded(device, stream, *key):
        drawn.setdefault(names[-1], Counter())[stream, *key] += 1
        return generator(device, stream, *key)

    ours, rows = sources(ensemble, 0.4), [*ROWS, WORLD]
    monkeypatch.setattr(fast, "generator", recorded)  # that of `fast.stream`
    monkeypatch.setattr(synthetic, "generator", recorded)
    run(learner(rows=rows), lambda row, *given: names.append(row.name) or ours(row, *given), rows)
    rounds = [(seed, number) for number in (1, 2) for seed in SEEDS]
    real = {("real", seed, number): 1 for seed in SEEDS for number in range(3)}
    blocks, first = {("rounds", *each, 0): 1 for each in rounds}, {("rounds", seed, 0, 0): 1 for seed in SEEDS}
    assert drawn["b"] == blocks | real | first
    assert drawn["c"] == blocks | real | {("calibration", *each, 0): 10 for each in rounds}
    assert drawn["w"] == real | {("world model", seed, number): 1 for _, seed, number in real} and "a" not in drawn


def test_the_world_model_follows_the_cloned_policies_first(ensemble):
    """In the first round no policy is trained: then the agents do not enter at all. Later the cloned ones do not."""
    ours = sources(ensemble)
    expected = rollouts(ensemble, ours.behaviour, 0)
    for policy in (stack(), stack(seed=1)):
        made, batch = ours(WORLD, policy, 0)
        assert all(torch.equal(a, b) for a, b in zip(made, expected.data, strict=True))
        assert all(torch.equal(getattr(batch, n), getattr(expected, n)) for n in FACTS[1:])
    ours.behaviour = None
    made, batch = ours(WORLD, stack(), 2)
    expected = rollouts(ensemble, stack(), 2)  # as many steps as a window of the diffusion model has successors
    assert all(torch.equal(a, b) for a, b in zip(made, expected.data, strict=True)) and batch.lam.isnan().all()
    for row in ROWS:
        ours(row, stack(), 0)  # no other needs them


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("own", [False, True], ids=["of all", "of the row"])
@pytest.mark.parametrize("row", [ROWS[1], WORLD], ids=lambda r: r.source)
def test_the_share_of_real_transitions(row, own, fraction, ensemble):
    row = replace(row, real_fraction=fraction) if own else row
    made, batch = sources(ensemble, 0.7 if own else fraction)(row, stack(), 1)
    for mine, generated in zip(made, batch.data, strict=True):
        is_real = (mine[:, None] == REAL).all(-1).any(1)
        assert is_real.float().mean().item() == pytest.approx(fraction, abs=0.5 / len(mine) + 1e-6)
        assert torch.equal(mine[~is_real], generated if fraction < 1 else generated[:0])
    assert fraction != 0.4 or not torch.equal(made[0][-5:], made[1][-5:])  # not the same ones for all runs


@pytest.mark.parametrize("imagined", IMAGINED, ids=lambda row: row.source)
def test_a_run_without_data_is_marked_as_diverged_and_leaves_the_others_untouched(imagined, ensemble, monkeypatch):
    """All its trajectories diverge once its policy is NaN: there is nothing to train on, which must end no other run."""
    monkeypatch.setattr(penalties, "UPDATES", 2)
    rows, results = [ROWS[1], imagined], []
    for broken in (False, True):
        agent, ours = learner("iql", rows, 8), sources(ensemble)

        def spoil(row, policy, number, *critics, broken=broken, agent=agent, ours=ours):
            if broken and number == 0:
                agent.agent.policy.net.weights[0].data[[0, 3]] = math.nan
            return ours(row, policy, number, *critics)

        results.append(run(agent, spoil, rows, 3))
    assert_others_are_untouched(results[1], results[0], [1, 2])
    agent, facts = results[1].learner, results[1].facts
    assert looked_at(agent.agent.policy)[[0, 3]].isnan().all()
    assert (agent.diverged_at[[0, 3]] > 0).all() and agent.diverged_at[[1, 2]].tolist() == [-1, -1]
    assert facts[-1, FACTS.index("diverged"), [0, 3]].tolist() == [1, 1]
