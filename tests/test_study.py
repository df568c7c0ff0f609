"""Studies of guidance: what is drawn, against the sampler itself and closed forms; what is measured; what is kept, and when."""

import importlib
import inspect
import math
import threading
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import cut, kept, replay, smooth
from torch import nn

from pgdlib import calibrate, data, dynamics, edm, guidance, measures, sampler
from pgdlib.guidance import RULES
from pgdlib.lab import budget, load, params, standins, store, study
from pgdlib.policies import GaussianPolicy
from pgdlib.simulators import pen as adroit
from pgdlib.synthetic import WARMED

SOLVERS = ("heun", "multistep")
OTHERS = [*range(45), 69, 70]  # channels that no rule moves


@pytest.fixture(autouse=True)
def mujoco_log(tmp_path, monkeypatch):
    """MuJoCo logs its warnings in the working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def episodes():
    """Real episodes, some of which end by a fall."""
    rng = np.random.default_rng(0)
    return adroit.rollout(replay(smooth(rng, 12, 40)), 12, rng, 40, threads=1)


@pytest.fixture(scope="module")
def dataset(episodes):
    def flat(x):
        return torch.tensor(x, dtype=torch.float32).flatten(0, 1)

    values = dict(obs=episodes.obs[:, :-1], actions=episodes.actions.clip(-1, 1), rewards=episodes.rewards)
    values |= dict(terminals=np.zeros((12, 40)), next_obs=episodes.obs[:, 1:])
    raw = data.Trajectories(**{k: flat(v) for k, v in values.items()}, lengths=torch.full((12,), 40), name="stand-in pen-toy")
    return load.Dataset(data.end_at_falls(raw)[0], raw, False, "toy-1", 0, 0)


class Ideal(nn.Module):
    """The denoiser of data whose normalised channels are independent N(0, 1), each step for itself."""

    def __init__(self, dataset, transform="raw"):
        super().__init__()
        self.normaliser = data.Normaliser(transform).fit(load.train_val(dataset)[0].packed())

    def forward(self, x, sigma):
        return x / (1 + torch.as_tensor(sigma, dtype=x.dtype) ** 2)


def a_policy(seed=0, log_std=-1.0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = GaussianPolicy(45, 24, hidden=[8])
    policy.log_std.data[:] = log_std + 0.3 * torch.randn(24, generator=torch.Generator().manual_seed(seed))
    return policy.requires_grad_(False)


def settings(**changes):
    own = dict(dataset="human", source="local", guide="shipped", device="cpu", transform="raw", seed=3, scale="ci")
    own |= dict(horizon=10, samples=6, solver="heun", steps=6, churn=2.0, warmup=2, units="natural")
    own |= dict(train_steps=3, batch_size=4, features=8)
    return SimpleNamespace(**{**params.settings("ci"), **own, **changes})


@pytest.fixture
def lab(dataset):
    """A function that makes a study of this dataset; every call makes one that knows nothing of the others."""

    def make(policy=None, denoiser=None, **changes):
        return study.Study(dataset, denoiser or Ideal(dataset), policy or a_policy(), settings(**changes))

    return make


def assert_same(a, b):
    """Two points, bit for bit."""
    assert torch.equal(a.x, b.x) and a.counts == b.counts and a.measures.keys() == b.measures.keys()
    for name, values in a.measures.items():
        assert values.dtype == b.measures[name].dtype and values.tobytes() == b.measures[name].tobytes(), name


def refused(*given, **named):
    raise AssertionError("nothing is to be made here")


def seen_by(lab, *arguments, **named):
    """[(x, denoised, σ, done)] of every evaluation, and what was drawn."""
    seen = []
    return seen, lab.draw(*arguments, watch=lambda *given: seen.append(given), **named)


# Drawing


def noise_of(seed, n):
    """Where the noise of n trajectories comes from, of one block."""
    return [(edm.seeded("cpu", 5_000_000 + seed, 0), n)]


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_a_weight_every_rule_draws_what_the_sampler_does(lab, solver):
    lab = lab(solver=solver, churn=2.0 * (solver == "heun"))
    for named in ({}, dict(n=3, seed=0), dict(n=2, seed=8, units="raw", warmup=0, on="noised")):
        shape = named.get("n", 6), 10, 71
        noise = noise_of(named.get("seed", 3), shape[0])
        expected, _ = sampler.sample(lab.denoiser, shape, 6, lab.p.churn, noise, None, solver=solver)
        for rule in RULES:
            x, diverged = lab.draw(rule, 0.0, **named)
            assert torch.equal(x, expected) and diverged.shape == shape[:1] and not diverged.any()


@pytest.mark.parametrize("transform", ["raw", "arctanh"])
@pytest.mark.parametrize("rule", RULES)
def test_a_drawing_is_the_samplers_with_that_guide(lab, dataset, rule, transform):
    """With the study's settings, or those given; the first noise steps are unguided for `WARMED` alone."""
    lab, other = lab(denoiser=Ideal(dataset, transform)), a_policy(1)
    calls = {
        (): (lab.policy, 2, "natural", None, 3),
        (("units", "raw"), ("seed", 0)): (lab.policy, 2, "raw", None, 0),
        (("target", other), ("warmup", 4), ("on", "denoised")): (other, 4, "natural", "denoised", 3),
        (("warmup", 0),): (lab.policy, 0, "natural", None, 3),
    }
    for named, (policy, warmup, units, on, seed) in calls.items():
        guide = guidance.Guide(rule, policy, lab.normaliser, 0.3, 6, warmup if rule in WARMED else 0, units, on)
        noise = noise_of(seed, 6)
        expected = sampler.sample(lab.denoiser, (6, 10, 71), 6, 2.0, noise, guide)
        found = lab.draw(rule, 0.3, **dict(named))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        assert not torch.equal(found[0], lab.draw(rule, 0.0, seed=seed)[0])


