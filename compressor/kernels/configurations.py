"""Launch configurations of every kernel by GPU family, so that a first call never tunes.

The families are those of `dispatch.gpu_family`. Entries were chosen from compile reports (registers, shared memory,
no spills: ``python benchmarks/kernels.py --compile-only``); ``python benchmarks/kernels.py --tune`` measures the
neighbours of each entry on the GPU at hand and prints the lines to replace here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = [
    "FAMILIES",
    "AttentionTiles",
    "RowTiles",
    "attention_tiles",
    "next_power_of_two",
    "row_tiles",
]

FAMILIES = ("ampere", "ada", "hopper", "blackwell", "blackwell-consumer")


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n (n at least 1)."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class RowTiles:
    """How a row kernel is launched.

    Attributes:
        rows: Rows of a program.
        block: Columns of a tile; a power of two.
        num_warps: Warps of a program.
        whole: Whether the tile holds whole rows (one read), or walks them (two).
    """

    rows: int
    block: int
    num_warps: int
    whole: bool


# Entries of a row that a program may hold in registers: 32 numbers a thread and tile at 16 warps; and the same for
# kernels that need more than two tiles at a time.
_WHOLE_ROW_LIMIT = {family: 16384 for family in FAMILIES}
_WHOLE_ROW_LIMIT_CROWDED = {family: 8192 for family in FAMILIES}
# (block, warps) of the loop over longer rows: 32 entries a thread again. Few rows at a time, so that the second walk
# finds much of its row in the cache.
_LONG_ROW = {family: (8192, 8) for family in FAMILIES}
_LONG_ROW_CROWDED = {family: (4096, 4) for family in FAMILIES}
# Neighbouring rows (a dense map's positions): entries of a tile that holds whole rows, and how many positions may lie
# side by side (16 numbers of 2 bytes fill a sector of memory).
_WHOLE_COLUMN_TILE = 8192
_POSITIONS = (32, 16)
# (positions, columns, warps) of the loop over longer ones: a thread holds all columns of its positions, so that sums
# need no other thread.
_LONG_COLUMNS = (256, 4, 1)


def row_tiles(family: str, columns: int, rows_are_contiguous: bool, *, crowded: bool = False) -> RowTiles:
    """Launch of a kernel over rows.

    Args:
        family: See `dispatch.gpu_family`.
        columns: Entries of a row.
        rows_are_contiguous: Whether neighbours in memory belong to one row.
        crowded: Whether the kernel holds more than two tiles at a time.

    Returns:
        The tiles. Short rows share a program, so that its warps have work.
    """
    block = next_power_of_two(columns)
    if not rows_are_contiguous:
        for positions in _POSITIONS:
            if positions * block <= (_WHOLE_COLUMN_TILE // 2 if crowded else _WHOLE_COLUMN_TILE):
                return RowTiles(positions, block, _warps(positions * block * (2 if crowded else 1)), True)
        return RowTiles(*_LONG_COLUMNS, False)
    limit = _WHOLE_ROW_LIMIT_CROWDED[family] if crowded else _WHOLE_ROW_LIMIT[family]
    if block <= limit:
        rows = max(1, min(64, 1024 // block))
        return RowTiles(rows, block, _warps(rows * block), True)
    return RowTiles(1, *(_LONG_ROW_CROWDED if crowded else _LONG_ROW)[family], False)


def _warps(entries: int) -> int:
    """About 32 entries of each tensor a thread: few instructions an entry, and a short row stays within one warp."""
    return max(1, min(16, next_power_of_two(math.ceil(entries / 1024))))


@dataclass(frozen=True)
class AttentionTiles:
    """How an attention kernel is launched; both tiles divide the block of the mask.

    Attributes:
        queries: Queries of a tile.
        keys: Keys of a tile.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline.
    """

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# By mask block (below 128, from 128) and head (up to 64, wider): (queries, keys, warps, stages), for 16-bit numbers.
_ATTENTION = {
    ("ampere", "forward"): ((64, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
    ("ampere", "query_gradient"): ((64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 2)),
    ("ampere", "key_gradient"): ((64, 64, 4, 3), (32, 64, 4, 3), (64, 128, 8, 2), (32, 64, 4, 3)),
    ("ada", "forward"): ((64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3), (128, 32, 8, 2)),
    ("ada", "query_gradient"): ((64, 64, 4, 2), (64, 32, 4, 2), (128, 64, 8, 2), (64, 32, 4, 2)),
    ("ada", "key_gradient"): ((64, 64, 4, 2), (32, 64, 4, 2), (64, 128, 8, 2), (32, 64, 4, 2)),
    ("hopper", "forward"): ((64, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 3), (128, 64, 8, 3)),
    ("hopper", "query_gradient"): ((64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3), (128, 64, 8, 2)),
    ("hopper", "key_gradient"): ((64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 8, 3), (64, 128, 8, 2)),
}
_ATTENTION_FLOAT32 = {
    "forward": ((32, 32, 4, 2), (32, 32, 4, 2)),
    "query_gradient": ((32, 32, 4, 2), (16, 32, 4, 1)),
    "key_gradient": ((32, 32, 4, 2), (64, 16, 8, 1)),
}
_LIKE = {"blackwell": "hopper", "blackwell-consumer": "ada"}


def attention_tiles(family: str, part: str, block_size: int, head_dim: int, item_size: int) -> AttentionTiles:
    """Launch of an attention kernel.

    Args:
        family: See `dispatch.gpu_family`.
        part: "forward", "query_gradient" or "key_gradient".
        block_size: Block of the mask, a multiple of 16.
        head_dim: Width of a head, rounded up to a power of two.
        item_size: Bytes of a number.

    Returns:
        Tiles that divide the block; 32-bit numbers get smaller ones.
    """
    wide = head_dim > 64
    if item_size > 2:
        queries, keys, num_warps, num_stages = _ATTENTION_FLOAT32[part][wide]
    else:
        choices = _ATTENTION[_LIKE.get(family, family), part]
        queries, keys, num_warps, num_stages = choices[2 * (block_size >= 128) + wide]
    divisor = block_size & -block_size
    return AttentionTiles(min(queries, divisor), min(keys, divisor), num_warps, num_stages)
