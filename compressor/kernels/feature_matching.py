"""Distances between features of student and teacher: squared error, normalised squared error, cosine, attention maps.

Cost, for tensors of n numbers: with a gradient 3 n are moved (two reads, one write) where the features of a place fit
in the registers of a program, 5 n elsewhere; without a gradient 2 n. "attention_transfer" reads both once, and its
backward pass reads the student once more and writes its gradient. Plain PyTorch moves 8 n to 20 n.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.errors import RequestError, nearest
from compressor.kernels.dispatch import use_triton
from compressor.kernels.row_layout import as_dims, row_layout, row_shape
from compressor.kernels.row_weights import check_row_weights, row_factors

__all__ = ["feature_distance"]

FeatureMode = Literal["mse", "normalized_mse", "cosine", "attention_transfer"]
FEATURE_MODES = ("mse", "normalized_mse", "cosine", "attention_transfer")
EPSILONS = {"mse": 0.0, "normalized_mse": 1e-12, "cosine": 1e-8}
"""Vectors up to this norm have no direction."""
_MAP_EPSILON = 1e-12


def feature_distance(
    student: Tensor,
    teacher: Tensor,
    mode: FeatureMode = "mse",
    mask: Tensor | None = None,
    *,
    dim: int = 1,
    power: float = 2.0,
) -> Tensor:
    """Mean distance of two feature tensors; the teacher gets no gradient.

    A place is one entry of the shape without ``dim``, a vector what lies along ``dim`` there.

    - "mse": squared difference, mean over the places and along ``dim``.
    - "normalized_mse": ``|s / |s| - t / |t||^2``, summed along ``dim``, mean over the places: in [0, 4].
    - "cosine": ``1 - cos(s, t)``, mean over the places: in [0, 2].
    - "attention_transfer": each sample's map ``sum |x| ** power`` along ``dim``, divided by its L2 norm over the
      places (Zagoruyko & Komodakis 2017); squared difference of the maps, mean over samples and places.

    Directions of vectors that are (almost) zero are taken for zero vectors: distance 1 from any other, and no
    gradient. To clamp their norm instead would give a dead activation a gradient of order 1e8.

    Args:
        student: Float, ``(B, ...)``: ``(B, C, H, W)`` as it is, tokens ``(B, N, C)`` with ``dim=-1``.
        teacher: The same shape; for "attention_transfer" the size along ``dim`` may differ.
        mode: Which distance.
        mask: Bool, the shape without ``dim``: the places that count. Others are not read; in a map they are 0.
        dim: The axis of the vectors; not the first for "attention_transfer".
        power: Exponent of the maps, at least 1.

    Returns:
        Scalar, float32 or wider; 0 where the mask keeps nothing.

    Raises:
        RequestError: Shapes or options do not fit together.
    """
    if mode not in FEATURE_MODES:
        raise RequestError(f"no feature distance is named {mode!r}: {nearest(str(mode), FEATURE_MODES)}")
    if student.ndim != teacher.ndim or student.ndim < 1:
        raise RequestError(f"features must have the same axes, not {tuple(student.shape)} and {tuple(teacher.shape)}")
    (axis,) = as_dims(dim, student.ndim)
    shape = row_shape(student.shape, (axis,))
    if shape != row_shape(teacher.shape, (axis,)):
        raise RequestError(f"features must have the same places, not {tuple(student.shape)} and {tuple(teacher.shape)}")
    check_row_weights(shape, mask)
    teacher = teacher.detach()
    factors = row_factors(student, shape, mask, mean=True)
    if mode == "attention_transfer":
        if axis == 0 or not power >= 1:
            raise RequestError("attention_transfer needs samples along the first axis and a power of at least 1")
        return _attention_transfer(student, teacher, mask, factors, axis, power)
    if student.shape != teacher.shape:
        raise RequestError(
            f"student features {tuple(student.shape)} and teacher features {tuple(teacher.shape)} differ: "
            f"project the student first; {mode!r} compares vectors of one length"
        )
    if student.numel() and use_triton(student, teacher):
        from compressor.kernels.feature_matching_triton import Distances

        student, teacher, axis = _walkable(student, teacher, axis)
        if student.dtype == torch.float16:
            # Stored before the loss scale, gradients divided by the number of places would vanish.
            rows = Distances.apply(student, teacher, (factors != 0).to(factors.dtype), mode, axis) * factors
        else:
            rows = Distances.apply(student, teacher, factors, mode, axis)
        return rows.sum()
    return reference_distances(student, teacher, factors, mode, axis).sum()


def _walkable(student: Tensor, teacher: Tensor, axis: int) -> tuple[Tensor, Tensor, int]:
    gradient = torch.empty_like(student, device="meta")
    if row_layout([student, teacher, gradient], (axis,)) is not None:
        return student, teacher, axis
    return student.movedim(axis, -1).contiguous(), teacher.movedim(axis, -1).contiguous(), student.ndim - 1


def reference_distances(student: Tensor, teacher: Tensor, factors: Tensor, mode: str, axis: int) -> Tensor:
    """Each place's distance times its factor, in plain PyTorch."""
    wide = torch.promote_types(student.dtype, torch.float32)
    counts = (factors != 0).unsqueeze(axis)
    zero = torch.zeros((), dtype=wide, device=student.device)
    student, teacher = torch.where(counts, student.to(wide), zero), torch.where(counts, teacher.to(wide), zero)
    if mode == "mse":
        distances = (student - teacher).square().mean(dim=axis)
    else:
        student, teacher = (_directions(x, axis, EPSILONS[mode]) for x in (student, teacher))
        if mode == "normalized_mse":
            distances = (student - teacher).square().sum(dim=axis)
        else:
            distances = 1 - (student * teacher).sum(dim=axis)
    return distances * factors


def _directions(x: Tensor, axis: int, eps: float) -> Tensor:
    norm = x.norm(dim=axis, keepdim=True)
    return x / norm.masked_fill(norm <= eps, math.inf)


def _attention_transfer(
    student: Tensor, teacher: Tensor, mask: Tensor | None, factors: Tensor, axis: int, power: float
) -> Tensor:
    maps = []
    for features in (student, teacher):
        activity = _activity(features, axis, power)
        if mask is not None:
            activity = torch.where(mask, activity, torch.zeros_like(activity))
        maps.append(F.normalize(activity.flatten(start_dim=1), dim=1, eps=_MAP_EPSILON))
    return ((maps[0] - maps[1]).square() * factors.reshape(maps[0].shape)).sum()


def _activity(features: Tensor, axis: int, power: float) -> Tensor:
    """``sum |x| ** power`` along an axis, float32 or wider."""
    if features.numel() and use_triton(features):
        from compressor.kernels.feature_matching_triton import PowerSums

        if row_layout([features, torch.empty_like(features, device="meta")], (axis,)) is None:
            features, axis = features.movedim(axis, -1).contiguous(), features.ndim - 1
        return PowerSums.apply(features, float(power), axis)
    return reference_activity(features, axis, power)


def reference_activity(features: Tensor, axis: int, power: float) -> Tensor:
    """`_activity` in plain PyTorch."""
    return features.to(torch.promote_types(features.dtype, torch.float32)).abs().pow(power).sum(dim=axis)
