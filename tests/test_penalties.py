"""MOPO's penalty, MOReL's halt and RAMBO's adversary against closed forms; their rows in the loop; what is refused."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, Ideal, a_policy, assert_same, draw, on, toy

from pgdlib import penalties, pgd, synthetic, worldmodel
from pgdlib.agents.bc import BC
from pgdlib.agents.bcq import BCQ
from pgdlib.agents.iql import IQL
from pgdlib.agents.sac import SAC
from pgdlib.agents.stack import Critics, Learner
from pgdlib.pgd import Row

DATA, SEEDS, STEPS = toy([200], spec=SMALL), [4, 9], 8
REAL = DATA.transitions()
OUTCOME = SimpleNamespace(reward=lambda obs, actions, after: after[..., 0], ended=lambda obs: obs[..., 1] > 1.5, states=["any"])
LOG_STD = torch.linspace(-2, -1, 8)


def an_ensemble(slopes=(0.0, 0.0, 0.0)):
    """Members of one linear layer: the changes of state are the first observation, normalised, times each one's slope [7]."""
    ensemble = worldmodel.Ensemble(7, 3, 3, 2, ())
    ensemble.fit_normalisation(DATA)
    with torch.no_grad():
        ensemble.weights[0].zero_()
        for m, slope in enumerate(slopes):
            ensemble.weights[0][m, 0, :7] = torch.as_tensor(slope)
        ensemble.biases[0][..., 8:] = 2 * LOG_STD
        ensemble.max_log_var.fill_(50.0)
        ensemble.min_log_var.fill_(-50.0)
    return ensemble.requires_grad_(False)


def policies(runs=2):
    return a_policy(SMALL, runs, scale=0.3).float().requires_grad_(False)


def imagined(method, ensemble, critics=None, number=1, **how):
    settings = policies(), critics, REAL, 30, STEPS, SEEDS, number, OUTCOME
    return penalties.imagined(method, ensemble, *settings, **how).data


def test_mopo_takes_the_largest_std_times_its_weight_from_the_reward():
    """Of an ensemble whose stds are the same everywhere: those of all outputs, in the data's units, as one norm."""
    plain, cautious = (imagined(m, an_ensemble(), length=4, penalty=2.5) for m in ("world model", "mopo"))
    penalty = 2.5 * LOG_STD.exp().norm()
    for a, b in zip(plain, cautious, strict=True):
        torch.testing.assert_close(a[:, SMALL.reward] - penalty, b[:, SMALL.reward])
        a[:, SMALL.reward] = b[:, SMALL.reward]
        assert torch.equal(a, b) and len(a) > 100


def test_the_discrepancy_is_that_of_the_two_members_furthest_apart():
    slopes, at = draw(0, 3, 7), (REAL[:, 0] - REAL[:, 0].mean()) / REAL[:, 0].std(unbiased=False)
    furthest = max((slopes[i] - slopes[j]).norm() for i in range(3) for j in range(3))
    found = penalties.discrepancy(an_ensemble(slopes), REAL[:, SMALL.obs][None], REAL[:, SMALL.actions][None])
    torch.testing.assert_close(found[0], furthest * at.abs(), rtol=1e-3, atol=1e-4)
    limit = penalties.threshold(an_ensemble(slopes), REAL, SMALL)
    torch.testing.assert_close(limit, furthest * (at.abs().mean() + 3 * at.abs().std()), rtol=1e-3, atol=1e-4)


def test_morel_halts_in_unknown_states():
    """They are told by the first observation alone, which grows until it diverges: but that comes after the halt."""
    slopes, std = torch.zeros(3, 7), REAL[:, 0].std(unbiased=False)
    slopes[:, 0] = torch.tensor([1.5, 1.6, 1.4])
    at = (REAL[:, 0] - REAL[:, 0].mean()).abs() / std
    limit, halted = at.mean() + 3 * at.std(), 0
    for plain, made in zip(*(imagined(m, an_ensemble(slopes), penalty=7.0) for m in ("world model", "morel")), strict=True):
        unknown = (made[:, 0] - REAL[:, 0].mean()).abs() / std > limit
        fallen = made[:, SMALL.next_obs][:, 1] > 1.5
        assert torch.equal(made[:, SMALL.terminal].bool(), unknown | fallen)
        rewards = torch.where(unknown, REAL[:, SMALL.reward].min() - 7.0, made[:, SMALL.next_obs][:, 0])
        torch.testing.assert_close(made[:, SMALL.reward], rewards)
        halted += unknown.sum().item()
        assert len(made) > 60 > len(plain)  # of which almost all diverge
    assert 30 < halted <= 60


