"""The stand-ins: their make-up, their demonstrator, their file."""

import functools
import itertools

import numpy as np
import pytest
import torch
from conftest import shorter

from pgdlib import data
from pgdlib.lab import load, minari_files, standins
from pgdlib.lab.standins import Demonstrator
from pgdlib.simulators import pen as adroit
from pgdlib.simulators.episodes import Episodes


@pytest.fixture(scope="module")
def quick_clone():
    """A clone with a hundredth of its steps: tests need a clone, not a good one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standins, "clone_of", functools.partial(standins.clone_of, steps=20))
        yield


@pytest.fixture(scope="module")
def files(guide, quick_clone, tmp_path_factory):
    """name -> `Trajectories` of the stand-in's file."""
    root = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standins, "HUMAN_EPISODES", 10)
        patch.setattr(standins, "human", functools.cache(standins.human))  # simulated once for one seed
        return {
            name: minari_files.from_minari(standins.write(name, root, [guide], steps), f"stand-in {name}")
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
def test_half_of_cloned_is_copies(files, guide, quick_clone, monkeypatch, tmp_path, steps, copies, rollouts):
    """Below 10,000 steps one copy is already more than half."""
    demos = adroit.rollout(lambda obs: np.zeros((len(obs), 24)), 25, np.random.default_rng(0), 200)
    monkeypatch.setattr(standins, "human", lambda *given: demos)
    monkeypatch.setattr(standins, "_rollouts", lambda simulator, policy, steps, *given: [steps])
    *played, asked = standins.cloned(guide, steps, 0, tmp_path)
    assert len(played) == copies and all(batch is demos for batch in played) and asked == 100 * rollouts


def test_unique_episodes_are_split(files):
    demos = files["cloned"].episodes(torch.arange(10).repeat(4))
    train, val = data.split(demos, 0.2, 0)
    assert (len(train.lengths), len(val.lengths)) == (32, 8)
    targets = [{tuple(t) for t in side.info["target"].tolist()} for side in (train, val)]  # each episode has its own
    assert [len(t) for t in targets] == [8, 2] and not targets[0] & targets[1]


def test_nothing_ends_at_a_fall(files):
    data_ = files["cloned"]
    fallen = data_.next_obs[:, 26] < 0.075
    last = torch.zeros_like(fallen)
    last[data_.starts + data_.lengths - 1] = True
    assert (fallen & ~last).any() and not data_.terminals.any()
    _, cut, dropped = data.end_where(data_, fallen)
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


def test_expert_acts_by_samples_of_the_guide(guide, tmp_path):
    (batch,) = standins.expert(guide, 400, 3, tmp_path)
    mean, std = (x.numpy() for x in guide(torch.from_numpy(batch.obs[:, :-1]).float()))
    z = (batch.actions - mean) / std
    assert abs(z.mean()) < 5 / np.sqrt(z.size) and abs(z.std() - 1) < 5 / np.sqrt(2 * z.size)


@pytest.mark.slow
def test_the_seed_decides(guide, quick_clone, monkeypatch, tmp_path):
    """And no batch is like another one."""
    monkeypatch.setattr(standins, "HUMAN_EPISODES", 2)
    monkeypatch.setattr(standins, "CHUNK", 3)
    shorter(monkeypatch, 30)
    monkeypatch.setattr(adroit.rollout, "__defaults__", (30, None, None))

    def batches(name, seed, place):
        made = [standins.human(guide, seed)] if name == "human" else getattr(standins, name)(guide, 400, seed, tmp_path / place)
        return [b.actions for b in made]

    for name in ("human", "expert", "cloned"):
        first, again, other = (batches(name, seed, place) for seed, place in ((0, "a"), (0, "b"), (1, "c")))
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
        whole = [b for b in first if b.shape == (3, 30, 24)]
        assert not any(np.array_equal(a, b) for a, b in itertools.combinations(whole, 2))


def test_large_sizes_come_in_batches(guide, monkeypatch, tmp_path):
    monkeypatch.setattr(standins, "CHUNK", 3)
    sizes, done = [], []
    for batch in standins.expert(guide, 701, 0, tmp_path, done.append):
        sizes.append(len(batch.obs))
    assert sizes == [3, 3, 2] and done == pytest.approx([300 / 701, 600 / 701, 1])


def demonstrate(policy, steps=400, n=30, **body):
    """Observations [T, n, 45] that do not depend on the actions, and the demonstrator's actions [T, n, 24] at them."""
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(steps, n, 45))
    act = Demonstrator(policy, **body).act(np.random.default_rng(1))
    return obs, np.stack([act(o) for o in obs])


def test_the_demonstrator_is_late(guide):
    for delay in (0, 2, 5):
        obs, actions = demonstrate(guide, 12, delay=delay, tremor=0, sluggishness=0)
        expected = [guide.act(obs[max(0, t - delay)]) for t in range(12)]
        np.testing.assert_allclose(actions, expected, atol=1e-6)


def test_the_demonstrator_is_sluggish(guide):
    """a_t = (1 - g) mean + g a_{t-1}, with a g of its own in each episode: the fit has no residual."""
    obs, actions = demonstrate(guide, 12, delay=0, tremor=0, sluggishness=0.6)
    mean = np.stack([guide.act(o) for o in obs]).astype(float)
    before = np.concatenate([0 * actions[:1], actions[:-1]])
    x, y = before - mean, actions - mean
    g = (x * y).sum((0, 2)) / (x * x).sum((0, 2))
    np.testing.assert_allclose(y, g[:, None] * x, atol=1e-6)
    assert 0 <= g.min() < 0.1 and 0.5 < g.max() <= 0.6


