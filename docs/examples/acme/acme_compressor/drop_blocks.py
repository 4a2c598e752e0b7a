"""Dropped blocks: keep evenly spaced blocks of a diffusion transformer and teach them the whole network's output.

Trained: the shortened network, on its teacher's predictions. Exported: its denoiser, with the sampler around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from compressor.diffusion.denoiser import Denoiser
from compressor.diffusion.noised_data import NoisedData
from compressor.errors import RequestError
from compressor.method import Context, MethodConfig, Needs, OneStudent, Paper
from compressor.models.anatomy.blocks import block_stack
from compressor.models.model import edit
from compressor.training.curves import cosine
from compressor.training.phase import Optim, Phases, Train, Update

__all__ = ["METHOD", "evenly_spaced", "output_loss"]


def evenly_spaced(count: int, keep: int) -> list[int]:
    """Indices of ``keep`` of ``count`` blocks, the first and the last among them.

    Raises:
        RequestError: There are fewer blocks than that.
    """
    if not 2 <= keep <= count:
        raise RequestError(f"keep={keep}: the model has {count} blocks; keep 2 to {count} of them")
    return [round(k * (count - 1) / (keep - 1)) for k in range(keep)]


def output_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two predictions (B, C, H, W); a float32 scalar."""
    return (student.float() - teacher.detach().float()).square().mean()


@edit("drop-blocks.keep")
def keep_blocks(module: nn.Module, blocks: Sequence[int]) -> nn.Module:
    """Leave only the given blocks; recorded in the student's folder and replayed when it is loaded."""
    stack = block_stack(module)
    return stack.rebuild([stack.blocks[k] for k in blocks])


class Config(MethodConfig):
    """Configuration of the method: names, types, limits and this text are what `compress methods` shows."""

    keep: int = Field(6, ge=2)
    """Blocks that stay."""
    steps: int = Field(400, ge=1)
    """Optimiser steps."""
    lr: float = Field(5e-4, gt=0)
    """Peak learning rate of AdamW; cosine decay after the warm-up."""
    batch: int = Field(64, ge=1)
    """Samples a step and process."""


class DropBlocks(OneStudent[Config]):
    """The method; see the module's docstring."""

    name: ClassVar[str] = "drop-blocks"
    paper: ClassVar[Paper] = Paper("Dropped blocks, an example", "Acme", "nowhere", "https://example.org/drop-blocks")
    idea: ClassVar[str] = "Keep every n-th block and imitate the output of the whole network."
    needs: ClassVar[Needs] = Needs(
        tasks=("image-generation",),
        teachers={"teacher": "one"},
        students={"student": "copy"},
        data={"train": frozenset({"image", "label"})},
        anatomy="blocks",
    )
    Config: ClassVar[type[MethodConfig]] = Config
    default_recipe: ClassVar[Mapping[str, Any]] = {
        "teachers": {"teacher": "demo:digits-mmdit"},
        "data": {"train": "digits"},
    }

    def phases(self, ctx: Context) -> Phases:
        """One phase of gradient steps; a method with probes or mining yields `Compute`s between its `Train`s."""
        config, teacher = self.config, Denoiser(ctx.teacher())
        start = ctx.student(like=ctx.teacher())
        blocks = evenly_spaced(len(block_stack(start.module).blocks), config.keep)
        self._student = start.edit("drop-blocks.keep", blocks=blocks)
        student = Denoiser(self._student)
        data = NoisedData(ctx, student)

        def step(batches: dict[str, Any], i: int) -> Any:
            noised, level, _, condition = data.sample(batches["train"], i)
            with torch.no_grad():
                wanted = teacher.predict(noised, level, condition)
            yield Update("student", {"output": output_loss(student.predict(noised, level, condition), wanted)})

        optimizer = Optim(student.parameters(), lr=config.lr, schedule=cosine(config.steps, warmup=1))
        yield Train(
            "distil",
            config.steps,
            optimizers={"student": optimizer},
            streams={"train": data.stream(config.batch)},
            step=step,
            state={"student": student.module},
            key=blocks,
        )


METHOD = DropBlocks
