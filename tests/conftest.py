"""Every test process uses one thread for tensors: tests run side by side, and results must not depend on the machine.

Here is also what test files share: actions to play, random data, real episodes, the shipped guide and its rollouts, and what
is to be seen in figures.
"""

import gc
import json
import math
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import gymnasium
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from safetensors import safe_open
from stable_baselines3 import PPO
from torch import nn

import pgdlib
from pgdlib import data, edm
from pgdlib.policies import GaussianPolicy
from pgdlib.simulators import pen as adroit

matplotlib.use("agg")
# A child that collects a simulation as garbage would wait for its threads, which are not in it.
os.register_at_fork(before=gc.disable, after_in_parent=gc.enable)
sys.modules["rfc3987_syntax"] = None  # jsonschema's optional check of web addresses, which takes 3 s to import
torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
SPEC = data.Spec(45, 24)  # of Adroit Pen
SMALL = data.Spec(7, 3)  # of another environment


def white(rng, n, steps):
    """Independent actions, a third of them out of range: most pens fall."""
    return rng.uniform(-1.5, 1.5, (n, steps, 24))


def smooth(rng, n, steps, scale=0.8, memory=0.98):
    """Slowly wandering actions, out of range at times: the pen stays in the hand for long and turns both ways."""
    out = [rng.normal(size=(n, 24))]
    for _ in range(steps - 1):
        out.append(memory * out[-1] + np.sqrt(1 - memory**2) * rng.normal(size=(n, 24)))
    return scale * np.stack(out, 1)


def still(rng, n, steps):
    """No action at all: the pen stays in the hand."""
    return np.zeros((n, steps, 24))


def shorter(patch, steps):
    """Pen's episodes, with so many steps."""
    patch.setattr(adroit, "PEN", replace(adroit.PEN, horizon=steps))


def at(targets):
    """The states in which pen's episodes with these targets begin."""
    return *adroit.start(len(targets), np.random.default_rng(0))[:2], targets


def replay(actions):
    """A policy that ignores the observation and plays `actions` [n, T, 24] in order."""
    steps = iter(actions.swapaxes(0, 1))
    return lambda obs: next(steps)


def pairs(episodes, n=8, steps=60, first=0):
    """obs [n, steps, 45] and actions [n, steps, 24] of real episodes, from step `first` on."""
    return tuple(x[:n, first : first + steps].copy() for x in (episodes.obs, episodes.actions))


def draw(seed, *shape, dtype=torch.float32):
    """Independent N(0, 1)."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_same(found, expected):
    """Tensors by the same names, equal bit for bit, NaN in the same places."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


def assert_goes_on(whole, fresh, at):
    """From the state that the training `whole` has after step `at`, `fresh` goes on to the same bits."""
    live = whole.state()
    for step in whole:
        if step == at:
            saved = {name: tensor.clone() for name, tensor in live.items()}
    assert_same(live, whole.state())
    for name, tensor in fresh.state().items():
        tensor.copy_(saved[name])
    fresh.step = at
    torch.manual_seed(99)
    assert list(fresh) == list(range(at + 1, whole.steps + 1)) and not torch.equal(saved["losses"], whole.losses)
    assert_same(fresh.state(), whole.state())


def on(rounds, until=math.inf):
    """Go on with the rounds up to step `until`."""
    for now in rounds:
        for step in rounds.learner.train(now.data, now.end):
            if step == until:
                return rounds
    return rounds


def toy(episodes, seed=0, spec=SPEC, **changes):
    """Random `Trajectories` with `episodes` of such lengths; `changes` replaces tensors. Those of the pen do not fall."""
    n, generator = sum(episodes), torch.Generator().manual_seed(seed)
    obs, actions, rewards, next_obs = (
        torch.randn(n, *shape, generator=generator) for shape in ((spec.obs_dim,), (spec.action_dim,), (), (spec.obs_dim,))
    )
    if spec == SPEC:
        next_obs[:, 26] = 0.075 + 0.1 * torch.randn(n, generator=generator).abs()
    tensors = dict(obs=obs, actions=actions.tanh(), rewards=rewards, terminals=torch.zeros(n), next_obs=next_obs)
    return data.Trajectories(**{**tensors, "lengths": torch.tensor(episodes), "name": "toy", **changes})