def test_the_demonstrator_trembles(guide):
    obs, actions = demonstrate(guide, delay=0, tremor=0.25, memory=10.0, sluggishness=0)
    tremor = actions - np.stack([guide.act(o) for o in obs])
    assert tremor[0].std() == pytest.approx(0.25, rel=0.1) and tremor.std() == pytest.approx(0.25, rel=0.05)
    for lag in (1, 10, 30):
        correlation = np.corrcoef(tremor[:-lag].ravel(), tremor[lag:].ravel())[0, 1]
        assert correlation == pytest.approx(np.exp(-lag / 10), abs=0.03)
    assert abs(np.corrcoef(tremor[..., 0].ravel(), tremor[..., 1].ravel())[0, 1]) < 0.1


def played(obs, actions):
    """Episodes of one step with such observations [N, 45] and actions [N, 24]."""
    n, nothing = len(obs), np.zeros((len(obs), 2, 30))
    both = np.stack([obs, obs], 1)
    return Episodes(both, actions[:, None], np.zeros((n, 1)), np.zeros((n, 1)), *[nothing] * 2, np.zeros((n, 4)))


@pytest.mark.slow
def test_the_clone_recovers_a_linear_gaussian_policy():
    rng = np.random.default_rng(0)
    centre, scale = rng.normal(size=45) * 3, np.logspace(-2, 2, 45)
    z, weights, std = rng.normal(size=(12_000, 45)), np.zeros((45, 24)), np.linspace(0.27, 0.5, 24)
    weights[[0, 20, 40]] = rng.normal(size=(3, 24)) * 0.3
    actions = np.tanh(z @ weights) + std * rng.normal(size=(12_000, 24))
    clone = standins.clone_of(played(centre + scale * z, actions), seed=0, steps=700)
    fresh = rng.normal(size=(1000, 45))
    signal = np.tanh(fresh @ weights)
    error = clone.act(centre + scale * fresh) - signal
    assert np.sqrt((error**2).mean()) < 0.25 * signal.std()
    assert (np.abs(error.mean(0)) < 0.03).all()
    np.testing.assert_allclose(clone.std[0], std, rtol=0.2)  # a little overfitted
    assert not any(p.requires_grad for p in clone.parameters())


def test_the_clone_depends_on_its_seed_alone():
    """Not on the global random state, and not on what the machine multiplies fast."""
    demos, before = played(np.ones((50, 45)), np.zeros((50, 24))), torch.get_rng_state()
    first, again, other = (standins.clone_of(demos, seed=s, steps=1) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before) and not first.low
    weights, same, others = (c.net.weights[0] for c in (first, again, other))
    assert torch.equal(weights, same) and not torch.equal(weights, others)


# A collection that is killed


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["expert", "cloned"])
def test_a_killed_collection_goes_on_to_the_same_file(dataset, guide, quick_clone, tmp_path, monkeypatch):
    """After each batch, and while the file is written; no batch is made again, and what is made is what it is in one go."""
    monkeypatch.setattr(standins, "CHUNK", 4)
    monkeypatch.setattr(standins, "HUMAN_EPISODES", 2)
    shorter(monkeypatch, 10)
    demos = standins.human(guide, 0)
    monkeypatch.setattr(standins, "human", lambda *given: demos)
    steps = 110 if dataset == "expert" else 220
    whole = standins.write(dataset, tmp_path / "whole", [guide], steps)
    rolled, rollout, at, done = [], standins.rollout, None, []

    def counted(simulator, act, n, *given, **more):
        if len(rolled) == at:
            raise KeyboardInterrupt
        rolled.append(n)
        return rollout(simulator, act, n, *given, **more)

    def killed(folder, name, batches, text, whole):
        list(batches)
        raise KeyboardInterrupt

    monkeypatch.setattr(standins, "rollout", counted)
    for at in (1, 2):  # noqa: B007 (`counted` uses it)
        with pytest.raises(KeyboardInterrupt):
            standins.write(dataset, tmp_path / "parts", [guide], steps)
    at = None
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(minari_files, "write_minari", killed)
        standins.write(dataset, tmp_path / "parts", [guide], steps)
    place = standins.write(dataset, tmp_path / "parts", [guide], steps, done.append)
    assert rolled == [4, 4, 3] and done == [4 / 11, 8 / 11, 1.0]
    assert minari_files.digest(place) == minari_files.digest(whole)
    assert [f.name for f in (tmp_path / "parts").iterdir()] == ["standin"]


def test_parts_of_another_collection_are_not_used(guide, tmp_path, monkeypatch):
    """Of another seed, another size or another policy."""
    monkeypatch.setattr(standins, "CHUNK", 2)
    shorter(monkeypatch, 3)
    rolled, rollout = [], standins.rollout
    spied = lambda simulator, act, n, *given, **more: rolled.append(n) or rollout(simulator, act, n, *given, **more)  # noqa: E731
    monkeypatch.setattr(standins, "rollout", spied)
    other = load.load_guide(load.DEMONSTRATOR)[0]
    for policy, steps, seed in ((guide, 9, 0), (guide, 9, 1), (guide, 12, 0), (other, 9, 0), (guide, 9, 0)):
        list(standins.expert(policy, steps, seed, tmp_path))
    assert rolled == [2, 1, 2, 1, 2, 2, 1]  # the first batch of the third one is that of the first
