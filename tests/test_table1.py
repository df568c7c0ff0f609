"""The benchmark: trained once for its inputs, gone on with after a kill, announced without a trace, and its table by hand."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Ideal, cut, kept, toy

from pgdlib import pgd, synthetic
from pgdlib.agents.iql import IQL
from pgdlib.agents.stack import BC, WIDTH, of_trajectories
from pgdlib.agents.td3_bc import TD3BC
from pgdlib.edm import seeded
from pgdlib.lab import budget, params, store, table1
from pgdlib.lab.table1 import Result, per_seed
from pgdlib.pgd import FACTS, Row
from pgdlib.simulators import pen as adroit

CPU = torch.device("cpu")
KINDS = {"bc": BC, "iql": IQL, "td3_bc": TD3BC}
ROWS = [Row("a", "real"), Row("b", "diffusion", "explicit", 0.5), Row("c", "diffusion", "annealed", "calibrated")]
SEEDS = [4, 9]
MEAN, STD = torch.linspace(-1, 1, 45), torch.linspace(0.5, 2, 45)


def settings(**changes):
    """Little enough to be trained in no time."""
    own = dict(scale="ci", seed=0, agent_steps=6, agent_batch=4, hidden=6, resample_every=4, curve_points=2, real_fraction=0.0)
    return SimpleNamespace(**{**params.settings("ci"), **own, **changes})


def make_agent(seeds):
    return IQL(seeds, MEAN, STD, (6,))


class Random:
    """Sources of random data, other ones for each row, run, round and policy."""

    def __init__(self):
        self.calls = []

    def __call__(self, row, policy, round):
        self.calls.append((row.name, round))
        sizes = policy.net.weights[0].abs().mean((1, 2)).tolist()
        made = [torch.randn(9, WIDTH, generator=seeded("cpu", round, r + 10 * ord(row.name))) for r in range(policy.runs)]
        for x, size in zip(made, sizes):
            x += size
            x[:, 70] = 0
        batch = SimpleNamespace(**{name: torch.full((policy.runs,), i + 10.0 * round) for i, name in enumerate(FACTS)})
        return made, None if row.source == "real" else batch


def fake_evaluate(policy, episodes, horizon, seeds, threads=None, chunk=512):
    """Numbers that tell runs, episodes, horizons and seeds apart, without a simulator."""
    own = policy.net.biases[-1].detach().sum((1, 2)).numpy()[:, None] + np.arange(episodes)
    assert len(seeds) == policy.runs
    values = np.stack(
        [own + np.array(seeds)[:, None], own + 1000 + horizon, np.tile(np.arange(episodes) % 2, (policy.runs, 1))]
    )
    return values.astype(np.float64)


@pytest.fixture
def evaluations(monkeypatch):
    """What was asked of `pgd.evaluate`, which a fake takes the place of."""
    calls = []
    monkeypatch.setattr(pgd, "evaluate", lambda policy, *a: calls.append(a) or fake_evaluate(policy, *a))
    return calls


@pytest.fixture
def trainings(monkeypatch):
    """The learners that `pgd.run` trained."""
    calls, run = [], pgd.run
    monkeypatch.setattr(pgd, "run", lambda learner, *a, **k: calls.append(learner) or run(learner, *a, **k))
    return calls


def train(p=None, kind="iql", rows=ROWS, seeds=SEEDS, sources=None, inputs=None, make=make_agent):
    return table1.train(kind, make, rows, seeds, sources or Random(), p or settings(), CPU, inputs or dict(data="toy"))


def assert_same(a, b):
    assert (a.rows, a.seeds, a.marks) == (b.rows, b.seeds, b.marks)
    for name in ("curve", "facts", "returns", "native", "falls", "diverged_at"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    for (name, x), y in zip(a.policy.state_dict().items(), b.policy.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_agents_are_trained_once(runs, evaluations, trainings):
    torch.manual_seed(1)
    first = train()
    asked = len(evaluations)
    torch.manual_seed(2)
    assert_same(first, train())
    assert len(trainings) == 1 and len(evaluations) == asked
    (file,) = kept(runs)  # no checkpoint is left
    assert file.startswith("agents/iql-ci-")
    (runs / file).unlink()
    torch.manual_seed(3)
    assert_same(first, train())  # the global random state does not enter
    assert len(trainings) == 2


def test_what_is_trained_and_tested(runs, evaluations, trainings):
    """Row by row, with all seeds in each; scored on the curve's episodes, tested on others, the native ones alone."""
    p, sources = settings(seed=3, curve_episodes=3, test_episodes=15), Random()
    result = train(p, sources=sources)
    (learner,) = trainings
    assert (
        learner.seeds == SEEDS * 3 and learner.step == 6 and learner.batch_size == 4 and learner.learning_rate == p.agent_rate
    )
    assert sources.calls == [(name, k) for k in (0, 1) for name in "abc"]
    assert result.marks == [0, 3, 6] and result.curve.shape == (3, 6) and result.facts.shape == (2, 6, 6)
    own, others = [41, 91] * 3, [42, 92] * 3  # the states that a run starts from are those of its seed
    curve, test, native = (3, 100, own), (15, 100, others), (table1.native_episodes(p), 200, others)
    assert evaluations == [curve] * 3 + [test, native] and native[0] == 3
    policy = learner.agent.policy
    np.testing.assert_array_equal(result.returns, fake_evaluate(policy, *test)[0])
    np.testing.assert_array_equal(result.native, fake_evaluate(policy, *native)[1])
    np.testing.assert_array_equal(result.falls, fake_evaluate(policy, *test)[2])
    np.testing.assert_allclose(result.curve[-1], fake_evaluate(policy, *curve)[0].mean(1), rtol=1e-6)
    start = make_agent(SEEDS * 3).policy
    np.testing.assert_allclose(result.curve[0], fake_evaluate(start, *curve)[0].mean(1), rtol=1e-6)
    assert (result.diverged_at == -1).all() and result.facts[1, :, 2:].T.tolist() == [[10.0, 11, 12, 13, 14, 15]] * 4
    tensors, card = store.load(runs / kept(runs)[0])
    for name, value in policy.state_dict().items():
        assert torch.equal(tensors[f"policy.{name}"], value)
    assert card["stack"] == SEEDS * 3 and card["kind"] == "iql" and card["rows"] == [vars(r) for r in ROWS]


