"""How every row kernel finds its rows, and the launch arguments for that.

A kernel's program takes ``ROWS`` neighbouring rows of one outer index. ``UNIT`` is a power of two that divides all
strides but the one that is 1, and the extent along that one: with it the compiler knows that vector loads are aligned
even where a size is a multiple of 8 only (1,000 classes), which Triton itself checks for multiples of 16 alone.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernel arguments have Triton's own types.
from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from compressor.kernels.configurations import RowTiles
from compressor.kernels.row_layout import RowLayout

__all__ = [
    "aligned",
    "load_tile",
    "program_rows",
    "row_starts",
    "store_tile",
    "walk_arguments",
    "walk_grid",
    "walk_options",
]

_LARGEST_UNIT = 16


@triton.jit
def aligned(x, UNIT: tl.constexpr):
    """X, known to be a multiple of UNIT."""
    if UNIT == 1:
        return x
    return x // UNIT * UNIT


@triton.jit
def program_rows(inner, ROWS: tl.constexpr):
    """The outer index of this program, and its rows within."""
    tiles = tl.cdiv(inner, ROWS)
    outer = (tl.program_id(0) // tiles).to(tl.int64)
    return outer, (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)


@triton.jit
def row_starts(ptr, outer, place, stride_outer, stride_inner, UNIT: tl.constexpr, IN_ROWS: tl.constexpr):
    """Pointers to the first column of each row."""
    if IN_ROWS:
        stride_inner = aligned(stride_inner, UNIT)
    return ptr + outer * aligned(stride_outer, UNIT) + place.to(tl.int64) * stride_inner


@triton.jit
def column_offsets(column, stride_column, UNIT: tl.constexpr, IN_ROWS: tl.constexpr):
    """``(1, BLOCK)`` offsets of columns from the start of a row."""
    if not IN_ROWS:
        stride_column = aligned(stride_column, UNIT)
    return (column.to(tl.int64) * stride_column)[None, :]


@triton.jit
def load_tile(
    rows,
    column,
    stride_column,
    columns,
    exists,
    used,
    other,
    UNIT: tl.constexpr,
    IN_ROWS: tl.constexpr,
    READ_AGAIN: tl.constexpr = False,
):
    """``(ROWS, BLOCK)`` float32: columns of the rows that start at the pointers, ``other`` outside and in unused rows.

    Where a row lies together in memory, unused rows are not read. Where neighbours in memory belong to neighbouring
    rows they are, and dropped then: a mask that differs from row to row would forbid vector loads.
    READ_AGAIN: whether a later walk reads them once more, so that the cache had better keep them.
    """
    at = rows[:, None] + column_offsets(column, stride_column, UNIT, IN_ROWS)
    mask = (used if IN_ROWS else exists)[:, None] & (column < columns)[None, :]
    if READ_AGAIN:
        tile = tl.load(at, mask=mask, other=other, eviction_policy="evict_last").to(tl.float32)
    else:
        tile = tl.load(at, mask=mask, other=other, eviction_policy="evict_first").to(tl.float32)
    return tile if IN_ROWS else tl.where(used[:, None], tile, other)


@triton.jit
def store_tile(rows, column, stride_column, value, mask, UNIT: tl.constexpr, IN_ROWS: tl.constexpr):
    """Write a tile in the dtype of the pointers; nothing here reads it again."""
    at = rows[:, None] + column_offsets(column, stride_column, UNIT, IN_ROWS)
    tl.store(at, value.to(rows.dtype.element_ty), mask=mask, eviction_policy="evict_first")


def walk_grid(layout: RowLayout, tiles: RowTiles) -> tuple[int]:
    """Programs of a launch."""
    return (layout.outer * triton.cdiv(layout.inner, tiles.rows),)


def walk_arguments(layout: RowLayout) -> list[int]:
    """``inner, columns``, then outer, inner and column stride of each tensor."""
    strides = [n for tensor in layout.strides for n in (tensor.outer, tensor.inner, tensor.column)]
    return [layout.inner, layout.columns, *strides]


def walk_options(layout: RowLayout, tiles: RowTiles) -> dict[str, Any]:
    """The constants that all row kernels share, and the number of warps."""
    in_rows = layout.rows_are_contiguous
    extent = layout.columns if in_rows else layout.inner
    others = [n for tensor in layout.strides for n in (tensor.outer, tensor.inner if in_rows else tensor.column)]
    along = {tensor.column if in_rows else tensor.inner for tensor in layout.strides}
    unit = math.gcd(_LARGEST_UNIT, extent, *others) if along == {1} else 1
    return {
        "UNIT": unit,
        "IN_ROWS": in_rows,
        "ROWS": tiles.rows,
        "BLOCK": tiles.block,
        "num_warps": tiles.num_warps,
    }
