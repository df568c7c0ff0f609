"""Minari folders that are whole, damaged, missing, or of D4RL's form."""

import contextlib
import json
import os
import shutil
import socket
import sys
import threading
import time
import types
from pathlib import Path

import gymnasium
import minari
import numpy as np
import pytest
import torch
from conftest import cut, kept, replay, white
from minari.data_collector import EpisodeBuffer
from minari.dataset._storages.hdf5_storage import HDF5Storage

from pgdlib import data
from pgdlib.lab import artifacts, load, minari_files, minari_steps, standins, tasks
from pgdlib.simulators import pen as adroit


@pytest.fixture(scope="module")
def episodes():
    """Two batches of short simulated episodes, with actions beyond the limits."""
    rng = np.random.default_rng(0)
    return [adroit.rollout(replay(white(rng, n, 20)), n, rng, 20) for n in (3, 2)]


@pytest.fixture
def folder(tmp_path, episodes):
    return minari_files.write_minari(tmp_path / "minari", "standin/pen/toy-v0", episodes, "a toy")


def test_minari_roundtrip(folder, episodes, tmp_path):
    assert folder == tmp_path / "minari/standin/pen/toy-v0"
    assert [p.name for p in (tmp_path / "minari").iterdir()] == ["standin"]  # nothing half-written beside it
    read = minari_files.from_minari(folder, "toy")
    assert read.lengths.tolist() == [20] * 5 and read.name == "toy"
    expected = {
        "obs": [e.obs[:, :-1] for e in episodes],
        "next_obs": [e.obs[:, 1:] for e in episodes],
        "actions": [e.actions.clip(-1, 1) for e in episodes],
        "rewards": [e.rewards for e in episodes],
        "terminals": [np.zeros_like(e.rewards) for e in episodes],
        "info.qpos": [e.qpos[:, :-1] for e in episodes],
        "info.qvel": [e.qvel[:, :-1] for e in episodes],
        "info.target": [np.repeat(e.goals[:, None], 20, 1) for e in episodes],
    }
    assert read.tensors().keys() == {*expected, "lengths"}
    for key, batches in expected.items():
        flat = np.concatenate([b.reshape(-1, *b.shape[2:]) for b in batches])
        assert read.tensors()[key].dtype == torch.float32
        np.testing.assert_allclose(read.tensors()[key], flat, rtol=1e-6, atol=1e-6, err_msg=key)


def test_minari_itself_reads_what_we_write(folder, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder.parents[2]))
    theirs = minari.load_dataset("standin/pen/toy-v0")
    assert (theirs.total_episodes, theirs.total_steps) == (5, 100)
    assert (theirs[4].observations.shape, theirs[4].truncations.tolist()) == ((21, 45), [False] * 19 + [True])


def test_the_digest_follows_the_content(folder, episodes, tmp_path):
    again = minari_files.write_minari(tmp_path / "again", "standin/pen/toy-v0", episodes[:1], "a toy")
    digests = [minari_files.digest(f) for f in (folder, folder, again)]
    assert digests[0] == digests[1] != digests[2]


