"""Data of other tasks than pen: a runner's stand-ins against its gym environment, and any Minari dataset by its id."""

import json
import re
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from conftest import Ideal
from test_minari_files import any_dataset
from test_study import a_policy, asked

from pgdlib.lab import guide_ppo, load, study, tasks
from pgdlib.lab.explorer import panel
from pgdlib.policies import GaussianPolicy
from pgdlib.simulators import locomotion
from pgdlib.simulators.episodes import rollout
from tools import models as tool

QUIET = lambda text: None  # noqa: E731


@pytest.fixture
def assets(tmp_path, monkeypatch, runs):
    """Hopper's guide and the stages of its training, as `make models` ships them: policies whose std tells them apart."""
    monkeypatch.setattr(tasks, "ASSETS", tmp_path)
    monkeypatch.setattr(guide_ppo, "evaluation", lambda simulator, policy: {})
    stages = []
    for i in range(13):
        policy = GaussianPolicy(11, 3, hidden=[8])
        policy.log_std.data.fill_(-0.1 * i - 1)
        stages.append((100 * i, 10.0 * i, policy))
    tool.ship_guide(tasks.by_name("hopper"), stages, {}, [])
    return [np.exp(-0.1 * i - 1) for i in range(13)]


def test_a_runners_stages_are_those_up_to_a_third_of_the_return(assets):
    policies, (card, _) = load._behaviour("hopper-medium-replay")
    assert card["steps"] == [0, 100, 200, 300, 400] and card["returns"] == [0.0, 10.0, 20.0, 30.0, 40.0]
    of = {kind: [p and p.std[0, 0].item() for p in load._behaviour(f"hopper-{kind}")[0]] for kind in tasks.KINDS}
    expected = dict(medium=[4], expert=[12])
    expected |= {"medium-replay": [0, 1, 2, 3, 4], "medium-expert": [4, 12]}
    for kind, numbers in expected.items():
        np.testing.assert_allclose(of[kind], [assets[i] for i in numbers], rtol=1e-6)
    assert of["random"] == [None] and not torch.equal(*(policies[i].net.weights[0] for i in (0, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", tasks.KINDS)
def test_a_runners_stand_in_is_what_gymnasium_does(assets, kind):
    found = load.load_data(f"hopper-{kind}", "auto", 2_000, say=QUIET)
    assert (found.label, found.slug, found.is_public) == (f"stand-in hopper-{kind}", f"standin-hopper-{kind}", False)
    assert found.task.name == "hopper" and found.made["name"] == f"hopper-{kind}" and found.cut_episodes == 0
    assert 2_000 <= len(found.raw.rewards) < 2_000 + 2 * 1_000 and found.raw.lengths.max() <= 1_000
    env = gymnasium.make("Hopper-v5").unwrapped
    env.reset(seed=0)
    for e in range(0, len(found.raw.lengths), 7):
        first, n = int(found.raw.starts[e]), int(found.raw.lengths[e])
        obs = found.raw.obs[first].double().numpy()
        env.set_state(np.append(0.0, obs[:5]), obs[5:])
        for t in range(first, first + min(n, 5)):  # float32 grows from there
            after, reward, *_ = env.step(found.raw.actions[t].double().numpy())
            np.testing.assert_allclose(found.raw.next_obs[t], after, atol=1e-4)
            assert abs(found.raw.rewards[t] - reward) < 0.3  # the speed: of the root's way there, of velocities here
        ends = locomotion.runner("hopper").ended(found.raw.next_obs[first : first + n].double().numpy())
        assert not ends[:-1].any() and ends[-1] == bool(found.raw.terminals[first + n - 1]) and (ends[-1] or n == 1_000)
    if kind == "random":
        assert found.raw.actions.abs().max() <= 1 and abs(found.raw.actions.std() - 3**-0.5) < 0.02


@pytest.mark.slow
def test_a_study_of_a_runner_has_one_ruler_whose_floor_is_rounding(assets):
    found = load.load_data("hopper-medium-expert", "auto", 2_000, say=QUIET)
    policy, _ = load.load_guide("shipped", found.task)
    lab = study.Study(found, Ideal(found.data.spec, 12), policy, asked(horizon=12, dataset="hopper-medium-expert"))
    lab.denoiser.normaliser.fit(lab.train.packed())
    points = {lam: lab.point("annealed", lam) for lam in (0.0, 0.5)}
    errors = points[0.5].measures["normalised"]  # of noise, of which MuJoCo may give up
    assert lab.rulers == ("normalised",) and lab.floor["normalised"] < 1e-9 < np.nanmin(errors)
    explorer = panel.Explorer(lab, {"explicit": [0.5]}, {})
    assert [*explorer._estimator.options.values()] == ["normalised"]
    assert explorer._dataset.options == tuple(f"hopper-{kind}" for kind in tasks.KINDS)
    track = study.denoising(lab, "annealed", 0.5)
    assert [*track.states] == ["root position", "joint angles", "root velocity", "joint velocities"]


@pytest.mark.slow
def test_ppo_takes_any_simulator():
    small = dict(steps=256, n_envs=4, n_steps=32, batch_size=64, n_epochs=1, hidden=[8])
    training = guide_ppo.Training(locomotion.runner("hopper"), **small)
    assert list(training) == [128, 256] and training.policy()(torch.zeros(1, 11))[0].shape == (1, 3)
    assert training.curve[0][1] > 0


def test_data_that_minari_has_not_are_not_asked_for(runs):
    with pytest.raises(ValueError, match=r"source='d4rl' is not allowed for dataset='hopper-random', which Minari has not"):
        load.load_data("hopper-random", "d4rl", 2_000)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(tasks.ASSETS.glob("stages_*")), ids=lambda path: path.stem)
def test_a_shipped_runner_returns_what_its_cards_say(path):
    name = path.stem.removeprefix("stages_")
    task, rng = tasks.by_name(name), np.random.default_rng(5)
    guide, card = load.load_guide("shipped", task)
    mean, low, high = (float(v) for v in re.findall(r"-?\d+", card["return, mean action"]))
    returns = rollout(task.simulator, guide.act, 64, rng, whole=False).returns()  # so many that rare ones, of a fall, are seen
    assert abs(returns.mean() - mean) < 4 * (returns.std() / 8 + (high - low) / 4) + 1
    (medium,), (stages, _) = load._behaviour(f"{name}-medium")
    act = lambda obs: medium.act(obs, torch.Generator().manual_seed(int(rng.integers(2**31))))  # noqa: E731
    returns = rollout(task.simulator, act, 32, rng, whole=False).returns()
    assert card["training"][-1][1] / 4 < stages["returns"][-1] < card["training"][-1][1] / 2
    # The card's is of the last 100 episodes of a training that rose, so of policies some steps before.
    earlier, later, error = stages["returns"][-1], card["training"][-1][1], 4 * returns.std() / 32**0.5
    assert 0.8 * earlier - error < returns.mean() < 0.7 * later + error


# Any dataset by its id


@pytest.fixture
def own(tmp_path, monkeypatch, runs):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def write(env_id=None, **how):
        folder, _ = any_dataset(tmp_path / "datasets", lengths=(12, 9, 14, 10), **how)
        if env_id:
            card = folder / "data/metadata.json"
            spec = gymnasium.envs.registration.EnvSpec(env_id, entry_point="x:y").to_json()
            card.write_text(json.dumps({**json.loads(card.read_text()), "env_spec": spec}))
        return folder

    return write


def test_a_dataset_of_ones_own_is_judged_by_its_distance_to_the_data(own):
    own()
    said = []
    found = load.load_data("my/own-v0", "auto", 2_000, say=said.append)
    assert (found.label, found.slug, found.is_public, found.made) == ("my/own-v0", "my-own-v0", False, None)
    assert found.cut_episodes == 0 and "no simulator is known for an unnamed environment" in said[1]
    policy = GaussianPolicy(3, 2, hidden=[8]).requires_grad_(False)
    lab = study.Study(found, Ideal(found.data.spec), policy, asked(horizon=10))
    lab.denoiser.normaliser.fit(lab.train.packed())
    assert lab.rulers == ("distance",)
    x, diverged = lab.draw("annealed", 0.5)
    values, counts = lab.judge(x, diverged)
    assert set(values) == {"log_likelihood", "density", "distance", "motion"} and counts == {"diverged": 0, "unjudged": 0}
    steps, std = lab.normaliser.denormalise(x).numpy(), lab.variance**0.5
    for found, step in zip(values["distance"], steps):
        last = np.flatnonzero(step[:, lab.spec.terminal] > 0.5)[:1]
        seen = step[: last[0] + 1 if len(last) else None, lab.spec.obs]
        away = np.sqrt((((seen[:, None] - lab.train.obs.numpy()) / std) ** 2).mean(-1)).min(1)
        assert found == pytest.approx(away.mean(), rel=1e-3)
    assert lab.floor["distance"] > 0 and lab.point("annealed", 0.5).measures.keys() == values.keys()


@pytest.mark.parametrize("env_id, sizes, name", [("Hopper-v5", (11, 3), "hopper"), ("Hopper-v5", (12, 3), "Hopper-v5")])
def test_the_environment_that_a_file_names_is_known_if_its_sizes_are(own, env_id, sizes, name):
    spaces = [gymnasium.spaces.Box(-1, 1, (n,), np.float64) for n in sizes]
    own(env_id, observation=spaces[0], action=spaces[1])
    found = load.load_data("my/own-v0", "auto", 2_000, say=QUIET)
    assert found.task.name == name and bool(found.simulator.states) == (name == "hopper")


def test_what_is_not_there_and_guides_that_do_not_fit_are_named(own, tmp_path):
    with pytest.raises(ValueError, match=r"dataset='my/other-v0' cannot be used: Minari's my/other-v0 is not in"):
        load.load_data("my/other-v0", "auto", 2_000, say=QUIET)
    own()
    found = load.load_data("my/own-v0", "auto", 2_000, say=QUIET)
    with pytest.raises(
        ValueError, match=r"guide='shipped' is not allowed: none ships for an unnamed environment; it must be a"
    ):
        load.load_guide("shipped", found.task, found.data.spec)
    load.save_guide(tmp_path / "pen.safetensors", a_policy(), {})
    with pytest.raises(ValueError, match="another environment: 45 observations and 24 actions; needed are 3 and 2"):
        load.load_guide(str(tmp_path / "pen.safetensors"), found.task, found.data.spec)


def test_readmes_data_and_policy_of_ones_own(own):
    text = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "my/own-v0" in code]
    own()
    said = {}
    exec(block, said)
    x = said["denoiser"].normaliser.denormalise(said["x"])
    assert x.shape == (64, 16, 7) and len(said["losses"]) > 0 and x.isfinite().all()
    unguided = said["sampler"].sample(
        said["denoiser"], said["shape"], said["p"].steps, said["p"].churn, torch.Generator().manual_seed(0)
    )[0]
    likely = [
        said["Mine"]().log_prob(steps[..., :3], steps[..., 3:5]).mean()
        for steps in (said["denoiser"].normaliser.denormalise(unguided), x)
    ]
    assert likely[1] > likely[0]
