"""The temporal U-Net: residual blocks of convolutions along time, the noise level in every block (sizes: Table 3)."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class UNet(nn.Module):
    """A function of trajectories [B, T, channels] and one number each [B], of the same shape as the trajectories.

    `blocks` levels of resolution, the first with `features` channels, each deeper one with twice as many at half the length.
    T must be divisible by 2**(blocks - 1).
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
        self.enter = nn.Conv1d(channels, features, 1)
        self.down = nn.ModuleList(ResidualBlock(i, o, **same) for i, o in zip([features, *widths], widths))
        self.narrow = nn.ModuleList(nn.Conv1d(2 * w, w, 1) for w in reversed(widths[:-1]))
        self.up = nn.ModuleList(ResidualBlock(2 * w, w, **same) for w in reversed(widths[:-1]))
        self.leave = nn.Conv1d(features, channels, 1)
        self.stride = 2 ** (blocks - 1)

    def forward(self, x, noise):
        if x.shape[1] % self.stride:
            raise ValueError(f"horizon={x.shape[1]} is not allowed; it must be divisible by {self.stride}")
        embedding = self.embed(noise)
        x = self.enter(x.transpose(1, 2))  # [B, features, T]
        skips = []
        for block in self.down:
            x = block(F.max_pool1d(x, 2) if skips else x, embedding)
            skips.append(x)
        for narrow, block, skip in zip(self.narrow, self.up, reversed(skips[:-1])):
            x = torch.cat([F.interpolate(narrow(x), scale_factor=2), skip], 1)
            x = block(x, embedding)
        return self.leave(x).transpose(1, 2)


class ResidualBlock(nn.Module):
    """Twice convolution, group norm and SiLU, added to the input; the noise level scales and shifts the first norm."""

    def __init__(self, channels_in, channels_out, embedding, kernel_size, groups):
        super().__init__()
        conv = dict(kernel_size=kernel_size, padding=kernel_size // 2)
        self.conv_1 = nn.Conv1d(channels_in, channels_out, **conv)
        self.conv_2 = nn.Conv1d(channels_out, channels_out, **conv)
        self.norm_1 = nn.GroupNorm(groups, channels_out)
        self.norm_2 = nn.GroupNorm(groups, channels_out)
        self.modulate = nn.Linear(embedding, 2 * channels_out)
        self.skip = nn.Identity() if channels_in == channels_out else nn.Conv1d(channels_in, channels_out, 1)

    def forward(self, x, embedding):
        scale, shift = self.modulate(embedding)[:, :, None].chunk(2, 1)
        y = F.silu(self.norm_1(self.conv_1(x)) * (1 + scale) + shift)
        return self.skip(x) + F.silu(self.norm_2(self.conv_2(y)))


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
