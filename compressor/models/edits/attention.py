"""Edits of a model's attention: adaptive block-sparse attention in place of the dense one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from compressor.models.attention import AdaptiveAttention, set_adaptive_attention
from compressor.models.model import edit

__all__ = ["make_adaptive"]


@edit("attention.blade")
def make_adaptive(module: nn.Module, grid: Sequence[int] | None = None, **settings: Any) -> nn.Module:
    """Replace every self-attention; weights stay as they are.

    Args:
        module: A diffusers transformer; changed in place.
        grid: Cells of the video or image, to order its tokens by.
        settings: Further fields of `AdaptiveAttention`.
    """
    set_adaptive_attention(module, AdaptiveAttention(grid=None if grid is None else tuple(grid), **settings))
    return module
