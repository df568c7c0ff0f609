"""Minari datasets: finding, reading and writing them."""

import contextlib
import hashlib
import http.client
import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from gymnasium import spaces

from pgdlib.data import LARGEST, Trajectories
from pgdlib.lab import artifacts, locks, minari_steps

INFO_DIMS = dict(qpos=30, qvel=30, target=4)  # the simulator's states, where a dataset holds them


def from_minari(folder, name):
    """The `Trajectories` of the Minari dataset in `folder` (the one that holds `data/`), in HDF5, or in Arrow as far as Minari
    itself can read it (not where infos are one number a step).

    Observations are a Box, or a Dict of Boxes, which are joined (`minari_steps.boxes`); actions a bounded Box, scaled to
    [-1, 1]. A step is terminal where the file says that the environment ended the episode, not where it was cut off. Simulator
    states (`INFO_DIMS`) that an episode lacks, or that are odd, are left out. Raises FileNotFoundError where there is no
    dataset, and CorruptArtifact, naming folder and reason, for one that is damaged or of other spaces.
    """
    import minari

    digest(folder)
    try:
        dataset = minari.MinariDataset(Path(folder) / "data")
        joined, limits = minari_steps.boxes(dataset.observation_space), minari_steps.limits(dataset.action_space)
        episodes = [minari_steps.steps(e, joined, *limits) for e in dataset.iterate_episodes()]
        if not episodes:
            raise ValueError("it holds no episode")
        columns = {k: [e[k] for e in episodes] for k in ("obs", "actions", "rewards", "terminals", "next_obs")}
        columns |= {f"info.{key}": states for key in INFO_DIMS if (states := _states(episodes, key))}
        tensors = {k: torch.from_numpy(np.concatenate(v).astype(np.float32)) for k, v in columns.items()}
        lengths = torch.tensor([len(e["rewards"]) for e in episodes], dtype=torch.int64)
        return Trajectories.from_tensors({**tensors, "lengths": lengths}, name)
    except Exception as e:  # a damaged file breaks HDF5, Arrow and Minari in a dozen ways
        form = _metadata(Path(folder)).get("data_format")
        form = "" if form in ("hdf5", None) else f", in the form {form} (Minari reads HDF5 best),"
        raise artifacts.CorruptArtifact(f"the Minari dataset at {folder}{form} cannot be used: {type(e).__name__}: {e}") from e


def _states(episodes, key):
    """The simulator states `key` of each episode, one for each step; None if one of them lacks them or they are odd."""
    found = [(np.asarray(e["infos"].get(key)), len(e["rewards"])) for e in episodes]
    for states, n in found:  # Minari's own collector writes one more than steps, at the reset; other writers may not
        if states.dtype.kind not in "biuf" or states.shape not in ((n, INFO_DIMS[key]), (n + 1, INFO_DIMS[key])):
            return None
        if not (np.abs(states[:n].astype(float)) <= LARGEST).all():
            return None
    return [states[:n] for states, n in found]


def digest(folder):
    """12 hex digits that name the content of the Minari dataset in `folder`, wherever it lies.

    Raises FileNotFoundError where there is none, and CorruptArtifact if it is not what `write_minari` wrote.
    """
    folder, whole = Path(folder), hashlib.sha256()
    files = [f for f in sorted((folder / "data").rglob("*")) if f.is_file()]
    if not files:
        raise FileNotFoundError(f"no Minari dataset at {folder}")
    for file in files:
        with open(file, "rb") as f:
            whole.update(hashlib.file_digest(f, "sha256").digest())
    found, written = whole.hexdigest()[:12], folder / "sha256"  # HDF5 itself has no checksum
    if written.exists() and written.read_text(errors="replace") != found:
        raise artifacts.CorruptArtifact(f"the Minari dataset at {folder} is damaged: its checksum does not hold")
    return found


def is_whole(folder):
    """Whether there is a Minari dataset in `folder` that is what `write_minari` wrote."""
    with contextlib.suppress(FileNotFoundError, artifacts.CorruptArtifact):
        return bool(digest(folder))
    return False


def is_known(folder, known, lengths):
    """Whether the Minari dataset in `folder`, of such `lengths`, is the `known` one, by what `tasks.PUBLIC` has of it."""
    found = _metadata(folder).get("dataset_id"), len(lengths), int(lengths.sum())
    return (*found[: len(known)], *(digest(folder) for _ in known[3:])) == known


def environment(folder):
    """The id of the gymnasium environment that the Minari dataset in `folder` is of; None where it does not say."""
    try:
        return json.loads(_metadata(folder)["env_spec"])["id"]
    except (KeyError, TypeError, ValueError):
        return None


