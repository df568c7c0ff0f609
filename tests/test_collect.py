"""The stand-ins: their make-up, their demonstrator, their file."""

import functools
import itertools

import numpy as np
import pytest
import torch

from pgdlib import data
from pgdlib.lab import collect, minari_files, pipeline
from pgdlib.lab.collect import Demonstrator
from pgdlib.simulators import pen as adroit


@pytest.fixture(scope="module")
def quick_clone():
    """Behaviour cloning with a hundredth of its steps: tests need a clone, not a good one."""
    with pytest.MonkeyPatch.context() as patch:
        full = collect.behaviour_clone
        patch.setattr(collect, "behaviour_clone", lambda obs, actions, seed, steps=20: full(obs, actions, seed, steps))
        yield


@pytest.fixture(scope="module")
def files(guide, quick_clone, tmp_path_factory):
    """name -> `Trajectories` of the stand-in's file."""
    root = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "HUMAN_EPISODES", 10)
        patch.setattr(collect, "human", functools.cache(collect.human))  # simulated once for one seed
        return {
            name: minari_files.from_minari(collect.write(name, root, guide, steps), f"stand-in {name}")[0]
            for name, steps in (("human", 0), ("cloned", 4_000), ("expert", 450))
        }


@pytest.mark.slow
def test_episode_lengths(files):
    assert files["human"].lengths.tolist() == [200] * 10
    assert files["expert"].lengths.tolist() == [100] * 5
    assert files["cloned"].lengths.tolist() == [200] * 10 + [100] * 20  # copies of the demonstrations, then rollouts
    assert set(files["human"].info) == set(files["cloned"].info) == {"qpos", "qvel", "target"}


def test_cloned_holds_the_demonstrations(files):
    assert torch.equal(files["cloned"].packed()[:2000], files["human"].packed())
    assert not torch.equal(files["cloned"].packed()[2000:3000], files["human"].packed()[:1000])


@pytest.mark.parametrize("steps, copies, rollouts", [(4_000, 1, 20), (30_000, 3, 150), (100_000, 10, 500)])
def test_half_of_cloned_is_copies(guide, quick_clone, monkeypatch, steps, copies, rollouts):
    """Below 10,000 steps one copy is already more than half."""

    class Batch:
        def __init__(self, n, horizon):
            self.n, self.horizon, self.rewards = n, horizon, np.zeros((n, horizon))
            self.obs, self.actions = np.zeros((n, horizon + 1, 45)), np.zeros((n, horizon, 24))

    monkeypatch.setattr(adroit, "rollout", lambda act, n, rng, horizon=200: Batch(n, horizon))
    done = []
    batches = list(collect.cloned(guide, steps, 0, done.append))
    assert [b.n for b in batches if b.horizon == 200] == [25] * copies and len({map(id, batches[:copies])}) == 1
    assert sum(b.n for b in batches if b.horizon == 100) == rollouts
    assert done[-1] == 1 and done == sorted(done)


def test_unique_episodes_are_split(files):
    demos = files["cloned"].episodes(torch.arange(10).repeat(4))
    train, val = data.split(demos, 0.2, 0)
    assert (len(train.lengths), len(val.lengths)) == (32, 8)
    targets = [{tuple(t) for t in side.info["target"].tolist()} for side in (train, val)]  # each episode has its own
    assert [len(t) for t in targets] == [8, 2] and not targets[0] & targets[1]


def test_nothing_ends_at_a_fall(files):
    data_ = files["cloned"]
    fallen = data_.next_obs[:, adroit.PEN_HEIGHT] < adroit.FALL_HEIGHT
    last = torch.zeros_like(fallen)
    last[data_.starts + data_.lengths - 1] = True
    assert (fallen & ~last).any() and not data_.terminals.any()
    _, cut, dropped = data.end_at_falls(data_)
    assert cut > 0 and dropped > 0


