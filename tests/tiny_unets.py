"""Small random configurations of diffusers' UNets as models: by class, by text, with SDXL's pooled text and sizes."""

from __future__ import annotations

from typing import Any

import torch

from compressor.models.model import Model, ModelInfo
from compressor.models.spec import build_module

__all__ = ["UNETS", "tiny_unet"]

_SMALL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
}
_CROSS: dict[str, Any] = {
    **_SMALL,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}
UNETS: dict[str, tuple[str, dict[str, Any]]] = {
    "labels": (
        "UNet2DModel",
        {
            **_SMALL,
            "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "num_class_embeds": 11,
            "add_attention": False,
        },
    ),
    "unconditional": (
        "UNet2DModel",
        {
            **_SMALL,
            "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
        },
    ),
    "text": ("UNet2DConditionModel", _CROSS),
    "sdxl": (
        "UNet2DConditionModel",
        {
            **_CROSS,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24 + 6 * 8,
        },
    ),
}


def tiny_unet(kind: str, seed: int = 0, **extra: Any) -> Model:
    """A random model of a kind; ``extra`` goes into its description (``scheduler``)."""
    architecture, config = UNETS[kind]
    info = ModelInfo("diffusers", architecture, dict(config), extra=extra)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build_module(info).eval()
        for parameter in module.parameters():
            # what starts at zero would hide mistakes
            if not parameter.abs().sum():
                torch.nn.init.normal_(parameter, std=0.1)
    return Model(module, info)
