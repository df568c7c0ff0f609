"""The guide and the data of the notebooks: made once, found again, made anew for other inputs, and never used when damaged."""

import os
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import cut, kept, sb3_zip, shorter

from pgdlib import edm
from pgdlib.lab import artifacts, guide_ppo, load, minari_files, models, standins
from pgdlib.lab.sweep import results
from pgdlib.policies import GaussianPolicy
from pgdlib.simulators import pen as adroit


def interrupted(*given, **named):
    raise KeyboardInterrupt


# The guide


def small_policy(obs_dim=45, action_dim=24):
    torch.manual_seed(0)
    return GaussianPolicy(obs_dim, action_dim, hidden=[8])


@pytest.mark.slow
def test_the_shipped_guide_returns_3600():
    """THE GUIDE THAT SHIPS, not any guide: 200 D4RL-scale episodes of its mean action, and what its card says of it."""
    policy, card = load.load_guide("shipped")
    returns = adroit.rollout(policy.act, 200, np.random.default_rng(2024), adroit.D4RL_HORIZON).returns(100)
    assert returns.mean() >= 3600
    mean, low, high = (float(v) for v in card["return, mean action"].translate(str.maketrans("[,]", "   ")).split())
    assert low >= 3600 and low < mean < high
    assert abs(returns.mean() - mean) < 3.3 * np.hypot(returns.std() / np.sqrt(200), (high - low) / 2 / 1.96)
    assert card["parameters"]["steps"] >= 1e6 and len(card["curve"]) > 5 and {"seed", "versions"} <= set(card)


def test_the_shipped_guide_is_of_this_environment_and_frozen(guide):
    assert (guide.config["obs_dim"], guide.config["action_dim"]) == (45, 24)
    assert not any(p.requires_grad for p in guide.parameters())


def test_a_saved_guide_is_loaded(tmp_path):
    mine = small_policy()
    load.save_guide(tmp_path / "mine.safetensors", mine, {"note": "toy"})
    policy, card = load.load_guide(str(tmp_path / "mine.safetensors"))
    obs = torch.randn(5, 45)
    assert torch.equal(policy(obs)[0], mine(obs)[0]) and not policy.log_std.requires_grad
    assert card["note"] == "toy" and torch.__version__.startswith(card["versions"]["torch"])


def test_a_stable_baselines3_zip_is_loaded(tmp_path):
    model, obs = sb3_zip(tmp_path / "ppo.zip"), torch.randn(5, 45)
    policy, _ = load.load_guide(str(tmp_path / "ppo.zip"))
    expected = model.policy.get_distribution(obs).distribution.mean
    torch.testing.assert_close(policy(obs)[0], expected.detach(), rtol=1e-5, atol=1e-6)
    assert not policy.log_std.requires_grad


def good_guide(path):
    load.save_guide(path, small_policy(), {})


def flip(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 4]))


def with_card(card):
    return lambda path: artifacts.save(path, small_policy().state_dict(), card)


# file name -> (how it is made, what the message says)
BAD_GUIDES = {
    "missing.safetensors": (lambda path: None, "not a file; it must be 'shipped', a .safetensors guide or a .*zip"),
    "missing.zip": (lambda path: None, "not a file"),
    "folder.zip": (lambda path: path.mkdir(), "not a file"),
    "cut.safetensors": (lambda path: (good_guide(path), cut(path)), "damaged"),
    "flipped.safetensors": (lambda path: (good_guide(path), flip(path)), "checksum"),
    "cut.zip": (lambda path: (sb3_zip(path), cut(path)), "not a readable"),
    "empty.zip": (lambda path: zipfile.ZipFile(path, "w").close(), "not a readable"),
    "text.pt": (lambda path: path.write_text("weights, honestly"), "no artifact of ours"),
    "walker.zip": (lambda path: sb3_zip(path, 17, 6), "another environment, with 17 observations and 6 actions"),
    "walker.safetensors": (
        lambda path: load.save_guide(path, small_policy(17, 6), {}),
        "another environment: 17 observations and 6 actions; needed are 45 and 24",
    ),
    "foreign.safetensors": (lambda path: safetensors.torch.save_file({"w": torch.ones(3)}, path), "no artifact of ours"),
    "no config.safetensors": (with_card({}), "cannot be used.*config"),
    "list.safetensors": (with_card([1]), "cannot be used"),
    "shape.safetensors": (with_card({"config": {**small_policy().config, "hidden": [9]}}), "cannot be used"),
    "denoiser.safetensors": (with_card({"config": edm.Denoiser(45, 24, 8, 8, 2).config}), "cannot be used"),
}


