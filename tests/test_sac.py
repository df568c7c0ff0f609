"""SAC, CQL and EDAC: their losses and gradients against torchrl's, and against sums that are written out."""

import math

import pytest
import torch
from conftest import SMALL, SPEC, draw, plain_network, random_batch, scales
from tensordict.nn import TensorDictModule
from test_torchrl import EXACT, SEEDS, Critic, as_tensordict, ours, theirs
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import CQLLoss, SACLoss

from pgdlib.agents import cql, sac, stack
from pgdlib.agents.cql import CQL
from pgdlib.agents.edac import EDAC
from pgdlib.agents.sac import SAC

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")


def agent(kind, spec=SMALL, settings=None, **how):
    """In float64; targets are not what they follow, as after training, and temperatures are not one."""
    made = kind(spec, SEEDS, *scales(spec), hidden=(16, 12), **how).double()
    vars(made).update(settings or {})
    with torch.no_grad():
        made.q.weights[-1].mul_(8)
        made.log_temperature += torch.tensor([-1.0, 0.3, 0.7])
        for i, p in enumerate(made.target_q.parameters()):
            p += 0.1 * draw(i, *p.shape)
    return made


@pytest.fixture
def drawn(monkeypatch):
    """All noise of the agents' losses, in order."""
    found = []
    for module in (sac, cql):
        monkeypatch.setattr(module, "draws", lambda *args: found.append(stack.draws(*args)) or found[-1])
    return found


class Latent(nn.Module):
    """μ and σ of run `i`, as torchrl takes them; it is given normalised observations."""

    def __init__(self, policy, i):
        super().__init__()
        self.net = plain_network(policy.net, i)

    def forward(self, obs):
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean, log_std.clamp(-20, 2).exp()


def torchrls(made, i):
    """torchrl's loss with the weights of run `i`."""
    module = TensorDictModule(Latent(made.policy, i), ["observation"], ["loc", "scale"])
    actor = ProbabilisticActor(module, in_keys=["loc", "scale"], distribution_class=TanhNormal)
    twins = [ValueOperator(Critic(plain_network(made.q, k)), in_keys=["observation", "action"]) for k in (i, i + 3)]
    how = dict(loss_function="l2", target_entropy=-made.spec.action_dim)
    if isinstance(made, CQL):
        lagrange = dict(with_lagrange=made.lagrange is not None, lagrange_thresh=made.lagrange or 0.0)
        loss = CQLLoss(actor, twins, **how, **lagrange, min_q_weight=made.alpha, num_random=1)
    else:
        loss = SACLoss(actor, twins, **how)
    loss.log_alpha.data = made.log_temperature[i].detach().clone()
    loss.make_value_estimator(gamma=made.discount)
    loss.value_estimator.gamma = torch.tensor(made.discount, dtype=torch.float64)
    for right, mine in zip(theirs(loss)["target_q"], ours(made, "target_q", i), strict=True):
        right.copy_(mine.reshape(right.shape))
    return loss