@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_policies_are_in_the_result(runs, evaluations, trainings, kind):
    """Freshly trained or read from the disk: those of the learner, row by row, without gradients."""

    def make(seeds):
        return KINDS[kind](seeds, MEAN, STD, hidden=(6,))

    first, again = (train(kind=kind, make=make) for _ in range(2))
    (learner,) = trainings
    trained, obs = learner.agent.policy, torch.randn(12, 45, generator=torch.Generator().manual_seed(0))
    fresh = make(SEEDS * 3).policy
    for policy in (first.policy, again.policy):
        assert policy.runs == 6 and not any(p.requires_grad for p in policy.parameters())
        assert policy.state_dict().keys() == trained.state_dict().keys()
        assert all(torch.equal(v, policy.state_dict()[k]) for k, v in trained.state_dict().items())
        with torch.no_grad():
            assert torch.equal(policy(obs)[0], trained(obs)[0]) and not torch.equal(policy(obs)[0], fresh(obs)[0])
            assert torch.equal(policy.select([3])(obs[6:8])[0], trained.select([3])(obs[6:8])[0])
    assert first.policy is not trained
    for p in first.policy.parameters():
        p.data.fill_(math.nan)  # it is the result's own
    assert_same(again, train(kind=kind, make=make))
    assert len(trainings) == 1


def test_every_input_makes_other_agents(runs, evaluations, trainings):
    changes = dict(
        agent_steps=5,
        agent_batch=5,
        agent_rate=2e-3,
        hidden=7,
        polyak=0.01,
        resample_every=3,
        windows=9,
        real_fraction=0.1,
        draw_solver="heun",
        draw_steps=9,
        draw_churn=1.0,
        draw_warmup=1,
        curve_points=3,
        curve_episodes=3,
        test_episodes=6,
    )
    train()
    for key, value in changes.items():
        train(settings(**{key: value}))
    train(kind="bc")
    train(rows=ROWS[:2])
    train(rows=[ROWS[0], Row("b", "diffusion", "explicit", 0.6)])
    train(rows=ROWS[::-1])
    train(seeds=[4, 8])
    train(inputs=dict(data="other"))
    assert len(trainings) == len(kept(runs)) == len(changes) + 7
    train(settings(samples=9, train_steps=9, ppo_steps=9, seed=1))
    assert len(trainings) == len(changes) + 7  # what concerns no agent makes no other


