"""Statistics that losses compare: means over a selection, means of each class."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import RequestError

__all__ = ["class_means", "masked_mean", "squared_class_mean_distance"]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the selected entries; 0 where nothing is selected, and still differentiable.

    Args:
        values: Any shape, float.
        mask: The same shape, bool. Entries outside it may be anything, NaN included.

    Returns:
        Scalar of the dtype of ``values``.
    """
    selected = torch.where(mask, values, torch.zeros_like(values))
    return selected.sum() / mask.sum().clamp(min=1)


def class_means(x: Tensor, num_classes: int) -> Tensor:
    """Mean of each class of a class-blocked batch.

    Args:
        x: ``(num_classes * n, ...)``: n rows of the first class, then n of the second, ...
        num_classes: Number of classes, equally many rows each.

    Returns:
        ``(num_classes, ...)``.

    Raises:
        RequestError: The rows cannot be divided equally among the classes.
    """
    if num_classes < 1 or x.shape[0] == 0 or x.shape[0] % num_classes:
        raise RequestError(
            f"{x.shape[0]} rows cannot be split into {num_classes} classes of equal size: draw as many of each class"
        )
    return x.unflatten(0, (num_classes, -1)).mean(dim=1)


def squared_class_mean_distance(x: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Sum over classes and coordinates of the squared difference of the class means.

    Args:
        x: ``(num_classes * n, ...)``, class-blocked.
        y: ``(num_classes * m, ...)``, class-blocked in the same order of classes; n and m may differ.
        num_classes: Number of classes.

    Returns:
        Scalar, at least 0.
    """
    return (class_means(x, num_classes) - class_means(y, num_classes)).square().sum()
