"""Studies of guidance: what is drawn, against the sampler itself and closed forms; what is measured; what is kept, and when."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SPEC, cut, kept, replay, smooth
from torch import nn
from tqdm import tqdm

from pgdlib import calibrate, data, dynamics, fast, guidance, sampler
from pgdlib.guidance import RULES, WARMED
from pgdlib.lab import artifacts, budget, load, settings, standins, study
from pgdlib.lab.parts import Parts
from pgdlib.policies import GaussianPolicy
from pgdlib.simulators import pen

SOLVERS = ("heun", "multistep")
OTHERS = [*range(45), 69, 70]  # channels that no rule moves
MEASURES = ["log_likelihood", "density", "normalised", "motion", "reconstructed", "appendix_b"]


@pytest.fixture(autouse=True)
def mujoco_log(tmp_path, monkeypatch):
    """MuJoCo logs its warnings in the working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def episodes():
    """Real episodes, some of which end by a fall."""
    rng = np.random.default_rng(0)
    return pen.rollout(replay(smooth(rng, 12, 40)), 12, rng, 40, threads=1)


@pytest.fixture(scope="module")
def dataset(episodes):
    def flat(x):
        return torch.tensor(x, dtype=torch.float32).flatten(0, 1)

    values = dict(obs=episodes.obs[:, :-1], actions=episodes.actions.clip(-1, 1), rewards=episodes.rewards)
    values |= dict(terminals=np.zeros((12, 40)), next_obs=episodes.obs[:, 1:])
    raw = data.Trajectories(**{k: flat(v) for k, v in values.items()}, lengths=torch.full((12,), 40), name="stand-in pen-toy")
    ended = data.end_where(raw, torch.as_tensor(episodes.ended).flatten())[0]
    return load.Dataset(ended, raw, False, "toy-1", 0, 0)


class Ideal(nn.Module):
    """The denoiser of data whose normalised channels are independent N(0, 1), each step for itself."""

    def __init__(self, dataset, transform="raw"):
        super().__init__()
        self.normaliser = data.Normaliser(SPEC, transform).fit(load.train_val(dataset)[0].packed())

    def forward(self, x, sigma):
        return x / (1 + torch.as_tensor(sigma, dtype=x.dtype) ** 2)


