"""Table 1: trained once for its inputs, gone on with after a kill, tested, announced without a trace, and its table by hand."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SPEC, Ideal, cut, kept, toy

from pgdlib import pgd, synthetic
from pgdlib.agents.bc import BC
from pgdlib.agents.iql import IQL
from pgdlib.agents.td3_bc import TD3BC
from pgdlib.edm import Denoiser
from pgdlib.fast import generator
from pgdlib.lab import artifacts, budget, resumable, settings, table1
from pgdlib.lab.table1 import Result, evaluate, per_seed
from pgdlib.pgd import FACTS, Row
from pgdlib.simulators import pen, unknown

CPU = torch.device("cpu")
KINDS = {"bc": BC, "iql": IQL, "td3_bc": TD3BC}
ROWS = [Row("a", "real"), Row("b", "diffusion", "explicit", 0.5), Row("c", "diffusion", "annealed", "calibrated")]
SEEDS = [4, 9]
MEAN, STD = torch.linspace(-1, 1, 45), torch.linspace(0.5, 2, 45)


def asked(**changes):
    """Little enough to be trained in no time."""
    own = dict(scale="ci", seed=0, agent_steps=6, agent_batch=4, hidden=6, resample_every=4, curve_points=2, real_fraction=0.0)
    return SimpleNamespace(**{**settings.of_scale("ci"), **own, **changes})


def make_agent(seeds, kind=IQL):
    return kind(SPEC, seeds, MEAN, STD, (6,))


class Random:
    """Sources of random data, other ones for each row, run, round and policy; interrupted, if asked, where they draw `at`."""

    simulator = pen.PEN

    def __init__(self, at=None):
        self.calls, self.at = [], at

    def __call__(self, row, policy, number):
        if (row.name, number) == self.at:
            raise KeyboardInterrupt
        self.calls.append((row.name, number))
        sizes = policy.net.weights[0].abs().mean((1, 2)).tolist()
        noise = [generator("cpu", "real", number, r, ord(row.name)) for r in range(policy.runs)]
        made = [torch.randn(9, SPEC.transition_width, generator=each) + size for each, size in zip(noise, sizes)]
        for x in made:
            x[:, SPEC.terminal] = 0
        batch = SimpleNamespace(**{name: torch.full((policy.runs,), i + 10.0 * number) for i, name in enumerate(FACTS)})
        return made, None if row.source == "real" else batch


def fake_evaluate(simulator, policy, episodes, seeds, threads=None, chunk=512, horizon=None):
    """Numbers that tell runs, episodes, horizons and seeds apart, without a simulator."""
    own = policy.net.biases[-1].detach().sum((1, 2)).numpy()[:, None] + np.arange(episodes)
    assert len(seeds) == policy.runs
    falls = np.tile(np.arange(episodes) % 2, (policy.runs, 1))
    return np.stack([own + np.array(seeds)[:, None], falls]).astype(np.float64)


@pytest.fixture
def evaluations(monkeypatch):
    """What was asked of `evaluate`, which a fake takes the place of."""
    calls = []
    monkeypatch.setattr(table1, "evaluate", lambda sim, policy, *a, **k: calls.append(a) or fake_evaluate(sim, policy, *a))
    return calls


@pytest.fixture
def trainings(monkeypatch):
    """The loops that were run."""
    calls, run = [], resumable.run
    monkeypatch.setattr(resumable, "run", lambda loop, *a, **k: calls.append(loop) or run(loop, *a, **k))
    return calls


@pytest.fixture
def often(monkeypatch):
    """Checkpoints are saved after every step, and all drawn data are kept."""
    run = resumable.run
    monkeypatch.setattr(resumable, "run", lambda *a, **k: run(*a, **k, save_every=-1.0))
    monkeypatch.setattr(table1, "LONG", -1.0)


def train(p=None, kind="iql", rows=ROWS, seeds=SEEDS, sources=None, inputs=None, make=make_agent):
    return table1.train(kind, make, rows, seeds, sources or Random(), p or asked(), CPU, inputs or dict(data="toy"))


def assert_same(a, b):
    assert (a.rows, a.seeds, a.marks) == (b.rows, b.seeds, b.marks)
    for name in ("curve", "facts", "returns", "falls", "diverged_at"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    for (name, x), y in zip(a.policy.state_dict().items(), b.policy.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def again_from_nothing(runs):
    """The result, trained anew without what a first training left; that left nothing but its own file."""
    (file,) = (f for f in kept(runs) if not f.endswith(".damaged"))
    assert file.startswith("agents/iql-ci-")
    (runs / file).unlink()
    return train()


def test_agents_are_trained_once(runs, evaluations, trainings):
    torch.manual_seed(1)
    first = train()
    asked_for = len(evaluations)
    torch.manual_seed(2)
    assert_same(first, train())
    assert len(trainings) == 1 and len(evaluations) == asked_for
    torch.manual_seed(3)
    assert_same(first, again_from_nothing(runs))  # the global random state does not enter
    assert len(trainings) == 2


def test_what_is_trained_and_tested(runs, evaluations, trainings):
    """Row by row, with all seeds in each; scored on the curve's episodes, tested on others."""
    p, sources = asked(seed=3, curve_episodes=3, test_episodes=15), Random()
    result = train(p, sources=sources)
    learner = trainings[0].learner
    assert learner.seeds == SEEDS * 3 and (learner.step, learner.batch_size, learner.learning_rate) == (6, 4, p.agent_rate)
    assert sources.calls == [(name, k) for k in (0, 1) for name in "abc"]
    assert result.marks == [0, 3, 6] and result.curve.shape == (3, 6) and result.facts.shape == (2, 6, 6)
    own, others = [41, 91] * 3, [42, 92] * 3  # the states that a run starts from are those of its seed
    curve, test = (3, own), (15, others)
    assert evaluations == [curve] * 3 + [test]
    policy = learner.agent.policy
    np.testing.assert_array_equal(result.returns, fake_evaluate(None, policy, *test)[0])
    np.testing.assert_array_equal(result.falls, fake_evaluate(None, policy, *test)[1])
    for point, scored in ((-1, policy), (0, make_agent(SEEDS * 3).policy)):
        np.testing.assert_allclose(result.curve[point], fake_evaluate(None, scored, *curve)[0].mean(1), rtol=1e-6)
    assert (result.diverged_at == -1).all() and result.facts[1, :, 2:].T.tolist() == [[10.0, 11, 12, 13, 14, 15]] * 4
    card = artifacts.load(runs / kept(runs)[0])[1]
    assert card["stack"] == SEEDS * 3 and card["kind"] == "iql" and card["rows"] == [vars(r) for r in ROWS]


