"""The loop: who gets which data when, on what policy, scored when; killed anywhere it goes on to the same bits."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Ideal, toy

from pgdlib import pgd, synthetic, worldmodel
from pgdlib.agents.iql import IQL
from pgdlib.agents.stack import BC, OBS, REWARD, TERMINAL, WIDTH, Learner, StackedPolicy, generators, of_trajectories
from pgdlib.agents.td3_bc import TD3BC
from pgdlib.edm import seeded
from pgdlib.lab import artifacts
from pgdlib.pgd import FACTS, Row, Sources, evaluate
from pgdlib.simulators import pen as adroit

KINDS = {"bc": BC, "iql": IQL, "td3_bc": TD3BC}
MEAN, STD = torch.linspace(-1, 1, 45), torch.linspace(0.5, 2, 45)
ROWS = [Row("a", "real"), Row("b", "diffusion", "explicit", 0.5), Row("c", "diffusion", "annealed", "calibrated")]
SEEDS = [4, 9]
STEPS, EVERY, MARKS = 14, 5, [0, 3, 5, 14]
PLACES = MEAN + STD * torch.randn(2, 45, generator=torch.Generator().manual_seed(0))  # where policies are looked at


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def learner(kind="bc", rows=ROWS, steps=STEPS):
    stack = SEEDS * len(rows)
    return Learner(KINDS[kind](stack, MEAN, STD, hidden=(6,)), stack, steps, batch_size=4, learning_rate=1e-2)


def looked_at(policy):
    """[R, 2, 24]: the mean actions of each run at `PLACES`."""
    with torch.no_grad():
        return policy(PLACES.repeat(policy.runs, 1))[0].unflatten(0, (policy.runs, 2))


class Noted:
    """Sources whose data depend on the row, the run, the round and the target policy, drawn at random; all calls are kept."""

    def __init__(self):
        self.calls, self.given = [], []

    def __call__(self, row, policy, round):
        seen = looked_at(policy)
        self.calls.append((row.name, round, seen))
        made = []
        for r in range(policy.runs):
            x = torch.randn(9 + r, WIDTH, generator=seeded("cpu", round, 10 * ord(row.name) + r))
            x[:, 45:69] = (0.3 * x[:, 45:69] + seen[r, 0]).clamp(-1, 1)
            x[:, TERMINAL] = (x[:, TERMINAL] > 1).float()
            made.append(x)
        self.given.append(made)
        facts = torch.arange(policy.runs) + 10 * round + 100.0 * ord(row.name)
        batch = SimpleNamespace(**{name: facts + 0.1 * i for i, name in enumerate(FACTS)})
        return made, None if row.source == "real" else batch


def score(policy):
    """A number for each run that tells its policies apart."""
    return looked_at(policy).sum((1, 2)).numpy()


def run(agent, sources, score=score, **named):
    return pgd.run(agent, ROWS, sources, EVERY, MARKS, score, **named)


def test_every_row_is_trained_on_its_own_data_drawn_for_the_policies_at_the_rounds_start(monkeypatch):
    agent, sources, trained, before = learner(), Noted(), [], {0: looked_at(learner().agent.policy)}
    train = agent.train

    def spied(datas, until, report):
        trained.append((agent.step, until, datas))
        train(datas, until, report)
        before[until] = looked_at(agent.agent.policy)

    monkeypatch.setattr(agent, "train", spied)
    _, facts = run(agent, sources)
    assert [(name, number) for name, number, _ in sources.calls] == [(n, k) for k in range(3) for n in "abc"]
    for i, (_, number, seen) in enumerate(sources.calls):
        row = i % 3
        assert torch.equal(seen, before[EVERY * number][2 * row : 2 * row + 2])
    assert [t[:2] for t in trained] == [(0, 3), (3, 5), (5, 10), (10, 14)]
    for first, _, datas in trained:
        number = first // EVERY
        expected = [d for made in sources.given[3 * number : 3 * number + 3] for d in made]
        assert len(datas) == 6 and all(a is b for a, b in zip(datas, expected, strict=True))
    assert not torch.equal(before[0], before[5]) and not torch.equal(before[5], before[10])
    assert facts.shape == (3, len(FACTS), 6) and facts[..., :2].isnan().all()
    expected = [
        [[0.1 * f + r + 10 * k + 100 * ord(n) for f in range(len(FACTS))] for n in "bc" for r in (0, 1)] for k in range(3)
    ]
    torch.testing.assert_close(facts[..., 2:], torch.tensor(expected).mT)


def test_the_targets_are_no_part_of_the_training():
    """They have no gradients, share no memory with the agents, and the agents none with their copies."""

    class Grasping(Noted):
        def __call__(self, row, policy, round):
            assert not any(p.requires_grad for p in policy.parameters()) and policy.runs == len(SEEDS)
            out = super().__call__(row, policy, round)
            for p in policy.parameters():
                p.data.fill_(math.nan)
            return out

    curve, _ = run(learner(), Grasping())
    assert torch.equal(curve, run(learner(), Noted())[0]) and curve.isfinite().all()


def test_the_curve_is_scored_at_its_marks_and_only_there():
    agent, steps = learner(), []
    curve, _ = run(agent, Noted(), lambda policy: steps.append(agent.step) or 1000 * agent.step + np.arange(6))
    assert steps == MARKS
    torch.testing.assert_close(curve, torch.tensor([[1000.0 * m + r for r in range(6)] for m in MARKS]))
    by_hand = learner()
    assert run(by_hand, Noted())[0][-1].tolist() == pytest.approx(score(by_hand.agent.policy).tolist())


@pytest.mark.parametrize("every, marks, steps", [(20, [0, 8], 8), (8, [8], 8), (1, [0, 4], 4), (3, [], 7)])
def test_rounds_and_marks_of_any_size(every, marks, steps):
    agent, sources, reports = learner(steps=steps), Noted(), []
    curve, facts = pgd.run(agent, ROWS, sources, every, marks, score, report=reports.append)
    assert agent.step == steps and reports == [*range(1, steps + 1)]
    assert [k for _, k, _ in sources.calls[::3]] == [*range(math.ceil(steps / every))]
    assert curve.shape == (len(marks), 6) and not curve.isnan().any() and len(facts) == math.ceil(steps / every)


# Interruption


class Stop(BaseException):
    pass


def stopping(at):
    """A report that interrupts at step `at`."""

    def report(step):
        if step == at:
            raise Stop

    return report


def whole(kind):
    agent, sources = learner(kind), Noted()
    return *run(agent, sources), agent, sources


def assert_same(a, b):
    """Two results with their learners: bit for bit."""
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(a[1], b[1], rtol=0, atol=0, equal_nan=True)
    for (name, x), y in zip(a[2].state()[0].items(), b[2].state()[0].values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_step_it_goes_on_to_the_same_bits(kind, tmp_path):
    expected = whole(kind)
    for at in range(1, STEPS + 1) if kind == "bc" else (2, 5, 7, 13):
        path = tmp_path / f"{at}.safetensors"
        with pytest.raises(Stop):
            run(learner(kind), Noted(), checkpoint=path, save_every=-1.0, report=stopping(at))
        assert artifacts.load(path)[1]["step"] == at
        agent, sources, steps, scored = learner(kind), Noted(), [], []

        def counted(policy, agent=agent, scored=scored):
            scored.append(agent.step)
            return score(policy)

        found = run(agent, sources, counted, checkpoint=path, save_every=-1.0, report=steps.append)
        assert_same((*found, agent), expected)
        assert steps == [*range(at + 1, STEPS + 1)]
        assert scored == [m for m in MARKS if m >= at]  # nothing that stands in the checkpoint is scored again
        first = at // EVERY
        left = expected[3].calls[3 * first :] if at < STEPS else []
        for (name, k, seen), (name_2, k_2, seen_2) in zip(sources.calls, left, strict=True):
            assert (name, k) == (name_2, k_2) and torch.equal(seen, seen_2)


def test_killed_again_and_again_and_anywhere(tmp_path):
    """In reports, in scores and while data are drawn, from checkpoints that are some steps old."""
    expected, path, kills = whole("iql"), tmp_path / "it.safetensors", 0

    class Deadly(Noted):
        def __call__(self, row, policy, round):
            if (row.name, round) not in died:
                died.add((row.name, round))
                raise Stop
            return super().__call__(row, policy, round)

    def deadly(policy):
        if agent.step not in died:
            died.add(agent.step)
            raise Stop
        return score(policy)

    died, reported = set(), set()

    def report(step):
        if step % 4 == 2 and step not in reported:
            reported.add(step)
            raise Stop

    while True:
        agent = learner("iql")
        try:
            found = pgd.run(agent, ROWS, Deadly(), EVERY, MARKS, deadly, path, 0.0 if kills % 2 else 1e9, report)
            break
        except Stop:
            kills += 1
    assert kills == 9 + 4 + 4 and path.exists()
    assert_same((*found, agent), expected)


def test_checkpoints_are_written_when_it_is_time(tmp_path, monkeypatch):
    saved, now = [], [0.0]
    monkeypatch.setattr(pgd, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(artifacts, "save", lambda path, tensors, card: saved.append(card["step"]))

    def tick(step):
        now[0] += 1.0

    run(learner(), Noted(), checkpoint=tmp_path / "it", save_every=4.5, report=tick)
    assert saved == [6, 11]
    saved.clear()
    run(learner(), Noted(), save_every=-1.0)
    assert saved == []


# Data whose drawing takes long


class Killed(Noted):
    """Sources that are interrupted instead of drawing the data of the row and round `at`."""

    def __init__(self, at=None):
        super().__init__()
        self.at = at

    def __call__(self, row, policy, round):
        if (row.name, round) == self.at:
            raise Stop
        return super().__call__(row, policy, round)

    @property
    def drawn(self):
        return [(name, number) for name, number, _ in self.calls if name != "a"]  # real data are not drawn


@pytest.fixture
def long(monkeypatch):
    monkeypatch.setattr(pgd, "LONG", -1.0)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


FILES = ["it.row1.safetensors", "it.row2.safetensors"]  # of b and c
ALL = [(name, k) for k in range(3) for name in "bc"]


@pytest.mark.slow
@pytest.mark.parametrize("at", ALL)
def test_killed_between_two_rows_it_draws_only_what_is_missing(at, tmp_path, long):
    """With no checkpoint but those of the drawing and of the rounds' ends."""
    expected, path, killed = whole("iql"), tmp_path / "it.safetensors", Killed(at)
    with pytest.raises(Stop):
        run(learner("iql"), killed, checkpoint=path, save_every=1e9)
    name, number = at
    files = FILES[:1] if name == "c" else []
    assert names(tmp_path) == sorted(files + ["it.safetensors"] * (at != ("b", 0)))
    if at != ("b", 0):
        assert artifacts.load(path)[1]["step"] == EVERY * number
    agent, sources, steps = learner("iql"), Killed(), []
    found = run(agent, sources, checkpoint=path, save_every=1e9, report=steps.append)
    assert_same((*found, agent), expected)
    assert killed.drawn + sources.drawn == ALL and steps == [*range(EVERY * number + 1, STEPS + 1)]
    assert names(tmp_path) == ["it.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("save_every", [1e9, -1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_in_training_it_draws_nothing_of_that_round_again(kind, save_every, tmp_path, long):
    expected = whole(kind)
    for at in (1, 4, 7, 9, 13):
        (tmp_path / str(at)).mkdir()
        path, killed = tmp_path / str(at) / "it.safetensors", Killed()
        with pytest.raises(Stop):
            run(learner(kind), killed, checkpoint=path, save_every=save_every, report=stopping(at))
        assert names(path.parent) == [*FILES, path.name]
        agent, sources, steps = learner(kind), Killed(), []
        found = run(agent, sources, checkpoint=path, save_every=save_every, report=steps.append)
        assert_same((*found, agent), expected)
        assert killed.drawn + sources.drawn == ALL
        assert steps[0] == 1 + (at if save_every < 0 else at // EVERY * EVERY)
        assert names(path.parent) == [path.name]


def test_killed_at_the_end_it_draws_and_trains_nothing_again(tmp_path, long):
    expected, path, agent, sources = whole("bc"), tmp_path / "it.safetensors", learner(), Killed()

    def deadly(policy):
        if policy is agent.agent.policy and agent.step == STEPS:
            raise Stop
        return score(policy)

    with pytest.raises(Stop):
        run(agent, Killed(), deadly, checkpoint=path, save_every=1e9)
    again = learner()
    found = run(again, sources, checkpoint=path, report=stopping(STEPS))
    assert_same((*found, again), expected)
    assert sources.calls == [] and names(tmp_path) == [path.name]


@pytest.mark.parametrize("at", [5, 14])
def test_files_that_a_killed_run_did_not_come_to_remove_do_no_harm(at, tmp_path, long, monkeypatch):
    """Even where the targets of all rounds are the same, as those of policies that learn nothing are."""

    def still():
        stack = SEEDS * len(ROWS)
        return Learner(BC(stack, MEAN, STD, hidden=(6,)), stack, STEPS, batch_size=4, learning_rate=0.0)

    expected, path, agent, unlink = run(still(), Noted()), tmp_path / "it.safetensors", still(), pgd.Path.unlink

    def deadly(self, **named):
        if self.name in FILES and agent.step == at:
            raise Stop
        unlink(self, **named)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(pgd.Path, "unlink", deadly)
        run(agent, Noted(), checkpoint=path, save_every=1e9)
    assert names(tmp_path) == [*FILES, path.name] and artifacts.load(path)[1]["step"] == at
    sources = Killed()
    curve, facts = run(still(), sources, checkpoint=path, save_every=1e9)
    assert torch.equal(curve, expected[0]) and torch.equal(facts[..., 2:], expected[1][..., 2:])
    assert sources.drawn == (ALL[2:] if at == 5 else []) and names(tmp_path) == [path.name]


def test_kept_data_lie_there_until_their_round_is_over(tmp_path, long, monkeypatch):
    path, seen = tmp_path / "it.safetensors", []

    class Looking(Noted):
        def __call__(self, row, policy, round):
            seen.append((row.name, names(tmp_path)))
            return super().__call__(row, policy, round)

    run(learner(), Looking(), checkpoint=path, save_every=1e9, report=lambda step: seen.append((step, names(tmp_path))))
    checkpoint, both = [path.name], [*FILES, path.name]
    for number in range(3):
        first = checkpoint if number else []
        drawn = [("a", first), ("b", first), ("c", [FILES[0], path.name])]
        steps = [(step, both) for step in range(5 * number + 1, min(5 * number + 5, STEPS) + 1)]
        assert seen[: 3 + len(steps)] == drawn + steps
        del seen[: 3 + len(steps)]
    assert seen == [] and names(tmp_path) == checkpoint
    path.unlink()
    run(learner(), Noted())  # no checkpoint, no files
    monkeypatch.setattr(pgd, "LONG", 20.0)
    run(learner(), Noted(), checkpoint=path, save_every=1e9, report=lambda step: seen.append(names(tmp_path)))
    assert seen == [[]] * STEPS and names(tmp_path) == []  # drawing was short


def test_only_rows_whose_drawing_took_long_are_kept(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pgd, "time", SimpleNamespace(monotonic=lambda: now[0]))

    class Slow(Noted):
        def __call__(self, row, policy, round):
            now[0] += dict(a=100.0, b=19.0, c=21.0)[row.name]
            return super().__call__(row, policy, round)

    with pytest.raises(Stop):
        run(learner(), Slow(), checkpoint=tmp_path / "it.safetensors", save_every=1e9, report=stopping(2))
    assert names(tmp_path) == [FILES[1], "it.safetensors"]


def altered(path, **changes):
    tensors, card = artifacts.load(path)
    artifacts.save(path, {**tensors, "data": tensors["data"] + 1}, {**card, **changes})


SPOILS = {
    "damaged": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "another round's": lambda path: altered(path, round=0),
    "another target's": lambda path: altered(path, target="0" * 64),
    "another row's": lambda path: altered(path, row=vars(ROWS[2])),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_data_that_are_damaged_or_of_something_else_are_drawn_again(spoil, tmp_path, long):
    expected, path = whole("bc"), tmp_path / "it.safetensors"
    with pytest.raises(Stop):
        run(learner(), Killed(), checkpoint=path, save_every=-1.0, report=stopping(7))
    spoil(tmp_path / FILES[0])
    agent, sources = learner(), Killed()
    found = run(agent, sources, checkpoint=path, save_every=1e9)
    assert_same((*found, agent), expected)
    assert sources.drawn == [("b", 1), ("b", 2), ("c", 2)]
    assert [name for name in names(tmp_path) if not name.endswith(".damaged")] == [path.name]
    assert len([*tmp_path.glob("it.row1.*.damaged")]) == (spoil is SPOILS["damaged"])


def test_what_is_kept_is_used(tmp_path, long):
    """Other data in a file of the right card make other agents: so the runs above are those of the kept ones."""
    expected, path = whole("bc"), tmp_path / "it.safetensors"
    with pytest.raises(Stop):
        run(learner(), Killed(), checkpoint=path, save_every=-1.0, report=stopping(7))
    altered(tmp_path / FILES[0])
    curve, _ = run(learner(), Killed(), checkpoint=path)
    assert torch.equal(curve[-1, [0, 1, 4, 5]], expected[0][-1, [0, 1, 4, 5]])  # of the rows a and c
    assert not torch.isclose(curve[-1, 2:4], expected[0][-1, 2:4]).any()


def test_a_diverged_run_is_marked_and_leaves_the_others_untouched():
    expected = whole("iql")

    class Poisoned(Noted):
        def __call__(self, row, policy, round):
            made, batch = super().__call__(row, policy, round)
            if row.name == "b" and round == 1:
                made[1][:, REWARD] = math.nan
            return made, batch

    agent = learner("iql")
    curve, facts = run(agent, Poisoned())
    assert agent.diverged_at.tolist() == [-1, -1, -1, 6, -1, -1]
    others = [0, 1, 2, 4, 5]
    assert torch.equal(curve[:, others], expected[0][:, others]) and curve[-1, 3].isnan() and curve[:3, 3].isfinite().all()
    torch.testing.assert_close(facts[..., others], expected[1][..., others], rtol=0, atol=0, equal_nan=True)


# Sources


@pytest.fixture(scope="module")
def ensemble():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = worldmodel.Ensemble(2, 1, (8,))
    model.fit_normalisation(toy([40]))
    return model.requires_grad_(False)


REAL = of_trajectories(toy([40]))
WINDOWS = 6


def sources(ensemble=None, real_fraction=0.0, seeds=SEEDS):
    model = synthetic.Diffusion(Ideal(), "multistep", 5, 0.0, 1)
    return Sources(REAL, model, ensemble, a_behaviour(len(seeds)), WINDOWS, real_fraction, seeds)


def a_behaviour(runs=2):
    """Policies cloned from the data, which no agents have."""
    return StackedPolicy((6,), generators(range(50, 50 + runs)), MEAN, STD, -2.0).requires_grad_(False)


def a_policy(runs=2, log_std=-1.0):
    policy = StackedPolicy((6,), generators(range(runs)), MEAN, STD, log_std)
    with torch.no_grad():
        policy.net.biases[-1] += 0.3 * draw(3, runs, 1, 24)
    return policy.requires_grad_(False)


def test_real_data_are_the_real_data(ensemble):
    for round in (0, 3):
        made, batch = sources(ensemble, 0.5)(Row("r", "real"), a_policy(), round)
        assert len(made) == 2 and all(d is REAL for d in made) and batch is None


@pytest.mark.parametrize("row", ROWS[1:], ids=lambda r: r.rule)
def test_the_first_round_is_unguided_and_the_same_for_all_rules(row):
    ours = sources()
    ours(ROWS[1], a_policy(), 0)  # drawn once, for all rows
    _, batch = ours(row, a_policy(), 0)
    unguided = sources().diffusion.generate(a_policy(), "smoothed", [0.0, 0.0], WINDOWS, SEEDS, 0)
    assert batch.lam.tolist() == [0, 0] and len(batch.data) == 2
    assert all(torch.equal(a, b) for a, b in zip(batch.data, unguided.data))
    other = a_policy(log_std=-0.5)  # has another likelihood of its own
    expected = ours.diffusion.generate(other, "explicit", [0.0, 0.0], WINDOWS, SEEDS, 0)
    assert torch.equal(ours(row, other, 0)[1].on_policy, expected.on_policy)


def test_a_fixed_weight_is_that_of_all_runs():
    ours, row = sources(), Row("g", "diffusion", "proximal", 0.7)
    made, batch = ours(row, a_policy(), 3)
    expected = ours.diffusion.generate(a_policy(), "proximal", [0.7, 0.7], WINDOWS, SEEDS, 3)
    assert batch.lam.tolist() == pytest.approx([0.7, 0.7]) and ours.weights(row, a_policy(), 0).tolist() == batch.lam.tolist()
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(made, batch.data, expected.data, strict=True))
    others = [*(ours(row, a_policy(), k)[0] for k in (1, 2)), sources(seeds=[5, 8])(row, a_policy(), 3)[0]]
    assert not any(torch.equal(other[0], made[0]) for other in others if other[0].shape == made[0].shape)


def test_a_calibrated_weight_makes_trajectories_as_likely_as_the_policys_own_actions():
    """Runs of other stds, each at its own target, on average over other noise than that of the search."""
    policy = a_policy(3)
    policy.log_std.data[:] = torch.tensor([-1.0, -0.7, 5.0])[:, None, None]  # the last is so broad that nothing is needed
    ours, row = sources(seeds=[4, 9, 2]), Row("c", "diffusion", "proximal", "calibrated")
    ours.diffusion.warmup = 0
    lam = ours.weights(row, policy, 1)
    targets = -torch.distributions.Normal(0, policy.log_std.clamp(-5, 2).exp()).entropy().mean((1, 2))
    assert lam[0] > 0 and lam[1] > 0 and lam[2] == 0 and lam[0] != lam[1]
    found = ours.diffusion.log_likelihoods(policy, "proximal", lam, 256, [4, 9, 2], 9)
    assert (found - targets).abs()[:2].max() < 0.1 and found[2] > targets[2]
    assert (ours.diffusion.log_likelihoods(policy, "proximal", lam * 0, 256, [4, 9, 2], 9) < targets - 0.3)[:2].all()
    _, batch = ours(row, policy, 1)
    assert batch.lam.tolist() == pytest.approx(lam.tolist())


def test_weights_are_searched_on_noise_of_their_own(monkeypatch):
    """That of no data: of another round, far away."""
    asked, ours = [], sources()
    monkeypatch.setattr(
        ours.diffusion, "log_likelihoods", lambda p, rule, lam, *a: asked.append((rule, lam.shape, *a)) or lam.double() - 1
    )
    ours.weights(ROWS[2], a_policy(), 1)
    assert len(asked) == 10 and all(a == ("annealed", (2,), pgd.CALIBRATION, SEEDS, 501) for a in asked)


class Alone(Sources):
    """Sources for one of the seeds, with its own behaviour policy."""

    def __init__(self, whole, r):
        one = whole.behaviour.select([r])
        super().__init__(REAL, whole.diffusion, whole.world_model, one, WINDOWS, whole.real_fraction, [whole.seeds[r]])


@pytest.mark.parametrize("round", [0, 2])
@pytest.mark.parametrize("row", [*ROWS[1:], Row("w", "world model")], ids=["explicit", "calibrated", "world model"])
def test_a_run_is_given_what_it_is_given_alone(row, round, ensemble):
    """Between other runs, in any order, with real transitions among them.

    Rollouts and real transitions are the same bit for bit, and so are unguided trajectories; guided ones to float precision.
    """
    policy, whole = a_policy(3), sources(ensemble, 0.4, [4, 9, 2])
    made, batch = whole(row, policy, round)
    exact = dict(rtol=0, atol=0) if row.source == "world model" or round == 0 else dict(rtol=1e-3, atol=1e-2)
    turned = Sources(REAL, whole.diffusion, ensemble, whole.behaviour.select([2, 0, 1]), WINDOWS, 0.4, [2, 4, 9])
    others = [Alone(whole, r)(row, policy.select([r]), round) for r in range(3)]
    in_turn = turned(row, policy.select([2, 0, 1]), round)
    for r in range(3):
        for found, facts, i in ((*others[r], 0), (*in_turn, [1, 2, 0][r])):
            torch.testing.assert_close(found[i], made[r], **exact)
            torch.testing.assert_close(facts.data[i], batch.data[r], **exact)
            real = len(batch.data[r])
            assert len(found[i]) > real and torch.equal(found[i][real:], made[r][real:])
            for name in FACTS:
                a, b = getattr(facts, name)[i].item(), getattr(batch, name)[r].item()
                assert a == pytest.approx(b, rel=1e-3, nan_ok=True), name


@pytest.mark.parametrize("row", [ROWS[1], Row("w", "world model")], ids=lambda r: r.source)
def test_runs_of_one_seed_have_one_noise_and_other_rounds_another(row, ensemble):
    policy = a_policy(1).select([0, 0, 0])
    ours = sources(ensemble, 0.4, [4, 4, 9])
    ours.behaviour = ours.behaviour.select([0, 0, 0])
    rounds = [ours(row, policy, round)[0] for round in range(4)]
    for made in rounds:
        torch.testing.assert_close(made[0], made[1], rtol=1e-3, atol=1e-3)
    flat = [(k, r, made[r]) for k, made in enumerate(rounds) for r in (0, 2)]
    for k, r, made in flat:
        for k_2, r_2, other in flat:
            assert (k, r) == (k_2, r_2) or not (made[:1] - other[:1]).abs().max() < 1e-3
            same = (made[-3:, None] == other[-3:]).all(-1).diagonal()  # real ones, the last
            assert (k, r) == (k_2, r_2) or not same.all()


def test_no_two_draws_of_a_loop_share_a_generator(ensemble, monkeypatch):
    """Within a row; all rows' runs of one seed are given the same noise. But the search for a λ repeats its own."""
    started, row_now = {}, []

    def recorded(device, seed, step):
        generator = seeded(device, seed, step)
        started.setdefault(row_now[-1], []).append((generator.initial_seed(), step))
        return generator

    monkeypatch.setattr(synthetic, "seeded", recorded)
    rows = [*ROWS, Row("w", "world model")]
    ours = sources(ensemble, 0.4)

    def noted(row, policy, round):
        row_now.append(row.name)
        return ours(row, policy, round)

    pgd.run(learner(rows=rows), rows, noted, EVERY, MARKS, score)
    each = {name: [generator for generator, _ in found] for name, found in started.items()}
    rounds = math.ceil(STEPS / EVERY)
    for name in "bw":
        assert len(set(each[name])) == len(each[name]) == rounds * 2 * 2  # a block and real transitions for both seeds
    search = [seed for seed, step in started["c"] if step >= 500_000]
    data_ = [seed for seed, step in started["c"] if step < 500_000]
    assert len(set(data_)) == len(data_) and set(data_) == set(each["b"][2:])  # but for the draws of the first round
    assert len(set(search)) == len(search) / 10 == (rounds - 1) * 2 and not set(search) & set(data_)
    assert "a" not in each and set(each["w"]) & set(each["b"]) == set(each["b"][2::4] + each["b"][3::4])  # the real ones


def test_the_world_model_follows_the_cloned_policies_first(ensemble):
    """In the first round no policy is trained: then the agents do not enter at all. Later the cloned ones do not."""
    row, agents_ = Row("w", "world model"), a_policy()
    others = a_policy()
    others.net.biases[-1].data += 1
    ours = sources(ensemble)
    expected = synthetic.from_world_model(ensemble, a_behaviour(), REAL[:, OBS], WINDOWS, 10 - 1, SEEDS, 0)
    for policy in (agents_, others):
        made, batch = ours(row, policy, 0)
        assert all(torch.equal(a, b) for a, b in zip(made, expected.data, strict=True))
        assert all(torch.equal(getattr(batch, n), getattr(expected, n)) for n in FACTS[1:])
    later = ours(row, agents_, 1)[0]
    assert not any(torch.equal(a, b) for a, b in zip(later, ours(row, others, 1)[0]))
    ours.behaviour = None
    assert all(torch.equal(a, b) for a, b in zip(later, ours(row, agents_, 1)[0], strict=True))
    for row in ROWS:
        ours(row, agents_, 0)  # no other needs them


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("row", [ROWS[1], Row("w", "world model")], ids=lambda r: r.source)
def test_the_share_of_real_transitions(row, fraction, ensemble):
    made, batch = sources(ensemble, fraction)(row, a_policy(), 1)
    for mine, generated in zip(made, batch.data, strict=True):
        is_real = (mine[:, None] == REAL).all(-1).any(1)
        assert is_real.float().mean().item() == pytest.approx(fraction, abs=0.5 / len(mine) + 1e-6)
        assert torch.equal(mine[~is_real], generated if fraction < 1 else generated[:0])
    assert fraction != 0.4 or not torch.equal(made[0][-5:], made[1][-5:])  # not the same ones for all runs


def test_the_world_model_gives_as_many_steps_as_the_diffusion_model(ensemble):
    made, batch = sources(ensemble)(Row("w", "world model"), a_policy(), 2)
    expected = synthetic.from_world_model(ensemble, a_policy(), REAL[:, OBS], WINDOWS, 10 - 1, SEEDS, 2)
    assert all(torch.equal(a, b) for a, b in zip(made, expected.data, strict=True)) and batch.lam.isnan().all()
    first = (made[0][:, None, OBS] == REAL[:, OBS]).all(-1).any(1)  # rollouts start from states of the data
    assert first.sum() >= round(WINDOWS * (1 - batch.diverged[0].item())) > 0
    assert sum(len(d) for d in made) <= 2 * WINDOWS * (10 - 1)  # as many as a full window has successors


def test_a_run_without_data_is_marked_as_diverged_and_leaves_the_others_untouched(ensemble):
    """All its trajectories diverge once its policy is NaN: there is nothing to train on, which must end no other run."""
    rows = [Row("d", "diffusion", "explicit", 0.5), Row("w", "world model")]
    results = []
    for broken in (False, True):
        agent, ours = learner("iql", rows, 8), sources(ensemble)

        def spoil(row, policy, round, broken=broken, agent=agent, ours=ours):
            if broken and round == 0:
                for r in (0, 3):
                    agent.agent.policy.net.weights[0].data[r] = math.nan
            return ours(row, policy, round)

        results.append((*pgd.run(agent, rows, spoil, 3, [0, 8], score), agent))
    (clean, facts, _), (curve, facts_2, agent) = results
    others = [1, 2]
    assert torch.equal(clean[:, others], curve[:, others]) and curve[-1, [0, 3]].isnan().all()
    torch.testing.assert_close(facts[..., others], facts_2[..., others], rtol=0, atol=0, equal_nan=True)
    assert (agent.diverged_at[[0, 3]] > 0).all() and agent.diverged_at[others].tolist() == [-1, -1]
    assert facts_2[-1, FACTS.index("diverged"), [0, 3]].tolist() == [1, 1]


def test_a_killed_run_of_real_sources_goes_on_with_what_is_kept(ensemble, tmp_path, long, monkeypatch):
    """Rows of both models, runs without data and with real ones among them."""
    rows = [ROWS[1], Row("w", "world model"), Row("r", "real")]
    results, asked = [], []
    for at, fraction in ((None, 0.4), (5, 0.4), (None, 1.0), (5, 1.0)):
        path, agent = tmp_path / f"{at}-{fraction}.safetensors", learner("iql", rows, 8)
        agent.agent.policy.net.weights[0].data[0] = math.nan
        if at:
            with pytest.raises(Stop):
                pgd.run(agent, rows, sources(ensemble, fraction), 3, [0, 8], score, path, 1e9, stopping(at))
            agent, ours = learner("iql", rows, 8), sources(ensemble, fraction)
            with monkeypatch.context() as patch:
                patch.setattr(Sources, "__call__", lambda *a, c=Sources.__call__: asked.append((a[1].name, a[3])) or c(*a))
                results.append((*pgd.run(agent, rows, ours, 3, [0, 8], score, path, 1e9), agent))
        else:
            results.append((*pgd.run(agent, rows, sources(ensemble, fraction), 3, [0, 8], score), agent))
    assert asked == 2 * [("r", 1), ("b", 2), ("w", 2), ("r", 2)]
    assert_same(*results[:2])
    assert_same(*results[2:])
    assert not torch.equal(results[0][0][-1, 1:], results[2][0][-1, 1:])


# Evaluation


@pytest.fixture
def played(monkeypatch):
    """The targets of all rollouts that took place."""
    targets, rollout = [], adroit.rollout

    def spied(act, n, rng, horizon, start, threads):
        assert len(start) == n
        targets.append(start)
        return rollout(act, n, rng, horizon, start, threads)

    monkeypatch.setattr(adroit, "rollout", spied)
    return targets


def test_evaluation_is_that_of_each_run_alone_from_the_states_of_its_seed(played):
    policy = a_policy(3)
    values = evaluate(policy, 4, 40, [1, 2, 1])
    assert [v.shape for v in values] == [(3, 4)] * 3 and np.isnan(values[1]).all()
    (targets,) = played
    starts = targets.reshape(3, 4, 4)
    assert (starts[0] == starts[2]).all() and not (starts[0] == starts[1]).all(-1).any()
    assert all(len(np.unique(s, axis=0)) == 4 for s in starts)
    fallen = []
    for r in range(3):
        alone = adroit.rollout(policy.select([r]).act, 4, None, 40, starts[r], 1)
        np.testing.assert_allclose(values[0][r], alone.d4rl_returns, rtol=1e-3)
        fallen.append(alone.fallen.any(1))
    np.testing.assert_array_equal(values[2], fallen)
    assert len(np.unique(values[0])) == 12
    evaluate(policy, 2, 2, [2, 2, 1])
    again = played[-1].reshape(3, 2, 4)
    assert (again[0] == starts[1, :2]).all() and (again[2] == starts[0, :2]).all()  # fewer are the first of more


def test_chunks_do_not_change_an_evaluation(played):
    policy = a_policy(3)
    reference = evaluate(policy, 5, 10, [0, 1, 2])
    for chunk, batches in ((1, 5), (6, 3), (9, 2), (15, 1)):
        played.clear()
        np.testing.assert_allclose(evaluate(policy, 5, 10, [0, 1, 2], chunk=chunk), reference, rtol=1e-4)
        assert len(played) == batches and all(len(t) <= max(chunk, 3) for t in played)


def test_native_returns_take_whole_episodes():
    policy = a_policy(2)
    with torch.no_grad():
        policy.net.biases[-1][0], policy.net.biases[-1][1] = 5.0, -5.0  # clenched, and open: another fate
        for weight in policy.net.weights:
            weight.zero_()
    d4rl, native, falls = evaluate(policy, 1, adroit.NATIVE_HORIZON, [0, 0])
    targets = adroit.sample_targets(1, np.random.default_rng([0, 5]))
    for r in range(2):
        alone = adroit.rollout(policy.select([r]).act, 1, None, adroit.NATIVE_HORIZON, targets, 1)
        np.testing.assert_allclose(native[r], alone.rewards.sum(1), rtol=1e-6)
        np.testing.assert_allclose(d4rl[r], alone.d4rl_returns, rtol=1e-6)
        np.testing.assert_array_equal(falls[r], alone.fallen[:, :100].any(1))
    assert not np.allclose(native, d4rl)


def test_only_falls_within_d4rls_horizon_count(monkeypatch):
    def fake(act, n, rng, horizon, targets, threads):
        fallen = np.zeros((n, horizon), dtype=bool)
        fallen[0, 150:], fallen[1, 99:] = True, True
        nothing = np.zeros((n, horizon + 1, 1))
        return adroit.Episodes(nothing, nothing, np.ones((n, horizon)), fallen, nothing, nothing, targets)

    monkeypatch.setattr(adroit, "rollout", fake)
    d4rl, native, falls = evaluate(a_policy(1), 3, 200, [0])
    assert falls.tolist() == [[0, 1, 0]] and d4rl.tolist() == [[100] * 3] and native.tolist() == [[200] * 3]


def test_a_nan_policy_has_nan_returns_and_leaves_the_others_untouched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where MuJoCo would leave its log
    clean = evaluate(a_policy(3), 3, 20, [0, 1, 2])
    broken = a_policy(3)
    broken.net.biases[0].data[1] = math.nan
    values = evaluate(broken, 3, 20, [0, 1, 2])
    assert np.isnan(values[0][1]).all()
    for found, expected in zip(values, clean, strict=True):
        np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])
    assert not (tmp_path / "MUJOCO_LOG.TXT").exists()  # nor a warning for each step of each episode
