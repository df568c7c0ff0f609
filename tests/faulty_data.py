"""Datasets with faults, drawn by hypothesis; `usable` restates what a dataset must be, in numpy."""

import copy

import numpy as np
import torch
from conftest import toy
from hypothesis import strategies as st

ARRAYS = ("obs", "actions", "rewards", "terminals", "next_obs")
LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=5)
MOST = 1e6
HORIZONS = st.integers(2, 30)


def put(tensors, key, value, place):
    tensors[key].view(-1)[place % tensors[key].numel()] = value


def constant(tensors, key, value, place):
    """A dimension that never changes, or the whole array."""
    width = tensors[key][0].numel()
    tensors[key].view(-1, width)[:, slice(None) if place % 2 else place % width] = value


def falls(tensors, key, value, place):
    tensors["next_obs"][place % len(tensors["next_obs"]) :: 1 + place % 7, 26] = 0.0749


def actions_out_of_range(tensors, key, value, place):
    tensors["actions"] *= 1 + place % 100


def copies(tensors, key, value, place):
    """All episodes alike, of the first one's length."""
    n, lengths = int(tensors["lengths"][0]), tensors["lengths"]
    steps = torch.arange(n).repeat(len(lengths))
    tensors.update({k: v[steps] for k, v in tensors.items() if k != "lengths"}, lengths=torch.full_like(lengths, n))


def reshaped(tensors, key, value, place):
    t = tensors[key]
    odd = [
        t[:-1],
        torch.cat([t, t[:1]]),
        t[..., None],
        t.flatten()[0],
        t.mT if t.ndim > 1 else t[:0],
        t[None],
        t[:, :-1] if t.ndim > 1 else t[:, None],
    ]
    tensors[key] = odd[place % len(odd)]


def another_kind(tensors, key, value, place):
    t = tensors[key]
    t = t.real if t.is_complex() else t
    types = (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool)
    odd = [*(t.to(kind) for kind in types), torch.zeros(t.shape, dtype=torch.complex64), t.numpy(), t.tolist(), None]
    tensors[key] = odd[place % len(odd)]


def other_lengths(tensors, key, value, place):
    n, lengths = len(tensors["rewards"]), tensors["lengths"]
    zero = torch.zeros(1, dtype=torch.int64)
    huge = torch.tensor([2**63 - 1, 2**63 - 1, n + 2])  # their sum, in 64 bits, is n
    odd = [torch.cat([lengths, zero]), torch.cat([zero, lengths]), torch.tensor([n + 3, -3]), lengths + 1, lengths.float()]
    odd += [huge, lengths[None], lengths[:0], torch.tensor(n), torch.tensor([n])]
    tensors["lengths"] = odd[place % len(odd)]


HARMLESS = st.one_of(
    st.tuples(st.just(put), st.sampled_from(ARRAYS), st.sampled_from([-1e6, 1e-40, 0.0, 1.0])),
    st.tuples(st.just(constant), st.sampled_from(ARRAYS), st.sampled_from([0.0, 1 / 3, 1.0, -1e6, 1e-7])),
    st.tuples(st.sampled_from([falls, actions_out_of_range, copies]), st.none(), st.none()),
)  # but for terminals, which are 0 or 1
FAULTS = st.one_of(
    HARMLESS,
    st.tuples(st.just(put), st.sampled_from(ARRAYS), st.sampled_from([np.nan, np.inf, -np.inf, 3e38, 2e6])),
    st.tuples(st.just(put), st.just("terminals"), st.sampled_from([0.5, 2.0, -1.0])),
    st.tuples(st.sampled_from([reshaped, another_kind]), st.sampled_from([*ARRAYS, "info.qpos"]), st.none()),
    st.tuples(st.just(other_lengths), st.none(), st.none()),
)
PLACES = st.integers(0, 10_000)
SOME_FAULTS = st.lists(st.tuples(HARMLESS, PLACES), max_size=3) | st.lists(st.tuples(FAULTS, PLACES), max_size=3)


def made(lengths, faults):
    """Tensors of random episodes with `faults`, those that can still be put in after the ones before."""
    base = toy(lengths, info={"qpos": torch.zeros(sum(lengths), 30)})
    tensors = {k: v.clone() for k, v in base.tensors().items()}
    for (fault, key, value), place in faults:
        before = copy.deepcopy(tensors)
        try:
            fault(tensors, key, value, place)
        except (AttributeError, TypeError, IndexError, RuntimeError, ValueError, ZeroDivisionError):
            tensors = before
    return tensors


def usable(tensors):
    """Whether tensors are a dataset, in plain numpy."""
    if not all(isinstance(v, torch.Tensor) for v in tensors.values()):
        return False
    kinds = {k: str(v.dtype) for k, v in tensors.items()}
    lengths = tensors["lengths"].tolist()
    if kinds.pop("lengths") != "torch.int64" or set(kinds.values()) != {"torch.float32"}:
        return False
    if not isinstance(lengths, list) or not lengths or not all(isinstance(n, int) and n > 0 for n in lengths):
        return False
    arrays = {k: v.numpy() for k, v in tensors.items() if k != "lengths"}
    if not all(a.ndim and len(a) == sum(lengths) and (np.abs(a) <= MOST).all() for a in arrays.values()):  # NaN is not
        return False
    steps = {k: a.shape[1:] for k, a in arrays.items()}
    both = (steps["obs"], steps["actions"])
    if not all(len(step) == 1 and step[0] > 0 for step in both) or steps["next_obs"] != steps["obs"]:
        return False
    return steps["rewards"] == steps["terminals"] == () and bool(np.isin(arrays["terminals"], [0, 1]).all())
