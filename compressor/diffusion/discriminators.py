"""Discriminators of diffusion GANs: small heads on what a denoiser knows of a noised sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from compressor.errors import RequestError

__all__ = ["BottleneckHead"]


class BottleneckHead(nn.Module):
    """Real or generated, from the token map in the middle of a diffusion transformer: logits (B, 1).

    A strided convolution to half the width, group norm, leaky ReLU, a 1x1 convolution, the mean over the map.

    Args:
        width: Channels of the map.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = max(width // 2, 1)
        # up to 32 groups, of 4 channels at least: on a small map a group of one channel would be left with no contrast
        groups = math.gcd(32, max(channels // 4, 1))
        if channels % groups:
            groups = 1
        self.layers = nn.Sequential(
            nn.Conv2d(width, channels, 4, stride=2, padding=1),
            nn.GroupNorm(groups, channels),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 1, 1),
        )

    @classmethod
    def like(cls, features: Tensor) -> BottleneckHead:
        """A head for maps like this one (B, d, h, w), on its device.

        Raises:
            RequestError: The map is too small for the head's convolution.
        """
        width, height, columns = features.shape[1:]
        if min(height, columns) < 2:
            raise RequestError(
                f"the discriminator needs a map of at least 2x2 tokens, the model makes {height}x{columns}: "
                "take larger samples, or leave the GAN out"
            )
        return cls(width).to(features.device)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layers(features)
        return torch.mean(logits, dim=(2, 3))
