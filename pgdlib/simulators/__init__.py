"""Simulators: what happens to a state under an action, many simulations side by side. One file a domain."""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np


@dataclass(frozen=True)
class Simulator:
    """What the core asks of a simulator. Arrays are numpy, in environment space; n simulations or rows, B trajectories.

    A state is qpos and qvel first, and what else the domain has (pen: its target). A batch, `batch(n, threads)`, is n
    simulations in closed loop (`simulators.batch.Batch`): `begin(*state, ids)` starts episodes, `set_state(*state)` gives the
    observations [n, obs_dim] there, `place(*state)` does without them, `step(actions [n, action_dim], ids)` steps simulations
    ids (all) and gives all observations, NaN for what it cannot simulate, and `state()` gives copies of the state.
    """

    name: str
    obs_dim: int
    action_dim: int
    qpos_dim: int
    qvel_dim: int
    dt: float  # s, between observations
    horizon: int | None  # steps of an episode
    groups: dict[str, slice]  # of the observation, for tables
    batch: Callable | None  # (n, threads) -> a batch
    start: Callable | None  # (n, rng) -> the states that n episodes begin with
    states: dict[str, Callable]  # estimator -> function (obs [B, T, obs_dim], actions) -> (qpos, qvel) [B, T, ...]
    within_reach: Callable | None  # (qpos, qvel) [n, ...] -> [n], whether simulating from there means something
    reward: Callable  # (obs, actions, next_obs) [..., dim] -> [...], of the step between them
    ended: Callable  # (obs [..., obs_dim]) -> [...], whether the step that led there ended the episode
    with_goal: Callable  # (obs [..., obs_dim], start [..., obs_dim]) -> obs, its goal being that of `start`; in place
    references: tuple[float, float] | None  # D4RL's returns of a random policy and of an expert

    def score(self, returns: float | np.ndarray) -> float | np.ndarray:
        """D4RL's normalised score (0 random, 100 expert) of returns on D4RL's scale; NaN where there are no `references`."""
        low, high = self.references or (np.nan, np.nan)
        return 100.0 * (returns - low) / (high - low)


def unknown(name: str, obs_dim: int, action_dim: int, horizon: int) -> Simulator:
    """Stands for an environment that cannot be simulated here: it has no batch and no states, and knows no reward or end."""
    never = lambda obs: np.zeros(obs.shape[:-1], dtype=bool)  # noqa: E731
    reward = lambda obs, actions, next_obs: np.full(obs.shape[:-1], np.nan)  # noqa: E731
    whole, same = {"observation": slice(0, obs_dim)}, lambda obs, start: obs
    return Simulator(
        name, obs_dim, action_dim, 0, 0, 1.0, horizon, whole, None, None, {}, None, reward, never, same, None
    )  # fmt: skip


def advance(
    simulator: Simulator, qpos: np.ndarray, qvel: np.ndarray, actions: np.ndarray, threads: int | None = None, chunk: int = 4096
) -> np.ndarray:
    """One control step from each state qpos, qvel [n, ...] with `actions` [n, action_dim]: the next observations [n, obs_dim].

    A goal is that of an untouched simulation. A row is NaN where the state is outside the simulator's reach
    (`within_reach`) or it gives up.
    """
    out = np.full((len(qpos), simulator.obs_dim), np.nan)
    rows = np.flatnonzero(simulator.within_reach(qpos, qvel))
    batch = simulator.batch(min(chunk, len(rows)), threads) if len(rows) else None
    for first in range(0, len(rows), chunk):
        ids = rows[first : first + chunk]
        padded = np.resize(ids, batch.n)  # the last chunk is filled up with rows again
        batch.place(qpos[padded], qvel[padded])
        out[ids] = batch.step(actions[padded])[: len(ids)]
    return out


def default_threads() -> int:
    """The number of cores this process may use; no more than OMP_NUM_THREADS, where it is set."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # OpenMP takes a list, a number for each level
    return min(cores, int(asked)) if asked.isdecimal() and int(asked) else cores


def import_mujoco() -> ModuleType:
    """MuJoCo, also where $MUJOCO_GL names a way to draw that does not work here: simulating needs none."""
    try:
        return importlib.import_module("mujoco")
    except Exception:  # of whatever kind: they come from PyOpenGL, GLFW or the system
        if (way := os.environ.get("MUJOCO_GL")) is None:
            raise
    os.environ["MUJOCO_GL"] = "disable"  # MuJoCo reads it as it is imported
    try:
        return importlib.import_module("mujoco")
    finally:
        os.environ["MUJOCO_GL"] = way
