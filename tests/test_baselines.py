"""The baselines of the benchmarks compute what pgdlib does; their counts of FLOPs are torch's own."""

import csv

import numpy as np
import pytest
import torch
from conftest import pairs, replay, smooth, toy
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import baselines, counts, run, timing
from benchmarks.counts import SPEC
from pgdlib import data, dynamics, edm, guidance, sampler
from pgdlib.agents import iql
from pgdlib.agents.stack import Learner
from pgdlib.simulators import pen as adroit

FLOAT32 = dict(rtol=1e-4, atol=1e-4)  # values of order 1; the order of summation differs


@pytest.fixture(autouse=True)
def float32():
    with timing.float32():
        yield


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda blocks: f"{blocks} blocks")
def denoiser(request):
    torch.manual_seed(0)
    made = edm.Denoiser(SPEC.obs_dim, SPEC.action_dim, 16, 16, request.param)
    made.normaliser.fit(toy([40, 30]).packed())
    return made


@pytest.fixture(scope="module")
def env():
    return baselines.gym_env()


def test_denoiser(denoiser):
    x, sigma = (
        torch.randn(5, 16, SPEC.width, generator=torch.Generator().manual_seed(1)),
        torch.tensor([0.01, 0.2, 1.0, 9.0, 70.0]),
    )
    expected = denoiser(x, sigma)
    torch.testing.assert_close(baselines.denoise(baselines.weights(denoiser.net), x, sigma), expected, **FLOAT32)


def test_training(denoiser):
    windows = data.Windows(toy([40, 30]), denoiser.normaliser, 16)
    how = edm.Recipe(12, 8, 1e-3)
    first = baselines.weights(denoiser.net)
    plain, losses = baselines.train(first, windows, how)
    trained = edm.Denoiser(**denoiser.config)
    trained.load_state_dict(denoiser.state_dict())
    training = edm.Training(trained, windows, how)
    assert list(training) == [*range(1, 13)]
    torch.testing.assert_close(losses, training.losses, rtol=1e-3, atol=1e-4)
    for own, theirs in ((plain.w, trained), (plain.average, training.ema)):  # beside how far all weights have moved
        three = [(own[name].detach(), v, first[name]) for name, v in baselines.weights(theirs.net).items()]
        off, moved = (sum((a - b).abs().sum() for a, b in group) for group in zip(*(((o, v), (v, f)) for o, v, f in three)))
        assert off < 1e-3 * moved


@pytest.mark.parametrize("churn", [0.0, 6.0])
def test_sampler(denoiser, guide, churn):
    steps, warmup, lam, shape = 8, 2, 0.3, (4, 16, SPEC.width)
    hook = guidance.Guide("explicit", guide, denoiser.normaliser, lam, steps, warmup)
    expected, diverged = sampler.sample(denoiser, shape, steps, churn, torch.Generator().manual_seed(0), hook)
    assert not diverged.any()
    w, generator = baselines.weights(denoiser.net), torch.Generator().manual_seed(0)
    x = baselines.sample(w, denoiser.normaliser, guide, shape, steps, churn, warmup, lam, generator)
    torch.testing.assert_close(x, expected.detach(), rtol=1e-3, atol=1e-3)


def test_iql():
    steps = 20
    rows = toy([200]).transitions()
    rows[::3, SPEC.terminal] = 1.0
    agent = iql.IQL(SPEC, [3, 5], rows[:, SPEC.obs].mean(0), rows[:, SPEC.obs].std(0), (32, 32))
    with torch.no_grad():
        for net in (agent.v, agent.q, agent.target_q):
            net.weights[-1] *= 8  # some advantages beyond where their weight is capped
    plain = [baselines.PlainIQL(agent, seed, steps) for seed in range(2)]
    learner = Learner(agent, [3, 5], steps, 64)
    ids = learner._draw([200, 200])
    for step in range(steps):
        batch = torch.stack([rows[i[step]] for i in ids])
        expected = sum(agent.losses(batch, step, [3, 5])[0].values()).detach()
        list(learner.train([rows, rows], step + 1))
        for seed in range(2):
            torch.testing.assert_close(plain[seed].step(batch[seed]), expected[seed], rtol=1e-3, atol=1e-3)
    for seed in range(2):
        for mine, theirs in (("policy", agent.policy.net), ("q1", agent.q), ("v", agent.v), ("slow1", agent.target_q)):
            for a, b in zip(getattr(plain[seed], mine).parameters(), baselines.network(theirs, seed).parameters()):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(plain[seed].log_std, agent.policy.log_std[seed, 0], rtol=1e-4, atol=1e-5)


