"""Adaptive block-sparse self-attention for diffusers' transformers, as attention processors.

Each processor projects, normalises and rotates as the library's own does, then attends over the blocks that a probe
finds important (`compressor.kernels.adaptive_mask`). On a GPU that is a sparse kernel, under torch.compile too; in a
graph that is exported it is dense attention with the same mask. Cross-attention stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import ModelError, RequestError
from compressor.kernels.adaptive_mask import (
    asa_attention,
    block_importance,
    energy_block_mask,
    evenly_spaced_offsets,
    random_offsets,
)

__all__ = ["AdaptiveAttention", "set_adaptive_attention", "z_order"]


def z_order(grid: tuple[int, ...]) -> Tensor:
    """Places of a grid's cells along a curve that keeps neighbours close: their coordinates' bits interleaved.

    Args:
        grid: Cells along each axis; cells are numbered with the last axis fastest.

    Returns:
        ``(cells,)`` int64: the cell at each place of the curve.
    """
    coordinates = torch.stack(torch.meshgrid([torch.arange(size) for size in grid], indexing="ij")).flatten(1)
    code = torch.zeros(coordinates.shape[1], dtype=torch.int64)
    for bit in range(max(grid).bit_length()):
        for axis, coordinate in enumerate(coordinates):
            code |= ((coordinate >> bit) & 1) << (bit * len(grid) + len(grid) - 1 - axis)
    return code.argsort()


@dataclass(frozen=True)
class AdaptiveAttention:
    """Which blocks an attention keeps, and what stands in for the others.

    Attributes:
        block_size: Tokens of a block: 64 or 128 on a GPU.
        samples: Tokens of each block that the probe looks at.
        energy_threshold: Share of the probe's mass that the kept blocks reach at most.
        min_retain_ratio: Share of the key blocks that every query block keeps at least.
        max_retain_ratio: Share of the key blocks that it keeps at most; equal to the minimum for a fixed share.
        pool_size: Consecutive tokens of a pooled key of the global branch, or None for no such branch.
        grid: Cells of the video or image along each axis, if its tokens are to be walked along a curve that keeps
            neighbours within a block; other numbers of tokens keep their order.
    """

    block_size: int = 128
    samples: int = 32
    energy_threshold: float = 0.95
    min_retain_ratio: float = 0.05
    max_retain_ratio: float = 0.17
    pool_size: int | None = None
    grid: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= self.block_size:
            raise RequestError(f"samples must lie in 1..{self.block_size} (the block size), not {self.samples}")
        for name in ("energy_threshold", "min_retain_ratio", "max_retain_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise RequestError(f"{name} must lie in 0..1, not {getattr(self, name)}")
        if self.pool_size is not None and self.pool_size < 1:
            raise RequestError(f"pool_size must be at least 1, not {self.pool_size}")

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        text_tokens: int = 0,
        key_padding_mask: Tensor | None = None,
        random_probe: bool = False,
    ) -> Tensor:
        """Self-attention over the kept blocks.

        Args:
            q: ``(B, H, N, D)`` float, after normalisation and position embedding.
            k: The same shape.
            v: The same shape.
            text_tokens: So many tokens at the end are text: their blocks are always kept, as queries and as keys.
            key_padding_mask: ``(B, N)`` bool, true at padding.
            random_probe: Draw the probed tokens (training) instead of spacing them evenly.

        Returns:
            ``(B, H, N, D)``.
        """
        order = self._order(q.shape[2] - text_tokens, text_tokens)
        if order is not None:
            order = order.to(q.device)
            q, k, v = (x.index_select(2, order) for x in (q, k, v))
        mask = self.block_mask(q, k, text_tokens=text_tokens, random_probe=random_probe)
        output = asa_attention(q, k, v, mask, self.block_size, self.pool_size, key_padding_mask)
        return output if order is None else output.index_select(2, order.argsort())

    def _order(self, cells: int, text_tokens: int) -> Tensor | None:
        if self.grid is None or math.prod(self.grid) != cells:
            return None
        return torch.cat([z_order(self.grid), torch.arange(cells, cells + text_tokens)])

    def block_mask(self, q: Tensor, k: Tensor, *, text_tokens: int = 0, random_probe: bool = False) -> Tensor:
        """``(B, H, n, n)`` bool: the blocks that are kept, without gradient; arguments as in a call."""
        batch, heads, length, _ = q.shape
        if random_probe:
            q_index, k_index = (
                random_offsets(batch, heads, self.block_size, self.samples).to(q.device) for _ in range(2)
            )
        else:
            q_index = evenly_spaced_offsets(self.block_size, self.samples).to(q.device).expand(batch, heads, -1)
            k_index = q_index
        importance = block_importance(q, k, q_index, k_index, self.block_size)
        text_blocks = -(-length // self.block_size) - (length - text_tokens) // self.block_size if text_tokens else 0
        return energy_block_mask(
            importance, self.energy_threshold, self.min_retain_ratio, self.max_retain_ratio, text_blocks
        )


@dataclass
class DiTProcessor:
    """Self-attention of DiT-like blocks (diffusers' ``Attention`` with its default processor)."""

    attention: AdaptiveAttention

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """``(B, N, C)`` to the same."""
        if encoder_hidden_states is not None or attention_mask is not None or hidden_states.ndim != 3:
            raise RequestError("adaptive attention serves self-attention over (B, N, C) tokens without a mask")
        q, k, v = (
            _heads(project(hidden_states), attn.heads).transpose(1, 2) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        q, k = _normalised(attn.norm_q, q), _normalised(attn.norm_k, k)
        output = self.attention(q, k, v, random_probe=attn.training)
        output = attn.to_out[1](attn.to_out[0](output.transpose(1, 2).flatten(2)))
        return (output + hidden_states if attn.residual_connection else output) / attn.rescale_output_factor


@dataclass
class WanProcessor:
    """Self-attention of Wan's blocks."""

    attention: AdaptiveAttention

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """``(B, N, C)`` to the same."""
        if encoder_hidden_states is not None or attention_mask is not None:
            raise RequestError("adaptive attention serves self-attention without a mask")
        if getattr(attn, "fused_projections", False):
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k, v = (_heads(x, attn.heads) for x in (attn.norm_q(q), attn.norm_k(k), v))
        if rotary_emb is not None:
            q, k = _rotated(q, *rotary_emb), _rotated(k, *rotary_emb)
        output = self.attention(*(x.transpose(1, 2) for x in (q, k, v)), random_probe=attn.training)
        return attn.to_out[1](attn.to_out[0](output.transpose(1, 2).flatten(2).type_as(q)))


@dataclass
class QwenImageProcessor:
    """Joint attention of Qwen-Image's dual-stream blocks: the text is moved behind the image and always kept."""

    attention: AdaptiveAttention

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image and text tokens, ``(B, N, C)`` and ``(B, L, C)``, to the same."""
        if attention_mask is not None:
            raise RequestError("adaptive attention takes the text's mask alone: encoder_hidden_states_mask")
        image = [_heads(project(hidden_states), attn.heads) for project in (attn.to_q, attn.to_k, attn.to_v)]
        text = [
            _heads(project(encoder_hidden_states), attn.heads)
            for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        ]
        image[0], image[1] = _normalised(attn.norm_q, image[0]), _normalised(attn.norm_k, image[1])
        text[0], text[1] = _normalised(attn.norm_added_q, text[0]), _normalised(attn.norm_added_k, text[1])
        if image_rotary_emb is not None:
            for stream, frequencies in zip((image, text), image_rotary_emb, strict=True):
                stream[0], stream[1] = _turned(stream[0], frequencies), _turned(stream[1], frequencies)
        q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(image, text, strict=True))
        padding = None
        if encoder_hidden_states_mask is not None:
            no_padding = hidden_states.new_zeros(hidden_states.shape[:2], dtype=torch.bool)
            padding = torch.cat([no_padding, ~encoder_hidden_states_mask.bool()], dim=1)
        length, text_length = hidden_states.shape[1], encoder_hidden_states.shape[1]
        output = self.attention(q, k, v, text_tokens=text_length, key_padding_mask=padding, random_probe=attn.training)
        output = output.transpose(1, 2).flatten(2).to(q.dtype)
        of_image = attn.to_out[0](output[:, :length])
        if len(attn.to_out) > 1:
            of_image = attn.to_out[1](of_image)
        return of_image, attn.to_add_out(output[:, length:])


def _heads(x: Tensor, heads: int) -> Tensor:
    """``(B, N, H * D)`` to ``(B, N, H, D)``."""
    return x.unflatten(2, (heads, -1))


def _normalised(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring pairs of ``(B, N, H, D)`` by angles whose cosines and sines are given twice each."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2).type_as(x)


def _turned(x: Tensor, frequencies: Tensor) -> Tensor:
    """Multiply neighbouring pairs of ``(B, N, H, D)`` by complex numbers of length 1.

    They are ``(N, D / 2)`` complex or, in a graph that is exported, ``(N, D / 2, 2)`` real and imaginary parts.
    """
    parts = torch.view_as_real(frequencies) if frequencies.is_complex() else frequencies
    cos, sin = (part.repeat_interleave(2, dim=-1)[:, None] for part in parts.unbind(-1))
    return _rotated(x.float(), cos, sin).type_as(x)


_PROCESSORS: dict[str, Callable[[AdaptiveAttention], Any]] = {
    "AttnProcessor2_0": DiTProcessor,
    "DiTProcessor": DiTProcessor,
    "WanAttnProcessor": WanProcessor,
    "WanProcessor": WanProcessor,
    "QwenDoubleStreamAttnProcessor2_0": QwenImageProcessor,
    "QwenImageProcessor": QwenImageProcessor,
}
"""By the class of the processor that is replaced."""


def set_adaptive_attention(module: nn.Module, attention: AdaptiveAttention) -> list[str]:
    """Give every self-attention of a diffusers transformer an adaptive block-sparse processor, in place.

    Args:
        module: DiT-like, Wan or Qwen-Image, or a module that holds such blocks.
        attention: Which blocks are kept.

    Returns:
        Names of the attentions that were changed.

    Raises:
        ModelError: The module has no self-attention that can be replaced.
    """
    changed = []
    for name, attn in module.named_modules():
        make = _PROCESSORS.get(type(getattr(attn, "processor", None)).__name__)
        if make is None or _is_cross(attn, make):
            continue
        attn.set_processor(make(attention))
        changed.append(name)
    if not changed:
        raise ModelError(
            f"{type(module).__name__} has no self-attention that can be made block-sparse: "
            "DiT-like, Wan and Qwen-Image transformers have"
        )
    return changed


def _is_cross(attn: Any, make: Callable[[AdaptiveAttention], Any]) -> bool:
    """Whether an attention looks at another sequence, or needs what no processor here does."""
    if make is QwenImageProcessor:
        return False
    return bool(
        attn.is_cross_attention
        or getattr(attn, "group_norm", None) is not None
        or getattr(attn, "spatial_norm", None) is not None
    )