@pytest.fixture(scope="module")
def trained():
    """An ensemble that knows the data, in which actions move the first observation."""
    data = toy([200], spec=SMALL)
    data.next_obs[:] = 0.9 * data.obs + 0.3 * data.next_obs
    data.next_obs[:, 0] += data.actions[:, 0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ensemble = worldmodel.Ensemble(7, 3, 3, 2, (32,))
        list(worldmodel.Training(ensemble, data, data, worldmodel.Recipe(200, 64, weight_decay=(1e-5,) * 2)))
    return ensemble.requires_grad_(False), data


def critics(runs=1):
    """Critics to which all states are worth nothing."""
    made = Critics(SMALL, (8,), [torch.Generator().manual_seed(0)] * runs).requires_grad_(False)
    for p in made.parameters():
        p.zero_()
    return made


@pytest.mark.slow
def test_rambos_model_lowers_the_value_and_the_prior_keeps_the_data_likely(trained, monkeypatch):
    """Rewards are the first observation, so that the value is its mean in rollouts; likelihoods by torch's own mixture."""
    monkeypatch.setattr(penalties, "RATE", 2e-3)
    ensemble, data = trained
    real, policy = data.transitions(), policies(1)

    def outcome(made):
        return made.next_obs[..., 0], torch.zeros_like(made.rewards, dtype=torch.bool)

    def value(model):
        return worldmodel.rollout(model, policy, data.obs, 3, torch.Generator().manual_seed(5)).next_obs[..., 0].mean().item()

    def likelihood(model):
        next_obs, _, std = model.predict(data.obs, data.actions)
        law = torch.distributions.Normal(next_obs[model.elites], std[model.elites][..., :-1])
        mixture = law.log_prob(data.next_obs).sum(-1).logsumexp(0) - math.log(2)
        scale = model.std[model.out][:-1].log().sum()  # of normalised changes
        ours = penalties._log_prob(model, data.obs, data.actions, data.next_obs)
        torch.testing.assert_close(ours, mixture + scale, rtol=1e-4, atol=1e-3)
        return mixture.mean().item()

    fair, adverse, wild = (penalties.rambo(ensemble, policy, critics(), real, outcome, lam, 3, 0, 1) for lam in (0.0, 1.0, 1e3))
    assert value(adverse) < value(fair) - 0.05 and value(wild) < value(fair) - 0.05
    assert likelihood(adverse) > likelihood(ensemble) > likelihood(wild)  # the prior goes on to learn the data
    again, other = (penalties.rambo(ensemble, policy, critics(), real, outcome, 1.0, 3, 0, k) for k in (1, 2))
    assert_same(again.state_dict(), adverse.state_dict())
    assert not torch.equal(other.weights[0], adverse.weights[0])


def test_rambo_knows_no_critic_in_the_first_round(trained, monkeypatch):
    monkeypatch.setattr(penalties, "UPDATES", 2)
    ensemble, _ = trained
    plain = imagined("world model", ensemble, number=0, length=5)
    first, second = imagined("rambo", ensemble, number=0), imagined("rambo", ensemble, critics(2), number=1)
    assert all(torch.equal(a, b) for a, b in zip(plain, first, strict=True))
    assert not torch.equal(second[0], imagined("world model", ensemble, number=1, length=5)[0])


ROWS = [Row(m, m, real_fraction=0.5) for m in ("mopo", "morel", "rambo")] + [Row("SynthER", "diffusion", None, 0.0)]


def rounds(kind, rows=ROWS, ensemble=None):
    seeds, diffusion = SEEDS * len(rows), synthetic.Diffusion(Ideal(SMALL), "multistep", 5, 0.0, 1)
    agent = kind(SMALL, seeds, torch.zeros(7), torch.ones(7), hidden=(6,))
    where = pgd.Sources(REAL, diffusion, ensemble or an_ensemble(), policies(), 6, 0.0, SEEDS, OUTCOME)
    return pgd.Rounds(Learner(agent, seeds, 9, batch_size=4, learning_rate=1e-2), rows, where, 4)


@pytest.mark.parametrize("kind", [IQL, SAC, BCQ])
def test_the_rows_run_and_go_on_to_the_same_bits(kind, monkeypatch):
    monkeypatch.setattr(penalties, "UPDATES", 2)
    whole = on(rounds(kind))
    assert whole.learner.diverged_at.tolist() == [-1] * 8 and whole.facts[:, -1].isfinite().all()
    assert whole.facts[:, 1].isfinite().all() == (kind is not BCQ)  # likelihoods
    half, again = on(rounds(kind), 6), rounds(kind)
    for name, tensor in again.state().items():
        tensor.copy_(half.state()[name])
    again.learner.step = 6
    assert_same(on(again).state(), whole.state())


@pytest.mark.parametrize("change", [dict(penalty=-0.5), dict(penalty=math.nan), dict(real_fraction=1.5), dict(length=0)])
def test_numbers_out_of_range_are_named(change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=rf"{name}={value} of row 'x' is not allowed; it must be "):
        Row("x", "mopo", **change)


def test_what_cannot_be_is_named_before_any_training():
    with pytest.raises(
        ValueError, match="source='mbpo' of row 'x' is not allowed; it must be one of 'real', 'diffusion', 'world"
    ):
        Row("x", "mbpo")
    with pytest.raises(ValueError, match="row 'x' is not allowed for BCQ: a policy without a density"):
        rounds(BCQ, [Row("x", "diffusion", "explicit", "calibrated")])
    with pytest.raises(ValueError, match="row 'rambo' is not allowed for BC: rambo's model works against critics"):
        rounds(BC)
    foreign = an_ensemble()
    foreign.mean[3] += 0.5 * foreign.std[3]
    with pytest.raises(ValueError, match=r"world_model is not allowed: it is of other data, with means up to 0.5 std"):
        rounds(IQL, ensemble=foreign)
    alone = rounds(IQL)
    alone.sources.world_model = None
    with pytest.raises(ValueError, match="source='mopo' of row 'mopo' is not allowed without a world model"):
        next(iter(alone))