@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_policies_are_in_the_result(runs, evaluations, trainings, kind):
    """Freshly trained or read from the disk: those of the learner, row by row, without gradients."""

    def make(seeds):
        return make_agent(seeds, KINDS[kind])

    first, again = (train(kind=kind, make=make) for _ in range(2))
    assert len(trainings) == 1
    trained, obs = trainings[0].learner.agent.policy, torch.randn(12, 45, generator=torch.Generator().manual_seed(0))
    fresh = make(SEEDS * 3).policy
    for policy in (first.policy, again.policy):
        assert policy.runs == 6 and not any(p.requires_grad for p in policy.parameters())
        assert all(torch.equal(v, policy.state_dict()[k]) for k, v in trained.state_dict().items())
        assert not torch.equal(policy(obs)[0], fresh(obs)[0])


def test_every_input_makes_other_agents(runs, evaluations, trainings, monkeypatch):
    changes = dict(agent_steps=5, agent_batch=5, agent_rate=2e-3, hidden=7, polyak=0.01, resample_every=3, windows=9)
    changes |= dict(real_fraction=0.1, draw_solver="heun", draw_steps=9, draw_churn=1.0, draw_warmup=1)
    changes |= dict(curve_points=3, curve_episodes=3, test_episodes=6)
    train()
    for key, value in changes.items():
        train(asked(**{key: value}))
    train(kind="bc")
    train(rows=ROWS[:2])
    train(rows=[ROWS[0], Row("b", "diffusion", "explicit", 0.6)])
    train(rows=ROWS[::-1])
    train(seeds=[4, 8])
    train(inputs=dict(data="other"))
    assert len(trainings) == len(kept(runs)) == len(changes) + 7
    train(asked(samples=9, train_steps=9, ppo_steps=9, seed=1))
    assert len(trainings) == len(changes) + 7  # what concerns no agent makes no other
    rooms, version = [], artifacts.code_version
    monkeypatch.setattr(artifacts, "code_version", lambda *names: rooms.extend(names) or version(*names) + "0")
    train()
    assert len(trainings) == len(changes) + 8 and rooms == ["lab.table1", "agents.iql"]  # the agent's own code, too


