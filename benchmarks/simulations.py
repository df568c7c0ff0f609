"""The paths without a network: the simulator, dynamics error, PPO's environments, datasets; and all stages end to end."""

import contextlib
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from benchmarks import baselines, counts, timing
from pgdlib import data, dynamics, guidance, sampler, synthetic
from pgdlib.agents import iql
from pgdlib.agents import stack as agents
from pgdlib.lab import guide_ppo, load, minari_files, settings
from pgdlib.simulators import pen as adroit
from pgdlib.simulators.episodes import rollout

EPISODES, STEPS = 64, 10  # of batch simulation; the gym loop, whose cost is linear, plays the first GYM_EPISODES
GYM_EPISODES = 8
TRAJECTORIES, LENGTH = 64, 32  # whose dynamics error is taken; the gym loop takes the first GYM_TRAJECTORIES
GYM_TRAJECTORIES = 4
PPO_ENVS, PPO_STEPS = 16, 32


def simulation(bench):
    """Steps of simulations side by side, on 1, 2 and 4 threads, against a gym environment one step at a time."""
    rng = np.random.default_rng(0)
    env, start = baselines.gym_env(), adroit.start(EPISODES, rng)
    actions = rng.uniform(-1, 1, (EPISODES, STEPS, adroit.PEN.action_dim))
    for threads in (n for n in (1, 2, 4) if n <= bench.threads):
        batch = adroit.PenBatch(EPISODES, threads)

        def ours(batch=batch):
            batch.begin(*start)
            return [batch.step(actions[:, t]) for t in range(STEPS)]

        yield bench.compare(
            "simulation",
            f"{EPISODES} x {STEPS} steps, {threads} threads",
            ours,
            lambda: baselines.play(env, start[2][:GYM_EPISODES], actions[:GYM_EPISODES]),
            EPISODES * STEPS,
            "steps",
            scale=EPISODES / GYM_EPISODES,
            against="gym loop",
            **(dict(target=2.3) if threads == 4 else {}),
        )


def dynamics_error(bench):
    """Dynamics error of trajectories of the shipped guide, per transition, the states' reconstruction included."""
    env, rng = baselines.gym_env(), np.random.default_rng(0)
    played = rollout(adroit.PEN, load.load_guide()[0].act, TRAJECTORIES, rng, LENGTH)
    obs, actions = played.obs[:, :-1], played.actions
    variance, few = obs.var((0, 1)) + 1e-6, slice(GYM_TRAJECTORIES)
    yield bench.compare(
        "dynamics error",
        f"{TRAJECTORIES} x {LENGTH} steps, {bench.threads} threads",
        lambda: dynamics.dynamics_error(adroit.PEN, obs, actions, variance, threads=bench.threads),
        lambda: baselines.dynamics_error(env, obs[few], actions[few], variance),
        TRAJECTORIES * (LENGTH - 1),
        "transitions",
        scale=TRAJECTORIES / GYM_TRAJECTORIES,
        against="gym loop",
        target=3.0,
    )


def ppo_steps(bench):
    """Environment steps of PPO, learning included, in a batch of simulations against as many gym environments in a row."""

    def learner(env):
        p = guide_ppo.DEFAULTS
        policy = dict(net_arch=p["hidden"], features_extractor_class=guide_ppo.ObservationNormaliser)
        rest = dict(batch_size=PPO_ENVS * PPO_STEPS, n_epochs=p["n_epochs"], policy_kwargs=policy, device="cpu", seed=0)
        model = PPO("MlpPolicy", env, n_steps=PPO_STEPS, **rest)
        return lambda: model.learn(PPO_ENVS * PPO_STEPS, reset_num_timesteps=False)

    yield bench.compare(
        "ppo",
        f"{PPO_ENVS} x {PPO_STEPS} steps, {bench.threads} threads",
        learner(guide_ppo.SimulatorVecEnv(adroit.PEN, PPO_ENVS, threads=bench.threads)),
        learner(DummyVecEnv([baselines.make_env] * PPO_ENVS)),
        PPO_ENVS * PPO_STEPS,
        "steps",
        against="gym environments",
    )