def test_only_some_rules_are_warmed_up(lab):
    lab = lab()
    unguided, _ = lab.draw("explicit", 0.0)
    still = {rule for rule in RULES if torch.equal(lab.draw(rule, 0.3, warmup=6)[0], unguided)}
    assert still == set(WARMED)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("rule", RULES)
def test_the_same_noise_at_every_weight(lab, rule, solver):
    """The ideal denoiser treats channels one by one: what is not guided is the same at every λ."""
    lab = lab(solver=solver, churn=2.0 * (solver == "heun"))
    unguided, _ = lab.draw("explicit", 0.0)
    for lam in (0.05, 0.4):
        x, _ = lab.draw(rule, lam)
        assert torch.equal(x[..., OTHERS], unguided[..., OTHERS])
        assert (x[..., data.ACTIONS] != unguided[..., data.ACTIONS]).any((1, 2)).all()
    elsewhere, _ = lab.draw(rule, 0.4, seed=4)
    assert (elsewhere[..., OTHERS] != unguided[..., OTHERS]).float().mean() > 0.99


@pytest.mark.parametrize("solver, evaluations", [("heun", 11), ("multistep", 6)])
@pytest.mark.parametrize("rule", ["explicit", "smoothed"])
def test_every_evaluation_is_watched(lab, rule, solver, evaluations):
    lab = lab(solver=solver, churn=2.0 * (solver == "heun"))
    seen, (x, _) = seen_by(lab, rule, 0.2)
    shares = [done for *_, done in seen]
    assert len(shares) == evaluations and shares == sorted(set(shares)) and shares[-1] == 1.0 and shares[0] > 0
    assert torch.equal(x, lab.draw(rule, 0.2)[0])
    for noised, denoised, sigma, _ in seen:
        assert torch.equal(denoised, lab.denoiser(noised, sigma)) and noised.shape == (6, 10, 71)
    again, _ = seen_by(lab, rule, 0.2)
    assert [done for *_, done in again] == shares


def test_what_the_watch_raises_ends_the_drawing(lab):
    seen = []

    def watch(x, denoised, sigma, done):
        seen.append(done)
        if len(seen) == 3:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        lab().draw("explicit", 0.2, watch=watch)
    assert len(seen) == 3


# Measures


def windows(episodes, lab, n=6):
    """Normalised windows of what the simulator itself did, none with a fall."""
    whole = np.flatnonzero(~episodes.fallen[:, :30].any(1))[:n]
    obs, actions = episodes.obs[whole, 10:20], episodes.actions[whole, 10:20].clip(-1, 1)
    steps = np.concatenate([obs, actions, np.zeros((n, 10, 2))], -1)
    return lab.normaliser.normalise(torch.tensor(steps, dtype=torch.float32))


