"""Differentiable augmentation, the same for two batches: DSA (Zhao & Bilen 2021, "siamese augmentation").

One operation is drawn a call, with its parameters: for all images alike (``shared``, so that a batch of real images and
one of synthetic images undergo the same change), or for every image anew. All draws come from the generator given, so
two calls with generators of one seed do the same; gradients flow through to the pixels.

    color    brightness, saturation, contrast      flip     mirrored, every second time
    crop     moved by up to an eighth, zeros fill   scale    stretched by 1/1.2 to 1.2 along each axis
    cutout   a square of half the edge set to zero  rotate   by up to 15 degrees
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.data.dataset import DataInfo
from compressor.data.views import chosen_augmentation

__all__ = ["OPERATIONS", "Operation", "siamese_augmentation", "suitable_operations"]

Operation = Literal["color", "crop", "cutout", "flip", "scale", "rotate"]
OPERATIONS: tuple[Operation, ...] = ("color", "crop", "cutout", "flip", "scale", "rotate")
"""All of them."""

BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5
CROP, CUTOUT, SCALE, DEGREES = 0.125, 0.5, 1.2, 15.0

Draw = Callable[[], Tensor]
"""Uniform numbers in [0, 1) of shape (B, 1, 1, 1), or (1, 1, 1, 1) where all images share them."""


def siamese_augmentation(
    images: Tensor, operations: Sequence[Operation], generator: torch.Generator, *, shared: bool
) -> Tensor:
    """Change images by one operation.

    Args:
        images: ``(B, C, H, W)`` float, normalised: what is cut off becomes 0.
        operations: One of them is drawn; none leaves the images alone.
        generator: On the CPU.
        shared: All images undergo the same, and the draws do not depend on B.

    Returns:
        A tensor of the same shape.
    """
    if not operations:
        return images
    chosen = operations[int(torch.randint(len(operations), (), generator=generator))]
    count = 1 if shared else len(images)

    def draw() -> Tensor:
        return torch.rand((count, 1, 1, 1), generator=generator).to(images)

    return _CHANGES[chosen](images, draw)


def suitable_operations(info: DataInfo) -> tuple[Operation, ...]:
    """All operations, without the flip for sets whose pictures must not be mirrored (gray ones, by default)."""
    flips = chosen_augmentation("auto", info).endswith("-flip")
    return tuple(name for name in OPERATIONS if flips or name != "flip")


def _color(images: Tensor, draw: Draw) -> Tensor:
    images = images + (draw() - 0.5) * BRIGHTNESS
    gray = images.mean(dim=1, keepdim=True)
    images = (images - gray) * (draw() * SATURATION) + gray
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (draw() + CONTRAST) + mean


def _crop(images: Tensor, draw: Draw) -> Tensor:
    for dim in (2, 3):
        edge = images.shape[dim]
        reach = int(edge * CROP + 0.5)
        start = (draw() * (2 * reach + 1)).long().clamp(max=2 * reach)
        places = start + _axis(images, dim, edge).long()
        padding = (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0)
        images = torch.take_along_dim(F.pad(images, padding), places, dim=dim)
    return images


def _cutout(images: Tensor, draw: Draw) -> Tensor:
    inside = torch.ones((), dtype=torch.bool, device=images.device)
    for dim in (2, 3):
        edge = images.shape[dim]
        size = int(edge * CUTOUT + 0.5)
        first = (draw() * edge).floor() - size // 2
        places = _axis(images, dim, edge)
        inside = inside & (places >= first) & (places < first + size)
    return torch.where(inside, torch.zeros_like(images), images)


def _flip(images: Tensor, draw: Draw) -> Tensor:
    return torch.where(draw() < 0.5, images.flip(3), images)


def _scale(images: Tensor, draw: Draw) -> Tensor:
    low = 1 / SCALE
    x, y = (low + draw().flatten() * (SCALE - low) for _ in range(2))
    zero = torch.zeros_like(x)
    return _warped(images, torch.stack([x, zero, zero, zero, y, zero], dim=1))


def _rotate(images: Tensor, draw: Draw) -> Tensor:
    angle = (2 * draw().flatten() - 1) * math.radians(DEGREES)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return _warped(images, torch.stack([cos, -sin, zero, sin, cos, zero], dim=1))


def _warped(images: Tensor, theta: Tensor) -> Tensor:
    theta = theta.view(-1, 2, 3).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _axis(images: Tensor, dim: int, edge: int) -> Tensor:
    """Places 0..edge-1 along one axis of (1, 1, H, W)."""
    shape = [1, 1, 1, 1]
    shape[dim] = edge
    return torch.arange(edge, device=images.device, dtype=images.dtype).view(shape)


_CHANGES: dict[str, Callable[[Tensor, Draw], Tensor]] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}
