"""TD3+BC: delay, target noise, and a bandit whose best action is known. Its losses against torchrl's: test_torchrl.py."""

import math

import numpy as np
import pytest
import torch
from conftest import SMALL, SPEC, draw, random_batch, scales

from pgdlib.agents.stack import Learner
from pgdlib.agents.td3_bc import TD3BC
from pgdlib.data import transitions

SEEDS = (3, 0, 11)


def agent(spec):
    return TD3BC(spec, SEEDS, *scales(spec), hidden=(16, 12))


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_policy_and_targets_move_every_delay_steps_only(delay):
    made, rows = agent(SMALL), list(random_batch(n=40, spec=SMALL).float())
    made.delay = delay

    def snapshot():
        return {name: p.detach().clone() for name, p in made.named_parameters() if "log_std" not in name}

    before = snapshot()
    for step in Learner(made, SEEDS, 12, batch_size=8, learning_rate=1e-2).train(rows, 7):
        after = snapshot()
        for name, p in after.items():
            assert torch.equal(before[name], p) == (not name.startswith("q.") and (step - 1) % delay > 0), (name, step)
        before = after


def test_target_noise_is_clipped_and_each_runs_own():
    made, rows = agent(SPEC), torch.zeros(3, 2000, 116)
    made.noise = 0.3
    noise = made.target_noise(rows, 7, SEEDS)
    assert noise.shape == (3, 2000, 24) and noise.abs().max() == 0.5
    inside = noise.abs() < 0.5
    # Beyond 5/3 of a std are 9.56%, and a normal cut there keeps this much of its std.
    assert (~inside).float().mean().item() == pytest.approx(0.0956, abs=4.5 * math.sqrt(0.0956 / noise.numel()))
    kept = 0.3 * math.sqrt(1 - 2 * (5 / 3) * math.exp(-((5 / 3) ** 2) / 2) / math.sqrt(2 * math.pi) / (1 - 0.0956))
    assert noise[inside].std().item() == pytest.approx(kept, rel=0.01)
    correlation = np.corrcoef(noise.reshape(3, -1))
    assert np.abs(correlation - np.eye(3)).max() < 0.03
    assert torch.equal(noise, made.target_noise(rows, 7, SEEDS))
    assert torch.equal(noise[1:2], made.target_noise(rows[:1], 7, SEEDS[1:2]))  # whoever else is in the stack
    assert not (made.target_noise(rows, 8, SEEDS) == noise)[inside].any()


SIGNS = torch.tensor([1.0, -1.0]).repeat(12)


def bandit(n=4000):
    """One step whose reward depends on how far its action goes along `SIGNS`, x: best at 0.4, where the data's mean is 0."""
    x = 1.8 * torch.rand(n, 1, generator=torch.Generator().manual_seed(0)) - 0.9
    actions = (SIGNS * x + 0.1 * draw(1, n, 24)).clamp(-1, 1)
    rewards = 1 - 4 * ((actions * SIGNS).mean(-1) - 0.4).square()
    return transitions(torch.zeros(n, 45), actions, rewards, torch.ones(n), torch.zeros(n, 45))


@pytest.mark.slow
@pytest.mark.parametrize("alpha, best", [(5.0, 0.4), (1e-4, 0.0)], ids=["learnt", "cloned"])
def test_a_bandit_is_learnt_or_cloned(alpha, best):
    """With a large α the policy takes the best of the data's actions, with a small one their mean."""
    rows = bandit()
    made = TD3BC(SPEC, (0, 1), torch.zeros(45), torch.ones(45), hidden=(32, 32))
    made.alpha = alpha
    list(Learner(made, (0, 1), 300, batch_size=128, learning_rate=1e-2).train([rows, rows]))
    actions = torch.as_tensor(made.policy.act(np.zeros((2, 45))))
    assert ((actions * SIGNS).mean(1) - best).abs().max() < 0.1
    if not best:  # else what is across `SIGNS` is free
        assert (actions - rows[:, SPEC.actions].mean(0)).square().mean(1).sqrt().max() < 0.1
