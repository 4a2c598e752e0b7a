"""Relations between the samples of a batch: distances, angles, correlations."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.losses.features import cosine_similarity, unit_vectors
from compressor.losses.precision import at_least_float32

__all__ = ["pairwise_distances", "pearson_correlation", "triplet_angles"]


def pairwise_distances(x: Tensor) -> Tensor:
    """Euclidean distances between all rows.

    Args:
        x: ``(N, D)`` float.

    Returns:
        ``(N, N)``, symmetric, with exact zeros on the diagonal; float32 or wider. Equal rows have gradient 0.
    """
    x = at_least_float32(x)
    # The matrix-product shortcut leaves rounding noise where the distance is 0.
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def triplet_angles(x: Tensor) -> Tensor:
    """Cosines of the angles that all triplets of rows form.

    Args:
        x: ``(N, D)`` float.

    Returns:
        ``(N, N, N)`` in [-1, 1]: entry ``[j, i, k]`` is the cosine of the angle at row j between rows i and k, 0 where
        the row i or k equals the row j; float32 or wider. Memory grows with ``N ** 2 * (N + D)``.
    """
    x = at_least_float32(x)
    directions = unit_vectors(x[None, :, :] - x[:, None, :])
    return directions @ directions.transpose(1, 2)


def pearson_correlation(x: Tensor, y: Tensor, *, dim: int = -1, eps: float = 1e-8) -> Tensor:
    """Pearson's correlation coefficient along one axis.

    Args:
        x: Float, any shape.
        y: The same shape.
        dim: The axis of the observations.
        eps: A side whose centred norm is up to this does not vary: the coefficient is 0, without gradient.

    Returns:
        The shape without ``dim``, in [-1, 1]; float32 or wider.
    """
    x, y = at_least_float32(x), at_least_float32(y)
    return cosine_similarity(x - x.mean(dim, keepdim=True), y - y.mean(dim, keepdim=True), dim=dim, eps=eps)