@pytest.mark.parametrize("kind, spec", [(SAC, SPEC), (SAC, SMALL), (CQL, SPEC), (CQL, SMALL)])
def test_losses_and_gradients_are_torchrls(kind, spec, monkeypatch, drawn):
    """torchrl's CQL takes the next actions' values in the next states, and one sample of each kind at a time, so here too."""
    made, batch = agent(kind, spec, dict(alpha=3.0, samples=1, discount=0.9)), random_batch(spec=spec)
    if kind is CQL:
        batch[..., spec.next_obs] = batch[..., spec.obs]
    parts, value = made.losses(batch, 0, SEEDS)
    sum(parts.values()).sum().backward()
    assert not value.requires_grad and len(parts) == (4 if kind is CQL else 3)
    names = dict(policy="actor", q="qvalue", temperature="alpha", gap="cql")
    for i in range(3):
        loss, rows = torchrls(made, i), as_tensordict(batch[i], spec)
        own, after = drawn[0][:, i]
        uniform, here, there = drawn[1][:, i] if kind is CQL else (own, None, None)
        queue = iter([after, here, there, own, own] if kind is CQL else [after, own])
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "uniform_", lambda x, low, high, u=uniform: x.copy_(2 * Normal(0, 1).cdf(u) - 1))
            patched.setattr(torch.distributions.normal, "_standard_normal", lambda *args, queue=queue, **how: next(queue))
            found = loss(rows)
        for name, part in parts.items():
            torch.testing.assert_close(part[i], found[f"loss_{names[name]}"], rtol=1e-6, atol=1e-7)
        sum(found[f"loss_{names[name]}"] for name in parts).backward()
        for name in ("policy", "q"):
            for mine, right in zip(ours(made, name, i, lambda p: p.grad), theirs(loss)[name], strict=True):
                torch.testing.assert_close(mine.reshape(right.shape), right.grad, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(made.log_temperature.grad[i], loss.log_alpha.grad, **EXACT)


def test_the_gap_of_cql_written_out(drawn):
    """log ∑ exp over the actions of one state, each with torch's own density, and next actions in the same state."""
    made, batch, spec = agent(CQL, settings=dict(samples=4)), random_batch(n=3, spec=SMALL), SMALL
    found = made.soft_maximum(batch, 5, SEEDS)
    for i in range(3):
        twins, latent = [plain_network(made.q, k) for k in (i, i + 3)], Latent(made.policy, i)
        for b, row in enumerate(batch[i]):
            obs, next_obs = (made.policy.normalise(row[s]) for s in (spec.obs, spec.next_obs))
            for j, twin in enumerate(twins):
                total = 0.0
                for n, noise in enumerate(drawn[0][:, i, b]):
                    if n < 4:
                        action, log_density = 2 * Normal(0, 1).cdf(noise) - 1, spec.action_dim * math.log(0.5)
                    else:
                        mean, std = latent(obs if n < 8 else next_obs)
                        action = (mean + std * noise).tanh()
                        log_density = TransformedDistribution(Normal(mean, std), TanhTransform()).log_prob(action).sum()
                    total += (twin(torch.cat([obs, action])) - log_density).exp()
                assert found[j, i, b].item() == pytest.approx(total.log().item(), rel=1e-4)


def test_the_lagrange_multiplier_of_cql():
    """The weight grows where the gap is above τ, falls where it is below, and weighs the gap; off, nothing of it is there."""
    batch, fixed = random_batch(spec=SMALL), agent(CQL)
    gap = fixed.losses(batch, 0, SEEDS)[0]["gap"].detach()
    assert not hasattr(fixed, "log_multiplier")
    tau = gap.median().item() / 2
    made = agent(CQL, lagrange=tau)
    with torch.no_grad():
        made.log_multiplier += torch.tensor([0.5, 0.0, -0.5])
    parts, _ = made.losses(batch, 0, SEEDS)
    weight = made.log_multiplier.detach().exp()
    torch.testing.assert_close(parts["gap"], weight * (gap - 2 * tau))
    torch.testing.assert_close(parts["multiplier"], -0.5 * weight * (gap - 2 * tau))
    slope = torch.autograd.grad(sum(parts.values()).sum(), made.log_multiplier)[0]
    assert torch.equal(slope < 0, gap > 2 * tau) and 0 < (slope < 0).sum() < 3


def test_the_diversity_of_edac_written_out():
    """The cosines of every two critics' gradients, by autograd of plain networks one state at a time; and their gradients."""
    made, batch = agent(EDAC, settings=dict(eta=2.0)), random_batch(n=4, spec=SMALL)
    assert made.q.count == 20
    parts, _ = made.losses(batch, 0, SEEDS)
    parts["alike"].sum().backward()
    for i in (0, 2):
        critics, total = [plain_network(made.q, k) for k in range(i, 60, 3)], 0.0
        for row in batch[i]:
            obs, action = made.policy.normalise(row[SMALL.obs]), row[SMALL.actions].clone().requires_grad_()
            slopes = [torch.autograd.grad(c(torch.cat([obs, action]))[0], action, create_graph=True)[0] for c in critics]
            for j, a in enumerate(slopes):
                for k, b in enumerate(slopes):
                    total = total + (j != k) * torch.cosine_similarity(a, b, 0, 1e-10) / 19 / len(batch[i])
        torch.testing.assert_close(parts["alike"][i], 2.0 * total)
        (2.0 * total).backward()
        for k, critic in zip(range(i, 60, 3), critics, strict=True):
            torch.testing.assert_close(made.q.weights[0].grad[k], critic[0].weight.grad.T)
    torch.testing.assert_close(parts["q"], agent(EDAC, settings=dict(eta=0.0)).losses(batch, 0, SEEDS)[0]["q"])
