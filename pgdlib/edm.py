"""EDM (Karras et al. 2022) on trajectories: the denoiser, its loss, and its training, one step at a time.

Trajectories x are [B, T, width] in normalised space; σ is the noise level.
"""

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pgdlib.data import Normaliser, Spec, Windows
from pgdlib.fast import Convolution, adam, generator, has_bfloat16, optimiser_state
from pgdlib.unet import UNet


class Denoiser(nn.Module):
    """D(x; σ), the mean of the clean trajectory given the noised one x; it carries the data's normaliser."""

    SIGMA_DATA = 1.0  # the std of normalised data

    def __init__(
        self, obs_dim: int, action_dim: int, horizon: int, features: int, blocks: int, kernel_size: int = 3, transform="raw"
    ):
        super().__init__()
        self.config = dict(obs_dim=obs_dim, action_dim=action_dim, horizon=horizon, features=features, blocks=blocks)
        self.config |= dict(kernel_size=kernel_size, transform=transform)
        self.spec, self.horizon = Spec(obs_dim, action_dim), horizon
        self.net = UNet(self.spec.width, features, blocks, kernel_size)
        self.normaliser = Normaliser(self.spec, transform)

    def forward(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Denoise x [B, T, width] at noise levels sigma [B] or a number, all above zero (Eq. 7, Table 1 of Karras et al.)."""
        # One number stays one, which is cheaper. It is filled in: a copy to a GPU would wait for it.
        sigma = sigma.to(x).reshape(-1) if isinstance(sigma, Tensor) else x.new_full((1,), sigma)
        s, d = sigma[:, None, None], self.SIGMA_DATA
        c_skip = d**2 / (s**2 + d**2)
        c_out = s * d / (s**2 + d**2).sqrt()
        c_in = 1 / (s**2 + d**2).sqrt()
        c_noise = sigma.log() / 4
        low = has_bfloat16(x.device) and x.dtype == torch.float32
        out = self.net((c_in * x).to(torch.bfloat16 if low else x.dtype), c_noise)
        return (c_out * out).add_(c_skip * x)  # several times faster than addcmul with factors that are broadcast


def loss(denoiser: nn.Module, x: Tensor, mask: Tensor, sigma: Tensor, noise: torch.Generator) -> Tensor:
    """EDM loss of each trajectory [B] (Karras et al., Table 1): x [B, T, width], mask [B, T], σ [B].

    Steps beyond the end of an episode are masked, all but their terminal flag, which stays set: so the end is not lost among
    the other channels, where it would be one value in thousands.
    """
    n = torch.randn(x.shape, generator=noise, device=x.device, dtype=x.dtype)
    error = (denoiser(x + sigma[:, None, None] * n, sigma) - x).square()
    counted = mask[..., None].repeat(1, 1, x.shape[-1])
    counted[..., denoiser.spec.terminal] = 1.0
    weight = (sigma**2 + denoiser.SIGMA_DATA**2) / (sigma * denoiser.SIGMA_DATA) ** 2
    return weight * (error * counted).sum((1, 2)) / counted.sum((1, 2))


@torch.no_grad()
def validation_loss(denoiser: nn.Module, windows: Windows, sigmas: Tensor, count: int, seed: int) -> Tensor:
    """The EDM loss at each of `sigmas` [L], over the same `count` windows and noises: [L]."""
    device = windows.steps.device
    ids = torch.randint(len(windows), (count,), generator=generator(device, "validation", seed, 0), device=device)
    x, mask = windows[ids]
    levels = [torch.full((count,), float(s), device=device) for s in sigmas]
    return torch.stack([loss(denoiser, x, mask, s, generator(device, "validation", seed, 1)).mean() for s in levels])


@dataclass
class Recipe:
    """How to train a denoiser: cosine schedule after a warm-up over a tenth of the steps, EMA of the weights.

    ln σ ~ N(p_mean, p_std²), by default as in Karras et al., Table 1. `optimiser` "adam" is the paper's; "muon" is `Muon` for
    the convolutions between the network's first and last layers, and Adam for all else.
    """

    steps: int
    batch_size: int
    learning_rate: float
    seed: int = 0
    ema: float = 0.999
    optimiser: str = "adam"
    p_mean: float = -1.2
    p_std: float = 1.2


class Training:
    """The training of a denoiser on windows: iterate it, and the number of steps that are done comes after each of them.

    `denoiser` is trained in place, `ema` is what to use, `losses` [steps] are those of every step, at the end on the CPU. A
    step's randomness depends only on the seed and its number; `state` and `step` are all that the next one depends on, so that
    a training whose state was kept and copied back goes on to the same weights.
    """

    def __init__(self, denoiser: Denoiser, windows: Windows, recipe: Recipe):
        self.denoiser, self.windows, self.recipe = denoiser, windows, recipe
        self.ema = copy.deepcopy(denoiser).requires_grad_(False)
        self.optimisers = _optimisers(denoiser.net, recipe)
        self.step, self.steps, self.losses = 0, recipe.steps, torch.zeros(recipe.steps, device=windows.steps.device)
        self.card = dict(recipe=vars(recipe), config=denoiser.config)

    def __iter__(self) -> Iterator[int]:
        while self.step < self.steps:
            self.advance()
            yield self.step
        self.losses = self.losses.cpu()  # to be drawn

    def advance(self) -> None:
        """One step."""
        recipe, device = self.recipe, self.windows.steps.device
        draw = generator(device, "training", recipe.seed, self.step)
        x, mask = self.windows[torch.randint(len(self.windows), (recipe.batch_size,), generator=draw, device=device)]
        sigma = (recipe.p_mean + recipe.p_std * torch.randn(len(x), generator=draw, device=device)).exp()
        self.denoiser.net.zero_grad()
        self.losses[self.step] = self.gradients(x, mask, sigma, draw)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = recipe.learning_rate * _schedule(self.step, self.steps)
            optimiser.step()
        decay = min(recipe.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.net.parameters()), list(self.denoiser.net.parameters()), 1 - decay)
        self.step += 1

    def gradients(self, x: Tensor, mask: Tensor, sigma: Tensor, noise: torch.Generator) -> Tensor:
        """Let the weights have the gradients of a batch's mean loss, which is returned."""
        value = loss(self.denoiser, x, mask, sigma, noise).mean()
        value.backward()
        return value.detach()

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on beside `step` and the data, live: name -> tensor, to save or to copy into."""
        models = (("model", self.denoiser), ("ema", self.ema))
        tensors = {f"{name}.{k}": v for name, model in models for k, v in model.state_dict().items()}
        for optimiser in self.optimisers:
            tensors |= optimiser_state(optimiser)
        return {**tensors, "losses": self.losses}


def _optimisers(net, recipe):
    if recipe.optimiser == "adam":
        return [adam(net.parameters(), recipe.learning_rate)]
    if recipe.optimiser != "muon":
        raise ValueError(f"optimiser={recipe.optimiser!r} is not allowed; it must be 'adam' or 'muon'")
    ends = net.enter, net.leave
    between = {m.weight: None for m in net.modules() if isinstance(m, Convolution) and m not in ends}  # in order
    rest = [p for p in net.parameters() if p not in between]
    return [Muon(between, recipe.learning_rate), adam(rest, recipe.learning_rate)]


def _schedule(step, steps):
    warmup = max(1, steps // 10)
    if step < warmup:
        return 0.1 + 0.9 * step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for weights [out, ...], as matrices: steps along the momentum, all its singular values near 1.

    They are as long as Adam's usually are (Liu et al. 2025, Eq. 4), so that one learning rate does for both. Torch's own
    always multiplies in bfloat16, which is slow where there is no hardware for it.
    """

    MOMENTUM = 0.95
    POLYNOMIAL = 3.4445, -4.7750, 2.0315  # of x, x³ and x⁵: five times applied, it takes all of (0.01, 1] near 1

    def __init__(self, parameters: Iterable, learning_rate: float):
        super().__init__(parameters, dict(lr=learning_rate))
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = dict(momentum=torch.zeros_like(p))

    @torch.no_grad()
    def step(self) -> None:
        """One step, with the rate of each group's `lr`."""
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - self.MOMENTUM)
                way = self.orthogonal(p.grad.lerp(momentum, self.MOMENTUM).flatten(1))  # Nesterov's
                p.add_(way.view_as(p), alpha=-0.2 * math.sqrt(max(way.shape)) * group["lr"])

    @classmethod
    def orthogonal(cls, matrix: Tensor) -> Tensor:
        """`matrix` [m, n] with singular values of about 1, 0.7 to 1.2, by five Newton-Schulz iterations."""
        low, wide = has_bfloat16(matrix.device) and matrix.dtype == torch.float32, len(matrix) <= matrix.shape[1]
        x = matrix.to(torch.bfloat16 if low else matrix.dtype)
        x = (x if wide else x.mT) / x.norm().clamp_min(1e-7)
        a, b, c = cls.POLYNOMIAL
        for _ in range(5):
            square = x @ x.mT
            x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
        return (x if wide else x.mT).to(matrix.dtype)
