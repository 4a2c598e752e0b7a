"""How a kernel walks a tensor of any strides as rows: two levels of rows, one of columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from compressor.errors import RequestError

__all__ = ["RowLayout", "RowStrides", "as_dims", "as_rows", "row_layout", "row_shape"]


@dataclass(frozen=True)
class RowStrides:
    """Strides of one tensor, in elements: row ``(o, i)`` starts at ``o * outer + i * inner``."""

    outer: int
    inner: int
    column: int


@dataclass(frozen=True)
class RowLayout:
    """Tensors of one shape as ``outer * inner`` rows of ``columns`` entries; rows count in the order of their axes."""

    outer: int
    inner: int
    columns: int
    strides: tuple[RowStrides, ...]

    @property
    def rows(self) -> int:
        return self.outer * self.inner

    @property
    def rows_are_contiguous(self) -> bool:
        """Whether neighbours in memory belong to one row (and not to neighbouring rows)."""
        return self.strides[0].column == 1 or self.strides[0].inner != 1


def as_dims(dim: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Sorted non-negative axes.

    Raises:
        RequestError: An axis does not exist, is named twice, or none is named.
    """
    named = (dim,) if isinstance(dim, int) else tuple(dim)
    if not named or any(not -ndim <= axis < ndim for axis in named):
        raise RequestError(f"dim must name axes of a tensor of {ndim} axes, not {dim}")
    axes = tuple(sorted({axis % ndim for axis in named}))
    if len(axes) != len(named):
        raise RequestError(f"dim names an axis twice: {dim}")
    return axes


def row_shape(shape: Sequence[int], dims: Sequence[int]) -> tuple[int, ...]:
    """The shape without the axes of a row: one entry a row."""
    return tuple(size for axis, size in enumerate(shape) if axis not in dims)


def as_rows(value: Tensor, dims: Sequence[int]) -> Tensor:
    """``(rows, columns)``, by a view where strides allow and a copy elsewhere."""
    last = tuple(range(-len(dims), 0))
    return value.movedim(tuple(dims), last).reshape(-1, math.prod([value.shape[axis] for axis in dims]))


def row_layout(tensors: Sequence[Tensor], dims: Sequence[int]) -> RowLayout | None:
    """Walk tensors of one shape together.

    Args:
        tensors: The same shape, strides of their own.
        dims: Sorted non-negative axes of a row.

    Returns:
        The layout, or None where the axes of these strides do not merge into two levels of rows and one of columns:
        then a copy is needed.
    """
    shape = tensors[0].shape
    row_sizes, row_strides = _merge(tensors, [axis for axis in range(len(shape)) if axis not in dims])
    column_sizes, column_strides = _merge(tensors, dims)
    if len(row_sizes) > 2 or len(column_sizes) > 1:
        return None
    while len(row_sizes) < 2:
        row_sizes.insert(0, 1)
        row_strides.insert(0, [0] * len(tensors))
    if not column_sizes:
        column_sizes, column_strides = [1], [[1] * len(tensors)]
    strides = tuple(RowStrides(row_strides[0][t], row_strides[1][t], column_strides[0][t]) for t in range(len(tensors)))
    return RowLayout(row_sizes[0], row_sizes[1], column_sizes[0], strides)


def _merge(tensors: Sequence[Tensor], axes: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """Join neighbouring axes that are one axis in every tensor; axes of size 1 vanish."""
    sizes: list[int] = []
    strides: list[list[int]] = []
    for axis in axes:
        size = tensors[0].shape[axis]
        here = [tensor.stride(axis) for tensor in tensors]
        if size == 1:
            continue
        if sizes and all(above == size * below for above, below in zip(strides[-1], here, strict=True)):
            sizes[-1] *= size
            strides[-1] = here
        else:
            sizes.append(size)
            strides.append(here)
    return sizes, strides
