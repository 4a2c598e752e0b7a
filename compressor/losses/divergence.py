"""Divergences between class distributions: KL from logits, and the cross-entropy with soft labels.

Every method's KL goes through `kl_divergence`, so a faster implementation has one place to come in.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from compressor.errors import RequestError
from compressor.losses.precision import at_least_float32
from compressor.losses.statistics import masked_mean

__all__ = ["kl_divergence", "soft_cross_entropy"]


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
        Scalar, or the logits' shape without ``dim``; float32 or wider.

    Raises:
        RequestError: The shapes differ, or the temperature is not above 0.
    """
    if student_logits.shape != teacher_logits.shape:
        raise RequestError(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} differ: "
            "both networks must have the same classes and outputs of one size"
        )
    if not temperature > 0:
        raise RequestError(f"temperature must be above 0, not {temperature}")
    student = F.log_softmax(at_least_float32(student_logits) / temperature, dim=dim)
    teacher = F.log_softmax(at_least_float32(teacher_logits.detach()) / temperature, dim=dim)
    rows = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=dim)
    if reduction == "none":
        return rows
    return rows.mean() if mask is None else masked_mean(rows, mask)


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
