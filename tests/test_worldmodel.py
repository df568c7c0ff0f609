"""The ensemble against plain networks and a loss written anew, a linear system with known noise, and closed-form rollouts."""

import math

import numpy as np
import pytest
import torch
from conftest import SMALL, SPEC, assert_goes_on, assert_same, draw, plain_network, toy
from torch import nn
from torch.distributions import Normal

from pgdlib import measures, worldmodel
from pgdlib.policies import GaussianPolicy
from pgdlib.worldmodel import Ensemble, Recipe, Training, rollout

every_spec = pytest.mark.parametrize("spec", [SPEC, SMALL], ids=["pen", "small"])


def small(spec=SMALL, members=3, elites=2, hidden=(16, 12), seed=0):
    torch.manual_seed(seed)
    return Ensemble(spec.obs_dim, spec.action_dim, members, elites, hidden)


def fitted(data):
    """A small ensemble with the statistics of `data`, whose bounds differ by member and output."""
    ensemble = small(data.spec)
    ensemble.fit_normalisation(data)
    with torch.no_grad():
        ensemble.max_log_var.uniform_(0.0, 1.0)
        ensemble.min_log_var.uniform_(-3.0, -1.0)
    return ensemble.requires_grad_(False)


def training(ensemble, data, val, steps, **changes):
    how = dict(batch_size=8, learning_rate=1e-2, weight_decay=(0.01, 0.02, 0.03))
    return Training(ensemble, data, val, Recipe(steps, **{**how, **changes}))


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


def plain_gaussian(network, low, high, x):
    """The Gaussian of a network whose log-variance is bounded by softplus (PETS, Appendix A.1)."""
    mean, raw = network(x).split(low.shape[-1], -1)
    log_var = high - torch.log(1 + (high - raw).exp())
    return Normal(mean, (low + torch.log(1 + (log_var - low).exp())).exp().sqrt())


