"""IQL against torchrl's, expectiles in closed form, and a small MDP whose values are known."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from conftest import plain_network, random_batch
from scipy import stats
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import IndependentNormal, ProbabilisticActor, ValueOperator
from torchrl.objectives import IQLLoss

from pgdlib.agents.iql import IQL, expectile_weight
from pgdlib.agents.stack import ACTIONS, NEXT_OBS, OBS, REWARD, TERMINAL, Learner, transitions

MEAN, STD = torch.linspace(-1, 1, 45), torch.linspace(0.5, 2, 45)
SEEDS = (3, 0, 11)
pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")  # the tests move torchrl's targets themselves
NEAR = dict(rtol=1e-5, atol=1e-8)  # torchrl keeps the discount in float32


def agent(seeds=SEEDS, **changes):
    """In float64; the targets are not the twins, as after training, and values are large enough for weights of all sizes."""
    made = IQL(seeds, MEAN, STD, hidden=(16, 12), **changes).double()
    with torch.no_grad():
        for network in (made.q, made.v, made.target_q):
            network.weights[-1] *= 8
        for i, p in enumerate(made.target_q.parameters()):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        made.policy.log_std += torch.linspace(-1, 0.5, 24)
    return made


class Actor(nn.Module):
    """The mean and std of run `i`, as torchrl takes them; it is given normalised observations."""

    def __init__(self, policy, i):
        super().__init__()
        self.net, self.log_std = plain_network(policy.net, i), nn.Parameter(policy.log_std[i, 0].detach().clone())

    def forward(self, obs):
        mean = self.net(obs).tanh()
        return mean, self.log_std.exp().expand_as(mean)


class Critic(nn.Module):
    def __init__(self, mlp, i):
        super().__init__()
        self.net = plain_network(mlp, i)

    def forward(self, obs, action):
        return self.net(torch.cat([obs, action], -1))


def torchrl_loss(made, i):
    """torchrl's loss with the weights of run `i`."""
    module = TensorDictModule(Actor(made.policy, i), ["observation"], ["loc", "scale"])
    actor = ProbabilisticActor(
        module, in_keys=["loc", "scale"], distribution_class=IndependentNormal, distribution_kwargs={"tanh_loc": False}
    )
    twins = [ValueOperator(Critic(made.q, i + k * made.runs), in_keys=["observation", "action"]) for k in range(2)]
    value = ValueOperator(plain_network(made.v, i), in_keys=["observation"])
    settings = dict(loss_function="l2", temperature=made.temperature, expectile=made.expectile)
    out = IQLLoss(actor, twins, value, **settings)
    out.make_value_estimator(gamma=made.discount)
    for layer, (weight, bias) in zip((0, 2, 4), zip(made.target_q.weights, made.target_q.biases)):
        target = out.target_qvalue_network_params["module", "net", str(layer)]
        target["weight"].data.copy_(weight[[i, i + made.runs]].transpose(1, 2))
        target["bias"].data.copy_(bias[[i, i + made.runs], 0])
    return out


def as_tensordict(rows):
    obs, next_obs = (((rows[:, s] - MEAN) / STD).clamp(-10, 10) for s in (OBS, NEXT_OBS))
    done = rows[:, TERMINAL, None].bool()
    following = dict(observation=next_obs, reward=rows[:, REWARD, None], done=done, terminated=done)
    return TensorDict(dict(observation=obs, action=rows[:, ACTIONS], next=following), [len(rows)])


def assert_parameters_match(ours, theirs, rows, of=lambda p: p):
    """Weights or biases `ours`, stacked, at `rows`, are those of torchrl's layers `theirs` [rows] (or bare, for one row)."""
    for layer, (weight, bias) in zip((0, 2, 4), zip(ours.weights, ours.biases)):
        w, b = (of(theirs["net", str(layer), name]) for name in ("weight", "bias"))
        torch.testing.assert_close(of(weight)[rows].transpose(1, 2).reshape(w.shape), w, **NEAR)
        torch.testing.assert_close(of(bias)[rows, 0].reshape(b.shape), b, **NEAR)


SETTINGS = [dict(), dict(expectile=0.9, temperature=10.0, discount=0.95), dict(expectile=0.5, temperature=0.5)]


def grad(p):
    return p.grad


