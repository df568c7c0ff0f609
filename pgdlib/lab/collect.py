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

from pgdlib.lab import artifacts, minari_files
from pgdlib.policies import GaussianPolicy
from pgdlib.simulators import pen as adroit

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
        mean = self.policy.act()
        seen, state = [], {}

        def choose(obs):
            seen.append(obs)
            shape = (len(obs), adroit.ACTION_DIM)
            decay = np.exp(-1.0 / self.memory)
            if not state:
                state["lag"] = rng.uniform(0, self.sluggishness, (len(obs), 1))
                state["tremor"] = rng.normal(0, self.tremor, shape)
                state["action"] = np.zeros(shape)
            intended = mean(seen[max(0, len(seen) - 1 - self.delay)])
            state["tremor"] = decay * state["tremor"] + np.sqrt(1 - decay**2) * rng.normal(0, self.tremor, shape)
            state["action"] = (1 - state["lag"]) * intended + state["lag"] * state["action"]
            return state["action"] + state["tremor"]

        return choose


def behaviour_clone(obs, actions, seed, steps=2_000, batch_size=256, lr=1e-3):
    """A `GaussianPolicy` fitted to `obs` [N, 45] and `actions` [N, 24] (environment space) by maximum likelihood."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = GaussianPolicy(adroit.OBS_DIM, adroit.ACTION_DIM, activation="relu")
    with torch.no_grad():
        policy.obs_mean.copy_(obs.mean(0))
        policy.obs_std.copy_(obs.std(0).clamp_min(1e-3))
        policy.log_std.fill_(-1.0)
    optimiser = torch.optim.Adam(policy.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(len(obs), (batch_size,), generator=generator)
        loss = -policy.log_prob(obs[ids], actions[ids]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return policy.requires_grad_(False)


def expert(guide, steps, seed, report=lambda done: None, parts=None):
    """Batches of `adroit.Episodes`, together at least `steps` steps, by the guide's stochastic policy."""
    yield from _rollouts(guide, -(-steps // adroit.D4RL_HORIZON), seed, 0, report, parts)


def human(policy, seed):
    """One batch of 25 demonstrations of 200 steps by a `Demonstrator` with `policy`."""
    rng = np.random.default_rng([seed, 1])
    return adroit.rollout(Demonstrator(policy).act(rng), HUMAN_EPISODES, rng)


def cloned(policy, steps, seed, report=lambda done: None, parts=None):
    """Batches of `adroit.Episodes`: about half of `steps` by the cloned policy, half copies of the demonstrations."""
    demos = human(policy, seed)
    obs, actions = (
        torch.from_numpy(x.astype(np.float32)).flatten(0, 1) for x in (demos.obs[:, :-1], demos.actions.clip(-1, 1))
    )
    clone = behaviour_clone(obs, actions, seed)
    for _ in range(max(1, round(steps / 2 / demos.rewards.size))):
        yield demos
    yield from _rollouts(clone, -(-steps // 2 // adroit.D4RL_HORIZON), seed, 2, report, parts)


def write(dataset, folder, policy, steps, report=lambda done: None, seed=0):
    """Collect the stand-in `dataset` with `policy` and write it as a Minari dataset under `folder`; its folder.

    The seed is fixed by default: like D4RL's, a stand-in is one dataset, not one for each run. Until it is complete, what was
    collected is kept in folder/parts, from where a run that was killed goes on to the same dataset.
    """
    parts = Path(folder) / "parts"
    if dataset == "human":
        batches = [human(policy, seed)]
    else:
        batches = {"expert": expert, "cloned": cloned}[dataset](policy, steps, seed, report, parts)
    text = f"Local stand-in for D4RL's pen {dataset} data; not D4RL. {__doc__}"
    place = minari_files.write_minari(folder, f"standin/pen/{dataset}-v0", batches, text)
    shutil.rmtree(parts, ignore_errors=True)
    return place


def _rollouts(policy, episodes, seed, stream, report, parts):
    rng, generator = np.random.default_rng([seed, stream]), torch.Generator().manual_seed(seed)
    act = policy.act(generator)
    key = artifacts.key(policy=artifacts.digest(policy.state_dict()), episodes=episodes, seed=seed, stream=stream, chunk=CHUNK)
    for first in range(0, episodes, CHUNK):
        n = min(CHUNK, episodes - first)

        def roll(n=n):
            return adroit.rollout(act, n, rng, adroit.D4RL_HORIZON)

        if parts is None or episodes <= CHUNK:
            yield roll()
        else:
            yield _part(parts / key / f"{first}.safetensors", roll, rng, generator)
        report((first + n) / episodes)


def _part(path, roll, rng, generator):
    """The episodes of `roll()`, kept at `path` with both random states as it leaves them; from there if they are there."""

    def make():
        tensors = {k: torch.from_numpy(v) for k, v in asdict(roll()).items()}
        return {**tensors, "generator": generator.get_state()}, {"rng": rng.bit_generator.state}

    tensors, card = artifacts.artifact(path, make, report=lambda message: None)
    generator.set_state(tensors.pop("generator"))
    rng.bit_generator.state = card["rng"]
    return adroit.Episodes(**{k: v.numpy() for k, v in tensors.items()})