@every_spec
def test_members_are_plain_networks(spec):
    data, n, d = toy([30, 30], spec=spec), spec.obs_dim, spec.obs_dim + spec.action_dim
    ensemble = fitted(data)
    x = (torch.cat([data.obs, data.actions], -1) - ensemble.mean[:d]) / ensemble.std[:d]
    next_obs, reward, std = ensemble.predict(data.obs, data.actions)
    for m in range(3):
        network = plain_network(ensemble, m, activation=nn.SiLU)
        one = plain_gaussian(network, ensemble.min_log_var[m], ensemble.max_log_var[m], x)
        mean = one.mean * ensemble.std[d:] + ensemble.mean[d:]
        torch.testing.assert_close(next_obs[m], data.obs + mean[:, :n], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(reward[m], mean[:, n], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(std[m], one.stddev * ensemble.std[d:], rtol=1e-4, atol=1e-5)


def test_initial_weights_are_mbpos():
    ensemble = small(SPEC, hidden=(200, 50))
    for weight, fan_in in zip(ensemble.weights, (69, 200, 50)):
        std = 1 / (2 * math.sqrt(fan_in))
        assert weight.abs().max() <= 2 * std
        # A normal cut at two std keeps 0.8796 of its std.
        assert weight.std().item() == pytest.approx(0.8796 * std, rel=4.5 / math.sqrt(2 * weight.numel()))
    assert all((bias == 0).all() for bias in ensemble.biases)


def test_statistics_are_the_datas():
    data = toy([30, 30], spec=SMALL)
    data.obs[:, 4] = data.next_obs[:, 4] = 3.0  # never changes, neither as input nor as output
    data.actions[:] *= 5  # beyond the limits, where the simulator clips
    ensemble = fitted(data)
    inputs, outputs = ensemble.pairs(data)
    expected = np.delete(np.concatenate([data.obs.numpy(), data.actions.numpy().clip(-1, 1)], -1), 4, 1)
    np.testing.assert_allclose(np.delete(inputs.numpy(), 4, 1), (expected - expected.mean(0)) / expected.std(0), atol=1e-5)
    assert (inputs[:, 4] == 0).all() and (outputs[:, 4] == 0).all()
    changes = np.delete(torch.cat([data.next_obs - data.obs, data.rewards[:, None]], -1).numpy(), 4, 1)
    np.testing.assert_allclose(np.delete(outputs.numpy(), 4, 1), (changes - changes.mean(0)) / changes.std(0), atol=1e-5)
    next_obs, _, std = ensemble.predict(data.obs, data.actions)
    assert (next_obs[..., 4] - 3).abs().max() < 1e-4 and std[..., 4].max() < 1e-5  # and is predicted never to change


def test_nll_and_its_gradients():
    mean, log_var, target = (draw(i, 5, 8, dtype=torch.float64).requires_grad_(i < 2) for i in range(3))
    ours = torch.autograd.grad(worldmodel.nll(mean, log_var, target).sum(), (mean, log_var))
    expected = -Normal(mean, (0.5 * log_var).exp()).log_prob(target)
    torch.testing.assert_close(worldmodel.nll(mean, log_var, target), expected)
    for a, b in zip(ours, torch.autograd.grad(expected.sum(), (mean, log_var))):
        torch.testing.assert_close(a, b)


@every_spec
def test_training_is_that_of_separate_networks(monkeypatch, spec):
    """Each member is trained as if alone: torch's layers, log_prob, the penalties in the loss, and plain Adam."""
    data, batches, randint = toy([30, 30], spec=spec), [], torch.randint
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: batches.append(randint(*args, **kwargs)) or batches[-1])
    ensemble = small(spec).double()
    networks = [plain_network(ensemble, m, activation=nn.SiLU) for m in range(3)]
    outputs = torch.zeros(spec.obs_dim + 1, dtype=torch.float64)
    bounds = [[(outputs + v).requires_grad_() for v in (-10.0, 0.5)] for _ in range(3)]
    loop = training(ensemble, data, data, 6)
    assert list(loop) == [1, 2, 3, 4, 5, 6]
    (inputs, outputs), expected = ensemble.pairs(data), torch.zeros(3, 6)
    for m, (network, (low, high)) in enumerate(zip(networks, bounds)):
        adam = torch.optim.Adam([*network.parameters(), low, high])
        for step in range(6):
            adam.param_groups[0]["lr"] = 1e-2 * math.cos(math.pi / 2 * step / 6) ** 2
            ids = batches[step][m]
            value = -plain_gaussian(network, low, high, inputs[ids]).log_prob(outputs[ids]).mean()
            expected[m, step] = value.detach()
            decay = sum(0.5 * d * network[2 * i].weight.square().sum() for i, d in enumerate((0.01, 0.02, 0.03)))
            adam.zero_grad()
            (2 * value + 0.01 / 3 * (high.sum() - low.sum()) + decay).backward()
            adam.step()
        for i in range(3):
            torch.testing.assert_close(ensemble.weights[i][m], network[2 * i].weight.T)
            torch.testing.assert_close(ensemble.biases[i][m, 0], network[2 * i].bias)
        torch.testing.assert_close(ensemble.min_log_var[m, 0], low)
        torch.testing.assert_close(ensemble.max_log_var[m, 0], high)
    torch.testing.assert_close(loop.losses, expected.mean(0))
    assert len({tuple(row.tolist()) for ids in batches for row in ids}) == 18  # no two members or steps share a batch


NOISE = torch.linspace(0.2, 0.6, 7)  # of six observations and the reward


def linear_system(episodes, seed):
    """Six numbers that follow s' = A s + B a + noise, |A| < 1, a seventh that stays, and a reward linear in s and a."""
    a = torch.linalg.qr(draw(7, 6, 6))[0] * 0.95
    b, c = draw(8, 3, 6) / 2, draw(9, 9) / 2
    data = toy([40] * episodes, seed, SMALL)
    data.obs[:, 6] = data.next_obs[:, 6] = 0.3
    s = data.obs[:, :6]
    mean = torch.cat([s @ a + data.actions @ b, torch.cat([s, data.actions], -1) @ c[:, None]], -1)
    noisy = mean + NOISE * draw(seed + 100, *mean.shape)
    data.next_obs[:, :6], data.rewards[:] = noisy[:, :6], noisy[:, 6]
    return data, mean


@pytest.fixture(scope="module")
def learnt():
    (data, _), (val, mean) = linear_system(400, 0), linear_system(40, 1)
    loop = Training(small(hidden=(48, 48)), data, val, Recipe(1000, 128, 1e-2, weight_decay=(0.0, 0.0, 0.0)))
    list(loop)
    return loop.ensemble, loop.losses, val, mean


@pytest.mark.slow
@torch.no_grad()
def test_a_linear_system_is_learnt(learnt):
    ensemble, losses, val, mean = learnt
    next_obs, reward, std = ensemble.predict(val.obs, val.actions)
    predicted = torch.cat([next_obs[..., :6], reward[..., None]], -1)
    error = (predicted - mean).square().mean((0, 1)).sqrt()
    assert (error < 0.2 * NOISE).all(), error / NOISE
    moving = [*range(6), 7]
    assert (std[..., moving].mean((0, 1)) / NOISE - 1).abs().max() < 0.1
    assert (next_obs[..., 6] - 0.3).abs().max() < 1e-4
    # What is left is the noise's own NLL, in units of the outputs' std.
    inputs, outputs = ensemble.pairs(val)
    left = worldmodel.nll(*ensemble(inputs), outputs)[..., moving].mean().item()
    floor = (NOISE.log() - ensemble.std[10:][moving].log()).mean().item() + 0.5 * math.log(2 * math.pi * math.e)
    assert floor - 0.05 < left < floor + 0.1
    assert losses.shape == (1000,) and losses[-100:].mean() < losses[:100].mean()


def test_rollouts_of_the_learnt_system_have_its_noise(learnt):
    ensemble, _, val, mean = learnt
    out = rollout(ensemble, Replay(val.actions[:, None]), val.obs, 1, noise())
    residual = torch.cat([out.next_obs[:, 0, :6], out.rewards], -1) - mean
    assert (residual.std(0) / NOISE - 1).abs().max() < 0.1
    assert not out.diverged.any() and (out.alive == 1).all()


def test_elites_have_the_least_validation_error():
    data, val = toy([30, 30], spec=SMALL), toy([20, 20], 1, SMALL)
    ensemble = small(members=6, elites=3)
    list(training(ensemble, data, val, 20))
    with torch.no_grad():
        for m, shift in ((1, 3.0), (2, 1.0), (4, 2.0), (5, -4.0)):
            ensemble.biases[-1][m, :, :8] += shift
    list(training(ensemble, data, val, 0))  # only chooses
    next_obs, reward, _ = ensemble.predict(val.obs, val.actions)
    error = torch.cat([next_obs - val.next_obs, (reward - val.rewards)[..., None]], -1) / ensemble.std[10:]
    torch.testing.assert_close(worldmodel.validation_error(ensemble, val, chunk=7).float(), error.square().mean(1))
    assert set(ensemble.elites.tolist()) == {0, 3, 2}
    assert ensemble.elites.tolist() == error.square().mean((1, 2)).argsort()[:3].tolist()


@every_spec
def test_a_state_copied_into_a_fresh_training_goes_on_to_the_same_weights(spec):
    data, val = toy([30, 30], spec=spec), toy([20], 1, spec)
    whole, fresh = (training(small(spec, seed=s), data, val, 30) for s in (0, 5))
    assert_goes_on(whole, fresh, 17)
    other = training(small(spec), data, val, 30, seed=1)
    list(other)
    assert not torch.equal(other.losses, whole.losses) and other.card != whole.card == fresh.card
    again = Ensemble(**whole.card["config"])  # it is all in its config and state
    again.load_state_dict(whole.ensemble.state_dict())
    a, b = (vars(rollout(e, Replay(val.actions[:4, None]), val.obs[:4], 1, noise())) for e in (whole.ensemble, again))
    assert_same(a, b)


class Linear:
    """The policy a = s K."""

    def __init__(self, gain):
        self.gain = gain

    def sample(self, obs, generator):
        return obs @ self.gain


class Replay:
    """A policy that ignores the observation and plays `actions` [B, T, ...] in order."""

    def __init__(self, actions):
        self.actions = iter(actions.unbind(1))

    def sample(self, obs, generator):
        return next(self.actions)


STILL = Linear(torch.zeros(7, 3))
HEIGHT = 5  # the observation whose fall below 0.075 ends a trajectory, where one ends


def fallen(obs):
    return obs[..., HEIGHT] < 0.075


def noiseless(spec=SMALL, members=2, elites=2):
    """An ensemble without hidden layers or noise, which predicts that nothing moves and the reward is 0."""
    ensemble = small(spec, members, elites, hidden=()).requires_grad_(False)
    ensemble.weights[0].zero_()
    ensemble.biases[0][..., spec.obs_dim + 1 :] = -1e4
    ensemble.min_log_var.fill_(-400.0)
    return ensemble


def standing(n, height=0.2):
    """Observations [n, 7], all 0 but the height."""
    obs = torch.zeros(n, 7)
    obs[:, HEIGHT] = height
    return obs


@every_spec
def test_rollout_of_a_linear_model_is_its_matrix_power(spec):
    n, d = spec.obs_dim, spec.obs_dim + spec.action_dim
    ensemble = noiseless(spec)
    ensemble.weights[0][..., : n + 1] = draw(0, d, n + 1) / 30
    ensemble.biases[0][..., : n + 1] = draw(1, n + 1) / 30
    ensemble.mean.copy_(draw(2, d + n + 1) / 5)
    ensemble.std.copy_(1 + draw(3, d + n + 1).tanh() / 2)
    gain, start = draw(4, n, spec.action_dim) / 40, 0.3 * draw(5, 5, n)
    out = rollout(ensemble, Linear(gain), start, 8, noise())
    mean, std, weight, bias, k = (
        x.double().numpy()
        for x in (ensemble.mean, ensemble.std, ensemble.weights[0][0, :, : n + 1], ensemble.biases[0][0, 0, : n + 1], gain)
    )
    feedback = np.concatenate([np.eye(n), k], -1) / std[:d]  # s -> inputs, but for a constant
    slope = feedback @ weight * std[d:]
    offset = (-mean[:d] / std[:d] @ weight + bias) * std[d:] + mean[d:]
    step = np.block([[np.eye(n) + slope[:, :n], np.zeros((n, 1))], [offset[None, :n], np.ones((1, 1))]])
    ones = np.concatenate([start.double().numpy(), np.ones((5, 1))], -1)
    for t in range(8):
        obs = (ones @ np.linalg.matrix_power(step, t))[:, :n]
        assert np.abs(obs @ k).max() < 1  # no action is clipped
        np.testing.assert_allclose(out.obs[:, t], obs, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(out.rewards[:, t], obs @ slope[:, n] + offset[n], rtol=1e-4, atol=1e-4)
    assert torch.equal(out.next_obs[:, :-1], out.obs[:, 1:]) and torch.equal(out.obs[:, 0], start)
    assert np.ptp(out.obs.numpy(), axis=1).min() > 0.01  # every number moved


def test_actions_are_clipped_on_entering_the_model_only():
    ensemble = noiseless()
    ensemble.weights[0][:, 7, 0] = 1.0  # the first action moves the first number
    actions = torch.zeros(3, 2, 3)
    actions[..., 0] = torch.tensor([[0.5, 0.25], [3.0, -7.0], [-3.0, -0.5]])
    out = rollout(ensemble, Replay(actions), standing(3), 2, noise())
    assert torch.equal(out.actions, actions)
    torch.testing.assert_close(out.next_obs[..., 0], torch.tensor([[0.5, 0.75], [1.0, 0.0], [-1.0, -1.5]]))


def test_trajectories_end_where_it_is_said_and_do_not_come_back():
    ensemble = noiseless()
    ensemble.biases[0][..., HEIGHT] = -0.02
    heights = torch.tensor([0.08, 0.1, 0.14, 0.2, 1.0])
    out = rollout(ensemble, STILL, standing(5, heights), 5, noise(), fallen)
    first_fall = [1, 2, 4, 7, 47]  # the first k with height - 0.02 k < 0.075
    assert out.alive.tolist() == [[float(t < k) for t in range(5)] for k in first_fall]
    assert torch.equal(out.alive, measures.alive((out.next_obs[..., HEIGHT] < 0.075).float()))
    ensemble.weights[0][:, HEIGHT, HEIGHT], ensemble.biases[0][..., HEIGHT] = -2.0, 0.25  # the height h becomes 0.25 - h
    out = rollout(ensemble, STILL, standing(2, heights[[3, 1]]), 4, noise(), fallen)
    torch.testing.assert_close(out.obs[..., HEIGHT], torch.tensor([[0.2, 0.05, 0.2, 0.05], [0.1, 0.15, 0.1, 0.15]]))
    assert out.alive.tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]


def test_a_random_elite_makes_each_step():
    ensemble = noiseless(members=7, elites=5)
    ensemble.elites.copy_(torch.tensor([6, 0, 3, 2, 5]))
    ensemble.biases[0][:, 0, 7] = torch.arange(7.0)  # the reward tells the member
    out = rollout(ensemble, STILL, standing(500), 8, noise())
    counts = torch.bincount(out.rewards.round().long().flatten(), minlength=7) / 4000
    expected = torch.tensor([0.2, 0, 0.2, 0.2, 0, 0.2, 0.2])
    assert (counts - expected).abs().max() < 4.5 * math.sqrt(0.2 * 0.8 / 4000)
    assert (counts[[1, 4]] == 0).all()
    for neighbours in (out.rewards[1:] == out.rewards[:-1], out.rewards[:, 1:] == out.rewards[:, :-1]):
        assert neighbours.float().mean().item() == pytest.approx(0.2, abs=0.03)  # independent of row and step


def test_noise_and_uncertainty_are_those_predicted():
    ensemble = noiseless(members=3, elites=1)
    ensemble.elites.fill_(2)
    std = torch.linspace(0.1, 1.0, 8) * torch.tensor([1.0, 3.0, 2.0])[:, None]
    ensemble.min_log_var.copy_(2 * std[:, None].log())
    ensemble.max_log_var.fill_(20.0)
    ensemble.std[10:] = torch.linspace(0.2, 2.0, 8)
    out = rollout(ensemble, STILL, standing(4000), 2, noise())
    draws = torch.cat([out.next_obs - out.obs, out.rewards[..., None]], -1)
    error = draws.std((0, 1)) / (std[2] * ensemble.std[10:]) - 1
    assert error.abs().max() < 4.5 / math.sqrt(2 * 8000)
    assert torch.corrcoef(draws.flatten(0, 1).T).fill_diagonal_(0).abs().max() < 5 / math.sqrt(8000)
    torch.testing.assert_close(out.uncertainty, torch.full((4000, 2), std[1].norm().item()))  # normalised; of no elite


def test_the_uncertainty_is_a_maximum_at_every_state():
    ensemble, data = fitted(toy([30, 30])), toy([30, 30], seed=3)
    ensemble.weights[-1] *= 20  # so that members differ in where they are sure
    out = rollout(ensemble, Replay(data.actions[:, None]), data.obs, 1, noise())
    inputs = (torch.cat([data.obs, data.actions], -1) - ensemble.mean[:69]) / ensemble.std[:69]
    norms = (0.5 * ensemble(inputs)[1]).exp().square().sum(-1).sqrt()
    torch.testing.assert_close(out.uncertainty[:, 0], norms.max(0).values)
    assert len(norms.argmax(0).unique()) > 1


def test_an_explosion_is_finite_and_counted():
    ensemble = noiseless()
    ensemble.weights[0][:, range(7), range(7)] = 30.0  # Δ = 30 s
    ensemble.weights[0][:, 3, 7], ensemble.std[-1] = 2.0, 0.1  # and the reward 0.2 s
    start = standing(3)
    start[1, 3] = 1e-3
    ensemble.mean[HEIGHT] = start[0, HEIGHT]  # the other rows are at the fixed point, 0 in normalised space
    out = rollout(ensemble, STILL, start, 30, noise())
    assert out.diverged.tolist() == [False, True, False]
    assert all(x.isfinite().all() for x in vars(out).values())
    assert out.rewards[1].max().item() == pytest.approx(0.1 * worldmodel.DIVERGED)
    assert out.obs[1, :, 3].max() == worldmodel.DIVERGED and (out.obs[[0, 2]] == start[[0, 2], None]).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_broken_weights_give_finite_rollouts(value):
    data = toy([30, 30])
    ensemble = fitted(data)
    ensemble.weights[1][:, 3, 2] = value
    out = rollout(ensemble, Replay(data.actions.view(20, 3, 24)), data.obs[:20], 3, noise())
    assert out.diverged.any()
    assert all(x.isfinite().all() for x in vars(out).values())


def test_what_comes_after_the_end_is_not_counted():
    ensemble = noiseless()
    ensemble.weights[0][:, 3, 3] = 30.0
    start = standing(2, torch.tensor([0.08, 0.2]))
    start[:, 3] = 1.0
    ensemble.biases[0][..., HEIGHT] = -0.01
    out = rollout(ensemble, STILL, start, 4, noise(), fallen)
    assert out.obs[:, -1, 3].tolist() == [worldmodel.DIVERGED] * 2  # both leave in their second step; one has fallen by then
    assert out.diverged.tolist() == [False, True]


def test_actions_are_on_policy(learnt):
    ensemble, _, val, _ = learnt
    policy = GaussianPolicy(7, 3, hidden=(8,), generators=[noise()]).requires_grad_(False)
    policy.log_std.uniform_(-2, 0, generator=noise())
    out, again, other = (rollout(ensemble, policy, val.obs[:1600], 10, noise(s)) for s in (3, 3, 4))
    # The mean over 16,000 steps and 3 dimensions of log π has standard error sqrt(0.5 / 48000).
    found = measures.log_likelihood(policy, out.obs, out.actions).mean().item()
    assert found == pytest.approx(measures.on_policy_log_likelihood(policy).item(), abs=4.5 * math.sqrt(0.5 / 48_000))
    assert_same(vars(out), vars(again))
    assert not torch.equal(out.actions, other.actions) and not torch.equal(out.next_obs, other.next_obs)
    assert [tuple(x.shape[:2]) for x in list(vars(out).values())[:-1]] == [(1600, 10)] * 6


@pytest.mark.parametrize("members, elites", [(3, 4), (3, 0), (0, 1)])
def test_impossible_ensembles_are_refused(members, elites):
    with pytest.raises(ValueError, match=f"elites={elites} is not allowed.*members={members}"):
        small(members=members, elites=elites)


def test_impossible_input_is_refused():
    data = toy([9], spec=SMALL)
    with pytest.raises(ValueError, match=r"weight_decay=\(0.1,\) is not allowed.*3 numbers"):
        training(small(), data, data, 1, weight_decay=(0.1,))
    with pytest.raises(ValueError, match="horizon=0 is not allowed"):
        rollout(small(), STILL, standing(2), 0, noise())
    with pytest.raises(ValueError, match=r"obs of shape \(2, 6\) is not allowed"):
        rollout(small(), STILL, standing(2)[:, 1:], 1, noise())
