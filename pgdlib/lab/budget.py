"""What a run takes: operations, counted without computing; memory, by rule of thumb; seconds, measured on one step.

Nothing is measured where the count shows that the work is small, so there no number depends on a clock.
"""

import math
import os
from functools import lru_cache

import pandas as pd
import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from pgdlib import edm, fast, sampler

SMALL = {"cpu": 1e12, "cuda": 1e15}  # operations that surely take no more than about a minute
TEST = {"cpu": 1e11, "cuda": 1e13}  # about as many are enough to measure
CHUNK_SECONDS = 60.0  # of one chunk of trajectories: what a killed run loses
WORTH_SAYING = 600.0  # seconds
ALIVE, KEPT = 16, 20  # values for each feature and step: at once in an evaluation; for gradients, of each level
MARGIN, CONTEXT = 1.2, 3e8  # what allocators lose, and what a process has anyway: bytes needed are MARGIN x counted + CONTEXT


@lru_cache
def _counted(training, **config):
    """(operations, weights) of one evaluation, or one training step, for one trajectory."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        denoiser = edm.Denoiser(**config)
        x, sigma = torch.empty(1, config["horizon"], denoiser.spec.width), torch.ones(1)
    with FlopCounterMode(display=False) as flops, torch.set_grad_enabled(training):
        out = denoiser.net(x, sigma)
        if training:
            out.square().mean().backward()
    return flops.get_total_flops(), sum(w.numel() for w in denoiser.net.parameters())


def operations(config, training=False):
    """Operations of one evaluation, or one training step, for one trajectory; `config` as `Denoiser.config`.

    A multiplication and an addition are two; only those of matrices and convolutions count.
    """
    return _counted(training, **config)[0]


def needed(config, batch, device, training=False):
    """Bytes that one evaluation, or one training step, takes with `batch` trajectories."""
    low = fast.has_bfloat16(torch.device(device))
    weights = _counted(False, **config)[1] * ((5 if training else 1) + low / 2)  # with gradients, EMA, two moments of Adam
    layers = (KEPT * config["blocks"] if training else ALIVE) * (1 - low / 2)
    values = layers * config["features"] + 8 * (config["obs_dim"] + config["action_dim"] + 2)  # of a step
    return MARGIN * 4 * (weights + batch * config["horizon"] * values) + CONTEXT


def memory_there(device):
    """Bytes that this process may still take on `device`; of a CPU's memory, four fifths of all."""
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return 0.8 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def require(config, batch, device, training=False):
    """The bytes `needed`. Raises ValueError that names features, horizon, batch_size and device if they are not there."""
    found, there, features = needed(config, batch, device, training), memory_there(device), config["features"]
    if found <= there:
        return found
    fewer = (config | {"features": features >> i} for i in range(1, features.bit_length()) if not (features >> i) % 8)
    fits = next((f"features={c['features']}" for c in fewer if needed(c, batch, device, training) <= there), "nothing like it")
    sizes = f"features={features} with horizon={config['horizon']}" + f" and batch_size={batch}" * training
    why = f"it needs {found / 1e9:.1f} GB of memory, there are {there / 1e9:.1f}; {fits} would fit"
    raise ValueError(f"{sizes} is not allowed on device={str(device)!r}: {why}")


def pace(config, device, training=False, batch=256):
    """Seconds of one evaluation, or of one training step but for the optimiser's, for one trajectory.

    Measured with `batch` trajectories, or with as many as `TEST` allows.
    """
    batch = int(max(1, min(batch, TEST[torch.device(device).type] // operations(config, training))))
    with torch.random.fork_rng(devices=[]):
        denoiser = edm.Denoiser(**config).to(device)
    shape = batch, config["horizon"], denoiser.spec.width
    x, sigma = torch.zeros(shape, device=device), torch.ones(batch, device=device)

    def step():
        with torch.set_grad_enabled(training):
            out = denoiser(x, sigma)
        if training:
            out.square().mean().backward()

    return Timer("step()", globals=dict(step=step), num_threads=torch.get_num_threads()).timeit(1).mean / batch


def most(denoiser, n, horizon, evaluations, device):
    """How many of n trajectories to draw at once: all, or so many that they fit and take about `CHUNK_SECONDS`.

    Raises ValueError, as `require`, if not even one block of them fits.
    """
    if not hasattr(denoiser, "config"):  # no network of ours: a formula
        return n
    config, there = denoiser.config | {"horizon": horizon}, memory_there(device)
    small = operations(config) * evaluations * n <= SMALL[torch.device(device).type]
    if small and needed(config, n, device) <= there:
        return n
    require(config, min(n, sampler.BLOCK), device)
    seconds = 0.0 if small else evaluations * pace(config, device)
    blocks = math.ceil(n / sampler.BLOCK)
    sizes = ((k, k * sampler.BLOCK) for k in range(2, blocks + 1))
    fit = [k for k, m in sizes if m * seconds <= CHUNK_SECONDS and needed(config, m, device) <= there]
    return math.ceil(blocks / math.ceil(blocks / max(fit, default=1))) * sampler.BLOCK


def announce(works, scale, device, say=print):
    """Say what `works` take, (name, amount in words, seconds, bytes) each: at scale "paper", or above `WORTH_SAYING`."""
    total = sum(seconds for _, _, seconds, _ in works)
    if scale == "paper" or total > WORTH_SAYING:
        rows = [(name, amount, _hours(seconds), f"{memory / 1e9:.1f} GB") for name, amount, seconds, memory in works]
        there = f"memory there: {memory_there(device) / 1e9:.1f} GB"
        say(f"estimated on {device}, from a measured step: {_hours(total)}; {there}")
        say(pd.DataFrame(rows, columns=["work", "amount", "time", "memory"]).to_string(index=False))


def announce_training(config, how, done, scale, device, say=print):
    """Say what is left of a training after `done` steps. Raises ValueError, as `require`, if the device cannot hold it."""
    windows = (how.steps - done) * how.batch_size
    if scale != "paper" and operations(config, True) * windows <= 100 * SMALL[torch.device(device).type]:
        return
    memory = require(config, how.batch_size, device, True)
    amount = f"{how.steps - done:,} training steps of {how.batch_size} windows" + f", {done:,} are done" * (done > 0)
    announce([("denoiser", amount, pace(config, device, True, how.batch_size) * windows, memory)], scale, device, say)


def announce_draws(lab, plan, say=print):
    """Say what `plan`, name -> how many λ, takes of the `Study` lab. Raises ValueError, as `require`."""
    p, device, config = lab.p, lab.device, lab.denoiser.config | {"horizon": lab.p.horizon}
    asked = sampler.evaluations(p.solver, p.steps)
    if p.scale != "paper" and operations(config) * asked * p.samples * sum(plan.values()) <= 100 * SMALL[device.type]:
        return
    each, at_once = pace(config, device) * asked * p.samples, most(lab.denoiser, p.samples, p.horizon, asked, device)
    words, memory = f"λ x {p.samples:,} trajectories x {p.steps} steps", require(config, at_once, device)
    announce([(name, f"{n} {words}", n * each, memory) for name, n in plan.items()], p.scale, device, say)


def _hours(seconds):
    return f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{seconds / 60:.1f} min"
