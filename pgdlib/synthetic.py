"""Synthetic data for stacked agents: from the diffusion model guided toward each run's own policy, or from the world model."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from pgdlib import guidance, measures, sampler, worldmodel
from pgdlib.data import Spec, transitions
from pgdlib.edm import Denoiser
from pgdlib.fast import generator, stream
from pgdlib.policies import Policy
from pgdlib.simulators import Simulator


@dataclass
class Batch:
    """What was generated for R runs: packed transitions [N_r, ...] (environment space) of each, and what became of it, [R]."""

    data: list
    kept: Tensor  # share of the generated steps that have a successor before the end, or are the end
    ended: Tensor  # share of trajectories that come to an end
    diverged: Tensor  # share of trajectories that diverged; they are left out
    log_likelihood: Tensor  # mean over trajectories, under the run's policy, nats per action dimension
    on_policy: Tensor  # that of the policy's own actions
    lam: Tensor  # the guidance weight, NaN without guidance


@dataclass
class Diffusion:
    """A denoiser and how trajectories are drawn from it (`sampler.sample`), about `chunk` at once.

    A run's noise comes from its own seed, by blocks (`sampler.chunks`): it does not depend on the other runs of a stack.
    """

    denoiser: Denoiser
    solver: str
    steps: int
    churn: float
    warmup: int
    chunk: int = 512

    def draw(
        self, policy: Policy, rule: str | None, lam: Tensor, n: int, seeds: list, number: int, name: str = "rounds"
    ) -> tuple[Tensor, Tensor]:
        """n trajectories for each run [R n, T, width] (normalised), guided by `rule` with weights lam [R], and diverged [R n].

        With no weight above zero any policy will do, and no rule is needed.
        The noise follows from the run's seed, of `seeds` [R], the `number`, such as that of the round, and the stream `name`.
        """
        if len(seeds) != policy.runs:
            raise ValueError(f"seeds={list(seeds)!r} is not allowed; it must hold one for each of the {policy.runs} runs")
        normaliser, parts = self.denoiser.normaliser, []
        weights = torch.as_tensor(lam, dtype=torch.float32, device=normaliser.mean.device)
        warmup, guided = self.warmup if rule in guidance.WARMED else 0, bool(weights.any())
        for blocks in sampler.chunks(n, self.chunk // policy.runs):
            streams = [stream(weights.device, name, seed, number) for seed in seeds]
            noise = [(of_run(i), size) for of_run in streams for i, size in blocks]
            each = weights.repeat_interleave(sum(size for _, size in blocks))
            guide = guidance.Guide(rule, policy, normaliser, each, self.steps, warmup) if guided else None
            shape = (len(each), self.denoiser.horizon, self.denoiser.spec.width)
            x, diverged = sampler.sample(self.denoiser, shape, self.steps, self.churn, noise, guide, self.solver)
            parts.append([v.unflatten(0, (policy.runs, -1)) for v in (x, diverged)])
        x, diverged = (torch.cat(each, 1) for each in zip(*parts))
        return x.flatten(0, 1), diverged.flatten()

    def generate(self, policy: Policy, rule: str | None, lam: Tensor, n: int, seeds: list, number: int) -> Batch:
        """A `Batch` of n trajectories for each run of the stacked `policy`, guided toward it; lam [R]."""
        x, diverged = self.draw(policy, rule, lam, n, seeds, number)
        spec, steps = self.denoiser.spec, self.denoiser.normaliser.denormalise(x)
        alive = measures.alive(steps[..., spec.terminal])
        likelihood = measures.log_likelihood(policy, steps[..., spec.obs], steps[..., spec.actions], alive)
        kept, ended = successors(spec, steps, alive) * ~diverged[:, None], (steps[..., spec.terminal] > 0.5).any(1) & ~diverged
        likelihood = torch.where(diverged, torch.nan, likelihood)
        facts = [kept.float().mean(1), ended.float(), diverged.float(), likelihood]
        runs = [v.unflatten(0, (policy.runs, n)) for v in (steps, alive, diverged)]
        return _batch(policy, steps[:, 0, spec.obs], [cut(spec, s, a * ~d[:, None]) for s, a, d in zip(*runs)], facts, lam)

    def log_likelihoods(self, policy: Policy, rule: str, lam: Tensor, n: int, seeds: list, number: int) -> Tensor:
        """The mean log-likelihood of n trajectories for each run under its policy, [R], nats per action dimension.

        Diverged ones are left out; NaN if all have. Their noise is of the stream "calibration".
        """
        x, diverged = self.draw(policy, rule, lam, n, seeds, number, "calibration")
        found = measures.log_likelihood(policy, self.denoiser.normaliser.obs(x), self.denoiser.normaliser.actions(x))
        return torch.where(diverged, torch.nan, found).unflatten(0, (policy.runs, n)).nanmean(1)


def successors(spec: Spec, steps: Tensor, alive: Tensor) -> Tensor:
    """[..., T]: which steps of trajectories [..., T, width] are transitions: alive, and followed by another or an end.

    The last step of a trajectory that does not end there has no successor.
    """
    ends = (steps[..., spec.terminal] > 0.5) & (alive > 0)
    followed = torch.zeros_like(ends)
    followed[..., :-1] = alive[..., 1:] > 0
    return followed | ends


def cut(spec: Spec, steps: Tensor, alive: Tensor) -> Tensor:
    """Packed transitions [N, transition_width] of trajectories [B, T, width] (environment space) with alive [B, T].

    Generated ends are thresholded at one half. What follows an end has no meaning and does not count: its own observation
    stands there.
    """
    taken, obs = successors(spec, steps, alive), steps[..., spec.obs]
    terminal = (steps[..., spec.terminal] > 0.5).float()
    following = torch.where(terminal[..., None] > 0, obs, obs.roll(-1, -2))
    # How many are taken decides a shape, for which a GPU is waited for: once.
    return transitions(obs, steps[..., spec.actions], steps[..., spec.reward], terminal, following)[taken]


def _batch(policy, first, data, facts, lam):
    """A `Batch` of `data`; facts [R n]: kept, ended, diverged, log_likelihood; on-policy in states `first` [R n, obs_dim]."""
    means = torch.stack([v.unflatten(0, (policy.runs, -1)).nanmean(1).float() for v in facts]).cpu()  # one wait for a GPU
    on_policy = measures.on_policy_log_likelihood(policy, first).cpu()
    return Batch(data, *means, on_policy, torch.as_tensor(lam, dtype=torch.float32).cpu())


def from_world_model(
    ensembles: worldmodel.Ensemble | list, policy: Policy, starts: Tensor, n: int, length: int, seeds: list, number: int,
    simulator: Simulator, penalise: Callable | None = None, halts: Callable | None = None,
) -> Batch:  # fmt: skip
    """A `Batch` of n rollouts of `length` steps for each run in the ensemble, from random states of `starts` [N, obs_dim].

    `ensembles` is one for all runs, or a list of their own. Reward and end are as `outcome` has them, or what
    `penalise(rollout, rewards, ends)` makes of these, [R n, length]; the steps that it ends, `halts(obs, actions)` [n] tells,
    so that a model which explodes after them does no harm. Each run's draws follow from its seed, of `seeds` [R], and the
    `number` of the round.
    """
    models, parts = ensembles if isinstance(ensembles, list) else [ensembles] * len(seeds), []
    for run, (model, seed) in enumerate(zip(models, seeds, strict=True)):
        noise = generator(starts.device, "world model", seed, number)
        ids = torch.randint(len(starts), (n,), generator=noise, device=starts.device)
        one, ended = policy.select([run]), partial(_own, simulator.ended)
        one, ended = _halting(one, ended, halts) if halts else (one, ended)
        parts.append(worldmodel.rollout(model, one, starts[ids], length, noise, ended))
    made = worldmodel.Rollout(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(worldmodel.Rollout)))
    rewards, ends = outcome(simulator, made)
    if penalise:
        rewards, ends = penalise(made, rewards, ends)
    alive = measures.alive(ends.float())
    taken = (alive > 0) & ~made.diverged[:, None]
    likelihood = measures.log_likelihood(policy, made.obs, made.actions, alive)
    facts = [taken.float().mean(1), (ends & taken).any(1).float(), made.diverged.float(), likelihood]
    whole = [made.obs, made.actions, rewards, ends.float(), made.next_obs, taken]
    runs = zip(*(v.unflatten(0, (policy.runs, n)) for v in whole))
    data = [transitions(*parts)[of_run] for *parts, of_run in runs]
    return _batch(policy, made.obs[:, 0], data, facts, torch.full((policy.runs,), torch.nan))


def outcome(simulator: Simulator, made: worldmodel.Rollout) -> tuple[Tensor, Tensor]:
    """Rewards and ends [B, T] of a rollout: the simulator's own functions of the imagined observations.

    Where it is `unknown`, rewards are the ensemble's, and nothing ends. The ensemble's Gaussian over rewards, which may jump,
    as at pen's success, draws noise of that size, and an expectile of noise is optimism.
    """
    ends = _own(simulator.ended, made.next_obs)
    if not simulator.states:
        return made.rewards, ends
    return _own(simulator.reward, made.obs, made.actions.clamp(-1, 1), made.next_obs).to(made.obs), ends


def _halting(policy, ended, halts):
    """The policy of one rollout and its ends [B, T], which come, too, with a step where `halts(obs, actions)` [B]."""
    last = []

    def sample(obs, noise):
        actions = policy.sample(obs, noise)
        last.append(halts(obs, actions))
        return actions

    return SimpleNamespace(sample=sample), lambda obs: ended(obs) | torch.stack(last, 1)


def _own(of, *tensors):
    """A function of the simulator: on the CPU, so that a GPU is waited for."""
    found = of(*(v.double().cpu().numpy() for v in tensors))
    return torch.as_tensor(found, device=tensors[0].device)


def mixed(synthetic: Tensor, real: Tensor, fraction: float, seed: int, number: int) -> Tensor:
    """Packed transitions of which `fraction` are real: draws from `real` [N, ...] added to `synthetic`, or real ones alone.

    The draws follow from the run's seed and the `number` of the round.
    """
    if fraction == 0:
        return synthetic
    if fraction == 1:
        return real
    count = round(len(synthetic) * fraction / (1 - fraction))
    draw = generator(real.device, "real", seed, number)
    return torch.cat([synthetic, real[torch.randint(len(real), (count,), generator=draw, device=real.device)]])
