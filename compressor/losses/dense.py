"""Losses on dense maps: the cross-entropy of each pixel, and means over the regions of a grid."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.losses.precision import at_least_float32
from compressor.losses.statistics import masked_mean

__all__ = ["map_cross_entropy", "pixel_cross_entropy", "region_mean"]


def pixel_cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = 255) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every pixel, and which pixels count.

    Args:
        logits: ``(B, K, H, W)`` float.
        labels: ``(B, H, W)`` int64 in ``0..K-1``, or ``ignore_index``.
        ignore_index: The label of pixels that do not count.

    Returns:
        ``(cross_entropy, valid)``, both ``(B, H, W)``: nats (0 where ignored), float32 or wider; and bool.
    """
    cross_entropy = F.cross_entropy(at_least_float32(logits), labels, ignore_index=ignore_index, reduction="none")
    return cross_entropy, labels != ignore_index


def map_cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Cross-entropy with a mask, mean over the pixels that count; a differentiable 0 where none does.

    Args:
        logits: ``(B, K, H, W)`` float.
        labels: ``(B, H, W)`` int64 in ``0..K-1``, or ``ignore_index``.
        ignore_index: The label of pixels that do not count.

    Returns:
        Scalar in nats, float32 or wider.
    """
    cross_entropy, valid = pixel_cross_entropy(logits, labels, ignore_index=ignore_index)
    return masked_mean(cross_entropy, valid)


def region_mean(values: Tensor, valid: Tensor, grid_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Mean over the valid pixels of each region of a grid.

    Region ``(i, j)`` covers the rows ``floor(i H / gh)`` to ``ceil((i + 1) H / gh)`` and likewise the columns, so
    regions overlap by a row where the grid does not divide the image.

    Args:
        values: ``(B, H, W)`` float.
        valid: ``(B, H, W)`` bool.
        grid_size: ``(gh, gw)``.

    Returns:
        ``(means, occupied)``, both ``(B, gh, gw)``: the means (0 where no pixel is valid), and whether any is.
    """
    share = F.adaptive_avg_pool2d(valid.to(values.dtype)[:, None], grid_size)[:, 0]
    total = F.adaptive_avg_pool2d(torch.where(valid, values, torch.zeros_like(values))[:, None], grid_size)[:, 0]
    occupied = share > 0
    return torch.where(occupied, total / torch.where(occupied, share, torch.ones_like(share)), total), occupied
