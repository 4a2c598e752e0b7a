"""AT (Zagoruyko & Komodakis 2017, arXiv 1612.03928): make the student look where the teacher looks.

At several depths the student's normalised spatial attention map, the channel sum of squared activations, is pulled
towards the teacher's; the labels train the rest. Trained and exported: the student.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compressor.data.stream import Batch
from compressor.errors import RequestError
from compressor.losses.features import attention_transfer_loss
from compressor.method import Context, MethodConfig, Needs, Paper
from compressor.models.feature_layers import pair_layers
from compressor.training.distillation import StudentMethod, train_phase
from compressor.training.phase import Phases, Update
from compressor.training.supervised import Supervision
from compressor.training.training_config import TrainingConfig, make_stream

__all__ = ["AT", "METHOD", "at_loss"]


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


class Config(TrainingConfig):
    """Configuration of AT."""

    beta: float = Field(1000.0, ge=0)
    """Weight of the attention maps; the loss takes half of it, as in the paper."""
    power: float = Field(2.0, ge=1)
    """Exponent of the activations in a map."""
    depths: int = Field(3, ge=1)
    """How many pairs of stages are compared, the deepest first, where the layers are not named."""
    student_layers: tuple[str, ...] | None = None
    """Layers of the student, shallow to deep, instead of its stages."""
    teacher_layers: tuple[str, ...] | None = None
    """Layers of the teacher, as many."""
    label_weight: float = Field(1.0, ge=0)
    """Weight of the cross-entropy with the labels."""


class AT(StudentMethod):
    """The method; see the module's docstring."""

    name: ClassVar[str] = "at"
    paper: ClassVar[Paper] = Paper(
        "Paying More Attention to Attention: Improving the Performance of CNNs via Attention Transfer",
        "Zagoruyko, Komodakis",
        "ICLR 2017",
        "https://arxiv.org/abs/1612.03928",
    )
    idea: ClassVar[str] = "Pull the student's spatial attention maps towards the teacher's at several depths."
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
        "data_config": {"beta": 20.0},
    }

    def phases(self, ctx: Context) -> Phases:
        """One training of the student."""
        config = self.config
        student, teachers = self.start(ctx)
        teacher, stream, labelled = teachers[0], make_stream(ctx, config), Supervision.of(ctx)
        shape = stream.dataset.info.shape
        own, theirs = student.layers(shape, config.student_layers), teacher.layers(shape, config.teacher_layers)
        named = config.student_layers is not None and config.teacher_layers is not None
        pairs = list(zip(own, theirs, strict=False)) if named else pair_layers(own, theirs, config.depths)
        if named and len(own) != len(theirs):
            raise RequestError(f"at: student_layers names {len(own)} layers, teacher_layers {len(theirs)}")
        student_names, teacher_names = ([layer.name for layer in side] for side in zip(*pairs, strict=True))

        def step(batches: dict[str, Batch], i: int) -> Iterator[Update]:
            batch = batches["train"]
            logits, features = student.features(batch["image"], student_names)
            with torch.no_grad():
                _, wanted = teacher.features(batch["image"], teacher_names)
            attention = config.beta / 2 * at_loss(features, wanted, power=config.power)
            labels = config.label_weight * labelled.loss(logits, batch)
            yield Update("student", {"labels": labels, "attention": attention})

        yield train_phase("distil", config, stream, step, student, teachers)


METHOD = AT
