"""The attention of a diffusion student: dense as its teacher's, or Video-BLADE's adaptive block-sparse one.

Methods that train a diffusion transformer extend `AttentionConfig`, so `--set attention=blade` means the same for all
of them: the student learns under its own sparsity, while teachers stay dense. The change is an edit of the student, so
it is saved with it, trained on by later methods, and exported as dense attention under the same mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from compressor.errors import RequestError
from compressor.method import MethodConfig
from compressor.models.model import Model

__all__ = ["AttentionConfig", "BladeConfig", "with_attention"]


class BladeConfig(MethodConfig):
    """Which blocks of keys each block of queries sees (Video-BLADE, arXiv 2508.10774)."""

    block_size: int = Field(128, ge=1)
    """Tokens of a block: 64 or 128 run in a sparse kernel on a GPU."""
    samples: int = Field(32, ge=1)
    """Tokens of each block that the probe looks at; at most a block's."""
    energy_threshold: float = Field(0.95, gt=0, le=1)
    """Share of the probe's mass that the kept blocks reach at most."""
    min_retain_ratio: float = Field(0.05, ge=0, le=1)
    """Share of the key blocks that each block of queries keeps at least."""
    max_retain_ratio: float = Field(0.17, ge=0, le=1)
    """Share that it keeps at most; equal to the least for a fixed share."""
    pool_size: int | None = Field(None, ge=1)
    """Consecutive tokens of a pooled key of the global branch (Wan: 30); None for no such branch."""


class AttentionConfig(MethodConfig):
    """Keys of a method whose student is a diffusion transformer."""

    attention: Literal["dense", "blade"] = "dense"
    """The student's self-attention: as the teacher's, or adaptive and block-sparse ("blade")."""
    blade: BladeConfig = BladeConfig()
    """The blocks that "blade" keeps."""


def with_attention(student: Model, config: AttentionConfig, shape: Sequence[int]) -> Model:
    """The student with the attention that the configuration wants; changed in place.

    Args:
        student: A diffusion transformer: DiT-like, Wan or Qwen-Image.
        config: Which attention.
        shape: ``(C, H, W)`` or ``(C, F, H, W)`` of a sample: its tokens are ordered so that blocks are compact regions.

    Raises:
        ModelError: The student has no self-attention that can be made block-sparse.
        RequestError: A sample has too few tokens for two blocks, or more tokens are probed than a block has.
    """
    if config.attention == "dense":
        return student
    patch = getattr(getattr(student.module, "config", None), "patch_size", None) or 1
    sizes = list(patch) if isinstance(patch, (list, tuple)) else [patch] * len(shape[1:])
    grid = [size // part for size, part in zip(shape[1:], sizes, strict=True)]
    blade = config.blade
    if math.prod(grid) <= blade.block_size:
        raise RequestError(
            f"attention=blade needs more than one block, but a sample has {math.prod(grid)} tokens and "
            f"blade.block_size is {blade.block_size}: make it smaller"
        )
    return student.edit("attention.blade", grid=grid, **blade.model_dump())
