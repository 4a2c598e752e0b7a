"""RKD (Park et al. 2019, arXiv 1904.05068): teach how the samples of a batch lie to each other.

The student's embeddings must have the teacher's relative distances between pairs and its angles between triplets,
whatever their dimensions. Trained and exported: the student.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from compressor.losses.precision import at_least_float32
from compressor.losses.relations import pairwise_distances, triplet_angles
from compressor.losses.statistics import masked_mean

__all__ = ["angle_loss", "distance_loss", "rkd_loss"]


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of the pairwise distances, each divided by its side's mean distance (``L_RKD-D``, section 3.2.1).

    The paper sums over the pairs; the official code averages over all N x N entries, the zero diagonal included, and
    takes the mean distance over the pairs that do not coincide. The code is followed, as its weight belongs to it.

    Args:
        student: ``(N, D_s)`` embeddings, float.
        teacher: ``(N, D_t)`` embeddings, float; detached.

    Returns:
        Scalar at least 0, float32 or wider.
    """
    return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher.detach()))


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of the cosines of all angles between triplets of samples (``L_RKD-A``, section 3.2.2).

    The mean is over all N x N x N entries, degenerate triplets (0 on both sides) included, as in the official code.

    Args:
        student: ``(N, D_s)`` embeddings, float.
        teacher: ``(N, D_t)`` embeddings, float; detached.

    Returns:
        Scalar in [0, 1.5], float32 or wider.
    """
    return F.smooth_l1_loss(triplet_angles(student), triplet_angles(teacher.detach()))


def rkd_loss(student: Tensor, teacher: Tensor, *, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Tensor:
    """The weighted sum of both relations (RKD-DA).

    Args:
        student: ``(N, D_s)`` embeddings, float.
        teacher: ``(N, D_t)`` embeddings, float; detached.
        distance_weight: Weight of the distances. The paper's 1 : 2 to the angles; 25 and 50 beside a cross-entropy.
        angle_weight: Weight of the angles.

    Returns:
        Scalar at least 0, float32 or wider.
    """
    return distance_weight * distance_loss(student, teacher) + angle_weight * angle_loss(student, teacher)


def _relative_distances(embeddings: Tensor) -> Tensor:
    distances = pairwise_distances(at_least_float32(embeddings))
    mean = masked_mean(distances, distances > 0)
    return distances / mean.clamp_min(1e-12)
