"""TD3+BC against torchrl's, a formula of a single run written anew, and a bandit whose best action is known."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import plain_network, random_batch
from tensordict import TensorDict
from torch import nn
from torchrl.modules import Actor, ValueOperator
from torchrl.objectives import TD3BCLoss

from pgdlib.agents.stack import ACTIONS, NEXT_OBS, OBS, REWARD, TERMINAL, Learner, transitions
from pgdlib.agents.td3_bc import TD3BC
from pgdlib.policies import is_gaussian

MEAN, STD = torch.linspace(-1, 1, 45), torch.linspace(0.5, 2, 45)
SEEDS = (3, 0, 11)
pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")  # the tests move torchrl's targets themselves


def agent(seeds=SEEDS, **changes):
    """In float64; the targets are not what they follow, as after training."""
    made = TD3BC(seeds, MEAN, STD, hidden=(16, 12), **changes).double()
    with torch.no_grad():
        for target in (made.target_q, made.target_policy.net):
            for i, p in enumerate(target.parameters()):
                p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return made


class Plain:
    """TD3+BC of one run, as the paper has it, with torch's layers; it starts with the weights of run `i`."""

    def __init__(self, made, i):
        self.made = made
        self.policy, self.slow_policy = (plain_network(p.net, i, nn.Tanh()) for p in (made.policy, made.target_policy))
        self.twins, self.slow_twins = (
            [plain_network(q, k) for k in (i, i + made.runs)] for q in (made.q, made.target_q)
        )  # fmt: skip

    def critic_loss(self, rows, noise):
        obs, next_obs = (((rows[:, s] - MEAN) / STD).clamp(-10, 10) for s in (OBS, NEXT_OBS))
        with torch.no_grad():
            following = torch.cat([next_obs, (self.slow_policy(next_obs) + noise).clamp(-1, 1)], -1)
            worst = torch.minimum(*(q(following) for q in self.slow_twins))[:, 0]
            aim = torch.where(rows[:, TERMINAL] > 0, rows[:, REWARD], rows[:, REWARD] + self.made.discount * worst)
        pairs = torch.cat([obs, rows[:, ACTIONS]], -1)
        return sum(nn.functional.mse_loss(q(pairs)[:, 0], aim) for q in self.twins)

    def actor_loss(self, rows):
        obs = ((rows[:, OBS] - MEAN) / STD).clamp(-10, 10)
        actions = self.policy(obs)
        q = self.twins[0](torch.cat([obs, actions], -1))
        return -self.made.alpha / q.abs().mean().detach() * q.mean() + nn.functional.mse_loss(actions, rows[:, ACTIONS])

    def follow(self, polyak):
        with torch.no_grad():
            for slow, fast in zip([self.slow_policy, *self.slow_twins], [self.policy, *self.twins]):
                for p, q in zip(slow.parameters(), fast.parameters()):
                    p.copy_((1 - polyak) * p + polyak * q)


