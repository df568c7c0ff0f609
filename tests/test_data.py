"""Offline data against plain loops."""

import math

import numpy as np
import pytest
import torch
from conftest import SPEC, toy

from pgdlib import data


def spans(trajectories):
    """(start, end) of each episode."""
    ends = np.cumsum(trajectories.lengths.tolist()).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


# Trajectories


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"obs": torch.zeros(7, 39)}, "a step of next_obs is .45,.; needed is .39"),
        ({"actions": torch.zeros(7, 0)}, "actions is torch.float32 of shape"),
        ({"next_obs": torch.zeros(7, 39)}, "39"),
        ({"rewards": torch.zeros(7, 1)}, "rewards"),
        ({"actions": torch.zeros(8, 24)}, "actions has 8 steps, the episodes together 7"),
        ({"rewards": torch.zeros(6)}, "rewards has 6 steps"),
        ({"lengths": torch.tensor([3, 3])}, "has 7 steps, the episodes together 6"),
        ({"lengths": torch.tensor([3, 0, 4])}, "an empty one"),
        ({"lengths": torch.tensor([-1, 8])}, "an empty one"),
        ({"info": {"qpos": torch.zeros(8, 30)}}, "info.qpos has 8 steps"),
        ({"info": {"qvel": torch.full((7, 30), math.nan)}}, "info.qvel"),
        ({"lengths": torch.tensor([3.0, 4.0])}, "lengths is torch.float32.*needed is a tensor of torch.int64"),
        ({"lengths": torch.tensor([[3, 4]])}, "lengths is torch.int64 of shape"),
        ({"lengths": torch.tensor([2**63 - 1, 2**63 - 1, 9])}, "obs has 7 steps, the episodes together 18446744073709551623"),
        ({"obs": torch.zeros(7, 45, dtype=torch.float64)}, "obs is torch.float64 of shape"),
        ({"rewards": np.zeros(7, np.float32)}, "rewards is a ndarray"),
        ({"rewards": torch.tensor(1.0)}, "rewards is torch.float32 of shape"),
        ({"terminals": torch.tensor([0, 0, 0, 0, 0, 0.5, 0])}, "terminals must be 0 or 1; it is 0.5 in step 2 of episode 1"),
        ({"actions": torch.full((7, 24), 1.1e6)}, "actions .*beyond ±1e.06, first in step 0 of episode 0"),
        ({k: v[:0] for k, v in toy([1]).tensors().items()}, "holds no episode"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes, reason):
    with pytest.raises(ValueError, match=f"dataset 'toy'.*{reason}"):
        toy([3, 4], **changes)


@pytest.mark.parametrize("key", ["obs", "actions", "rewards", "terminals", "next_obs"])
def test_values_that_are_not_finite_are_refused(key):
    for value in (math.nan, math.inf, -math.inf):
        tensor = getattr(toy([3, 4]), key)
        tensor.view(-1)[-1] = value
        with pytest.raises(ValueError, match=f"'toy'.*{key}.*not finite"):
            toy([3, 4], **{key: tensor})


def test_tensors_and_back():
    mine = toy([3, 4], info={"qpos": torch.rand(7, 30)})
    back = data.Trajectories.from_tensors(mine.tensors(), "toy")
    assert back.name == "toy" and back.info.keys() == {"qpos"}
    assert all(torch.equal(v, back.tensors()[k]) for k, v in mine.tensors().items())


def test_episodes_starts_and_returns_against_a_loop():
    mine = toy([5, 1, 120, 100, 7], info={"qpos": torch.rand(233, 30)})
    assert mine.starts.tolist() == [start for start, _ in spans(mine)]
    for horizon in (1, 7, 100, 1000):
        expected = [sum(mine.rewards[s:e][:horizon].tolist()) for s, e in spans(mine)]
        np.testing.assert_allclose(mine.returns(horizon), expected, atol=1e-4)
    picked, order = mine.episodes(torch.tensor([3, 1, 1])), [3, 1, 1]
    assert picked.name == "toy" and picked.tensors().keys() == mine.tensors().keys()
    for key, tensor in mine.tensors().items():
        if key != "lengths":
            assert torch.equal(picked.tensors()[key], torch.cat([tensor[slice(*spans(mine)[i])] for i in order])), key
    assert picked.lengths.tolist() == [100, 1, 1]


