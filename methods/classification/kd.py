"""KD (Hinton, Vinyals & Dean 2015, arXiv 1503.02531): learn from the teacher's softened class probabilities.

The student matches the teacher's softmax at a raised temperature, where the small probabilities tell which classes
resemble each other, and the labels at temperature 1. A segmenter's pixels are distilled one by one. Trained and
exported: the student.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from compressor.data.stream import Batch
from compressor.losses.divergence import cross_entropy_and_kl, kl_divergence
from compressor.method import Context, MethodConfig, Needs, Paper
from compressor.training.distillation import LogitTrainingConfig, StudentMethod, teacher_logits, train_phase
from compressor.training.phase import Phases, Update
from compressor.training.supervised import Supervision
from compressor.training.training_config import make_stream

__all__ = ["KD", "METHOD", "kd_objective", "soft_target_loss"]


def soft_target_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0) -> Tensor:
    """``T ** 2 * KL(softmax(teacher / T) || softmax(student / T))``, mean over the batch.

    Eq. 1 gives the softened probabilities; section 2 multiplies the soft objective by ``T ** 2``, so that its gradient
    keeps its size when T changes. The paper's soft objective is the cross-entropy, whose gradient is the same.

    Args:
        student_logits: ``(N, C)`` float, or maps ``(N, C, H, W)``.
        teacher_logits: The same shape; detached.
        temperature: T, above 0.

    Returns:
        Scalar in nats, at least 0.
    """
    return temperature**2 * kl_divergence(student_logits, teacher_logits, temperature=temperature, dim=1)


def kd_objective(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    soft_weight: float = 0.9,
    ignore_index: int = -100,
) -> Tensor:
    """Weighted average of the soft objective and the cross-entropy with the labels (section 2).

    Args:
        student_logits: ``(N, C)`` float, or maps ``(N, C, H, W)``, whose pixels count one by one.
        teacher_logits: The same shape; detached.
        labels: ``(N,)`` or ``(N, H, W)`` int64 in ``0..C-1``, or ``ignore_index``.
        temperature: T of the soft objective, above 0.
        soft_weight: Weight of the soft objective, in [0, 1]; the labels get the rest. The paper: "a considerably lower
            weight" on the labels works best.
        ignore_index: The label of pixels without one; the teacher speaks of them, too.

    Returns:
        Scalar in nats.
    """
    return cross_entropy_and_kl(
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        kl_weight=soft_weight,
        ce_weight=1 - soft_weight,
        ignore_index=ignore_index,
        dim=1,
    )


class Config(LogitTrainingConfig):
    """Configuration of KD."""

    temperature: float = Field(4.0, gt=0)
    """Softens both sides' probabilities."""
    soft_weight: float = Field(0.9, ge=0, le=1)
    """Weight of the teacher; the labels get the rest."""


class KD(StudentMethod):
    """The method; see the module's docstring."""

    name: ClassVar[str] = "kd"
    paper: ClassVar[Paper] = Paper(
        "Distilling the Knowledge in a Neural Network",
        "Hinton, Vinyals, Dean",
        "NIPS 2014 Deep Learning Workshop",
        "https://arxiv.org/abs/1503.02531",
    )
    idea: ClassVar[str] = "Match the teacher's class probabilities at a raised temperature, and the labels."
    needs: ClassVar[Needs] = Needs(
        tasks=("classification", "segmentation"),
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
        stream, labelled = make_stream(ctx, config), Supervision.of(ctx)
        targets = teacher_logits(ctx, config, teachers, stream)

        def step(batches: dict[str, Batch], i: int) -> Iterator[Update]:
            batch = batches["train"]
            loss = kd_objective(
                student(batch["image"]),
                targets.one(0, batch["image"], i),
                batch[labelled.field],
                temperature=config.temperature,
                soft_weight=config.soft_weight,
                ignore_index=labelled.ignore_index,
            )
            yield Update("student", {"kd": loss})

        yield train_phase("distil", config, stream, step, student, teachers)


METHOD = KD
