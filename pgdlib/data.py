"""Offline data: trajectories and their sizes, the cut at episodes' ends, split, windows of a fixed length, the normaliser."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

ACTION_LIMIT = 1.0 - 1e-3  # arctanh of 1 is infinite
LARGEST = 1e6  # nothing that one learns from is as large; its squares stay finite in float32, in units of tiny deviations too


@dataclass
class Spec:
    """Where things stand in the last axis of packed steps: observation, action, reward, terminal; of transitions next_obs, too.

    `obs`, `actions` and `next_obs` are slices, `reward` and `terminal` indices; `width` and `transition_width` count numbers.
    """

    obs_dim: int
    action_dim: int

    def __post_init__(self):
        both = self.obs_dim + self.action_dim
        self.obs, self.actions = slice(0, self.obs_dim), slice(self.obs_dim, both)
        self.reward, self.terminal, self.width = both, both + 1, both + 2
        self.transition_width = self.width + self.obs_dim
        self.next_obs = slice(self.width, self.transition_width)


def transitions(obs: Tensor, actions: Tensor, rewards: Tensor, terminals: Tensor, next_obs: Tensor) -> Tensor:
    """Packed transitions [..., transition_width] of tensors in environment space, [...] or [..., n]; actions clipped to ±1."""
    return torch.cat([obs, actions.clamp(-1, 1), rewards[..., None], terminals[..., None], next_obs], -1)


@dataclass
class Trajectories:
    """Episodes end to end, in environment space, float32. Step t of an episode is (obs, action, reward, terminal, next_obs)."""

    obs: Tensor  # [N, obs_dim]
    actions: Tensor  # [N, action_dim]
    rewards: Tensor  # [N]
    terminals: Tensor  # [N], 1 where the environment ended the episode
    next_obs: Tensor  # [N, obs_dim]
    lengths: Tensor  # [E], int64, adding up to N
    name: str = ""  # what titles and tables call the data
    info: dict = field(default_factory=dict)  # simulator states, where the data holds them: name -> [N, k]

    def __post_init__(self):
        for key, tensor in self.tensors().items():
            kind = torch.int64 if key == "lengths" else torch.float32
            if not isinstance(tensor, Tensor) or tensor.dtype != kind or tensor.ndim == 0:
                self._refuse(f": {key} is {_kind(tensor)}; needed is a tensor of {kind}, with at least one dimension")
        if self.lengths.ndim != 1 or len(self.lengths) == 0:
            self._refuse(f" holds no episode: lengths is {_kind(self.lengths)}; needed is one number for each episode")
        if (shortest := int(self.lengths.min())) < 1:
            self._refuse(f" holds an empty one: episode {int(self.lengths.argmin())} has {shortest} steps; needed is 1 or more")
        for key, tensor in (("obs", self.obs), ("actions", self.actions)):
            if tensor.ndim != 2 or tensor.shape[1] == 0:
                self._refuse(f": {key} is {_kind(tensor)}; needed are steps of one number or more, [N, n]")
        shapes, n = dict(rewards=(), terminals=(), next_obs=(self.spec.obs_dim,)), sum(self.lengths.tolist())
        for key, tensor in self.tensors().items():
            if key != "lengths":
                self._check(key, tensor, n, shapes.get(key, tensor.shape[1:]))
        if not (good := (self.terminals == 0) | (self.terminals == 1)).all():
            self._refuse(f": terminals must be 0 or 1; it is {self.terminals[~good][0]:g}", good)

    def _check(self, key, tensor, n, shape):
        if len(tensor) != n:
            self._refuse(f": {key} has {len(tensor)} steps, the episodes together {n}")
        if (found := tuple(tensor.shape[1:])) != tuple(shape):
            self._refuse(f": a step of {key} is {found}; needed is {shape}")
        if not (good := (tensor.abs() <= LARGEST).reshape(n, -1).all(1)).all():  # of NaN too
            self._refuse(f": {key} holds values that are not finite, or beyond ±{LARGEST:g}, first", good)

    def _refuse(self, reason, good=None):
        where = "" if good is None else " in step {} of episode {}".format(*(int(v[~good][0]) for v in self.places()))
        raise ValueError(f"dataset {self.name!r}{reason}{where}")

    @property
    def spec(self) -> Spec:
        """The sizes of its steps."""
        return Spec(self.obs.shape[1], self.actions.shape[1])

    @property
    def variance(self) -> np.ndarray:
        """[obs_dim]: the variance of each dimension of the observation, 1 where it never changes."""
        variance = self.obs.var(0).numpy()
        return np.where(variance > 1e-12, variance, np.float32(1))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; `info.` stands before the simulator states."""
        own = ("obs", "actions", "rewards", "terminals", "next_obs", "lengths")
        return {**{k: getattr(self, k) for k in own}, **{f"info.{k}": v for k, v in self.info.items()}}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], name: str) -> "Trajectories":
        """The inverse of `tensors`."""
        info = {k.removeprefix("info."): v for k, v in tensors.items() if k.startswith("info.")}
        return cls(**{k: v for k, v in tensors.items() if not k.startswith("info.")}, name=name, info=info)

    @property
    def starts(self) -> Tensor:
        """[E]: the first step of each episode."""
        return self.lengths.cumsum(0) - self.lengths

    def places(self) -> tuple[Tensor, Tensor]:
        """[N] each: the number of a step in its episode, and the episode's."""
        episode = torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)
        return torch.arange(len(episode)) - self.starts[episode], episode

    def episodes(self, ids: Tensor) -> "Trajectories":
        """The episodes `ids`, in that order."""
        steps = torch.cat([torch.arange(s, s + n) for s, n in zip(self.starts[ids], self.lengths[ids], strict=True)])
        tensors = {k: v[steps] for k, v in self.tensors().items() if k != "lengths"}
        return Trajectories.from_tensors({**tensors, "lengths": self.lengths[ids]}, self.name)

    def returns(self, horizon: int) -> Tensor:
        """[E]: the sum of each episode's first `horizon` rewards."""
        step, episode = self.places()
        return torch.zeros(len(self.lengths)).index_add_(0, episode, self.rewards * (step < horizon))

    def packed(self) -> Tensor:
        """[N, width]: observation, action, reward and terminal of each step."""
        return torch.cat([self.obs, self.actions, self.rewards[:, None], self.terminals[:, None]], -1)

    def transitions(self) -> Tensor:
        """[N, transition_width]: each step with the observation that follows it; actions clipped, as the simulator does."""
        return transitions(self.obs, self.actions, self.rewards, self.terminals, self.next_obs)