@pytest.mark.parametrize("transform", ["raw", "arctanh"])
def test_measures_are_those_of_the_metrics(lab, episodes, dataset, transform):
    lab = lab(denoiser=Ideal(dataset, transform))
    x = windows(episodes, lab)
    x[1, 5:, data.TERMINAL] = 1.0  # the second ends with its sixth step
    measures, counts = lab.judge(x)
    steps = lab.normaliser.denormalise(x)
    obs, actions, alive = steps[..., :45], steps[..., 45:69], torch.ones(6, 10)
    alive[1, 6:] = 0
    variance = load.train_val(dataset)[0].obs.var(0).numpy()
    for name, keys in {"reconstructed": ("reconstructed", "normalised"), "appendix_b": ("appendix_b",), "still": ()}.items():
        error = dynamics.dynamics_error(obs.numpy(), actions.numpy(), variance, name, alive.numpy(), threads=1)
        for key in keys:
            np.testing.assert_array_equal(measures[key], error.normalised if key == "normalised" else error.plain)
        if name == "still":
            np.testing.assert_array_equal(measures["motion"], error.normalised)
    expected = measures.log_likelihood(lab.policy, obs, actions, alive)
    np.testing.assert_array_equal(measures["log_likelihood"], expected)
    np.testing.assert_array_equal(measures["density"], measures.mean_density(lab.policy, obs, actions, alive))
    by_hand = torch.distributions.Normal(*lab.policy(obs)).log_prob(actions).mean(-1)
    assert measures["log_likelihood"][0] == pytest.approx(by_hand[0].mean().item(), rel=1e-5)
    assert measures["log_likelihood"][1] == pytest.approx(by_hand[1, :6].mean().item(), rel=1e-5)
    assert counts == {"diverged": 0, "unjudged": 0}
    assert set(measures) == {"log_likelihood", "density", "normalised", "motion", "reconstructed", "appendix_b"}
    assert all(v.shape == (6,) and v.dtype == np.float64 and np.isfinite(v).all() for v in measures.values())


def test_what_the_simulator_did_has_less_error_than_the_same_shuffled(lab, episodes):
    lab = lab()
    x = windows(episodes, lab)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    own, shuffled = (lab.judge(v, estimators=("reconstructed", "still"))[0]["normalised"] for v in (x, x[:, order]))
    assert not (shuffled < 20 * own).any()


def test_counts_of_what_has_no_error(lab, episodes):
    lab = lab()
    x = windows(episodes, lab)
    x[[0, 4], 3, 5] = 1e4  # a hand joint far out
    measures, counts = lab.judge(x, torch.tensor([True, False, True, True, False, False]))
    assert counts == {"diverged": 3, "unjudged": 2} and all(type(v) is int for v in counts.values())
    for name in ("normalised", "reconstructed", "appendix_b"):
        assert np.flatnonzero(np.isnan(measures[name])).tolist() == [0, 4]
    assert np.isfinite(measures["log_likelihood"]).all()


def test_the_floor_is_that_of_validation_windows(lab):
    lab = lab(samples=20)
    assert {name: values.mean() for name, values in lab.real.items()} == pytest.approx(lab.floor)
    x = lab.windows(lab.val, 20, 3)
    assert x.shape == (20, 10, 71) and torch.equal(x, lab.windows(lab.val, 20, 3))
    assert not torch.equal(x, lab.windows(lab.val, 20, 4))
    np.testing.assert_array_equal(lab.judge(x)[0]["normalised"], lab.real["normalised"])
    packed = lab.normaliser.normalise(lab.val.packed())
    assert all((packed == first).all(1).any() for first in x[:, 0])  # steps of the validation side
    assert lab.floor["normalised"] < lab.floor["motion"] / 10


def test_what_lies_beyond_the_end_of_a_short_episode_is_not_judged(lab):
    """Seven steps in windows of ten: they have the measures of the seven alone."""
    short = lab(samples=20)
    ends = {k: torch.tensor([7]) if k == "lengths" else v[:7] for k, v in short.val.tensors().items()}
    short.val = data.Trajectories.from_tensors(ends, "short")
    x = short.windows(short.val, 20, 3)
    assert torch.equal(x[:, 7:], x[:, 6:7].expand(-1, 3, -1))  # its last step, repeated
    expected, _ = short.judge(x[:, :7])
    for name, values in short.real.items():  # a density is the exponential of a sum over 24 dimensions in float32
        np.testing.assert_allclose(values, expected[name], rtol=1e-4, err_msg=name)
    assert not np.allclose(short.judge(x)[0]["motion"], expected["motion"])  # the repeated step would stand still


def test_on_policy_is_the_likelihood_of_the_policys_own_actions(lab):
    lab = lab()
    obs = lab.train.obs[:200]
    own = lab.policy.sample(obs, torch.Generator().manual_seed(0))
    _, low, high = measures.interval(lab.policy.log_prob(obs, own) / 24, level=0.999)
    assert low < lab.on_policy < high and high - low < 0.1


# What is kept


def test_a_sweep_is_made_once(lab, runs, monkeypatch):
    first = lab().sweep("explicit", [0.5, 2, 0.1])
    assert list(first) == [0.0, 0.1, 0.5, 2.0] and len(kept(runs)) == 4
    assert all(f.startswith("sweeps/standin-toy-ci-explicit-natural/") for f in kept(runs))
    monkeypatch.setattr(study.Study, "draw", refused)
    monkeypatch.setattr(study.Study, "judge", refused)
    for lams in ([2.0, 0.5, 0.1], [0, 1 / 10, 2, 2, 0.5], np.array([0.1, 0.5, 2.0])):
        again = lab().sweep("explicit", lams)
        assert list(again) == list(first)
        for lam, point in again.items():
            assert_same(point, first[lam])
    for lam in (2, np.float64(2), np.int64(2)):
        assert_same(lab().point("explicit", lam), first[2.0])
    assert len(kept(runs)) == 4 and list(lab().sweep("explicit", [])) == [0.0]


