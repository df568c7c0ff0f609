"""The temporal U-Net: residual blocks of convolutions along time, the noise level in every block (sizes: Table 3).

Trajectories stay [B, T, channels] throughout: convolutions are then matrix products without a change of layout.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class UNet(nn.Module):
    """A function of trajectories [B, T, channels] and one number each [B], of the same shape as the trajectories.

    `blocks` levels of resolution, the first with `features` channels, each deeper one with twice as many at half the length.
    T must be divisible by 2**(blocks - 1). One number alone [1] stands for all trajectories. All is computed in the type of
    the trajectories; the embedding, and the statistics of group norm, in that of the weights.
    """

    def __init__(self, channels, features=1024, blocks=2, kernel_size=3, groups=8):
        super().__init__()
        if blocks < 1 or features % groups or kernel_size % 2 == 0:
            raise ValueError(
                f"features={features}, blocks={blocks}, kernel_size={kernel_size} are not allowed: features must be a "
                f"multiple of {groups}, blocks at least 1, kernel_size odd"
            )
        widths = [features * 2**i for i in range(blocks)]
        same = dict(embedding=features, kernel_size=kernel_size, groups=groups)
        self.embed = NoiseEmbedding(features)
        self.enter = Convolution(channels, features)
        self.down = nn.ModuleList(ResidualBlock(i, o, **same) for i, o in zip([features, *widths], widths))
        self.narrow = nn.ModuleList(Convolution(2 * w, w) for w in reversed(widths[:-1]))
        self.up = nn.ModuleList(ResidualBlock(2 * w, w, **same) for w in reversed(widths[:-1]))
        self.leave = Convolution(features, channels)
        self.stride = 2 ** (blocks - 1)

    def forward(self, x, noise):
        if x.shape[1] % self.stride:
            raise ValueError(f"horizon={x.shape[1]} is not allowed; it must be divisible by {self.stride}")
        embedding = self.embed(noise)
        x, skips = self.enter(x), []
        for block in self.down:
            x = block(torch.maximum(x[:, ::2], x[:, 1::2]) if skips else x, embedding)  # max pooling
            skips.append(x)
        for narrow, block, skip in zip(self.narrow, self.up, reversed(skips[:-1])):
            x = block(torch.cat([narrow(x).repeat_interleave(2, 1), skip], -1), embedding)
        return self.leave(x)


class ResidualBlock(nn.Module):
    """Twice convolution, group norm and SiLU, added to the input; the noise level scales and shifts the first norm."""

    def __init__(self, channels_in, channels_out, embedding, kernel_size, groups):
        super().__init__()
        self.conv_1 = Convolution(channels_in, channels_out, kernel_size)
        self.conv_2 = Convolution(channels_out, channels_out, kernel_size)
        self.norm_1 = GroupNorm(groups, channels_out)
        self.norm_2 = GroupNorm(groups, channels_out)
        self.modulate = nn.Linear(embedding, 2 * channels_out)
        self.skip = nn.Identity() if channels_in == channels_out else Convolution(channels_in, channels_out)

    def forward(self, x, embedding):
        in_place = not torch.is_grad_enabled()
        y = F.silu(self.norm_1(self.conv_1(x), *self.modulate(embedding).chunk(2, 1)), in_place)
        y = F.silu(self.norm_2(self.conv_2(y)), in_place)
        return y.add_(self.skip(x)) if in_place else y + self.skip(x)


class Convolution(nn.Module):
    """A convolution along time of [B, T, in], padded with zeros: [B, T, out], in the type of its input.

    Weights that are not trained are cast to that type once, not in every call.
    """

    UNFOLD = 512  # from so many channels on, a product with the unfolded input is faster than the library's convolution

    def __init__(self, channels_in, channels_out, kernel_size=1):
        super().__init__()
        bound = 1 / math.sqrt(channels_in * kernel_size)  # as torch's own convolutions begin
        self.weight = nn.Parameter(torch.empty(channels_out, kernel_size, channels_in).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels_out).uniform_(-bound, bound))

    def forward(self, x):
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
    """Group norm of [B, T, channels] over time and the channels of a group; torch's own is slow on this layout."""

    def __init__(self, groups, channels, eps=1e-5):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x, scale=None, shift=None):
        """The normalised x times weight plus bias, then times 1 + scale plus shift, where they are given [1 or B, channels]."""
        weight, bias = self.weight[None], self.bias[None]
        if scale is not None:
            weight, bias = weight * (1 + scale), bias * (1 + scale) + shift
        return _Normalise.apply(x, weight, bias, self.groups, self.eps)


class _Normalise(torch.autograd.Function):
    """Group norm of x [B, T, C] with weight and bias [1 or B, C]. The variance, a difference, is of sums kept in float32.

    With m, r the mean and 1/std of a group: y = (x - m) r w + b, a scale and a shift of every channel. Its gradient is
    r w dy - r A - r² D (x - m), where A and D are the means over the group of w dy and of w dy (x - m) r.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        def mean_of(v):  # over time and the channels of a group: [B, groups, 1]
            sums = v.sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
            return sums.unflatten(1, (groups, -1)).mean(-1, keepdim=True) / x.shape[1]

        mean = mean_of(x)
        inverse = (mean_of(x * x) - mean.square()).clamp_min(0).add(eps).rsqrt()
        factor = inverse * weight.unflatten(1, (groups, -1))
        offset = bias.unflatten(1, (groups, -1)) - mean * factor
        ctx.save_for_backward(x, weight, mean, inverse)
        return torch.addcmul(_of_channels(offset, x), x, _of_channels(factor, x))

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, inverse = ctx.saved_tensors
        groups, count = mean.shape[1], x.shape[1] * x.shape[2] // mean.shape[1]
        d_bias, product = (v.sum(1).to(mean).unflatten(1, (groups, -1)) for v in (dy, dy * x))
        d_weight = inverse * (product - mean * d_bias)
        w = weight.unflatten(1, (groups, -1))
        a, d = ((w * v).sum(-1, keepdim=True) / count for v in (d_bias, d_weight))
        slope = (-inverse.square() * d).expand_as(d_bias)
        dx = torch.addcmul(_of_channels(-inverse * a - slope * mean, x), dy, _of_channels(inverse * w, x))
        dx.addcmul_(x, _of_channels(slope, x))
        return dx, *(v.flatten(1).sum_to_size(weight.shape) for v in (d_weight, d_bias)), None, None


def _of_channels(v, x):
    """Values [B, groups, channels of each] to be broadcast over x [B, T, C], in its type."""
    return v.flatten(1)[:, None].to(x.dtype)


class NoiseEmbedding(nn.Module):
    """Sines and cosines of one number a trajectory, through two layers: [B] -> [B, features]."""

    def __init__(self, features):
        super().__init__()
        half = max(features // 8, 4)
        self.register_buffer("frequencies", torch.exp(torch.linspace(math.log(0.5), math.log(50.0), half)), persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * half, features), nn.SiLU(), nn.Linear(features, features), nn.SiLU())

    def forward(self, noise):
        angles = noise[:, None] * self.frequencies
        return self.layers(torch.cat([angles.sin(), angles.cos()], -1))