def test_packed_channels():
    packed = toy([2, 3]).packed()
    mine = toy([2, 3])
    assert packed.shape == (5, SPEC.width) == (5, 71)
    parts = (packed[:, SPEC.obs], packed[:, SPEC.actions], packed[:, SPEC.reward], packed[:, SPEC.terminal])
    for part, expected in zip(parts, (mine.obs, mine.actions, mine.rewards, mine.terminals), strict=True):
        assert torch.equal(part, expected)


def test_ends_against_a_loop():
    rng = np.random.default_rng(0)
    mine = toy(rng.integers(1, 30, 60).tolist())
    falls = torch.from_numpy(rng.random(len(mine.rewards)) < 0.04)
    mine.next_obs[falls, 26] = 0.0749
    mine.terminals[::7] = 1.0  # whatever the file says of ends does not count
    keep, lengths, ends = [], [], []
    for start, end in spans(mine):
        steps = []
        for t in range(start, end):
            steps.append(t)
            if mine.next_obs[t, 26] < 0.075:
                break
        keep, lengths = keep + steps, [*lengths, len(steps)]
        ends += [0.0] * (len(steps) - 1) + [float(mine.next_obs[steps[-1], 26] < 0.075)]
    repaired, cut, dropped = data.end_where(mine, mine.next_obs[:, 26] < 0.075)
    assert repaired.lengths.tolist() == lengths and repaired.terminals.tolist() == ends
    for key in ("obs", "actions", "rewards", "next_obs"):
        assert torch.equal(getattr(repaired, key), getattr(mine, key)[keep]), key
    assert dropped == len(mine.rewards) - len(keep) > 0
    assert cut == sum(a < b for a, b in zip(lengths, mine.lengths.tolist())) > 0
    assert sum(ends) > cut  # some fell on their last step: nothing to cut there
    again, cut, dropped = data.end_where(repaired, repaired.next_obs[:, 26] < 0.075)
    assert (cut, dropped) == (0, 0) and torch.equal(again.packed(), repaired.packed())


def fingerprints(trajectories):
    return [trajectories.packed()[s:e].numpy().tobytes() for s, e in spans(trajectories)]


def test_split_keeps_copies_on_one_side():
    unique = toy([10] * 12)
    copied = unique.episodes(torch.arange(12).repeat(5)[torch.randperm(60, generator=torch.Generator().manual_seed(0))])
    sides = set()
    for seed in range(8):
        train, val = (fingerprints(side) for side in data.split(copied, 0.25, seed))
        assert not set(train) & set(val)
        assert sorted(train + val) == sorted(fingerprints(copied))
        assert len(set(val)) == 3 and len(val) == 15
        assert [fingerprints(side) for side in data.split(copied, 0.25, seed)] == [train, val]
        sides.add(frozenset(val))
    assert len(sides) > 4


def test_split_of_few_episodes():
    for fraction, sizes in ((0.0, (2, 1)), (1.0, (1, 2)), (0.1, (2, 1))):  # no side is ever empty
        assert tuple(len(side.lengths) for side in data.split(toy([4, 5, 6]), fraction, 0)) == sizes
    one = toy([4]).episodes(torch.tensor([0, 0, 0]))
    with pytest.raises(ValueError, match="'toy' holds 1 unique episode"):
        data.split(one, 0.1, 0)
    with pytest.raises(ValueError, match="'toy' holds 1 step to train on"):
        data.split(toy([1, 1]), 0.1, 0)


# Normaliser


