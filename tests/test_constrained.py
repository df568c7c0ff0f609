"""ReBRAC and BCQ, which keep to the data's actions: their losses written out for one run at a time, and what BCQ takes."""

import math

import numpy as np
import pytest
import torch
from conftest import SMALL, draw, plain_network, random_batch, scales
from torch import nn
from torch.distributions import Normal, kl_divergence

from pgdlib import fast, guidance
from pgdlib.agents import bcq, stack
from pgdlib.agents.bcq import BCQ
from pgdlib.agents.rebrac import ReBRAC
from pgdlib.data import Normaliser

SEEDS, N, A = (3, 0, 11), SMALL.obs_dim, SMALL.action_dim


def agent(kind):
    """In float64; targets are not what they follow, as after training."""
    made = kind(SMALL, SEEDS, *scales(SMALL), hidden=(16, 12)).double()
    with torch.no_grad():
        for i, p in enumerate(p for name, p in made.named_parameters() if name.startswith("target")):
            p += 0.1 * draw(i, *p.shape)
    return made


def network(mlp, i, *after, norm=False):
    """Network `i` of a stack as torch's own layers; norm: relu is followed by torch's layer norm."""
    layers, made = plain_network(mlp, i, *after), []
    for layer in layers:
        made.append(layer)
        if norm and isinstance(layer, nn.ReLU):
            made.append(nn.LayerNorm(made[-2].out_features, dtype=torch.float64))
    return nn.Sequential(*made)


def parts_of(made, row):
    """Normalised observations and next ones, actions, reward and terminal of transitions [B, ...] of one run."""
    obs, next_obs = (made.policy.normalise(row[:, s]) for s in (SMALL.obs, SMALL.next_obs))
    return obs, next_obs, row[:, SMALL.actions], row[:, SMALL.reward], row[:, SMALL.terminal]


def assert_gradients(mine, plain, rows):
    """Of every layer of stacked networks `rows` against plain ones."""
    for i, layers in zip(rows, plain, strict=True):
        linear = [m for m in layers if isinstance(m, nn.Linear)]
        for k, layer in enumerate(linear):
            torch.testing.assert_close(mine.weights[k].grad[i], layer.weight.grad.T)
            torch.testing.assert_close(mine.biases[k].grad[i, 0], layer.bias.grad)


def test_the_losses_of_rebrac_written_out():
    made, batch = agent(ReBRAC), random_batch(n=8, spec=SMALL)
    with torch.no_grad():
        made.clone.log_std += torch.linspace(-1, 0, A)
    noise = 0.3 * draw(5, 3, 8, A, dtype=torch.float64).clamp(-0.5, 0.5)
    made.target_noise = lambda *args: noise
    parts, value = made.losses(batch, 4, SEEDS)
    sum(parts.values()).sum().backward()
    assert "policy" not in made.losses(batch, 5, SEEDS)[0]
    for i in range(3):
        obs, next_obs, actions, reward, terminal = parts_of(made, batch[i])
        twins = [network(made.q, k, norm=True) for k in (i, i + 3)]
        slow = [network(made.target_q, k, norm=True) for k in (i, i + 3)]
        policy, clone = (network(p.net, i, nn.Tanh()) for p in (made.policy, made.clone))
        with torch.no_grad():
            after = (network(made.target_policy.net, i, nn.Tanh())(next_obs) + noise[i]).clamp(-1, 1)
            least = torch.minimum(*(q(torch.cat([next_obs, after], 1))[:, 0] for q in slow))
            law = Normal(clone(next_obs), made.clone.log_std[i, 0].exp())
            away = (after**2 - 2 * after * law.mean + law.mean**2 + law.variance).sum(1)  # E (a - a')² of a' from the clone
            aim = reward + 0.99 * (1 - terminal) * (least - 0.5 * away)
        q = sum(((q(torch.cat([obs, actions], 1))[:, 0] - aim) ** 2).mean() for q in twins)
        own = policy(obs)
        least = torch.minimum(*(q(torch.cat([obs, own], 1))[:, 0] for q in twins))
        expected = dict(
            q=q, clone=-Normal(clone(obs), made.clone.log_std[i, 0].exp()).log_prob(actions).sum(1).mean(),
            policy=(0.1 * ((own - actions) ** 2).sum(1) - least / least.detach().abs().mean()).mean(),
        )  # fmt: skip
        for name, loss in expected.items():
            torch.testing.assert_close(parts[name][i], loss)
        q.backward(retain_graph=True)
        assert_gradients(made.q, twins, (i, i + 3))
        (expected["policy"] + expected["clone"]).backward()
        assert_gradients(made.policy.net, [policy], [i])
        assert_gradients(made.clone.net, [clone], [i])
        assert value[i].item() == pytest.approx(twins[0](torch.cat([obs, actions], 1)).mean().item())


