"""The local stand-ins for D4RL's datasets, made with its recipes from policies of our own.

Adroit Pen:

expert   the guide, sampling its actions, 100-step episodes.
human    25 episodes of 200 steps by an imperfect demonstrator (`Demonstrator`) with another, weaker policy.
cloned   a policy behaviour-cloned from those 25: half its rollouts (100 steps), half copies of the demonstrations.

As in Minari's files, no episode ends at a fall.

Hopper, Walker2d and HalfCheetah, whose episodes end where the environment ends them; all policies sample their actions:

expert         the guide.
medium         the guide when its training had come to a third of its return.
medium-replay  five stages of its training up to that, in equal parts.
medium-expert  half medium, half expert.
random         uniform actions.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pgdlib import data
from pgdlib.agents.bc import BC
from pgdlib.agents.stack import Learner
from pgdlib.lab import artifacts, locks, minari_files, tasks
from pgdlib.policies import GaussianPolicy
from pgdlib.simulators import pen
from pgdlib.simulators.episodes import Episodes, rollout

HUMAN_EPISODES = 25
CHUNK = 256  # episodes simulated side by side, at most


@dataclass
class Demonstrator:
    """A policy acting through an imperfect body: late, with tremor, and with a sluggishness that differs by episode.

    a_t = b_t + tremor_t, b_t = (1 - g) mean(s_{t - delay}) + g b_{t-1}, where g in [0, sluggishness] is drawn for each episode
    and tremor is an Ornstein-Uhlenbeck process: stationary std `tremor`, correlation time `memory` steps.
    """

    policy: GaussianPolicy
    delay: int = 1  # steps of 10 ms
    tremor: float = 0.15
    memory: float = 10.0  # steps
    sluggishness: float = 0.6

    def act(self, rng):
        """A function obs [n, 45] -> actions [n, 24] for one batch of episodes."""
        seen, decay, slow = [], np.exp(-1.0 / self.memory), np.sqrt(1 - np.exp(-2.0 / self.memory))
        lag = action = tremor = None

        def choose(obs):
            nonlocal lag, action, tremor
            seen.append(obs)
            shape = (len(obs), pen.ACTION_DIM)
            if lag is None:
                lag, tremor = rng.uniform(0, self.sluggishness, (len(obs), 1)), rng.normal(0, self.tremor, shape)
                action = np.zeros(shape)
            intended = self.policy.act(seen[max(0, len(seen) - 1 - self.delay)])
            tremor = decay * tremor + slow * rng.normal(0, self.tremor, shape)
            action = (1 - lag) * intended + lag * action
            return action + tremor

        return choose


def clone_of(demos, seed, steps=2_000):
    """A `GaussianPolicy` fitted to `Episodes` by maximum likelihood of their actions."""
    obs, next_obs = (torch.from_numpy(x).float().flatten(0, 1) for x in (demos.obs[:, :-1], demos.obs[:, 1:]))
    actions, rewards = torch.from_numpy(demos.actions).float().flatten(0, 1), torch.from_numpy(demos.rewards).float().flatten()
    rows = data.transitions(obs, actions, rewards, torch.zeros_like(rewards), next_obs)
    agent = BC(data.Spec(pen.OBS_DIM, pen.ACTION_DIM), [seed], obs.mean(0), obs.std(0).clamp_min(1e-3))
    agent.policy.low = False  # so that a stand-in does not depend on whether a machine multiplies bfloat16
    for _ in Learner(agent, [seed], steps, batch_size=256, learning_rate=1e-3).train([rows]):
        pass
    return agent.policy.requires_grad_(False)


def expert(guide, steps, seed, parts, report=lambda done: None):
    """Batches of `Episodes`, together at least `steps` steps, by the guide's stochastic policy."""
    yield from _rollouts(pen.PEN, guide, steps, (seed, 0), parts, report)


def human(policy, seed):
    """One batch of 25 demonstrations of 200 steps by a `Demonstrator` with `policy`."""
    rng = np.random.default_rng([seed, 1])
    return rollout(pen.PEN, Demonstrator(policy).act(rng), HUMAN_EPISODES, rng, pen.NATIVE_HORIZON)


