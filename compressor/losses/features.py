"""Losses and maps that compare features: cosines, spatial attention maps, attention transfer."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from compressor.kernels import feature_distance
from compressor.losses.precision import at_least_float32

__all__ = ["attention_transfer_loss", "cosine_similarity", "spatial_attention_map", "unit_vectors"]


def unit_vectors(x: Tensor, *, dim: int = -1, eps: float = 1e-8) -> Tensor:
    """Divide vectors by their L2 norm; those shorter than ``eps`` become 0 and get no gradient.

    Clamping the norm instead would hand a zero vector (a dead ReLU, equal logits) a gradient of order ``1 / eps``.

    Args:
        x: Float, any shape.
        dim: The axis of the vectors.
        eps: Norms up to here count as 0.

    Returns:
        The shape of ``x``; float32 or wider.
    """
    x = at_least_float32(x)
    norm = x.norm(dim=dim, keepdim=True)
    return x / norm.masked_fill(norm <= eps, float("inf"))


def cosine_similarity(x: Tensor, y: Tensor, *, dim: int = -1, eps: float = 1e-8) -> Tensor:
    """Cosine of the angle between two vectors, 0 where one of them is a zero vector (see `unit_vectors`).

    Args:
        x: Float, any shape.
        y: The same shape.
        dim: The axis of the vectors.
        eps: Norms up to here count as 0.

    Returns:
        The shape without ``dim``, in [-1, 1]; float32 or wider.
    """
    return (unit_vectors(x, dim=dim, eps=eps) * unit_vectors(y, dim=dim, eps=eps)).sum(dim=dim)


def spatial_attention_map(features: Tensor, *, power: float = 4.0, eps: float = 1e-12) -> Tensor:
    """Where a layer is active: ``sum_c |F_c| ** power``, flattened and divided by its L2 norm.

    Zagoruyko & Komodakis 2017, section 3.1 (``F_sum^p``, normalised as in eq. 2); DataDAM uses the same map.

    Args:
        features: ``(B, C, H, W)`` float, any sign.
        power: Exponent of the absolute values, at least 1: the larger, the more the map follows its peaks.
        eps: Lower clamp of the norm; an all-zero map stays zero.

    Returns:
        ``(B, H * W)`` in the dtype of the features, at least 0, each row of L2 norm 1. It is computed in float32 or
        wider, because fourth powers overflow float16.
    """
    activity = at_least_float32(features).abs().pow(power).sum(dim=1).flatten(start_dim=1)
    return F.normalize(activity, dim=1, eps=eps).to(features.dtype)


def attention_transfer_loss(student_features: Tensor, teacher_features: Tensor, *, power: float = 2.0) -> Tensor:
    """Squared difference of two normalised attention maps, mean over batch and positions.

    The larger map is average-pooled to the smaller one's size first. The teacher is detached.

    Args:
        student_features: ``(B, C_s, H_s, W_s)`` float.
        teacher_features: ``(B, C_t, H_t, W_t)`` float; the channels may differ.
        power: Exponent of the maps.

    Returns:
        Scalar, float32 or wider.
    """
    height = min(student_features.shape[-2], teacher_features.shape[-2])
    width = min(student_features.shape[-1], teacher_features.shape[-1])
    student, teacher = (_pool(features, (height, width)) for features in (student_features, teacher_features.detach()))
    return feature_distance(student, teacher, "attention_transfer", power=power)


def _pool(features: Tensor, size: tuple[int, int]) -> Tensor:
    return features if features.shape[-2:] == size else F.adaptive_avg_pool2d(at_least_float32(features), size)
