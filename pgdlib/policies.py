"""Gaussian policies that carry their observation normalisation, stacks of them, and their import from Stable-Baselines3."""

import io
import json
import math
import zipfile

import torch
from torch import nn

from pgdlib import edm


class Tanh(nn.Module):
    """tanh z as 2 σ(2 z) - 1, to 1e-6 the same and several times faster on CPUs, where it is most of what a policy costs."""

    def forward(self, z):
        """tanh of z, of any shape; it takes the place of z where no gradient is wanted."""
        if torch.is_grad_enabled():
            return 2 * (2 * z).sigmoid() - 1
        return z.mul_(2).sigmoid_().mul_(2).sub_(1)


ACTIVATIONS = {"tanh": Tanh, "relu": nn.ReLU}


class GaussianPolicy(nn.Module):
    """π(a|s) = N(μ(s), diag(std²)): an MLP mean, a std that does not depend on the state.

    Observations and actions are in environment space; (s - obs_mean) / obs_std, clipped to ±obs_clip, enters the network.
    Actions are not squashed: the environment clips them.
    """

    is_gaussian = True  # a call gives mean and std

    def __init__(self, obs_dim, action_dim, hidden=(256, 256), activation="tanh", obs_clip=10.0):
        super().__init__()
        self.config = dict(
            obs_dim=obs_dim, action_dim=action_dim, hidden=list(hidden), activation=activation, obs_clip=obs_clip
        )
        self.obs_clip = obs_clip
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        widths = [obs_dim, *hidden]
        layers = [m for i, o in zip(widths, widths[1:]) for m in (nn.Linear(i, o), ACTIVATIONS[activation]())]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], action_dim))
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def forward(self, obs):
        """Mean and std of the action, both [..., action_dim], at `obs` [..., obs_dim]."""
        normalised = ((obs - self.obs_mean) / self.obs_std).clamp(-self.obs_clip, self.obs_clip)
        mean = self.net(normalised)
        return mean, self.log_std.exp().expand_as(mean)

    def log_prob(self, obs, actions):
        """log π(a|s) [...], the sum over action dimensions; differentiable in both."""
        mean, std = self(obs)
        z = (actions - mean) / std
        return (-0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def sample(self, obs, generator=None):
        """One action [..., action_dim] for every observation."""
        mean, std = self(obs)
        return mean + std * torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)

    def entropy(self):
        """H(π) in nats, the sum over action dimensions; -H(π) is the mean log-likelihood of the policy's own actions."""
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()

    def act(self, generator=None):
        """A function obs [n, obs_dim] -> actions [n, action_dim] on numpy arrays: the mean, or with a generator a sample."""

        @torch.no_grad()
        def choose(obs):
            obs = torch.as_tensor(obs, dtype=torch.float32, device=self.log_std.device)
            actions = self(obs)[0] if generator is None else self.sample(obs, generator)
            return actions.cpu().numpy()

        return choose


def is_gaussian(policy):
    """Whether `policy(obs)` gives the mean and std of a diagonal Gaussian."""
    return getattr(policy, "is_gaussian", False)


def quick(policy, obs):
    """Mean and std of a Gaussian policy as a call gives them, without gradients and in less precision: for guidance alone.

    Where the device multiplies bfloat16 the mean is off by a hundredth of a typical std: little beside the noise that guidance
    works in, but a likelihood must come from `log_prob`.
    """
    with torch.no_grad(), torch.autocast(obs.device.type, torch.bfloat16, enabled=edm.has_bfloat16(obs.device)):
        mean, std = policy(obs)
    return mean.to(obs.dtype), std.to(obs.dtype)


def sharpened(policy, factor):
    """A copy of a `GaussianPolicy` whose std is `factor` times as large; the mean is the same."""
    other = GaussianPolicy(**policy.config).to(policy.log_std)
    other.load_state_dict({**policy.state_dict(), "log_std": policy.log_std.detach() + math.log(factor)})
    return other.requires_grad_(False)


class Stacked:
    """S policies as one, each for its own block of the batch: B must be a multiple of S, the first B/S rows are the first's."""

    def __init__(self, policies):
        self.policies = list(policies)
        if not self.policies:
            raise ValueError("policies=[] is not allowed; it must hold at least one policy")
        self.is_gaussian = all(map(is_gaussian, self.policies))

    def __call__(self, obs):
        """Mean and std [B, ..., action_dim] at `obs` [B, ..., obs_dim]; Gaussian policies only."""
        each = [policy(o) for policy, o in zip(self.policies, self._blocks(obs), strict=True)]
        return tuple(torch.cat(parts) for parts in zip(*each, strict=True))

    def log_prob(self, obs, actions):
        """log π(a|s) [B, ...] of each row under its own policy; differentiable in both."""
        blocks = zip(self.policies, self._blocks(obs), self._blocks(actions), strict=True)
        return torch.cat([policy.log_prob(o, a) for policy, o, a in blocks])

    def _blocks(self, x):
        if len(x) % len(self.policies):
            raise ValueError(
                f"batch={len(x)} is not allowed; it must be a multiple of the {len(self.policies)} stacked policies"
            )
        return x.chunk(len(self.policies))