def test_a_sweep_moves_its_bar(lab, runs):
    bars = []

    def progress(lams, desc, **_):
        for lam in lams:
            yield lam
            bars.append((lam, desc, len(kept(runs))))

    lab().sweep("smoothed", [1, 0.5], progress)
    assert bars == [(0.0, "smoothed", 1), (0.5, "smoothed", 2), (1.0, "smoothed", 3)]  # each is kept when it is done


@pytest.mark.parametrize("lam", [0.0, 0.3, 100.0])
def test_a_point_is_what_was_drawn_and_judged(lab, runs, lam):
    x, diverged = lab().draw("explicit", lam)
    assert diverged.all() == (lam == 100)
    drawn = study.Point(x, *lab().judge(x, diverged))
    assert_same(lab().point("explicit", lam), drawn)
    assert_same(lab().point("explicit", lam), drawn)  # from its file
    assert len(kept(runs)) == 1


def test_measures_that_are_not_numbers_are_kept(lab, runs, monkeypatch):
    draw = study.Study.draw

    def broken(*given, **named):
        x, diverged = draw(*given, **named)
        x[2, 4, 7] = 1e4
        return x, diverged

    monkeypatch.setattr(study.Study, "draw", broken)
    first, again = lab().point("smoothed", 0.5), lab().point("smoothed", 0.5)
    assert np.isnan(first.measures["normalised"][2]) and first.counts["unjudged"] >= 1
    assert_same(first, again)