def datasets(bench):
    """Reading the stand-in human again, cutting it into windows, and drawing batches of them."""
    with temporary_runs() as folder:
        ours = partial(load.load_data, "human", "local", 5_000, quiet, str)
        trajectories = ours().data
        (place,) = (p.parent for p in folder.glob("minari/*/standin/pen/*/data"))
        plain = partial(minari_files.from_minari, place, "human")
        yield bench.compare("load", "5,000 steps", ours, plain, len(trajectories.rewards), "steps", against="Minari's HDF5")
    normaliser, horizon = data.Normaliser(trajectories.spec).fit(trajectories.packed()), 32
    ours, plain = (partial(made, trajectories, normaliser, horizon) for made in (data.Windows, baselines.PlainWindows))
    made, cut = ours(), plain()
    n, ids = len(made), torch.randint(len(made), (256,), generator=torch.Generator().manual_seed(0))
    against = dict(against="list of windows")
    yield bench.compare("windows", f"{n:,} of {horizon} steps", ours, plain, n, "windows", **against)
    draws, work = (partial(which.__getitem__, ids) for which in (made, cut)), counts.windows(len(ids), horizon)
    yield bench.compare("drawing", f"{len(ids)} of {horizon} steps", *draws, len(ids), "windows", "copy", work, **against)


def stages(bench):
    """Each stage of a small run from nothing (scale ci), as a share of the whole; measured once."""
    p, device, seconds = settings.defaults("ci", seed=0, transform="raw"), torch.device(bench.device), {}

    def timed(name, call, *arguments, **named):
        timing.synchronise(device)
        started = time.perf_counter()
        made = call(*arguments, **named)
        timing.synchronise(device)
        seconds[name] = time.perf_counter() - started
        return made

    with temporary_runs():
        dataset = timed("data", load.load_data, "cloned", "local", p.data_steps, quiet, str)
        made, _ = timed("training the denoiser", load.load_denoiser, dataset, p, device, quiet)
    policy = load.load_guide()[0].to(device)
    hook = guidance.Guide("explicit", policy, made.normaliser, 0.1, p.steps, p.warmup)
    shape, generator = (64, p.horizon, counts.SPEC.width), torch.Generator(device).manual_seed(0)
    x, _ = timed("guided sampling", sampler.sample, made, shape, p.steps, p.churn, generator, hook)
    steps = made.normaliser.denormalise(x)
    obs, actions = (steps[..., s].cpu().numpy() for s in (counts.SPEC.obs, counts.SPEC.actions))
    variance = dataset.data.variance
    timed("dynamics error", dynamics.dynamics_error, adroit.PEN, obs, actions, variance, threads=bench.threads)
    rows = synthetic.cut(steps, torch.ones(steps.shape[:2], device=device))
    seen, hidden = rows[:, counts.SPEC.obs], (p.hidden, p.hidden)
    agent = iql.IQL(counts.SPEC, [0, 1], seen.mean(0), seen.std(0), hidden).to(device)
    learner = agents.Learner(agent, [0, 1], p.agent_steps, p.agent_batch, p.agent_rate)
    timed("IQL, 2 seeds", list, learner.train([rows, rows], p.agent_steps))
    for name, taken in seconds.items():
        yield timing.Row("stages", name, "all stages", (taken / sum(seconds.values()),) * 3, rounds=1)


@contextlib.contextmanager
def temporary_runs():
    """An empty folder for what a run makes, gone afterwards."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, PGD_RUNS=folder):
        yield Path(folder)


@contextlib.contextmanager
def quiet(**options):
    """A progress bar that shows nothing."""
    yield SimpleNamespace(n=0, update=lambda done: None)