@pytest.mark.parametrize("at", [("b", 0), ("b", 1), ("c", 1)])
def test_a_killed_training_goes_on_to_the_same(runs, evaluations, often, at):
    """What was drawn of the round is not drawn again; nothing but the result stays."""
    with pytest.raises(KeyboardInterrupt):
        train(sources=Random(at))
    files, (name, number) = kept(runs), at
    assert (
        all(f.startswith("checkpoints/iql-ci-") for f in files) and len(files) == {"b0": 0, "b1": 3, "c1": 2}[f"{name}{number}"]
    )
    sources = Random()
    resumed = train(sources=sources)
    left = "abc" if name == "b" else "ac"  # real data are not drawn, so they are not kept
    assert [n for n, k in sources.calls if k == number] == list(left) and {k for _, k in sources.calls} == {number, 1}
    assert_same(resumed, again_from_nothing(runs))


@pytest.mark.parametrize("step", [1, 3, 4, 5, 6])
def test_a_training_killed_at_any_step_draws_nothing_again(runs, evaluations, often, step):
    class Bar:
        n = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, more):
            self.n += more
            if self.n == step:
                raise KeyboardInterrupt

    sources = Random()
    with pytest.raises(KeyboardInterrupt):
        table1.train("iql", make_agent, ROWS, SEEDS, sources, asked(), CPU, dict(data="toy"), lambda **_: Bar())
    resumed = train(sources=sources)
    assert [call for call in sources.calls if call[0] != "a"] == [(name, k) for k in (0, 1) for name in "bc"]
    assert_same(resumed, again_from_nothing(runs))


@pytest.mark.parametrize("where", ["tests", "saving"])
def test_killed_at_the_end_nothing_is_trained_again(runs, evaluations, monkeypatch, where):
    def killed(*_):
        raise KeyboardInterrupt

    save = artifacts.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if where == "tests":
            patch.setattr(table1.Training, "result", killed)
        else:
            patch.setattr(artifacts, "save", lambda path, *a: killed() if path.parent.name == "agents" else save(path, *a))
        train()
    assert [artifacts.load(runs / f)[1]["step"] for f in kept(runs)] == [6]
    sources = Random()
    resumed = train(sources=sources)
    assert sources.calls == []
    assert_same(resumed, again_from_nothing(runs))


@pytest.mark.parametrize("which", ["result", "checkpoint", "data"])
def test_what_is_damaged_is_set_aside_and_made_again(runs, evaluations, often, which):
    if which == "result":
        train()
    else:
        with pytest.raises(KeyboardInterrupt):
            train(sources=Random(("c", 1)))
    files = [f for f in kept(runs) if which == "result" or (f.count("/") == 3) == (which == "data")]
    cut(runs / files[0])
    first = train()
    assert sum(f.endswith(".damaged") for f in kept(runs)) == (which != "data")  # with data goes all of their folder
    assert_same(first, again_from_nothing(runs))


def test_data_that_are_drawn_quickly_are_not_kept(runs, evaluations):
    with pytest.raises(KeyboardInterrupt):
        train(sources=Random(("c", 1)))
    assert kept(runs) == []


def test_a_diverged_run_in_the_simulator_itself(runs, tmp_path, monkeypatch):
    """Data without meaning for one run: it has no return, and the others those that they have without it."""

    class Poisoned(Random):
        def __call__(self, row, policy, number):
            made, batch = super().__call__(row, policy, number)
            if row.name == "b":
                made[0][:, SPEC.reward] = math.nan
            return made, batch

    monkeypatch.chdir(tmp_path)  # MuJoCo leaves its log where it stands
    monkeypatch.setattr(Random, "simulator", replace(pen.PEN, horizon=20))
    p = asked(curve_points=1, curve_episodes=1, test_episodes=2)
    clean, result = (train(p, rows=ROWS[:2], sources=s, inputs=dict(i=i)) for i, s in enumerate((Random(), Poisoned())))
    assert result.diverged_at.tolist() == [-1, -1, 1, -1]
    for name in ("curve", "returns", "falls"):
        axis = -1 if name == "curve" else 0
        np.testing.assert_array_equal(*(np.delete(getattr(each, name), 2, axis) for each in (clean, result)))
    table = per_seed(result, "toy", pen.PEN)
    assert table.d4rl_return.isna().tolist() == table.fell.isna().tolist() == [False, False, True, False]


# Tests in the simulator


def a_policy(runs):
    return make_agent(range(runs)).policy


