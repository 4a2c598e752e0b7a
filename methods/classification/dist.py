"""DIST (Huang et al. 2022, arXiv 2205.10536): match how predictions are ordered, not their exact values.

A strong teacher's probabilities are too far away to copy; Pearson's correlation asks only that the student's agree up
to scale and shift, among the classes of a sample and among the samples of a class. Trained and exported: the student.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from compressor.data.stream import Batch
from compressor.losses.precision import at_least_float32
from compressor.losses.relations import pearson_correlation
from compressor.method import Context, MethodConfig, Needs, Paper
from compressor.training.distillation import LogitTrainingConfig, StudentMethod, teacher_logits, train_phase
from compressor.training.phase import Phases, Update
from compressor.training.supervised import label_loss
from compressor.training.training_config import make_stream

__all__ = ["DIST", "METHOD", "dist_loss", "inter_class_loss", "intra_class_loss"]


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


class Config(LogitTrainingConfig):
    """Configuration of DIST."""

    beta: float = Field(1.0, ge=0)
    """Weight of the relation between the classes of a sample."""
    gamma: float = Field(1.0, ge=0)
    """Weight of the relation between the samples of a class."""
    temperature: float = Field(1.0, gt=0)
    """Softens both sides' probabilities."""
    label_weight: float = Field(1.0, ge=0)
    """Weight of the cross-entropy with the labels."""


class DIST(StudentMethod):
    """The method; see the module's docstring."""

    name: ClassVar[str] = "dist"
    paper: ClassVar[Paper] = Paper(
        "Knowledge Distillation from A Stronger Teacher",
        "Huang, You, Wang, Qian, Xu",
        "NeurIPS 2022",
        "https://arxiv.org/abs/2205.10536",
    )
    idea: ClassVar[str] = "Match the correlation of predictions between and within classes, not their values."
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
    }

    def phases(self, ctx: Context) -> Phases:
        """One training of the student."""
        config = self.config
        student, teachers = self.start(ctx)
        stream = make_stream(ctx, config)
        targets = teacher_logits(ctx, config, teachers, stream)

        def step(batches: dict[str, Batch], i: int) -> Iterator[Update]:
            batch = batches["train"]
            logits = student(batch["image"])
            relations = dist_loss(
                logits,
                targets.one(0, batch["image"], i),
                beta=config.beta,
                gamma=config.gamma,
                temperature=config.temperature,
            )
            labels = config.label_weight * label_loss(logits, batch["label"])
            yield Update("student", {"labels": labels, "relations": relations})

        yield train_phase("distil", config, stream, step, student, teachers)


METHOD = DIST