@pytest.mark.parametrize("name", BAD_GUIDES)
def test_a_bad_guide_is_named(tmp_path, name):
    make, reason = BAD_GUIDES[name]
    make(tmp_path / name)
    path = str(tmp_path / name)
    with pytest.raises(ValueError, match=reason) as error:
        load.load_guide(path)
    assert str(error.value).startswith(f"guide={path!r} ")


def test_a_file_is_looked_for_at_home_and_in_a_folder_that_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    good_guide(tmp_path / "mine.safetensors")
    load.load_guide("~/mine.safetensors")
    readers = dict(guide=load.load_guide, sweep=lambda path: results.read(path, "04", "ci"))
    readers["denoiser"] = lambda path: models.load_denoiser(None, SimpleNamespace(denoiser=path), None)
    for parameter, read in readers.items():
        for path, where in (("none.x", f" in {tmp_path}"), ("~/none.x", ""), ("/none.x", "")):
            with pytest.raises(ValueError, match=f"^{parameter}='{path}' is not a file{where}; it must be .*(shipped|ship )"):
                read(path)


@pytest.fixture
def tiny_ppo(monkeypatch):
    """PPO's defaults, its evaluations and the episodes made small; the trainings are listed."""
    calls, training = [], guide_ppo.Training
    monkeypatch.setattr(
        guide_ppo, "DEFAULTS", {**guide_ppo.DEFAULTS, "n_envs": 8, "n_steps": 32, "n_epochs": 1, "batch_size": 256}
    )
    monkeypatch.setattr(guide_ppo.evaluation, "__defaults__", (4,))
    shorter(monkeypatch, 10)
    monkeypatch.setattr(guide_ppo, "Training", lambda *a, **how: calls.append((a, how)) or training(*a, **how))
    return calls


