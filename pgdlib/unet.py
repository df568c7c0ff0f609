"""The temporal U-Net: residual blocks of convolutions along time, the noise level in every block (sizes: Table 3).

Trajectories stay [B, T, channels] throughout: convolutions are then matrix products without a change of layout.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgdlib.fast import Convolution, GroupNorm


class UNet(nn.Module):
    """A function of trajectories [B, T, channels] and one number each [B], of the same shape as the trajectories.

    `blocks` levels of resolution, the first with `features` channels, each deeper one with twice as many at half the length.
    T must be divisible by 2**(blocks - 1). One number alone [1] stands for all trajectories. All is computed in the type of
    the trajectories; the embedding in that of the weights, the statistics of group norm in float32 or better.
    """

    def __init__(self, channels: int, features: int = 1024, blocks: int = 2, kernel_size: int = 3, groups: int = 8):
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

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """[B, T, channels] at x [B, T, channels], noise [B] or [1]."""
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

    def __init__(self, channels_in: int, channels_out: int, embedding: int, kernel_size: int, groups: int):
        super().__init__()
        self.conv_1 = Convolution(channels_in, channels_out, kernel_size)
        self.conv_2 = Convolution(channels_out, channels_out, kernel_size)
        self.norm_1 = GroupNorm(groups, channels_out)
        self.norm_2 = GroupNorm(groups, channels_out)
        self.modulate = nn.Linear(embedding, 2 * channels_out)
        self.skip = nn.Identity() if channels_in == channels_out else Convolution(channels_in, channels_out)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """[B, T, channels_out] at x [B, T, channels_in], embedding [B or 1, embedding]."""
        in_place = not torch.is_grad_enabled()
        y = F.silu(self.norm_1(self.conv_1(x), *self.modulate(embedding).chunk(2, 1)), in_place)
        y = F.silu(self.norm_2(self.conv_2(y)), in_place)
        return y.add_(self.skip(x)) if in_place else y + self.skip(x)


class NoiseEmbedding(nn.Module):
    """Sines and cosines of one number a trajectory, through two layers: [B] -> [B, features]."""

    def __init__(self, features: int):
        super().__init__()
        half = max(features // 8, 4)
        self.register_buffer("frequencies", torch.exp(torch.linspace(math.log(0.5), math.log(50.0), half)), persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * half, features), nn.SiLU(), nn.Linear(features, features), nn.SiLU())

    def forward(self, noise: Tensor) -> Tensor:
        """[B, features] at noise [B]."""
        angles = noise[:, None] * self.frequencies
        return self.layers(torch.cat([angles.sin(), angles.cos()], -1))