def test_the_code_that_decides_is_in_the_name():
    """Every module that the loop reaches, but for what only keeps, plots or reads: `metrics` says where trajectories end."""
    loop = {"agents", "iql", "td3_bc", "pgd", "synthetic", "guidance", "sampler", "worldmodel", "metrics", "adroit"}
    assert loop <= set(table1.ROOMS)


def test_a_damaged_result_is_set_aside_and_trained_again(runs, evaluations, trainings, capsys):
    first = train()
    (file,) = kept(runs)
    cut(runs / file)
    assert_same(first, train())
    assert len(trainings) == 2 and file in capsys.readouterr().out and len(kept(runs)) == 2


class Killed(Random):
    """Sources that are interrupted in the second round, once."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def __call__(self, row, policy, round):
        if (row.name, round) == self.at:
            raise KeyboardInterrupt
        return super().__call__(row, policy, round)


@pytest.mark.parametrize("at", [("a", 1), ("c", 1)])
def test_a_killed_training_goes_on(runs, evaluations, monkeypatch, at):
    run = pgd.run
    monkeypatch.setattr(pgd, "run", lambda *a, **k: run(*a, **k, save_every=-1.0))
    with pytest.raises(KeyboardInterrupt):
        train(sources=Killed(at))
    (checkpoint,) = kept(runs)
    assert checkpoint.startswith("checkpoints/iql-ci-") and store.load(runs / checkpoint)[1]["step"] == 4
    sources = Random()
    resumed = train(sources=sources)
    assert {k for _, k in sources.calls} == {1}
    (file,) = kept(runs)  # the checkpoint is gone
    (runs / file).unlink()
    assert_same(resumed, train())


def test_killed_while_it_is_tested(runs, monkeypatch, trainings):
    run, said = pgd.run, []
    monkeypatch.setattr(pgd, "run", lambda *a, **k: run(*a, **k, save_every=-1.0))

    def evaluate(policy, episodes, horizon, seeds):
        if horizon == adroit.NATIVE_HORIZON and not said:
            said.append("killed")
            raise KeyboardInterrupt
        return fake_evaluate(policy, episodes, horizon, seeds)

    monkeypatch.setattr(pgd, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        train()
    (checkpoint,) = kept(runs)
    sources = Random()
    resumed = train(sources=sources)
    assert checkpoint not in kept(runs) and sources.calls == []  # nothing was trained anew
    (file,) = kept(runs)
    (runs / file).unlink()
    assert_same(resumed, train())


def test_killed_while_it_is_saved_nothing_is_trained_again(runs, evaluations, monkeypatch, trainings):
    run, save = pgd.run, store.save
    monkeypatch.setattr(pgd, "run", lambda *a, **k: run(*a, **k, save_every=-1.0))

    def killed(path, tensors, card):
        if path.parent.name == "agents":
            raise KeyboardInterrupt
        save(path, tensors, card)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "save", killed)
        train()
    (checkpoint,) = kept(runs)
    assert store.load(runs / checkpoint)[1]["step"] == 6
    sources = Random()
    resumed = train(sources=sources)
    assert sources.calls == [] and len(trainings) == 2
    (file,) = kept(runs)  # the checkpoint is gone
    (runs / file).unlink()
    assert_same(resumed, train())


def test_a_damaged_checkpoint_is_set_aside_and_training_begins_anew(runs, evaluations, monkeypatch):
    run = pgd.run
    monkeypatch.setattr(pgd, "run", lambda *a, **k: run(*a, **k, save_every=-1.0))
    with pytest.raises(KeyboardInterrupt):
        train(sources=Killed(("a", 1)))
    cut(runs / kept(runs)[0])
    first = train()
    file, aside = kept(runs)
    assert aside.startswith("checkpoints/") and aside.endswith(".damaged")
    (runs / file).unlink()
    assert_same(first, train())


def test_a_diverged_run_in_the_simulator_itself(runs, tmp_path, monkeypatch):
    """Data without meaning for one run: it has no return, and the others those that they have without it."""

    class Poisoned(Random):
        def __call__(self, row, policy, round):
            made, batch = super().__call__(row, policy, round)
            if row.name == "b":
                made[0][:, 69] = math.nan
            return made, batch

    monkeypatch.chdir(tmp_path)  # MuJoCo leaves its log where it stands
    for name, steps in (("D4RL_HORIZON", 20), ("NATIVE_HORIZON", 40)):
        monkeypatch.setattr(adroit, name, steps)
    p = settings(curve_points=1, curve_episodes=1, test_episodes=2)
    clean, result = (train(p, rows=ROWS[:2], sources=s, inputs=dict(i=i)) for i, s in enumerate((Random(), Poisoned())))
    assert result.diverged_at.tolist() == [-1, -1, 1, -1]
    assert np.isnan(result.means).tolist() == [False, False, True, False]
    for name in ("curve", "returns", "native", "falls"):
        np.testing.assert_array_equal(np.delete(getattr(clean, name), 2, -1 if name == "curve" else 0),
                                      np.delete(getattr(result, name), 2, -1 if name == "curve" else 0))  # fmt: skip
    table = per_seed(result, "toy")
    assert table.d4rl_return.isna().tolist() == table.native_return.isna().tolist() == [False, False, True, False]


# The table

RETURNS = np.array([[100.0, 300.0, 200.0], [3000.0, 3100.0, 3200.0], [7.0, 8.0, 9.0], [1.0, 2.0, 6.0]])


def a_result(diverged_at=(-1, -1, 40, -1)):
    facts = np.arange(48.0).reshape(2, 4, 6).swapaxes(1, 2)
    facts[..., :2] = np.nan
    return Result(
        rows=[Row("real", "real"), Row("guided", "diffusion", "explicit", 1.5)],
        seeds=[7, 8],
        marks=[0, 50],
        curve=np.arange(8.0).reshape(2, 4),
        facts=facts,
        returns=RETURNS,
        native=np.array([[1.0, 2.0], [3.0, 5.0], [0.0, 0.0], [-4.0, -6.0]]),
        falls=np.array([[0, 0, 1], [0, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=bool),
        diverged_at=np.array(diverged_at),
        policy=None,
    )


def test_the_table_has_a_line_for_each_row_and_seed():
    table = per_seed(a_result(), "stand-in pen-toy")
    assert table.dataset.tolist() == ["stand-in pen-toy"] * 4
    assert table.row.tolist() == ["real", "real", "guided", "guided"] and table.seed.tolist() == [7, 8, 7, 8]
    assert table.source.tolist() == ["real"] * 2 + ["diffusion"] * 2
    assert table.rule.tolist()[2:] == ["explicit"] * 2 and table.rule.isna().tolist() == [True, True, False, False]
    np.testing.assert_allclose(table.d4rl_return, [200, 3100, np.nan, 3])
    errors = [np.sqrt(((v - v.mean()) ** 2).sum() / 2 / 3) for v in RETURNS]
    np.testing.assert_allclose(table.standard_error[[0, 1, 3]], np.array(errors)[[0, 1, 3]])
    np.testing.assert_allclose(table.score, (table.d4rl_return - 96.262799) / (3076.833073 - 96.262799) * 100)
    np.testing.assert_allclose(table.native_return, [1.5, 4, np.nan, -5])
    np.testing.assert_allclose(table.fell[[0, 1, 3]], [1 / 3, 0, 2 / 3])
    assert table.episodes.tolist() == [3] * 4
    np.testing.assert_array_equal(table.diverged_at, [np.nan, np.nan, 40, np.nan])
    for i, name in enumerate(FACTS):
        np.testing.assert_array_equal(table[f"data_{name}"], [np.nan, np.nan, 36 + i, 42 + i])


def test_a_diverged_run_has_no_number_from_its_episodes():
    """Its values went out of range, but its episodes still gave returns: none of them counts."""
    line = per_seed(a_result(), "toy").iloc[2]
    assert line.diverged_at == 40
    assert line[["d4rl_return", "standard_error", "score", "native_return", "fell"]].isna().all()


def test_means_and_rows():
    result = a_result()
    np.testing.assert_array_equal(result.means, [200, 3100, np.nan, 3])
    parts = result.by_row(result.curve)
    assert parts["real"].tolist() == [[0, 1], [4, 5]] and parts["guided"].tolist() == [[2, 3], [6, 7]]
    np.testing.assert_array_equal(result.by_row(result.means)["guided"], [np.nan, 3])
    assert per_seed(a_result([5, 5, 5, 0]), "toy").diverged_at.tolist() == [5, 5, 5, 0]


def test_scores_go_both_ways():
    assert table1.return_of(0.0) == 96.262799 and table1.return_of(100.0) == pytest.approx(3076.833073)
    assert adroit.normalised_score(table1.return_of(78.5)) == pytest.approx(78.5)


def test_the_table_is_saved_whole_or_not_at_all(runs, monkeypatch):
    table = per_seed(a_result(), "toy")
    path = table1.save_table(table, "table1_toy", "ci")
    assert path == runs / "results" / "ci" / "table1_toy.csv" and kept(runs) == ["results/ci/table1_toy.csv"]
    pd.testing.assert_frame_equal(pd.read_csv(path), table, check_dtype=False)
    before = path.read_bytes()

    def half(self, place, **named):
        place.write_text("half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pd.DataFrame, "to_csv", half)
        table1.save_table(table, "table1_toy", "ci")
    assert path.read_bytes() == before and kept(runs) == ["results/ci/table1_toy.csv"]


# The announcement


def all_sources():
    model = synthetic.Diffusion(Ideal(), "multistep", 5, 0.0, 1)
    return pgd.Sources(of_trajectories(toy([40])), model, None, None, 8, 0.0, SEEDS)


@pytest.mark.parametrize("rows", [ROWS, ROWS[::-1], ROWS[:1]], ids=["", "reversed", "real alone"])
def test_the_announcement_tells_what_is_to_come_and_leaves_no_trace(rows, runs, capsys):
    p, sources, made = settings(agent_steps=3000, resample_every=1000, windows=8), all_sources(), []
    before, real = copy.deepcopy(vars(p)), sources.real.clone()
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    table1.announce(lambda seeds: made.append(make_agent(seeds)) or made[-1], rows, SEEDS, sources, p, CPU)
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    assert vars(p) == before and torch.equal(sources.real, real) and kept(runs) == []
    out, err = capsys.readouterr()
    n = len(rows)
    assert f"{n} rows x 2 seeds = {2 * n} agents, 3,000 steps each, batches of 4" in out
    # 2 seeds, 2 rows of 3 rounds of 8; and for the calibrated row two searches of 10 draws of 32.
    drawn = 2 * (2 * 3 * 8 + 2 * 10 * 32) if n > 1 else 0
    episodes = 2 * n * (4 + 2 * 2 + 3 * 2)
    assert f"3 rounds of synthetic data: {drawn:,} trajectories in all; {episodes:,} test episodes" in out
    assert err.startswith("estimated: ") and "minutes" in err and "GB" in err and "estimated" not in out


@pytest.mark.parametrize("solver, steps, asked", [("multistep", 5, 5), ("heun", 5, 9), ("heun", 400, 799)])
def test_the_estimate_is_what_each_part_takes(runs, capsys, monkeypatch, solver, steps, asked):
    """With a clock that only the parts move: a training step takes 1 s, a step in the simulator 0.5 s, and a trajectory 2 s
    for each time that the denoiser is `asked`. Only three steps of the sampler are taken."""
    now, p = [0.0], settings(agent_steps=100, resample_every=50, windows=8, curve_points=1, curve_episodes=2, test_episodes=10)
    monkeypatch.setattr(table1, "time", SimpleNamespace(monotonic=lambda: now[0]))
    sources, step = all_sources(), table1.Learner._step
    sources.diffusion.solver, sources.diffusion.steps, sources.diffusion.warmup = solver, steps, steps // 2
    draw_ = synthetic.Diffusion.draw

    def one_step(self, batch):
        now[0] += 1.0
        step(self, batch)

    def one_draw(self, policy, rule, lam, n, seeds, round):
        assert seeds == SEEDS and policy.runs == len(lam) == 2
        assert self.steps == 3 and self.warmup < 3  # guided, too
        now[0] += 2.0 * n * dict(multistep=3, heun=5)[solver]
        return draw_(self, policy, rule, lam, n, seeds, round)

    def one_evaluation(policy, episodes, horizon, seeds):
        now[0] += 0.5 * episodes * horizon
        return fake_evaluate(policy, episodes, horizon, seeds)

    monkeypatch.setattr(table1.Learner, "_step", one_step)
    monkeypatch.setattr(synthetic.Diffusion, "draw", one_draw)
    monkeypatch.setattr(pgd, "evaluate", one_evaluation)
    table1.announce(make_agent, ROWS, SEEDS, sources, p, CPU)
    training = 100 * 1.0
    data_ = 2.0 * asked * (2 * 2 * 8 + 10 * 32)  # two rows and rounds of 8; one search of 10 draws of 32
    tests = 0.5 * 100 * (10 + 2 * 2 + 2 * 2)  # of native episodes each counts twice
    words = f"(training {training / 60:.1f}, synthetic data {data_ / 60:.1f}, tests {tests / 60:.1f})"
    assert sources.diffusion.steps == steps
    err = capsys.readouterr().err
    assert words in err and f"estimated: {(training + data_ + tests) / 60:.1f} minutes" in err, err


class Large(Ideal):
    """A formula with the sizes of a network."""

    def __init__(self, features):
        super().__init__()
        self.config = dict(horizon=10, features=features, blocks=2, kernel_size=3)


def announced(features, capsys, windows=200, chunk=512):
    """(how many trajectories were drawn for each seed to measure, GB that were said)."""
    ours, shapes = all_sources(), []
    ours.diffusion = synthetic.Diffusion(Large(features), "heun", 400, 80.0, 64, chunk)
    ours.diffusion.denoiser.forward = lambda x, sigma: shapes.append(len(x)) or x / (1 + sigma**2)
    table1.announce(make_agent, ROWS, SEEDS, ours, settings(windows=windows), CPU)
    assert set(shapes[:5]) == {2}  # two draws of three steps, the first of one trajectory
    return sum(shapes[5:]) // 5 // 2, float(capsys.readouterr().err.split(" GB of memory")[0].split()[-1])


def test_what_is_measured_is_as_little_as_the_denoiser_is_large(runs, capsys, monkeypatch):
    monkeypatch.setitem(budget.TEST, "cpu", 1e10)
    found = [announced(features, capsys)[0] for features in (8, 512, 1024, 4096)]
    assert found[0] == 64 > found[1] > found[2] > found[3] == 1
    for features, n in zip((512, 1024), found[1:3]):
        one, _ = budget.count(Large(features).config, 1, CPU)
        assert 2 * n * one <= 1e10 < 2 * (n + 1) * one  # both seeds' together
    assert announced(8, capsys, windows=3)[0] == 3


def test_the_memory_is_that_of_the_denoiser_too(runs, capsys, monkeypatch):
    """For what is drawn at once: whole blocks of 32 for both seeds, about `chunk` together, or all."""
    data_ = 6 * 200 * 10 * 116 * 4 / 1e9
    for windows, chunk, at_once in ((200, 512, 400), (200, 128, 128), (200, 150, 128), (200, 32, 64)):
        expected = budget.needed(Large(512).config, at_once, CPU) / 1e9 + data_ * windows / 200
        assert announced(512, capsys, windows, chunk)[1] == pytest.approx(expected, abs=0.02), (windows, chunk)
    monkeypatch.setattr(budget, "memory_there", lambda device: budget.needed(Large(512).config, 200, CPU))
    announced(512, capsys, chunk=128)
    with pytest.raises(ValueError, match="features=512 with horizon=10 is not allowed on device='cpu'"):
        announced(512, capsys, chunk=512)


def test_the_simulator_is_started_before_it_is_timed(runs, monkeypatch):
    """Making the environment takes seconds, once: in the estimate, which is scaled up, it would be minutes."""
    calls, timing, seconds = [], [], table1._seconds

    def timed(call):
        timing.append(True)
        try:
            return seconds(call)
        finally:
            timing.pop()

    monkeypatch.setattr(table1, "_seconds", timed)
    monkeypatch.setattr(pgd, "evaluate", lambda policy, *a: calls.append(bool(timing)) or fake_evaluate(policy, *a))
    table1.announce(make_agent, ROWS[:1], SEEDS, all_sources(), settings(), CPU)
    assert calls == [False, True]


def test_cloning_too_can_be_benchmarked(runs, evaluations):
    result = train(kind="bc", rows=ROWS[:1], make=lambda seeds: BC(seeds, MEAN, STD, (6,)))
    assert result.facts[:, 0].shape == (2, 2) and np.isnan(result.facts).all() and np.isfinite(result.means).all()