# name -> (changed settings, whether rules that have no warm-up see the change)
CHANGES = {
    "seed": (dict(seed=4), True),
    "samples": (dict(samples=5), True),
    "horizon": (dict(horizon=8), True),
    "solver": (dict(solver="multistep", churn=0.0), True),
    "steps": (dict(steps=7), True),
    "churn": (dict(churn=2.5), True),
    "units": (dict(units="raw"), True),
    "scale": (dict(scale="quick"), True),
    "warmup": (dict(warmup=3), False),
    "training": (dict(train_steps=4), None),  # it is the weights that count
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_settings_make_other_points(lab, runs, name):
    changes, seen = CHANGES[name]
    lab().sweep("explicit", [1])
    lab().sweep("smoothed", [1])
    expected = [0.0, 1.0]
    for rule, differs in (("explicit", seen is not None), ("smoothed", bool(seen))):
        have, missing, _ = lab(**changes).status(rule, [1])
        assert (have, missing) == (([], expected) if differs else (expected, []))
    assert lab().status("explicit", [1]) == lab().status("smoothed", [1]) == (expected, [], set())
    assert lab().status("proximal", [1]) == ([], expected, set())


def test_another_solver_makes_other_points(lab, runs):
    lab(churn=0.0).point("explicit", 0)
    assert lab(churn=0.0, solver="multistep").status("explicit", []) == ([], [0.0], {"sampler"})


def test_other_weights_and_other_data_make_other_points(lab, dataset, runs):
    lab().sweep("explicit", [1])
    moved = Ideal(dataset)
    moved.normaliser.std[50] *= 1.001
    nudged = a_policy()
    nudged.log_std.data[3] += 1e-6
    for other, differs in (
        (lab(policy=a_policy(1)), {"guide"}),
        (lab(policy=nudged), {"guide"}),
        (lab(denoiser=moved), {"diffusion model"}),
        (lab(policy=nudged, denoiser=moved, seed=4), {"guide", "diffusion model", "seed"}),
        (lab(steps=9), {"sampler"}),
        (lab(samples=9, horizon=8), {"trajectories", "horizon"}),
    ):
        assert other.status("explicit", [1]) == ([], [0.0, 1.0], differs)
    other = lab()
    other.dataset = load.Dataset(dataset.data, dataset.raw, False, "toy-2", 0, 0)
    assert other.status("explicit", [1]) == ([], [0.0, 1.0], {"data"})


def test_other_code_makes_other_points(lab, runs, monkeypatch):
    lab().sweep("explicit", [1])
    monkeypatch.setattr(store, "code_version", lambda *rooms: "0" * 12)
    assert lab().status("explicit", [1]) == ([], [0.0, 1.0], {"code"})


def test_the_code_of_a_point_is_all_that_its_code_uses():
    """What these modules import of the package is among them too, but for those that keep files."""
    for room in study.ROOMS:
        names = vars(importlib.import_module(f"pgdlib.{room}")).values()
        homes = [getattr(v, "__name__" if inspect.ismodule(v) else "__module__", None) or "" for v in names]
        used = {home.split(".")[1] for home in homes if home.startswith("pgdlib.")}
        assert used <= {*study.ROOMS, "checkpoints", "store"}, room


def test_status_says_what_is_there(lab, runs):
    assert lab().status("explicit", [1, 2]) == ([], [0.0, 1.0, 2.0], set())
    lab().sweep("explicit", [1])
    assert lab().status("explicit", [2, 1]) == ([0.0, 1.0], [2.0], set())
    assert lab().status("explicit", []) == ([0.0], [], set())
    assert lab().status("explicit", [0.999999, 1.000001]) == ([0.0], [0.999999, 1.000001], set())
    lab().sweep("explicit", [2, 1])
    lab(seed=9).sweep("explicit", [1, 2, 3, 4, 5, 6, 7])  # beside them
    assert lab().status("explicit", [1, 2.0]) == ([0.0, 1.0, 2.0], [], set())
    assert lab().status("explicit", [1, 3]) == ([0.0, 1.0], [3.0], set())


def test_status_with_damaged_and_foreign_files(lab, runs):
    lab(seed=9).point("explicit", 0.0)
    (file,) = (runs / f for f in kept(runs))
    cut(file)
    have, missing, differs = lab().status("explicit", [1])
    assert (have, missing) == ([], [0.0, 1.0]) and differs == {"file, damaged"}
    store.save(file, {"x": torch.zeros(1)}, {"kind": "something else"})
    have, missing, differs = lab().status("explicit", [1])
    assert (have, missing) == ([], [0.0, 1.0]) and differs == {"file, damaged"}


def test_a_damaged_point_is_made_again(lab, runs, capsys):
    lab().point("explicit", 0.2)
    (file,) = (runs / f for f in kept(runs))
    cut(file)
    x, diverged = lab().draw("explicit", 0.2)
    assert_same(lab().point("explicit", 0.2), study.Point(x, *lab().judge(x, diverged)))
    assert sorted(f.rsplit(".", 1)[1] for f in kept(runs)) == ["damaged", "safetensors"] and capsys.readouterr().out == ""


def test_studies_with_other_guides_share_no_file(lab, runs):
    mine, other = lab(), lab(policy=a_policy(1))
    first = mine.sweep("explicit", [0.5])
    own = set(kept(runs))
    second = other.sweep("explicit", [0.5])
    assert len(set(kept(runs)) - own) == len(own) == 2
    for lam in (0.0, 0.5):
        assert_same(mine.point("explicit", lam), first[lam])
        assert_same(other.point("explicit", lam), second[lam])
        assert (first[lam].measures["log_likelihood"] != second[lam].measures["log_likelihood"]).all()


def test_who_asks_at_once_makes_one_file(lab, runs, monkeypatch):
    drawings, points, draw, at_once, labs = [], {}, study.Study.draw, threading.Barrier(3), [lab() for _ in range(3)]

    def slow(*given, **named):
        drawings.append(given)
        time.sleep(0.2)
        return draw(*given, **named)

    def ask(i):
        at_once.wait()
        points[i] = labs[i].point("explicit", 0.2)

    monkeypatch.setattr(study.Study, "draw", slow)
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(drawings) == 1 == len(kept(runs)) and len(points) == 3
    assert_same(points[0], points[1])
    assert_same(points[0], points[2])


def test_an_interrupted_point_leaves_nothing(lab, runs):
    def watch(x, denoised, sigma, done):
        if done > 0.5:
            raise KeyboardInterrupt

    for _ in range(2):  # the second is not held up by the first
        with pytest.raises(KeyboardInterrupt):
            lab().point("explicit", 0.2, watch)
        assert kept(runs) == [] and lab().status("explicit", [0.2]) == ([], [0.0, 0.2], set())
    shares = []
    lab().point("explicit", 0.2, lambda x, denoised, sigma, done: shares.append(done))
    assert len(kept(runs)) == 1 and shares[-1] == 1.0


def test_an_interrupted_sweep_goes_on(lab, runs, monkeypatch):
    judge = study.Study.judge

    def interrupted(lab, x, diverged):
        if len(kept(runs)) == 2:
            raise KeyboardInterrupt
        return judge(lab, x, diverged)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(study.Study, "judge", interrupted)
        lab().sweep("explicit", [1, 2, 3])
    assert lab().status("explicit", [1, 2, 3]) == ([0.0, 1.0], [2.0, 3.0], set())
    drawn, draw = [], study.Study.draw
    monkeypatch.setattr(study.Study, "draw", lambda lab, rule, lam, **k: drawn.append(lam) or draw(lab, rule, lam, **k))
    lab().sweep("explicit", [1, 2, 3])
    assert drawn == [2.0, 3.0]


# In chunks


def test_chunks_change_a_drawing_by_rounding_alone(lab, dataset, monkeypatch):
    """With a network in float64, for every rule."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = edm.Denoiser(10, 8, 2)
    model.normaliser = Ideal(dataset).normaliser
    monkeypatch.setattr(edm, "has_bfloat16", lambda device: False)
    whole = lab(denoiser=model, samples=40)
    cut_up = lab(denoiser=model, samples=40)
    monkeypatch.setattr(cut_up, "most", lambda n: 32)
    for rule in RULES:
        (x, diverged), (y, diverged_too) = (each.draw(rule, 0.1) for each in (whole, cut_up))
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)
        assert torch.equal(diverged, diverged_too)


def test_a_killed_point_goes_on_to_the_same(lab, runs, monkeypatch):
    """Whatever chunks would be chosen now: those that are there say how it was begun."""
    monkeypatch.setattr(study.Study, "most", lambda lab, n: 32)
    expected = lab(samples=100).draw("explicit", 0.2)

    def killed(x, denoised, sigma, done):
        if done > 0.4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab(samples=100).point("explicit", 0.2, killed)
    (part,) = kept(runs)
    assert part.startswith("checkpoints/point-standin-toy-ci-explicit-natural-") and part.endswith("-0.2/0-32.safetensors")
    assert lab(samples=100).status("explicit", [0.2]) == ([], [0.0, 0.2], set())
    monkeypatch.setattr(study.Study, "most", lambda lab, n: 64)
    shares = []
    point = lab(samples=100).point("explicit", 0.2, lambda x, denoised, sigma, done: shares.append(done))
    assert torch.equal(point.x, expected[0]) and len(shares) == 33 and shares[-1] == 1.0
    assert len(kept(runs)) == 1 and kept(runs)[0].startswith("sweeps/") and not list((runs / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_killed_calibration_goes_on_to_the_same(lab, runs, monkeypatch):
    """The draws that were over are not repeated, and nothing of them stays."""
    monkeypatch.setattr(study.Study, "most", lambda lab, n: 32)
    mine = dict(scale="quick", solver="multistep", churn=0.0, warmup=0)
    expected, seen = lab(**mine).calibrate("explicit", 0.03, 0.3), []
    assert kept(runs) == []

    def killed(*given):
        seen.append(given[-1])
        if len(seen) == 40:  # of 12 for each draw of 64, in two chunks
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab(**mine).calibrate("explicit", 0.03, 0.3, killed)
    assert len(kept(runs)) == 6 and all(f.startswith("checkpoints/calibration-standin-toy-quick") for f in kept(runs))
    again = []
    found = lab(**mine).calibrate("explicit", 0.03, 0.3, lambda *given: again.append(given[-1]))
    assert found == expected and kept(runs) == []
    whole = sum(6 * math.ceil(n / 32) for _, n, *_ in expected.trace)
    assert len(again) == whole - 36


def test_how_many_at_once_is_found_once(lab, monkeypatch):
    asked = []
    monkeypatch.setattr(budget, "most", lambda *given: asked.append(given[1:]) or 32)
    mine = lab(samples=33)
    mine.draw("explicit", 0.1)
    mine.draw("smoothed", 0.1)
    assert asked == [(33, 10, 11, torch.device("cpu"))] and mine.most(40) == 32 and len(asked) == 2


# Limits and grids


def test_the_limit_is_two_in_the_units_of_the_sharpest_action(lab):
    mine = lab(units="raw")
    assert lab().limit == 2.0 and type(mine.limit) is float
    ratios = [2 * (s / d) ** 2 for s, d in zip(mine.policy.log_std.exp().tolist(), mine.normaliser.std[45:69].tolist())]
    assert mine.limit == pytest.approx(min(ratios), rel=1e-5) and max(ratios) > 1.5 * min(ratios)


@pytest.mark.parametrize("units", ["natural", "raw"])
def test_the_explicit_rule_diverges_from_the_limit_on(lab, units):
    lab = lab(units=units, solver="multistep", steps=64, churn=0.0)
    assert [lab.draw("explicit", share * lab.limit)[1].float().mean().item() for share in (0.9, 1.3)] == [0, 1]


def test_the_grid_is_in_the_studys_units(lab):
    natural, raw = lab(), lab(units="raw")
    assert set(study.GRIDS) == set(RULES)
    for rule, lams in study.GRIDS.items():
        assert lams == sorted(set(lams)) and lams[0] > 0 and natural.grid(rule) == lams
        factor = raw.limit / 2 if rule in WARMED else 1
        assert raw.grid(rule) == pytest.approx([factor * lam for lam in lams], rel=1e-12)
        natural.grid(rule).append(math.nan)  # nobody's grid but the caller's
    assert natural.grid("explicit")[-1] == 3.0 and raw.limit != 2


# Calibration


def likelihood_of(lab, x):
    steps = lab.normaliser.denormalise(x)
    alive = measures.alive(steps[..., data.TERMINAL])
    return measures.log_likelihood(lab.policy, steps[..., data.OBS], steps[..., data.ACTIONS], alive).mean().item()


@pytest.mark.parametrize("scale, tolerance", [("quick", 0.03), ("ci", 0.2)])
def test_calibration_meets_the_policys_own_likelihood(lab, monkeypatch, scale, tolerance):
    """On noise of its own: that of no sweep. At ci scale to 20%, whatever is asked."""
    lab = lab(scale=scale, solver="multistep", churn=0.0, warmup=0)
    seeds, asked, draw, find = [], [], lab.draw, calibrate.calibrate
    monkeypatch.setattr(lab, "draw", lambda rule, lam, n, seed, **k: seeds.append(seed) or draw(rule, lam, n, seed))
    monkeypatch.setattr(
        calibrate, "calibrate", lambda f, target, given, **k: asked.append(given) or find(f, target, given, **k)
    )
    found = lab.calibrate("explicit", 0.03, 0.3)
    assert asked == [tolerance] and min(seeds) >= lab.p.seed + 1000
    assert found.target == lab.on_policy and 0 < found.lam < 2
    assert abs(found.log_likelihood - lab.on_policy) <= tolerance * max(abs(lab.on_policy), 0.1)
    x, _ = draw("explicit", found.lam, 512, seed=77)
    assert likelihood_of(lab, x) == pytest.approx(lab.on_policy, abs=1.5 * tolerance * max(abs(lab.on_policy), 0.1))


def test_out_of_reach_the_nearest_is_taken_and_said(lab, capsys):
    lab = lab(scale="quick", solver="multistep", churn=0.0)
    lab.on_policy = 100.0
    found = lab.calibrate("smoothed", 0.03, 1.0)
    assert capsys.readouterr().out.startswith("smoothed: log-likelihood is ")
    assert isinstance(found, calibrate.Calibration) and found.lam in [lam for lam, *_ in found.trace]
    assert found.log_likelihood == max(mean for _, _, mean, _ in found.trace)


# Summaries


def some_points(n=7):
    rng = np.random.default_rng(0)
    points = {}
    for i, lam in enumerate((0.0, 0.5, 2.0)):
        measures = {"log_likelihood": rng.normal(size=n), "normalised": rng.random(n)}
        measures["normalised"][:i] = math.nan
        points[lam] = study.Point(torch.zeros(n, 2, 71), measures, {"diverged": 2 * i, "unjudged": i})
    points[3.0] = study.Point(
        torch.zeros(n, 2, 71), {k: np.full(n, math.nan) for k in measures}, {"diverged": n, "unjudged": n}
    )
    return points


def test_a_summary_has_the_interval_of_every_measure():
    points = some_points()
    frame = study.summary(points)
    assert frame["lam"].tolist() == list(points) and frame["diverged"].tolist() == [0, 2, 4, 7]
    assert frame["unjudged"].tolist() == [0, 1, 2, 7] and len(frame.columns) == 3 + 2 * 3
    for (_, row), point in zip(frame.iterrows(), points.values(), strict=True):
        for name, values in point.measures.items():
            found = [row[f"{name}.{k}"] for k in ("mean", "low", "high")]
            np.testing.assert_array_equal(found, measures.interval(values))
            if np.isfinite(values).any():
                assert found[0] == pytest.approx(np.nanmean(values)) and found[1] < found[0] < found[2]


RISING = (0, -3), (1, -1), (2, 0), (4, 1)  # (λ, log-likelihood)


@pytest.mark.parametrize(
    "curve, target, expected",
    {
        "between points": (RISING, -0.5, 1.5),
        "on a point": (RISING, 0, 2.0),
        "in the first stretch": (RISING, -2, 0.5),
        "in the last": (RISING, 0.25, 2.5),
        "on the last point": (RISING, 1, 4.0),
        "never": (RISING, 1.01, None),
        "from the start": (RISING, -3, 0.0),
        "long before": (RISING, -9, 0.0),
        "the first of three": (((0, -3), (1, 1), (2, -5), (4, 3)), 0, 0.75),
        "above, below, above": (((0, 1), (1, -1), (2, 0), (4, 5)), 0.5, 0.0),
        "collapsed in the end": ((*RISING[:3], (4, -4000)), -0.5, 1.5),
        "nothing is known": (((0, math.nan), (1, math.nan)), 0, None),
        "one point, reached": (RISING[:1], -4, 0.0),
        "one point": (RISING[:1], -2, None),
    }.values(),
)
def test_where_the_likelihood_first_meets_the_policys(curve, target, expected):
    found = study.crossing(pd.DataFrame(curve, columns=["lam", "log_likelihood.mean"], dtype=float), target)
    assert found == (expected if expected is None else pytest.approx(expected)) and type(found) in (float, type(None))


# Films


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("transform", ["raw", "arctanh"])
def test_an_unguided_film_ends_with_the_drawn_trajectory(lab, dataset, solver, transform):
    """Every frame in closed form, for a denoiser of known data: noised / (1 + σ²)."""
    lab = lab(denoiser=Ideal(dataset, transform), solver=solver, churn=2.0 * (solver == "heun"))
    film = study.film(lab, "explicit", 0.0, seed=5)
    assert film.sigma.shape == (6,) and film.noised.shape == (6, 10, 71)
    levels = sampler.noise_levels(6)[:-1].numpy()
    raised = [s * (1 + min(2.0 / 6, math.sqrt(2) - 1) * (solver == "heun" and 0.05 <= s <= 50)) for s in levels]
    np.testing.assert_allclose(film.sigma, raised, rtol=1e-12)
    denoised = film.noised / (1 + film.sigma[:, None, None] ** 2)
    mean, std = (v.numpy() for v in (lab.normaliser.mean, lab.normaliser.std))
    steps = denoised * std + mean
    actions = np.tanh(steps[..., 45:69]) if transform == "arctanh" else steps[..., 45:69]
    np.testing.assert_allclose(film.actions, actions, rtol=1e-4, atol=1e-5)
    obs = torch.tensor(steps[..., :45], dtype=torch.float32)
    np.testing.assert_allclose(film.means, lab.policy(obs)[0], rtol=1e-3, atol=1e-4)
    x, _ = lab.draw("explicit", 0.0, 1, 5)
    np.testing.assert_allclose(film.actions[-1], lab.normaliser.denormalise(x)[0, :, 45:69], rtol=1e-4, atol=1e-5)
    assert np.abs(film.noised[0]).mean() > 30 and not np.array_equal(film.noised, study.film(lab, "explicit", 0.0).noised)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_guided_film_starts_like_the_unguided_and_ends_nearer_the_policy(lab, solver):
    lab = lab(solver=solver, churn=0.0)
    plain, guided = (study.film(lab, "explicit", lam) for lam in (0.0, 0.8))
    np.testing.assert_array_equal(plain.sigma, guided.sigma)
    assert (np.diff(plain.sigma) < 0).all()
    np.testing.assert_array_equal(plain.noised[:2], guided.noised[:2])  # the warm-up
    np.testing.assert_array_equal(plain.noised[..., OTHERS], guided.noised[..., OTHERS])
    away = [np.abs(film.actions[-1] - film.means[-1]).mean() for film in (plain, guided)]
    assert away[1] < away[0] / 2


# Opening


@pytest.fixture
def stand_in(monkeypatch, episodes, tmp_path):
    """The stand-in human is collected in no time."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(standins, "human", lambda *given: episodes)


class NotNow(Exception):
    pass


def refuse(*_, **__):
    raise NotNow


def recorder(bars):
    """A maker of bars as tqdm's, each of which is put into the list."""

    class Bar:
        def __init__(self, total, desc, **_):
            self.total, self.desc, self.n = total, desc, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, n):
            self.n += n

    return Bar


