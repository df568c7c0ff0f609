"""The losses, gradients and training of IQL and TD3+BC against torchrl's losses and plain Adam, one run at a time."""

import math

import pytest
import torch
from conftest import SMALL, SPEC, draw, plain_network, random_batch, scales
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import Actor, IndependentNormal, ProbabilisticActor, ValueOperator
from torchrl.objectives import IQLLoss, TD3BCLoss

from pgdlib.agents.iql import IQL
from pgdlib.agents.stack import Learner
from pgdlib.agents.td3_bc import TD3BC

SEEDS = (3, 0, 11)
OTHER = {
    IQL: dict(expectile=0.9, temperature=10.0, discount=0.95, polyak=0.2),
    TD3BC: dict(alpha=0.5, discount=0.9, polyak=0.2),
}
NAMES = dict(
    policy="actor_network", q="qvalue_network", v="value_network",
    target_q="target_qvalue_network", target_policy="target_actor_network",
)  # fmt: skip
pytestmark = [
    pytest.mark.filterwarnings("ignore:No target network updater"),  # the tests move torchrl's targets themselves
    pytest.mark.parametrize(
        "kind, spec, settings",
        [(IQL, SPEC, {}), (IQL, SMALL, OTHER[IQL]), (TD3BC, SPEC, {}), (TD3BC, SMALL, OTHER[TD3BC])],
        ids=["iql", "iql other", "td3_bc", "td3_bc other"],
    ),
]


def agent(kind, spec, settings):
    """In float64; targets are not what they follow, as after training, and values large enough for weights of all sizes."""
    made = kind(spec, SEEDS, *scales(spec), hidden=(16, 12)).double()
    vars(made).update(settings)
    with torch.no_grad():
        for name in ("q", "v", "target_q"):
            if hasattr(made, name):
                getattr(made, name).weights[-1].mul_(8)
        for i, p in enumerate(p for name, p in made.named_parameters() if name.startswith("target")):
            p += 0.1 * draw(i, *p.shape)
        made.policy.log_std += torch.linspace(-1, 0.5, spec.action_dim)
    return made


class Gaussian(nn.Module):
    """The mean and std of run `i`, as torchrl takes them; it is given normalised observations."""

    def __init__(self, policy, i):
        super().__init__()
        self.net, self.log_std = plain_network(policy.net, i), nn.Parameter(policy.log_std[i, 0].detach().clone())

    def forward(self, obs):
        mean = self.net(obs).tanh()
        return mean, self.log_std.exp().expand_as(mean)


class Critic(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, obs, action):
        return self.net(torch.cat([obs, action], -1))


def torchrls(made, i):
    """torchrl's loss with the weights of run `i`."""
    twins = [ValueOperator(Critic(plain_network(made.q, k)), in_keys=["observation", "action"]) for k in (i, i + 3)]
    if isinstance(made, IQL):
        module = TensorDictModule(Gaussian(made.policy, i), ["observation"], ["loc", "scale"])
        how = dict(distribution_class=IndependentNormal, distribution_kwargs={"tanh_loc": False})
        value = ValueOperator(plain_network(made.v, i), in_keys=["observation"])
        settings = dict(loss_function="l2", temperature=made.temperature, expectile=made.expectile)
        loss = IQLLoss(ProbabilisticActor(module, in_keys=["loc", "scale"], **how), twins, value, **settings)
    else:
        settings = dict(policy_noise=1.0, noise_clip=0.5, alpha=made.alpha, loss_function="l2")
        loss = TD3BCLoss(Actor(plain_network(made.policy.net, i, nn.Tanh())), twins, bounds=(-1.0, 1.0), **settings)
    loss.make_value_estimator(gamma=made.discount)
    loss.value_estimator.gamma = torch.tensor(made.discount, dtype=torch.float64)  # which torchrl has in float32
    for name in theirs(loss):
        if name.startswith("target"):
            for right, mine in zip(theirs(loss)[name], ours(made, name, i), strict=True):
                right.copy_(mine.reshape(right.shape))
    return loss


def theirs(loss):
    """Weights and biases of torchrl's networks by our names, without graph but with their `grad`."""
    found = [(k, v) for k, v in (*loss.named_parameters(), *loss.named_buffers()) if "log_std" not in k]
    by_name = {name: [v for k, v in found if k.startswith(f"{prefix}_params.")] for name, prefix in NAMES.items()}
    return {name: tensors for name, tensors in by_name.items() if tensors}


def ours(made, name, i, of=lambda p: p.detach()):
    """Weights and biases of run `i` in the layout of torch's layers; both twins at once."""
    network = getattr(made, name)
    mlp, rows = getattr(network, "net", network), [i, i + 3] if name.endswith("q") else [i]
    return [x for w, b in zip(mlp.weights, mlp.biases) for x in (of(w)[rows].mT, of(b)[rows, 0])]