def from_sb3_zip(path, obs_dim, action_dim):
    """The `GaussianPolicy` in a Stable-Baselines3 PPO zip with an MLP policy and a Box action space.

    Only weights (`policy.pth`) and plain JSON are read; nothing in the file is unpickled. Raises ValueError, naming the
    parameter `guide`, for a file that is no such zip, is damaged, was trained for other observations or actions, or holds
    a policy that is another function.
    """
    guide = f"guide={str(path)!r}"
    try:
        with zipfile.ZipFile(path) as z:
            state = torch.load(io.BytesIO(z.read("policy.pth")), map_location="cpu", weights_only=True)
            config = json.loads(z.read("data"))
    except Exception as e:  # a damaged or foreign file breaks these in a dozen ways
        raise ValueError(f"{guide} is not a readable Stable-Baselines3 zip: {type(e).__name__}: {e}") from e
    try:
        return _from_sb3_state(state, config, obs_dim, action_dim)
    except Exception as e:
        reason = str(e) if isinstance(e, _Unfit) else f"{type(e).__name__}: {e}"
        raise ValueError(f"{guide} holds no PPO MLP policy with continuous actions that fits here: {reason}") from e


class _Unfit(ValueError):
    """The reason why a policy cannot be a `GaussianPolicy`."""


def _from_sb3_state(state, config, obs_dim, action_dim):
    """The `GaussianPolicy` of an SB3 policy's state dict and the JSON beside it; raises anything if they are odd."""
    numbers = sorted({int(k.split(".")[2]) for k in state if k.startswith("mlp_extractor.policy_net.")})
    names = [f"mlp_extractor.policy_net.{i}" for i in numbers] + ["action_net"]
    needed = [f"{n}.{part}" for n in names for part in ("weight", "bias")] + ["log_std"]
    if missing := [k for k in needed if k not in state]:
        raise _Unfit(f"{', '.join(missing)} missing")
    if not all(t.isfinite().all() for t in state.values()):
        raise _Unfit("some values are not finite")
    found = state[f"{names[0]}.weight"].shape[1], len(state["action_net.bias"])
    if found != (obs_dim, action_dim):
        raise _Unfit(
            f"it is of another environment, with {found[0]} observations and {found[1]} actions; "
            f"needed are {obs_dim} and {action_dim}"
        )
    kwargs = config["policy_kwargs"]
    activation = _class_name(kwargs.get("activation_fn", "Tanh")).lower()
    if activation not in ACTIVATIONS:
        raise _Unfit(f"its activation is {activation}; known are {', '.join(ACTIVATIONS)}")
    if config["use_sde"]:
        raise _Unfit("its exploration is state-dependent (use_sde)")
    extractor = _class_name(kwargs.get("features_extractor_class", "FlattenExtractor"))
    if extractor not in ("FlattenExtractor", "ObservationNormaliser") or kwargs.get("features_extractor_kwargs"):
        raise _Unfit(f"its features extractor is {extractor}({kwargs.get('features_extractor_kwargs', '')})")

    policy = GaussianPolicy(obs_dim, action_dim, [len(state[f"{n}.bias"]) for n in names[:-1]], activation)
    linear = {k: v for k, v in policy.net.named_children() if isinstance(v, nn.Linear)}
    loaded = {f"net.{k}.{part}": state[f"{n}.{part}"] for k, n in zip(linear, names) for part in ("weight", "bias")}
    loaded["log_std"] = state["log_std"]
    if extractor == "ObservationNormaliser":  # normalisation inside the policy, as `ppo.train` keeps it
        loaded["obs_mean"] = state["features_extractor.mean"]
        loaded["obs_std"] = (state["features_extractor.var"] + 1e-8).sqrt()
    else:
        loaded["obs_mean"], loaded["obs_std"] = policy.obs_mean, policy.obs_std
        policy.obs_clip = policy.config["obs_clip"] = math.inf
    policy.load_state_dict(loaded)  # checks every shape
    return policy


def _class_name(text):
    """The bare name in the string that SB3 keeps of a class, "<class 'a.b.Name'>"."""
    return str(text).rstrip("'>").rsplit(".", 1)[-1]