@pytest.fixture
def played(monkeypatch):
    """The targets of all rollouts that took place."""
    targets, rollout = [], table1.rollout

    def spied(simulator, act, n, rng, horizon, start, *how, **more):
        assert [len(part) for part in start] == [n] * 3
        targets.append(start[2])
        return rollout(simulator, act, n, rng, horizon, start, *how, **more)

    monkeypatch.setattr(table1, "rollout", spied)
    return targets


def test_evaluation_is_that_of_each_run_alone_from_the_states_of_its_seed(played):
    policy = a_policy(3)
    values = evaluate(pen.PEN, policy, 4, [1, 2, 1], horizon=40)
    assert values.shape == (2, 3, 4)
    starts = played[0].reshape(3, 4, 4)
    assert (starts[0] == starts[2]).all() and not (starts[0] == starts[1]).all(-1).any()
    for r in range(3):
        alone = pen.rollout(policy.select([r]).act, 4, None, 40, starts[r], 1)
        np.testing.assert_allclose(values[0][r], alone.returns(), rtol=1e-3)
        np.testing.assert_array_equal(values[1][r], alone.ended.any(1))
    assert len(np.unique(values[0])) == 12
    evaluate(pen.PEN, policy, 2, [2, 2, 1], horizon=2)
    again = played[-1].reshape(3, 2, 4)
    assert (again[0] == starts[1, :2]).all() and (again[2] == starts[0, :2]).all()  # fewer are the first of more


def test_chunks_do_not_change_an_evaluation(played):
    policy = a_policy(3)
    reference = evaluate(pen.PEN, policy, 5, [0, 1, 2], horizon=10)
    for chunk, batches in ((1, 5), (6, 3), (9, 2), (15, 1)):
        played.clear()
        found = evaluate(pen.PEN, policy, 5, [0, 1, 2], chunk=chunk, horizon=10)
        np.testing.assert_allclose(found, reference, rtol=1e-4)
        assert len(played) == batches and all(len(t) <= max(chunk, 3) for t in played)


def test_agents_of_an_unknown_environment_have_no_returns():
    assert np.isnan(evaluate(unknown("mine", 45, 24, 10), a_policy(3), 4, [0, 1, 2])).all()


def test_a_nan_policy_has_nan_returns_and_leaves_the_others_untouched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where MuJoCo would leave its log
    clean, broken = evaluate(pen.PEN, a_policy(3), 3, [0, 1, 2], horizon=20), a_policy(3)
    broken.net.biases[0].data[1] = math.nan
    values = evaluate(pen.PEN, broken, 3, [0, 1, 2], horizon=20)
    assert np.isnan(values[0][1]).all() and not (tmp_path / "MUJOCO_LOG.TXT").exists()
    for found, expected in zip(values, clean, strict=True):
        np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])


# The table

RETURNS = np.array([[100.0, 300.0, 200.0], [3000.0, 3100.0, 3200.0], [7.0, 8.0, 9.0], [1.0, 2.0, 6.0]])


