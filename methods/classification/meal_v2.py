"""MEAL V2 (Shen & Savvides 2020, arXiv 2009.08453): fine-tune on the averaged softmax of several teachers.

A pre-trained student learns from the mean of its teachers' class probabilities and from nothing else: no hard labels,
no weight decay. A tiny discriminator on the final logits regularises. Trained: the student and the discriminator.
Exported: the student alone.

Where the official code departs from the paper the code is followed: the discriminator is not an adversary there,
student and discriminator minimise the same loss. `compressor.losses.adversarial.reverse_gradient` on the student's
logits makes it the game that the paper tells of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.data.mixing import cutmix
from compressor.data.stream import Batch
from compressor.errors import RequestError
from compressor.losses.adversarial import reverse_gradient
from compressor.losses.divergence import soft_cross_entropy
from compressor.losses.precision import at_least_float32
from compressor.method import Context, MethodConfig, Needs, Paper
from compressor.training.distillation import LogitTrainingConfig, StudentMethod, teacher_logits, train_phase
from compressor.training.phase import Phases, Update
from compressor.training.training_config import make_optim, make_stream

__all__ = [
    "METHOD",
    "Discriminator",
    "MealV2",
    "discriminator_loss",
    "discriminator_scores",
    "discriminator_widths",
    "ensemble_targets",
    "similarity_loss",
]


def ensemble_targets(teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """What the teachers agree on (section 3.1): the mean of their softmaxes, and the mean of their logits.

    Args:
        teacher_logits: ``(M, N, C)`` float: M teachers, N samples, C classes.

    Returns:
        ``(soft_labels, mean_logits)``, both ``(N, C)`` and detached: targets of the similarity loss, rows summing to 1;
        and the discriminator's teacher input. No temperature.
    """
    teacher_logits = teacher_logits.detach()
    return teacher_logits.softmax(dim=2).mean(dim=0), teacher_logits.mean(dim=0)


def similarity_loss(student_logits: Tensor, soft_labels: Tensor) -> Tensor:
    """Cross-entropy of the student with the ensemble's soft labels, mean over the batch.

    The paper writes the KL divergence; the official code leaves out the labels' entropy, which has no gradient. The
    code is followed.

    Args:
        student_logits: ``(N, C)`` float.
        soft_labels: ``(N, C)``, rows sum to 1; detached.

    Returns:
        Scalar in nats.
    """
    return soft_cross_entropy(student_logits, soft_labels)


def discriminator_scores(
    logits: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, weight3: Tensor, bias3: Tensor
) -> Tensor:
    """Three linear layers with a ReLU after each, the last included (as in the official code).

    Args:
        logits: ``(N, C)`` float.
        weight1: ``(H1, C)``.
        bias1: ``(H1,)``.
        weight2: ``(H2, H1)``.
        bias2: ``(H2,)``.
        weight3: ``(2, H2)``.
        bias3: ``(2,)``.

    Returns:
        ``(N, 2)``, at least 0: how much a row looks like a student's, and like a teacher's.
    """
    hidden = F.relu(F.linear(logits, weight1, bias1))
    hidden = F.relu(F.linear(hidden, weight2, bias2))
    return F.relu(F.linear(hidden, weight3, bias3))


def discriminator_loss(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """Binary cross-entropy of the scores, taken as logits: students are ``[1, 0]``, teachers ``[0, 1]``.

    Args:
        student_scores: ``(N, 2)`` float.
        teacher_scores: ``(N, 2)`` float.

    Returns:
        Scalar, mean over the 4 N entries. As scores are at least 0, it does not fall below ``ln(2) / 2``; rows whose
        last ReLU is dead add ``ln 2`` each and have no gradient.
    """
    scores = at_least_float32(torch.cat([student_scores, teacher_scores]))
    student_target, teacher_target = scores.new_tensor([1.0, 0.0]), scores.new_tensor([0.0, 1.0])
    target = torch.cat([student_target.expand_as(student_scores), teacher_target.expand_as(teacher_scores)])
    return F.binary_cross_entropy_with_logits(scores, target)


def discriminator_widths(num_classes: int, reduction: int = 8) -> tuple[int, int]:
    """Widths of the discriminator's hidden layers: ``C // K`` and ``C // K // K``.

    Args:
        num_classes: C.
        reduction: K, at least 1; lowered (not below 2) until no layer is narrower than 2, which few classes need:
            10 classes take K = 2 and the widths 5 and 2.

    Returns:
        ``(H1, H2)``, each at least 2.
    """
    while reduction > 2 and num_classes // reduction // reduction < 2:
        reduction -= 1
    return max(num_classes // reduction, 2), max(num_classes // reduction // reduction, 2)


class Discriminator(nn.Module):
    """The module around `discriminator_scores`: it tells student logits from teacher logits."""

    def __init__(self, num_classes: int, reduction: int = 8) -> None:
        super().__init__()
        first, second = discriminator_widths(num_classes, reduction)
        self.linear1 = nn.Linear(num_classes, first)
        self.linear2 = nn.Linear(first, second)
        self.linear3 = nn.Linear(second, 2)

    def forward(self, logits: Tensor) -> Tensor:
        """Score ``(N, C)`` logits; returns ``(N, 2)``."""
        first, second, third = self.linear1, self.linear2, self.linear3
        return discriminator_scores(
            logits, first.weight, first.bias, second.weight, second.bias, third.weight, third.bias
        )


class Config(LogitTrainingConfig):
    """Configuration of MEAL V2; the defaults are the paper's, at the scale of a short fine-tuning."""

    optimizer: Literal["adamw", "adam", "sgd"] = "sgd"
    """The optimiser."""
    lr: float = Field(0.01, gt=0)
    """Highest learning rate: a third, or less, of what the student was trained with before."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay; the soft labels regularise, so the paper has none."""
    schedule: Literal["one-cycle", "cosine", "linear", "steps", "constant"] = "steps"
    """How the learning rate moves."""
    milestones: tuple[float, ...] = (0.56,)
    """For the schedule "steps": after which shares of the training the rate falls to a tenth (epoch 101 of 180)."""
    discriminator: Literal["joint", "adversarial", "off"] = "joint"
    """"joint": student and discriminator lower the same loss, as in the released code; "adversarial": a game."""
    discriminator_lr: float | None = Field(None, gt=0)
    """Learning rate of the discriminator; the student's by default."""
    discriminator_reduction: int = Field(8, ge=1)
    """How much narrower each of its layers is; lowered where classes are few."""
    discriminator_weight: float = Field(1.0, ge=0)
    """Weight of its loss."""
    teachers_per_step: Literal["all", "one"] = "all"
    """"one": a random teacher each step instead of the mean of all (MEAL's first version)."""
    cutmix: bool = False
    """Mix boxes of images of a batch; the teachers see, and label, what comes out."""
    cutmix_beta: float = Field(1.0, gt=0)
    """Parameter of the distribution of the boxes' areas."""


