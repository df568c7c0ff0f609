"""EDM (Karras et al. 2022) on trajectories: the denoiser and its training.

Trajectories x are [B, T, 71] in normalised space; σ is the noise level.
"""

import copy
import json
import math
import time
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import nn

from pgdlib.data import CHANNELS, TERMINAL, Normaliser
from pgdlib.lab import artifacts, resumable
from pgdlib.unet import UNet

P_MEAN, P_STD = -1.2, 1.2  # training noise, ln σ ~ N(P_MEAN, P_STD²): Karras et al., Table 1


class Denoiser(nn.Module):
    """D(x; σ), the mean of the clean trajectory given the noised one x; it carries the data's normaliser."""

    SIGMA_DATA = 1.0  # the std of normalised data

    def __init__(self, horizon, features, blocks, kernel_size=3, transform="raw"):
        super().__init__()
        self.config = dict(horizon=horizon, features=features, blocks=blocks, kernel_size=kernel_size, transform=transform)
        self.horizon = horizon
        self.net = UNet(CHANNELS, features, blocks, kernel_size)
        self.normaliser = Normaliser(transform)

    def forward(self, x, sigma):
        """Denoise x [B, T, 71] at noise levels sigma [B] or a number, all above zero (Eq. 7, Table 1 of Karras et al.)."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1)  # one number stays one, which is cheaper
        s, d = sigma[:, None, None], self.SIGMA_DATA
        c_skip = d**2 / (s**2 + d**2)
        c_out = s * d / (s**2 + d**2).sqrt()
        c_in = 1 / (s**2 + d**2).sqrt()
        c_noise = sigma.log() / 4
        low = has_bfloat16(x.device) and x.dtype == torch.float32
        out = self.net((c_in * x).to(torch.bfloat16 if low else x.dtype), c_noise)
        return (c_out * out).add_(c_skip * x)  # several times faster than addcmul with factors that are broadcast


@cache
def has_bfloat16(device):
    """Whether `device` multiplies bfloat16 matrices in hardware; the network then computes with them, all else in float32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # no public name yet
    return bool(supported and supported())


def loss(denoiser, x, mask, sigma, generator):
    """EDM loss of each trajectory [B] (Karras et al., Table 1): x [B, T, 71], mask [B, T], σ [B].

    Steps beyond the end of an episode are masked, all but their terminal flag, which stays set: so the end is not lost among
    the other channels, where it would be one value in thousands.
    """
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    error = (denoiser(x + sigma[:, None, None] * noise, sigma) - x).square()
    counted = mask[..., None].repeat(1, 1, x.shape[-1])
    counted[..., TERMINAL] = 1.0
    weight = (sigma**2 + denoiser.SIGMA_DATA**2) / (sigma * denoiser.SIGMA_DATA) ** 2
    return weight * (error * counted).sum((1, 2)) / counted.sum((1, 2))


@torch.no_grad()
def validation_loss(denoiser, windows, sigmas, count, seed):
    """The EDM loss at each of `sigmas` [L], over the same `count` windows and noises: [L]."""
    generator = torch.Generator(windows.steps.device).manual_seed(seed)
    ids = torch.randint(len(windows), (count,), generator=generator, device=windows.steps.device)
    x, mask = windows[ids]
    return torch.stack(
        [
            loss(denoiser, x, mask, torch.full((count,), float(s), device=x.device), seeded(x.device, seed, 0)).mean()
            for s in sigmas
        ]
    )