def a_result():
    facts = np.arange(48.0).reshape(2, 4, 6).swapaxes(1, 2)
    facts[..., :2] = np.nan
    return Result(
        rows=[Row("real", "real"), Row("guided", "diffusion", "explicit", 1.5)],
        seeds=[7, 8],
        marks=[0, 50],
        curve=np.arange(8.0).reshape(2, 4),
        facts=facts,
        returns=RETURNS,
        falls=np.array([[0, 0, 1], [0, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=bool),
        diverged_at=np.array([-1, -1, 40, -1]),
        policy=None,
    )


def test_the_table_has_a_line_for_each_row_and_seed():
    """The third run has diverged: its episodes still gave returns, and none of them counts."""
    table = per_seed(a_result(), "stand-in pen-toy", pen.PEN)
    assert table.dataset.tolist() == ["stand-in pen-toy"] * 4
    assert table.row.tolist() == ["real", "real", "guided", "guided"] and table.seed.tolist() == [7, 8, 7, 8]
    assert table.source.tolist() == ["real"] * 2 + ["diffusion"] * 2
    assert table.rule.tolist()[2:] == ["explicit"] * 2 and table.rule.isna().tolist() == [True, True, False, False]
    np.testing.assert_allclose(table.d4rl_return, [200, 3100, np.nan, 3])
    errors = [np.sqrt(((v - v.mean()) ** 2).sum() / 2 / 3) for v in RETURNS]
    np.testing.assert_allclose(table.standard_error, [*errors[:2], np.nan, errors[3]])
    np.testing.assert_allclose(table.score, (table.d4rl_return - 96.262799) / (3076.833073 - 96.262799) * 100)
    np.testing.assert_allclose(table.fell, [1 / 3, 0, np.nan, 2 / 3])
    assert table.episodes.tolist() == [3] * 4
    np.testing.assert_array_equal(table.diverged_at, [np.nan, np.nan, 40, np.nan])
    for i, name in enumerate(FACTS):
        np.testing.assert_array_equal(table[f"data_{name}"], [np.nan, np.nan, 36 + i, 42 + i])
    parts = a_result().by_row(a_result().curve)
    assert parts["real"].tolist() == [[0, 1], [4, 5]] and parts["guided"].tolist() == [[2, 3], [6, 7]]


def test_the_table_is_saved(runs):
    table = per_seed(a_result(), "toy", pen.PEN)
    path = table1.save_table(table, "table1_toy", "ci")
    assert path == runs / "results" / "ci" / "table1_toy.csv" and kept(runs) == ["results/ci/table1_toy.csv"]
    pd.testing.assert_frame_equal(pd.read_csv(path), table, check_dtype=False)


# The announcement


def all_sources(denoiser=None, chunk=512):
    model = synthetic.Diffusion(denoiser or Ideal(), "multistep", 5, 0.0, 1, chunk)
    return pgd.Sources(toy([40]).transitions(), model, None, None, 8, 0.0, SEEDS, pen.PEN)


def test_the_announcement_tells_what_is_to_come_and_leaves_no_trace(runs, evaluations):
    for rows in (ROWS, ROWS[::-1], ROWS[:1]):
        p, sources, said = asked(agent_steps=3000, resample_every=1000, windows=8), all_sources(), []
        before, real, state = dict(vars(p)), sources.real.clone(), torch.get_rng_state()
        table1.announce(make_agent, rows, SEEDS, sources, p, CPU, said.append)
        assert torch.equal(torch.get_rng_state(), state) and vars(p) == before and torch.equal(sources.real, real)
        n = len(rows)
        # 2 seeds, 2 rows of 3 rounds of 8; and for the calibrated row two searches of 10 draws of 32.
        drawn, episodes = 2 * (2 * 3 * 8 + 2 * 10 * 32) if n > 1 else 0, 2 * n * (4 + 3 * 2)
        assert said == [
            f"{n} rows x 2 seeds = {2 * n} agents, 3,000 steps each, batches of 4",
            f"3 rounds of synthetic data: {drawn:,} trajectories in all; {episodes:,} test episodes",
        ]
    assert kept(runs) == []


def test_the_estimate_is_what_each_part_takes(runs, evaluations, monkeypatch):
    """A call takes 2 s, whatever it does: a training step, 80 control steps of each run; and an evaluation 3 s."""
    works, p = [], asked(agent_steps=100, resample_every=50, windows=8, curve_points=1, curve_episodes=2, test_episodes=10)
    monkeypatch.setattr(table1, "Timer", lambda *_, **__: SimpleNamespace(timeit=lambda n: SimpleNamespace(mean=2.0)))
    monkeypatch.setattr(budget, "pace", lambda config, device: 3.0)
    monkeypatch.setattr(budget, "announce", lambda given, *_: works.extend(given))
    model = Denoiser(45, 24, 10, 8, 1)
    table1.announce(make_agent, ROWS, SEEDS, all_sources(model), p, CPU, lambda text: None)
    seconds = {name: each for name, _, each, _ in works}
    drawn, episodes = 2 * (2 * 2 * 8 + 10 * 32), 6 * (10 + 2 * 2)
    expected = {"training": 2.0 * 100, "data": 3.0 * 5 * drawn, "tests": 2.0 / 80 / 6 * 100 * episodes}
    assert seconds == pytest.approx(expected) and list(seconds) == list(expected)


def test_a_denoiser_that_does_not_fit_is_refused(runs, evaluations, monkeypatch):
    """What is drawn at once: whole blocks of 32 for both seeds, about `chunk` together, or all."""
    asked_for = []
    monkeypatch.setattr(budget, "pace", lambda config, device: 0.0)
    monkeypatch.setattr(budget, "require", lambda config, batch, device: asked_for.append(batch) or 1.0)
    for chunk in (512, 128, 150, 32):
        table1.announce(make_agent, ROWS, SEEDS, all_sources(Denoiser(45, 24, 10, 8, 1), chunk), asked(windows=200), CPU, str)
    assert asked_for == [400, 128, 128, 64]
