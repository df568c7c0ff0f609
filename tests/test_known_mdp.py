"""SAC, CQL, EDAC, ReBRAC and BCQ in a decision process of two states, whose values and best actions are known."""

import numpy as np
import pytest
import torch

from pgdlib import fast
from pgdlib.agents.bcq import BCQ
from pgdlib.agents.cql import CQL
from pgdlib.agents.edac import EDAC
from pgdlib.agents.rebrac import ReBRAC
from pgdlib.agents.sac import SAC
from pgdlib.agents.stack import Learner
from pgdlib.data import Spec, transitions

PLANE, DISCOUNT = Spec(2, 2), 0.8
BEST = torch.tensor([[-0.5, 0.2], [0.4, -0.3]])  # in the first state, and in the second, where the episode ends


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """How far an agent is from the best after few large steps would hang on how a machine rounds bfloat16."""
    monkeypatch.setattr(fast, "has_bfloat16", lambda device: False)


def learnt(kind, steps=300, **settings):
    """The best actions' values [2 states, 2 runs] and how far from them each run acts [2, 2], after training.

    From the first state any action leads to the second. The reward is 0 at the best action there and 1 at the second's, less
    twice the square of the distance from it; the data's actions are uniform.
    """
    second = torch.arange(4000) % 2
    actions = 1.8 * torch.rand(4000, 2, generator=torch.Generator().manual_seed(0)) - 0.9
    rewards = second - 2 * (actions - BEST[second]).square().sum(-1)
    states = torch.eye(2)
    packed = transitions(states[second], actions, rewards, second.float(), states[torch.ones_like(second)])
    kind = type(kind.__name__, (kind,), dict(settings, discount=DISCOUNT, polyak=0.1))
    made = kind(PLANE, (0, 1), torch.full((2,), 0.5), torch.full((2,), 0.5), hidden=(32, 32))
    list(Learner(made, (0, 1), steps, batch_size=64, learning_rate=5e-3).train([packed, packed]))
    pairs = torch.cat([2 * states - 1, BEST], -1).repeat(2, 1, 1)
    critics = made.policy.q if kind.__name__ == "BCQ" else made.q
    acted = made.policy.act(states.repeat(2, 1).numpy()).reshape(2, 2, 2)
    return critics(pairs).detach().mean(0).mT.numpy(), np.linalg.norm(acted - BEST.numpy(), axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, settings, near",
    [
        (SAC, {}, 0.15),
        (EDAC, dict(critics=5, eta=0.1), 0.15),
        (ReBRAC, dict(beta_critic=0.01, beta_policy=0.01, delay=1), 0.25),  # a little toward the data's mean
        (BCQ, {}, 0.35),  # the best of ten
    ],
)
def test_values_and_actions_are_learnt(kind, settings, near):
    (first, second), away = learnt(kind, **settings)
    assert away.max() < near
    np.testing.assert_allclose(second, 1.0, atol=0.2)
    assert (first < DISCOUNT + 0.05).all() and (
        first > 0.2
    ).all()  # less the entropy's part, the penalty or what ten samples miss


@pytest.mark.slow
def test_cql_lowers_values_and_acts_as_well():
    values, away = zip(*(learnt(CQL, alpha=alpha, samples=3) for alpha in (0.0, 0.5)))
    assert max(a.max() for a in away) < 0.2
    np.testing.assert_allclose(values[0][1], 1.0, atol=0.2)
    assert (values[0] - values[1] > 0.1).all() and (values[1] > -1).all()