def test_an_interrupted_write_leaves_nothing(tmp_path, episodes, monkeypatch):
    def interrupted():
        yield episodes[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        minari_files.write_minari(tmp_path, "standin/pen/toy-v0", interrupted(), "a toy")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(HDF5Storage, "update_episodes", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
        minari_files.write_minari(tmp_path, "standin/pen/toy-v0", episodes, "a toy")
    assert kept(tmp_path) == []


def damaged(folder, reason=None):
    with pytest.raises(artifacts.CorruptArtifact, match=reason) as error:
        minari_files.from_minari(folder, "toy")
    assert str(folder) in str(error.value)


def test_damaged_files_are_named(folder):
    file, card = folder / "data/main_data.hdf5", folder / "data/metadata.json"
    whole, text = file.read_bytes(), card.read_text()
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        damaged(folder)
    for first in range(0, len(whole) - 1000, len(whole) // 25):  # some of these hit numbers, some the file's own tables
        file.write_bytes(whole[:first] + bytes(b ^ 255 for b in whole[first : first + 600]) + whole[first + 600 :])
        damaged(folder)
    file.write_bytes(whole)
    for broken in ("", text[:-1], json.dumps({k: v for k, v in json.loads(text).items() if k != "observation_space"})):
        card.write_text(broken)
        damaged(folder)
    card.write_text(text)
    minari_files.from_minari(folder, "toy")
    file.unlink()
    damaged(folder)
    with pytest.raises(FileNotFoundError, match=r"no Minari dataset at .*nowhere"):
        minari_files.from_minari(folder.parent / "nowhere", "toy")


def write_d4rl(root, dataset, infos=True, **form):
    """A Minari dataset in the form of D4RL's v2 files: 3 episodes, the pen of the second falls at its fifth of 12 steps."""
    rng = np.random.default_rng(0)
    buffers = []
    for i, n in enumerate((10, 12, 8)):
        obs = rng.normal(size=(n + 1, 45))
        obs[:, 26] = 0.2
        obs[5:, 26] -= 0.2 * (i == 1)
        buffers.append(
            EpisodeBuffer(
                id=i,
                observations=obs,
                actions=rng.uniform(-1, 1, (n, 24)).astype(np.float32),
                rewards=list(rng.normal(size=n)),
                terminations=[False] * n,
                truncations=[False] * (n - 1) + [True],
                infos={"success": np.zeros(n + 1, dtype=bool)} if infos else {},
            )
        )
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning):
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        minari.create_dataset_from_buffers(
            f"D4RL/pen/{dataset}-v2",
            buffers,
            observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (45,), np.float64),
            action_space=gymnasium.spaces.Box(-1, 1, (24,), np.float32),
            **form,
        )
    return [np.array(b.observations) for b in buffers]


@pytest.fixture
def d4rl(tmp_path, monkeypatch, runs):
    """The folder in which Minari looks for datasets, empty, and no way to the network."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    monkeypatch.setattr(tasks, "PUBLIC", {name: (id_, 3, 30) for name, (id_, *_) in tasks.PUBLIC.items()})
    return tmp_path / "datasets"


@pytest.mark.parametrize("source", ["auto", "d4rl"])
def test_d4rl_on_disk_is_found_and_cut_at_falls(d4rl, source, monkeypatch):
    obs = write_d4rl(d4rl, "human")
    found = load.load_data("human", source, 4_000)
    assert found.is_public and found.label == found.raw.name == "D4RL pen-human" and found.slug == "d4rl-human"
    assert found.raw.lengths.tolist() == [10, 12, 8] and found.data.lengths.tolist() == [10, 5, 8]
    assert (found.cut_episodes, found.dropped_steps) == (1, 7)
    assert torch.nonzero(found.data.terminals)[:, 0].tolist() == [14]
    np.testing.assert_allclose(found.data.obs, np.concatenate([obs[0][:10], obs[1][:5], obs[2][:8]]), rtol=1e-6)
    monkeypatch.setitem(tasks.PUBLIC, "human", (*tasks.PUBLIC["human"], minari_files.digest(d4rl / "D4RL/pen/human-v2")))
    again = load.load_data("human", source, 4_000)
    assert again.is_public and again.key == found.key and torch.equal(again.data.packed(), found.data.packed())


@pytest.mark.parametrize("known", [("v1", 3, 30), ("v2", 25, 5_000), ("v2", 3, 31), ("v2", 3, 30, "0123456789ab")])
def test_what_is_not_d4rls_keeps_a_name_of_its_own(d4rl, monkeypatch, known):
    write_d4rl(d4rl, "human")
    monkeypatch.setattr(minari_files, "find", lambda name, hint: d4rl / "D4RL/pen/human-v2")
    known, said = (f"D4RL/pen/human-{known[0]}", *known[1:]), []
    monkeypatch.setitem(tasks.PUBLIC, "human", known)
    found = load.load_data("human", "d4rl", 4_000, say=said.append)
    assert (found.is_public, found.label, found.slug) == (False, "own pen-human", "own-human")
    digest = f", with the digest {known[3]}" if known[3:] else ""
    assert f"is not {known[0]} of {known[1]} episodes and {known[2]:,} steps{digest}: called" in said[0]


def test_d4rls_sizes():
    """As Minari's catalogue has them."""
    assert [tasks.PUBLIC[name][1:] for name in ("human", "cloned", "expert")] == [
        (25, 5_000), (3_736, 500_000), (4_958, 499_206)
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_a_copy_in_arrows_form_is_read_or_refused_by_name(d4rl, form):
    pytest.importorskip("pyarrow")
    obs = write_d4rl(d4rl, "human", data_format=form, infos=False)
    assert load.load_data("human", "d4rl", 4_000).is_public
    folder = minari_files.find("D4RL/pen/human-v2")
    read = minari_files.from_minari(folder, "human")
    np.testing.assert_allclose(read.next_obs, np.concatenate([o[1:] for o in obs]), rtol=1e-6)
    digest = minari_files.digest(folder)
    shutil.rmtree(folder / "data/2")
    assert minari_files.digest(folder) != digest
    with pytest.raises(FileNotFoundError):
        minari_files.find("D4RL/pen/human-v2", download=False)
    shutil.rmtree(folder)
    write_d4rl(d4rl, "human", data_format=form)  # whose infos Minari itself cannot read
    damaged(minari_files.find("D4RL/pen/human-v2"), f"in the form {form}")


def test_a_format_that_cannot_be_read_is_refused_by_name(folder):
    card = folder / "data/metadata.json"
    card.write_text(card.read_text().replace('"hdf5"', '"zarr"'))
    (folder / "sha256").unlink()
    damaged(folder, "zarr")


@pytest.mark.parametrize("odd", ["none", "of one episode", "short", "text", "not finite", "further on"])
def test_states_are_optional(tmp_path, episodes, runs, monkeypatch, odd):
    """Absent from some episodes or odd, they are left out, with a line, and the rest is as it was."""
    buffers = list(minari_files._buffers(episodes))
    expected = {"qvel", "target"}
    for i, buffer in enumerate(buffers):
        qpos = np.array(buffer.infos["qpos"])
        if odd == "none":
            buffer.infos.clear()
            expected = set()
        elif i == 2:
            if odd == "of one episode":
                del buffer.infos["qpos"]
            else:
                first = dict(
                    short=qpos[:-2], text=np.full(len(qpos), b"no"), **{"not finite": qpos * np.nan, "further on": qpos[:, 1:]}
                )
                buffer.infos["qpos"] = first[odd]
    monkeypatch.setattr(minari_files, "_buffers", lambda *_: buffers)
    folder, said = minari_files.write_minari(tmp_path / "odd", "standin/pen/human-v0", episodes, "a toy"), []
    monkeypatch.setattr(standins, "folder", lambda *_: folder)
    found = load.load_data("human", "local", 4_000, say=said.append)
    assert found.raw.info.keys() == expected and found.raw.lengths.tolist() == [20] * 5
    assert said[1].startswith("stand-in pen-human goes without the simulator's qpos") and "odd ones" in said[1]


def test_a_damaged_d4rl_file_is_named_and_not_replaced_by_a_stand_in(d4rl):
    write_d4rl(d4rl, "human")
    file = d4rl / "D4RL/pen/human-v2/data/main_data.hdf5"
    file.write_bytes(file.read_bytes()[:5000])
    for source in ("auto", "d4rl"):
        with pytest.raises(artifacts.CorruptArtifact, match="human-v2"):
            load.load_data("human", source, 4_000)


@contextlib.contextmanager
def server(answer):
    """A web address whose server takes a connection and sends `answer`, or nothing at all for None."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        held = []

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    held.append(listening.accept()[0])
                    if answer is not None:
                        held[-1].recv(1000)
                        held[-1].sendall(answer)
                        held[-1].close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def pretend_hub(monkeypatch, address):
    """As if huggingface_hub were installed, with its hub at `address`."""
    hub = types.ModuleType("huggingface_hub")
    hub.constants = types.ModuleType("huggingface_hub.constants")
    hub.constants.ENDPOINT = address
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.constants", hub.constants)


def refused_at_once(reason):
    started = time.monotonic()
    with pytest.raises(FileNotFoundError, match=reason) as error:
        load.load_data("expert", "d4rl", 4_000)
    assert time.monotonic() - started < 5
    for part in ("D4RL/pen/expert-v2", "datasets", "minari download D4RL/pen/expert-v2", "minari[hf]", "source='local'"):
        assert part in str(error.value), error.value


def test_without_the_hub_package_d4rl_says_what_to_do(d4rl):
    refused_at_once("download failed: ModuleNotFoundError: .*huggingface_hub")
    with pytest.raises(FileNotFoundError):
        minari_files.find("D4RL/pen/expert-v2", download=False)


@pytest.mark.parametrize("answer", [None, b"", b"nonsense\r\n\r\n", "closed", "not an address"], ids=str)
def test_without_a_network_d4rl_says_what_to_do(d4rl, monkeypatch, answer):
    (longest,) = minari_files._reachable.__defaults__
    assert longest <= 3  # seconds; not waited for here
    monkeypatch.setattr(minari_files._reachable, "__defaults__", (0.5,))
    with server(answer if isinstance(answer, bytes) else None) as address:
        closed = socket.create_server(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        closed.close()
        pretend_hub(monkeypatch, {"closed": f"http://127.0.0.1:{port}", "not an address": "hub"}.get(answer, address))
        refused_at_once("cannot be reached")


def test_offline_is_believed_at_once(d4rl, monkeypatch):
    with server(b"HTTP/1.1 200 OK\r\n\r\n") as address:
        pretend_hub(monkeypatch, address)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        refused_at_once("cannot be reached")


@pytest.mark.parametrize("status", [b"200 OK", b"404 Not Found"])
def test_a_failed_download_says_what_to_do(d4rl, monkeypatch, status):
    class HubError(Exception):
        """The hub's errors are not OSErrors."""

    def fail(dataset_id):
        raise HubError(f"{dataset_id}: no route")

    monkeypatch.setattr(minari, "download_dataset", fail)
    with server(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n") as address:
        pretend_hub(monkeypatch, address)
        refused_at_once("download failed: HubError: D4RL/pen/expert-v2: no route")


def test_a_download_is_used(d4rl, monkeypatch):
    monkeypatch.setattr(minari, "download_dataset", lambda dataset_id: write_d4rl(os.environ["MINARI_DATASETS_PATH"], "human"))
    with server(b"HTTP/1.1 200 OK\r\n\r\n") as address:
        pretend_hub(monkeypatch, address)
        assert load.load_data("human", "auto", 4_000).is_public
    assert kept(d4rl) == [f"D4RL/pen/human-v2/data/{name}" for name in ("main_data.hdf5", "metadata.json")]


@pytest.mark.parametrize("left", ["main_data.hdf5", "metadata.json", "half of main_data.hdf5"])
def test_a_download_that_breaks_off_is_not_taken_for_the_dataset(d4rl, monkeypatch, left):
    """The network goes while files come in, as a user's own `minari download` may have left them, too; the next run has all."""

    def download(dataset_id):
        write_d4rl(os.environ["MINARI_DATASETS_PATH"], "human")
        if breaks:
            data = Path(os.environ["MINARI_DATASETS_PATH"], "D4RL/pen/human-v2/data")
            for file in data.iterdir():
                if file.name not in left:
                    file.unlink()
                elif left.startswith("half"):
                    cut(file)
            if left != "metadata.json":  # there it ends quietly
                raise ConnectionError("the network is gone")

    monkeypatch.setattr(minari, "download_dataset", download)
    breaks = True
    with server(b"HTTP/1.1 200 OK\r\n\r\n") as address:
        pretend_hub(monkeypatch, address)
        with pytest.raises(FileNotFoundError, match=r"download failed.*(network is gone|parts of it are missing)"):
            minari_files.find("D4RL/pen/human-v2")
        assert kept(d4rl) == []
        if not left.startswith("half"):
            with pytest.raises(ConnectionError) if left != "metadata.json" else contextlib.nullcontext():
                monkeypatch.setenv("MINARI_DATASETS_PATH", str(d4rl))
                download("by the user")
            assert [f for f in kept(d4rl) if "human-v2" in f] == [f"D4RL/pen/human-v2/data/{left}"]
        breaks = False
        folder = minari_files.find("D4RL/pen/human-v2")
    assert minari_files.from_minari(folder, "human").lengths.tolist() == [10, 12, 8]
    assert len([f for f in kept(d4rl) if "damaged" in f]) == (not left.startswith("half"))


# Of any environment


def box(size, dtype=np.float64):
    return gymnasium.spaces.Box(-np.inf, np.inf, (size,), dtype)


BOX, REACH = box(3), gymnasium.spaces.Box(-1, 1, (2,), np.float32)
GOAL = gymnasium.spaces.Dict(
    achieved_goal=gymnasium.spaces.Box(-9, 9, (2,), np.float32), height=gymnasium.spaces.Box(0, 9, ()), observation=BOX
)
MAZE, KITCHEN = dict(achieved_goal=box(2), desired_goal=box(2)), gymnasium.spaces.Dict(kettle=box(7), microwave=box(1))
FORMS = {  # of Minari's other namespaces: the observation, with names in order, as gymnasium joins them; how many actions
    "mujoco/ant": (box(105), 8),
    "D4RL/door": (box(39, np.float32), 28),
    "D4RL/hammer": (box(46), 26),
    "D4RL/relocate": (box(39), 30),
    "D4RL/pointmaze": (gymnasium.spaces.Dict(**MAZE, observation=box(4)), 2),
    "D4RL/antmaze": (gymnasium.spaces.Dict(**MAZE, observation=box(27)), 8),
    "D4RL/kitchen": (gymnasium.spaces.Dict(achieved_goal=KITCHEN, desired_goal=KITCHEN, observation=box(59)), 9),
    "a single number": (GOAL, 2),
}


def stacked(drawn):
    return {k: stacked([o[k] for o in drawn]) for k in drawn[0]} if isinstance(drawn[0], dict) else np.stack(drawn)


def any_dataset(root, observation=BOX, action=REACH, lengths=(4, 1, 7), change=lambda buffer: None):
    """The folder of a Minari dataset of random episodes of such spaces: the first is cut off, the others are ended."""
    buffers = []
    for i, n in enumerate(lengths):
        observation.seed(i), action.seed(i)
        drawn = [observation.sample() for _ in range(n + 1)]
        ended = [False] * (n - 1) + [i > 0]
        cut_off = [False] * (n - 1) + [i == 0]
        how = dict(rewards=list(np.arange(n, dtype=float)), terminations=ended, truncations=cut_off)
        buffers.append(
            EpisodeBuffer(id=i, observations=stacked(drawn), actions=np.array([action.sample() for _ in range(n)]), **how)
        )
        change(buffers[-1])
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning):
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        minari.create_dataset_from_buffers("my/own-v0", buffers, observation_space=observation, action_space=action)
    return root / "my/own-v0", buffers


def test_any_box_is_read_with_its_ends_and_actions_of_any_range(tmp_path):
    action = gymnasium.spaces.Box(np.array([-0.4, 0.0]), np.array([0.4, 10.0]), (2,), np.float64)
    folder, buffers = any_dataset(tmp_path, gymnasium.spaces.Box(-5, 5, (3,), np.float32), action)
    read = minari_files.from_minari(folder, "mine")
    assert read.lengths.tolist() == [4, 1, 7] and (read.spec.obs_dim, read.spec.action_dim) == (3, 2)
    assert torch.nonzero(read.terminals)[:, 0].tolist() == [4, 11]  # the first was cut off, not ended
    np.testing.assert_array_equal(read.obs, np.concatenate([b.observations[:-1] for b in buffers]))
    np.testing.assert_array_equal(read.next_obs, np.concatenate([b.observations[1:] for b in buffers]))
    given = np.concatenate([b.actions for b in buffers])
    np.testing.assert_allclose(read.actions.numpy() * [0.4, 5.0] + [0.0, 5.0], given, atol=1e-6)
    assert read.rewards.tolist() == [*range(4), 0, *range(7)]


def test_boxes_of_a_dict_are_named_in_the_order_of_their_names():
    found = minari_steps.boxes(GOAL)
    assert found == {("achieved_goal",): slice(0, 2), ("height",): slice(2, 3), ("observation",): slice(3, 6)}
    deep = gymnasium.spaces.Dict(b=BOX, a=gymnasium.spaces.Dict(z=BOX, y=BOX))
    assert [*minari_steps.boxes(deep)] == [("a", "y"), ("a", "z"), ("b",)] and minari_steps.boxes(BOX) == {(): slice(0, 3)}


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_other_namespaces_are_read_as_gymnasium_flattens_them(tmp_path, form):
    observation, actions = FORMS[form]
    folder, buffers = any_dataset(tmp_path, observation, gymnasium.spaces.Box(-1, 1, (actions,), np.float32))
    read, iterate = minari_files.from_minari(folder, "mine"), gymnasium.vector.utils.iterate
    flat = [[gymnasium.spaces.flatten(observation, o) for o in iterate(observation, b.observations)] for b in buffers]
    np.testing.assert_allclose(read.obs, np.concatenate([each[:-1] for each in flat]), rtol=1e-6)
    np.testing.assert_allclose(read.next_obs, np.concatenate([each[1:] for each in flat]), rtol=1e-6)
    assert (read.spec.obs_dim, read.spec.action_dim) == (gymnasium.spaces.flatdim(observation), actions)


@pytest.mark.parametrize(
    "spaces, reason",
    [
        (dict(observation=gymnasium.spaces.Discrete(3)), r"its observation is Discrete\(3\); needed are Boxes"),
        (dict(observation=gymnasium.spaces.Tuple([BOX, BOX])), r"its observation is Tuple\(.*; needed are Boxes"),
        (dict(observation=gymnasium.spaces.Dict(a=BOX, b=gymnasium.spaces.Discrete(3))), r"its observation\['b'\] is Discrete"),
        (dict(observation=gymnasium.spaces.Box(0, 255, (4, 4, 3), np.uint8)), "its observation is Box.*Boxes of one dimension"),
        (
            dict(action=gymnasium.spaces.Discrete(3)),
            r"its action is Discrete\(3\); needed is a Box of one dimension with bounds",
        ),
        (
            dict(action=gymnasium.spaces.Box(-np.inf, 1, (2,))),
            "its action is Box.*; needed is a Box of one dimension with bounds",
        ),
    ],
    ids=str,
)
def test_spaces_of_another_kind_are_named(tmp_path, spaces, reason):
    damaged(any_dataset(tmp_path, **spaces)[0], reason)


def test_values_that_do_not_fit_are_named(tmp_path):
    def beyond(buffer):
        buffer.actions[-1, 1] = 1.5 if buffer.id == 2 else buffer.actions[-1, 1]

    def not_finite(buffer):
        buffer.observations[0, 2] = np.nan

    damaged(any_dataset(tmp_path / "a", change=beyond)[0], r"episode 2: action 1 of step 6 is 1.5, outside its Box, \[-1, 1\]")
    damaged(any_dataset(tmp_path / "b", change=not_finite)[0], "obs holds values that are not finite")
    with pytest.raises(ValueError, match="holds 1 unique episode; a split needs 2 or more"):
        data.split(minari_files.from_minari(any_dataset(tmp_path / "c", lengths=(5,))[0], "mine"), 0.1, 0)


def test_an_environment_of_other_sizes_is_no_pen(d4rl, monkeypatch):
    folder, _ = any_dataset(d4rl)
    monkeypatch.setattr(minari_files, "find", lambda name, hint: folder)
    with pytest.raises(ValueError, match=r"dataset='human' in .* is of another environment than Adroit Pen: it has 3 obs"):
        load.load_data("human", "d4rl", 4_000)
