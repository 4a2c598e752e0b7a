"""Noised batches of a run's data: what diffusion methods train on and calibrate with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compressor.data.stream import Stream
from compressor.diffusion.denoiser import Denoiser, noised_batch
from compressor.method import Context
from compressor.models.anatomy.blocks import BlockStack, State

__all__ = ["NoisedData", "walk"]


class NoisedData:
    """Noises the samples of a context's data for a model.

    Args:
        ctx: Gives data and noise.
        denoiser: Its schedule noises, its class decides the condition fields.
        role: Role of the data.
    """

    def __init__(self, ctx: Context, denoiser: Denoiser, role: str = "train") -> None:
        task: Any = ctx.task
        self.ctx, self.denoiser, self.role = ctx, denoiser, role
        self.table, self._view = task.conditions(denoiser.model), task.view

    def stream(self, size: int, tag: str = "") -> Stream:
        """Batches of clean samples and condition rows."""
        return self.ctx.stream(self.role, size, view=self._view, tag=tag)

    def sample(self, batch: Mapping[str, Tensor], i: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """``(noised, level, target, condition)`` of step i."""
        clean = batch["image"]
        noise = self.ctx.normal(i, clean.shape, "noise").to(clean.device)
        uniform = self.ctx.uniform(i, len(clean), "level").to(clean.device)
        noised, level, target = noised_batch(self.denoiser, clean, noise, uniform)
        return noised, level, target, self.table(batch["label"])

    def begin(self, batch: Mapping[str, Tensor], i: int) -> State:
        """The embedded state of step i."""
        noised, level, _, condition = self.sample(batch, i)
        return self.denoiser.stack.begin(noised, self.denoiser.schedule.timestep(level), condition)

    @torch.no_grad()
    def calibration(self, draw: int, samples: int, batch_size: int = 64) -> Iterable[State]:
        """Embedded states of about ``samples`` samples in batches, the same on all processes.

        Different draws share neither the noise nor the order of the data.
        """
        tag, size = f"calibration{draw}", min(batch_size, samples)
        stream = replace(self.stream(size, tag), shard=(0, 1))
        for i in range(-(-samples // size)):
            batch, generator = stream[i], self.ctx.rng(i, tag, shared=True)
            clean = batch["image"]
            noise = torch.randn(clean.shape, generator=generator).to(clean.device)
            uniform = torch.rand(len(clean), generator=generator).to(clean.device)
            noised, level, _ = noised_batch(self.denoiser, clean, noise, uniform)
            timestep = self.denoiser.schedule.timestep(level)
            yield self.denoiser.stack.begin(noised, timestep, self.table(batch["label"]))


def walk(stack: BlockStack, state: State) -> Iterable[State]:
    """The state before the first block, then behind every block."""
    yield state
    for block in stack.blocks:
        state = stack.run(block, state)
        yield state
