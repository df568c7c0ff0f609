"""Train a guide: Stable-Baselines3's PPO on episodes as long as D4RL's, in a batch of simulations."""

import functools
import math
import time

import numpy as np
import torch
from gymnasium.spaces import Box
from stable_baselines3 import PPO
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from pgdlib import fast, measures
from pgdlib.lab import guide_zip
from pgdlib.simulators import Simulator, locomotion
from pgdlib.simulators.episodes import rollout

# Found on Adroit Pen; the paper does not give its own.
OWN = dict(steps=5_000_000, n_envs=64, lr=3e-4, final_lr=3e-5, hidden=[256, 256], initial_log_std=-0.7)
SB3 = dict(n_steps=128, batch_size=1024, n_epochs=10, gamma=0.99, gae_lambda=0.95, clip_range=0.2)  # by SB3's own names
DEFAULTS = {**OWN, **SB3}
SMALL = dict(hidden=[64, 64], n_envs=32, batch_size=64, initial_log_std=0.0, steps=1_500_000)
OF_TASK = {name: SMALL for name in locomotion.RUNNERS}  # what differs there; with as much noise Hopper learns to stand still
OF_TASK["hopper"] = SMALL | dict(n_envs=16, n_steps=256, initial_log_std=-1.0, steps=1_000_000)


class SimulatorVecEnv(VecEnv):
    """`n` environments of a `Simulator` as one Stable-Baselines3 `VecEnv`; ended episodes start anew at once."""

    def __init__(self, simulator: Simulator, n, seed=0, threads=None):
        obs = Box(-np.inf, np.inf, (simulator.obs_dim,), np.float32)
        super().__init__(n, obs, Box(-1.0, 1.0, (simulator.action_dim,), np.float32))
        self._simulator, self._batch = simulator, simulator.batch(n, threads)
        self.seed(seed)

    def seed(self, seed=None):
        """Draw the starts of new episodes from `seed` on."""
        self._rng = np.random.default_rng(seed)

    def reset(self):
        self._returns, self._lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=int)
        self._obs = self._batch.begin(*self._simulator.start(self.num_envs, self._rng))
        return self._obs.astype(np.float32)

    def step_async(self, actions):
        self._actions = actions

    def step_wait(self):
        obs = self._batch.step(self._actions)
        rewards, fallen = self._simulator.reward(self._obs, self._actions, obs), self._simulator.ended(obs)
        self._returns += rewards
        self._lengths += 1
        dones = fallen | (self._lengths >= self._simulator.horizon)
        infos = [{} for _ in range(self.num_envs)]
        ended = np.flatnonzero(dones)
        for i in ended:
            whole = {"r": self._returns[i], "l": int(self._lengths[i]), "t": time.time()}
            last = obs[i].astype(np.float32)
            infos[i] = {"terminal_observation": last, "TimeLimit.truncated": not fallen[i], "episode": whole}
        if len(ended):
            obs[ended] = self._batch.begin(*self._simulator.start(len(ended), self._rng), ids=ended)
            self._returns[ended], self._lengths[ended] = 0.0, 0
        self._obs = obs
        return obs.astype(np.float32), rewards.astype(np.float32), dones, infos

    def close(self):
        pass

    def env_is_wrapped(self, wrapper_class, indices=None):
        return [False] * self.num_envs

    def get_attr(self, attr_name, indices=None):
        return [getattr(self, attr_name, None)] * self.num_envs

    def set_attr(self, *_, **__):
        raise NotImplementedError("SimulatorVecEnv's environments have no attributes or methods of their own")

    env_method = set_attr


class ObservationNormaliser(BaseFeaturesExtractor):
    """Running mean and variance of the observations as buffers, so that the saved policy carries them."""

    def __init__(self, observation_space, clip=10.0):
        super().__init__(observation_space, features_dim=observation_space.shape[0])
        self.clip = clip
        self.register_buffer("count", torch.tensor(0.0))
        self.register_buffer("mean", torch.zeros(self.features_dim))
        self.register_buffer("var", torch.ones(self.features_dim))

    def forward(self, obs):
        return ((obs - self.mean) / (self.var + 1e-8).sqrt()).clamp(-self.clip, self.clip)

    @torch.no_grad()
    def update(self, obs):
        """Merge the moments of `obs` [n, obs_dim] into the running ones (Chan et al. 1979)."""
        obs = torch.as_tensor(obs, dtype=torch.float32)
        n, mean, var = len(obs), obs.mean(0), obs.var(0, unbiased=False)
        total, delta = self.count + n, mean - self.mean
        self.var.copy_((self.var * self.count + var * n + delta.square() * self.count * n / total) / total)
        self.mean.add_(delta * n / total)
        self.count.copy_(total)