def test_the_losses_of_bcq_written_out(monkeypatch):
    made, batch, drawn = agent(BCQ), random_batch(n=8, spec=SMALL), []
    monkeypatch.setattr(bcq, "draws", lambda *args: drawn.append(stack.draws(*args)) or drawn[-1])
    parts, _ = made.losses(batch, 4, SEEDS)
    sum(parts.values()).sum().backward()
    for i in range(3):
        obs, next_obs, actions, reward, terminal = parts_of(made, batch[i])
        twins, slow = ([network(m.q, k) for k in (i, i + 3)] for m in (made.policy, made.target))
        decoder, encoder = network(made.policy.decoder, i, nn.Tanh()), network(made.encoder, i)
        shift, slow_shift = (network(m.perturbation, i, nn.Tanh()) for m in (made.policy, made.target))
        first, second, *others = drawn[0][:, i]

        def q_of(q, shift, obs, latents, decoder=decoder):
            with torch.no_grad():
                a = decoder(torch.cat([obs, latents.clamp(-0.5, 0.5)], 1))
            return q(torch.cat([obs, (a + 0.05 * shift(torch.cat([obs, a], 1))).clamp(-1, 1)], 1))[:, 0]

        with torch.no_grad():
            values = [[q_of(q, slow_shift, next_obs, z) for q in slow] for z in others]
            best = torch.stack([0.75 * torch.minimum(*v) + 0.25 * torch.maximum(*v) for v in values]).max(0).values
            aim = reward + 0.99 * (1 - terminal) * best
        mean, log_std = encoder(torch.cat([obs, actions], 1)).chunk(2, 1)
        decoded = decoder(torch.cat([obs, mean + log_std.exp() * first], 1))
        divergence = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0)).mean()
        expected = dict(
            vae=((decoded - actions) ** 2).mean() + 0.5 * divergence,
            q=sum(((q(torch.cat([obs, actions], 1))[:, 0] - aim) ** 2).mean() for q in twins),
            policy=-q_of(twins[0], shift, obs, second).mean(),
        )
        assert len(others) == 10 and log_std.min() > -4
        for name, loss in expected.items():
            torch.testing.assert_close(parts[name][i], loss)
        (expected["q"] + expected["vae"]).backward()
        assert_gradients(made.policy.q, twins, (i, i + 3))  # the perturbation moves no critic
        expected["policy"].backward()
        for mine, plain in ((made.policy.decoder, decoder), (made.encoder, encoder), (made.policy.perturbation, shift)):
            assert_gradients(mine, [plain], [i])


def test_bcq_takes_the_best_of_its_samples(monkeypatch):
    """Of ten latents the one of the highest Q, in each state and run; the same whoever else is asked, and on every call."""
    monkeypatch.setattr(fast, "has_bfloat16", lambda device: False)  # in which two of them may be equally good
    policy, obs = agent(BCQ).policy.float(), 3 * draw(2, 6, N)
    latents = torch.randn(10, 3, 2, 2 * A, generator=torch.Generator().manual_seed(4)).clamp(-0.5, 0.5)
    found = policy.sample(obs, torch.Generator().manual_seed(4))
    for b in range(6):
        i, state = b // 2, policy.normalise(obs[b]).double()
        decoder, shift = (network(m.double(), i, nn.Tanh()) for m in (policy.decoder, policy.perturbation))
        a = torch.stack([decoder(torch.cat([state, z])) for z in latents[:, i, b % 2].double()])
        pairs = torch.cat([state.expand(10, N), a], 1)
        a = (a + 0.05 * shift(pairs)).clamp(-1, 1)
        best = network(policy.q.double(), i)(torch.cat([pairs[:, :N], a], 1)).argmax()
        torch.testing.assert_close(found[b].double(), a[best], rtol=0, atol=0.02)
        policy.float()
    acted = policy.act(obs.numpy())
    assert acted.shape == (6, A) and (acted == policy.act(obs.numpy())).all() and np.ptp(acted, 0).min() > 0.01
    np.testing.assert_allclose(policy.select([2, 0]).act(obs[[5, 4, 1, 0]].numpy()), acted[[5, 4, 1, 0]], atol=1e-6)
    assert not (policy.act(obs.numpy(), torch.Generator().manual_seed(1)) == acted).all()


def test_a_policy_without_a_density_cannot_guide():
    normaliser = Normaliser(SMALL).fit(draw(0, 40, SMALL.width))
    with pytest.raises(
        ValueError, match=r"policy=BestOfSamples is not allowed as a guide; it must have a density \(log_prob\)"
    ):
        guidance.Guide("explicit", agent(BCQ).policy, normaliser, 0.1, 10)
    assert math.isfinite(guidance.Guide("explicit", agent(ReBRAC).policy, normaliser, 0.1, 10).lam)
