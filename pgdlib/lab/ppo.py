"""Train the guide: Stable-Baselines3 PPO on the D4RL-scale Adroit Pen, in a batch of simulations."""

import time
from pathlib import Path

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from pgdlib.lab import artifacts, resumable
from pgdlib.simulators import pen as adroit

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

    def arrays(self):
        """What the environments keep from step to step, but for their random numbers: name -> array, live, to read or write."""
        pens = self._batch
        simulations = pens._batch.state  # of MuJoCo, whole: a simulation is its row, with the warm start of its solver
        kept = dict(simulations=simulations, targets=pens._target_quat, broken=pens._broken)
        return {**kept, "returns": self._returns, "lengths": self._lengths}

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
    """Between rollouts: update the observation moments (so a rollout and its updates see the same ones), save, evaluate."""

    def __init__(self, evaluate_every, report, checkpoint, save_every, how, say):
        super().__init__()
        self.curve, self._every, self._report = [], evaluate_every, report
        self._checkpoint, self._save_every, self._how, self._say = checkpoint, save_every, how, say
        self._seen, self._saved = None, time.monotonic()

    def _on_training_start(self):
        if self._checkpoint and (found := _find(self._checkpoint, self._how, self._say)):
            self.curve = _restore(self.model, *found)
            self.num_timesteps = self.model.num_timesteps
            for point in self.curve:
                self._report(*point)

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        if self._seen is not None:  # the moments in a checkpoint have been updated
            self.model.policy.features_extractor.update(self._seen.reshape(-1, adroit.OBS_DIM))
        if self._checkpoint and time.monotonic() - self._saved >= self._save_every:
            _save(self._checkpoint, self._how, self.model, self.curve)
            self._saved = time.monotonic()
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


def _save(path, how, model, curve):
    """Keep a training between two rollouts. What only logs need is not kept, nor the learning rate, which follows the steps."""
    env, adam = model.env, model.policy.optimizer.state_dict()["state"]
    tensors = {f"policy.{k}": v.clone() for k, v in model.policy.state_dict().items()}  # clones: some are there twice
    tensors.update({f"adam.{i}.{k}": v for i, state in adam.items() for k, v in state.items()})
    arrays = dict(obs=model._last_obs, starts=model._last_episode_starts, curve=np.array(curve, dtype=float).reshape(-1, 3))
    moments = np.array([env.ret_rms.mean, env.ret_rms.var, env.ret_rms.count])
    arrays.update(discounted=env.returns, moments=moments, **env.venv.arrays())
    tensors.update({k: torch.from_numpy(v) for k, v in arrays.items()}, torch=torch.get_rng_state())
    kind, key, *rest = np.random.get_state()  # noqa: NPY002 (Stable-Baselines3 draws from it)
    random = dict(numpy=[kind, key.tolist(), *rest], targets=env.venv._rng.bit_generator.state)
    resumable.save(path, tensors, dict(how=how, steps=model.num_timesteps, updates=model._n_updates, random=random))


def _find(path, how, say):
    """The (tensors, card) that `_save` kept at `path`, or None. What is damaged or of other parameters is set aside."""
    try:
        tensors, card = artifacts.load(path, own=True)
        kept = card.get("how", {})
        if other := [
            f"{k}={kept.get(k)!r}, not {v!r}" for k, v in how.items() if artifacts.key(v=kept.get(k)) != artifacts.key(v=v)
        ]:
            raise artifacts.CorruptArtifact(f"{path} is of another training: {', '.join(other)}")
    except FileNotFoundError:
        return None
    except artifacts.CorruptArtifact as e:
        say(f"{e}. Set aside as {artifacts.set_aside(path, e).name}; training begins anew.")
        return None
    say(f"training goes on from checkpoint {path.name}: {card['steps']:,} of {how['steps']:,} steps are done")
    return tensors, card


def _restore(model, tensors, card):
    """Bring a training that has just begun to where `_save` kept it; its curve."""

    def part(prefix):
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    env, optimiser, adam = model.env, model.policy.optimizer, {}
    model.policy.load_state_dict(part("policy."))
    for name, value in part("adam.").items():
        i, field = name.split(".")
        adam.setdefault(int(i), {})[field] = value
    optimiser.load_state_dict({"state": adam, "param_groups": optimiser.state_dict()["param_groups"]})
    model._last_obs, model._last_episode_starts, env.returns = (tensors[k].numpy() for k in ("obs", "starts", "discounted"))
    env.ret_rms.mean, env.ret_rms.var, env.ret_rms.count = tensors["moments"].numpy()
    for name, array in env.venv.arrays().items():
        array[:] = tensors[name].numpy()
    model.num_timesteps, model._n_updates = card["steps"], card["updates"]
    torch.set_rng_state(tensors["torch"])
    np.random.set_state(card["random"]["numpy"])  # noqa: NPY002
    env.venv._rng.bit_generator.state = card["random"]["targets"]
    return [(int(steps), mean, se) for steps, mean, se in tensors["curve"].tolist()]


def train(seed=0, evaluate_every=250_000, report=lambda *_: None, checkpoint=None, save_every=60.0, say=print, **overrides):
    """Train PPO; the SB3 model and its learning curve [(steps, mean D4RL-scale return of 64 episodes, standard error)].

    `overrides` replace entries of `DEFAULTS`; `report` is called at each point of the curve.

    With a `checkpoint` path, the state is written there between rollouts, `save_every` seconds or a rollout more apart. A run
    that finds it says so, reports its curve and goes on to the same weights, bit for bit on as many threads, that an
    uninterrupted run has. One that is damaged or of other parameters is set aside.
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
    how = {**p, "seed": seed, "evaluate_every": evaluate_every}
    progress = _Progress(evaluate_every, report, checkpoint and Path(checkpoint), save_every, how, say)
    model.learn(p["steps"], callback=progress)
    return model, progress.curve
