"""Offline data: Minari loading, fall repair, split, windows of a fixed length, and the normaliser."""

import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pgdlib import store
from pgdlib.adroit import ACTION_DIM, FALL_HEIGHT, OBS_DIM, PEN_HEIGHT

CHANNELS = OBS_DIM + ACTION_DIM + 2  # a step of a trajectory: observation, action, reward, terminal
OBS, ACTIONS = slice(0, OBS_DIM), slice(OBS_DIM, OBS_DIM + ACTION_DIM)
REWARD, TERMINAL = CHANNELS - 2, CHANNELS - 1
D4RL_IDS = {name: f"D4RL/pen/{name}-v2" for name in ("human", "cloned", "expert")}


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
        n = int(self.lengths.sum())
        for key, tensor in self.tensors().items():
            if key != "lengths" and len(tensor) != n:
                raise ValueError(f"dataset {self.name!r}: {key} has {len(tensor)} steps, the episodes together {n}")
            if not tensor.isfinite().all():
                raise ValueError(f"dataset {self.name!r}: {key} holds values that are not finite")
        if len(self.lengths) == 0 or int(self.lengths.min()) < 1:
            raise ValueError(f"dataset {self.name!r} holds no episode, or an empty one")
        needed = dict(obs=(OBS_DIM,), actions=(ACTION_DIM,), rewards=(), terminals=(), next_obs=(OBS_DIM,))
        for key, shape in needed.items():
            found = tuple(getattr(self, key).shape[1:])
            if found != shape:
                raise ValueError(f"dataset {self.name!r} is not of Adroit Pen: a step of {key} is {found}; needed is {shape}")

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
    return tuple(data.episodes(torch.tensor(sorted(ids))) for ids in sides)


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


def from_minari(folder, name):
    """The `Trajectories` of the Minari dataset in `folder` (the one that holds `data/`), and a digest of its file."""
    import minari

    folder = Path(folder)
    files = sorted((folder / "data").glob("*"))
    if not files:
        raise FileNotFoundError(f"no Minari dataset at {folder}")
    digest = _digest(files)
    written = folder / "sha256"  # `write_minari` leaves it; HDF5 itself has no checksum
    if written.exists() and written.read_text() != digest:
        raise store.CorruptArtifact(f"the Minari dataset at {folder} is damaged: its checksum does not hold")
    try:
        episodes = list(minari.MinariDataset(folder / "data").iterate_episodes())
        columns = {
            "obs": [e.observations[:-1] for e in episodes],
            "actions": [e.actions for e in episodes],
            "rewards": [e.rewards for e in episodes],
            "terminals": [e.terminations for e in episodes],
            "next_obs": [e.observations[1:] for e in episodes],
        }
        for key in ("qpos", "qvel", "target"):
            if episodes and key in (episodes[0].infos or {}):
                columns[f"info.{key}"] = [e.infos[key][:-1] for e in episodes]
        tensors = {k: torch.from_numpy(np.concatenate(v).astype(np.float32)) for k, v in columns.items()}
        lengths = torch.tensor([len(e.rewards) for e in episodes], dtype=torch.int64)
        return Trajectories.from_tensors({**tensors, "lengths": lengths}, name), digest
    except Exception as e:  # a damaged file breaks HDF5 and Minari in a dozen ways
        raise store.CorruptArtifact(f"the Minari dataset at {folder} cannot be used: {type(e).__name__}: {e}") from e


def _digest(files):
    return hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files if f.is_file())).hexdigest()[:12]


def find_d4rl(dataset, download=True):
    """The folder of Minari's copy of D4RL pen-`dataset`, downloaded if it is not on disk.

    Raises FileNotFoundError, at once, if it is not on disk and cannot be downloaded; the message says what to do.
    """
    from minari.storage import get_dataset_path

    folder = Path(get_dataset_path(D4RL_IDS[dataset]))
    if (folder / "data").exists():
        return folder
    here = f"D4RL data {D4RL_IDS[dataset]} is not in {folder.parents[2]}"
    if not download:
        raise FileNotFoundError(here)
    advice = (
        f"With a network, run `minari download {D4RL_IDS[dataset]}` (it needs pip install 'minari[hf]'), or copy its folder "
        f"there; or use source='local', the stand-in"
    )
    try:
        from huggingface_hub.constants import ENDPOINT
    except ImportError:
        raise FileNotFoundError(f"{here}, and downloading it needs the package huggingface_hub. {advice}.") from None
    if not _reachable(ENDPOINT):
        raise FileNotFoundError(f"{here}, and {ENDPOINT} cannot be reached to download it. {advice}.")
    import minari

    try:
        minari.download_dataset(D4RL_IDS[dataset])
    except Exception as e:  # the hub's client raises errors of many unrelated types
        raise FileNotFoundError(f"{here}, and its download failed: {type(e).__name__}: {e}. {advice}.") from e
    return folder


def _reachable(url, timeout=3.0):
    """Whether a web server answers at `url`, with whatever status."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    try:
        urllib.request.urlopen(url, timeout=timeout).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, http.client.HTTPException, ValueError):  # ValueError: HF_ENDPOINT is no address
        return False
    return True


def write_minari(folder, dataset_id, episodes, description):
    """Write batches of `adroit.Episodes` as a Minari dataset at folder/dataset_id, whole or not at all; its folder.

    qpos, qvel [T + 1, 30] and target [T + 1, 4] (quaternion) are stored as infos.
    """
    import gymnasium
    import minari
    from minari.data_collector import EpisodeBuffer

    buffers = []
    for batch in episodes:
        for i in range(len(batch.targets)):
            n = len(batch.rewards[i])
            buffers.append(
                EpisodeBuffer(
                    id=len(buffers),
                    observations=batch.obs[i],
                    actions=batch.actions[i].clip(-1.0, 1.0),
                    rewards=list(batch.rewards[i]),
                    terminations=[False] * n,
                    truncations=[False] * (n - 1) + [True],
                    infos={"qpos": batch.qpos[i], "qvel": batch.qvel[i], "target": np.tile(batch.targets[i], (n + 1, 1))},
                )
            )
    box = gymnasium.spaces.Box
    place = Path(folder) / dataset_id
    partial = Path(folder) / f".partial-{os.getpid()}-{time.time_ns()}"
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(partial)  # the only way to tell Minari where to write
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Minari's, about authors and links that a local file does not have
            minari.create_dataset_from_buffers(
                dataset_id,
                buffers,
                observation_space=box(-np.inf, np.inf, (OBS_DIM,), np.float64),
                action_space=box(-1.0, 1.0, (ACTION_DIM,), np.float64),
                description=description,
                data_format="hdf5",
            )
        (partial / dataset_id / "sha256").write_text(_digest(sorted((partial / dataset_id / "data").glob("*"))))
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / dataset_id, place)
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before
        shutil.rmtree(partial, ignore_errors=True)
    return place
