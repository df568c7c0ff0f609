"""Synthetic data for stacked agents: from the diffusion model guided toward each run's own policy, or from the world model."""

from dataclasses import dataclass, fields

import torch

from pgdlib import data, guidance, measures, sampler, worldmodel
from pgdlib.agents.stack import transitions
from pgdlib.edm import seeded
from pgdlib.simulators import pen as adroit
from pgdlib.simulators.pen import ACTION_DIM

WARMED = ("explicit", "proximal", "annealed")  # rules that leave the highest noise unguided


@dataclass
class Batch:
    """What was generated for R runs: packed transitions [N_r, 116] (environment space) of each, and what became of it, [R]."""

    data: list
    kept: torch.Tensor  # share of the generated steps that have a successor before the end, or are the end
    ended: torch.Tensor  # share of trajectories that end by a fall
    diverged: torch.Tensor  # share of trajectories that diverged; they are left out
    log_likelihood: torch.Tensor  # mean over trajectories, under the run's policy, nats per action dimension
    on_policy: torch.Tensor  # that of the policy's own actions
    lam: torch.Tensor  # the guidance weight, NaN without guidance


@dataclass
class Diffusion:
    """A denoiser and how trajectories are drawn from it (`sampler.sample`), about `chunk` at once.

    A run's noise comes from its own seed, by blocks (`sampler.chunks`): it does not depend on the other runs of a stack.
    """

    denoiser: torch.nn.Module
    solver: str
    steps: int
    churn: float
    warmup: int
    chunk: int = 512

    def draw(self, policy, rule, lam, n, seeds, round):
        """n trajectories for each run [R n, T, 71] (normalised), guided by `rule` with weights lam [R], and diverged [R n].

        The noise follows from the run's seed, of `seeds` [R], the round and n.
        """
        if len(seeds) != policy.runs:
            raise ValueError(f"seeds={list(seeds)!r} is not allowed; it must hold one for each of the {policy.runs} runs")
        device, parts = self.denoiser.normaliser.mean.device, []
        weights = torch.as_tensor(lam, dtype=torch.float32, device=device)
        warmup = self.warmup if rule in WARMED else 0
        for blocks in sampler.chunks(n, self.chunk // policy.runs):
            noise = [(seeded(device, 2_000_000 + seed, 1_000 * round + i), size) for seed in seeds for i, size in blocks]
            each = weights.repeat_interleave(sum(size for _, size in blocks))
            guide = guidance.Guide(rule, policy, self.denoiser.normaliser, each, self.steps, warmup)
            shape = (len(each), self.denoiser.horizon, data.CHANNELS)
            x, diverged = sampler.sample(self.denoiser, shape, self.steps, self.churn, noise, guide, device, solver=self.solver)
            parts.append([v.unflatten(0, (policy.runs, -1)) for v in (x, diverged)])
        x, diverged = (torch.cat(each, 1) for each in zip(*parts))
        return x.flatten(0, 1), diverged.flatten()

    def generate(self, policy, rule, lam, n, seeds, round):
        """A `Batch` of n trajectories for each run of the stacked `policy`, guided toward it; lam [R]."""
        x, diverged = self.draw(policy, rule, lam, n, seeds, round)
        steps = self.denoiser.normaliser.denormalise(x)
        alive = measures.alive(steps[..., data.TERMINAL])
        likelihood = measures.log_likelihood(policy, steps[..., data.OBS], steps[..., data.ACTIONS], alive)
        runs = [v.unflatten(0, (policy.runs, n)) for v in (steps, alive, diverged, likelihood)]
        return Batch(
            [cut(s[~d], a[~d]) for s, a, d in zip(*runs[:3])],
            *self._fates(*runs),
            on_policy=on_policy(policy).cpu(),
            lam=torch.as_tensor(lam, dtype=torch.float32).cpu(),
        )

    def _fates(self, steps, alive, diverged, likelihood):
        kept = (successors(steps, alive) * ~diverged[..., None]).float().mean((1, 2))
        ended = ((steps[..., data.TERMINAL] > 0.5).any(2) & ~diverged).float().mean(1)
        likelihood = torch.where(diverged, torch.nan, likelihood).nanmean(1)
        return kept.cpu(), ended.cpu(), diverged.float().mean(1).cpu(), likelihood.float().cpu()

    def log_likelihoods(self, policy, rule, lam, n, seeds, round):
        """The mean log-likelihood of n trajectories for each run under its policy, [R], nats per action dimension.

        Diverged ones are left out; NaN if all have.
        """
        x, diverged = self.draw(policy, rule, lam, n, seeds, round)
        found = measures.log_likelihood(policy, self.denoiser.normaliser.obs(x), self.denoiser.normaliser.actions(x))
        return torch.where(diverged, torch.nan, found).unflatten(0, (policy.runs, n)).nanmean(1)


def successors(steps, alive):
    """[..., T]: which steps of trajectories [..., T, 71] are transitions: alive, and followed by another or an end themselves.

    The last step of a trajectory that does not end there has no successor.
    """
    ends = (steps[..., data.TERMINAL] > 0.5) & (alive > 0)
    followed = torch.zeros_like(ends)
    followed[..., :-1] = alive[..., 1:] > 0
    return followed | ends


def cut(steps, alive):
    """Packed transitions [N, 116] of trajectories [B, T, 71] (environment space) with alive [B, T].

    Generated ends are thresholded at one half. What follows an end has no meaning and does not count: its own observation
    stands there.
    """
    taken, following = successors(steps, alive), steps[..., data.OBS].roll(-1, -2)
    terminal = (steps[..., data.TERMINAL] > 0.5).float()
    following = torch.where(terminal[..., None] > 0, steps[..., data.OBS], following)
    parts = steps[..., data.OBS], steps[..., data.ACTIONS], steps[..., data.REWARD], terminal, following
    return transitions(*(v[taken] for v in parts))


def from_world_model(ensemble, policy, starts, n, length, seeds, round):
    """A `Batch` of n rollouts of `length` steps for each run in the ensemble, from random states of `starts` [N, 45].

    Reward and end are the environment's own functions of the imagined observation. The ensemble's Gaussian over rewards,
    which jump by 50 at success, draws noise of that size, and an expectile of noise is optimism. Each run's draws follow from
    its seed, of `seeds` [R], and the round.
    """
    parts = []
    for run, seed in enumerate(seeds):
        generator = seeded(starts.device, 3_000_000 + seed, round)
        ids = torch.randint(len(starts), (n,), generator=generator, device=starts.device)
        parts.append(worldmodel.rollout(ensemble, policy.select([run]), starts[ids], length, generator))
    made = worldmodel.Rollout(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(worldmodel.Rollout)))
    terminal = (made.next_obs[..., data.PEN_HEIGHT] < data.FALL_HEIGHT).float()
    taken = (made.alive > 0) & ~made.diverged[:, None]
    rewards = torch.as_tensor(adroit.outcome(made.next_obs.double().cpu().numpy())[0]).to(terminal)
    parts = [made.obs, made.actions, rewards, terminal, made.next_obs]
    runs = [v.unflatten(0, (policy.runs, n)) for v in (*parts, taken)]
    likelihood = measures.log_likelihood(policy, made.obs, made.actions, made.alive).unflatten(0, (policy.runs, n))
    ended = (terminal * taken).amax(1).unflatten(0, (policy.runs, n))
    return Batch(
        [transitions(*(v[r][runs[-1][r]] for v in runs[:-1])) for r in range(policy.runs)],
        runs[-1].float().mean((1, 2)).cpu(),
        ended.mean(1).cpu(),
        made.diverged.unflatten(0, (policy.runs, n)).float().mean(1).cpu(),
        likelihood.mean(1).float().cpu(),
        on_policy(policy).cpu(),
        torch.full((policy.runs,), torch.nan),
    )


