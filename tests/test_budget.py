"""What a run takes: operations against formulas, memory against a count by hand, chunks and tables against their aims."""

import pytest
import torch
from conftest import Ideal
from torch import nn

from benchmarks import counts
from pgdlib import edm
from pgdlib.lab import budget, params
from pgdlib.sampler import BLOCK

CPU = torch.device("cpu")
MINE = dict(horizon=8, features=16, blocks=2, kernel_size=3, transform="raw")
PAPER = {k: params.settings("paper")[k] for k in ("horizon", "features", "blocks", "kernel_size")} | {"transform": "raw"}
QUICK = {k: params.settings("quick")[k] for k in ("horizon", "features", "blocks", "kernel_size")} | {"transform": "raw"}


@pytest.fixture
def pretend(monkeypatch):
    """A device with so much memory, whose network takes so many seconds for a trajectory; it cannot be measured."""

    def made(memory=1e15, pace=None):
        def measure(*given):
            assert pace is not None, "nothing is to be measured here"
            return pace

        monkeypatch.setattr(budget, "memory_there", lambda device: memory)
        monkeypatch.setattr(budget, "pace", measure)
        monkeypatch.setattr(budget, "training_pace", measure)

    return made


@pytest.mark.parametrize("config", [MINE, QUICK, PAPER], ids=["tiny", "quick", "paper"])
@pytest.mark.parametrize("batch", [1, 16])
def test_operations_are_those_of_the_formulas(config, batch):
    sizes = batch, config["horizon"], config["features"]
    assert budget.count(config, 1, CPU)[0] == counts.denoiser(1, *sizes[1:])
    assert budget.count(config, batch, CPU)[0] <= counts.denoiser(*sizes)  # which embed the noise of each trajectory
    assert budget.count(config, batch, CPU)[0] == pytest.approx(counts.denoiser(*sizes), rel=0.03)
    assert budget.count(config, batch, CPU, True)[0] == counts.training(*sizes)


def test_the_peak_is_what_is_alive_at_once():
    """By hand: two layers of 10 x 7 and 10 x 5 floats; the input was there before."""
    with torch.device("meta"):
        net, x = nn.Sequential(nn.Linear(3, 7), nn.Linear(7, 5)), torch.empty(10, 3)
    with budget._Peak() as peak, torch.no_grad():
        y = net(x)
        assert peak.alive == 4 * 50  # the first layer's values are gone
        del y
        net[0](x)
    assert peak.peak == 4 * (70 + 50) and peak.alive == 0
    with budget._Peak() as peak:
        net(x).sum().backward()
        assert peak.alive == 4 * sum(w.numel() for w in net.parameters())  # the gradients
    assert peak.peak > 4 * (70 + 50 + peak.alive // 8)


def test_training_keeps_the_weights_four_times_and_its_gradients():
    parameters = sum(w.numel() for w in edm.Denoiser(**MINE).net.parameters())
    (_, small), (_, large) = (budget.count(MINE, n, CPU, True) for n in (2, 1000))
    assert 4 * 5 * parameters < small < large
    assert budget.count(MINE, 2, CPU)[1] < small / 2
    each = (large - small) / 998
    assert 4 * 8 * 16 * 10 < each < 4 * 8 * 16 * 100  # some tens of values for each of 16 features and 8 steps


def test_a_measured_step_is_a_step():
    denoiser = edm.Denoiser(**MINE).requires_grad_(False)
    state = torch.get_rng_state()
    assert 0 < budget.pace(denoiser, 8, CPU) < 1 and 0 < budget.training_pace(MINE, 4, CPU) < 5
    assert torch.equal(state, torch.get_rng_state())
    assert budget.memory_there(CPU) > 1e8


# Chunks


def most(n, config=PAPER, evaluations=799):
    denoiser = edm.Denoiser(**MINE)
    denoiser.config = config
    return budget.most(denoiser, n, config["horizon"], evaluations, CPU)


def test_small_work_is_one_chunk_and_not_measured(pretend):
    pretend()
    settings = params.defaults("quick")
    assert most(settings.samples, QUICK, 2 * settings.steps - 1) == settings.samples
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
    half = budget.needed(dict(PAPER, features=512), 16, CPU, True)
    pretend(half)
    with pytest.raises(ValueError, match=r"features=1024 with horizon=128 and batch_size=16.*features=512 would fit") as e:
        budget.require(PAPER, 16, CPU, True)
    assert "batch_size=" not in str(e.value).split(";")[1]  # the weights alone are too large
    assert budget.require(dict(PAPER, features=512), 16, CPU, True) == half
    pretend(budget.needed(QUICK, 500, CPU, True))
    with pytest.raises(ValueError, match="batch_size=500 would fit"):
        budget.require(QUICK, 1000, CPU, True)


@pytest.mark.parametrize("scale", ["ci", "quick"])
def test_nothing_is_said_or_measured_at_small_scales(pretend, scale):
    pretend()
    p = params.defaults(scale)
    config = {**QUICK, "features": p.features, "horizon": p.horizon}
    budget.announce_training(config, edm.Training(p.train_steps, p.batch_size, 1e-3), 0, scale, CPU, pytest.fail)


def test_a_long_training_is_said_with_its_parts(pretend):
    pretend(64e9, pace=2.0)
    said = []
    budget.announce_training(PAPER, edm.Training(52_000, 16, 1e-3), 2_000, "paper", CPU, said.append)
    assert said[0] == "estimated on cpu, from a measured step: 27.8 h; memory there: 64.0 GB"
    assert said[1].split() == ["work", "amount", "each", "total", "memory"]
    assert said[2].startswith("denoiser  50,000 training steps of 16 windows, 2,000 are done  2.0 s  27.8 h ")
    for pace, lines in ((0.01, 0), (0.02, 3)):  # 500 and 1,000 s
        pretend(64e9, pace)
        said.clear()
        budget.announce_training(PAPER, edm.Training(50_000, 16, 1e-3), 0, "quick", CPU, said.append)
        assert len(said) == lines


def test_drawings_are_said_with_their_number(pretend):
    pretend(64e9, pace=1e-4)

    class Lab:
        device, denoiser, p = CPU, edm.Denoiser(**MINE), params.defaults("paper")

    Lab.denoiser.config = PAPER
    said = []
    budget.announce_draws(Lab, {"Figure 1": 11, "fronts": 3}, said.append)
    assert said[2].split("  ")[0] == "Figure 1" and "11 λ x 1,024 trajectories x 400 steps" in said[2]
    assert " 81.8 s" in said[2] and " 15.0 min" in said[2] and " 4.1 min" in said[3] and "19.1 min" in said[0]
    Lab.p, Lab.denoiser.config = params.defaults("quick"), QUICK
    pretend()
    budget.announce_draws(Lab, {"Figure 1": 13, "fronts": 41, "others": 40}, pytest.fail)
