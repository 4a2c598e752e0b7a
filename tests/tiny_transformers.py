"""Small random configurations of the five diffusion transformers, with a batch that each takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from compressor.models.model import Model, ModelInfo

BATCH, SIZE, TOKENS = 3, 8, 2


@dataclass
class Tiny:
    """A model, what it is called with, and the library's own call."""

    module: Any
    timestep: Tensor
    condition: dict[str, Tensor]
    sample: Tensor

    def library_output(self) -> Tensor:
        """The output (B, C, H, W) of the library's own forward."""
        return _CALLS[type(self.module).__name__](self)

    @property
    def config(self) -> dict[str, Any]:
        """What the module was built from."""
        return {key: value for key, value in dict(self.module.config).items() if not key.startswith("_")}

    def model(self, **extra: Any) -> Model:
        """The module with its description; ``extra`` goes into that."""
        return Model(self.module, ModelInfo("diffusers", type(self.module).__name__, self.config, extra=extra))


def tiny(name: str, *, layers: int = 4, seed: int = 0) -> Tiny:
    """A random model of the class with ``layers`` blocks."""
    torch.manual_seed(seed)
    config = {**_CONFIGS[name], "num_layers": layers}
    if name == "FluxTransformer2DModel":
        config |= {"num_layers": layers // 2, "num_single_layers": layers - layers // 2}
    module = getattr(diffusers, name)(**config).eval()
    for parameter in module.parameters():
        # what the classes start at zero (gates, output layers) would hide mistakes
        if not parameter.abs().sum():
            torch.nn.init.normal_(parameter, std=0.1)
    sigma = torch.tensor([0.2, 0.5, 0.9])
    text = {"encoder_hidden_states": torch.randn(BATCH, TOKENS, 32)}
    pooled = {"pooled_projections": torch.randn(BATCH, 24)}
    condition = {
        "QwenImageTransformer2DModel": text,
        "FluxTransformer2DModel": text | pooled,
        "SD3Transformer2DModel": text | pooled,
        "DiTTransformer2DModel": {"class_labels": torch.tensor([0, 3, 9])},
        "PixArtTransformer2DModel": text,
    }[name]
    scale = {"QwenImageTransformer2DModel": 1.0, "FluxTransformer2DModel": 1.0}.get(name, 1000.0)
    timestep = sigma * scale if name in _FLOW else (sigma * scale).long()
    return Tiny(module, timestep, condition, torch.randn(BATCH, 1, SIZE, SIZE))


_FLOW = ("QwenImageTransformer2DModel", "FluxTransformer2DModel", "SD3Transformer2DModel")
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_CONFIGS: dict[str, dict[str, Any]] = {
    "QwenImageTransformer2DModel": {
        **_HEADS,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 1,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    },
    "FluxTransformer2DModel": {
        **_HEADS,
        "patch_size": 1,
        "in_channels": 4,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 24,
        "axes_dims_rope": (4, 6, 6),
        "guidance_embeds": True,
    },
    "SD3Transformer2DModel": {
        **_HEADS,
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "joint_attention_dim": 32,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 24,
        "pos_embed_max_size": 8,
        "qk_norm": "rms_norm",
    },
    "DiTTransformer2DModel": {
        **_HEADS,
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 2,
        "num_embeds_ada_norm": 10,
    },
    "PixArtTransformer2DModel": {
        **_HEADS,
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 2,
        "cross_attention_dim": 32,
        "caption_channels": 32,
        "norm_num_groups": 1,
    },
}
NAMES = tuple(_CONFIGS)


def _packed(sample: Tensor) -> Tensor:
    """As the pipelines of Qwen-Image and FLUX pack latents."""
    batch, channels, height, width = sample.shape
    patches = sample.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height * width // 4, channels * 4)


def _unpacked(tokens: Tensor) -> Tensor:
    side = SIZE // 2
    patches = tokens.view(len(tokens), side, side, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(len(tokens), -1, SIZE, SIZE)


def _qwen(t: Tiny) -> Tensor:
    shapes = [[(1, SIZE // 2, SIZE // 2)]] * BATCH
    mask = t.condition.get("encoder_attention_mask")
    output = t.module(
        _packed(t.sample),
        t.condition["encoder_hidden_states"],
        encoder_hidden_states_mask=mask,
        timestep=t.timestep,
        img_shapes=shapes,
    )
    return _unpacked(output.sample)


def _flux(t: Tiny) -> Tensor:
    ids = torch.zeros(SIZE // 2, SIZE // 2, 3)
    ids[..., 1] += torch.arange(SIZE // 2)[:, None]
    ids[..., 2] += torch.arange(SIZE // 2)[None]
    text, pooled = t.condition["encoder_hidden_states"], t.condition["pooled_projections"]
    guidance = torch.full((BATCH,), 3.5)
    output = t.module(_packed(t.sample), text, pooled, t.timestep, ids.view(-1, 3), torch.zeros(TOKENS, 3), guidance)
    return _unpacked(output.sample)


def _sd3(t: Tiny) -> Tensor:
    text, pooled = t.condition["encoder_hidden_states"], t.condition["pooled_projections"]
    output: Tensor = t.module(t.sample, text, pooled, t.timestep).sample
    return output


def _dit(t: Tiny) -> Tensor:
    output: Tensor = t.module(t.sample, t.timestep, t.condition["class_labels"]).sample
    return output


def _pixart(t: Tiny) -> Tensor:
    added = None
    if t.module.use_additional_conditions:
        size = torch.tensor([8.0 * SIZE, 8.0 * SIZE]).expand(BATCH, 2)
        added = {"resolution": size, "aspect_ratio": torch.ones(BATCH, 1)}
    output: Tensor = t.module(
        t.sample,
        t.condition["encoder_hidden_states"],
        t.timestep,
        encoder_attention_mask=t.condition.get("encoder_attention_mask"),
        added_cond_kwargs=added,
    ).sample
    return output


_CALLS = {
    "QwenImageTransformer2DModel": _qwen,
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
}
