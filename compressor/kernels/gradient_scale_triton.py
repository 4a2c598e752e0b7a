"""Multiply a stored gradient by what comes from above, in place and only where that is not 1."""

# mypy: disable-error-code="no-untyped-def"
# Kernel arguments have Triton's own types.
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressor.kernels.configurations import row_tiles
from compressor.kernels.dispatch import gpu_family
from compressor.kernels.row_layout import row_layout
from compressor.kernels.row_walk_triton import (
    aligned,
    load_tile,
    program_rows,
    row_starts,
    store_tile,
    walk_arguments,
    walk_grid,
    walk_options,
)

__all__ = ["scale_gradient", "scale_rows_kernel"]


@triton.jit
def scale_rows_kernel(
    gradient_ptr,  # (outer, inner, columns) by strides, changed in place
    factor_ptr,  # (outer * inner) float by stride
    inner,
    columns,
    gradient_outer,
    gradient_inner,
    gradient_column,
    factor_stride,
    UNIT: tl.constexpr,
    IN_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows times their factors; a program whose factors are all 1 reads no gradient."""
    outer, place = program_rows(inner, ROWS)
    exists = place < (inner if IN_ROWS else aligned(inner, UNIT))
    columns = aligned(columns, UNIT) if IN_ROWS else columns
    factor = tl.load(factor_ptr + (outer * inner + place) * factor_stride, mask=exists, other=1.0).to(tl.float32)
    changes = tl.max(tl.where(factor == 1.0, 0, 1), axis=0)
    if changes > 0:
        gradient_row = row_starts(gradient_ptr, outer, place, gradient_outer, gradient_inner, UNIT, IN_ROWS)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            within = exists[:, None] & (column < columns)[None, :]
            gradient = (
                load_tile(gradient_row, column, gradient_column, columns, exists, exists, 0.0, UNIT, IN_ROWS)
                * factor[:, None]
            )
            store_tile(gradient_row, column, gradient_column, gradient, within, UNIT, IN_ROWS)


def _scale_in_place(gradient: Tensor, factor: Tensor, dims: Sequence[int]) -> None:
    layout = row_layout([gradient], dims)
    assert layout is not None, "gradients are allocated so that they can be walked"
    tiles = row_tiles(gpu_family(gradient.device), layout.columns, layout.rows_are_contiguous)
    flat = factor.reshape(-1)
    scale_rows_kernel[walk_grid(layout, tiles)](
        gradient, flat, *walk_arguments(layout), flat.stride(0), **walk_options(layout, tiles)
    )


def scale_gradient(gradient: Tensor, factor: Tensor, dims: Sequence[int]) -> Tensor:
    """The stored gradient of each row times the gradient from above.

    Args:
        gradient: What a forward pass stored.
        factor: Float, the shape of the gradient without ``dims``; often an expanded scalar.
        dims: Sorted axes of a row.

    Returns:
        The same storage, where this backward pass is the last that may need it; a new tensor where the graph is kept
        (``retain_graph=True``) or compiled, or where autograd hooks may have handed on the stored one.
    """
    if torch.compiler.is_compiling() or _graph_is_kept():
        shape = [1 if axis in dims else size for axis, size in enumerate(gradient.shape)]
        return (gradient * factor.reshape(shape)).to(gradient.dtype)
    _scale_in_place(gradient, factor, dims)
    return gradient


def _graph_is_kept() -> bool:
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if keeps is None else bool(keeps())
