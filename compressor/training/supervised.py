"""Training with labels: the loss, and a phase of it for baselines, demos and fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from compressor.data.stream import Batch
from compressor.losses.dense import map_cross_entropy
from compressor.losses.precision import at_least_float32
from compressor.method import Context
from compressor.models.model import Model
from compressor.training.phase import Train, Update
from compressor.training.training_config import TrainingConfig, make_optim, make_stream

__all__ = ["Supervision", "label_loss", "supervised_phase"]


def label_loss(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Cross-entropy with labels, mean over those that count, in float32 or wider.

    Args:
        logits: (B, C), or (B, C, H, W).
        labels: (B,), or (B, H, W): int64 in 0..C-1, or ``ignore_index``.
        ignore_index: The label of what does not count; a mean over nothing is 0 for maps.
    """
    if logits.dim() > 2:
        return map_cross_entropy(logits, labels, ignore_index=ignore_index)
    return F.cross_entropy(at_least_float32(logits), labels, ignore_index=ignore_index)


@dataclass(frozen=True)
class Supervision:
    """What a supervised task's samples are labelled with.

    Attributes:
        field: Of a sample: "label", or "mask" for maps.
        ignore_index: The label of what does not count.
    """

    field: str = "label"
    ignore_index: int = -100

    @classmethod
    def of(cls, ctx: Context) -> Supervision:
        """What the context's task says."""
        return cls(getattr(ctx.task, "target", "label"), getattr(ctx.task, "ignore_index", -100))

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """`label_loss` of a batch."""
        return label_loss(logits, batch[self.field], ignore_index=self.ignore_index)


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
