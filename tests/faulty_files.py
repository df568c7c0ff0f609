"""Minari files with faults, drawn by hypothesis, and what reading them comes to, against h5py."""

import shutil

import h5py
import numpy as np
import torch
from hypothesis import strategies as st

from pgdlib import data
from pgdlib.lab import artifacts, minari_files
from pgdlib.simulators import pen

ARRAYS = dict(observations=(45,), actions=(24,), rewards=(), terminations=())
INFOS = {"infos/qpos": (30,), "infos/qvel": (30,), "infos/target": (4,)}
MOST = {"actions": 1 + 2e-6}  # their Box, but for rounding; of the others 1e6


def put(array, value, place):
    array = array.astype(np.float64)
    array.reshape(-1)[[place % array.size] if array.size else []] = value
    return array


def another_shape(array, value, place):
    odd = [array[:-1], np.concatenate([array, array[:1]]), array[:0], array[:1], array[..., None], array[None]]
    return [*odd, array[..., :-1], array.T][place % 8]


def another_kind(array, value, place):
    kinds = (np.float32, np.float16, np.int64, np.uint8, bool, "S3")
    return np.zeros_like(array).astype(kinds[place % 6]) if place % 2 else array.clip(-9, 9).astype(kinds[place % 6])


def constant(array, value, place):
    return np.full_like(array, value, dtype=np.float64)


def missing(array, value, place):
    return None


NUMBERS = st.sampled_from([np.nan, np.inf, 1e300, 2e6, -1e6, 5.0, 0.0])
FAULTS = st.tuples(
    st.sampled_from([put, another_shape, another_kind, constant, missing]),
    st.integers(0, 2),  # of the episode
    st.sampled_from([*ARRAYS, *INFOS]),
    NUMBERS,
    st.integers(0, 1_000),
)
MOVED = st.integers(-2, 2)  # steps of the first episode's observations that stand in the second's


def damage(whole, folder, faults, moved):
    """A copy of the Minari dataset `whole` with `faults`, without its checksum."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    (folder / "sha256").unlink()
    with h5py.File(folder / "data/main_data.hdf5", "a") as file:
        if moved:
            first, second = (file[f"episode_{e}/observations"][()] for e in (0, 1))
            both, n = np.concatenate([first, second]), len(first) + moved
            replace(file, "episode_0/observations", both[:n])
            replace(file, "episode_1/observations", both[n:])
        for fault, episode, name, value, place in faults:
            path = f"episode_{episode}/{name}"
            if path in file and file[path].dtype.kind != "S":
                replace(file, path, fault(file[path][()], value, place))


def replace(file, path, array):
    del file[path]
    if array is not None:
        file.create_dataset(path, data=array)


def expected(folder):
    """The arrays that the file holds, as numpy; None if they are no dataset of Adroit Pen."""
    columns, odd = {name: [] for name in [*ARRAYS, *INFOS]}, set()
    with h5py.File(folder / "data/main_data.hdf5") as file:
        for episode in (file[f"episode_{i}"] for i in range(3)):
            if not all(name in episode for name in ARRAYS):
                return None
            steps = episode["rewards"].shape[:1]
            for name in (*ARRAYS, *INFOS):
                if name not in episode:
                    odd.add(name)
                    continue
                array = episode[name][()]
                more = {"observations": (1,)}.get(name, (0, 1) if name in INFOS else (0,))  # rows beyond one for each step
                shapes = [(steps[0] + m, *{**ARRAYS, **INFOS}[name]) for m in more if steps]
                good = array.dtype.kind in "biuf" and array.shape in shapes and steps[0] >= 1
                read = array[: steps[0]] if good and name in INFOS else array  # the state after the last step is not
                if not (good and (np.abs(read.astype(np.float64)) <= MOST.get(name, 1e6)).all()):
                    if name in ARRAYS:
                        return None
                    odd.add(name)
                columns[name].append(array)
    terminal = np.concatenate(columns["terminations"])
    return {k: v for k, v in columns.items() if k not in odd} if np.isin(terminal, [0, 1]).all() else None


def read(whole, folder, faults, moved):
    """Read a damaged file: "accepted", as h5py has it, or "refused" by name; AssertionError for anything else."""
    damage(whole, folder, faults, moved)
    columns = expected(folder)
    try:
        with np.errstate(over="ignore"):  # 1e300 in float32
            found = minari_files.from_minari(folder, "toy")
    except artifacts.CorruptArtifact as e:
        assert columns is None and str(folder) in str(e), e
        assert "episode" in str(e) or any(name.split("/")[-1] in str(e) for name in ARRAYS), e
        return "refused"
    assert columns is not None, "a file that holds no dataset is accepted"
    assert found.lengths.tolist() == [len(a) for a in columns["actions"]]
    n = found.lengths.tolist()
    states = {name: np.concatenate([a[:k] for a, k in zip(columns[name], n)]) for name in INFOS if name in columns}
    assert {f"infos/{k}" for k in found.info} == states.keys()
    same = dict(actions=found.actions, rewards=found.rewards, terminations=found.terminals)
    for name, tensor in same.items():
        np.testing.assert_array_equal(tensor, np.concatenate(columns[name]).astype(np.float32))
    for name, tensor in found.info.items():
        np.testing.assert_array_equal(tensor, states[f"infos/{name}"].astype(np.float32))
    for part, tensor in ((slice(None, -1), found.obs), (slice(1, None), found.next_obs)):
        rows = np.concatenate([o[part] for o in columns["observations"]])
        np.testing.assert_array_equal(tensor, rows.astype(np.float32))
    data.end_where(found, torch.from_numpy(pen.outcome(found.next_obs.numpy())[2]))
    return "accepted"
