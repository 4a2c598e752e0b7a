"""Distillation losses from logits: KL, reverse KL and Jensen-Shannon, alone or together with cross-entropy.

Softmaxes are never stored. On a GPU one launch reads each row of the student's and the teacher's logits, and writes
the row's value and its gradient; the backward pass multiplies that gradient by what comes from above, and returns at
once where that is 1.

Cost, for N rows of V classes: 3 N V numbers are moved with a gradient (two reads, one write) and 2 N V without, where
a row fits in the registers of a program (see `configurations`). Longer rows are read twice, for "jsd" with a gradient
three times, the later times from the end back, so that the cache serves part of them. Extra memory: the gradient, and
a few numbers a row. The kernels have first derivatives only; the references have all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.errors import RequestError, nearest
from compressor.kernels.dispatch import use_triton
from compressor.kernels.row_layout import as_dims, as_rows, row_layout, row_shape
from compressor.kernels.row_weights import check_row_weights, row_factors

__all__ = ["CrossEntropyAndKL", "Divergence", "RowTerms", "ce_and_kl", "divergence_rows", "kl_div_from_logits"]

Mode = Literal["forward", "reverse", "jsd"]
Reduction = Literal["batchmean", "sum", "none"]
MODES = ("forward", "reverse", "jsd")
REDUCTIONS = ("batchmean", "sum", "none")


class CrossEntropyAndKL(NamedTuple):
    """The objective and, for logs, its two parts."""

    total: Tensor
    """What to differentiate."""
    cross_entropy: Tensor
    """Detached, unweighted by ``ce_weight``."""
    kl_divergence: Tensor
    """Detached, unweighted by ``kl_weight``, with the factor of the temperature squared."""


@dataclass(frozen=True)
class Divergence:
    """Which divergence: its temperature, direction and, for "jsd", the teacher's share of the mixture."""

    temperature: float = 1.0
    mode: Mode = "forward"
    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise RequestError(f"temperature must be above 0 and finite, not {self.temperature}")
        if self.mode not in MODES:
            raise RequestError(f"no divergence mode is named {self.mode!r}: {nearest(str(self.mode), MODES)}")
        if self.mode == "jsd" and not 0 < self.beta < 1:
            raise RequestError(
                f"beta must lie between 0 and 1 (both excluded), not {self.beta}: "
                "at the ends jsd is 0; use mode 'forward' or 'reverse'"
            )


@dataclass(frozen=True)
class RowTerms:
    """What counts in each row.

    Attributes:
        kl_scale: Float, one entry a row: the factor of its divergence.
        ce_scale: The same for the cross-entropy; with labels. Rows whose factors are 0 are not read.
        labels: Integers ``0..V-1``, one a row, or None for no cross-entropy.
        kl_weight: Factor of all divergences in the total.
        ce_weight: Factor of all cross-entropies in the total.
    """

    kl_scale: Tensor
    ce_scale: Tensor | None = None
    labels: Tensor | None = None
    kl_weight: float = 1.0
    ce_weight: float = 1.0


def kl_div_from_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    mode: Mode = "forward",
    beta: float = 0.5,
    reduction: Reduction = "batchmean",
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    dim: int | Sequence[int] = -1,
) -> Tensor:
    """Divergence of the softened student from the softened teacher, times the temperature squared.

    With ``p = softmax(teacher / T)`` and ``q = softmax(student / T)`` over ``dim``, a row's value is ``T ** 2`` times

    - "forward": ``KL(p || q)``,
    - "reverse": ``KL(q || p)``,
    - "jsd": ``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q``.

    Classes of probability 0 on the left of a KL (logits of minus infinity) contribute 0; a row in which student or
    teacher has no finite logit counts as 0. The teacher gets no gradient.

    Args:
        student_logits: Float, any shape and strides; ``(B, C, H, W)`` with ``dim=1`` is a softmax over the classes at
            each pixel, with ``dim=(2, 3)`` one over the positions of each channel.
        teacher_logits: The same shape; its dtype may differ.
        temperature: Divides both logits, above 0.
        mode: "forward", "reverse" or "jsd".
        beta: The teacher's share of the mixture, in (0, 1); only for "jsd".
        reduction: "batchmean" is the sum over the rows divided by the number of rows that the mask keeps (0 where it
            keeps none), "sum" the sum, "none" one value a row.
        mask: Bool, the shape of the logits without ``dim``; rows outside it count as 0, whatever they hold.
        weights: Float, the same shape as the mask: factors of the rows' values. They do not enter the divisor.
        dim: The axis or axes of a row.

    Returns:
        Scalar, or the logits' shape without ``dim``; float32 or wider.

    Raises:
        RequestError: Shapes, dtypes or options do not fit together.
    """
    divergence = Divergence(temperature, mode, beta)
    dims = _check(student_logits, teacher_logits, reduction, mask, weights, dim)
    shape = row_shape(student_logits.shape, dims)
    scale = row_factors(student_logits, shape, mask, weights, mean=reduction == "batchmean")
    rows, _, _ = divergence_rows(student_logits, teacher_logits, divergence, dims, RowTerms(scale))
    return rows if reduction == "none" else rows.sum()