class MealV2(StudentMethod):
    """The method; see the module's docstring."""

    name: ClassVar[str] = "meal-v2"
    paper: ClassVar[Paper] = Paper(
        "MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks",
        "Shen, Savvides",
        "NeurIPS 2020 Workshop",
        "https://arxiv.org/abs/2009.08453",
    )
    idea: ClassVar[str] = "Fine-tune on the averaged softmax of several teachers, with no label and no weight decay."
    needs: ClassVar[Needs] = Needs(
        tasks=("classification",),
        teachers={"teacher": "many"},
        students={"student": "spec"},
        data={"train": frozenset({"image"})},
    )
    Config: ClassVar[type[MethodConfig]] = Config
    default_recipe: ClassVar[Mapping[str, Any]] = {
        "teachers": {"teacher": ["demo:scenes-cnn?seed=0", "demo:scenes-cnn?seed=1"]},
        "students": {"student": "demo:scenes-cnn-small"},
        "data": {"train": "scenes"},
        "data_config": {"optimizer": "adamw", "lr": 3e-3, "schedule": "one-cycle", "steps": 500},
    }

    def phases(self, ctx: Context) -> Phases:
        """One fine-tuning of the student, with the discriminator beside it."""
        config = self.config
        if config.cutmix and config.cache_teacher:
            raise RequestError("meal-v2: cache_teacher cannot keep outputs of images that cutmix makes anew: drop one")
        student, teachers = self.start(ctx)
        stream = make_stream(ctx, config)
        targets = teacher_logits(ctx, config, teachers, stream)
        classes = len(stream.dataset.info.classes)
        judge = Discriminator(classes, config.discriminator_reduction).to(ctx.device)
        uses_judge = config.discriminator != "off"

        def step(batches: dict[str, Batch], i: int) -> Iterator[Update]:
            pixels = batches["train"]["image"]
            if config.cutmix:
                seed = ctx.rng(i, "cutmix").initial_seed()
                pixels = cutmix(pixels, np.random.default_rng(seed), beta=config.cutmix_beta)
            if config.teachers_per_step == "one":
                chosen = int(torch.randint(len(teachers), (), generator=ctx.rng(i, "teacher", shared=True)))
                answers = targets.one(chosen, pixels, i)[None]
            else:
                answers = targets(pixels, i)
            soft_labels, mean_logits = ensemble_targets(answers)
            logits = student(pixels)
            losses = {"similarity": similarity_loss(logits, soft_labels)}
            if uses_judge:
                shown = reverse_gradient(logits) if config.discriminator == "adversarial" else logits
                told = discriminator_loss(judge(shown.float()), judge(mean_logits))
                losses["discriminator"] = config.discriminator_weight * told
            yield Update(owners, losses)

        others = {"discriminator": judge} if uses_judge else {}
        phase = train_phase("distil", config, stream, step, student, teachers, others)
        owners: str | tuple[str, ...] = "student"
        if uses_judge and config.discriminator_lr is not None:
            owners = ("student", "discriminator")
            phase.optimizers["student"] = make_optim(config, [student.module])
            phase.optimizers["discriminator"] = make_optim(config, [judge], lr=config.discriminator_lr)
        yield phase


METHOD = MealV2