def test_simulation(env):
    rng = np.random.default_rng(0)
    actions = smooth(rng, 3, 25)
    expected = adroit.rollout(replay(actions), 3, rng, 25)
    obs, rewards = baselines.play(env, expected.goals, actions)
    np.testing.assert_allclose(obs, expected.obs, rtol=0, atol=1e-9)
    np.testing.assert_allclose(rewards, expected.rewards, rtol=0, atol=1e-9)


def test_dynamics_error(env):
    obs, actions = pairs(
        adroit.rollout(replay(smooth(np.random.default_rng(1), 4, 30)), 4, np.random.default_rng(1), 30), 4, 20
    )
    obs = adroit.pen_states.perturb(obs, 0.05, np.random.default_rng(2), obs.var((0, 1)))
    variance = obs.var((0, 1)) + 1e-3
    expected = dynamics.dynamics_error(adroit.PEN, obs, actions, variance).normalised
    assert (expected > 0).all()
    np.testing.assert_allclose(baselines.dynamics_error(env, obs, actions, variance), expected, rtol=1e-6)


def test_windows():
    trajectories = toy([40, 5, 23])
    trajectories.terminals[[44, 67]] = 1.0
    normaliser = data.Normaliser(SPEC).fit(trajectories.packed())
    expected, plain = data.Windows(trajectories, normaliser, 16), baselines.PlainWindows(trajectories, normaliser, 16)
    assert len(plain.x) == len(expected)
    for mine, theirs in zip(plain[torch.arange(len(expected))], expected[torch.arange(len(expected))]):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_count_of_the_denoiser(denoiser):
    x = torch.randn(5, 16, SPEC.width)
    for sigma in (torch.ones(5), 1.0):
        expected = counts.denoiser(5, 16, 16, denoiser.config["blocks"], levels=torch.as_tensor(sigma).numel())
        assert counted(lambda sigma=sigma: denoiser(x, sigma)) == expected


def test_count_of_training(denoiser):
    x = torch.randn(5, 16, SPEC.width)
    assert counts.training(5, 16, 16, denoiser.config["blocks"]) == counted(lambda: denoiser(x, torch.ones(5)).sum().backward())


def test_count_of_iql():
    agent = iql.IQL(SPEC, [0, 1], torch.zeros(SPEC.obs_dim), torch.ones(SPEC.obs_dim), (64, 64))
    batch = torch.randn(2, 32, SPEC.transition_width)
    assert counts.iql(2, 32, 64) == counted(lambda: sum(agent.losses(batch, 0, [0, 1])[0].values()).sum().backward())


def test_ratio_is_of_the_same_round():
    taken = {"ours": [1.0, 2.0, 4.0], "plain": [3.0, 4.0, 40.0]}
    assert timing.ratio(taken, "plain", "ours", 0.5) == (1.5, 1.25, 3.25)


def test_exponent_of_a_power():
    assert timing.exponent({s: [3.0 * s**1.5, s**1.5] for s in (1, 2, 4, 8)}) == pytest.approx((1.5, 1.5, 1.5))


def test_every_call_runs_in_every_round():
    seen = []
    taken = timing.alternate({name: lambda name=name: seen.append(name) for name in "ab"}, 0.01)
    assert len(taken["a"]) == len(taken["b"]) >= 3 and seen[:2] == ["a", "a"] and set(seen) == {"a", "b"}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--only", "gpu"], "argument --only: invalid choice: 'gpu' (choose from"),
        (["--seconds", "0"], "argument --seconds: '0' is not allowed; it must be a number from 0.01 to 600"),
        (["--threads", "0"], "argument --threads: '0' is not allowed; it must be a whole number from 1 to"),
        (["--threads", "two"], "argument --threads: 'two' is not allowed"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu' (choose from"),
    ],
)
def test_bad_option(arguments, said, capsys):
    with pytest.raises(SystemExit):
        run.options(arguments)
    assert said in capsys.readouterr().err


def test_table_and_csv(runs):
    one = timing.Row("sampler", "8", "eager f32", (3.0, 2.0, 4.0), 30.0, 10.0, "x/s", target=2.5, rounds=3)
    other = timing.Row("denoiser", "8", "eager f32", (1.0, 1.0, 1.0), share=(0.5, 0.4, 0.6), target=0.7, judged="share")
    said = run.table([one, other]).splitlines()
    assert said[1].endswith("met (ratio ≥ 2.5)") and said[2].endswith("NOT met (share ≥ 0.7)") and "50% of" in said[2]
    with run.written([one, other], run.options([])).open() as file:
        lines = list(csv.DictReader(file))
    assert [line["ratio_median"] for line in lines] == ["3.0", "1.0"] and lines[1]["share_upper_quartile"] == "0.6"