def cloned(policy, steps, seed, parts, report=lambda done: None):
    """Batches of `Episodes`: about half of `steps` by the cloned policy, half copies of the demonstrations."""
    demos = human(policy, seed)
    clone = clone_of(demos, seed)
    for _ in range(max(1, round(steps / 2 / demos.rewards.size))):
        yield demos
    yield from _rollouts(pen.PEN, clone, steps // 2, (seed, 2), parts, report)


def runner(simulator, policies, steps, seed, parts, report=lambda done: None):
    """Batches of `Episodes`, together at least `steps` steps, an equal part by each of `policies`; None acts at random."""
    for number, policy in enumerate(policies):
        of_part = lambda done, number=number: report((number + done) / len(policies))  # noqa: E731
        yield from _rollouts(simulator, policy, -(-steps // len(policies)), (seed, 3, number), parts, of_part, whole=False)


def steps_of(dataset, steps):
    """The steps of the stand-in where `steps` are asked for: *human* has always as many."""
    return HUMAN_EPISODES * pen.NATIVE_HORIZON if dataset == "human" else steps


def folder(dataset, steps, policies, cards, progress, say):
    """The folder of the Minari dataset `dataset` by `policies` with their `cards`, collected if missing or damaged."""
    steps = steps_of(dataset, steps)
    key = artifacts.key(steps=steps, policy=cards, code=artifacts.code_version("lab.standins"))
    whole = artifacts.root() / "minari" / f"{dataset}-{key}"
    place = whole / _id(dataset)
    if not minari_files.is_whole(place):  # which needs no lock, so no folder that can be written
        with locks.lock(whole):
            if place.exists() and not minari_files.is_whole(place):
                reason = f"{place} is damaged: its checksum does not hold"
                say(f"{reason}. Set aside as {artifacts.set_aside(whole, reason).name}; collecting it again.")
            if not place.exists():
                with progress(total=100, desc=f"collecting the stand-in {dataset}", unit="%", mininterval=2) as bar:
                    write(dataset, whole, policies, steps, lambda done: bar.update(round(100 * done) - bar.n))
    artifacts.note_use(whole)
    return place


def _id(dataset):
    """The id of a stand-in, as Minari writes ids."""
    return f"standin/{'pen/' if dataset in tasks.PEN else ''}{dataset.replace('-', '/', dataset not in tasks.PEN)}-v0"


def write(dataset, folder, policies, steps, report=lambda done: None, seed=0):
    """Collect the stand-in `dataset` with `policies` and write it as a Minari dataset under `folder`; its folder.

    The seed is fixed by default: like D4RL's, a stand-in is one dataset, not one for each run. Until it is complete, what was
    collected is kept in folder/parts, from where a run that was killed goes on to the same dataset.
    """
    parts, is_pen = Path(folder) / "parts", dataset in tasks.PEN
    if dataset == "human":
        batches = [human(*policies, seed)]
    elif is_pen:
        batches = {"expert": expert, "cloned": cloned}[dataset](*policies, steps, seed, parts, report)
    else:
        batches = runner(tasks.of_dataset(dataset).simulator, policies, steps, seed, parts, report)
    text = f"Local stand-in for the {'pen ' * is_pen}{dataset} data; not D4RL. {__doc__}"
    place = minari_files.write_minari(folder, _id(dataset), batches, text, whole=is_pen)
    shutil.rmtree(parts, ignore_errors=True)
    return place


def _rollouts(simulator, policy, steps, stream, parts, report, whole=True):
    """Batches of up to `CHUNK` episodes, each with random numbers of its own and kept in `parts`, to be found by the next run.

    Together they have `steps` steps, or a few more. Not `whole`: episodes count as far as the environment lets them go.
    """
    weights = artifacts.digest(policy.state_dict()) if policy else "random"
    at_once, first, done = max(8, min(CHUNK, steps // (8 * simulator.horizon))), 0, 0
    while done < steps:
        n = min(CHUNK, -(-steps // simulator.horizon) - first) if whole else at_once

        def make(first=first, n=n):
            rng = np.random.default_rng([*stream, first])

            def act(obs):
                shape = len(obs), simulator.action_dim
                return (
                    policy.act(obs) + policy.std.numpy() * rng.standard_normal(shape) if policy else rng.uniform(-1, 1, shape)
                )

            batch = rollout(simulator, act, n, rng, whole=whole)
            return {k: torch.from_numpy(v) for k, v in vars(batch).items()}, {}

        name = artifacts.key(policy=weights, stream=stream, first=first, n=n)
        tensors, _ = artifacts.artifact(parts / f"{name}.safetensors", make, report=lambda message: None)
        batch = Episodes(**{k: v.numpy() for k, v in tensors.items()})
        ends = done + np.cumsum(np.full(n, batch.rewards.shape[1]) if whole else batch.lengths())
        used = int((ends < steps).sum()) + 1
        yield Episodes(**{k: v[:used] for k, v in vars(batch).items()})
        first, done = first + n, int(ends[min(used, n) - 1])
        report(min(1.0, done / steps))