def a_policy(spec=SPEC, runs=1, seed=0, hidden=(16,), scale=1.0, **how):
    """Small random policies in float64 that differ in all that is their own: weights, and stds from 0.22 to 1 times `scale`."""
    generator = torch.Generator().manual_seed(seed)
    policy = GaussianPolicy(spec.obs_dim, spec.action_dim, hidden, **how, generators=[generator] * runs).double()
    with torch.no_grad():
        for parameter in policy.net.parameters():
            parameter.normal_(std=0.3, generator=generator)
        policy.log_std.uniform_(-1.5, 0.0, generator=generator).add_(math.log(scale))
        policy.obs_mean.normal_(generator=generator)
        policy.obs_std.uniform_(0.5, 2.0, generator=generator)
    return policy


def a_denoiser(spec=SMALL, horizon=8, blocks=2, transform="raw"):
    """A small U-Net with random weights, normalised by random data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = edm.Denoiser(spec.obs_dim, spec.action_dim, horizon, 8, blocks, transform=transform)
    made.normaliser.fit(toy([40], spec=spec).packed())
    return made


class Ideal(nn.Module):
    """The denoiser of independent N(0, 1), normalised."""

    def __init__(self, spec=SPEC, horizon=10, transform="raw"):
        super().__init__()
        self.spec, self.horizon = spec, horizon
        self.normaliser = data.Normaliser(spec, transform).fit(toy([40], spec=spec).packed())

    def forward(self, x, sigma):
        return x / (1 + torch.as_tensor(sigma, dtype=x.dtype) ** 2)


def random_batch(runs=3, n=32, seed=0, spec=SPEC):
    """Random transitions [R, n, ...] in float64, a third of them terminal."""
    x = draw(seed, runs, n, spec.transition_width, dtype=torch.float64)
    x[..., spec.actions].clamp_(-1, 1)
    x[..., spec.terminal] = (x[..., spec.terminal] > 0.43).double()
    return x


def scales(spec):
    """A mean and a std of observations, other ones in every dimension."""
    return torch.linspace(-1, 1, spec.obs_dim), torch.linspace(0.5, 2, spec.obs_dim)


def plain_network(mlp, i, *after, activation=nn.ReLU):
    """Network `i` of a `StackedMLP` as torch's own layers, with parameters of their own."""
    layers = []
    for weight, bias in zip(mlp.weights, mlp.biases):
        linear = nn.Linear(*weight.shape[1:], dtype=weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(weight[i].T)
            linear.bias.copy_(bias[i, 0])
        layers += [activation(), linear]
    return nn.Sequential(*layers[1:], *after)


def sb3_zip(path, obs_dim=45, action_dim=24, algorithm=PPO, **how):
    """An untrained Stable-Baselines3 model for such observations and actions, saved at `path`."""

    class Nothing(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        action_space = gymnasium.spaces.Box(-1, 1, (action_dim,), np.float32)

    how = how or dict(n_steps=8, batch_size=8)
    model = algorithm("MlpPolicy", Nothing(), device="cpu", **how)
    model.save(path)
    return model


def kept(folder):
    """All files in a folder and below that a run made, but for lock files and notes of use."""
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.suffix not in (".lock", ".used"))


def cut(path):
    """Leave half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


TITLE = "on stand-in pen-toy"


def drawn(figures, name, *arguments, **named):
    """The figure that the module `figures` makes, rendered: what cannot be drawn fails here."""
    fig = getattr(figures, name)(*arguments, title=TITLE, **named)
    assert isinstance(fig, matplotlib.figure.Figure)
    FigureCanvasAgg(fig).draw()  # of a figure without pyplot, `fig.canvas` draws nothing
    return fig


def assert_labelled(fig, labels):
    """The figure has its title, and x labels that begin with `labels`, as many and in their order."""
    assert TITLE in texts(fig)
    found = [ax.get_xlabel() for ax in fig.axes if ax.get_xlabel()]
    assert len(found) == len(labels) and all(f.startswith(expected) for f, expected in zip(found, labels)), found


def texts(fig):
    """All texts of a figure."""
    return [t.get_text() for t in fig.findobj(matplotlib.text.Text)]


def line(ax, label):
    """[n, 2]: the points of the one line that has this label."""
    (found,) = [ln for ln in ax.get_lines() if ln.get_label() == label]
    return found.get_xydata()


@pytest.fixture
def style():
    """The style of all figures; none is left open."""
    from pgdlib.lab import figures

    figures.style.use_style()
    yield
    plt.close("all")
    plt.rcdefaults()


@pytest.fixture(scope="session", params=[white, smooth], ids=["white", "smooth"])
def real(request):
    """Sixteen native episodes of one kind of actions, for the reconstruction."""
    rng = np.random.default_rng(2)
    return adroit.rollout(replay(request.param(rng, 16, 200)), 16, rng)


@pytest.fixture(scope="session")
def guide():
    """The shipped guide, whichever it is."""
    with safe_open(Path(pgdlib.__file__).parent / "assets" / "ppo_pen.safetensors", "pt") as f:
        policy = GaussianPolicy(**json.loads(f.metadata()["card"])["config"]).requires_grad_(False)
        policy.load_state_dict({k: f.get_tensor(k) for k in f.keys()})  # noqa: SIM118 (not a dict)
    return policy


@pytest.fixture(scope="session", params=["sampled", "mean"])
def guided(request, guide):
    """Sixteen D4RL-scale episodes of the shipped guide, acting by samples or by its mean."""
    generator = torch.Generator().manual_seed(0) if request.param == "sampled" else None
    return adroit.rollout(partial(guide.act, generator=generator), 16, np.random.default_rng(0), adroit.D4RL_HORIZON)


@pytest.fixture(scope="session")
def quiet():
    """Four trajectories of 40 steps, the pen at rest in the hand: obs and actions, not to be changed."""
    rng = np.random.default_rng(0)
    actions = 0.1 * rng.normal(size=(4, 24))
    return pairs(adroit.rollout(lambda obs: actions, 4, rng, 40), 4, 40)


@pytest.fixture(scope="session")
def minari_file(tmp_path_factory):
    """The folder of a Minari dataset of three episodes of six steps; not to be changed."""
    from pgdlib.lab import minari_files

    rng = np.random.default_rng(0)
    episodes = adroit.rollout(replay(white(rng, 3, 6)), 3, rng, 6)
    return minari_files.write_minari(tmp_path_factory.mktemp("minari"), "standin/pen/toy-v0", [episodes], "a toy")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """(a wheel of the package, the folder that it was built from)"""
    tmp_path = tmp_path_factory.mktemp("wheel")
    source = tmp_path / "source"  # of the files alone: what an earlier build has left does not count
    shutil.copytree(ROOT / "pgdlib", source / "pgdlib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    how = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", tmp_path]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *how, source], check=True, stdin=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("*.whl")
    return wheel, source


@pytest.fixture(scope="session")
def beside_wheel(wheel, tmp_path_factory):
    """(a copy of the notebooks where no checkout is, the folder to which the wheel was unpacked, as pip does)"""
    folder = tmp_path_factory.mktemp("beside")
    zipfile.ZipFile(wheel[0]).extractall(folder / "site")
    return shutil.copytree(ROOT / "notebooks", folder / "mine"), folder / "site"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """An empty folder for everything that runs make."""
    monkeypatch.setenv("PGD_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def wait_for(condition, seconds=20):
    """Wait until `condition()` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


TOLD = pytest.StashKey()  # kind of fault or input -> Counter of what became of them


@pytest.fixture
def told(pytestconfig):
    """A function that notes counts of a kind of fault or input: told("full disks", injected=6, ...); told at the end."""
    kinds = pytestconfig.stash.setdefault(TOLD, {})
    return lambda kind, **counts: kinds.setdefault(kind, Counter()).update(counts)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist: what a worker prints is lost
        session.config.workeroutput["told"] = {k: dict(v) for k, v in session.config.stash.get(TOLD, {}).items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    kinds = node.config.stash.setdefault(TOLD, {})
    for kind, counts in getattr(node, "workeroutput", {}).get("told", {}).items():
        kinds.setdefault(kind, Counter()).update(counts)


def pytest_terminal_summary(terminalreporter, config):
    kinds = config.stash.get(TOLD, {})
    groups = {tuple(counts): [] for counts in kinds.values()}
    for kind, counts in kinds.items():
        groups[tuple(counts)].append((kind, counts))
    for names, rows in groups.items():
        if len(rows) > 1:
            rows.append(("all of these", sum((c for _, c in rows), Counter())))
        width = max(len(kind) for kind, _ in rows)
        terminalreporter.section(f"{', '.join(names)}")
        for kind, counts in rows:
            terminalreporter.line(f"{kind:{width}}  " + " ".join(f"{counts[name]:>8,}" for name in names))
