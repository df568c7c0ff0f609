"""What model-based methods do about the errors of their model: MOPO's penalty, MOReL's halt, RAMBO's adversary.

MBPO has none. Rewards and ends [B, T] of a rollout are the environment's own functions of what the model imagined.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pgdlib import synthetic, worldmodel
from pgdlib.agents.stack import Critics
from pgdlib.data import Spec
from pgdlib.fast import adam, generator
from pgdlib.policies import Policy, selected
from pgdlib.simulators import Simulator

# Of each method: what `Row.penalty` is by default, and the steps of a rollout, None for as many as a window has successors.
# MOPO (Yu et al. 2020) has λ and steps of 1 or 5, by dataset; MOReL (Kidambi et al. 2020) tunes its halt penalty for each task
# (in the authors' own code, mjrl's projects/morel, a halt has the reward 0 in both examples, of Hopper) and has long rollouts;
# RAMBO (Rigter et al. 2022) has rollouts of 2 or 5 steps, and λ = 3e-4 for a model that is made worse all training long: one
# that begins anew in every round would hardly move.
METHODS = {"world model": (0.0, None), "mopo": (1.0, 5), "morel": (50.0, None), "rambo": (0.1, 5)}
SPREAD = 3.0  # std of the data's discrepancy above its mean, beyond which a state is unknown; theirs: 0.5 or 3 of its maximum
SOME = 10_000  # transitions that tell the data's discrepancy
UPDATES, BATCH, RATE, DISCOUNT = 50, 256, 3e-4, 0.99  # of RAMBO's adversary in each round


def imagined(
    method: str, ensemble: worldmodel.Ensemble, policy: Policy, critics: Critics | None, real: Tensor, n: int, steps: int,
    seeds: list, number: int, simulator: Simulator, penalty: float | None = None, length: int | None = None,
) -> synthetic.Batch:  # fmt: skip
    """A `Batch` of as many steps for each run of `policy` as n rollouts of `steps` have, from states of `real` [N, ...].

    `method` is of `METHODS`, which have `penalty` and `length` where they are None. `critics`, those of the runs, are for
    rambo; in its first round, number 0, they know nothing, and are not used. The rest is as in `synthetic.from_world_model`.
    """
    spec, models, penalise, halts = Spec(ensemble.obs_dim, policy.action_dim), ensemble, None, None
    own_penalty, own_length = METHODS[method]
    penalty, length = own_penalty if penalty is None else penalty, min(length or own_length or steps, steps)
    if method == "mopo":
        penalise = lambda made, rewards, ends: (mopo(rewards, made.uncertainty, penalty), ends)  # noqa: E731
    elif method == "morel":
        limit, halt = threshold(ensemble, real, spec), real[:, spec.reward].min() - penalty

        def halts(obs, actions):
            return discrepancy(ensemble, obs, actions) > limit

        penalise = lambda made, rewards, ends: morel(rewards, ends, halts(made.obs, made.actions), halt)  # noqa: E731
    elif method == "rambo" and number > 0:
        models, outcome = [], partial(synthetic.outcome, simulator)
        for run, seed in enumerate(seeds):
            one, twins = policy.select([run]), selected(critics, [run], policy.runs)
            models.append(rambo(ensemble, one, twins, real, outcome, penalty, length, seed, number))
    how = real[:, spec.obs], n * steps // length, length, seeds, number, simulator, penalise, halts
    return synthetic.from_world_model(models, policy, *how)


def mopo(rewards: Tensor, uncertainty: Tensor, penalty: float) -> Tensor:
    """r - λ u (MOPO, Sec. 4.3): rewards less `penalty` times the ensemble's uncertainty, both [B, T]."""
    return rewards - penalty * uncertainty


@torch.no_grad()
def discrepancy(ensemble: worldmodel.Ensemble, obs: Tensor, actions: Tensor) -> Tensor:
    """How far apart the next observations of two members are at most (MOReL, Sec. 4) [...], at obs, actions [..., dim].

    In units of the std of the data's changes.
    """
    inputs = (torch.cat([obs, actions.clamp(-1, 1)], -1) - ensemble.mean[ensemble.into]) / ensemble.std[ensemble.into]
    parts = inputs.flatten(0, -2).split(4096)
    found = [torch.cdist(*2 * [ensemble(part)[0][..., :-1].movedim(0, 1)]).amax((1, 2)) for part in parts]
    return torch.cat(found).reshape(obs.shape[:-1])