@pytest.mark.parametrize("transform", ["raw", "arctanh"])
def test_normaliser_there_and_back(transform):
    packed = toy([400]).packed()
    packed[:, 3] = 7.5  # never changes
    packed[:, 10] *= 100
    packed[5, SPEC.terminal] = 1
    packed[:, SPEC.actions] *= 0.99
    normaliser = data.Normaliser(SPEC, transform).fit(packed)
    x = normaliser.normalise(packed)
    np.testing.assert_allclose(x[:, :-1].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(np.delete(x[:, :-1].std(0, unbiased=False).numpy(), 3), 1, atol=1e-3)
    assert (x[:, 3] == 0).all() and x.isfinite().all()
    assert x[:, SPEC.terminal].unique().tolist() == [-1, 1]
    torch.testing.assert_close(normaliser.denormalise(x), packed, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(normaliser.obs(x), packed[:, :45], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(normaliser.actions(x), packed[:, 45:69], atol=1e-5, rtol=1e-4)
    expected = torch.atanh(packed[:, 45]) if transform == "arctanh" else packed[:, 45]
    torch.testing.assert_close(x[:, 45], (expected - expected.mean()) / expected.std(unbiased=False), atol=1e-4, rtol=1e-4)


def test_actions_at_the_limits_stay_finite_under_arctanh():
    packed = toy([50]).packed()
    packed[:25, SPEC.actions], packed[25:, SPEC.actions] = 1.0, -1.0
    normaliser = data.Normaliser(SPEC, "arctanh").fit(packed)
    x = normaliser.normalise(packed)
    assert x.isfinite().all()
    torch.testing.assert_close(normaliser.actions(x), packed[:, SPEC.actions], atol=2e-3, rtol=0)


def test_statistics_travel_with_the_weights():
    normaliser = data.Normaliser(SPEC, "arctanh").fit(toy([50]).packed())
    assert normaliser.state_dict().keys() == {"mean", "std"} and not list(normaliser.parameters())
    other = data.Normaliser(SPEC, "arctanh")
    other.load_state_dict(normaliser.state_dict())
    assert torch.equal(other.normalise(toy([9]).packed()), normaliser.normalise(toy([9]).packed()))
    with pytest.raises(ValueError, match=r"transform='tanh'.*'raw' or 'arctanh'"):
        data.Normaliser(SPEC, "tanh")


@pytest.mark.parametrize("transform", ["raw", "arctanh"])
def test_action_slope_is_the_derivative(transform):
    normaliser = data.Normaliser(SPEC, transform).fit(toy([50]).packed()).double()
    x, h = torch.randn(4, 5, 71, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 1e-6
    numeric = (normaliser.actions(x + h) - normaliser.actions(x - h)) / (2 * h)
    torch.testing.assert_close(normaliser.action_slope(x), numeric, rtol=1e-7, atol=1e-9)


# Windows


@pytest.mark.parametrize("horizon", [2, 5, 8])
def test_windows_stay_within_their_episode(horizon):
    """One window of a short episode; of one that ends by a fall, some that reach up to half a window beyond its end."""
    lengths, falls = [5, 1, 20, 4, 8, 7, 19, 5], [3, 6]
    mine = toy(lengths)
    mine.terminals[[spans(mine)[e][1] - 1 for e in falls]] = 1
    mine.obs[:, 0] = torch.repeat_interleave(torch.arange(8.0), mine.lengths)
    mine.obs[:, 1] = torch.cat([torch.arange(float(n)) for n in lengths])
    windows = data.Windows(mine, data.Normaliser(SPEC), horizon)  # not fitted: changes nothing
    x, mask = windows[torch.arange(len(windows))]
    assert x.shape == (len(windows), horizon, 71) and mask.shape == x.shape[:2]
    episode, step = x[..., 0], x[..., 1]
    assert (episode == episode[:, :1]).all()
    last = [n - horizon + (horizon // 2 if e in falls else 0) for e, n in enumerate(lengths)]
    expected = {(e, first) for e in range(8) for first in range(max(0, last[e]) + 1)}
    assert [(int(e), int(s)) for e, s in zip(episode[:, 0], step[:, 0])] == sorted(expected)
    for w in range(len(windows)):
        n = lengths[int(episode[w, 0])]
        assert step[w].tolist() == [min(float(step[w, 0]) + k, n - 1) for k in range(horizon)]
        assert mask[w].tolist() == [float(step[w, 0] + k < n) for k in range(horizon)]
    seen = {(int(e), int(s)) for e, s in zip(episode[mask > 0], step[mask > 0])}
    assert seen == {(e, s) for e, n in enumerate(lengths) for s in range(n)}


def test_windows_are_normalised_and_a_horizon_of_one_is_refused():
    mine = toy([9, 9])
    normaliser = data.Normaliser(SPEC, "arctanh").fit(mine.packed())
    x, _ = data.Windows(mine, normaliser, 3)[torch.tensor([8])]  # seven windows of the first episode, then one step on
    assert torch.equal(x[0], normaliser.normalise(mine.packed())[10:13])
    with pytest.raises(ValueError, match="horizon=1 is not allowed"):
        data.Windows(mine, normaliser, 1)
