"""What a CPU or a GPU wants: bfloat16, streams of random numbers, and layers in a layout that costs no copies."""

import math
import struct
from collections.abc import Callable, Iterable
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Every draw of the library belongs to one of these streams, which share nothing, whatever the seeds.
STREAMS = ("weights", "training", "validation", "drawing", "rounds", "world model", "real", "targets", "calibration", "fresh")


def generator(device: torch.device | str, stream: str, *key: int) -> torch.Generator:
    """The random numbers of one of `STREAMS` under `key`: whole numbers from 0 to 2**32 - 1, the seed first.

    Other streams and other keys give independent numbers, by numpy's `SeedSequence`. ValueError for what is no such key.
    """
    if stream not in STREAMS:
        raise ValueError(f"stream={stream!r} is not allowed; it must be one of {', '.join(STREAMS)}")
    if not all(0 <= k < 2**32 for k in key):
        raise ValueError(f"key={key} is not allowed; it must hold whole numbers from 0 to 2**32 - 1")
    # The length, because zeros at the end say nothing to it.
    made, seeds = torch.Generator(device), np.random.SeedSequence([STREAMS.index(stream), len(key), *key])
    if made.device.type != "cpu":
        return made.manual_seed(int(seeds.generate_state(1, np.uint64)[0]) >> 1)
    # A seed would set 32 bits only, by which one stream in some 10,000 meets another: the whole state is set.
    state = made.get_state().numpy()
    twister = np.random.MT19937(seeds).state["state"]["key"].astype(np.uint64)
    state[8:24] = np.frombuffer(struct.pack("iiQ", 1, 1, 0), np.uint8)  # what is left of the block, seeded, the next word
    state[24 : 24 + 8 * len(twister)] = twister.view(np.uint8)
    made.set_state(torch.from_numpy(state))
    return made


def stream(device: torch.device | str, name: str, *key: int) -> Callable[..., torch.Generator]:
    """A function of more numbers of the key, such as that of a block, that gives the `generator`."""
    return partial(generator, device, name, *key)


@cache
def has_bfloat16(device: torch.device | str) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware; networks then compute with them, all else in float32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # no public name yet
    return bool(supported and supported())


