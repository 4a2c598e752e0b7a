"""Discriminators of diffusion GANs: small heads on what a denoiser knows of a noised sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from compressor.errors import RequestError

__all__ = ["BottleneckHead", "MapHead", "make_head"]


class BottleneckHead(nn.Module):
    """Real or generated, from the token map in the middle of a diffusion transformer: logits (B, 1).

    A strided convolution to half the width, group norm, leaky ReLU, a 1x1 convolution, the mean over the map.

    Args:
        width: Channels of the map.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = max(width // 2, 1)
        self.layers = nn.Sequential(
            nn.Conv2d(width, channels, 4, stride=2, padding=1),
            nn.GroupNorm(_groups(channels), channels),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 1, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layers(features)
        return torch.mean(logits, dim=(2, 3))


class MapHead(nn.Module):
    """Real or generated, from a UNet's middle block: logits (B, 1) (DMD2's classification branch).

    Strided convolutions until the map is 4x4 or smaller (one at least), a convolution of the map's size, a 1x1
    convolution; group norm and SiLU behind all but the last. It takes maps of one size only.

    Args:
        width: Channels of the map.
        size: Height and width of the map.
    """

    def __init__(self, width: int, size: tuple[int, int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        while not layers or (max(size) > 4 and min(size) > 1):
            layers += [nn.Conv2d(width, width, 4, stride=2, padding=1), nn.GroupNorm(_groups(width), width), nn.SiLU()]
            size = (size[0] // 2, size[1] // 2)
        layers += [nn.Conv2d(width, width, size), nn.GroupNorm(_groups(width), width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layers(features)
        return logits.flatten(1)


def make_head(features: Tensor, *, tokens: bool) -> nn.Module:
    """A discriminator for maps like this one (B, d, h, w), on its device.

    Args:
        features: Of `Denoiser.bottleneck`.
        tokens: They are a transformer's tokens, not a UNet's middle block.

    Raises:
        RequestError: The map is too small for the head's convolution.
    """
    width, height, columns = features.shape[1:]
    if min(height, columns) < 2:
        raise RequestError(
            f"the discriminator needs a map of at least 2x2, the model makes {height}x{columns}: "
            "take larger samples, or leave the GAN out"
        )
    head = BottleneckHead(width) if tokens else MapHead(width, (height, columns))
    return head.to(features.device)


def _groups(channels: int) -> int:
    """Up to 32 groups of 4 channels at least: on a small map a group of one channel would be left with no contrast."""
    groups = math.gcd(32, max(channels // 4, 1))
    return 1 if channels % groups else groups