def on_policy(policy):
    """The mean log-likelihood of each run's own actions [R], -H(π) / 24, nats per action dimension."""
    return -policy.entropy() / ACTION_DIM


def mixed(synthetic, real, fraction, seed, number):
    """Packed transitions of which `fraction` are real: draws from `real` [N, 116] added to `synthetic`, or real ones alone.

    The draws follow from the run's seed and the `number` of the round.
    """
    if fraction == 0:
        return synthetic
    if fraction == 1:
        return real
    count = round(len(synthetic) * fraction / (1 - fraction))
    ids = torch.randint(len(real), (count,), generator=seeded(real.device, 4_000_000 + seed, number), device=real.device)
    return torch.cat([synthetic, real[ids]])


def calibrate(log_likelihoods, targets, lowest=1e-3, highest=30.0, rounds=8):
    """The λ of each run [R] at which `log_likelihoods(lam [R])` [R], all from the same noise, meets `targets` [R].

    Bisection in log λ, all runs at once; 0 where unguided trajectories are at the target already, `highest` where it is out
    of reach.
    """
    unguided = log_likelihoods(torch.zeros_like(targets))

    def enough(lam):
        found = log_likelihoods(lam)
        return (found >= targets) | ~(found > unguided - 1)  # less likely than unguided, or diverged: beyond the rule's limit

    low, high = torch.full_like(targets, lowest), torch.full_like(targets, highest)
    done, reached = unguided >= targets, enough(high)
    for _ in range(rounds):
        middle = (low * high).sqrt()
        above = enough(middle)
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    found = torch.where(reached, (low * high).sqrt(), highest)
    return torch.where(done, 0.0, found)
