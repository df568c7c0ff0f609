"""All of the core in an environment of other sizes: a disc that is pushed about, and lost when it is too far away."""

import numpy as np
import pytest
import torch

from pgdlib import calibrate, data, dynamics, edm, fast, guidance, measures, pgd, policies, sampler, synthetic, worldmodel
from pgdlib.agents import bc, iql, stack, td3_bc
from pgdlib.simulators import Simulator

SPEC, HORIZON, STEPS = data.Spec(5, 2), 8, 8  # place and velocity in two dimensions, and how far away it is


class Discs:
    """n discs in closed loop."""

    def __init__(self, n, threads=None):
        self.n = n

    def set_state(self, qpos, qvel):
        self.qpos, self.qvel = qpos.copy(), qvel.copy()
        return np.concatenate([qpos, qvel, np.linalg.norm(qpos, axis=1, keepdims=True)], 1)

    place = set_state

    def step(self, actions):
        velocity = 0.9 * self.qvel + 0.3 * np.clip(actions, -1, 1)
        return self.set_state(self.qpos + 0.1 * velocity, velocity)

    def state(self):
        return self.qpos, self.qvel


DISC = Simulator(
    name="disc", obs_dim=5, action_dim=2, qpos_dim=2, qvel_dim=2, dt=0.1, groups=dict(place=slice(0, 2), rest=slice(2, 5)),
    horizon=25, batch=Discs, start=lambda n, rng: tuple(rng.normal(0, 0.5, (2, n, 2))), references=None,
    states=dict(reconstructed=lambda obs, actions: (obs[..., :2], obs[..., 2:4])),
    reward=lambda obs, actions, next_obs: -next_obs[..., 4], ended=lambda obs: obs[..., 4] > 1.5,
    within_reach=lambda qpos, qvel: np.isfinite(qpos).all(-1), with_goal=lambda obs, start: obs,
)  # fmt: skip


@pytest.fixture(scope="module")
def true():
    """obs [30, 26, 5], actions [30, 26, 2], and `Trajectories` of the same, cut where a disc is lost."""
    rng, discs = np.random.default_rng(0), Discs(30)
    obs, actions = [discs.set_state(*DISC.start(30, rng))], rng.normal(0, 0.7, (30, 26, 2))
    obs = np.stack(obs + [discs.step(actions[:, t]) for t in range(25)], 1)
    before, acted, after = (torch.tensor(x).float().flatten(0, 1) for x in (obs[:, :-1], actions[:, :-1], obs[:, 1:]))
    reward = DISC.reward(before, acted, after)
    whole = data.Trajectories(before, acted, reward, 0 * reward, after, torch.full((30,), 25))
    return obs, actions, data.end_where(whole, DISC.ended(after))[0]


@pytest.fixture(scope="module")
def denoiser(true):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = edm.Denoiser(5, 2, HORIZON, 16, 1, transform="arctanh")
    model.normaliser.fit(true[2].packed())
    training = edm.Training(model, data.Windows(true[2], model.normaliser, HORIZON), edm.Recipe(150, 32, 3e-3))
    assert [*training] == [*range(1, 151)] and training.losses[-30:].mean() < training.losses[:30].mean() - 0.2
    return training.ema


def a_policy(runs=1):
    """Policies that push to one side, all the time, which no trajectory of the data does."""
    policy = policies.GaussianPolicy(5, 2, (8,), generators=[torch.Generator().manual_seed(r) for r in range(runs)])
    policy.log_std.data.fill_(-0.8)
    policy.net.biases[-1].data.add_(0.6)
    return policy.requires_grad_(False)


def likelihoods(denoiser, rule, lam, n=64, number=0):
    guide = guidance.Guide(rule, a_policy(), denoiser.normaliser, lam, STEPS, 1 if rule in guidance.WARMED else 0)
    noise, shape = fast.stream("cpu", "drawing", 0, number), (n, HORIZON, SPEC.width)
    x, diverged = sampler.draw(denoiser, shape, STEPS, 0.0, noise, guide, "multistep", most=32)
    assert x.shape == shape and not diverged.any()
    return measures.log_likelihood(a_policy(), denoiser.normaliser.obs(x), denoiser.normaliser.actions(x))


def test_sizes_are_the_datas_and_true_transitions_have_no_error(true):
    obs, actions, episodes = true
    assert episodes.spec == SPEC and 0 < episodes.terminals.sum() < 30 and len(episodes.rewards) < 750
    assert episodes.transitions().shape == (len(episodes.rewards), 14) and episodes.variance.shape == (5,)
    error = dynamics.dynamics_error(DISC, obs, actions, np.ones(5))
    assert error.squared.shape == (30, 25, 5) and error.plain.max() < 1e-20 and error.by_group().keys() == DISC.groups.keys()
    assert dynamics.open_loop_error(DISC, obs, actions, np.ones(5), 20).plain.max() < 1e-20
    assert dynamics.dynamics_error(DISC, obs, actions[:, ::-1], np.ones(5)).plain.min() > 1e-3


@pytest.mark.parametrize("rule, lam", [*zip(guidance.RULES, [0.5, 3.0, 3.0, 1.0, 5.0, 1.0], strict=True)])
def test_every_rule_makes_trajectories_more_likely(rule, lam, denoiser):
    assert likelihoods(denoiser, rule, lam).mean() > likelihoods(denoiser, rule, 0.0).mean() + 1


def test_a_weight_is_calibrated(denoiser):
    target = float(measures.on_policy_log_likelihood(a_policy()))
    found = calibrate.calibrate(lambda *given: likelihoods(denoiser, "proximal", *given), target, most=1024)
    assert 0 < found.lam < 100 and found.log_likelihood == pytest.approx(target, abs=0.02 * abs(target))


@pytest.mark.parametrize("kind", [iql.IQL, td3_bc.TD3BC, bc.BC])
def test_a_round_of_every_agent(kind, denoiser, true):
    """On real data, guided data, and rollouts of a world model that is trained here."""
    torch.manual_seed(0)
    episodes, ensemble = true[2], worldmodel.Ensemble(5, 2, 3, 2, (16,))
    recipe = worldmodel.Recipe(20, 32, weight_decay=(1e-5, 1e-5))
    training = worldmodel.Training(ensemble, *data.split(episodes, 0.2, 0), recipe)
    assert [*training] == [*range(1, 21)] and training.losses[-1] < training.losses[0]
    rows = [pgd.Row("r", "real"), pgd.Row("d", "diffusion", "proximal", 1.0), pgd.Row("w", "world model")]
    diffusion, seeds = synthetic.Diffusion(denoiser, "multistep", STEPS, 0.0, 1), [0, 1]
    sources = pgd.Sources(episodes.transitions(), diffusion, ensemble, a_policy(2), 16, 0.5, seeds, DISC)
    agent = kind(SPEC, seeds * 3, episodes.obs.mean(0), episodes.obs.std(0), (8,))
    learner = stack.Learner(agent, seeds * 3, 4, batch_size=8)
    for now in pgd.Rounds(learner, rows, sources, 4):
        assert [len(d[0]) for d in now.data] == [14] * 6 and [*learner.train(now.data, now.end)] == [1, 2, 3, 4]
    assert learner.diverged_at.tolist() == [-1] * 6 and agent.policy.act(episodes.obs[:12].numpy()).shape == (12, 2)
