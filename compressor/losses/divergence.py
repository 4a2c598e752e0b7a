"""Divergences between class distributions: KL from logits, and the cross-entropy with soft labels.

Every method's KL goes through `kl_divergence`, and so to the fused kernel of `compressor.kernels` on a GPU.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from compressor.errors import RequestError
from compressor.kernels import ce_and_kl, kl_div_from_logits
from compressor.losses.precision import at_least_float32

__all__ = ["cross_entropy_and_kl", "kl_divergence", "soft_cross_entropy"]


def kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    reduction: Literal["mean", "none"] = "mean",
    mask: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """``KL(softmax(teacher / T) || softmax(student / T))`` in nats, without the factor ``T ** 2``.

    The teacher's side is detached. A "row" is one distribution: all entries along ``dim``.

    Args:
        student_logits: Float, any shape with the classes along ``dim``.
        teacher_logits: The same shape.
        temperature: Divides both logits, above 0.
        reduction: "mean" over the rows, "none" for one number a row.
        mask: Bool, the shape of the logits without ``dim``: the rows that the mean is taken over (all of them by
            default). A mean over no rows is a differentiable 0.
        dim: The axis of the classes.

    Returns:
        Scalar, or the logits' shape without ``dim``; float32 or wider. Classes without probability in the teacher
        count 0, and so do rows without any finite logit.

    Raises:
        RequestError: The shapes differ, or the temperature is not above 0.
    """
    rows = reduction == "none"
    value = kl_div_from_logits(
        student_logits,
        teacher_logits,
        temperature=temperature,
        reduction="none" if rows else "batchmean",
        mask=None if rows else mask,
        dim=dim,
    )
    return value / temperature**2


def cross_entropy_and_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    kl_weight: float = 0.9,
    ce_weight: float = 0.1,
    ignore_index: int = -100,
    dim: int = -1,
) -> Tensor:
    """``kl_weight * T ** 2 * KL + ce_weight * cross-entropy``: the usual objective of distillation, in one pass.

    Args:
        student_logits: Float, any shape with the classes along ``dim``.
        teacher_logits: The same shape; detached.
        labels: Int64, the shape of the logits without ``dim``: classes ``0..C-1``, or ``ignore_index``.
        temperature: T, above 0: softens both sides of the KL (see `kl_divergence`). The labels are met at 1.
        kl_weight: Weight of the divergence, mean over all rows.
        ce_weight: Weight of the cross-entropy, mean over the rows with a label.
        ignore_index: The label of rows that have none.
        dim: The axis of the classes.

    Returns:
        Scalar in nats, float32 or wider.

    Raises:
        RequestError: Shapes differ, labels are no integers, or the temperature is not above 0.
    """
    return ce_and_kl(
        student_logits,
        teacher_logits,
        labels,
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        ignore_index=ignore_index,
        temperature=temperature,
        dim=dim,
    ).total


def soft_cross_entropy(student_logits: Tensor, soft_labels: Tensor) -> Tensor:
    """Cross-entropy with probabilities as labels: ``- mean_n sum_c p[n, c] log_softmax(student)[n, c]`` in nats.

    It differs from the KL divergence by the labels' entropy, so its gradient is the same.

    Args:
        student_logits: ``(N, C)`` float.
        soft_labels: ``(N, C)``, rows sum to 1; detached.

    Returns:
        Scalar, float32 or wider.

    Raises:
        RequestError: The shapes differ.
    """
    if student_logits.shape != soft_labels.shape:
        raise RequestError(
            f"student logits {tuple(student_logits.shape)} and soft labels {tuple(soft_labels.shape)} differ: "
            "the labels must be given for the student's own classes"
        )
    log_probabilities = F.log_softmax(at_least_float32(student_logits), dim=1)
    return -(soft_labels.detach() * log_probabilities).sum(dim=1).mean()