@pytest.mark.parametrize("name", ["human", "cloned", "expert"])
def test_the_stored_states_are_those_of_the_observations(files, name):
    """Put back into the simulator with its action, each stored state leads to the next observation and its reward."""
    mine = files[name]
    steps = torch.arange(0, len(mine.rewards), 7)
    qpos, qvel, target = (mine.info[k][steps].double().numpy() for k in ("qpos", "qvel", "target"))
    batch = adroit.PenBatch(len(steps))
    batch.set_state(qpos, qvel, target)
    after = batch.step(mine.actions[steps].numpy())
    error = np.abs(after - mine.next_obs[steps].numpy())
    assert np.median(error) < 1e-5 and np.quantile(error, 0.999) < 1e-2  # float32; a contact may be made or missed
    np.testing.assert_allclose(adroit.outcome(mine.next_obs.double().numpy())[0], mine.rewards, atol=1e-4)
    np.testing.assert_array_equal(mine.obs[:, :24], mine.info["qpos"][:, :24])
    np.testing.assert_array_equal(mine.obs[:, 27:33], mine.info["qvel"][:, 24:])
    inner = torch.ones(len(mine.rewards), dtype=torch.bool)
    inner[mine.starts + mine.lengths - 1] = False
    assert torch.equal(mine.next_obs[inner], mine.obs[1:][inner[:-1]])


def test_expert_acts_by_samples_of_the_guide(guide):
    (batch,) = collect.expert(guide, 400, 3)
    mean, std = (x.numpy() for x in guide(torch.from_numpy(batch.obs[:, :-1]).float()))
    z = (batch.actions - mean) / std
    assert abs(z.mean()) < 5 / np.sqrt(z.size) and abs(z.std() - 1) < 5 / np.sqrt(2 * z.size)


@pytest.mark.slow
def test_the_seed_decides(guide, quick_clone, monkeypatch):
    monkeypatch.setattr(collect, "HUMAN_EPISODES", 2)
    monkeypatch.setattr(adroit, "D4RL_HORIZON", 30)
    monkeypatch.setattr(adroit.rollout, "__defaults__", (30, None, None))
    for make in (lambda s: [collect.human(guide, s)], lambda s: collect.expert(guide, 200, s), lambda s: clones(guide, s)):
        first, again, other = ([b.actions for b in make(seed)] for seed in (0, 0, 1))
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def clones(guide, seed):
    """The rollouts of a small `cloned`, without its demonstrations."""
    return itertools.islice(collect.cloned(guide, 400, seed), 1, None)


def test_large_sizes_come_in_batches(guide, monkeypatch):
    monkeypatch.setattr(collect, "CHUNK", 3)
    sizes, done = [], []
    for batch in collect.expert(guide, 701, 0, done.append):
        sizes.append(len(batch.obs))
    assert sizes == [3, 3, 2] and done == pytest.approx([3 / 8, 6 / 8, 1])


def demonstrate(policy, steps=400, n=30, **body):
    """Observations [T, n, 45] that do not depend on the actions, and the demonstrator's actions [T, n, 24] at them."""
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(steps, n, 45))
    act = Demonstrator(policy, **body).act(np.random.default_rng(1))
    return obs, np.stack([act(o) for o in obs])


def test_the_demonstrator_is_late(guide):
    for delay in (0, 2, 5):
        obs, actions = demonstrate(guide, 12, delay=delay, tremor=0, sluggishness=0)
        expected = [guide.act()(obs[max(0, t - delay)]) for t in range(12)]
        np.testing.assert_allclose(actions, expected, atol=1e-6)


def test_the_demonstrator_is_sluggish(guide):
    """a_t = (1 - g) mean + g a_{t-1}, with a g of its own in each episode: the fit has no residual."""
    obs, actions = demonstrate(guide, 12, delay=0, tremor=0, sluggishness=0.6)
    mean = np.stack([guide.act()(o) for o in obs]).astype(float)
    before = np.concatenate([0 * actions[:1], actions[:-1]])
    x, y = before - mean, actions - mean
    g = (x * y).sum((0, 2)) / (x * x).sum((0, 2))
    np.testing.assert_allclose(y, g[:, None] * x, atol=1e-6)
    assert 0 <= g.min() < 0.1 and 0.5 < g.max() <= 0.6


def test_the_demonstrator_trembles(guide):
    obs, actions = demonstrate(guide, delay=0, tremor=0.25, memory=10.0, sluggishness=0)
    tremor = actions - np.stack([guide.act()(o) for o in obs])
    assert tremor[0].std() == pytest.approx(0.25, rel=0.1) and tremor.std() == pytest.approx(0.25, rel=0.05)
    for lag in (1, 10, 30):
        correlation = np.corrcoef(tremor[:-lag].ravel(), tremor[lag:].ravel())[0, 1]
        assert correlation == pytest.approx(np.exp(-lag / 10), abs=0.03)
    assert abs(np.corrcoef(tremor[..., 0].ravel(), tremor[..., 1].ravel())[0, 1]) < 0.1