@pytest.mark.parametrize("settings", SETTINGS, ids=["default", "sharp", "flat"])
def test_losses_and_gradients_are_torchrls(settings):
    made, data = agent(**settings), random_batch()
    data[0, 0, OBS] *= 1000  # where observations are clipped
    parts, _ = made.parts(data)
    made.losses(data, 0, SEEDS)[0].sum().backward()
    for i in range(3):
        loss = torchrl_loss(made, i)
        theirs = loss(as_tensordict(data[i]))
        for name, key in (("v", "loss_value"), ("q", "loss_qvalue"), ("policy", "loss_actor")):
            torch.testing.assert_close(parts[name][i], theirs[key], msg=lambda m, name=name: f"{name}: {m}", rtol=1e-7, atol=0)
        sum(theirs[key] for key in ("loss_value", "loss_qvalue", "loss_actor")).backward()
        twins, value = loss.qvalue_network_params["module"], loss.value_network_params["module"]
        actor = loss.actor_network_params["module", "0", "module"]
        assert_parameters_match(made.q, twins, [i, i + 3], grad)
        assert_parameters_match(made.policy.net, actor, [i], grad)
        for layer, weight in zip((0, 2, 4), made.v.weights):
            torch.testing.assert_close(weight.grad[i].T, value[str(layer), "weight"].grad, **NEAR)
        torch.testing.assert_close(made.policy.log_std.grad[i, 0], actor["log_std"].grad, **NEAR)


def test_training_is_that_of_torchrls_loss_and_plain_adam():
    """Six steps of the learner: Adam, the policy's cosine, and the targets that follow the twins."""
    made, rows, seen = agent(), random_batch(n=40), []
    losses = [torchrl_loss(made, i) for i in range(3)]
    given = made.losses
    made.losses = lambda data, step, seeds: seen.append(data) or given(data, step, seeds)
    Learner(made, SEEDS, 6, batch_size=8, learning_rate=1e-2).train(list(rows), 6)
    for i, loss in enumerate(losses):
        actor = list(loss.actor_network_params.parameters())
        critics = [*loss.qvalue_network_params.parameters(), *loss.value_network_params.parameters()]
        adam = torch.optim.Adam([dict(params=actor), dict(params=critics)], 1e-2)
        target = loss.target_qvalue_network_params["module"]
        for step in range(6):
            adam.param_groups[0]["lr"] = 1e-2 * math.cos(math.pi / 2 * step / 6) ** 2
            theirs = loss(as_tensordict(seen[step][i]))
            adam.zero_grad()
            sum(theirs[key] for key in ("loss_value", "loss_qvalue", "loss_actor")).backward()
            adam.step()
            for layer in "024":
                for name in ("weight", "bias"):
                    slow = target["net", layer, name].data
                    slow.copy_(0.995 * slow + 0.005 * loss.qvalue_network_params["module"]["net", layer, name].data)
        assert_parameters_match(made.q, loss.qvalue_network_params["module"], [i, i + 3])
        assert_parameters_match(made.target_q, target, [i, i + 3])
        assert_parameters_match(made.policy.net, loss.actor_network_params["module", "0", "module"], [i])


