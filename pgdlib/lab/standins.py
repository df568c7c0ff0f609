"""The local stand-ins for D4RL's pen datasets, made with D4RL's recipe from two policies of our own.

expert   the guide, sampling its actions, 100-step episodes.
human    25 episodes of 200 steps by an imperfect demonstrator (`Demonstrator`) with another, weaker policy.
cloned   a policy behaviour-cloned from those 25: half its rollouts (100 steps), half copies of the demonstrations.

As in Minari's files, no episode ends at a fall.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from pgdlib import data
from pgdlib.agents.bc import BC
from pgdlib.agents.stack import Learner
from pgdlib.lab import artifacts, locks, minari_files
from pgdlib.policies import GaussianPolicy
from pgdlib.simulators import pen

HUMAN_EPISODES = 25
CHUNK = 256  # episodes simulated side by side


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
    """A `GaussianPolicy` fitted to `pen.Episodes` by maximum likelihood of their actions."""
    obs, next_obs = (torch.from_numpy(x).float().flatten(0, 1) for x in (demos.obs[:, :-1], demos.obs[:, 1:]))
    actions, rewards = torch.from_numpy(demos.actions).float().flatten(0, 1), torch.from_numpy(demos.rewards).float().flatten()
    rows = data.transitions(obs, actions, rewards, torch.zeros_like(rewards), next_obs)
    agent = BC(data.Spec(pen.OBS_DIM, pen.ACTION_DIM), [seed], obs.mean(0), obs.std(0).clamp_min(1e-3))
    agent.policy.low = False  # so that a stand-in does not depend on whether a machine multiplies bfloat16
    for _ in Learner(agent, [seed], steps, batch_size=256, learning_rate=1e-3).train([rows]):
        pass
    return agent.policy.requires_grad_(False)


def expert(guide, steps, seed, parts, report=lambda done: None):
    """Batches of `pen.Episodes`, together at least `steps` steps, by the guide's stochastic policy."""
    yield from _rollouts(guide, -(-steps // pen.D4RL_HORIZON), (seed, 0), parts, report)


def human(policy, seed):
    """One batch of 25 demonstrations of 200 steps by a `Demonstrator` with `policy`."""
    rng = np.random.default_rng([seed, 1])
    return pen.rollout(Demonstrator(policy).act(rng), HUMAN_EPISODES, rng)


def cloned(policy, steps, seed, parts, report=lambda done: None):
    """Batches of `pen.Episodes`: about half of `steps` by the cloned policy, half copies of the demonstrations."""
    demos = human(policy, seed)
    clone = clone_of(demos, seed)
    for _ in range(max(1, round(steps / 2 / demos.rewards.size))):
        yield demos
    yield from _rollouts(clone, -(-steps // 2 // pen.D4RL_HORIZON), (seed, 2), parts, report)


def steps_of(dataset, steps):
    """The steps of the stand-in where `steps` are asked for: *human* has always as many."""
    return HUMAN_EPISODES * pen.NATIVE_HORIZON if dataset == "human" else steps


def folder(dataset, steps, policy, card, progress, say):
    """The folder of the Minari dataset `dataset` by the guide `policy` with its `card`, collected if missing or damaged."""
    steps = steps_of(dataset, steps)
    key = artifacts.key(steps=steps, policy=card, code=artifacts.code_version("lab.standins"))
    whole = artifacts.root() / "minari" / f"{dataset}-{key}"
    place = whole / "standin" / "pen" / f"{dataset}-v0"
    if not minari_files.is_whole(place):  # which needs no lock, so no folder that can be written
        with locks.lock(whole):
            if place.exists() and not minari_files.is_whole(place):
                reason = f"{place} is damaged: its checksum does not hold"
                say(f"{reason}. Set aside as {artifacts.set_aside(whole, reason).name}; collecting it again.")
            if not place.exists():
                with progress(total=100, desc=f"collecting the stand-in {dataset}", unit="%", mininterval=2) as bar:
                    write(dataset, whole, policy, steps, lambda done: bar.update(round(100 * done) - bar.n))
    artifacts.note_use(whole)
    return place


def write(dataset, folder, policy, steps, report=lambda done: None, seed=0):
    """Collect the stand-in `dataset` with `policy` and write it as a Minari dataset under `folder`; its folder.

    The seed is fixed by default: like D4RL's, a stand-in is one dataset, not one for each run. Until it is complete, what was
    collected is kept in folder/parts, from where a run that was killed goes on to the same dataset.
    """
    parts = Path(folder) / "parts"
    if dataset == "human":
        batches = [human(policy, seed)]
    else:
        batches = {"expert": expert, "cloned": cloned}[dataset](policy, steps, seed, parts, report)
    text = f"Local stand-in for D4RL's pen {dataset} data; not D4RL. {__doc__}"
    place = minari_files.write_minari(folder, f"standin/pen/{dataset}-v0", batches, text)
    shutil.rmtree(parts, ignore_errors=True)
    return place


def _rollouts(policy, episodes, stream, parts, report):
    """Batches of `CHUNK` episodes, each with random numbers of its own and kept in `parts`, to be found by the next run."""
    weights = artifacts.digest(policy.state_dict())
    for first in range(0, episodes, CHUNK):
        n = min(CHUNK, episodes - first)

        def make(first=first, n=n):
            rng, std = np.random.default_rng([*stream, first]), policy.std.numpy()
            act = lambda obs: policy.act(obs) + std * rng.standard_normal((len(obs), pen.ACTION_DIM))  # noqa: E731
            batch = pen.rollout(act, n, rng, pen.D4RL_HORIZON)
            return {k: torch.from_numpy(v) for k, v in asdict(batch).items()}, {}

        name = artifacts.key(policy=weights, stream=stream, first=first, n=n)
        tensors, _ = artifacts.artifact(parts / f"{name}.safetensors", make, report=lambda message: None)
        yield pen.Episodes(**{k: v.numpy() for k, v in tensors.items()})
        report((first + n) / episodes)