@pytest.mark.slow
def test_behaviour_clone_recovers_a_linear_gaussian_policy():
    generator = torch.Generator().manual_seed(0)
    centre, scale = torch.randn(45, generator=generator) * 3, torch.logspace(-2, 2, 45)
    z = torch.randn(12_000, 45, generator=generator)
    weights = torch.zeros(45, 24)
    weights[[0, 20, 40]] = torch.randn(3, 24, generator=generator) * 0.3
    std = torch.linspace(0.27, 0.5, 24)
    actions = z @ weights + std * torch.randn(12_000, 24, generator=generator)
    clone = collect.behaviour_clone(centre + scale * z, actions, seed=0, steps=700)
    fresh = torch.randn(1000, 45, generator=generator)
    mean, fitted = clone(centre + scale * fresh)
    error, signal = mean - fresh @ weights, fresh @ weights
    assert error.square().mean().sqrt() < 0.2 * signal.std()
    assert (error.mean(0).abs() < 0.03).all()
    np.testing.assert_allclose(fitted[0], std, rtol=0.15)
    assert not any(p.requires_grad for p in clone.parameters())


def test_behaviour_clone_leaves_the_global_random_state_alone():
    obs, before = torch.ones(50, 45), torch.get_rng_state()
    first, again, other = (collect.behaviour_clone(obs, torch.zeros(50, 24), seed=s, steps=1) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weights, same, others = (c.net[0].weight for c in (first, again, other))
    assert torch.equal(weights, same) and not torch.equal(weights, others)


# A collection that is killed


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["expert", "cloned"])
def test_a_killed_collection_goes_on_to_the_same_file(dataset, guide, quick_clone, tmp_path, monkeypatch):
    """After each batch, and while the file is written. What is expected is written without any parts."""
    monkeypatch.setattr(collect, "CHUNK", 4)
    monkeypatch.setattr(collect, "HUMAN_EPISODES", 2)
    monkeypatch.setattr(adroit, "D4RL_HORIZON", 10)
    human = collect.human(guide, 0)
    monkeypatch.setattr(collect, "human", lambda *given: human)
    steps = 110 if dataset == "expert" else 220
    batches = list(getattr(collect, dataset)(guide, steps, 0))
    assert [len(b.targets) for b in batches][-3:] == [4, 4, 3]
    text = f"Local stand-in for D4RL's pen {dataset} data; not D4RL. {collect.__doc__}"
    whole = minari_files.write_minari(tmp_path / "whole", f"standin/pen/{dataset}-v0", batches, text)
    rolled, rollout, write = [], adroit.rollout, minari_files.write_minari

    def counted(act, n, *given):
        if len(rolled) == at:
            raise KeyboardInterrupt
        rolled.append(n)
        return rollout(act, n, *given)

    def killed(folder, name, batches, text):
        list(batches)
        raise KeyboardInterrupt

    monkeypatch.setattr(adroit, "rollout", counted)
    for at in (1, 2):  # noqa: B007 (`counted` uses it)
        with pytest.raises(KeyboardInterrupt):
            collect.write(dataset, tmp_path / "parts", guide, steps)
    at, done = None, []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(minari_files, "write_minari", killed)
        collect.write(dataset, tmp_path / "parts", guide, steps)
    place = collect.write(dataset, tmp_path / "parts", guide, steps, done.append)
    assert rolled == [4, 4, 3] and done == [4 / 11, 8 / 11, 1.0]
    assert minari_files.write_minari is write and minari_files.digest(place) == minari_files.digest(whole)
    assert [f.name for f in (tmp_path / "parts").iterdir()] == ["standin"]


def test_parts_of_another_collection_are_not_used(guide, tmp_path, monkeypatch):
    """Of another seed, another size or another policy."""
    monkeypatch.setattr(collect, "CHUNK", 2)
    monkeypatch.setattr(adroit, "D4RL_HORIZON", 3)
    rolled, rollout = [], adroit.rollout
    monkeypatch.setattr(adroit, "rollout", lambda act, n, *given: rolled.append(n) or rollout(act, n, *given))
    other = pipeline.load_guide(pipeline.DEMONSTRATOR)[0]
    for policy, steps, seed in ((guide, 9, 0), (guide, 9, 1), (guide, 12, 0), (other, 9, 0), (guide, 9, 0)):
        list(collect.expert(policy, steps, seed, parts=tmp_path))
    assert rolled == [2, 1, 2, 1, 2, 2, 2, 1]
