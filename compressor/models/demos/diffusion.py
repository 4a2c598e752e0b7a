"""Demo teachers that draw digits: small configurations of diffusers' transformers and UNets, by flow matching."""

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

__all__ = ["DigitsMMDiT", "DigitsUNet"]


class _FlowDemo:
    """Flow matching on the digits: the velocity's squared error at uniform levels, a tenth of the conditions left out.

    Args:
        seed: Of its weights and its training.
    """

    name: ClassVar[str]
    architecture: ClassVar[str]
    config: ClassVar[dict[str, Any]]
    steps: ClassVar[int]
    extra: ClassVar[dict[str, Any]] = {}
    task = "image-generation"
    data = "digits"
    batch = 64
    drop = 0.1

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def build(self) -> Model:
        """The untrained model; its weights come from the global generator."""
        info = ModelInfo("diffusers", self.architecture, dict(self.config), extra=dict(self.extra))
        return Model(build_module(info), info)

    def fingerprint(self) -> list[Any]:
        """Everything that decides the weights."""
        facts = [self.name, self.seed, self.config, self.steps, self.batch, self.drop]
        return [*facts, digits("train").info.fingerprint]

    def phases(self, model: Model, ctx: Context, steps: int) -> Phases:
        """One phase."""
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


class DigitsMMDiT(_FlowDemo):
    """Qwen-Image's transformer with 12 dual-stream blocks of width 64, flow matching, a two-token prompt a class.

    The configuration of the PPCL card's small experiment, with empty prompts so that the model can be guided.
    """

    name = "digits-mmdit"
    architecture = "QwenImageTransformer2DModel"
    steps = 700
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


class DigitsUNet(_FlowDemo):
    """A class-conditional UNet of two resolutions and 160,000 parameters; its time input is 1000 times the level."""

    name = "digits-unet"
    architecture = "UNet2DModel"
    steps = 3500
    extra: ClassVar[dict[str, Any]] = {"scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"}}
    config: ClassVar[dict[str, Any]] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": [16, 32],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "norm_num_groups": 8,
        "num_class_embeds": 11,
        "add_attention": False,
    }