@dataclass
class Training:
    """How to train a denoiser; Adam, cosine schedule after a warm-up over a tenth of the steps, EMA of the weights."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int = 0
    ema: float = 0.999


def train(denoiser, windows, how, checkpoint=None, save_every=90.0, report=lambda step, loss: None):
    """Train `denoiser` in place; returns its EMA copy and the training loss of every step, a tensor [steps].

    With a `checkpoint` path, the state is written there every `save_every` seconds and when `report` raises, and a run that
    finds it goes on from it to the same weights that an uninterrupted run has: each step's randomness depends only on the
    seed and the step. One that is damaged, or of another training, is set aside.

    Where torch.distributed is initialised, all processes call this with the same arguments and each takes its share of every
    batch; the weights are those of one process up to float rounding, and the first process writes the checkpoints. Raises
    ValueError if there are more processes than windows in a batch.
    """
    device, (rank, world) = windows.steps.device, processes()
    if how.batch_size < world:
        raise ValueError(f"batch_size={how.batch_size} is not allowed with {world} processes; it must be at least {world}")
    mine = slice(rank * how.batch_size // world, (rank + 1) * how.batch_size // world)
    network = denoiser if world == 1 else _Share(denoiser, mine)
    ema = copy.deepcopy(denoiser).requires_grad_(False)
    optimiser = torch.optim.Adam(denoiser.net.parameters(), how.learning_rate, fused=True)
    first, losses = 0, torch.zeros(how.steps)
    card = dict(how=vars(how), config=denoiser.config)
    if checkpoint is not None:
        first = resumable.restore(checkpoint, _state(denoiser, ema, optimiser, losses), card)
    saved = time.monotonic()
    for step in range(first, how.steps):
        for group in optimiser.param_groups:
            group["lr"] = how.learning_rate * _schedule(step, how.steps)
        generator = seeded(device, how.seed, step)
        ids = torch.randint(len(windows), (how.batch_size,), generator=generator, device=device)
        x, mask = windows[ids]
        sigma = (P_MEAN + P_STD * torch.randn(len(x), generator=generator, device=device)).exp()
        value = loss(network, x, mask, sigma, generator)[mine].sum() / how.batch_size
        optimiser.zero_grad()
        value.backward()
        value = value.detach()
        if world > 1:
            _add_up([*(w.grad for w in denoiser.net.parameters()), value])
        optimiser.step()
        decay = min(how.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.net.parameters()), list(denoiser.net.parameters()), 1 - decay)
        losses[step] = value
        try:
            report(step + 1, losses)
        except BaseException:
            saved = -math.inf
            raise
        finally:
            if checkpoint is not None and rank == 0 and time.monotonic() - saved > save_every:
                resumable.save(checkpoint, _state(denoiser, ema, optimiser, losses), {**card, "step": step + 1})
                saved = time.monotonic()
    return ema, losses


def processes():
    """(number of this process, how many there are) of torch.distributed, (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def artifact(path, make):
    """`artifacts.artifact`; with torch.distributed all processes make it together, and the first one saves it."""
    rank, world = processes()
    if world == 1:
        return artifacts.artifact(path, make)
    asked = []

    def make_together():
        asked.append(_first_says(True))
        return make()

    if rank == 0:
        artifacts.artifact(path, make_together)
        if not asked:
            _first_says(False)
    elif _first_says(None):
        make()
    dist.barrier()
    return artifacts.load(path)


def _first_says(what):
    """What the first process says, in all processes."""
    said = [what]
    dist.broadcast_object_list(said)
    return said[0]


def steps_done(checkpoint):
    """Training steps that the file `checkpoint` of `train` holds; 0 if there is none, or one that `train` will refuse."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(checkpoint, "pt") as f:
            return json.loads(f.metadata()["card"])["step"]
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return 0


class _Share:
    """A denoiser of one part of a batch; the rest stays as it is. So `loss` draws the noise of the whole batch."""

    def __init__(self, denoiser, mine):
        self.denoiser, self.mine, self.SIGMA_DATA = denoiser, mine, denoiser.SIGMA_DATA

    def __call__(self, x, sigma):
        denoised = self.denoiser(x[self.mine], sigma[self.mine])
        return torch.cat([x[: self.mine.start], denoised, x[self.mine.stop :]])


def _add_up(tensors):
    """Replace each tensor by its sum over all processes, by one exchange."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(total.view_as(t))


def _schedule(step, steps):
    warmup = max(1, steps // 10)
    if step < warmup:
        return 0.1 + 0.9 * step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def seeded(device, seed, step):
    """A generator that depends on seed and step alone, so that a run that goes on draws what an uninterrupted one does."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) * 2_654_435_761 % 2**63)


def _state(denoiser, ema, optimiser, losses):
    """All that the next step depends on, name -> tensor; a checkpoint may be copied into them."""
    tensors = {f"{n}.{k}": v for n, m in (("model", denoiser), ("ema", ema)) for k, v in m.state_dict().items()}
    for i, p in enumerate(denoiser.net.parameters()):
        if p not in optimiser.state:  # what Adam would make in its first step
            zeros = (torch.zeros_like(p, memory_format=torch.preserve_format) for _ in range(2))
            optimiser.state[p] = dict(step=torch.zeros((), device=p.device), **dict(zip(("exp_avg", "exp_avg_sq"), zeros)))
        tensors.update({f"adam.{i}.{k}": v for k, v in optimiser.state[p].items()})
    return {**tensors, "losses": losses}