def test_each_loss_reaches_its_own_network_alone():
    made, data = agent(), random_batch()
    parts, _ = made.parts(data)
    assert set(parts) == {"v", "q", "policy"}
    for name, part in parts.items():
        made.zero_grad()
        part.sum().backward(retain_graph=True)
        reached = {n for n, p in made.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert reached == {n for n, _ in made.named_parameters() if n.startswith(f"{name}.")}


def test_the_value_returned_is_v():
    made, data = agent(), random_batch()
    _, value = made.losses(data, 0, SEEDS)
    expected = [plain_network(made.v, i)(made.policy.normalise(data[i, :, OBS])).mean() for i in range(3)]
    torch.testing.assert_close(value, torch.stack(expected))
    assert not value.requires_grad


def test_a_terminal_stops_bootstrapping():
    made, data = agent(), random_batch()
    data[..., TERMINAL] = 0.0
    data[0, :, TERMINAL] = 1.0
    other = data.clone()
    other[..., NEXT_OBS] += 1
    (a, _), (b, _) = made.parts(data), made.parts(other)
    assert a["q"][0] == b["q"][0] and (a["q"][1:] != b["q"][1:]).all()


def test_targets_move_by_polyak_exactly():
    made = agent(polyak=0.25)
    before = [p.clone() for p in made.target_q.parameters()]
    made.after_step()
    for slow, old, fast in zip(made.target_q.parameters(), before, made.q.parameters()):
        torch.testing.assert_close(slow, 0.75 * old + 0.25 * fast.detach())
        assert not slow.requires_grad
    others = zip(made.q.parameters(), agent(polyak=0.25).q.parameters())
    assert all(torch.equal(p, q) for p, q in others)


@pytest.mark.parametrize("expectile", [0.1, 0.5, 0.7, 0.99])
def test_the_weighted_mean_is_the_expectile(expectile):
    sample = np.random.default_rng(0).gamma(2.0, size=1000) - 1
    x = torch.tensor(sample)
    torch.testing.assert_close(expectile_weight(x, expectile).double(), (expectile - (x < 0).double()).abs(), rtol=1e-6, atol=0)
    value = torch.zeros((), dtype=torch.float64)
    for _ in range(200):  # where the derivative of the loss is 0
        weight = expectile_weight(x - value, expectile)
        value = (weight * x).sum() / weight.sum()
    assert value.item() == pytest.approx(stats.expectile(sample, expectile), rel=1e-6)


def test_v_learns_the_expectile_of_q():
    """A constant V, trained by the V loss alone on fixed targets: their expectile."""
    made, data = agent(expectile=0.8), random_batch(n=200)
    with torch.no_grad():
        for p in made.v.weights:
            p.zero_()
        slow = made._twins(made.target_q, torch.cat([made.policy.normalise(data[..., OBS]), data[..., ACTIONS]], -1)).amin(0)
    level = made.v.biases[-1]
    for _ in range(50):
        (gradient,) = torch.autograd.grad(made.parts(data)[0]["v"].sum(), level)
        with torch.no_grad():
            level -= gradient  # Newton's step is between 1/0.4 and 1/1.6 of the gradient
    for i in range(3):
        assert level[i].item() == pytest.approx(stats.expectile(slow[i].numpy(), 0.8), rel=1e-6)


def test_policy_weights_are_clipped_exponentials_of_the_advantage():
    made, data = agent(temperature=4.0), random_batch()
    pairs = torch.cat([made.policy.normalise(data[..., OBS]), data[..., ACTIONS]], -1)
    advantage = torch.stack(
        [
            torch.minimum(*(plain_network(made.target_q, k)(pairs[i]) for k in (i, i + 3)))
            - plain_network(made.v, i)(pairs[i, :, :45])
            for i in range(3)
        ]
    )[..., 0]
    weight = (4.0 * advantage).exp()
    clipped = weight > 100
    assert 5 < clipped.sum() < 60  # both sides of the limit are there
    log_prob = made.policy.log_prob(data[..., OBS], data[..., ACTIONS])
    expected = -(torch.where(clipped, 100.0, weight) * log_prob).mean(1)
    torch.testing.assert_close(made.parts(data)[0]["policy"], expected)


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
    signs = torch.randn(8, 45, generator=torch.Generator().manual_seed(0)).sign()
    return signs[:5], 0.7 * signs[5:, :24]


@cache
def learnt(expectile):
    """Two runs on the chain after training; V and Q are means over the last steps, so that the noise of batches is gone."""
    states, moves = codes()
    s, a = (torch.as_tensor(x) for x in np.repeat(np.argwhere(BEHAVIOUR), BEHAVIOUR.reshape(-1), axis=0).T)
    columns = (torch.as_tensor(x[s, a], dtype=torch.float32) for x in (REWARDS, ENDS))
    data = transitions(states[s], moves[a], *columns, states[torch.as_tensor(NEXT[s, a])])
    kwargs = dict(expectile=expectile, temperature=10.0, discount=DISCOUNT, polyak=0.05)
    made = IQL((0, 1), torch.zeros(45), torch.ones(45), hidden=(32, 32), **kwargs)
    pairs = torch.cat([states.repeat_interleave(3, 0), moves.repeat(5, 1)], -1).repeat(2, 1, 1)
    kept = []

    @torch.no_grad()
    def keep(step):
        if step > 350 and step % 10 == 0:
            q = made._twins(made.q, pairs).mean(0).reshape(2, 5, 3)
            kept.append(torch.cat([made.v(states.repeat(2, 1, 1)), q], -1))

    Learner(made, (0, 1), 500, batch_size=128, learning_rate=3e-3).train([data, data], 500, keep)
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