def adam(parameters: Iterable, learning_rate: float) -> torch.optim.Adam:
    """Adam with the state that it would make in its first step, for a checkpoint to be copied into."""
    optimiser = torch.optim.Adam(parameters, learning_rate, fused=True)
    for p in (p for group in optimiser.param_groups for p in group["params"]):
        optimiser.state[p] = dict(step=p.new_zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    return optimiser


def optimiser_state(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of `adam` or another optimiser, live: name -> tensor."""
    name = type(optimiser).__name__.lower()
    return {f"{name}.{i}.{k}": v for i, state in enumerate(optimiser.state.values()) for k, v in state.items()}


def tanh(z: Tensor) -> Tensor:
    """tanh z as 2 σ(2 z) - 1: to 1e-6 the same and several times faster on CPUs. It takes the place of z without gradients."""
    if torch.is_grad_enabled():
        return 2 * (2 * z).sigmoid() - 1
    return z.mul_(2).sigmoid_().mul_(2).sub_(1)


class Convolution(nn.Module):
    """A convolution along time of [B, T, in], padded with zeros: [B, T, out], in the type of its input.

    Weights that are not trained are cast to that type once, not in every call.
    """

    UNFOLD = 1024  # from so many channels on, a product with the unfolded input is faster than the library's convolution

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int = 1):
        super().__init__()
        bound = 1 / math.sqrt(channels_in * kernel_size)  # as torch's own convolutions begin
        self.weight = nn.Parameter(torch.empty(channels_out, kernel_size, channels_in).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, out] at x [B, T, in]."""
        weight, bias = self._cast(x.dtype)
        _, size, channels = weight.shape
        if size == 1:
            return F.linear(x, weight[:, 0], bias)
        half = size // 2
        if channels < self.UNFOLD:  # an image of height 1, in whose memory channels come last
            image, kernel = x.transpose(1, 2).unsqueeze(2), weight.transpose(1, 2).unsqueeze(2)
            return F.conv2d(image, kernel, bias, padding=(0, half)).squeeze(2).transpose(1, 2)
        padded = F.pad(x, (0, 0, half, half))
        unfolded = torch.cat([padded[:, i : i + x.shape[1]] for i in range(size)], -1)
        return F.linear(unfolded, weight.flatten(1), bias)

    def _cast(self, dtype):
        if self.weight.dtype == dtype:
            return self.weight, self.bias
        if self.weight.requires_grad:
            return self.weight.to(dtype), self.bias.to(dtype)
        state = dtype, self.weight.data_ptr(), self.weight._version, self.bias._version
        if getattr(self, "_kept", (None,))[0] != state:
            self._kept = state, self.weight.to(dtype), self.bias.to(dtype)
        return self._kept[1:]


class GroupNorm(nn.Module):
    """Group norm of [B, T, channels] over time and the channels of a group."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-5):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """The normalised x times weight plus bias, then times 1 + scale plus shift, where they are given [1 or B, channels]."""
        weight, bias, is_one = self.weight, self.bias, scale is not None and len(scale) == 1
        if is_one:  # of all: no pass of its own
            weight, bias = weight * (1 + scale[0]), bias * (1 + scale[0]) + shift[0]
        # Torch's kernel is fast where channels come last in an image's memory, in bfloat16 for sixteens of channels alone.
        exact = torch.float32 if x.dtype == torch.bfloat16 and x.shape[2] // self.groups % 16 else x.dtype
        image = x.to(exact).transpose(1, 2).unsqueeze(2)
        y = F.group_norm(image, self.groups, weight.to(exact), bias.to(exact), self.eps)
        y = y.squeeze(2).transpose(1, 2).to(x.dtype)
        if scale is None or is_one:
            return y
        return torch.addcmul(shift[:, None].to(y), y, (1 + scale[:, None]).to(y))


class StackedMLP(nn.Module):
    """R independent MLPs as one batch, initialised as torch's `Linear` is, each from its own generator (None: the global one).

    `widths` from input to output; `activation` is `torch.relu` or `tanh`, or another function of tensors.
    """

    def __init__(self, widths: list[int], generators: list, activation: Callable = torch.relu_):
        super().__init__()
        self.weights, self.biases, self.activation = nn.ParameterList(), nn.ParameterList(), activation
        for i, o in zip(widths, widths[1:]):
            drawn = [torch.rand(i + 1, o, generator=g) for g in generators]
            layer = (2 * torch.stack(drawn) - 1) / math.sqrt(i)
            self.weights.append(layer[:, :-1].clone())
            self.biases.append(layer[:, -1:].clone())

    def forward(self, x: Tensor, frozen: bool = False, low: bool = True) -> Tensor:
        """[R, B, o] at x [R, B, i]. frozen: no gradient reaches the weights.

        low: hidden layers and all gradients are in bfloat16 where the device multiplies it. The last layer, which gives values
        and actions, is in the type of the weights.
        """
        low = low and has_bfloat16(x.device) and x.dtype == torch.float32
        layers = [(w.detach(), b.detach()) if frozen else (w, b) for w, b in zip(self.weights, self.biases)]
        x = x.to(torch.bfloat16 if low else layers[0][0].dtype)
        for weight, bias in layers[:-1]:
            x = self.activation(torch.baddbmm(bias.to(x.dtype), x, weight.to(x.dtype)))
        return _LastLayer.apply(x, *layers[-1])


class _LastLayer(torch.autograd.Function):
    """x w + b in the precision of w, with gradients in that of x, which autograd by itself would take in w's too."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        x = x.to(weight.dtype)
        if weight.shape[2] > 1:
            return torch.baddbmm(bias, x, weight)
        return torch.baddbmm(bias, weight.mT, x.mT).mT  # the same; CPUs are slow at products with one column

    @staticmethod
    def backward(ctx, slope):
        x, weight = ctx.saved_tensors
        low = slope.to(x.dtype)
        of_weight = torch.bmm(x.mT, low).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return torch.bmm(low, weight.to(x.dtype).mT), of_weight, slope.sum(1, keepdim=True)
