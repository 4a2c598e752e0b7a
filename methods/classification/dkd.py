"""DKD (Zhao et al. 2022, arXiv 2203.08679): take the KD loss apart and weigh its two halves freely.

The KL divergence is the divergence of "target or not" plus that among the other classes times the teacher's doubt; the
product starves the second half exactly where the teacher is sure. DKD decouples them. Trained and exported: the
student.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compressor.data.stream import Batch
from compressor.losses.divergence import kl_divergence
from compressor.losses.precision import at_least_float32
from compressor.method import Context, MethodConfig, Needs, Paper
from compressor.training.distillation import LogitTrainingConfig, StudentMethod, teacher_logits, train_phase
from compressor.training.phase import Phases, Update
from compressor.training.supervised import label_loss
from compressor.training.training_config import make_stream

__all__ = ["DKD", "METHOD", "decoupled_divergences", "dkd_loss", "warm_up_weight"]


def decoupled_divergences(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float = 4.0
) -> tuple[Tensor, Tensor]:
    """Target-class and non-target-class knowledge distillation (TCKD and NCKD, section 3.1), without ``T ** 2``.

    They satisfy ``KL = TCKD + (1 - p_t) NCKD`` for one sample, ``p_t`` being the teacher's probability of the target.

    Args:
        student_logits: ``(N, C)`` float, C at least 2.
        teacher_logits: ``(N, C)`` float; detached.
        labels: ``(N,)`` int64 in ``0..C-1``.
        temperature: T, above 0.

    Returns:
        ``(target, non_target)``, both ``(N,)``, in nats, at least 0.
    """
    student_pair, student_others = _split(student_logits, labels, temperature)
    teacher_pair, teacher_others = _split(teacher_logits.detach(), labels, temperature)
    target = kl_divergence(student_pair, teacher_pair, reduction="none")
    non_target = kl_divergence(student_others, teacher_others, reduction="none")
    return target, non_target


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """``T ** 2 * (alpha * TCKD + beta * NCKD)``, mean over the batch (section 3.3; ``T ** 2`` as in KD).

    Args:
        student_logits: ``(N, C)`` float.
        teacher_logits: ``(N, C)`` float; detached.
        labels: ``(N,)`` int64 in ``0..C-1``.
        alpha: Weight of the target class.
        beta: Weight of the other classes: the larger the surer the teacher.
        temperature: T, above 0.

    Returns:
        Scalar at least 0.
    """
    target, non_target = decoupled_divergences(student_logits, teacher_logits, labels, temperature=temperature)
    return temperature**2 * (alpha * target + beta * non_target).mean()


def warm_up_weight(epoch: float, warm_up_epochs: float = 20.0) -> float:
    """Factor of the DKD loss that rises linearly to 1 (official code; the large beta would upset early training).

    Args:
        epoch: Epochs done, fractions allowed, from 0 on.
        warm_up_epochs: Where 1 is reached; 0 for no warm-up.

    Returns:
        A number in [0, 1].
    """
    return min(epoch / warm_up_epochs, 1.0) if warm_up_epochs > 0 else 1.0


def _split(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits whose softmax is (target, all others), ``(N, 2)``, and the other classes' logits, ``(N, C - 1)``."""
    logits = at_least_float32(logits) / temperature
    others = torch.arange(logits.shape[1] - 1, device=logits.device).expand(logits.shape[0], -1)
    others = logits.gather(1, others + (others >= labels[:, None]))
    target = logits.gather(1, labels[:, None])
    return torch.cat([target, others.logsumexp(dim=1, keepdim=True)], dim=1), others


class Config(LogitTrainingConfig):
    """Configuration of DKD."""

    alpha: float = Field(1.0, ge=0)
    """Weight of the target class."""
    beta: float = Field(8.0, ge=0)
    """Weight of the other classes: the larger, the surer the teacher is."""
    temperature: float = Field(4.0, gt=0)
    """Softens both sides' probabilities."""
    label_weight: float = Field(1.0, ge=0)
    """Weight of the cross-entropy with the labels."""
    warm_up: float = Field(1 / 12, ge=0, le=1)
    """Share of the training over which the distillation's weight rises to 1."""


class DKD(StudentMethod):
    """The method; see the module's docstring."""

    name: ClassVar[str] = "dkd"
    paper: ClassVar[Paper] = Paper(
        "Decoupled Knowledge Distillation",
        "Zhao, Cui, Song, Qiu, Liang",
        "CVPR 2022",
        "https://arxiv.org/abs/2203.08679",
    )
    idea: ClassVar[str] = "Weigh what the teacher says of the target class and of the other classes apart."
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
        "data_config": {"beta": 1.0},
    }

    def phases(self, ctx: Context) -> Phases:
        """One training of the student."""
        config = self.config
        student, teachers = self.start(ctx)
        stream = make_stream(ctx, config)
        targets = teacher_logits(ctx, config, teachers, stream)

        def step(batches: dict[str, Batch], i: int) -> Iterator[Update]:
            batch = batches["train"]
            logits, labels = student(batch["image"]), batch["label"]
            distance = dkd_loss(
                logits,
                targets.one(0, batch["image"], i),
                labels,
                alpha=config.alpha,
                beta=config.beta,
                temperature=config.temperature,
            )
            weight = warm_up_weight(i + 1, config.warm_up * config.steps)
            yield Update(
                "student", {"labels": config.label_weight * label_loss(logits, labels), "dkd": weight * distance}
            )

        yield train_phase("distil", config, stream, step, student, teachers)


METHOD = DKD
