"""What a run takes: the denoiser's operations and memory, counted without computing; its seconds, measured on one step.

Nothing is measured where a count of operations shows that the work is small.
"""

import os
import time
import weakref
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pgdlib import edm, sampler
from pgdlib.data import CHANNELS

SMALL = {"cpu": 1e12, "cuda": 1e15}  # operations that surely take no more than about a minute
TEST = {"cpu": 1e11, "cuda": 1e13}  # about as many are enough to measure
CHUNK_SECONDS = 60.0  # of one chunk of trajectories: what a killed run loses
WORTH_SAYING = 600.0  # seconds
MARGIN, CONTEXT = 1.2, 3e8  # what allocators lose, and what a process has anyway: bytes needed are MARGIN x counted + CONTEXT


@dataclass
class Work:
    """One row of the table."""

    name: str
    amount: str  # how much of it, in words
    seconds: float  # of one unit
    units: float
    memory: float  # bytes needed


class _Peak(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, at most, while it is on; those that were there before do not count."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (s := t.untyped_storage()) not in self.seen and id(s) not in known:
                self.seen.add(s)
                self.alive += s.nbytes()
                weakref.finalize(s, self._freed, s.nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    def _freed(self, size):
        self.alive -= size


@lru_cache(maxsize=256)
def _counted(batch, horizon, features, blocks, kernel_size, training, low):
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        net = edm.Denoiser(horizon, features, blocks, kernel_size).net.requires_grad_(training)
        x = torch.empty(batch, horizon, CHANNELS, dtype=torch.bfloat16 if low else torch.float32)
        noise = torch.empty(batch if training else 1)
    with FlopCounterMode(display=False) as flops, _Peak() as peak, torch.set_grad_enabled(training):
        out = net(x, noise)
        if training:
            out.float().square().mean().backward()
    parameters = sum(w.numel() for w in net.parameters())
    copies = 4 if training else 1  # weights, their EMA, two moments of Adam; gradients are in the peak
    return flops.get_total_flops(), peak.peak + 4 * copies * parameters + 4 * 8 * batch * horizon * CHANNELS


def count(config, batch, device, training=False, horizon=None):
    """(operations, bytes) of one evaluation, or one training step, with `batch` trajectories; `config` as `Denoiser.config`.

    A multiplication and an addition are two operations; only those of matrices and convolutions count. Bytes hold the
    weights, what training keeps beside them, and all that is alive at once, without `MARGIN` and `CONTEXT`.
    """
    low = edm.has_bfloat16(torch.device(device))
    sizes = (config[k] for k in ("features", "blocks", "kernel_size"))
    return _counted(batch, horizon or config["horizon"], *sizes, training, low)


def memory_there(device):
    """Bytes that this process may still take on `device`; of a CPU's memory, four fifths of all."""
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return 0.8 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def needed(config, batch, device, training=False, horizon=None):
    """Bytes that `count` comes to in practice."""
    return MARGIN * count(config, batch, device, training, horizon)[1] + CONTEXT


def require(config, batch, device, training=False, horizon=None):
    """The bytes `needed`. Raises ValueError that names features, horizon, batch_size and device if they are not there."""
    horizon, there = horizon or config["horizon"], memory_there(device)
    if (found := needed(config, batch, device, training, horizon)) <= there:
        return found
    fewer = next((b for b in _halves(batch) if needed(config, b, device, training, horizon) <= there), None)
    less = (dict(config, features=f) for f in _halves(config["features"]) if f % 8 == 0)
    less = next((c["features"] for c in less if needed(c, batch, device, training, horizon) <= there), None)
    options = [f"features={less}"] * (less is not None) + [f"batch_size={fewer}"] * (training and fewer is not None)
    would = f"{' or '.join(options)} would fit" if options else "nothing like it would fit"
    raise ValueError(
        f"features={config['features']} with horizon={horizon}{f' and batch_size={batch}' * training} is not allowed on "
        f"device={str(device)!r}: it needs {found / 1e9:.1f} GB of memory, there are {there / 1e9:.1f}; {would}"
    )


def pace(denoiser, horizon, device):
    """Seconds of one evaluation for one trajectory, measured with as many as `TEST` allows, at most 256."""
    batch = int(max(1, min(256, TEST[torch.device(device).type] // count(denoiser.config, 1, device, False, horizon)[0])))
    x = torch.zeros(batch, horizon, CHANNELS, device=device)
    with torch.no_grad():
        stamps = [_now(device, denoiser(x, 1.0)) for _ in range(3)]
    return (stamps[2] - stamps[1]) / batch  # what comes first takes longer


def most(denoiser, n, horizon, evaluations, device):
    """How many of n trajectories to draw at once: all, or so many that they fit and take about `CHUNK_SECONDS`.

    Raises ValueError, as `require`, if not even one block of them fits.
    """
    config = getattr(denoiser, "config", None)
    if config is None:  # no network of ours: a formula
        return n
    flops = count(config, 1, device, False, horizon)[0] * evaluations * n
    small = flops <= SMALL[torch.device(device).type]
    if small and needed(config, n, device, False, horizon) <= memory_there(device):
        return n
    block = require(config, min(n, sampler.BLOCK), device, False, horizon)
    each = (needed(config, 2 * sampler.BLOCK, device, False, horizon) - block) / sampler.BLOCK
    allowed = sampler.BLOCK + (memory_there(device) - block) / max(each, 1)
    if not small:
        allowed = min(allowed, CHUNK_SECONDS / (evaluations * pace(denoiser, horizon, device)))
    blocks = -(-n // sampler.BLOCK)
    chunks = -(-blocks // max(1, int(allowed // sampler.BLOCK)))
    return -(-blocks // chunks) * sampler.BLOCK


class _Blank:
    """Windows of noise, to measure training on."""

    def __init__(self, horizon, device):
        self.steps = torch.randn(64, horizon, CHANNELS, device=device)

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, ids):
        return self.steps[ids], torch.ones(len(ids), self.steps.shape[1], device=ids.device)


def training_pace(config, batch, device):
    """Seconds of one training step of `batch` windows, measured by `edm.train` itself, with fewer if a step is long."""
    step = count(config, 1, device, True)[0]
    few = int(max(min(batch, TEST[torch.device(device).type] // step), edm.processes()[1]))
    with torch.random.fork_rng(devices=[]):
        denoiser, windows, stamps = edm.Denoiser(**config).to(device), _Blank(config["horizon"], device), []
    edm.train(
        denoiser,
        windows,
        edm.Training(4, few, 1e-9),
        report=lambda step, losses: stamps.append(_now(device, losses)),
    )
    return min(b - a for a, b in zip(stamps, stamps[1:])) * batch / few


def _halves(n):
    while (n := n // 2) >= 1:
        yield n


def _now(device, _):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def announce(works, scale, device, say=print):
    """Say what `works` take together, as a table: at scale "paper", or where it is more than `WORTH_SAYING`."""
    total = sum(w.seconds * w.units for w in works)
    if scale != "paper" and total <= WORTH_SAYING:
        return
    rows = [("work", "amount", "each", "total", "memory")]
    rows += [(w.name, w.amount, _span(w.seconds), _span(w.seconds * w.units), f"{w.memory / 1e9:.1f} GB") for w in works]
    widths = [max(map(len, column)) for column in zip(*rows)]
    say(f"estimated on {device}, from a measured step: {_span(total)}; memory there: {memory_there(device) / 1e9:.1f} GB")
    for row in rows:
        say("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())


def announce_training(config, how, done, scale, device, say=print):
    """Say what is left of a training after `done` steps. Raises ValueError, as `require`, if the device cannot hold it."""
    left, name = how.steps - done, torch.device(device).type
    if scale != "paper" and count(config, 1, device, True)[0] * how.batch_size * left <= 100 * SMALL[name]:
        return
    memory = require(config, how.batch_size, device, True)
    amount = f"{left:,} training steps of {how.batch_size} windows" + f", {done:,} are done" * (done > 0)
    announce([Work("denoiser", amount, training_pace(config, how.batch_size, device), left, memory)], scale, device, say)


def announce_draws(lab, plan, say=print):
    """Say what `plan`, name -> how many λ, takes of the `Study` lab. Raises ValueError, as `require`."""
    p, config = lab.p, lab.denoiser.config
    asked = sampler.evaluations(p.solver, p.steps)
    flops = count(config, 1, lab.device, False, p.horizon)[0] * asked * p.samples * sum(plan.values())
    if p.scale != "paper" and flops <= 100 * SMALL[lab.device.type]:
        return
    each = pace(lab.denoiser, p.horizon, lab.device) * asked * p.samples
    at_once = most(lab.denoiser, p.samples, p.horizon, asked, lab.device)
    memory = require(config, at_once, lab.device, False, p.horizon)
    words = f"λ x {p.samples:,} trajectories x {p.steps} steps"
    works = [Work(name, f"{number} {words}", each, number, memory) for name, number in plan.items()]
    announce(works, p.scale, lab.device, say)


def _span(seconds):
    for size, unit in ((3600, "h"), (60, "min"), (1, "s")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds * 1e3:.3g} ms"