class Training:
    """PPO as a loop: iterated, it yields the environment steps done after each rollout and its updates, until `steps`.

    `state()` holds the policy, its optimiser, the scale of the rewards and the curve, not the simulations and not the random
    numbers: a training that goes on from it begins new episodes, with random numbers of their own.
    """

    def __init__(self, simulator, seed=0, evaluate_every=250_000, **overrides):
        """`overrides` replace entries of `DEFAULTS`; `steps` is rounded up to whole rollouts."""
        p = {**DEFAULTS, **overrides}
        self.card = {**p, "simulator": simulator.name, "seed": seed, "evaluate_every": evaluate_every}
        self._simulator = simulator
        self.parameters, self._seed, self._every, self._rollout = p, seed, evaluate_every, p["n_steps"] * p["n_envs"]
        self.step, self.steps, self.model = 0, -(-p["steps"] // self._rollout) * self._rollout, None
        self._rewards = torch.tensor([0.0, 1.0, 1e-4], dtype=torch.float64)  # mean, variance, count
        self._curve = torch.full((self.steps // evaluate_every + 2, 3), math.nan, dtype=torch.float64)
        self._env = VecNormalize(SimulatorVecEnv(simulator, p["n_envs"], seed), norm_obs=False, gamma=p["gamma"])
        network = dict(net_arch=p["hidden"], log_std_init=p["initial_log_std"], features_extractor_class=ObservationNormaliser)
        how = dict(learning_rate=self._learning_rate, policy_kwargs=network, seed=seed, device="cpu")
        self.model = PPO("MlpPolicy", self._env, **how, **{name: p[name] for name in SB3})
        adam = self.model.policy.optimizer
        for w in self.model.policy.parameters():  # what Adam would make in its first step, for a checkpoint to be copied into
            adam.state[w] = dict(step=torch.tensor(0.0), exp_avg=torch.zeros_like(w), exp_avg_sq=torch.zeros_like(w))

    @property
    def curve(self):
        """The learning curve so far: [(steps, mean D4RL-scale return of 64 episodes, standard error)]."""
        return [(int(steps), mean, se) for steps, mean, se in self._curve[~self._curve[:, 0].isnan()].tolist()]

    def state(self):
        """All that a training goes on from, name -> live tensor."""
        policy = self.model.policy
        names = [name for name, _ in (*policy.named_parameters(), *policy.named_buffers())]  # each tensor once
        kept = policy.state_dict()
        tensors = {f"policy.{name}": kept[name] for name in names}
        return {**tensors, **fast.optimiser_state(policy.optimizer), "rewards": self._rewards, "curve": self._curve}

    def __iter__(self):
        self._begin()
        while self.step < self.steps:
            before = self.step // self._every
            self.model.learn(self._rollout, reset_num_timesteps=False)  # one rollout and its updates
            # After the updates, so that a rollout and its updates see the same moments.
            self._normaliser.update(self.model.rollout_buffer.observations.reshape(-1, self._simulator.obs_dim))
            self.step, moments = self.model.num_timesteps, self._env.ret_rms
            self._rewards.copy_(torch.tensor([moments.mean, moments.var, moments.count]))
            if self.step // self._every > before or self.step == self.steps:
                self._evaluate()
            yield self.step

    @property
    def _normaliser(self):
        return self.model.policy.features_extractor

    def _learning_rate(self, _):
        p = self.parameters
        done = self.model.num_timesteps / self.steps if self.model else 0
        return p["lr"] + (p["final_lr"] - p["lr"]) * done

    def _begin(self):
        """Give the simulations and the random numbers what belongs to this step."""
        first, *rest = np.random.SeedSequence([self._seed, self.step]).generate_state(2).tolist()
        self.model.set_random_seed(first)
        self.model.num_timesteps = self.step
        moments = self._env.ret_rms
        moments.mean, moments.var, moments.count = self._rewards.numpy().copy()
        if self.step == 0:  # moments before the first rollout, from random actions
            rng = np.random.default_rng(rest)
            act = lambda obs: rng.uniform(-1, 1, (len(obs), self._simulator.action_dim))  # noqa: E731
            played = rollout(self._simulator, act, 64, rng, whole=False)
            self._normaliser.update(played.obs.reshape(-1, self._simulator.obs_dim))
            self._evaluate()

    def _evaluate(self):
        def act(obs):
            return self.model.predict(obs.astype(np.float32), deterministic=True)[0]

        returns = rollout(self._simulator, act, 64, np.random.default_rng(0), whole=False).returns()
        point = [self.step, returns.mean(), returns.std(ddof=1) / 8]
        self._curve[len(self.curve)] = torch.tensor(point, dtype=torch.float64)

    def policy(self):
        """The policy as it is now, as a `GaussianPolicy`."""
        return guide_zip.of_ppo(self.model.policy.state_dict())


def evaluation(simulator, policy, episodes=200):
    """What a guide's card says of it: its return on D4RL's scale, mean and sampled actions, with 95% intervals."""
    card = {"evaluation episodes": episodes}
    for name, generator in (("mean action", None), ("sampled action", torch.Generator().manual_seed(1))):
        act = functools.partial(policy.act, generator=generator)
        returns = rollout(simulator, act, episodes, np.random.default_rng(1), whole=False).returns()
        card[f"return, {name}"] = "{:.0f} [{:.0f}, {:.0f}]".format(*measures.interval(returns))
    return card
