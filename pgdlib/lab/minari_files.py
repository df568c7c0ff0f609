"""Minari datasets: finding D4RL's, reading any, writing the stand-ins."""

import contextlib
import hashlib
import http.client
import json
import os
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import torch

from pgdlib.data import Trajectories
from pgdlib.lab import artifacts
from pgdlib.simulators.pen import ACTION_DIM, OBS_DIM

INFO_DIMS = dict(qpos=30, qvel=30, target=4)  # the simulator's states, where a dataset holds them
D4RL_IDS = {name: f"D4RL/pen/{name}-v2" for name in ("human", "cloned", "expert")}


def from_minari(folder, name):
    """The `Trajectories` of the Minari dataset in `folder` (the one that holds `data/`), and a digest of its file."""
    import minari

    folder = Path(folder)
    if not any((folder / "data").glob("*")):
        raise FileNotFoundError(f"no Minari dataset at {folder}")
    found = digest(folder)
    if not _matches(folder, found):
        raise artifacts.CorruptArtifact(f"the Minari dataset at {folder} is damaged: its checksum does not hold")
    try:
        episodes = [_checked(e) for e in minari.MinariDataset(folder / "data").iterate_episodes()]
        if not episodes:
            raise ValueError("it holds no episode")
        columns = {
            "obs": [e.observations[:-1] for e in episodes],
            "actions": [e.actions for e in episodes],
            "rewards": [e.rewards for e in episodes],
            "terminals": [e.terminations for e in episodes],
            "next_obs": [e.observations[1:] for e in episodes],
        }
        for key in INFO_DIMS:
            if key in (episodes[0].infos or {}):
                columns[f"info.{key}"] = [e.infos[key][: len(e.rewards)] for e in episodes]
        tensors = {k: torch.from_numpy(np.concatenate(v).astype(np.float32)) for k, v in columns.items()}
        lengths = torch.tensor([len(e.rewards) for e in episodes], dtype=torch.int64)
        return Trajectories.from_tensors({**tensors, "lengths": lengths}, name), found
    except Exception as e:  # a damaged file breaks HDF5 and Minari in a dozen ways
        raise artifacts.CorruptArtifact(f"the Minari dataset at {folder} cannot be used: {type(e).__name__}: {e}") from e


def _checked(e):
    """The episode `e` of a Minari dataset. Raises ValueError if its arrays are not of the same steps, or not of Adroit Pen."""
    n = np.shape(e.rewards)[0]
    needed = dict(observations=(n + 1, OBS_DIM), actions=(n, ACTION_DIM), rewards=(n,), terminations=(n,))
    infos = {k: v for k, v in (e.infos or {}).items() if k in INFO_DIMS}
    # Of infos, Minari's own collector writes one more than steps, at the reset; other writers may not.
    needed |= {key: (n + (np.shape(infos[key])[:1] == (n + 1,)), INFO_DIMS[key]) for key in infos}
    for key, shape in needed.items():
        array = np.asarray(infos[key] if key in infos else getattr(e, key))
        if array.dtype.kind not in "biuf" or array.shape != shape:
            raise ValueError(f"episode {e.id}: {key} is {array.dtype} {array.shape}; needed are real numbers {shape}")
    return e


def digest(folder):
    """12 hex digits that name the content of the Minari dataset in `folder`, wherever it lies."""
    files = sorted((Path(folder) / "data").glob("*"))
    return hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files if f.is_file())).hexdigest()[:12]


def is_whole(folder):
    """Whether the checksum of the dataset that `write_minari` wrote to `folder` holds."""
    return (folder / "sha256").exists() and (folder / "data").is_dir() and _matches(folder, digest(folder))


def _matches(folder, found):
    written = folder / "sha256"  # `write_minari` leaves it; HDF5 itself has no checksum
    return not written.exists() or written.read_text(errors="replace") == found


def find_d4rl(dataset, download=True):
    """The folder of Minari's copy of D4RL pen-`dataset`, downloaded if it is not on disk, whole or not at all.

    Raises FileNotFoundError, at once, if it is not on disk and cannot be downloaded; the message says what to do.
    """
    from minari.storage import get_dataset_path

    folder = Path(get_dataset_path(D4RL_IDS[dataset]))
    if is_downloaded(folder):
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
    try:
        with artifacts.lock(folder):
            if not is_downloaded(folder):  # another process has not just done it
                _download(dataset, folder)
    except Exception as e:  # the hub's client raises errors of many unrelated types
        raise FileNotFoundError(f"{here}, and its download failed: {type(e).__name__}: {e}. {advice}.") from e
    return folder


def is_downloaded(folder):
    """Whether the Minari dataset in `folder` has all its parts: an interrupted `minari download` leaves some of them."""
    try:
        described = json.loads((folder / "data" / "metadata.json").read_text())
        return {"total_episodes", "total_steps"} <= set(described) and any((folder / "data").glob("main_data*"))
    except (OSError, TypeError, ValueError):
        return False


def _download(dataset, folder):
    """Download D4RL pen-`dataset` beside `folder` and put it there when it is whole."""
    import minari

    with artifacts.replacing(folder) as partial:
        with _minari_writes_to(partial.parent / "root"):
            minari.download_dataset(D4RL_IDS[dataset])
        os.replace(partial.parent / "root" / D4RL_IDS[dataset], partial)
        if not is_downloaded(partial):
            raise OSError("parts of it are missing")
        from_minari(partial, dataset)
        if folder.exists():
            artifacts.set_aside(folder, "parts are missing")


@contextlib.contextmanager
def _minari_writes_to(folder):
    """Let Minari keep its datasets in `folder`; its environment variable is the only way to tell it."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before


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

    buffers, size = [], 0
    for batch in episodes:
        size += sum(array.nbytes for array in vars(batch).values())
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
    box, place = gymnasium.spaces.Box, Path(folder) / dataset_id
    with artifacts.replacing(place, size) as partial:
        with _minari_writes_to(partial.parent / "root"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Minari's, about authors and links that a local file does not have
            minari.create_dataset_from_buffers(
                dataset_id,
                buffers,
                observation_space=box(-np.inf, np.inf, (OBS_DIM,), np.float64),
                action_space=box(-1.0, 1.0, (ACTION_DIM,), np.float64),
                description=description,
                data_format="hdf5",
            )
        os.replace(partial.parent / "root" / dataset_id, partial)
        (partial / "sha256").write_text(digest(partial))
    return place
