"""A small study, and the explorer over two of its sweeps: what the tests of the explorer share, fixtures and all.

Its denoiser recalls real trajectories, so that they have errors; its λ = 2.5 lies beyond the limit, where some have none.
"""

import functools
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import kept, wait_for
from torch import nn

from pgdlib import data
from pgdlib.lab import load, settings, study
from pgdlib.lab.explorer import panel, views, widgets
from pgdlib.simulators import pen as adroit

LAMS, SMOOTHED = [0.5, 1.0, 2.5], [0.5]  # the sweeps of two rules, in these tests
SWEEPS = {"explicit": LAMS, "smoothed": SMOOTHED}


class Recalling(nn.Module):
    """The denoiser of narrow Gaussians, of std 0.01, around the normalised `windows` [n, T, 71]: near real trajectories."""

    def __init__(self, windows, normaliser):
        super().__init__()
        self.normaliser, self.spec = normaliser, normaliser.spec
        self.register_buffer("windows", windows)

    def forward(self, x, sigma):
        noise, own = torch.as_tensor(sigma, dtype=x.dtype) ** 2, 1e-4
        away = (x[:, None] - self.windows).square().sum((2, 3))
        centre = torch.einsum("bw,wtc->btc", (-away / 2 / (noise + own)).softmax(1), self.windows)
        return (own * x + noise * centre) / (own + noise)


@functools.cache
def parts():
    """(dataset, denoiser, guide) of six real episodes of the guide."""
    guide = load.load_guide()[0]
    act = functools.partial(guide.act, generator=torch.Generator().manual_seed(0))
    made = adroit.rollout(act, 6, np.random.default_rng(0), 40, threads=1)
    columns = made.obs[:, :-1], made.actions.clip(-1, 1), made.rewards, np.zeros((6, 40)), made.obs[:, 1:]
    columns = (torch.tensor(x, dtype=torch.float32).flatten(0, 1) for x in columns)
    episodes = data.Trajectories(*columns, torch.full((6,), 40), "stand-in pen-human")
    dataset = load.Dataset(episodes, episodes, False, "toy-1", 0, 0)
    train, _ = load.train_val(dataset)
    normaliser = data.Normaliser(train.spec).fit(train.packed())
    windows = data.Windows(train, normaliser, 8)
    return dataset, Recalling(windows[torch.arange(len(windows))][0], normaliser), guide


def a_lab(episodes=None, denoiser=None, policy=None, **changes):
    """A small study; `changes` are settings."""
    own = dict(dataset="human", source="local", guide="shipped", device="cpu", transform="raw", seed=0, units="natural")
    own |= dict(horizon=8, steps=4, samples=6, data_steps=500, train_steps=3, features=8, batch_size=4)
    p = settings.defaults("ci", **{k: v for k, v in own.items() if k not in settings.SETTINGS})
    vars(p).update(own | changes)
    given = (episodes, denoiser, policy)
    return study.Study(*(mine or theirs for mine, theirs in zip(given, parts())), p)


def another_model():
    """The small study with another denoiser."""
    return a_lab(denoiser=Recalling(0.9 * parts()[1].windows, parts()[1].normaliser))


@functools.cache
def the_lab():
    """One study for many tests, which leave it as it is."""
    return a_lab()


def plain(iterable, **_):
    """A bar that shows nothing."""
    return iterable


def counted(monkeypatch, lab):
    """The λ that are drawn from now on."""
    drawn, draw = [], lab.draw
    monkeypatch.setattr(lab, "draw", lambda rule, lam, *a, **k: drawn.append(lam) or draw(rule, lam, *a, **k))
    return drawn


@functools.cache
def sweep_files():
    """The files of its two sweeps, path -> content."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGD_RUNS", folder)
        for rule, lams in SWEEPS.items():
            the_lab().sweep(rule, lams, plain)
        return {name: Path(folder, name).read_bytes() for name in kept(Path(folder))}


@pytest.fixture
def swept(runs):
    """The study, its sweeps in runs/."""
    for name, content in sweep_files().items():
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        (runs / name).write_bytes(content)
    return the_lab()


@pytest.fixture(autouse=True)
def nothing_fails_unseen(tmp_path, monkeypatch, caplog, runs):
    """ipywidgets only logs what callbacks raise; MuJoCo logs its warnings in the working folder. No thread is left."""
    monkeypatch.chdir(tmp_path)
    before = set(threading.enumerate())
    yield
    assert not [r.getMessage() for r in caplog.get_records("call") if "Exception in callback" in r.getMessage()]
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith("hand"):  # whose thread lives as long as the process
            thread.join(10)
            assert not thread.is_alive()


def words(name, view):
    """What a picture would show."""
    sweep = view.sweep
    shown = sweep.label, sweep.rule, list(sweep.points), view.lam, view.estimator, view.picked, sweep.calibrated, sweep.limit
    return f"{name}: {shown}, {float(view.here.x.sum())}".encode()


@pytest.fixture
def sketched(monkeypatch):
    """Pictures that are words."""
    for name in ("cloud", "curve"):
        monkeypatch.setattr(views, name, functools.partial(words, name))
    monkeypatch.setattr(widgets, "png", lambda picture: picture)


@pytest.fixture
def is_live(monkeypatch):
    """As if a front end ran widgets."""
    monkeypatch.setattr(widgets, "live", lambda: True)


@pytest.fixture
def explorer(swept):
    """An explorer over two sweeps."""
    return panel.Explorer(swept, SWEEPS, {"explicit": 0.9})


def finish(explorer):
    """Until its job has ended."""
    wait_for(lambda: not explorer._job.busy, 30)


def sample(explorer, lam):
    """Sample at λ, as one would, to the end."""
    explorer._number.value = lam
    explorer._now.click()
    finish(explorer)