def threshold(ensemble: worldmodel.Ensemble, real: Tensor, spec: Spec) -> Tensor:
    """The discrepancy beyond which a state is unknown: `SPREAD` std above the mean of real transitions [N, ...]."""
    some = real[:: -(-len(real) // SOME)]
    found = discrepancy(ensemble, some[:, spec.obs], some[:, spec.actions])
    return found.mean() + SPREAD * found.std()


def morel(rewards: Tensor, ends: Tensor, unknown: Tensor, halt: float | Tensor) -> tuple[Tensor, Tensor]:
    """Rewards and ends, all [B, T], where the first `unknown` step ends the rollout with the reward `halt` (MOReL, Def. 2)."""
    return torch.where(unknown, halt, rewards), ends | unknown


def rambo(
    ensemble: worldmodel.Ensemble, policy: Policy, critics: Critics, real: Tensor, outcome: Callable, penalty: float,
    length: int, seed: int, number: int,
) -> worldmodel.Ensemble:  # fmt: skip
    """The ensemble, a copy, made to lower the value of one `policy` while it keeps the data likely (RAMBO, Sec. 5).

    Each of `UPDATES` steps rolls out `length` steps, and descends λ E[A log p(s'|s, a)] - E_data[log p], with A the advantage,
    normalised, of s' over the least of the critics' Q(s, a); `penalty` is λ. `outcome(rollout)` gives rewards and ends [B, T].
    Every draw follows from the seed and the `number` of the round.

    It differs in that every round begins from the pre-trained ensemble, the paper's goes on; and that only observations
    are adversarial: rewards are the environment's.
    """
    model, spec = copy.deepcopy(ensemble).requires_grad_(True), Spec(ensemble.obs_dim, policy.action_dim)
    optimiser = adam(model.parameters(), RATE)
    for update in range(UPDATES):
        noise = generator(real.device, "world model", seed, number, update)
        starts, data = real[torch.randint(len(real), (2, BATCH), generator=noise, device=real.device)]
        made = worldmodel.rollout(model, policy, starts[:, spec.obs], length, noise)
        weight = _advantage(policy, critics, made, *outcome(made), noise)
        adverse = (weight * _log_prob(model, made.obs, made.actions, made.next_obs)).mean()
        rows = (data[:, s] for s in (spec.obs, spec.actions, spec.next_obs))
        optimiser.zero_grad()
        (penalty * adverse - _log_prob(model, *rows).mean()).backward()
        optimiser.step()
    return model.requires_grad_(False)


@torch.no_grad()
def _advantage(policy, critics, made, rewards, ends, noise):
    """r + γ Q(s', a') - Q(s, a) [B, T] with a' from the policy, of mean 0 and std 1 over the steps before an end, 0 after."""

    def q(obs, actions):
        pairs = torch.cat([policy.normalise(obs), actions.clamp(-1, 1)], -1)
        return critics(pairs.flatten(0, 1)[None]).amin(0).view_as(rewards)

    after = q(made.next_obs, policy.sample(made.next_obs, noise))
    found = rewards + DISCOUNT * ~ends * after - q(made.obs, made.actions)
    alive = ends.cumsum(1) - ends.long() == 0
    return torch.where(alive, (found - found[alive].mean()) / found[alive].std().clamp_min(1e-6), 0.0)


def _log_prob(model, obs, actions, next_obs):
    """log p(s'|s, a) [...] of the mixture of the elites, as `worldmodel.rollout` draws, in nats, normalised space."""
    inputs, spread = torch.cat([obs, actions.clamp(-1, 1)], -1), model.std[model.out][:-1]
    outputs = (next_obs - obs - model.mean[model.out][:-1]) / spread
    mean, log_var = model(((inputs - model.mean[model.into]) / model.std[model.into]).flatten(0, -2))
    each = -worldmodel.nll(mean[..., :-1], log_var[..., :-1], outputs.flatten(0, -2)).sum(-1)[model.elites]
    return (each.logsumexp(0) - torch.log(torch.tensor(float(len(each))))).reshape(obs.shape[:-1])