def ce_and_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
    ignore_index: int = -100,
    temperature: float = 1.0,
    mode: Mode = "forward",
    beta: float = 0.5,
    reduction: Reduction = "batchmean",
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    dim: int | Sequence[int] = -1,
) -> CrossEntropyAndKL:
    """The usual distillation objective: cross-entropy with labels plus a divergence from the teacher, in one pass.

    ``total = ce_weight * CE(student, labels) + kl_weight * KL``, where the cross-entropy takes the logits as they are
    (temperature 1) and the KL is that of `kl_div_from_logits`. "(1 - alpha) CE + alpha T^2 KL" is
    ``ce_weight=1 - alpha, kl_weight=alpha``.

    Args:
        student_logits: Float, any shape and strides.
        teacher_logits: The same shape.
        labels: Integer, the shape of the logits without ``dim``: classes ``0..V-1`` (with several axes in ``dim``, an
            index into them flattened), or ``ignore_index``.
        ce_weight: Factor of the cross-entropy.
        kl_weight: Factor of the divergence.
        ignore_index: Rows with this label have no cross-entropy; their divergence still counts.
        temperature: As in `kl_div_from_logits`, like the arguments below.
        mode: "forward", "reverse" or "jsd".
        beta: The teacher's share of the mixture.
        reduction: "batchmean" divides the divergence by the number of rows kept by the mask, and the cross-entropy by
            the number of those that have a label.
        mask: Bool, one entry a row.
        weights: Float, one entry a row, for both terms.
        dim: The axis or axes of a row.

    Returns:
        ``total`` with gradient, and the two parts without; scalars or, with "none", the logits' shape without ``dim``.

    Raises:
        RequestError: Shapes, dtypes or options do not fit together.
    """
    divergence = Divergence(temperature, mode, beta)
    dims = _check(student_logits, teacher_logits, reduction, mask, weights, dim)
    shape = row_shape(student_logits.shape, dims)
    if tuple(labels.shape) != shape or labels.is_floating_point():
        raise RequestError(f"labels must be integers of shape {shape}, not {labels.dtype} {tuple(labels.shape)}")
    labelled = labels != ignore_index
    counted = labelled if mask is None else labelled & mask
    mean = reduction == "batchmean"
    kl_scale = row_factors(student_logits, shape, mask, weights, mean=mean)
    ce_scale = row_factors(student_logits, shape, counted, weights, mean=mean)
    terms = RowTerms(kl_scale, ce_scale, torch.where(labelled, labels, 0), kl_weight, ce_weight)
    total, kl_rows, ce_rows = divergence_rows(student_logits, teacher_logits, divergence, dims, terms)
    if reduction != "none":
        total, kl_rows, ce_rows = total.sum(), kl_rows.sum(), ce_rows.sum()
    return CrossEntropyAndKL(total, ce_rows.detach(), kl_rows.detach())


def _check(
    student: Tensor,
    teacher: Tensor,
    reduction: str,
    mask: Tensor | None,
    weights: Tensor | None,
    dim: int | Sequence[int],
) -> tuple[int, ...]:
    if student.shape != teacher.shape:
        raise RequestError(
            f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} differ: "
            "both networks must have the same classes and outputs of one size"
        )
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise RequestError(f"logits must be floating-point, not {student.dtype} and {teacher.dtype}")
    if reduction not in REDUCTIONS:
        raise RequestError(f"no reduction is named {reduction!r}: {nearest(str(reduction), REDUCTIONS)}")
    dims = as_dims(dim, student.ndim)
    check_row_weights(row_shape(student.shape, dims), mask, weights)
    return dims