def test_a_study_is_opened_with_what_is_asked_for(runs, stand_in, capsys):
    bars, said = [], []
    mine = study.Study.open(settings(), recorder(bars), said.append)
    assert [bar.desc for bar in bars] == ["collecting the stand-in human", "training the denoiser on stand-in pen-human"]
    assert bars[1].n == bars[1].total == 3
    assert len(said) == 1 and said[0].startswith("stand-in pen-human: 12 episodes") and capsys.readouterr() == ("", "")
    mine.point("explicit", 0.5)
    again = study.Study.open(settings(), refuse, said.append)  # all is there
    assert again.status("explicit", [0.5]) == ([0.5], [0.0], set())
    assert again.dataset.key == mine.dataset.key and again.p.samples == 6
    assert torch.equal(again.policy.log_std, load.load_guide("shipped")[0].log_std)
    assert not any(p.requires_grad for p in (*again.policy.parameters(), *again.denoiser.parameters()))
    own = load.load_denoiser(again.dataset, settings(), torch.device("cpu"))[0]
    assert store.digest(own.state_dict()) == store.digest(again.denoiser.state_dict())


def test_a_study_that_may_make_nothing_starts_nothing(runs, stand_in):
    with pytest.raises(NotNow):
        study.Study.open(settings(), refuse, lambda text: None)
    assert kept(runs) == []
    load.load_data("human", "local", 4_000, recorder([]), lambda text: None)
    files = kept(runs)
    with pytest.raises(NotNow):
        study.Study.open(settings(), refuse, lambda text: None)
    assert kept(runs) == files != []


def test_a_study_of_a_guide_that_is_not_there_is_not_opened(runs):
    with pytest.raises(ValueError, match=r"guide='nowhere\.zip'"):
        study.Study.open(settings(guide="nowhere.zip"), refuse)
    assert kept(runs) == []
