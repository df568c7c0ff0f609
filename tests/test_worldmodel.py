"""The ensemble against plain networks and a loss written anew, a linear system with known noise, and closed-form rollouts."""

import math

import numpy as np
import pytest
import torch
from conftest import toy
from torch import nn
from torch.distributions import Normal

from pgdlib import measures, worldmodel
from pgdlib.policies import GaussianPolicy
from pgdlib.worldmodel import IN, OUT, Ensemble, Training, rollout, train


def small(members=3, elites=2, hidden=(16, 12), seed=0):
    torch.manual_seed(seed)
    return Ensemble(members, elites, hidden)


def fitted(data=None, **kwargs):
    """A small ensemble with the statistics of toy data, whose bounds differ by member and output."""
    ensemble = small(**kwargs)
    ensemble.fit_normalisation(data or toy([30, 30]))
    with torch.no_grad():
        ensemble.max_log_var.uniform_(0.0, 1.0)
        ensemble.min_log_var.uniform_(-3.0, -1.0)
    return ensemble.requires_grad_(False)


def how(steps, **changes):
    return Training(**{**dict(steps=steps, batch_size=8, learning_rate=1e-2, weight_decay=(0.01, 0.02, 0.03)), **changes})


def plain_network(ensemble, m):
    """Member `m` as torch's own layers, with parameters of their own."""
    layers = []
    for weight, bias in zip(ensemble.weights, ensemble.biases):
        linear = nn.Linear(*weight.shape[1:]).to(weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(weight[m].T)
            linear.bias.copy_(bias[m, 0])
        layers += [nn.SiLU(), linear]
    return nn.Sequential(*layers[1:])


def plain_gaussian(network, low, high, x):
    """The Gaussian of a network whose log-variance is bounded by softplus (PETS, Appendix A.1)."""
    mean, raw = network(x).split(46, -1)
    log_var = high - torch.log(1 + (high - raw).exp())
    return Normal(mean, (low + torch.log(1 + (log_var - low).exp())).exp().sqrt())


def test_members_are_plain_networks():
    data = toy([30, 30])
    ensemble = fitted(data)
    x = (torch.cat([data.obs, data.actions], -1) - ensemble.mean[IN]) / ensemble.std[IN]
    next_obs, reward, std = ensemble.predict(data.obs, data.actions)
    for m in range(3):
        one = plain_gaussian(plain_network(ensemble, m), ensemble.min_log_var[m], ensemble.max_log_var[m], x)
        mean = one.mean * ensemble.std[OUT] + ensemble.mean[OUT]
        torch.testing.assert_close(next_obs[m], data.obs + mean[:, :45], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(reward[m], mean[:, 45], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(std[m], one.stddev * ensemble.std[OUT], rtol=1e-4, atol=1e-5)


def test_initial_weights_are_mbpos():
    ensemble = small(hidden=(200, 50))
    for weight, fan_in in zip(ensemble.weights, (69, 200, 50)):
        std = 1 / (2 * math.sqrt(fan_in))
        assert weight.abs().max() <= 2 * std
        # A normal cut at two std keeps 0.8796 of its std.
        assert weight.std().item() == pytest.approx(0.8796 * std, rel=4.5 / math.sqrt(2 * weight.numel()))
    assert all((bias == 0).all() for bias in ensemble.biases)


def test_statistics_are_the_datas():
    data = toy([30, 30])
    data.obs[:, 7] = data.next_obs[:, 7] = 3.0  # never changes, neither as input nor as output
    data.actions[:] *= 5  # beyond the limits, where the simulator clips
    ensemble = fitted(data)
    inputs, outputs = ensemble.pairs(data)
    moving = np.delete(np.arange(69), 7)
    expected = np.concatenate([data.obs.numpy(), data.actions.numpy().clip(-1, 1)], -1)[:, moving]
    expected = (expected - expected.mean(0)) / expected.std(0)
    np.testing.assert_allclose(inputs[:, moving], expected, atol=1e-5)
    assert (inputs[:, 7] == 0).all() and (outputs[:, 7] == 0).all()
    still = np.delete(np.arange(46), 7)
    np.testing.assert_allclose(outputs[:, still].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(outputs[:, still].std(0, unbiased=False), 1, atol=1e-5)
    next_obs, _, std = ensemble.predict(data.obs, data.actions)
    assert (next_obs[..., 7] - 3).abs().max() < 1e-4 and std[..., 7].max() < 1e-5  # and is predicted never to change


def test_nll_and_its_gradients():
    mean, log_var, target = (torch.randn(5, 46, dtype=torch.float64, requires_grad=i < 2) for i in range(3))
    ours = torch.autograd.grad(worldmodel.nll(mean, log_var, target).sum(), (mean, log_var))
    expected = -Normal(mean, (0.5 * log_var).exp()).log_prob(target)
    torch.testing.assert_close(worldmodel.nll(mean, log_var, target), expected)
    for a, b in zip(ours, torch.autograd.grad(expected.sum(), (mean, log_var))):
        torch.testing.assert_close(a, b)


def test_training_is_that_of_separate_networks(monkeypatch):
    """Each member is trained as if alone: torch's layers, log_prob, the penalties in the loss, and plain Adam."""
    data, batches, randint = toy([30, 30]), [], torch.randint
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: batches.append(randint(*args, **kwargs)) or batches[-1])
    ensemble = small().double()
    networks = [plain_network(ensemble, m) for m in range(3)]
    bounds = [[torch.full((46,), v, dtype=torch.float64, requires_grad=True) for v in (-10.0, 0.5)] for _ in range(3)]
    losses = train(ensemble, data, data, how(6))
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
    torch.testing.assert_close(losses, expected.mean(0))
    assert len({tuple(row.tolist()) for ids in batches for row in ids}) == 18  # no two members or steps share a batch


def test_members_do_not_depend_on_each_other():
    data, a, b = toy([30, 30]), small(), small()
    with torch.no_grad():
        for p in b.parameters():
            p[1:] += 0.1
    train(a, data, data, how(20))
    train(b, data, data, how(20))
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.equal(p[0], q[0]) and not torch.equal(p[1], q[1])


NOISE = torch.linspace(0.2, 0.6, 7)  # of six observations and the reward


def linear_system(episodes, seed):
    """Six numbers that follow s' = A s + B a + noise, |A| < 1, with a reward linear in s and a; and the noiseless s', r."""
    generator = torch.Generator().manual_seed(7)
    a = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0] * 0.95
    b, c = torch.randn(24, 6, generator=generator) / 5, torch.randn(30, generator=generator) / 3
    data = toy([40] * episodes, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    for x in (data.obs, data.next_obs):
        x[:, 6:] = torch.arange(39) / 10
    mean = torch.cat([data.obs[:, :6] @ a + data.actions @ b, torch.cat([data.obs[:, :6], data.actions], -1) @ c[:, None]], -1)
    noisy = mean + NOISE * torch.randn(mean.shape, generator=generator)
    data.next_obs[:, :6], data.rewards[:] = noisy[:, :6], noisy[:, 6]
    return data, mean


@pytest.fixture(scope="module")
def learnt():
    (data, _), (val, mean) = linear_system(400, 0), linear_system(40, 1)
    ensemble = small(3, 2, (48, 48))
    losses = train(ensemble, data, val, Training(1000, 128, 1e-2, weight_decay=(0.0, 0.0, 0.0)))
    return ensemble, losses, val, mean


@pytest.mark.slow
@torch.no_grad()
def test_a_linear_system_is_learnt(learnt):
    ensemble, losses, val, mean = learnt
    next_obs, reward, std = ensemble.predict(val.obs, val.actions)
    predicted = torch.cat([next_obs[..., :6], reward[..., None]], -1)
    error = (predicted - mean).square().mean((0, 1)).sqrt()
    assert (error < 0.2 * NOISE).all(), error / NOISE
    spread = torch.cat([std[..., :6], std[..., 45:]], -1)
    assert (spread.mean((0, 1)) / NOISE - 1).abs().max() < 0.1
    assert (next_obs[..., 6:] - val.obs[:, 6:]).abs().max() < 1e-4
    # What is left is the noise's own NLL, in units of the outputs' std.
    inputs, outputs = ensemble.pairs(val)
    moving = [*range(6), 45]
    left = worldmodel.nll(*ensemble(inputs), outputs)[..., moving].mean().item()
    floor = (NOISE.log() - ensemble.std[OUT][moving].log()).mean().item() + 0.5 * math.log(2 * math.pi * math.e)
    assert floor - 0.05 < left < floor + 0.1
    assert losses.shape == (1000,) and losses[-100:].mean() < losses[:100].mean()


def test_rollouts_of_the_learnt_system_have_its_noise(learnt):
    ensemble, _, val, mean = learnt
    out = rollout(ensemble, Replay(val.actions[:, None]), val.obs, 1, torch.Generator().manual_seed(0))
    residual = torch.cat([out.next_obs[:, 0, :6], out.rewards], -1) - mean
    assert (residual.std(0) / NOISE - 1).abs().max() < 0.1
    assert not out.diverged.any()


def test_elites_have_the_least_validation_error():
    data, val = toy([30, 30]), toy([20, 20], seed=1)
    ensemble = small(members=6, elites=3)
    train(ensemble, data, val, how(20))
    with torch.no_grad():
        for m, shift in ((1, 3.0), (2, 1.0), (4, 2.0), (5, -4.0)):
            ensemble.biases[-1][m, :, :46] += shift
    train(ensemble, data, val, how(0))  # only chooses
    next_obs, reward, _ = ensemble.predict(val.obs, val.actions)
    error = torch.cat([next_obs - val.next_obs, (reward - val.rewards)[..., None]], -1) / ensemble.std[OUT]
    torch.testing.assert_close(worldmodel.validation_error(ensemble, val, chunk=7).float(), error.square().mean(1))
    assert set(ensemble.elites.tolist()) == {0, 3, 2}
    assert ensemble.elites.tolist() == error.square().mean((1, 2)).argsort()[:3].tolist()


def test_resume_gives_the_same_weights(tmp_path):
    data, val = toy([30, 30]), toy([20], seed=1)
    whole = small()
    losses = train(whole, data, val, how(30))

    def interrupt(step, losses):
        if step == 17:
            raise KeyboardInterrupt

    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(small(), data, val, how(30), path, save_every=0.0, report=interrupt)
    steps, resumed = [], small(seed=5)
    losses_again = train(resumed, data, val, how(30), path, report=lambda step, losses: steps.append(step))
    assert steps[0] in (17, 18)  # it did go on, not start anew
    assert torch.equal(losses, losses_again)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "hidden, changes", [((16, 12), dict(learning_rate=2e-3)), ((16, 12), dict(weight_decay=(0, 0, 0))), ((16, 16), {})]
)
def test_a_checkpoint_of_another_training_is_set_aside(tmp_path, hidden, changes, capsys):
    data, path = toy([30, 30]), tmp_path / "checkpoint.safetensors"
    train(small(), data, data, how(3), path, save_every=0.0)
    old = path.read_bytes()
    expected, again = small(hidden=hidden), small(hidden=hidden)
    losses = train(expected, data, data, how(3, **changes))
    assert torch.equal(train(again, data, data, how(3, **changes), path), losses)
    for (name, a), b in zip(expected.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    (aside,) = tmp_path.glob("*is-of-another-training*.damaged")
    assert aside.read_bytes() == old and aside.name in capsys.readouterr().out


def test_seeds_decide_the_training():
    data = toy([30, 30])
    losses = [train(small(), data, data, how(10, seed=s)) for s in (0, 0, 1)]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


def test_all_of_an_ensemble_is_in_its_config_and_state(learnt):
    ensemble, _, val, _ = learnt
    other = Ensemble(**ensemble.config)
    other.load_state_dict(ensemble.state_dict())
    a, b = (
        rollout(e, Replay(val.actions[:4, None]), val.obs[:4], 1, torch.Generator().manual_seed(0)) for e in (ensemble, other)
    )
    assert torch.equal(a.next_obs, b.next_obs) and torch.equal(a.uncertainty, b.uncertainty)


class Linear:
    """The policy a = s K."""

    def __init__(self, gain):
        self.gain = gain

    def sample(self, obs, generator):
        return obs @ self.gain


class Replay:
    """A policy that ignores the observation and plays `actions` [B, T, 24] in order."""

    def __init__(self, actions):
        self.actions = iter(actions.unbind(1))

    def sample(self, obs, generator):
        return next(self.actions)


STILL = Linear(torch.zeros(45, 24))


def noiseless(members=2, elites=2):
    """An ensemble without hidden layers or noise, which predicts that nothing moves and the reward is 0."""
    ensemble = Ensemble(members, elites, hidden=()).requires_grad_(False)
    ensemble.weights[0].zero_()
    ensemble.biases[0][..., 46:] = -1e4
    ensemble.min_log_var.fill_(-400.0)
    return ensemble


def standing(n, height=0.2):
    """Observations [n, 45], all 0 but the pen's height (m)."""
    obs = torch.zeros(n, 45)
    obs[:, 26] = height
    return obs


def test_rollout_of_a_linear_model_is_its_matrix_power():
    generator = torch.Generator().manual_seed(0)
    ensemble = noiseless()
    ensemble.weights[0][..., :46] = torch.randn(69, 46, generator=generator) / 30
    ensemble.biases[0][..., :46] = torch.randn(46, generator=generator) / 30
    ensemble.mean.copy_(torch.randn(115, generator=generator) / 5)
    ensemble.std.copy_(0.5 + torch.rand(115, generator=generator))
    ensemble.mean[26] = ensemble.mean[69 + 26] = 1.0  # the pen rises
    gain = torch.randn(45, 24, generator=generator) / 40
    start = 0.3 * torch.randn(5, 45, generator=generator)
    out = rollout(ensemble, Linear(gain), start, 8, torch.Generator().manual_seed(0))
    mean, std, weight, bias = (
        x.double().numpy() for x in (ensemble.mean, ensemble.std, ensemble.weights[0][0, :, :46], ensemble.biases[0][0, 0, :46])
    )
    feedback = np.concatenate([np.eye(45), gain.double().numpy()], -1) / std[:69]  # s -> inputs, but for a constant
    slope = feedback @ weight * std[69:]
    offset = (-mean[:69] / std[:69] @ weight + bias) * std[69:] + mean[69:]
    step = np.block([[np.eye(45) + slope[:, :45], np.zeros((45, 1))], [offset[None, :45], np.ones((1, 1))]])
    ones = np.concatenate([start.double().numpy(), np.ones((5, 1))], -1)
    for t in range(8):
        obs = (ones @ np.linalg.matrix_power(step, t))[:, :45]
        assert np.abs(obs @ gain.double().numpy()).max() < 1  # no action is clipped
        np.testing.assert_allclose(out.obs[:, t], obs, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(out.rewards[:, t], obs @ slope[:, 45] + offset[45], rtol=1e-4, atol=1e-4)
    assert torch.equal(out.next_obs[:, :-1], out.obs[:, 1:]) and torch.equal(out.obs[:, 0], start)
    assert np.ptp(out.obs.numpy(), axis=1).min() > 0.01  # every number moved


def test_actions_are_clipped_on_entering_the_model_only():
    ensemble = noiseless()
    ensemble.weights[0][:, 45, 0] = 1.0  # the first action moves the first joint
    actions = torch.zeros(3, 2, 24)
    actions[..., 0] = torch.tensor([[0.5, 0.25], [3.0, -7.0], [-3.0, -0.5]])
    out = rollout(ensemble, Replay(actions), standing(3), 2, torch.Generator())
    assert torch.equal(out.actions, actions)
    torch.testing.assert_close(out.next_obs[..., 0], torch.tensor([[0.5, 0.75], [1.0, 0.0], [-1.0, -1.5]]))


def test_trajectories_end_at_their_fall():
    ensemble = noiseless()
    ensemble.biases[0][..., 26] = -0.02
    heights = torch.tensor([0.08, 0.1, 0.14, 0.2, 1.0])
    out = rollout(ensemble, STILL, standing(5, heights), 5, torch.Generator())
    first_fall = [1, 2, 4, 7, 47]  # the first k with height - 0.02 k < 0.075
    assert out.alive.tolist() == [[float(t < k) for t in range(5)] for k in first_fall]
    terminal = (out.next_obs[..., 26] < 0.075).float()
    assert torch.equal(out.alive, measures.alive(terminal))


def test_no_trajectory_comes_back():
    ensemble = noiseless()
    ensemble.weights[0][:, 26, 26], ensemble.biases[0][..., 26] = -2.0, 0.25  # the height h becomes 0.25 m - h
    out = rollout(ensemble, STILL, standing(2, torch.tensor([0.2, 0.1])), 4, torch.Generator())
    torch.testing.assert_close(out.obs[..., 26], torch.tensor([[0.2, 0.05, 0.2, 0.05], [0.1, 0.15, 0.1, 0.15]]))
    assert out.alive.tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]


def test_a_random_elite_makes_each_step():
    ensemble = noiseless(members=7, elites=5)
    ensemble.elites.copy_(torch.tensor([6, 0, 3, 2, 5]))
    ensemble.biases[0][:, 0, 45] = torch.arange(7.0)  # the reward tells the member
    out = rollout(ensemble, STILL, standing(500), 8, torch.Generator().manual_seed(0))
    counts = torch.bincount(out.rewards.round().long().flatten(), minlength=7) / 4000
    expected = torch.tensor([0.2, 0, 0.2, 0.2, 0, 0.2, 0.2])
    assert (counts - expected).abs().max() < 4.5 * math.sqrt(0.2 * 0.8 / 4000)
    assert (counts[[1, 4]] == 0).all()
    for neighbours in (out.rewards[1:] == out.rewards[:-1], out.rewards[:, 1:] == out.rewards[:, :-1]):
        assert neighbours.float().mean().item() == pytest.approx(0.2, abs=0.03)  # independent of row and step


def test_noise_and_uncertainty_are_those_predicted():
    ensemble = noiseless(members=3, elites=1)
    ensemble.elites.fill_(2)
    std = torch.linspace(0.1, 1.0, 46) * torch.tensor([1.0, 3.0, 2.0])[:, None]
    ensemble.min_log_var.copy_(2 * std[:, None].log())
    ensemble.max_log_var.fill_(20.0)
    ensemble.std[69:] = torch.linspace(0.2, 2.0, 46)
    start = standing(4000, 10.0)
    out = rollout(ensemble, STILL, start, 2, torch.Generator().manual_seed(0))
    draws = torch.cat([out.next_obs - out.obs, out.rewards[..., None]], -1)
    error = draws.std((0, 1)) / (std[2] * ensemble.std[69:]) - 1
    assert error.abs().max() < 4.5 / math.sqrt(2 * 8000)
    assert torch.corrcoef(draws.flatten(0, 1).T).fill_diagonal_(0).abs().max() < 5 / math.sqrt(8000)
    torch.testing.assert_close(out.uncertainty, torch.full((4000, 2), std[1].norm().item()))  # normalised; of no elite


def test_the_uncertainty_is_a_maximum_at_every_state():
    ensemble = fitted()
    ensemble.weights[-1] *= 20  # so that members differ in where they are sure
    data = toy([30, 30], seed=3)
    out = rollout(ensemble, Replay(data.actions[:, None]), data.obs, 1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        norms = (0.5 * ensemble(ensemble.inputs(data.obs, data.actions))[1]).exp().square().sum(-1).sqrt()
    torch.testing.assert_close(out.uncertainty[:, 0], norms.max(0).values)
    assert len(norms.argmax(0).unique()) > 1


def test_an_explosion_is_finite_and_counted():
    ensemble = noiseless()
    ensemble.weights[0][:, range(45), range(45)] = 30.0  # Δ = 30 s
    start = standing(3)
    start[1, 30] = 1e-3
    ensemble.mean[26] = start[0, 26]  # the other rows are at the fixed point, 0 in normalised space
    out = rollout(ensemble, STILL, start, 30, torch.Generator())
    assert out.diverged.tolist() == [False, True, False]
    assert all(x.isfinite().all() for x in (out.obs, out.next_obs, out.rewards, out.uncertainty))
    assert out.obs[1, :, 30].abs().max() == worldmodel.DIVERGED and (out.obs[[0, 2]] == start[[0, 2], None]).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_broken_weights_give_finite_rollouts(value):
    ensemble = fitted()
    ensemble.weights[1][:, 3, 2] = value
    data = toy([30, 30])
    out = rollout(ensemble, Replay(data.actions.view(20, 3, 24)), data.obs[:20], 3, torch.Generator().manual_seed(0))
    assert out.diverged.any()
    assert all(x.isfinite().all() for x in vars(out).values())


def test_what_comes_after_the_end_is_not_counted():
    ensemble = noiseless()
    ensemble.weights[0][:, 30, 30] = 30.0
    start = standing(2, torch.tensor([0.08, 0.2]))
    start[:, 30] = 1.0
    ensemble.biases[0][..., 26] = -0.01
    out = rollout(ensemble, STILL, start, 4, torch.Generator())
    assert out.obs[:, -1, 30].tolist() == [worldmodel.DIVERGED] * 2  # both leave in their second step; one has fallen by then
    assert out.diverged.tolist() == [False, True]


def test_actions_are_on_policy(learnt):
    ensemble, _, val, _ = learnt
    torch.manual_seed(0)
    policy = GaussianPolicy(45, 24, hidden=(8,)).requires_grad_(False)
    policy.log_std.uniform_(-2, 0)
    out, again, other = (rollout(ensemble, policy, val.obs[:200], 10, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    # The mean over 2000 steps and 24 dimensions of log π has standard error sqrt(0.5 / 48000).
    found = measures.log_likelihood(policy, out.obs, out.actions).mean().item()
    assert found == pytest.approx(measures.on_policy_log_likelihood(policy), abs=4.5 * math.sqrt(0.5 / 48_000))
    assert all(torch.equal(a, b) for a, b in zip(vars(out).values(), vars(again).values()))
    assert not torch.equal(out.actions, other.actions) and not torch.equal(out.next_obs, other.next_obs)
    assert [tuple(x.shape[:2]) for x in list(vars(out).values())[:-1]] == [(200, 10)] * 6


@pytest.mark.parametrize("members, elites", [(3, 4), (3, 0), (0, 1)])
def test_impossible_ensembles_are_refused(members, elites):
    with pytest.raises(ValueError, match=f"elites={elites} is not allowed.*members={members}"):
        Ensemble(members, elites)


def test_impossible_input_is_refused():
    with pytest.raises(ValueError, match=r"weight_decay=\(0.1,\) is not allowed.*3 numbers"):
        train(small(), toy([9]), toy([9]), how(1, weight_decay=(0.1,)))
    with pytest.raises(ValueError, match="horizon=0 is not allowed"):
        rollout(small(), STILL, standing(2), 0, torch.Generator())
    with pytest.raises(ValueError, match=r"obs of shape \(2, 44\) is not allowed"):
        rollout(small(), STILL, standing(2)[:, 1:], 1, torch.Generator())