def as_tensordict(rows, spec):
    mean, std = scales(spec)
    obs, next_obs = (((rows[:, s] - mean) / std).clamp(-10, 10) for s in (spec.obs, spec.next_obs))
    done = rows[:, spec.terminal, None].bool()
    following = dict(observation=next_obs, reward=rows[:, spec.reward, None], done=done, terminated=done)
    return TensorDict(dict(observation=obs, action=rows[:, spec.actions], next=following), [len(rows)])


EXACT = dict(rtol=1e-7, atol=1e-9)


def test_losses_and_gradients_are_torchrls(kind, spec, settings, monkeypatch):
    made, batch = agent(kind, spec, settings), random_batch(spec=spec)
    batch[0, 0, spec.obs] *= 1000  # where observations are clipped
    noise = 0.3 * draw(5, 3, 32, spec.action_dim, dtype=torch.float64).clamp(-0.5, 0.5)
    made.target_noise = lambda *args: noise
    parts, value = made.losses(batch, 0, SEEDS)
    sum(parts.values()).sum().backward()
    assert not value.requires_grad and len(parts) == (3 if kind is IQL else 2)
    for i in range(3):
        monkeypatch.setattr(torch, "randn_like", lambda like, i=i: noise[i])  # torchrl's only draw
        loss, rows = torchrls(made, i), as_tensordict(batch[i], spec)
        found = loss(rows)
        for name, part in parts.items():
            torch.testing.assert_close(part[i], found[f"loss_{NAMES[name].removesuffix('_network')}"], **EXACT)
        mean = plain_network(made.v, i)(rows["observation"]).mean() if kind is IQL else found["pred_value"][0].mean()
        torch.testing.assert_close(value[i], mean.detach(), **EXACT)
        sum(x for k, x in found.items() if k.startswith("loss_")).backward()
        for name, tensors in theirs(loss).items():
            if name.startswith("target"):
                assert all(p.grad is None for p in getattr(made, name).parameters())
            else:
                for mine, right in zip(ours(made, name, i, lambda p: p.grad), tensors, strict=True):
                    torch.testing.assert_close(mine.reshape(right.shape), right.grad, **EXACT)
        for key, p in loss.named_parameters():
            if "log_std" in key:
                torch.testing.assert_close(made.policy.log_std.grad[i, 0], p.grad, **EXACT)
    if kind is IQL and settings:
        pairs = torch.cat([made.policy.normalise(batch[..., spec.obs]), batch[..., spec.actions]], -1)
        advantage = made.target_q(pairs).amin(0) - made.v(pairs[..., spec.obs])[..., 0]
        assert 0 < ((made.temperature * advantage).exp() > made.max_weight).sum() < 90  # both sides of the limit are there


def test_training_is_that_of_torchrls_loss_and_plain_adam(kind, spec, settings, monkeypatch):
    """Six steps of the learner: Adam, the policy's cosine and delay, the noise, and the targets that follow."""
    made, rows, seen, noises = agent(kind, spec, settings), random_batch(n=40, spec=spec), [], []
    torchs = [torchrls(made, i) for i in range(3)]
    losses, noise = made.losses, getattr(made, "target_noise", None)
    made.losses = lambda batch, *args: seen.append(batch) or losses(batch, *args)
    made.target_noise = lambda *args: noises.append(noise(*args)) or noises[-1]
    log_std = made.policy.log_std.detach().clone()
    list(Learner(made, SEEDS, 6, batch_size=8, learning_rate=1e-2).train(list(rows)))
    for i, loss in enumerate(torchs):
        networks, parameters = theirs(loss), dict(loss.named_parameters())
        actor = [p for k, p in parameters.items() if k.startswith("actor")]
        adam = torch.optim.Adam([dict(params=actor), dict(params=[p for k, p in parameters.items() if k[:5] != "actor"])], 1e-2)
        for step in range(6):
            moves = kind is IQL or step % 2 == 0
            monkeypatch.setattr(torch, "randn_like", lambda like, step=step, i=i: noises[step][i])
            found = loss(as_tensordict(seen[step][i], spec))
            adam.param_groups[0]["lr"] = 1e-2 * math.cos(math.pi / 2 * step / 6) ** 2
            adam.zero_grad()
            sum(x for k, x in found.items() if k.startswith("loss_") and (moves or k != "loss_actor")).backward()
            adam.step()
            for name in (name for name in networks if name.startswith("target") and moves):
                for slow, quick in zip(networks[name], networks[name.removeprefix("target_")], strict=True):
                    slow.copy_((1 - made.polyak) * slow + made.polyak * quick.detach())
        for name, tensors in networks.items():
            for mine, right in zip(ours(made, name, i), tensors, strict=True):
                torch.testing.assert_close(mine.reshape(right.shape), right.detach(), **EXACT)
    assert torch.equal(made.policy.log_std, log_std) == (kind is TD3BC)
