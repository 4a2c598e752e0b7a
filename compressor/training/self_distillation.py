"""A changed model learns to return what it returned before the change: what sparsity and quantisation train by.

A supervised model is asked on the data and all that it returns is matched; a diffusion model is asked on noised data, a
few-step generator on inputs that it made itself, as its sampler feeds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from compressor.data.stream import Batch, Stream
from compressor.diffusion.denoiser import Denoiser
from compressor.diffusion.noised_data import NoisedData
from compressor.diffusion.rollout import backward_simulation
from compressor.errors import RequestError
from compressor.losses.precision import at_least_float32
from compressor.method import Context
from compressor.models.model import Model
from compressor.training.phase import Step, Update
from compressor.training.training_config import TrainingConfig, make_stream

__all__ = ["SelfDistillationConfig", "fine_tuning", "given_model", "relative_error"]


class SelfDistillationConfig(TrainingConfig):
    """Keys of a fine-tuning against the model as it came."""

    data_weight: float = Field(0.0, ge=0)
    """Weight of the data's own loss (labels, or the noise's target) beside the match with the model as it came."""
    steps: int = Field(300, ge=0)
    """Fine-tuning steps; 0 leaves the changed weights as they are."""
    lr: float = Field(1e-3, gt=0)
    """Highest learning rate."""


def relative_error(guesses: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """``sum |a - b|^2 / sum |b|^2`` of every pair of tensors, mean over the pairs; a scalar, float32 or wider.

    Args:
        guesses: Float tensors of any shapes.
        wanted: As many, of the same shapes; they get no gradient.
    """
    pairs = [(at_least_float32(a), at_least_float32(b.detach())) for a, b in zip(guesses, wanted, strict=True)]
    errors = [(a - b).square().sum() / b.square().sum().clamp(min=1e-12) for a, b in pairs]
    return torch.stack(errors).mean()


def given_model(ctx: Context) -> Model:
    """The chain's model, or the one that the user named, or a copy of the only teacher."""
    try:
        return ctx.student()
    except RequestError:
        return ctx.student(like=ctx.teacher())


def fine_tuning(
    ctx: Context, config: SelfDistillationConfig, student: Model, before: Model, method: str
) -> tuple[Stream, Step]:
    """Batches and the step of a `Train` whose optimiser "student" owns the student.

    Args:
        ctx: Gives the task, the data and the noise.
        config: Of the fine-tuning.
        student: The changed model.
        before: The model as it came, frozen.
        method: Its name, for messages.

    Raises:
        RequestError: The task has no loss, or a key means nothing for a diffusion model.
    """
    asked = _predictions if ctx.task.name == "image-generation" else _outputs
    return asked(ctx, config, student, before, method)


def _outputs(
    ctx: Context, config: SelfDistillationConfig, student: Model, before: Model, method: str
) -> tuple[Stream, Step]:
    """A supervised task's model: all that it returns on a batch of the data."""
    loss = getattr(ctx.task, "loss", None)
    if loss is None:
        raise RequestError(f"{method} cannot fine-tune for the task {ctx.task.name!r}, which has no loss")

    def step(batches: dict[str, Batch], i: int) -> Iterator[Update]:
        batch = batches["train"]
        with torch.no_grad():
            wanted = outputs_of(before.module, lambda: loss(before, batch))[1]
        supervised, guesses = outputs_of(student.module, lambda: loss(student, batch))
        # some networks return more in training, auxiliary logits for one, behind what they return in use
        losses = {"match": relative_error(guesses[: len(wanted)], wanted)}
        if config.data_weight:
            losses |= {name: config.data_weight * value for name, value in supervised.items()}
        yield Update("student", losses)

    return make_stream(ctx, config), step


def _predictions(
    ctx: Context, config: SelfDistillationConfig, student: Model, before: Model, method: str
) -> tuple[Stream, Step]:
    """A diffusion model's prediction: on noised data, or on what its own few steps feed it."""
    changed, dense = Denoiser(student), Denoiser(before)
    if config.augment != "auto" or config.views is not None or config.data_seed is not None:
        raise RequestError(f"{method}: augment, views and data_seed mean nothing for diffusion; leave them out")
    places = student.info.extra.get("student_timesteps")
    if places and config.data_weight:
        raise RequestError(f"{method}: a few-step generator has no target in the data; set data_weight to 0")
    data = NoisedData(ctx, dense)

    def step(batches: dict[str, Batch], i: int) -> Iterator[Update]:
        noised, level, target, condition = data.sample(batches["train"], i)
        if places:
            noised, level = own_inputs(ctx, changed, places, noised, condition, i)
        with torch.no_grad():
            wanted = dense(noised, level, condition)
        guess = changed(noised, level, condition)
        losses = {"match": relative_error([guess], [wanted])}
        if config.data_weight:
            losses["data"] = config.data_weight * (guess[:, : changed.channels] - target).square().mean()
        yield Update("student", losses)

    return data.stream(config.batch), step


def own_inputs(
    ctx: Context, generator: Denoiser, places: Sequence[int], like: Tensor, condition: Mapping[str, Tensor], i: int
) -> tuple[Tensor, Tensor]:
    """What a few-step generator meets at its calls, one drawn for every sample: ``(noised, level)``.

    Args:
        ctx: Gives noise and the calls.
        generator: Rolls out from pure noise.
        places: Training levels of its calls, the noisiest first.
        like: (B, C, H, W), a batch of the same shape and device.
        condition: Condition fields (B, ...).
        i: The step.
    """
    levels = generator.schedule.sampling_level(torch.tensor(places)).to(like.device)
    calls = torch.floor(ctx.uniform(i, len(like), "call") * len(places)).long().to(like.device)
    return backward_simulation(
        generator, levels, calls, condition, lambda number: ctx.normal(i, like.shape, f"call-{number}").to(like.device)
    )


def outputs_of(module: nn.Module, run: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """What ``run`` returns, and the float tensors that the module returned meanwhile, call by call.

    Raises:
        RequestError: It returned none.
    """
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        result = run()
    finally:
        handle.remove()
    tensors = list(_float_tensors(seen))
    if not tensors:
        raise RequestError(f"the task's loss gets no outputs of the {type(module).__name__} that could be matched")
    return result, tensors


def _float_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        yield from _float_tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _float_tensors(part)
