"""Training with labels: the loss, and a phase of it for baselines, demos and fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional as F

from compressor.data.stream import Batch
from compressor.losses.precision import at_least_float32
from compressor.method import Context
from compressor.models.model import Model
from compressor.training.phase import Train, Update
from compressor.training.training_config import TrainingConfig, make_optim, make_stream

__all__ = ["label_loss", "supervised_phase"]


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (B, C) with labels (B,) in 0..C-1, mean over the batch, in float32 or wider."""
    return F.cross_entropy(at_least_float32(logits), labels)


def supervised_phase(
    ctx: Context, config: TrainingConfig, model: Model, *, name: str = "train", tag: str = ""
) -> Train:
    """A phase that trains a model with its task's own loss.

    Args:
        ctx: Gives the task and the data.
        config: Steps, batch, rates, augmentation.
        model: What is trained; the phase's state "model".
        name: Of the phase.
        tag: Phases of different tags see different batches.
    """

    def step(batches: dict[str, Batch], i: int) -> Iterator[Update]:
        yield Update("model", ctx.task.loss(model, batches["train"]))  # type: ignore[attr-defined]

    return Train(
        name,
        config.steps,
        {"model": make_optim(config, [model.module])},
        {"train": make_stream(ctx, config, tag=tag)},
        step,
        {"model": model.module},
        modes=[(model.module, "train")],
    )
