"""Offline data: trajectories, fall repair, split, windows of a fixed length, and the normaliser."""

import hashlib
from dataclasses import dataclass, field

import torch
from torch import nn

from pgdlib.simulators.pen import ACTION_DIM, FALL_HEIGHT, OBS_DIM, PEN_HEIGHT

CHANNELS = OBS_DIM + ACTION_DIM + 2  # a step of a trajectory: observation, action, reward, terminal
OBS, ACTIONS = slice(0, OBS_DIM), slice(OBS_DIM, OBS_DIM + ACTION_DIM)
REWARD, TERMINAL = CHANNELS - 2, CHANNELS - 1
LARGEST = 1e6  # nothing of Adroit Pen is as large; its squares stay finite in float32, also in units of tiny deviations


@dataclass
class Trajectories:
    """Episodes end to end, in environment space, float32. Step t of an episode is (obs, action, reward, terminal, next_obs)."""

    obs: torch.Tensor  # [N, 45]
    actions: torch.Tensor  # [N, 24]
    rewards: torch.Tensor  # [N]
    terminals: torch.Tensor  # [N], 1 where the episode ended by a fall
    next_obs: torch.Tensor  # [N, 45]
    lengths: torch.Tensor  # [E], int64, adding up to N
    name: str = ""  # what titles and tables call the data
    info: dict = field(default_factory=dict)  # simulator states, where the data holds them: name -> [N, k]

    def __post_init__(self):
        def refuse(reason):
            raise ValueError(f"dataset {self.name!r}{reason}")

        for key, tensor in self.tensors().items():
            kind = torch.int64 if key == "lengths" else torch.float32
            if not isinstance(tensor, torch.Tensor) or tensor.dtype != kind or tensor.ndim == 0:
                refuse(f": {key} is {_kind(tensor)}; needed is a tensor of {kind}, with at least one dimension")
        if self.lengths.ndim != 1 or len(self.lengths) == 0:
            refuse(f" holds no episode: lengths is {_kind(self.lengths)}; needed is one number for each episode")
        lengths = self.lengths.tolist()
        if (shortest := min(lengths)) < 1:
            refuse(f" holds an empty one: episode {lengths.index(shortest)} has {shortest} steps; needed is 1 or more")
        n = sum(lengths)
        shapes = dict(obs=(OBS_DIM,), actions=(ACTION_DIM,), rewards=(), terminals=(), next_obs=(OBS_DIM,))
        for key, tensor in self.tensors().items():
            if key == "lengths":
                continue
            if len(tensor) != n:
                refuse(f": {key} has {len(tensor)} steps, the episodes together {n}")
            if (found := tuple(tensor.shape[1:])) != shapes.get(key, found):
                refuse(f" is not of Adroit Pen: a step of {key} is {found}; needed is {shapes[key]}")
            if not (good := tensor.abs() <= LARGEST).all():  # of NaN too
                step = int((~good).reshape(n, -1).any(1).nonzero()[0])
                refuse(f": {key} holds values that are not finite, or beyond ±{LARGEST:g}, first in {self._place(step)}")
        if not (good := (self.terminals == 0) | (self.terminals == 1)).all():
            step = int((~good).nonzero()[0])
            refuse(f": terminals is {self.terminals[step]:g} in {self._place(step)}; it must be 0 or 1")

    def _place(self, step):
        episode = int((self.starts <= step).sum()) - 1
        return f"step {step - int(self.starts[episode])} of episode {episode}"

    def tensors(self):
        """All tensors by name; `info.` stands before the simulator states."""
        own = ("obs", "actions", "rewards", "terminals", "next_obs", "lengths")
        return {**{k: getattr(self, k) for k in own}, **{f"info.{k}": v for k, v in self.info.items()}}

    @classmethod
    def from_tensors(cls, tensors, name):
        """The inverse of `tensors`."""
        info = {k.removeprefix("info."): v for k, v in tensors.items() if k.startswith("info.")}
        return cls(**{k: v for k, v in tensors.items() if not k.startswith("info.")}, name=name, info=info)

    @property
    def starts(self):
        """[E]: the first step of each episode."""
        return self.lengths.cumsum(0) - self.lengths

    def episodes(self, ids):
        """The episodes `ids`, in that order."""
        steps = torch.cat([torch.arange(s, s + n) for s, n in zip(self.starts[ids], self.lengths[ids], strict=True)])
        tensors = {k: v[steps] for k, v in self.tensors().items() if k != "lengths"}
        return Trajectories.from_tensors({**tensors, "lengths": self.lengths[ids]}, self.name)

    def returns(self, horizon=100):
        """[E]: the sum of each episode's first `horizon` rewards; 100 is D4RL's scale once falls end the episodes."""
        step = torch.arange(len(self.rewards)) - torch.repeat_interleave(self.starts, self.lengths)
        episode = torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)
        return torch.zeros(len(self.lengths)).index_add_(0, episode, self.rewards * (step < horizon))

    def packed(self):
        """[N, 71]: observation, action, reward and terminal of each step."""
        return torch.cat([self.obs, self.actions, self.rewards[:, None], self.terminals[:, None]], -1)