def a_policy(seed=0, log_std=-1.0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = GaussianPolicy(45, 24, hidden=[8])
    policy.log_std.data[..., :] = log_std + 0.3 * torch.randn(24, generator=torch.Generator().manual_seed(seed))
    return policy.requires_grad_(False)


def asked(**changes):
    own = dict(dataset="human", source="local", guide="shipped", device="cpu", transform="raw", seed=3, scale="ci")
    own |= dict(horizon=10, samples=6, solver="heun", steps=6, churn=2.0, warmup=2, units="natural")
    own |= dict(train_steps=3, batch_size=4, features=8)
    return SimpleNamespace(**{**settings.of_scale("ci"), **own, **changes})


@pytest.fixture
def lab(dataset):
    """A function that makes a study of this dataset; every call makes one that knows nothing of the others."""

    def make(policy=None, denoiser=None, **changes):
        return study.Study(dataset, denoiser or Ideal(dataset), policy or a_policy(), asked(**changes))

    return make


def assert_same(a, b):
    """Two points, bit for bit."""
    assert torch.equal(a.x, b.x) and a.counts == b.counts and a.measures.keys() == b.measures.keys()
    for name, values in a.measures.items():
        assert values.dtype == b.measures[name].dtype and values.tobytes() == b.measures[name].tobytes(), name


# Drawing


def noise_of(seed, n):
    """Where the noise of n trajectories comes from, of one block."""
    return [(fast.generator("cpu", "drawing", seed, 0), n)]


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


@pytest.mark.parametrize("rule", RULES)
def test_the_same_noise_at_every_weight(lab, rule):
    """The ideal denoiser treats channels one by one: what is not guided is the same at every λ."""
    lab = lab()
    unguided, _ = lab.draw("explicit", 0.0)
    for lam in (0.05, 0.4):
        x, _ = lab.draw(rule, lam)
        assert torch.equal(x[..., OTHERS], unguided[..., OTHERS])
        assert (x[..., SPEC.actions] != unguided[..., SPEC.actions]).any((1, 2)).all()
    for elsewhere in (dict(seed=4), dict(noise=fast.stream("cpu", "calibration", 3))):
        assert (lab.draw(rule, 0.4, **elsewhere)[0][..., OTHERS] != unguided[..., OTHERS]).float().mean() > 0.99


@pytest.mark.parametrize("solver, evaluations", [("heun", 11), ("multistep", 6)])
def test_every_evaluation_is_watched(lab, solver, evaluations):
    lab, seen = lab(solver=solver, churn=2.0 * (solver == "heun")), []
    x, _ = lab.draw("explicit", 0.2, watch=lambda *given: seen.append(given))
    shares = [done for *_, done in seen]
    assert len(shares) == evaluations and shares == sorted(set(shares)) and shares[-1] == 1.0
    assert torch.equal(x, lab.draw("explicit", 0.2)[0])
    assert all(torch.equal(denoised, lab.denoiser(noised, sigma)) for noised, denoised, sigma, _ in seen)


# Measures


def windows(episodes, lab, n=6):
    """Normalised windows of what the simulator itself did, none with a fall."""
    whole = np.flatnonzero(~episodes.ended[:, :30].any(1))[:n]
    obs, actions = episodes.obs[whole, 10:20], episodes.actions[whole, 10:20].clip(-1, 1)
    steps = np.concatenate([obs, actions, np.zeros((n, 10, 2))], -1)
    return lab.normaliser.normalise(torch.tensor(steps, dtype=torch.float32))


@pytest.mark.parametrize("transform", ["raw", "arctanh"])
def test_measures_are_those_of_the_metrics(lab, episodes, dataset, transform):
    lab = lab(denoiser=Ideal(dataset, transform))
    x = windows(episodes, lab)
    x[1, 5:, SPEC.terminal] = 1.0  # the second ends with its sixth step
    found, counts = lab.judge(x)
    steps = lab.normaliser.denormalise(x)
    obs, actions, alive = steps[..., :45], steps[..., 45:69], torch.ones(6, 10)
    alive[1, 6:] = 0
    variance = load.train_val(dataset)[0].obs.var(0).numpy()
    for name, keys in {
        "reconstructed": ("reconstructed", "normalised"),
        "appendix_b": ("appendix_b",),
        "still": ("motion",),
    }.items():
        error = dynamics.dynamics_error(pen.PEN, obs.numpy(), actions.numpy(), variance, name, alive.numpy(), threads=1)
        for key in keys:
            np.testing.assert_array_equal(found[key], error.normalised if key in ("normalised", "motion") else error.plain)
    by_hand = torch.distributions.Normal(*lab.policy(obs)).log_prob(actions)
    np.testing.assert_allclose(found["density"][2:], by_hand.sum(-1).exp().mean(-1)[2:], rtol=1e-4)
    assert found["log_likelihood"][0] == pytest.approx(by_hand[0].mean().item(), rel=1e-5)
    assert found["log_likelihood"][1] == pytest.approx(by_hand[1, :6].mean().item(), rel=1e-5)
    assert counts == {"diverged": 0, "unjudged": 0} and [*found] == MEASURES
    assert all(v.shape == (6,) and v.dtype == np.float64 and np.isfinite(v).all() for v in found.values())


def test_counts_of_what_has_no_error(lab, episodes):
    lab = lab()
    x = windows(episodes, lab)
    x[[0, 4], 3, 5] = 1e4  # a hand joint far out
    found, counts = lab.judge(x, torch.tensor([True, False, True, True, False, False]))
    assert counts == {"diverged": 3, "unjudged": 2} and all(type(v) is int for v in counts.values())
    for name in ("normalised", "reconstructed", "appendix_b"):
        assert np.flatnonzero(np.isnan(found[name])).tolist() == [0, 4]
    assert np.isfinite(found["log_likelihood"]).all()


def test_the_floor_is_that_of_validation_windows(lab):
    lab = lab(samples=20)
    assert {name: values.mean() for name, values in lab.real.items()} == pytest.approx(lab.floor)
    (x, mask), again = (lab.windows(lab.val, 20, 3) for _ in range(2))
    assert x.shape == (20, 10, 71) and mask.shape == (20, 10) and torch.equal(x, again[0])
    assert not torch.equal(x, lab.windows(lab.val, 20, 4)[0])
    np.testing.assert_array_equal(lab.judge(x)[0]["normalised"], lab.real["normalised"])
    packed = lab.normaliser.normalise(lab.val.packed())
    assert all((packed == first).all(1).any() for first in x[:, 0])  # steps of the validation side
    assert lab.floor["normalised"] < lab.floor["motion"] / 10


def test_what_lies_beyond_the_end_of_a_short_episode_is_not_judged(lab):
    """Seven steps in windows of ten: they have the measures of the seven alone."""
    short = lab(samples=20)
    ends = {k: torch.tensor([7]) if k == "lengths" else v[:7] for k, v in short.val.tensors().items()}
    short.val = data.Trajectories.from_tensors(ends, "short")
    x, _ = short.windows(short.val, 20, 3)
    assert torch.equal(x[:, 7:], x[:, 6:7].expand(-1, 3, -1))  # its last step, repeated
    expected, _ = short.judge(x[:, :7])
    for name, values in short.real.items():  # a density is the exponential of a sum over 24 dimensions in float32
        np.testing.assert_allclose(values, expected[name], rtol=1e-4, err_msg=name)
    assert not np.allclose(short.judge(x)[0]["motion"], expected["motion"])  # the repeated step would stand still


def test_on_policy_is_the_likelihood_of_the_policys_own_actions(lab):
    lab = lab()
    obs = lab.train.obs[:200]
    own = lab.policy.sample(obs, torch.Generator().manual_seed(0))
    found = lab.policy.log_prob(obs, own) / 24
    assert abs(found.mean() - lab.on_policy) < 3.3 * found.std() / len(found) ** 0.5 < 0.05


# What is kept


def test_a_sweep_is_made_once(lab, runs, monkeypatch):
    first = lab().sweep("explicit", [0.5, 2, 0.1])
    assert list(first) == [0.0, 0.1, 0.5, 2.0] and len(kept(runs)) == 4
    assert all(f.startswith("sweeps/standin-toy-ci-explicit-natural/") for f in kept(runs))
    monkeypatch.setattr(study.Study, "draw", None)  # cannot be called
    for lams in ([0, 1 / 10, 2, 2, 0.5], np.array([0.1, 0.5, 2.0])):
        again = lab().sweep("explicit", lams)
        for (lam, point), (expected, other) in zip(again.items(), first.items(), strict=True):
            assert lam == expected
            assert_same(point, other)
    for lam in (2, np.float64(2), np.int64(2)):
        assert_same(lab().point("explicit", lam), first[2.0])


@pytest.mark.parametrize("lam", [0.0, 0.3, 100.0])
def test_a_point_is_what_was_drawn_and_judged(lab, runs, lam):
    """Also where all diverge and measures are no numbers."""
    x, diverged = lab().draw("explicit", lam)
    assert diverged.all() == (lam == 100)
    drawn = study.Point(x, *lab().judge(x, diverged))
    assert_same(lab().point("explicit", lam), drawn)
    assert_same(lab().point("explicit", lam), drawn)  # from its file
    assert len(kept(runs)) == 1


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


def test_other_settings_make_other_points(lab, runs):
    lab().sweep("explicit", [1])
    lab().sweep("smoothed", [1])
    for name, (changes, seen) in CHANGES.items():
        for rule, differs in (("explicit", seen is not None), ("smoothed", bool(seen))):
            have, missing, _ = lab(**changes).status(rule, [1])
            assert (have, missing) == (([], [0.0, 1.0]) if differs else ([0.0, 1.0], [])), name
    assert lab().status("proximal", [1]) == ([], [0.0, 1.0], set())


def test_other_weights_and_other_data_make_other_points(lab, dataset, runs):
    lab().sweep("explicit", [1])
    moved, nudged, other = Ideal(dataset), a_policy(), lab()
    moved.normaliser.std[50] *= 1.001
    nudged.log_std.data[..., 3] += 1e-6
    other.dataset = load.Dataset(dataset.data, dataset.raw, False, "toy-2", 0, 0)
    for mine, differs in (
        (other, {"data"}),
        (lab(policy=nudged, denoiser=moved, seed=4), {"guide", "diffusion model", "seed"}),
        (lab(samples=9, horizon=8, steps=9), {"trajectories", "horizon", "sampler"}),
    ):
        assert mine.status("explicit", [1]) == ([], [0.0, 1.0], differs)


def test_other_code_makes_other_points(lab, runs, monkeypatch):
    """The study's own and all that it imports of the package."""
    assert {"guidance", "sampler", "dynamics", "simulators.pen", "measures", "fast"} <= set(artifacts.closure("lab.study"))
    lab().sweep("explicit", [1])
    monkeypatch.setattr(artifacts, "code_version", lambda *rooms: "0" * 12 if "lab.study" in rooms else "1")
    assert lab().status("explicit", [1]) == ([], [0.0, 1.0], {"code"})


def test_status_says_what_is_there(lab, runs):
    assert lab().status("explicit", [1, 2]) == ([], [0.0, 1.0, 2.0], set())
    lab().sweep("explicit", [1])
    lab(seed=9).sweep("explicit", [1, 2, 3])  # beside them
    assert lab().status("explicit", [2, 1]) == ([0.0, 1.0], [2.0], set())
    assert lab().status("explicit", [0.999999]) == ([0.0], [0.999999], set())


def test_status_with_damaged_and_foreign_files(lab, runs):
    lab(seed=9).point("explicit", 0.0)
    (file,) = (runs / f for f in kept(runs))
    cut(file)
    have, missing, differs = lab().status("explicit", [1])
    assert (have, missing) == ([], [0.0, 1.0]) and differs == {"file, damaged"}
    artifacts.save(file, {"x": torch.zeros(1)}, {"kind": "something else"})
    have, missing, differs = lab().status("explicit", [1])
    assert (have, missing) == ([], [0.0, 1.0]) and differs == {"file, damaged"}


# In chunks


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


def test_a_killed_calibration_goes_on_to_the_same(lab, runs, monkeypatch):
    """The draws that were over are not repeated, and nothing of them stays."""
    monkeypatch.setattr(study.Study, "most", lambda lab, n: 32)
    mine = dict(scale="quick", solver="multistep", churn=0.0, warmup=0)
    expected, seen = lab(**mine).calibrate("explicit", 0.03), []
    assert kept(runs) == []

    def killed(*given):
        seen.append(given[-1])
        if len(seen) == 40:  # of 12 for each draw of 64, in two chunks
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab(**mine).calibrate("explicit", 0.03, killed)
    assert len(kept(runs)) == 6 and all(f.startswith("checkpoints/calibration-standin-toy-quick") for f in kept(runs))
    again = []
    found = lab(**mine).calibrate("explicit", 0.03, lambda *given: again.append(given[-1]))
    assert str(found) == str(expected) and kept(runs) == []  # with NaN where all trajectories diverge
    drawn = {(lam, n) for lam, n, *_ in expected.trace}  # what is asked for twice is drawn once
    assert len(again) == sum(6 * math.ceil(n / 32) for _, n in drawn) - 36


def test_a_damaged_chunk_is_drawn_again(lab, runs, monkeypatch):
    monkeypatch.setattr(study.Study, "most", lambda lab, n: 32)
    expected, parts = lab(samples=64).draw("explicit", 0.2), Parts("some")
    lab(samples=64).draw("explicit", 0.2, parts=parts)
    cut(parts.folder / "0-32.safetensors")
    x, _ = lab(samples=64).draw("explicit", 0.2, parts=parts)
    assert torch.equal(x, expected[0]) and sum(f.endswith(".damaged") for f in kept(runs)) == 1
    parts.discard()
    assert kept(runs) == []


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
    ratios = [2 * (s / d) ** 2 for s, d in zip(mine.policy.std[0].tolist(), mine.normaliser.std[45:69].tolist())]
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


@pytest.mark.parametrize("scale, tolerance", [("quick", 0.03), ("ci", 0.2)])
def test_calibration_meets_the_policys_own_likelihood(lab, runs, monkeypatch, capsys, scale, tolerance):
    """On noise of its own: that of no sweep. At ci scale to 20%, whatever is asked. What diverged may end up anywhere."""
    lab, streams, draw = lab(scale=scale, solver="multistep", churn=0.0, warmup=0), [], sampler.draw

    def drawn(*a, **k):
        streams.append(a[4].args[1])
        return draw(*a, **k) if a[5].lam < 2 else (draw(*a[:5], **k)[0], torch.ones(a[1][0], dtype=bool))

    monkeypatch.setattr(sampler, "draw", drawn)
    found = lab.calibrate("explicit", 0.03)
    assert set(streams) == {"calibration"} and found.target == lab.on_policy and 0 < found.lam < 2
    assert not capsys.readouterr().out  # such as that the target is out of reach
    allowed = tolerance * max(abs(lab.on_policy), 0.1)
    assert abs(found.log_likelihood - lab.on_policy) <= allowed
    x, _ = lab.draw("explicit", found.lam, 512, seed=77)
    assert lab.judge(x)[0]["log_likelihood"].mean() == pytest.approx(lab.on_policy, abs=1.5 * allowed)


def test_out_of_reach_the_nearest_is_taken_and_said(lab, runs, capsys):
    lab = lab(scale="quick", solver="multistep", churn=0.0)
    lab.on_policy = 100.0
    found = lab.calibrate("smoothed", 0.03)
    assert capsys.readouterr().out.startswith("smoothed: log-likelihood is ")
    assert isinstance(found, calibrate.Calibration) and found.lam in [lam for lam, *_ in found.trace]
    assert found.log_likelihood == max(mean for _, _, mean, _ in found.trace)


# Summaries


def test_a_summary_has_the_interval_of_every_measure():
    rng, points = np.random.default_rng(0), {}
    for i, lam in enumerate((0.0, 0.5, 2.0, 3.0)):
        found = {"log_likelihood": rng.normal(size=7), "normalised": rng.random(7)}
        found["normalised"][: 7 if lam == 3 else i] = math.nan
        points[lam] = study.Point(torch.zeros(7, 2, 71), found, {"diverged": 2 * i, "unjudged": i})
    frame = study.summary(points)
    assert frame["lam"].tolist() == list(points) and frame["diverged"].tolist() == [0, 2, 4, 6]
    assert frame["unjudged"].tolist() == [0, 1, 2, 3] and len(frame.columns) == 3 + 2 * 3
    for (_, row), point in zip(frame.iterrows(), points.values(), strict=True):
        for name, values in point.measures.items():
            mean, low, high = (row[f"{name}.{k}"] for k in ("mean", "low", "high"))
            if np.isfinite(values).any():
                assert mean == pytest.approx(np.nanmean(values)) and low < mean < high
            else:
                assert np.isnan([mean, low, high]).all()


# On its way from noise


@pytest.mark.parametrize("solver, transform", [("heun", "raw"), ("heun", "arctanh"), ("multistep", "raw")])
def test_an_unguided_denoising_ends_with_the_drawn_trajectory(lab, dataset, solver, transform):
    """Every step in closed form, for a denoiser of known data: noised / (1 + σ²)."""
    lab = lab(denoiser=Ideal(dataset, transform), solver=solver, churn=2.0 * (solver == "heun"))
    found = study.denoising(lab, "explicit", 0.0, seed=5)
    assert found.sigma.shape == (6,) and found.noised.shape == (6, 10, 71)
    levels = sampler.noise_levels(6)[:-1].numpy()
    raised = [s * (1 + min(2.0 / 6, math.sqrt(2) - 1) * (solver == "heun" and 0.05 <= s <= 50)) for s in levels]
    np.testing.assert_allclose(found.sigma, raised, rtol=1e-12)
    mean, std = (v.numpy() for v in (lab.normaliser.mean, lab.normaliser.std))
    steps = found.noised / (1 + found.sigma[:, None, None] ** 2) * std + mean
    actions = np.tanh(steps[..., 45:69]) if transform == "arctanh" else steps[..., 45:69]
    np.testing.assert_allclose(found.actions, actions, rtol=1e-4, atol=1e-5)
    obs = torch.tensor(steps[..., :45], dtype=torch.float32)
    np.testing.assert_allclose(found.means, lab.policy(obs)[0], rtol=1e-3, atol=1e-4)
    x, _ = lab.draw("explicit", 0.0, 1, 5)
    np.testing.assert_allclose(found.actions[-1], lab.normaliser.denormalise(x)[0, :, 45:69], rtol=1e-4, atol=1e-5)


def test_a_guided_denoising_starts_like_the_unguided_and_ends_nearer_the_policy(lab):
    lab = lab(churn=0.0)
    plain, guided = (study.denoising(lab, "explicit", lam) for lam in (0.0, 0.8))
    np.testing.assert_array_equal(plain.sigma, guided.sigma)
    np.testing.assert_array_equal(plain.noised[:2], guided.noised[:2])  # the warm-up
    np.testing.assert_array_equal(plain.noised[..., OTHERS], guided.noised[..., OTHERS])
    away = [np.abs(found.actions[-1] - found.means[-1]).mean() for found in (plain, guided)]
    assert away[1] < away[0] / 2


# Opening


def test_a_study_is_opened_with_what_is_asked_for(runs, monkeypatch, episodes, tmp_path):
    """Nothing is made again, and nothing at all where the maker of bars refuses."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(standins, "human", lambda *given: episodes)  # in no time
    bars, said = [], []

    def refuse(**_):
        raise InterruptedError

    def bar(**named):
        bars.append(named["desc"])
        return tqdm(disable=True, **named)

    with pytest.raises(InterruptedError):
        study.Study.open(asked(), refuse, said.append)
    assert kept(runs) == [] and not said
    mine = study.Study.open(asked(), bar, said.append)
    assert bars == ["collecting the stand-in human", "training the denoiser on stand-in pen-human"]
    assert said[0].startswith("stand-in pen-human: 12 episodes")
    mine.point("explicit", 0.5)
    again = study.Study.open(asked(), refuse, said.append)
    assert again.status("explicit", [0.5]) == ([0.5], [0.0], set())
    assert again.dataset.key == mine.dataset.key and again.p.samples == 6
    assert torch.equal(again.policy.log_std, load.load_guide("shipped")[0].log_std)
    assert not any(p.requires_grad for p in (*again.policy.parameters(), *again.denoiser.parameters()))
    with pytest.raises(ValueError, match=r"guide='nowhere\.zip'"):
        study.Study.open(asked(guide="nowhere.zip"), refuse)
