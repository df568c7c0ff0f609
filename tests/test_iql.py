"""IQL in a small MDP whose values are known. Its losses against torchrl's: test_torchrl.py."""

from functools import cache

import numpy as np
import pytest
import torch
from conftest import SPEC, draw
from scipy import stats

from pgdlib import data
from pgdlib.agents.iql import IQL
from pgdlib.agents.stack import Learner

# A chain of five states whose values are known. In it one goes left, stays or goes right; the way into the last state ends
# the episode, and what is seen there must not matter: it has rewards of its own.

DISCOUNT = 0.8
NEXT = np.array([[max(s - 1, 0), s, min(s + 1, 4)] for s in range(4)] + [[0, 0, 0]])
REWARDS = np.where((np.arange(5)[:, None] == 3) & (np.arange(3) == 2), 1.0, 0.0)
REWARDS[0, 1], REWARDS[4] = 0.13, 0.5  # staying at the left end beats the way to the right, but only there
ENDS = (np.arange(5)[:, None] == 3) & (np.arange(3) == 2)
BEHAVIOUR = np.array([[5, 3, 2], [5, 3, 2], [2, 6, 2], [3, 5, 2], [3, 3, 4]])  # of 10 transitions from each state
OPTIMAL = [1, 2, 2, 2]


def action_values(v):
    return REWARDS + DISCOUNT * (1 - ENDS) * v[NEXT]


def fixed_point(expectile):
    """V where each is the expectile, under the behaviour, of the Q that follow from V."""
    v = np.zeros(5)
    for _ in range(150):
        q = action_values(v)
        v = np.array([stats.expectile(q[s], expectile, weights=BEHAVIOUR[s]) for s in range(5)])
    return v


def codes():
    """Observations [5, 45] and actions [3, 24] of the chain."""
    signs = draw(0, 8, 45).sign()
    return signs[:5], 0.7 * signs[5:, :24]


@cache
def learnt(expectile):
    """Two runs on the chain after training; V and Q are means over the last steps, so that the noise of batches is gone."""
    states, moves = codes()
    s, a = (torch.as_tensor(x) for x in np.repeat(np.argwhere(BEHAVIOUR), BEHAVIOUR.reshape(-1), axis=0).T)
    columns = (torch.as_tensor(x[s, a], dtype=torch.float32) for x in (REWARDS, ENDS))
    packed = data.transitions(states[s], moves[a], *columns, states[torch.as_tensor(NEXT[s, a])])
    made = IQL(SPEC, (0, 1), torch.zeros(45), torch.ones(45), hidden=(32, 32), polyak=0.05)
    made.expectile, made.temperature, made.discount = expectile, 10.0, DISCOUNT
    pairs, kept = torch.cat([states.repeat_interleave(3, 0), moves.repeat(5, 1)], -1).repeat(2, 1, 1), []
    for step in Learner(made, (0, 1), 500, batch_size=128, learning_rate=3e-3).train([packed, packed]):
        if step > 350 and step % 10 == 0:
            with torch.no_grad():
                kept.append(torch.cat([made.v(states.repeat(2, 1, 1)), made.q(pairs).mean(0).reshape(2, 5, 3)], -1))
    mean = torch.stack(kept).mean(0).numpy()
    return made, mean[..., 0], mean[..., 1:]


def test_the_oracle_is_policy_evaluation_and_value_iteration():
    p = BEHAVIOUR / 10
    moves = np.zeros((5, 5))
    np.add.at(moves, (np.arange(5)[:, None], NEXT), p * (1 - ENDS))
    np.testing.assert_allclose(fixed_point(0.5), np.linalg.solve(np.eye(5) - DISCOUNT * moves, (p * REWARDS).sum(1)))
    best = np.zeros(5)
    for _ in range(200):
        best = action_values(best).max(1)
    assert action_values(best)[:4].argmax(1).tolist() == OPTIMAL
    np.testing.assert_allclose(best, [0.65, 0.64, 0.8, 1.0, 1.02])
    assert (fixed_point(0.5)[:4] < 0.6 * best[:4]).all()  # the two are far apart
    np.testing.assert_allclose(fixed_point(0.99), best, rtol=0.07)


@pytest.mark.slow
@pytest.mark.parametrize("expectile", [0.5, 0.95])
def test_a_known_mdp_is_learnt(expectile):
    _, v, q = learnt(expectile)
    expected = fixed_point(expectile)
    # Bfloat16 gives values, at most 1, to 1 part in 256; the rest is what the noise of batches leaves.
    np.testing.assert_allclose(v, np.tile(expected, (2, 1)), atol=0.06, rtol=0)
    np.testing.assert_allclose(q, np.tile(action_values(expected), (2, 1, 1)), atol=0.06, rtol=0)


@pytest.mark.slow
def test_the_policy_takes_the_best_actions_of_a_known_mdp():
    made, _, _ = learnt(0.95)
    states, moves = codes()
    actions = torch.as_tensor(made.policy.act(states.repeat(2, 1).numpy())).unflatten(0, (2, 5))[:, :4]
    distance = (actions[:, :, None] - moves).square().mean(-1)
    assert distance.argmin(-1).tolist() == [OPTIMAL] * 2
    # Its mean is that of the data's actions, weighted by exp(10 A).
    v = fixed_point(0.95)
    weight = BEHAVIOUR * np.exp(10 * (action_values(v) - v[:, None]))
    expected = torch.as_tensor(weight / weight.sum(1, keepdims=True), dtype=torch.float32)[:4] @ moves
    assert (actions - expected).square().mean().sqrt() < 0.06