def assert_network_matches(mlp, i, network, of=lambda p: p):
    for layer, weight, bias in zip(network[::2], mlp.weights, mlp.biases):
        torch.testing.assert_close(of(weight)[i].T, of(layer.weight), rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(of(bias)[i, 0], of(layer.bias), rtol=1e-7, atol=1e-10)


def grad(p):
    return p.grad


@pytest.mark.parametrize("settings", [dict(), dict(alpha=0.5, discount=0.9)], ids=["default", "other"])
def test_losses_and_gradients_are_those_of_separate_runs(settings):
    made, data = agent(**settings), random_batch()
    data[0, 0, OBS] *= 1000  # where observations are clipped
    noise = 0.5 * torch.randn(3, 32, 24, generator=torch.Generator().manual_seed(5)).double()
    parts, value = made.parts(data, noise)
    sum(parts.values()).sum().backward()
    for i in range(3):
        plain = Plain(made, i)
        critic, actor = plain.critic_loss(data[i], noise[i]), plain.actor_loss(data[i])
        torch.testing.assert_close(parts["q"][i], critic)
        torch.testing.assert_close(parts["policy"][i], actor)
        pairs = torch.cat([made.policy.normalise(data[i, :, OBS]), data[i, :, ACTIONS]], -1)
        torch.testing.assert_close(value[i], plain.twins[0](pairs).mean())
        for loss, networks in ((critic, plain.twins), (actor, [plain.policy])):
            for p in (p for network in networks for p in network.parameters()):
                p.grad = torch.autograd.grad(loss, p, retain_graph=True)[0]
        assert_network_matches(made.policy.net, i, plain.policy, grad)
        for k in range(2):
            assert_network_matches(made.q, i + 3 * k, plain.twins[k], grad)


class Critic(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, obs, action):
        return self.net(torch.cat([obs, action], -1))


def test_losses_are_torchrls():
    made, data = agent(noise=0.0), random_batch()
    parts, _ = made.parts(data, torch.zeros(3, 32, 24).double())
    for i in range(3):
        plain, rows = Plain(made, i), data[i]
        twins = [ValueOperator(Critic(q), in_keys=["observation", "action"]) for q in plain.twins]
        loss = TD3BCLoss(Actor(plain.policy), twins, bounds=(-1.0, 1.0), policy_noise=0.0, loss_function="l2")
        loss.make_value_estimator(gamma=made.discount)
        for layer in "024":
            for name in ("weight", "bias"):
                slow = [getattr(q[int(layer)], name) for q in plain.slow_twins]
                loss.target_qvalue_network_params["module", "net", layer, name].data.copy_(torch.stack(slow))
                own = getattr(plain.slow_policy[int(layer)], name)
                loss.target_actor_network_params["module", layer, name].data.copy_(own)
        obs, next_obs = (((rows[:, s] - MEAN) / STD).clamp(-10, 10) for s in (OBS, NEXT_OBS))
        done = rows[:, TERMINAL, None].bool()
        following = dict(observation=next_obs, reward=rows[:, REWARD, None], done=done, terminated=done)
        theirs = loss(TensorDict(dict(observation=obs, action=rows[:, ACTIONS], next=following), [len(rows)]))
        torch.testing.assert_close(parts["q"][i], theirs["loss_qvalue"], rtol=1e-6, atol=0)
        torch.testing.assert_close(parts["policy"][i], theirs["loss_actor"], rtol=1e-6, atol=0)


def test_training_is_that_of_separate_runs_with_plain_adam():
    """Six steps of the learner: Adam, the policy's cosine and delay, the noise, and the targets."""
    made, rows, seen, noises = agent(), random_batch(n=40), [], []
    plain = [Plain(made, i) for i in range(3)]
    losses, target_noise = made.losses, made.target_noise
    made.losses = lambda data, step, seeds: seen.append(data) or losses(data, step, seeds)
    made.target_noise = lambda *args: noises.append(target_noise(*args)) or noises[-1]
    Learner(made, SEEDS, 6, batch_size=8, learning_rate=1e-2).train(list(rows), 6)
    for i, one in enumerate(plain):
        actor = torch.optim.Adam(one.policy.parameters(), 1e-2)
        critic = torch.optim.Adam([p for q in one.twins for p in q.parameters()], 1e-2)
        for step in range(6):
            actor.param_groups[0]["lr"] = 1e-2 * math.cos(math.pi / 2 * step / 6) ** 2
            critic.zero_grad()
            one.critic_loss(seen[step][i], noises[step][i]).backward()
            if step % 2 == 0:  # on the twins before their step, as all losses are taken at once
                actor.zero_grad()
                gradients = torch.autograd.grad(one.actor_loss(seen[step][i]), list(one.policy.parameters()))
                for p, gradient in zip(one.policy.parameters(), gradients):
                    p.grad = gradient
                actor.step()
            critic.step()
            if step % 2 == 0:
                one.follow(0.005)
        assert_network_matches(made.policy.net, i, one.policy)
        assert_network_matches(made.target_policy.net, i, one.slow_policy)
        for k in range(2):
            assert_network_matches(made.q, i + 3 * k, one.twins[k])
            assert_network_matches(made.target_q, i + 3 * k, one.slow_twins[k])


def test_each_loss_reaches_its_own_network_alone():
    made, data = agent(), random_batch()
    parts, value = made.parts(data, torch.zeros(3, 32, 24).double())
    assert set(parts) == {"q", "policy"} and not value.requires_grad
    for name, prefix in (("q", "q."), ("policy", "policy.net.")):
        made.zero_grad()
        parts[name].sum().backward(retain_graph=True)
        reached = {n for n, p in made.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert reached == {n for n, _ in made.named_parameters() if n.startswith(prefix)}


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_policy_and_targets_move_every_delay_steps_only(delay):
    made, rows, snapshots = agent(delay=delay), list(random_batch(n=40)), []

    def snap(step=0):
        snapshots.append(copy.deepcopy(made.state_dict()))

    snap()
    Learner(made, SEEDS, 12, batch_size=8, learning_rate=1e-2).train(rows, 7, snap)
    for step, (before, after) in enumerate(zip(snapshots, snapshots[1:])):
        for part in ("q", "policy.net", "target_q", "target_policy.net"):
            names = [n for n in after if n.startswith(f"{part}.")]
            changed = {not torch.equal(before[n], after[n]) for n in names}
            assert changed == {part == "q" or step % delay == 0}, (part, step)


def test_target_noise_is_clipped_and_each_runs_own():
    made, rows = agent(noise=0.3), torch.zeros(3, 2000, 116)
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


def test_its_policy_guides_as_a_narrow_gaussian_around_the_action():
    made = TD3BC(SEEDS, MEAN, STD, hidden=(16,), guide_std=0.3)
    obs = torch.randn(6, 45, generator=torch.Generator().manual_seed(0))
    before = made.policy.log_std.clone()
    mean, std = made.policy(obs)
    assert is_gaussian(made.policy) and not made.policy.log_std.requires_grad
    torch.testing.assert_close(std, torch.full((6, 24), 0.3))
    Learner(made, SEEDS, 10, batch_size=8).train(list(random_batch(n=40).float()), 10)
    assert torch.equal(made.policy.log_std, before) and not torch.equal(made.policy(obs)[0], mean)


SIGNS = torch.tensor([1.0, -1.0]).repeat(12)


def bandit(n=4000):
    """One step whose reward depends on how far its action goes along `SIGNS`, x: best at 0.4, where the data's mean is 0."""
    generator = torch.Generator().manual_seed(0)
    x = 1.8 * torch.rand(n, 1, generator=generator) - 0.9
    actions = (SIGNS * x + 0.1 * torch.randn(n, 24, generator=generator)).clamp(-1, 1)
    rewards = 1 - 4 * ((actions * SIGNS).mean(-1) - 0.4).square()
    return transitions(torch.zeros(n, 45), actions, rewards, torch.ones(n), torch.zeros(n, 45))


@pytest.mark.slow
@pytest.mark.parametrize("alpha, best", [(5.0, 0.4), (1e-4, 0.0)], ids=["learnt", "cloned"])
def test_a_bandit_is_learnt_or_cloned(alpha, best):
    """With a large α the policy takes the best of the data's actions, with a small one their mean."""
    rows = bandit()
    made = TD3BC((0, 1), torch.zeros(45), torch.ones(45), hidden=(32, 32), alpha=alpha)
    Learner(made, (0, 1), 300, batch_size=128, learning_rate=1e-2).train([rows, rows], 300)
    actions = torch.as_tensor(made.policy.act(np.zeros((2, 45))))
    assert ((actions * SIGNS).mean(1) - best).abs().max() < 0.1
    if not best:  # else what is across `SIGNS` is free
        assert (actions - rows[:, ACTIONS].mean(0)).square().mean(1).sqrt().max() < 0.1
