"""Demo teachers that are diffusion transformers: small configurations of library classes, trained on the digits."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from compressor.data.digits import digits
from compressor.diffusion.denoiser import Denoiser, noised_batch
from compressor.method import Context
from compressor.models.model import Model, ModelInfo
from compressor.models.spec import build_module
from compressor.training.curves import one_cycle
from compressor.training.phase import Optim, Phases, Train, Update

__all__ = ["DigitsMMDiT"]


class DigitsMMDiT:
    """Qwen-Image's transformer with 12 dual-stream blocks of width 64, flow matching, a two-token prompt a class.

    The configuration of the PPCL card's small experiment, with a tenth of the prompts left empty so that the model can
    be guided.

    Args:
        seed: Of its weights and its training.
    """

    name = "digits-mmdit"
    task = "image-generation"
    data = "digits"
    steps = 700
    batch = 64
    drop = 0.1
    config: ClassVar[dict[str, Any]] = {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 1,
        "num_layers": 12,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": 32,
        "axes_dims_rope": [4, 6, 6],
    }

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def build(self) -> Model:
        """The untrained model; its weights come from the global generator."""
        info = ModelInfo("diffusers", "QwenImageTransformer2DModel", dict(self.config))
        return Model(build_module(info), info)

    def fingerprint(self) -> list[Any]:
        """Everything that decides the weights."""
        facts = [self.name, self.seed, self.config, self.steps, self.batch, self.drop]
        return [*facts, digits("train").info.fingerprint]

    def phases(self, model: Model, ctx: Context, steps: int) -> Phases:
        """Flow matching: the velocity's squared error at uniform levels."""
        task: Any = ctx.task
        denoiser, table = Denoiser(model), task.conditions(model)
        stream = ctx.stream("train", self.batch, view=task.view)

        def step(batches: dict[str, Any], i: int) -> Any:
            clean, rows = batches["train"]["image"], batches["train"]["label"]
            size = len(clean)
            if table.null_row is not None:
                rows = torch.where(ctx.uniform(i, size, "drop").to(rows.device) < self.drop, table.null_row, rows)
            noise = ctx.normal(i, clean.shape, "noise").to(clean.device)
            uniform = ctx.uniform(i, size, "level").to(clean.device)
            noised, level, target = noised_batch(denoiser, clean, noise, uniform)
            error = (denoiser.predict(noised, level, table(rows)) - target).square().mean()
            yield Update("model", {"flow": error})

        optim = Optim(denoiser.parameters(), lr=1e-3, schedule=one_cycle(steps), clip_norm=1.0)
        yield Train("train", steps, {"model": optim}, {"train": stream}, step, {"model": model.module})
