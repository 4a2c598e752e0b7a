"""Distances between two sets of feature vectors, and how varied one set is: the figures of generative models."""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist

from compressor.errors import RequestError
from compressor.runtimes.runtime import Array

__all__ = ["frechet_distance", "kernel_distance", "pairwise_diversity"]

_BLOCK = 1024
"""Rows of a pairwise matrix that are held at once."""


def frechet_distance(features_a: Array, features_b: Array) -> float:
    """Squared Frechet distance between normal distributions fitted to two sets (FID is this, on Inception's features).

    With centred rows A / sqrt(n - 1), the trace of the square root of the covariances' product is the sum of the
    singular values of A Bᵀ. That holds for covariances of any rank, so few samples of long features need neither a
    ridge nor a complex square root. A and B enter through their triangular factors, at most D x D.

    Args:
        features_a: Shape (N, D), N at least 2; any real dtype, computed in float64.
        features_b: Shape (M, D), M at least 2.

    Returns:
        At least 0; 0 for equal means and covariances.

    Raises:
        RequestError: The shapes do not fit, or a feature is not finite.
    """
    a, b = _pair(features_a, features_b)
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    root_a = np.asarray(np.linalg.qr((a - mean_a) / np.sqrt(len(a) - 1), mode="r"))
    root_b = np.asarray(np.linalg.qr((b - mean_b) / np.sqrt(len(b) - 1), mode="r"))
    overlap = np.linalg.norm(root_a @ root_b.T, ord="nuc")
    distance = np.sum((mean_a - mean_b) ** 2) + np.sum(root_a**2) + np.sum(root_b**2) - 2 * overlap
    return max(0.0, float(distance))


def kernel_distance(features_a: Array, features_b: Array) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x·y / D + 1)³ (KID, on Inception's features).

    All samples are used at once, so there is no spread over random subsets to report.

    Args:
        features_a: Shape (N, D), N at least 2.
        features_b: Shape (M, D), M at least 2.

    Returns:
        About 0 for equal distributions; may be slightly negative, as the estimate is unbiased.

    Raises:
        RequestError: The shapes do not fit, or a feature is not finite.
    """
    a, b = _pair(features_a, features_b)
    n, m = len(a), len(b)
    within_a = (_kernel_sum(a, a) - _kernel_diagonal(a)) / (n * (n - 1))
    within_b = (_kernel_sum(b, b) - _kernel_diagonal(b)) / (m * (m - 1))
    return float(within_a + within_b - 2 * _kernel_sum(a, b) / (n * m))


def pairwise_diversity(features: Array, labels: Array | None = None) -> float:
    """Mean Euclidean distance between two different samples, of the same class where labels are given.

    Args:
        features: Shape (N, ...); flattened per sample (pixels or features).
        labels: Shape (N,). Each class with at least 2 samples counts alike; the others are left out.

    Returns:
        At least 0; NaN when no class (or the whole set) has 2 samples.
    """
    rows = np.asarray(features, dtype=np.float64).reshape(len(features), -1)
    groups = [rows] if labels is None else [rows[np.asarray(labels) == label] for label in np.unique(labels)]
    means = [_mean_distance(group) for group in groups if len(group) > 1]
    return float(np.mean(means)) if means else float("nan")


def _mean_distance(rows: Array) -> float:
    total = sum(cdist(rows[start : start + _BLOCK], rows).sum() for start in range(0, len(rows), _BLOCK))
    return float(total) / (len(rows) * (len(rows) - 1))


def _kernel_sum(a: Array, b: Array) -> float:
    blocks = (a[start : start + _BLOCK] for start in range(0, len(a), _BLOCK))
    return float(sum(((block @ b.T / a.shape[1] + 1.0) ** 3).sum() for block in blocks))


def _kernel_diagonal(a: Array) -> float:
    return float(((np.sum(a * a, axis=1) / a.shape[1] + 1.0) ** 3).sum())


def _pair(features_a: Array, features_b: Array) -> tuple[Array, Array]:
    a, b = (np.asarray(features, dtype=np.float64) for features in (features_a, features_b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2 or a.shape[1] == 0:
        raise RequestError(
            f"a distance needs two sets of at least 2 feature vectors of one length, not {a.shape} and {b.shape}"
        )
    for name, values in (("first", a), ("second", b)):
        if not np.isfinite(values).all():
            raise RequestError(f"the {name} set of features holds NaN or infinity: check the model's outputs")
    return a, b
