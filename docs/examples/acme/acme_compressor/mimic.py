"""Mimicry: a student of one's own learns the teacher's output and the clean image; serves the denoising task.

Trained: the student. Exported: the student.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from compressor.method import Context, MethodConfig, Needs, OneStudent, Paper
from compressor.training.phase import Optim, Phases, Train, Update

__all__ = ["METHOD"]


class Config(MethodConfig):
    """Configuration of the method."""

    steps: int = Field(300, ge=1)
    """Optimiser steps."""
    teacher_weight: float = Field(0.5, ge=0, le=1)
    """Weight of the teacher's output; the clean image gets the rest."""


class Mimic(OneStudent[Config]):
    """The method; see the module's docstring."""

    name: ClassVar[str] = "mimic"
    paper: ClassVar[Paper] = Paper("Mimicry, an example", "Acme", "nowhere", "https://example.org/mimic")
    idea: ClassVar[str] = "Learn the teacher's output and the truth."
    needs: ClassVar[Needs] = Needs(
        tasks=("denoising",),
        teachers={"teacher": "one"},
        students={"student": "spec"},
        data={"train": frozenset({"image"})},
    )
    Config: ClassVar[type[MethodConfig]] = Config
    default_recipe: ClassVar[Mapping[str, Any]] = {
        "teachers": {"teacher": "demo:acme-denoiser"},
        "students": {"student": "python:acme_compressor.denoisers:small"},
        "data": {"train": "digits"},
    }

    def phases(self, ctx: Context) -> Phases:
        """One phase of gradient steps."""
        task: Any = ctx.task
        weight, teacher, student = self.config.teacher_weight, ctx.teacher().module, ctx.student()
        self._student = student

        def step(batches: dict[str, Any], i: int) -> Any:
            clean = batches["train"]["image"]
            noisy = clean + task.options.noise * ctx.normal(i, clean.shape, "noise").to(clean.device)
            with torch.no_grad():
                wanted = teacher(noisy)
            guess = student.module(noisy)
            losses = {"teacher": weight * (guess - wanted).square().mean()}
            yield Update("student", losses | {"clean": (1 - weight) * (guess - clean).square().mean()})

        optimizer = Optim(student.module.parameters(), lr=2e-3)
        streams, left = {"train": ctx.stream("train", 64)}, {"student": student.module}
        yield Train("mimic", self.config.steps, {"student": optimizer}, streams, step, left)


METHOD = Mimic