def _kind(value):
    """What a message says of a value that should be another tensor."""
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def end_at_falls(data):
    """End each episode at its first fall and mark that step terminal, as D4RL did; (data, episodes cut, steps dropped).

    Minari's v2 files were simulated again in an environment that never ends, so an episode may go on after the pen fell.
    """
    fallen = data.next_obs[:, PEN_HEIGHT] < FALL_HEIGHT
    keep = torch.ones(len(fallen), dtype=torch.bool)
    lengths, terminals = data.lengths.clone(), fallen.float()
    for e, (start, length) in enumerate(zip(data.starts.tolist(), data.lengths.tolist(), strict=True)):
        falls = torch.nonzero(fallen[start : start + length])
        if len(falls):
            lengths[e] = int(falls[0]) + 1
            keep[start + lengths[e] : start + length] = False
    kept = {k: v[keep] for k, v in data.tensors().items() if k != "lengths"}
    repaired = Trajectories.from_tensors({**kept, "terminals": terminals[keep], "lengths": lengths}, data.name)
    return repaired, int((lengths < data.lengths).sum()), int((~keep).sum())


def split(data, fraction, seed):
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
    """Steps [..., 71] in environment space to and from normalised space: zero mean and unit variance in every channel.

    The terminal flag goes to -1 and 1. With `transform="arctanh"` actions pass through arctanh first. Statistics are
    buffers, so they travel with the weights of the model that holds them.
    """

    ACTION_LIMIT = 1.0 - 1e-3  # arctanh of 1 is infinite

    def __init__(self, transform="raw"):
        super().__init__()
        if transform not in ("raw", "arctanh"):
            raise ValueError(f"transform={transform!r} is not allowed; it must be 'raw' or 'arctanh'")
        self.transform = transform
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.register_buffer("std", torch.ones(CHANNELS))

    @torch.no_grad()
    def fit(self, packed):
        """Take mean and std from `packed` [N, 71] (environment space). A channel that never changes gets std 1."""
        x = torch.cat([packed[..., OBS], self._unsquash(packed[..., ACTIONS]), packed[..., REWARD:]], -1).double()
        mean, std = x.mean(0), x.std(0, unbiased=False)
        std = torch.where(std < 1e-6, 1.0, std)
        mean[TERMINAL], std[TERMINAL] = 0.5, 0.5
        self.mean.copy_(mean)
        self.std.copy_(std)
        return self

    def normalise(self, steps):
        """Environment space to normalised space, [..., 71]."""
        actions = self.normalise_actions(steps[..., ACTIONS])
        obs, rest = ((steps[..., s] - self.mean[s]) / self.std[s] for s in (OBS, slice(REWARD, CHANNELS)))
        return torch.cat([obs, actions, rest], -1)

    def normalise_actions(self, actions):
        """Actions [..., 24] from environment to normalised space."""
        return (self._unsquash(actions) - self.mean[ACTIONS]) / self.std[ACTIONS]

    def denormalise(self, x):
        """Normalised space to environment space, [..., 71]."""
        return torch.cat([self.obs(x), self.actions(x), x[..., REWARD:] * self.std[REWARD:] + self.mean[REWARD:]], -1)

    def obs(self, x):
        """Observations [..., 45] in environment space of normalised steps [..., 71]."""
        return x[..., OBS] * self.std[OBS] + self.mean[OBS]

    def actions(self, x):
        """Actions [..., 24] in environment space of normalised steps [..., 71]."""
        raw = x[..., ACTIONS] * self.std[ACTIONS] + self.mean[ACTIONS]
        return raw.tanh() if self.transform == "arctanh" else raw

    def action_slope(self, x):
        """[..., 24]: derivative of the environment's action by the normalised one, at normalised steps [..., 71]."""
        slope = self.std[ACTIONS].expand(*x.shape[:-1], ACTION_DIM)
        return slope * (1 - self.actions(x).square()) if self.transform == "arctanh" else slope

    def _unsquash(self, actions):
        if self.transform == "raw":
            return actions
        return actions.clamp(-self.ACTION_LIMIT, self.ACTION_LIMIT).arctanh()


class Windows:
    """Windows of `horizon` consecutive steps, normalised, on a device; none crosses the end of an episode.

    An episode that ended by a fall also gives windows that reach up to half their length beyond its end, so that falls are
    seen at many places of a window and about as often as they happen; one shorter than the horizon gives a window at least.
    What lies beyond an end repeats the last step and is masked.
    """

    def __init__(self, data, normaliser, horizon, device="cpu"):
        if horizon < 2:
            raise ValueError(f"horizon={horizon} is not allowed; it must be 2 or more")
        self.horizon = horizon
        self.steps = normaliser.normalise(data.packed().to(device))  # [N, 71]
        lasts = data.starts + data.lengths - 1
        beyond = (data.terminals[lasts] > 0) * (horizon // 2)
        counts = (data.lengths - horizon + 1 + beyond).clamp_min(1)
        firsts = [torch.arange(s, s + n) for s, n in zip(data.starts.tolist(), counts.tolist())]
        self.firsts, self.lasts = torch.cat(firsts).to(device), torch.repeat_interleave(lasts, counts).to(device)
        self._ahead = torch.arange(horizon, device=device)

    def __len__(self):
        return len(self.firsts)

    def __getitem__(self, ids):
        """Windows `ids` [B]: normalised steps [B, horizon, 71] and mask [B, horizon], 1 on real steps."""
        steps = self.firsts[ids, None] + self._ahead
        lasts = self.lasts[ids, None]
        return self.steps[torch.minimum(steps, lasts)], (steps <= lasts).float()