def test_a_guide_is_trained_once(runs, tiny_ppo, monkeypatch, capsys):
    policy, card = load.train_guide(512, seed=3)
    assert "return " in capsys.readouterr().err  # in the bar
    (file,) = kept(runs)
    assert file.startswith("guides/")
    again, card_again = load.train_guide(512, seed=3)
    assert len(tiny_ppo) == 1 and card == card_again
    assert all(torch.equal(a, b) for a, b in zip(policy.state_dict().values(), again.state_dict().values(), strict=True))
    assert card["parameters"]["steps"] == 512 and card["seed"] == 3 and card["evaluation episodes"] == 4
    assert [point[0] for point in card["curve"]] == [0, 512]
    assert policy.obs_mean.abs().max() > 0  # the normalisation came along
    for steps, seed in ((512, 4), (768, 3)):  # another guide each
        monkeypatch.setattr(guide_ppo, "Training", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load.train_guide(steps, seed)
    assert kept(runs) == [file]


# The data


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """D4RL's data is neither here nor to be had."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.slow
def test_the_stand_in_is_collected_once_and_says_what_it_is(runs, offline, monkeypatch, capsys):
    first = load.load_data("human", "auto", 4_000)
    assert "using the stand-in" in capsys.readouterr().out
    assert (first.is_public, first.label, first.slug) == (False, "stand-in pen-human", "standin-human")
    assert first.raw.lengths.tolist() == [200] * 25 and {"qpos", "qvel"} <= set(first.raw.info)
    assert first.dropped_steps == 5_000 - len(first.data.rewards) and first.data.terminals.sum() >= first.cut_episodes
    files = kept(runs)
    assert not [f for f in files if "partial" in f]
    monkeypatch.setattr(standins, "write", None)
    monkeypatch.setattr(minari_files, "from_minari", None)
    again = load.load_data("human", "local", 9_000)  # human has one size
    assert again.key == first.key and torch.equal(again.data.packed(), first.data.packed()) and kept(runs) == files
    train, val = load.train_val(again)
    assert len(train.lengths) + len(val.lengths) == 25 and len(val.lengths) == 2


def test_the_size_of_a_stand_in_is_part_of_its_name(runs, offline, monkeypatch):
    asked = []

    def write(dataset, folder, guide, steps, report):
        asked.append((dataset, steps))
        demonstrator, _ = load.load_guide(load.SHIPPED_GUIDE if dataset == "expert" else load.DEMONSTRATOR)
        assert torch.equal(guide[0].log_std, demonstrator.log_std)
        batch = adroit.rollout(lambda obs: np.zeros((len(obs), 24)), 2, np.random.default_rng(steps), 5)
        return minari_files.write_minari(folder, f"standin/pen/{dataset}-v0", [batch], "toy")

    monkeypatch.setattr(standins, "write", write)
    keys = [load.load_data(d, "local", n).key for d, n in (("expert", 4_000), ("expert", 5_000), ("cloned", 4_000))]
    assert asked == [("expert", 4_000), ("expert", 5_000), ("cloned", 4_000)] and len(set(keys)) == 3
    load.load_data("expert", "local", 4_000)
    assert len(asked) == 3


def test_the_key_of_data_names_its_content_not_its_place(tmp_path, offline, monkeypatch):
    keys = []
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        monkeypatch.setenv("PGD_RUNS", str(tmp_path / place))
        batch = adroit.rollout(lambda obs: np.zeros((len(obs), 24)), 2, np.random.default_rng(seed), 5)
        monkeypatch.setattr(standins, "human", lambda *given, batch=batch: batch)
        keys.append(load.load_data("human", "local", 4_000).key)
    assert keys[0] == keys[1] != keys[2]
    (file,) = (tmp_path / "c").rglob("main_data.hdf5")
    os.utime(file, (0, 0))  # as a copy might have it
    assert load.load_data("human", "local", 4_000).key == keys[2]


def test_an_interrupted_collection_leaves_nothing(runs, offline, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(standins, "human", interrupted)
        load.load_data("human", "local", 4_000)
    assert kept(runs) == []


class Bar:
    """A bar as tqdm's that is only remembered."""

    made = ()

    def __init__(self, total, desc, **_):
        self.total, self.desc, self.n, self.shown = total, desc, 0, []
        type(self).made += (self,)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.shown.append("closed")

    def update(self, n):
        self.n += n
        self.shown.append(self.n)


def test_bars_and_words_go_where_they_are_asked_to(runs, offline, monkeypatch, capsys):
    def write(dataset, folder, guide, steps, report):
        for share in (0.25, 0.751, 1.0):
            report(share)
        batch = adroit.rollout(lambda obs: np.zeros((len(obs), 24)), 2, np.random.default_rng(0), 5)
        return minari_files.write_minari(folder, f"standin/pen/{dataset}-v0", [batch], "toy")

    monkeypatch.setattr(standins, "write", write)
    monkeypatch.setattr(Bar, "made", ())
    said = []
    load.load_data("expert", "auto", 4_000, Bar, said.append)
    (bar,) = Bar.made
    assert bar.desc == "collecting the stand-in expert" and bar.total == 100 and bar.shown == [25, 75, 100, "closed"]
    assert ["using the stand-in" in text for text in said] == [True, False] and said[1].startswith("stand-in pen-expert: 2 epi")
    load.load_data("expert", "local", 4_000, Bar, said.append)  # it is there: nothing takes long
    assert len(Bar.made) == 1 and len(said) == 3 and capsys.readouterr() == ("", "")


def test_a_bar_that_raises_lets_nothing_begin(runs, offline, monkeypatch):
    monkeypatch.setattr(standins, "write", None)
    with pytest.raises(KeyboardInterrupt):
        load.load_data("cloned", "local", 4_000, interrupted)
    assert kept(runs) == []


def test_a_damaged_stand_in_is_set_aside_and_collected_again(runs, offline, monkeypatch):
    batch = adroit.rollout(lambda obs: np.zeros((len(obs), 24)), 2, np.random.default_rng(0), 5)
    monkeypatch.setattr(standins, "human", lambda *a: batch)
    first, said = load.load_data("human", "local", 4_000), []
    (file,) = runs.rglob("main_data.hdf5")
    file.write_bytes(file.read_bytes()[:-100])
    assert load.load_data("human", "local", 4_000, say=said.append).key == first.key
    assert "human-v0 is damaged: its checksum does not hold" in said[0] and len(said) == 2
    (aside,) = (runs / "minari").glob("*.damaged")
    assert aside.name in said[0] and len([*runs.rglob("main_data.hdf5")]) == 2


def test_devices():
    assert load.device_of("cpu") == torch.device("cpu")
    assert load.device_of("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
