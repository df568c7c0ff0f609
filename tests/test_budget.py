"""What a run takes: operations against formulas, memory against what torch allocates, chunks and words against their aims."""

import pytest
import torch
from conftest import Ideal
from torch.profiler import ProfilerActivity, profile

from benchmarks import counts
from pgdlib import edm, fast
from pgdlib.lab import budget, settings
from pgdlib.sampler import BLOCK

CPU = torch.device("cpu")
MINE = dict(obs_dim=45, action_dim=24, horizon=8, features=16, blocks=2, kernel_size=3, transform="raw")
PAPER, QUICK = (MINE | {k: settings.of_scale(s)[k] for k in ("horizon", "features", "blocks")} for s in ("paper", "quick"))


@pytest.fixture
def pretend(monkeypatch):
    """A device with so much memory, whose network takes so many seconds for a trajectory; it cannot be measured."""

    def made(memory=1e15, pace=None):
        def measure(*given):
            assert pace is not None, "nothing is to be measured here"
            return pace

        monkeypatch.setattr(budget, "memory_there", lambda device: memory)
        monkeypatch.setattr(budget, "pace", measure)

    return made


@pytest.mark.parametrize("config", [MINE, QUICK, PAPER], ids=["tiny", "quick", "paper"])
def test_operations_are_those_of_the_formulas(config):
    sizes = 1, config["horizon"], config["features"], config["blocks"]
    assert budget.operations(config) == counts.denoiser(*sizes)
    assert budget.operations(config, True) == counts.training(*sizes)


def allocated(call):
    """Bytes that torch allocates at once, at most, while it runs `call`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    alive = peak = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        alive += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, alive)
    return peak


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("features, blocks, horizon, n", [(128, 2, 32, 64), (256, 2, 128, 16), (128, 3, 64, 32)])
def test_the_memory_is_no_less_than_what_is_allocated(monkeypatch, features, blocks, horizon, n, low):
    for module in (edm, fast):
        monkeypatch.setattr(module, "has_bfloat16", lambda device: low)
    config = MINE | dict(horizon=horizon, features=features, blocks=blocks)
    denoiser, x, noise = edm.Denoiser(**config), torch.randn(n, horizon, 71), torch.Generator()
    weights = 4 * sum(w.numel() for w in denoiser.net.parameters())

    def step():
        edm.loss(denoiser, x, torch.ones(x.shape[:2]), torch.ones(n), noise).mean().backward()

    for training, copies, call in ((False, 1, torch.no_grad()(lambda: denoiser(x, 1.0))), (True, 4, step)):
        taken = copies * weights + allocated(call)  # weights, EMA, two moments of Adam were there before
        assert taken < (budget.needed(config, n, CPU, training) - budget.CONTEXT) / budget.MARGIN < 3 * taken


def test_a_measured_step_is_a_step():
    state = torch.get_rng_state()
    assert 0 < budget.pace(MINE, CPU) < 1 and 0 < budget.pace(MINE, CPU, True) < 5
    assert torch.equal(state, torch.get_rng_state())
    assert budget.memory_there(CPU) > 1e8


# Chunks


def most(n, config=PAPER, evaluations=799):
    denoiser = edm.Denoiser(**MINE)
    denoiser.config = config
    return budget.most(denoiser, n, config["horizon"], evaluations, CPU)


def test_small_work_is_one_chunk_and_not_measured(pretend):
    pretend()
    p = settings.defaults("quick")
    assert most(p.samples, QUICK, 2 * p.steps - 1) == p.samples
    assert most(7, MINE) == 7 and budget.most(Ideal(), 10**9, 10, 799, CPU) == 10**9  # a formula has no cost


@pytest.mark.parametrize("seconds", [1e-6, 1e-4, 3e-4, 1e-3, 1.0])
@pytest.mark.parametrize("n", [1024, 1000, 33])
def test_a_chunk_takes_a_minute_or_is_one_block(pretend, n, seconds):
    pretend(pace=seconds)
    found = most(n)
    assert found % BLOCK == 0
    taken = found * seconds * 799
    assert taken <= 60 or found == BLOCK
    assert found >= n or taken > 20 or found == BLOCK  # no more chunks than that needs


def test_a_chunk_fits_into_memory(pretend):
    sizes = [budget.needed(PAPER, n, CPU) for n in (BLOCK, 4 * BLOCK, 8 * BLOCK)]
    for memory, allowed in ((sizes[0], 1), (sizes[1], 4), (sizes[2], 8), (1e15, 32)):
        pretend(memory * 1.001, pace=1e-9)
        assert most(1024) == allowed * BLOCK
    pretend(sizes[0] / 2)
    with pytest.raises(ValueError, match=r"features=1024 with horizon=128 is not allowed on device='cpu': it needs .* GB"):
        most(1024)


# What is said


def test_what_does_not_fit_is_named_with_what_does(pretend):
    half = budget.needed(PAPER | {"features": 512}, 16, CPU, True)
    pretend(half)
    with pytest.raises(ValueError, match=r"features=1024 with horizon=128 and batch_size=16.*features=512 would fit"):
        budget.require(PAPER, 16, CPU, True)
    assert budget.require(PAPER | {"features": 512}, 16, CPU, True) == half
    pretend(1e6)
    for config in (PAPER, QUICK, MINE):
        with pytest.raises(ValueError, match=r"there are 0\.0; nothing like it would fit"):
            budget.require(config, 16, CPU)


class How:
    def __init__(self, steps, batch_size):
        self.steps, self.batch_size = steps, batch_size


class Lab:
    device, denoiser = CPU, edm.Denoiser(**MINE)

    def __init__(self, scale, config):
        self.p, self.denoiser.config = settings.defaults(scale), config


def test_nothing_is_said_or_measured_at_small_scales(pretend):
    pretend()
    for scale in ("ci", "quick"):
        p = settings.defaults(scale)
        config = QUICK | {"features": p.features, "horizon": p.horizon}
        budget.announce_training(config, How(p.train_steps, p.batch_size), 0, scale, CPU, pytest.fail)
    budget.announce_draws(Lab("quick", QUICK), {"Figure 1": 13, "fronts": 41, "others": 40}, pytest.fail)


def test_a_long_training_is_said_with_its_parts(pretend):
    pretend(64e9, pace=0.125)
    said = []
    budget.announce_training(PAPER, How(52_000, 16), 2_000, "paper", CPU, said.append)
    assert said[0] == "estimated on cpu, from a measured step: 27.8 h; memory there: 64.0 GB"
    head, row = said[1].splitlines()
    assert head.split() == ["work", "amount", "time", "memory"]
    assert row.startswith("denoiser 50,000 training steps of 16 windows, 2,000 are done 27.8 h ")
    for pace, lines in ((0.01 / 16, 0), (0.02 / 16, 2)):  # 500 and 1,000 s
        pretend(64e9, pace)
        said.clear()
        budget.announce_training(PAPER, How(50_000, 16), 0, "quick", CPU, said.append)
        assert len(said) == lines


def test_drawings_are_said_with_their_number(pretend):
    pretend(64e9, pace=1e-4)
    said = []
    budget.announce_draws(Lab("paper", PAPER), {"Figure 1": 11, "fronts": 3}, said.append)
    _, first, second = said[1].splitlines()
    assert "Figure 1 11 λ x 1,024 trajectories x 400 steps 15.0 min" in first and "3 λ" in second and "4.1 min" in second
    assert "19.1 min" in said[0]
