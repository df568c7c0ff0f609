"""What notebooks do with a dataset, each step against numpy.

`outcome` puts a dataset through the library: it is used, with finite and right results, or refused with a ValueError that
names the dataset and the array or the episode at fault.
"""

import warnings
from functools import partial

import numpy as np
import torch
from faulty_data import ARRAYS, made, usable
from tqdm import tqdm

from pgdlib import data, edm, worldmodel
from pgdlib.lab import artifacts, load, models, settings, study
from pgdlib.policies import GaussianPolicy
from pgdlib.simulators import pen


def names_the_fault(error, dataset="toy"):
    """The message is one that a user can act on."""
    words = [*ARRAYS, "lengths", "info.qpos", "episode"]
    return f"'{dataset}'" in str(error) and any(word in str(error) for word in words)


def outcome(lengths, faults, horizon, transform="raw"):
    """Put a dataset with `faults` through all: "refused" or "accepted"; AssertionError for anything else."""
    tensors = made(lengths, faults)
    allowed = usable(tensors)
    try:
        raw = data.Trajectories.from_tensors(tensors, "toy")
    except ValueError as e:
        assert not allowed and names_the_fault(e), e
        return "refused"
    assert allowed, "a dataset that is none is accepted"
    if (raw.spec.obs_dim, raw.spec.action_dim) != (45, 24):
        return "accepted"  # as one of another domain
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy's, of what is not finite
        return used(raw, horizon, transform)


def used(raw, horizon, transform):
    """Everything that notebooks do with the data, against numpy; "accepted" or "refused"."""
    episodes = plain_episodes(raw)
    np.testing.assert_allclose(raw.returns(5), [e["rewards"][:5].sum() for e in episodes], rtol=1e-4, atol=1e-3)
    repaired, cut, dropped = data.end_where(raw, torch.from_numpy(pen.outcome(raw.next_obs.numpy())[2]))
    ended = [until_fall(e) for e in episodes]
    assert (cut, dropped) == (sum(len(a["obs"]) < len(e["obs"]) for a, e in zip(ended, episodes)),
                              sum(len(e["obs"]) - len(a["obs"]) for a, e in zip(ended, episodes)))  # fmt: skip
    assert_equal(plain_episodes(repaired), ended)
    dataset = load.Dataset(repaired, raw, False, artifacts.digest(raw.tensors())[:12], cut, dropped)
    copies = {b"".join(e[k].tobytes() for k in ("obs", "actions", "rewards", "terminals")) for e in ended}
    try:
        train, val = load.train_val(dataset)
    except ValueError as e:
        few = "1 unique episode" if len(copies) < 2 else "1 step to train on"
        assert f"'toy' holds {few}" in str(e) and (len(copies) < 2 or 1 in repaired.lengths.tolist()), e
        return "refused"
    assert len(copies) > 1
    sides = [{key(e) for e in plain_episodes(side)} for side in (train, val)]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == {key(e) for e in ended}

    normaliser = fitted(train, transform)
    for side in (train, val):
        assert_windows(data.Windows(side, normaliser, horizon), side, normaliser, horizon)
    columns = [train.obs, train.actions.clip(-1, 1), train.rewards[:, None], train.terminals[:, None], train.next_obs]
    np.testing.assert_array_equal(train.transitions(), np.concatenate(columns, 1))
    own = dict(horizon=horizon, transform=transform, features=8, blocks=1, train_steps=2, passes=None, batch_size=4)
    p = settings.defaults("ci", **own, samples=4, seed=0, units="natural")
    quiet = partial(tqdm, disable=True)
    try:
        denoiser, losses, _ = models.load_denoiser(dataset, p, torch.device("cpu"), quiet, refuse_to_say)
    except ValueError as e:
        assert horizon > 2 * max(train.lengths.tolist()) and f"horizon={horizon} is not allowed for toy" in str(e), e
        return "refused"
    assert horizon <= 2 * max(train.lengths.tolist()) and len(losses) == 2
    assert torch.equal(denoiser.normaliser.mean, normaliser.mean) and torch.equal(denoiser.normaliser.std, normaliser.std)
    assert_trained(denoiser, losses, train, val, horizon)
    assert_studied(dataset, denoiser, p)
    return "accepted"