def _metadata(folder):
    """What Minari notes of the dataset in `folder`; empty if it cannot be read."""
    try:
        return dict(json.loads((Path(folder) / "data" / "metadata.json").read_text()))
    except (OSError, TypeError, ValueError):
        return {}


def find(name, download=True, hint=""):
    """The folder of the Minari dataset with the id `name`, downloaded if it is not on disk, whole or not at all.

    Raises FileNotFoundError, at once, if it is not on disk and cannot be downloaded; the message says what to do, and `hint`.
    """
    from minari.storage import get_dataset_path

    folder = Path(get_dataset_path(name))
    if _is_downloaded(folder):
        return folder
    here = f"Minari's {name} is not in {folder.parents[name.count('/')]}"
    if not download:
        raise FileNotFoundError(here)
    try:
        _download(name, folder)
    except Exception as e:  # the hub's client raises errors of many unrelated types
        raise FileNotFoundError(
            f"{here}, and its download failed: {type(e).__name__}: {e}. With a network, run `minari download {name}` (it needs "
            f"pip install 'minari[hf]'), or copy its folder there{hint}."
        ) from e
    return folder


def _is_downloaded(folder):
    """Whether the Minari dataset in `folder` has all its parts: an interrupted `minari download` leaves some of them."""
    described, data = _metadata(folder), folder / "data"
    if not {"total_episodes", "total_steps"} <= set(described):
        return False
    if described.get("data_format") in ("arrow", "parquet"):
        return all((data / str(i)).is_dir() for i in range(described["total_episodes"]))
    return any(data.glob("main_data*"))


def _download(name, folder):
    """Download the Minari dataset `name` beside `folder` and put it there when it is whole."""
    import minari
    from huggingface_hub.constants import ENDPOINT

    if not _reachable(ENDPOINT):
        raise ConnectionError(f"{ENDPOINT} cannot be reached")
    with locks.lock(folder):
        if _is_downloaded(folder):  # another process has just done it
            return
        with locks.replacing(folder) as partial:
            # Minari's environment variable is the only way to tell it where to.
            with mock.patch.dict(os.environ, MINARI_DATASETS_PATH=str(partial.parent / "root")):
                minari.download_dataset(name)
            os.replace(partial.parent / "root" / name, partial)
            if not _is_downloaded(partial):
                raise OSError("parts of it are missing")
            from_minari(partial, name)
            if folder.exists():
                artifacts.set_aside(folder, "parts are missing")


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


def write_minari(folder, dataset_id, episodes, description, whole=True):
    """Write batches of `Episodes` as a Minari dataset at folder/dataset_id, whole or not at all; its folder.

    Where they have a goal, it, qpos and qvel are stored as infos, [T + 1, ...]. Not `whole`: episodes end where the environment
    ends them, and say so; else they go on, as Minari's of Adroit do.
    """
    import minari
    from minari.dataset.minari_storage import MinariStorage

    episodes, place = list(episodes), Path(folder) / dataset_id
    needed = sum(array.nbytes for batch in episodes for array in vars(batch).values())
    with locks.replacing(place, needed) as partial:
        (partial / "data").mkdir(parents=True)
        both = (-np.inf, np.inf, episodes[0].obs.shape[2:]), (-1.0, 1.0, episodes[0].actions.shape[2:])
        both = [spaces.Box(*of, np.float64) for of in both]
        storage = MinariStorage.new(partial / "data", *both, data_format="hdf5")
        names = dict(dataset_id=dataset_id, minari_version=minari.__version__, description=description)
        storage.update_metadata(names)
        storage.update_episodes(_buffers(episodes, whole))
        (partial / "sha256").write_text(digest(partial))
    return place


def _buffers(episodes, whole=True):
    """Minari's form of each episode in batches of `Episodes`."""
    from minari.data_collector import EpisodeBuffer

    for batch in episodes:
        for i, n in enumerate([batch.rewards.shape[1]] * len(batch.rewards) if whole else batch.lengths().tolist()):
            ended = bool(batch.ended[i, n - 1]) and not whole
            states = dict(qpos=batch.qpos[i], qvel=batch.qvel[i], target=np.tile(batch.goals[i], (n + 1, 1)))
            yield EpisodeBuffer(
                observations=batch.obs[i, : n + 1],
                actions=batch.actions[i, :n].clip(-1.0, 1.0),
                rewards=list(batch.rewards[i, :n]),
                terminations=[False] * (n - 1) + [ended],
                truncations=[False] * (n - 1) + [not ended],
                infos=states if batch.goals.size else {},
            )
