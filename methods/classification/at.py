"""AT (Zagoruyko & Komodakis 2017, arXiv 1612.03928): make the student look where the teacher looks.

At several depths the student's normalised spatial attention map, the channel sum of squared activations, is pulled
towards the teacher's; the labels train the rest. Trained and exported: the student.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compressor.errors import RequestError
from compressor.losses.features import attention_transfer_loss

__all__ = ["at_loss"]


def at_loss(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], *, power: float = 2.0) -> Tensor:
    """Sum over layer pairs of the squared difference of their attention maps (eq. 2 without ``beta / 2``).

    Eq. 2 writes the norm of the difference; the official code takes the mean over batch and positions of its square, to
    which its ``beta = 1000`` belongs (it uses ``beta / 2`` as the weight). The code is followed.

    Args:
        student_features: One ``(B, C, H, W)`` float map for each layer, shallow to deep.
        teacher_features: As many, in the same order; channels and sizes may differ (the larger map is average-pooled to
            the smaller one's size, a case that the paper does not have). Detached.
        power: Exponent p of the maps; 2 in the paper's experiments.

    Returns:
        Scalar at least 0, float32 or wider.

    Raises:
        RequestError: No layers, or not equally many.
    """
    if not student_features or len(student_features) != len(teacher_features):
        raise RequestError(
            f"attention transfer pairs layers, but got {len(student_features)} of the student and "
            f"{len(teacher_features)} of the teacher: name as many of each, at least one"
        )
    pairs = zip(student_features, teacher_features, strict=True)
    return torch.stack([attention_transfer_loss(student, teacher, power=power) for student, teacher in pairs]).sum()
