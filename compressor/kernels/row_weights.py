"""The factor of each row in a loss: mask, weight, and the divisor of a mean over the rows that count."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from compressor.errors import RequestError

__all__ = ["check_row_weights", "row_factors"]


def check_row_weights(shape: Sequence[int], mask: Tensor | None, weights: Tensor | None = None) -> None:
    """Refuse masks and weights that do not hold one entry a row.

    Raises:
        RequestError: A shape or dtype is wrong.
    """
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != tuple(shape)):
        raise RequestError(f"mask must be bool of shape {tuple(shape)}, not {mask.dtype} {tuple(mask.shape)}")
    if weights is not None and tuple(weights.shape) != tuple(shape):
        raise RequestError(f"weights must have the shape {tuple(shape)}, not {tuple(weights.shape)}")


def row_factors(
    like: Tensor, shape: Sequence[int], mask: Tensor | None, weights: Tensor | None = None, *, mean: bool
) -> Tensor:
    """Factors that turn a sum over rows into the wanted loss.

    Args:
        like: Gives the device, and the dtype together with float32: the wider one.
        shape: One entry a row.
        mask: Bool of that shape: rows outside it get 0.
        weights: Float of that shape.
        mean: Divide by the number of rows that the mask keeps (at least 1), whatever their weights.

    Returns:
        The shape, detached; an expanded scalar where all rows are alike.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    count = math.prod(shape)
    if mask is None:
        share = 1.0 / max(count, 1) if mean else 1.0
        if weights is None:
            return torch.full((), share, dtype=dtype, device=like.device).expand(tuple(shape))
        return weights.detach().to(dtype) * share
    factors = mask.to(dtype) / mask.sum().clamp(min=1) if mean else mask.to(dtype)
    # Not a product: weights outside the mask may be anything.
    return factors if weights is None else torch.where(mask, factors * weights.detach().to(dtype), 0)
