"""The small convolutional network of the data set distillation literature; no library has it.

``depth`` blocks of [3x3 convolution, norm, ReLU, 2x2 average pooling] and one linear layer (Gidaris & Komodakis 2018,
as Zhao et al. use it for dataset condensation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import RequestError
from compressor.models.model import Model, ModelInfo

__all__ = ["ConvNet", "convnet_depth", "convnet_model", "random_convnet"]

Norm = Literal["batch", "instance", "none"]


class ConvNet(nn.Module):
    """The network.

    Args:
        channels: Of the images.
        size: (H, W) of the images, the only one that it takes.
        classes: Number of classes.
        width: Channels of every block.
        depth: Blocks; each halves the edges.
        norm: "batch", "instance" (one group a channel, with weights and biases) or "none".

    Raises:
        RequestError: The images are too small for so many blocks.
    """

    def __init__(
        self,
        channels: int,
        size: Sequence[int],
        classes: int,
        width: int = 128,
        depth: int = 3,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        if min(size) < 2**depth:
            raise RequestError(
                f"images of {size[0]}x{size[1]} are too small for a ConvNet of {depth} blocks: "
                f"edges of at least {2**depth}, or a smaller depth"
            )
        first = _first_padding(channels, size, depth)
        widths = [channels, *([width] * depth)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(widths[k], width, 3, padding=first if k == 0 else 1) for k in range(depth)
        )
        self.norms = nn.ModuleList(_norm(norm, width) for _ in range(depth))
        edges = [(edge + 2 * (first - 1)) >> depth for edge in size]
        self.classifier = nn.Linear(width * edges[0] * edges[1], classes)

    def features(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """What every block holds after its ReLU and before its pooling, and the embedding.

        Args:
            image: ``(B, C, H, W)`` float, normalised.

        Returns:
            ``depth`` maps ``(B, width, H_l, W_l)``, shallow to deep, and the flattened output of the last pooling
            ``(B, D)``.
        """
        maps = []
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            maps.append(F.relu(norm(convolution(image))))
            image = F.avg_pool2d(maps[-1], 2)
        return maps, image.flatten(1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``(B, classes)`` of normalised images ``(B, C, H, W)``."""
        logits: Tensor = self.classifier(self.features(image)[1])
        return logits


def _norm(kind: Norm, width: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(width)
    return nn.GroupNorm(width, width) if kind == "instance" else nn.Identity()


def _first_padding(channels: int, size: Sequence[int], depth: int) -> int:
    """3 where that makes gray images divisible, as in the official code (28 becomes 32); else 1."""
    whole = 2**depth
    divisible = all(edge % whole == 0 for edge in size)
    padded = all((edge + 4) % whole == 0 for edge in size)
    return 3 if channels == 1 and padded and not divisible else 1


def convnet_depth(size: Sequence[int]) -> int:
    """The usual depth for images (H, W): 3 blocks up to 47 pixels, 4 up to 95, 6 beyond; fewer for tiny images."""
    edge = min(size)
    usual = 3 if edge < 48 else 4 if edge < 96 else 6
    return max(1, min(usual, edge.bit_length() - 1))


def convnet_model(
    channels: int, size: Sequence[int], classes: int, *, width: int = 128, depth: int | None = None, norm: Norm
) -> Model:
    """The network as a model that its description rebuilds; random weights of the global generator.

    Args:
        channels, size, classes, width, norm: As of `ConvNet`.
        depth: None for `convnet_depth`.
    """
    config = {
        "channels": channels,
        "size": list(size),
        "classes": classes,
        "width": width,
        "depth": convnet_depth(size) if depth is None else depth,
        "norm": norm,
    }
    module = ConvNet(channels, size, classes, width, depth or convnet_depth(size), norm)
    extra = {"channels": channels, "size": list(size)}
    return Model(module, ModelInfo("python", f"{ConvNet.__module__}:ConvNet", config, (), extra))


def random_convnet(
    seed: int, channels: int, size: Sequence[int], classes: int, width: int, depth: int, norm: Norm
) -> ConvNet:
    """A network whose weights follow from the seed; the global generator stays as it is.

    Args:
        seed: In [0, 2^63).
        channels, size, classes, width, depth, norm: As of `ConvNet`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return ConvNet(channels, size, classes, width, depth, norm)
