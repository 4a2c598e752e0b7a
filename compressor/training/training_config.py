"""What trainings of one network have in common: steps, batch, optimiser, schedule, augmentation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import nn

from compressor.data.dataset import Dataset
from compressor.data.stream import Stream
from compressor.data.views import Augmentation, chosen_augmentation, training_view
from compressor.method import Context, MethodConfig
from compressor.training.curves import Curve, constant, cosine, linear_decay, one_cycle, step_decay
from compressor.training.phase import Optim, ParamGroup
from compressor.training.random import hash_seed

__all__ = ["BatchConfig", "TrainingConfig", "make_optim", "make_stream", "parameter_groups", "stream_key"]


class BatchConfig(MethodConfig):
    """Keys of the batches of a training."""

    steps: int = Field(600, ge=0)
    """Training steps."""
    batch: int = Field(64, ge=2)
    """Images in a batch of one process."""
    augment: Augmentation = "auto"
    """What batches show of the images: "none", "shift", "crop", "scale", with "-flip"; "auto" suits the data."""
    views: int | None = Field(None, ge=1)
    """Different augmentations of every image, after which batches repeat; None draws new ones for ever."""
    data_seed: int | None = Field(None, ge=0)
    """Seed of the batches and their augmentation; the run's own by default. Runs of one seed see the same batches."""


class TrainingConfig(BatchConfig):
    """Keys of a training of one network; a method's configuration extends it."""

    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """The optimiser."""
    lr: float = Field(5e-3, gt=0)
    """Highest learning rate."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of sgd."""
    weight_decay: float = Field(1e-4, ge=0)
    """Weight decay; biases and the weights of norms have none."""
    schedule: Literal["one-cycle", "cosine", "linear", "steps", "constant"] = "one-cycle"
    """How the learning rate moves."""
    milestones: tuple[float, ...] = (0.6, 0.8)
    """For the schedule "steps": after which shares of the training the rate falls to a tenth."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of the gradient; None for no limit."""


def make_optim(config: TrainingConfig, modules: Iterable[nn.Module], *, lr: float | None = None) -> Optim:
    """One optimiser for all parameters of the modules.

    Args:
        config: Kind, rates, schedule.
        modules: Whom it owns.
        lr: Instead of the configuration's.
    """
    options = {"momentum": config.momentum} if config.optimizer == "sgd" else {}
    return Optim(
        parameter_groups(modules, config.weight_decay),
        kind=config.optimizer,
        lr=lr if lr is not None else config.lr,
        options=options,
        schedule=_curve(config),
        clip_norm=config.clip_norm,
    )


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[ParamGroup]:
    """The modules' parameters, those of one dimension without decay."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    # Biases and norms have one dimension: decay would only move them away from what the data ask for.
    decayed = [parameter for parameter in parameters if parameter.dim() > 1]
    others = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups: list[ParamGroup] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _curve(config: TrainingConfig) -> Curve:
    steps = max(config.steps, 1)
    if config.schedule == "one-cycle":
        return one_cycle(steps)
    if config.schedule == "cosine":
        return cosine(steps)
    if config.schedule == "linear":
        return linear_decay(steps)
    if config.schedule == "steps":
        return step_decay([round(share * steps) for share in config.milestones])
    return constant


def make_stream(
    ctx: Context, config: BatchConfig, role: str = "train", tag: str = "", dataset: Dataset | None = None
) -> Stream:
    """Augmented batches of a role; with ``views`` they begin again after so many epochs.

    Args:
        ctx: Gives the data and the seed.
        config: Batch, augmentation, views.
        role: Whose samples.
        tag: Streams of different tags draw independently.
        dataset: Samples instead of the role's (generated, distilled).
    """
    dataset = ctx.dataset(role) if dataset is None else dataset
    stream = ctx.stream(role, config.batch, view=training_view(config.augment, dataset.info), tag=tag)
    stream = replace(stream, dataset=dataset)
    if config.data_seed is not None:
        stream = replace(stream, seed=hash_seed(config.data_seed, role, tag))
    if config.views is None:
        return stream
    whole = stream.size * stream.shard[1]
    return replace(stream, period=max(config.views * len(dataset) // whole, 1))


def stream_key(config: BatchConfig, stream: Stream) -> dict[str, object]:
    """JSON; everything that decides what batch i of a stream holds on this process."""
    return {
        "data": stream.dataset.info.fingerprint,
        "augment": chosen_augmentation(config.augment, stream.dataset.info),
        "seed": stream.seed,
        "sampler": repr(stream.sampler),
        "batch": stream.size,
        "shard": list(stream.shard),
        "period": stream.period,
    }