def divergence_rows(
    student: Tensor, teacher: Tensor, divergence: Divergence, dims: tuple[int, ...], terms: RowTerms
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's value: what the public losses, and `linear_kl_div`, reduce.

    Args:
        student: Logits, any shape.
        teacher: The same shape; detached.
        divergence: Which divergence.
        dims: Sorted axes of a row.
        terms: What counts, and how much.

    Returns:
        ``(total, divergence, cross_entropy)``, one entry a row each, scaled by the rows' factors. Only the total
        carries gradient; the weights enter it alone.
    """
    teacher = teacher.detach()
    if student.numel() == 0 or not use_triton(student, teacher):
        return reference_rows(student, teacher, divergence, dims, terms)
    student, teacher, dims = _walkable(student, teacher, dims)
    if student.dtype != torch.float16:
        return _launched_rows(student, teacher, divergence, dims, terms)
    # Gradients divided by the number of rows would vanish in float16, which a loss scale cannot repair once they are
    # stored: the kernel stores them unscaled, and autograd multiplies by the rows' factors after the loss scale.
    norm = terms.kl_scale if terms.ce_scale is None else torch.maximum(terms.kl_scale.abs(), terms.ce_scale.abs())
    divisor = torch.where(norm == 0, torch.ones_like(norm), norm)
    unscaled = replace(
        terms,
        kl_scale=terms.kl_scale / divisor,
        ce_scale=None if terms.ce_scale is None else terms.ce_scale / divisor,
    )
    total, kl_rows, ce_rows = _launched_rows(student, teacher, divergence, dims, unscaled)
    return total * norm, kl_rows * norm, ce_rows * norm


def _launched_rows(
    student: Tensor, teacher: Tensor, divergence: Divergence, dims: tuple[int, ...], terms: RowTerms
) -> tuple[Tensor, Tensor, Tensor]:
    from compressor.kernels.kl_divergence_triton import Rows

    return Rows.apply(
        student,
        teacher,
        terms.labels,
        terms.kl_scale,
        terms.ce_scale,
        divergence.temperature,
        divergence.mode,
        divergence.beta,
        dims,
        terms.kl_weight,
        terms.ce_weight,
    )


def _walkable(student: Tensor, teacher: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """The tensors as a kernel can walk them: as they are, or copied with the rows last."""
    gradient = torch.empty_like(student, device="meta")
    if row_layout([student, teacher, gradient], dims) is not None:
        return student, teacher, dims
    last = tuple(range(student.ndim - len(dims), student.ndim))
    return student.movedim(dims, last).contiguous(), teacher.movedim(dims, last).contiguous(), last


def reference_rows(
    student: Tensor, teacher: Tensor, divergence: Divergence, dims: tuple[int, ...], terms: RowTerms
) -> tuple[Tensor, Tensor, Tensor]:
    """`divergence_rows` in plain PyTorch, differentiable by autograd; about 10 tensors of the logits' size."""
    student_rows, teacher_rows = _float_rows(student, dims), _float_rows(teacher.detach(), dims)
    kl_scale = terms.kl_scale.reshape(-1)
    ce_scale = torch.zeros_like(kl_scale) if terms.ce_scale is None else terms.ce_scale.reshape(-1)
    absent = (student_rows == -math.inf).all(dim=1) | (teacher_rows == -math.inf).all(dim=1)
    used = ((kl_scale != 0) | (ce_scale != 0)) & ~absent
    # What rows outside hold must not spread, not even as NaN times 0 in the backward pass.
    student_rows = torch.where(used[:, None], student_rows, torch.zeros_like(student_rows))
    teacher_rows = torch.where(used[:, None], teacher_rows, torch.zeros_like(teacher_rows))

    temperature = divergence.temperature
    values = _row_divergences(
        F.log_softmax(student_rows / temperature, dim=1), F.log_softmax(teacher_rows / temperature, dim=1), divergence
    )
    zero = torch.zeros_like(values)
    kl_rows = torch.where(used & (kl_scale != 0), values * temperature**2 * kl_scale, zero)
    ce_rows = zero
    if terms.labels is not None:
        picked = F.log_softmax(student_rows, dim=1).gather(1, terms.labels.reshape(-1, 1).long())[:, 0]
        ce_rows = torch.where(used & (ce_scale != 0), -picked * ce_scale, zero)
    total = terms.kl_weight * kl_rows + terms.ce_weight * ce_rows
    shape = row_shape(student.shape, dims)
    return total.reshape(shape), kl_rows.detach().reshape(shape), ce_rows.detach().reshape(shape)


def _float_rows(logits: Tensor, dims: tuple[int, ...]) -> Tensor:
    rows = as_rows(logits, dims)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _row_divergences(student: Tensor, teacher: Tensor, divergence: Divergence) -> Tensor:
    """One value a row of log-probabilities."""
    if divergence.mode == "forward":
        return _kl(teacher, student)
    if divergence.mode == "reverse":
        return _kl(student, teacher)
    beta = divergence.beta
    mixture = _log_add(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(left: Tensor, right: Tensor) -> Tensor:
    """``sum exp(left) (left - right)`` over the last axis; classes without probability on the left count 0."""
    absent = left.exp() == 0
    difference = left.masked_fill(absent, 0) - right.masked_fill(absent, 0)
    return (left.masked_fill(absent, -math.inf).exp() * difference).sum(dim=1)


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """``log(exp a + exp b)``, minus infinity (with zero gradient) where both are."""
    absent = (a == -math.inf) & (b == -math.inf)
    return torch.logaddexp(a.masked_fill(absent, 0), b.masked_fill(absent, 0)).masked_fill(absent, -math.inf)
