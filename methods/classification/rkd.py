"""RKD (Park et al. 2019, arXiv 1904.05068): teach how the samples of a batch lie to each other.

The student's embeddings must have the teacher's relative distances between pairs and its angles between triplets,
whatever their dimensions. Trained and exported: the student.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compressor.data.stream import Batch
from compressor.losses.precision import at_least_float32
from compressor.losses.relations import pairwise_distances, triplet_angles
from compressor.losses.statistics import masked_mean
from compressor.method import Context, MethodConfig, Needs, Paper
from compressor.training.distillation import StudentMethod, train_phase
from compressor.training.phase import Phases, Update
from compressor.training.supervised import label_loss
from compressor.training.training_config import TrainingConfig, make_stream

__all__ = ["METHOD", "RKD", "angle_loss", "distance_loss", "rkd_loss"]


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


class Config(TrainingConfig):
    """Configuration of RKD."""

    distance_weight: float = Field(25.0, ge=0)
    """Weight of the distances between pairs of samples."""
    angle_weight: float = Field(50.0, ge=0)
    """Weight of the angles between triplets of samples."""
    label_weight: float = Field(1.0, ge=0)
    """Weight of the cross-entropy with the labels."""


class RKD(StudentMethod):
    """The method; see the module's docstring. The embedding is what a network's last linear layer reads."""

    name: ClassVar[str] = "rkd"
    paper: ClassVar[Paper] = Paper(
        "Relational Knowledge Distillation",
        "Park, Kim, Lu, Cho",
        "CVPR 2019",
        "https://arxiv.org/abs/1904.05068",
    )
    idea: ClassVar[str] = "Teach the distances and angles between the samples of a batch, not single outputs."
    needs: ClassVar[Needs] = Needs(
        tasks=("classification",),
        teachers={"teacher": "one"},
        students={"student": "spec"},
        data={"train": frozenset({"image", "label"})},
    )
    Config: ClassVar[type[MethodConfig]] = Config
    default_recipe: ClassVar[Mapping[str, Any]] = {
        "teachers": {"teacher": "demo:scenes-cnn"},
        "students": {"student": "timm:resnet18?layers=[1,1,1,1],channels=[8,12,16,24]"},
        "data": {"train": "scenes"},
        "data_config": {"distance_weight": 1.0, "angle_weight": 2.0},
    }

    def phases(self, ctx: Context) -> Phases:
        """One training of the student."""
        config = self.config
        student, teachers = self.start(ctx)
        teacher, stream = teachers[0], make_stream(ctx, config)
        shape = stream.dataset.info.shape
        student_head, teacher_head = student.head(shape), teacher.head(shape)

        def step(batches: dict[str, Batch], i: int) -> Iterator[Update]:
            batch = batches["train"]
            logits, embedding = student.embed(batch["image"], student_head)
            with torch.no_grad():
                _, wanted = teacher.embed(batch["image"], teacher_head)
            losses = {
                "labels": config.label_weight * label_loss(logits, batch["label"]),
                "distance": config.distance_weight * distance_loss(embedding, wanted),
                "angle": config.angle_weight * angle_loss(embedding, wanted),
            }
            yield Update("student", losses)

        yield train_phase("distil", config, stream, step, student, teachers)


METHOD = RKD