def _kind(value):
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def end_where(data: Trajectories, ended: Tensor) -> tuple[Trajectories, int, int]:
    """End each episode at its first step that `ended` [N], and mark that step terminal; (data, episodes cut, steps dropped).

    Files that were simulated again in an environment that never ends, as Minari's of Adroit, go on after a fall.
    """
    step, episode = data.places()
    ends = torch.where(ended, step, len(ended))
    first = ends.new_full((len(data.lengths),), len(ended)).scatter_reduce(0, episode, ends, "amin")
    lengths = torch.minimum(first + 1, data.lengths)
    keep = step < lengths[episode]
    kept = {k: v[keep] for k, v in {**data.tensors(), "terminals": ended.float()}.items() if k != "lengths"}
    cut = Trajectories.from_tensors({**kept, "lengths": lengths}, data.name)
    return cut, int((lengths < data.lengths).sum()), int((~keep).sum())


def split(data: Trajectories, fraction: float, seed: int) -> tuple[Trajectories, Trajectories]:
    """(training, validation) episodes. Copies of one episode stay on one side: *cloned* holds each demonstration many times."""
    packed, groups = data.packed(), {}
    for e, (start, length) in enumerate(zip(data.starts.tolist(), data.lengths.tolist(), strict=True)):
        groups.setdefault(hashlib.sha256(packed[start : start + length].numpy().tobytes()).digest(), []).append(e)
    unique = list(groups.values())
    if len(unique) < 2:
        raise ValueError(f"dataset {data.name!r} holds {len(unique)} unique episode; a split needs 2 or more")
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed)).tolist()
    n = min(max(1, round(fraction * len(unique))), len(unique) - 1)
    sides = [[e for g in order[n:] for e in unique[g]], [e for g in order[:n] for e in unique[g]]]
    train, val = (data.episodes(torch.tensor(sorted(ids))) for ids in sides)
    if len(train.rewards) < 2:  # nothing has a variance there
        raise ValueError(f"dataset {data.name!r} holds 1 step to train on, one episode; a split needs 2 or more")
    return train, val


