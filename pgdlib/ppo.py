"""Train the guide: Stable-Baselines3 PPO on the D4RL-scale Adroit Pen, in a batch of simulations."""

import time

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from pgdlib import adroit

# Found on this task; the paper does not give its own.
DEFAULTS = dict(
    steps=5_000_000,
    n_envs=64,
    n_steps=128,
    batch_size=1024,
    n_epochs=10,
    lr=3e-4,
    final_lr=3e-5,
    discount=0.99,
    gae_lambda=0.95,
    clip_range=0.2,
    hidden=[256, 256],
    initial_log_std=-0.7,
)


class PenVecEnv(VecEnv):
    """`n` D4RL-scale Adroit Pen environments as one Stable-Baselines3 `VecEnv`; ended episodes start anew at once."""

    def __init__(self, n, seed=0, threads=None):
        import gymnasium

        box = gymnasium.spaces.Box
        super().__init__(
            n,
            box(-np.inf, np.inf, (adroit.OBS_DIM,), np.float32),
            box(-1.0, 1.0, (adroit.ACTION_DIM,), np.float32),
        )
        self._batch = adroit.PenBatch(n, threads)
        self._rng = np.random.default_rng(seed)

    def reset(self):
        self._returns, self._lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=int)
        return self._batch.reset(adroit.sample_targets(self.num_envs, self._rng)).astype(np.float32)

    def step_async(self, actions):
        self._actions = actions

    def step_wait(self):
        obs = self._batch.step(self._actions)
        rewards, _, fallen = adroit.outcome(obs)
        self._returns += rewards
        self._lengths += 1
        dones = fallen | (self._lengths >= adroit.D4RL_HORIZON)
        infos = [{} for _ in range(self.num_envs)]
        ended = np.flatnonzero(dones)
        for i in ended:
            infos[i] = {
                "terminal_observation": obs[i].astype(np.float32),
                "TimeLimit.truncated": not fallen[i],
                "episode": {"r": self._returns[i], "l": int(self._lengths[i]), "t": time.time()},
            }
        if len(ended):
            obs[ended] = self._batch.reset(adroit.sample_targets(len(ended), self._rng), ended)
            self._returns[ended], self._lengths[ended] = 0.0, 0
        return obs.astype(np.float32), rewards.astype(np.float32), dones, infos

    def close(self):
        pass

    def env_is_wrapped(self, wrapper_class, indices=None):
        return [False] * self.num_envs

    def get_attr(self, attr_name, indices=None):
        return [getattr(self, attr_name, None)] * self.num_envs

    def set_attr(self, attr_name, value, indices=None):
        raise NotImplementedError("PenVecEnv's environments have no attributes of their own")

    def env_method(self, method_name, *args, indices=None, **kwargs):
        raise NotImplementedError("PenVecEnv's environments have no methods of their own")


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
        """Merge the moments of `obs` [n, 45] into the running ones (Chan et al. 1979)."""
        obs = torch.as_tensor(obs, dtype=torch.float32)
        n, mean, var = len(obs), obs.mean(0), obs.var(0, unbiased=False)
        total, delta = self.count + n, mean - self.mean
        self.var.copy_((self.var * self.count + var * n + delta.square() * self.count * n / total) / total)
        self.mean.add_(delta * n / total)
        self.count.copy_(total)


class _Progress(BaseCallback):
    """Between rollouts: update the observation moments (so a rollout and its updates see the same ones), evaluate, report."""

    def __init__(self, evaluate_every, report):
        super().__init__()
        self.curve, self._every, self._report = [], evaluate_every, report

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        if self.num_timesteps:
            self.model.policy.features_extractor.update(self._seen.reshape(-1, adroit.OBS_DIM))
        if self.num_timesteps >= len(self.curve) * self._every:
            self._evaluate()

    def _on_rollout_end(self):
        self._seen = self.model.rollout_buffer.observations  # SB3 makes a new array before the next _on_rollout_start

    def _on_training_end(self):
        self._evaluate()

    def _evaluate(self):
        def act(obs):
            return self.model.predict(obs.astype(np.float32), deterministic=True)[0]

        returns = adroit.rollout(act, 64, np.random.default_rng(0), adroit.D4RL_HORIZON).d4rl_returns
        self.curve.append((self.num_timesteps, float(returns.mean()), float(returns.std(ddof=1) / 8)))
        self._report(*self.curve[-1])


def train(seed=0, evaluate_every=250_000, report=lambda steps, mean, se: None, **overrides):
    """Train PPO; the SB3 model and its learning curve [(steps, mean D4RL-scale return of 64 episodes, standard error)].

    `overrides` replace entries of `DEFAULTS`; `report` is called at each point of the curve.
    """
    p = {**DEFAULTS, **overrides}
    env = VecNormalize(PenVecEnv(p["n_envs"], seed), norm_obs=False, norm_reward=True, gamma=p["discount"])
    model = PPO(
        "MlpPolicy",
        env,
        learning_rate=lambda left: p["final_lr"] + (p["lr"] - p["final_lr"]) * left,
        n_steps=p["n_steps"],
        batch_size=p["batch_size"],
        n_epochs=p["n_epochs"],
        gamma=p["discount"],
        gae_lambda=p["gae_lambda"],
        clip_range=p["clip_range"],
        policy_kwargs=dict(
            net_arch=p["hidden"],
            log_std_init=p["initial_log_std"],
            features_extractor_class=ObservationNormaliser,
        ),
        seed=seed,
        device="cpu",
    )
    # Moments before the first rollout, from random actions.
    rng = np.random.default_rng(seed)
    first = adroit.rollout(lambda obs: rng.uniform(-1, 1, (len(obs), adroit.ACTION_DIM)), 64, rng, adroit.D4RL_HORIZON)
    model.policy.features_extractor.update(first.obs.reshape(-1, adroit.OBS_DIM))
    progress = _Progress(evaluate_every, report)
    model.learn(p["steps"], callback=progress)
    return model, progress.curve
