"""FitNet (Romero et al. 2015, arXiv 1412.6550): let a middle layer of the teacher guide a middle layer of the student.

First the student up to its guided layer, with a regressor on top, predicts the teacher's hint layer; then the whole
student is trained with knowledge distillation. Trained: the student, and the regressor in the first stage. Exported:
the student.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from compressor.data.stream import Batch
from compressor.errors import RequestError
from compressor.kernels import feature_distance
from compressor.losses.divergence import kl_divergence
from compressor.method import Context, MethodConfig, Needs, Paper
from compressor.models.feature_layers import FeatureLayer
from compressor.models.image_network import ImageNetwork
from compressor.training.distillation import LogitTrainingConfig, StudentMethod, teacher_logits, train_phase
from compressor.training.phase import Phases, Train, Update
from compressor.training.supervised import Supervision
from compressor.training.training_config import TrainingConfig, make_stream

__all__ = ["METHOD", "FitNet", "hint_loss", "hint_regressor", "soft_target_weight"]


def hint_loss(regressed_features: Tensor, hint_features: Tensor) -> Tensor:
    """Half the squared error between the regressor's output and the hint (eq. 3).

    Eq. 3 sums over the entries of a feature map; here it is their mean, as in the usual re-implementations, so that a
    weight does not depend on the layer's size.

    Args:
        regressed_features: Regressor on the student's guided layer, any shape, float.
        hint_features: The teacher's hint layer, the same shape; detached.

    Returns:
        Scalar at least 0, float32 or wider.

    Raises:
        RequestError: The shapes differ.
    """
    if regressed_features.shape != hint_features.shape:
        raise RequestError(
            f"guided features {tuple(regressed_features.shape)} and hint {tuple(hint_features.shape)} differ: put a "
            "regressor between them"
        )
    return 0.5 * feature_distance(regressed_features, hint_features, "mse")


def hint_regressor(guided_shape: tuple[int, int, int], hint_shape: tuple[int, int, int]) -> nn.Conv2d:
    """The convolution that carries a guided feature map to the hint's channels and size.

    Section 2.2: a convolution without padding, whose kernel makes the sizes meet (``N_g - k + 1 = N_h``), because it
    needs far fewer weights than a dense regressor.

    Args:
        guided_shape: ``(C, H, W)`` of the student's guided layer.
        hint_shape: ``(C, H, W)`` of the teacher's hint layer.

    Returns:
        A trainable convolution.

    Raises:
        RequestError: The guided map is smaller than the hint's.
    """
    channels, *size = guided_shape
    hint_channels, *hint_size = hint_shape
    if any(guided < hint for guided, hint in zip(size, hint_size, strict=True)):
        raise RequestError(
            f"the guided layer's map {size} is smaller than the hint's {hint_size}: choose an earlier guided layer or "
            "a later hint"
        )
    kernel = (size[0] - hint_size[0] + 1, size[1] - hint_size[1] + 1)
    return nn.Conv2d(channels, hint_channels, kernel_size=kernel)


def soft_target_weight(step: int, steps: int, *, start: float = 4.0, end: float = 1.0) -> float:
    """The weight lambda of the soft targets in the second stage (eq. 2), which decays linearly during training.

    Args:
        step: From 0 on.
        steps: Steps of the stage; from ``steps - 1`` on the weight is ``end``.
        start: Weight at the first step; the paper starts at 4.
        end: Weight at the last step; the paper ends at 1.

    Returns:
        The weight.
    """
    progress = min(step / max(steps - 1, 1), 1.0)
    return start + (end - start) * progress


class HintStage(TrainingConfig):
    """The first stage: the student up to its guided layer, and the regressor."""

    steps: int = Field(200, ge=0)
    """Training steps of the hint stage; 0 leaves it out."""


class Config(LogitTrainingConfig):
    """Configuration of FitNet; the keys beside `hint` are those of the second stage."""

    hint: HintStage = HintStage()
    """The first stage."""
    hint_layer: str | None = None
    """Layer of the teacher that gives the hint; the middle one of its stages by default."""
    guided_layer: str | None = None
    """Layer of the student that is guided; the middle one of its stages, or an earlier one with a larger map."""
    temperature: float = Field(3.0, gt=0)
    """Softens both sides' probabilities in the second stage."""
    soft_start: float = Field(4.0, ge=0)
    """Weight of the teacher's probabilities at the start of the second stage."""
    soft_end: float = Field(1.0, ge=0)
    """Weight at its end."""


class FitNet(StudentMethod):
    """The method; see the module's docstring."""

    name: ClassVar[str] = "fitnet"
    paper: ClassVar[Paper] = Paper(
        "FitNets: Hints for Thin Deep Nets",
        "Romero, Ballas, Kahou, Chassang, Gatta, Bengio",
        "ICLR 2015",
        "https://arxiv.org/abs/1412.6550",
    )
    idea: ClassVar[str] = "Teach the student's lower half a middle layer of the teacher first, then distil all of it."
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
        """The hint stage, then knowledge distillation."""
        config = self.config
        student, teachers = self.start(ctx)
        stream, labelled = make_stream(ctx, config), Supervision.of(ctx)
        if config.hint.steps:
            yield self._hint_phase(ctx, student, teachers)
        targets = teacher_logits(ctx, config, teachers, stream)

        def step(batches: dict[str, Batch], i: int) -> Iterator[Update]:
            batch = batches["train"]
            logits = student(batch["image"])
            weight = soft_target_weight(i, config.steps, start=config.soft_start, end=config.soft_end)
            soft = kl_divergence(logits, targets.one(0, batch["image"], i), temperature=config.temperature, dim=1)
            yield Update("student", {"labels": labelled.loss(logits, batch), "soft": weight * soft})

        yield train_phase("distil", config, stream, step, student, teachers)

    def _hint_phase(self, ctx: Context, student: ImageNetwork, teachers: Sequence[ImageNetwork]) -> Train:
        config, stage = self.config, self.config.hint
        teacher, stream = teachers[0], make_stream(ctx, stage, tag="hint")
        shape = stream.dataset.info.shape
        hint = middle_layer(teacher, shape, config.hint_layer)
        guided = middle_layer(student, shape, config.guided_layer, at_least=hint.shape[1:])
        regressor = hint_regressor(guided.shape, hint.shape).to(ctx.device)

        def step(batches: dict[str, Batch], i: int) -> Iterator[Update]:
            pixels = batches["train"]["image"]
            with torch.no_grad():
                _, (wanted,) = teacher.features(pixels, [hint.name])
            _, (features,) = student.features(pixels, [guided.name])
            yield Update("student", {"hint": hint_loss(regressor(features), wanted)})

        return train_phase("hint", stage, stream, step, student, teachers, {"regressor": regressor})


def middle_layer(
    network: ImageNetwork, image_shape: Sequence[int], name: str | None, at_least: Sequence[int] = (1, 1)
) -> FeatureLayer:
    """The named layer, or the deepest of the first half of the stages whose map is not smaller than ``at_least``.

    Args:
        network: Whose layer it is.
        image_shape: (C, H, W) of the data.
        name: The user's choice.
        at_least: (H, W); where no stage of the first half is that large, the largest one is taken.
    """
    if name is not None:
        return network.layers(image_shape, [name])[0]
    stages = network.layers(image_shape)
    lower = stages[: len(stages) // 2 + 1] if len(stages) > 1 else stages
    fitting = [s for s in lower if all(have >= need for have, need in zip(s.shape[1:], at_least, strict=True))]
    return fitting[-1] if fitting else lower[0]


METHOD = FitNet