def fitted(train, transform):
    """The `Normaliser` of the training side, whose statistics are numpy's."""
    actions = train.actions.numpy()
    if transform == "arctanh":
        actions = np.arctanh(actions.clip(-0.999, 0.999))
    packed = np.concatenate([train.obs, actions, train.rewards[:, None]], 1, dtype=np.float64)
    normaliser = data.Normaliser(train.spec, transform).fit(train.packed())
    std = np.where(packed.std(0) < 1e-6, 1, packed.std(0))
    sure = np.abs(std - 1e-6) > 1e-8  # not where rounding decides
    np.testing.assert_allclose(normaliser.mean[:-1], packed.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(normaliser.std[:-1][sure], std[sure], rtol=1e-4, atol=1e-9)
    assert normaliser.mean[-1] == normaliser.std[-1] == 0.5
    return normaliser


def refuse_to_say(text):
    raise AssertionError(text)


def plain_episodes(trajectories):
    """A dict of numpy arrays for each episode."""
    ends = np.cumsum(trajectories.lengths.numpy())
    arrays = {k: v.numpy() for k, v in trajectories.tensors().items() if k != "lengths"}
    return [{k: v[a:b] for k, v in arrays.items()} for a, b in zip([0, *ends[:-1]], ends)]


def key(episode):
    return b"".join(episode[k].tobytes() for k in ARRAYS)


def until_fall(episode):
    """An episode up to its first fall, which alone is terminal."""
    fallen = episode["next_obs"][:, 26] < np.float32(0.075)
    n = int(fallen.argmax()) + 1 if fallen.any() else len(fallen)
    return {**{k: v[:n] for k, v in episode.items()}, "terminals": fallen[:n].astype(np.float32)}


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def assert_windows(windows, side, normaliser, horizon):
    """Windows lie within one episode, half a window at most beyond the end of one that fell; all are normalised steps."""
    mean, std = normaliser.mean.numpy(), normaliser.std.numpy()
    x, mask = (v.numpy() for v in windows[torch.arange(len(windows))])
    expected_x, expected_mask = [], []
    for e in plain_episodes(side):
        actions = e["actions"]
        if normaliser.transform == "arctanh":
            actions = np.arctanh(actions.clip(-0.999, 0.999))
        steps = np.concatenate([e["obs"], actions, e["rewards"][:, None], e["terminals"][:, None]], 1)
        n, beyond = len(steps), horizon // 2 if e["terminals"][-1] else 0
        for first in range(max(1, n - horizon + 1 + beyond)):
            places = np.arange(first, first + horizon)
            expected_x.append((steps[places.clip(max=n - 1)] - mean) / std)
            expected_mask.append(places < n)
    assert np.isfinite(x).all()
    np.testing.assert_array_equal(mask, np.array(expected_mask, np.float32))
    np.testing.assert_allclose(x, np.array(expected_x), rtol=1e-3, atol=1e-3 * max(1, np.abs(mean / std).max() * 1e-3))


def assert_trained(denoiser, losses, train, val, horizon):
    """Two steps of the denoiser and of a world model leave finite losses and weights."""
    windows = data.Windows(val, denoiser.normaliser, horizon)
    validation = edm.validation_loss(denoiser, windows, torch.tensor([0.01, 1.0, 30.0]), 4, 0)
    ensemble = worldmodel.Ensemble(45, 24, 3, 2, (8, 8))
    training = worldmodel.Training(ensemble, train, val, worldmodel.Recipe(2, 8, weight_decay=(0.0,) * 3))
    assert list(training) == [1, 2]
    for tensor in (losses, validation, training.losses, *denoiser.state_dict().values(), *ensemble.state_dict().values()):
        assert tensor.isfinite().all()
    assert (ensemble.std > 0).all() and len(set(ensemble.elites.tolist())) == 2


def assert_studied(dataset, denoiser, p):
    """Notebook 04's windows of real data; each has its measures, of its own steps, or is counted as unjudged."""
    generators = [torch.Generator().manual_seed(0)]
    policy = GaussianPolicy(45, 24, [8], generators=generators).requires_grad_(False)
    lab = study.Study(dataset, denoiser, policy, p)
    windows = data.Windows(lab.val, lab.normaliser, p.horizon)
    x, mask = windows[torch.randint(len(windows), (4,), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(lab.windows(lab.val, 4, 0)[0], x)
    measures, steps = lab.real, lab.normaliser.denormalise(x)
    assert np.isfinite(lab.variance).all() and (lab.variance > 0).all()
    own = policy.log_prob(steps[..., :45], steps[..., 45:69]).double().numpy() / 24
    for i, n in enumerate(mask.sum(1).int().tolist()):
        np.testing.assert_allclose(measures["log_likelihood"][i], own[i, :n].mean(), rtol=1e-5)
        if n < 2:
            assert np.isnan(measures["motion"][i])
        else:
            obs = steps[i, :n, :45].double().numpy()
            np.testing.assert_allclose(measures["motion"][i], ((obs[1:] - obs[:-1]) ** 2 / lab.variance).mean(), rtol=1e-5)
