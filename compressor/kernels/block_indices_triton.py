"""The Triton kernel of `block_indices`: writes each row's true columns, one row a program."""

# mypy: disable-error-code="no-untyped-def"
# Kernel arguments have Triton's own types.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressor.kernels.configurations import next_power_of_two

__all__ = ["fill_lists_kernel"]


@triton.jit
def fill_lists_kernel(
    mask_ptr,  # (outer, middle, rows, columns) uint8 by strides
    starts_ptr,  # (outer * middle * rows + 1) int32
    entries_ptr,  # (capacity) int32, written
    middle,
    rows,
    columns,
    stride_outer,
    stride_middle,
    stride_row,
    stride_column,
    BLOCK: tl.constexpr,
):
    """Columns of one row whose mask is set, in ascending order."""
    index = tl.program_id(0).to(tl.int64)
    row = index % rows
    head = index // rows % middle
    batch = index // rows // middle
    row_ptr = mask_ptr + batch * stride_outer + head * stride_middle + row * stride_row
    written = tl.load(starts_ptr + index)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        kept = tl.load(row_ptr + column * stride_column, mask=column < columns, other=0).to(tl.int32)
        place = written + tl.cumsum(kept, axis=0) - 1
        tl.store(entries_ptr + place, column, mask=kept != 0)
        written += tl.sum(kept, axis=0)


def _fill_lists(mask: Tensor, starts: Tensor, capacity: int) -> Tensor:
    """The entries of `BlockLists`.

    Args:
        mask: Bool, four axes, any strides.
        starts: ``(lists + 1,)`` int32.
        capacity: Length of the result.
    """
    entries = torch.empty(max(capacity, 1), dtype=torch.int32, device=mask.device)
    outer, middle, rows, columns = mask.shape
    fill_lists_kernel[(outer * middle * rows,)](
        mask.view(torch.uint8),
        starts,
        entries,
        middle,
        rows,
        columns,
        *mask.stride(),
        BLOCK=min(1024, next_power_of_two(columns)),
        num_warps=1,
    )
    return entries


_fill_lists_operator = torch.library.custom_op(
    "compressor::fill_lists",
    _fill_lists,
    mutates_args=(),
    schema="(Tensor mask, Tensor starts, int capacity) -> Tensor",
)


@_fill_lists_operator.register_fake
def _fake(mask: Tensor, starts: Tensor, capacity: int) -> Tensor:
    return starts.new_empty(max(capacity, 1))
