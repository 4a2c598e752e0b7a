"""DIST (Huang et al. 2022, arXiv 2205.10536): match how predictions are ordered, not their exact values.

A strong teacher's probabilities are too far away to copy; Pearson's correlation asks only that the student's agree up
to scale and shift, among the classes of a sample and among the samples of a class. Trained and exported: the student.
"""

from __future__ import annotations

from torch import Tensor

from compressor.losses.precision import at_least_float32
from compressor.losses.relations import pearson_correlation

__all__ = ["dist_loss", "inter_class_loss", "intra_class_loss"]


def inter_class_loss(student_probabilities: Tensor, teacher_probabilities: Tensor) -> Tensor:
    """``1 -`` the correlation of the class probabilities of each sample, mean over the batch (``L_inter``).

    Args:
        student_probabilities: ``(N, C)`` float.
        teacher_probabilities: ``(N, C)`` float; detached.

    Returns:
        Scalar in [0, 2].
    """
    return 1 - pearson_correlation(student_probabilities, teacher_probabilities.detach(), dim=1).mean()


def intra_class_loss(student_probabilities: Tensor, teacher_probabilities: Tensor) -> Tensor:
    """``1 -`` the correlation over the batch of each class's probability, mean over the classes (``L_intra``).

    Args:
        student_probabilities: ``(N, C)`` float, N at least 2 (one sample does not vary: the loss is a constant 1).
        teacher_probabilities: ``(N, C)`` float; detached.

    Returns:
        Scalar in [0, 2].
    """
    return 1 - pearson_correlation(student_probabilities, teacher_probabilities.detach(), dim=0).mean()


def dist_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """``T ** 2 * (beta * inter + gamma * intra)`` on the softmaxes at temperature T.

    The paper's objective (eq. 10) adds these two to the cross-entropy with the labels; the factor
    ``T ** 2`` is the official code's.

    Args:
        student_logits: ``(N, C)`` float.
        teacher_logits: ``(N, C)`` float; detached.
        beta: Weight of the relation between classes.
        gamma: Weight of the relation within a class.
        temperature: T, above 0.

    Returns:
        Scalar at least 0.
    """
    student = (at_least_float32(student_logits) / temperature).softmax(dim=1)
    teacher = (at_least_float32(teacher_logits) / temperature).softmax(dim=1)
    inter, intra = inter_class_loss(student, teacher), intra_class_loss(student, teacher)
    return temperature**2 * (beta * inter + gamma * intra)
