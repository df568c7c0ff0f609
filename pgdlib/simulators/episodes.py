"""Episodes of a policy in a simulator, many side by side."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pgdlib.simulators import Simulator


@dataclass
class Episodes:
    """Rollouts of `n` episodes of T steps, which go on after the environment would have ended them."""

    obs: np.ndarray  # [n, T + 1, obs_dim]
    actions: np.ndarray  # [n, T, action_dim], as the policy gave them (the simulator clips)
    rewards: np.ndarray  # [n, T]
    ended: np.ndarray  # [n, T], whether the environment ends an episode there
    qpos: np.ndarray  # [n, T + 1, qpos_dim]
    qvel: np.ndarray  # [n, T + 1, qvel_dim]
    goals: np.ndarray  # [n, ...], what else a domain's states have (pen: its target [4]); [n, 0] where that is nothing

    def lengths(self, horizon: int | None = None) -> np.ndarray:
        """[n]: steps until the environment ends the episode, that one included, or `horizon` (by default all)."""
        ended = self.ended[:, :horizon]
        return np.where(ended.any(1), ended.argmax(1) + 1, ended.shape[1])

    def returns(self, horizon: int | None = None) -> np.ndarray:
        """[n]: the sum of rewards of these steps."""
        return (self.rewards * (np.arange(self.rewards.shape[1]) < self.lengths(horizon)[:, None])).sum(1)


def rollout(
    simulator: Simulator, act: Callable, n: int, rng: np.random.Generator | None = None, horizon: int | None = None,
    start: tuple | None = None, threads: int | None = None, whole: bool = True,
) -> Episodes:  # fmt: skip
    """`n` episodes of `horizon` steps (by default the simulator's), with `act(obs [n, obs_dim]) -> actions [n, action_dim]`.

    They begin with the states `start`, by default those that `rng` draws. Not `whole`: each goes no further than its end.
    """
    batch = simulator.batch(n, threads)
    start = simulator.start(n, rng) if start is None else start
    obs, states, actions, ended, going = [batch.begin(*start)], [batch.state()], [], [], np.arange(n)
    for _ in range(simulator.horizon if horizon is None else horizon):
        actions.append(np.asarray(act(obs[-1]), dtype=np.float64))
        obs.append(batch.step(actions[-1], going))
        states.append(batch.state())
        ended.append(simulator.ended(obs[-1]))
        if not whole and not len(going := np.flatnonzero(~ended[-1])):
            break
    obs, actions = np.stack(obs, 1), np.stack(actions, 1)
    rewards = simulator.reward(obs[:, :-1], actions.clip(-1, 1), obs[:, 1:])
    qpos, qvel = (np.stack([s[i] for s in states], 1) for i in (0, 1))
    goals = np.concatenate(start[2:], -1) if start[2:] else np.empty((n, 0))
    return Episodes(obs, actions, rewards, np.stack(ended, 1), qpos, qvel, goals)