class Normaliser(nn.Module):
    """Steps [..., width] in environment space to and from normalised space: zero mean and unit variance in every channel.

    The terminal flag goes to -1 and 1. "arctanh": actions pass through it first. Statistics travel with a model's weights.
    """

    def __init__(self, spec: Spec, transform: str = "raw"):
        super().__init__()
        if transform not in ("raw", "arctanh"):
            raise ValueError(f"transform={transform!r} is not allowed; it must be 'raw' or 'arctanh'")
        self.spec, self.transform = spec, transform
        self.register_buffer("mean", torch.zeros(spec.width))
        self.register_buffer("std", torch.ones(spec.width))

    @torch.no_grad()
    def fit(self, packed: Tensor) -> "Normaliser":
        """Take mean and std from `packed` [N, width] (environment space). A channel that never changes gets std 1."""
        spec, actions = self.spec, self._unsquash(packed[..., self.spec.actions])
        x = torch.cat([packed[..., spec.obs], actions, packed[..., spec.reward :]], -1).double()
        mean, std = x.mean(0), x.std(0, unbiased=False)
        std = torch.where(std < 1e-6, 1.0, std)
        mean[spec.terminal], std[spec.terminal] = 0.5, 0.5
        self.mean.copy_(mean)
        self.std.copy_(std)
        return self

    def normalise(self, steps: Tensor) -> Tensor:
        """Environment space to normalised space, [..., width]."""
        actions = self._unsquash(steps[..., self.spec.actions])
        steps = torch.cat([steps[..., self.spec.obs], actions, steps[..., self.spec.reward :]], -1)
        return (steps - self.mean) / self.std

    def normalise_actions(self, actions: Tensor) -> Tensor:
        """Actions [..., action_dim] from environment to normalised space."""
        return (self._unsquash(actions) - self.mean[self.spec.actions]) / self.std[self.spec.actions]

    def denormalise(self, x: Tensor) -> Tensor:
        """Normalised space to environment space, [..., width]."""
        rest = slice(self.spec.reward, None)
        return torch.cat([self.obs(x), self.actions(x), x[..., rest] * self.std[rest] + self.mean[rest]], -1)

    def obs(self, x: Tensor) -> Tensor:
        """Observations [..., obs_dim] in environment space of normalised steps [..., width]."""
        s = self.spec.obs
        return x[..., s] * self.std[s] + self.mean[s]

    def actions(self, x: Tensor) -> Tensor:
        """Actions [..., action_dim] in environment space of normalised steps [..., width]."""
        s = self.spec.actions
        raw = x[..., s] * self.std[s] + self.mean[s]
        return raw.tanh() if self.transform == "arctanh" else raw

    def action_slope(self, x: Tensor) -> Tensor:
        """[..., action_dim]: derivative of the environment's action by the normalised one, at normalised steps [..., width]."""
        slope = self.std[self.spec.actions].expand(*x.shape[:-1], self.spec.action_dim)
        return slope * (1 - self.actions(x).square()) if self.transform == "arctanh" else slope

    def _unsquash(self, actions):
        return actions if self.transform == "raw" else actions.clamp(-ACTION_LIMIT, ACTION_LIMIT).arctanh()


class Windows:
    """Windows of `horizon` consecutive steps, normalised, on a device; none crosses the end of an episode.

    An episode that the environment ended also gives windows that reach up to half their length beyond its end, so that ends
    are seen at many places of a window and as often as they happen; one shorter than the horizon gives a window at least. What
    lies beyond an end repeats the last step and is masked.
    """

    def __init__(self, data: Trajectories, normaliser: Normaliser, horizon: int, device: torch.device | str = "cpu"):
        if horizon < 2:
            raise ValueError(f"horizon={horizon} is not allowed; it must be 2 or more")
        self.horizon = horizon
        self.steps = normaliser.normalise(data.packed().to(device))  # [N, width]
        lasts = data.starts + data.lengths - 1
        beyond = (data.terminals[lasts] > 0) * (horizon // 2)
        counts = (data.lengths - horizon + 1 + beyond).clamp_min(1)
        firsts = [torch.arange(s, s + n) for s, n in zip(data.starts.tolist(), counts.tolist())]
        self.firsts, self.lasts = torch.cat(firsts).to(device), torch.repeat_interleave(lasts, counts).to(device)
        self._ahead = torch.arange(horizon, device=device)

    def __len__(self) -> int:
        return len(self.firsts)

    def __getitem__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Windows `ids` [B]: normalised steps [B, horizon, width] and mask [B, horizon], 1 on real steps."""
        steps = self.firsts[ids, None] + self._ahead
        lasts = self.lasts[ids, None]
        return self.steps[torch.minimum(steps, lasts)], (steps <= lasts).float()
