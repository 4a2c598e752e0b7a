"""The Triton kernels of `feature_matching`: distances with their gradients, and sums of powers."""

# mypy: disable-error-code="no-untyped-def"
# Kernel arguments have Triton's own types.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from compressor.kernels.configurations import RowTiles, row_tiles
from compressor.kernels.dispatch import gpu_family
from compressor.kernels.feature_matching import EPSILONS
from compressor.kernels.gradient_scale_triton import scale_gradient
from compressor.kernels.row_layout import RowLayout, row_layout, row_shape
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

__all__ = ["Distances", "PowerSums", "distance_kernel", "power_gradient_kernel", "power_sum_kernel"]

MODE_NUMBERS = {"mse": 0, "normalized_mse": 1, "cosine": 2}


@triton.jit
def distance_kernel(
    student_ptr,  # (outer, inner, columns) by strides
    teacher_ptr,  # the same shape
    gradient_ptr,  # the same shape; written where WRITE_GRADIENT
    factor_ptr,  # (outer * inner) float32 by stride
    rows_ptr,  # (outer * inner) float32, written
    inner,
    columns,
    student_outer,
    student_inner,
    student_column,
    teacher_outer,
    teacher_inner,
    teacher_column,
    gradient_outer,
    gradient_inner,
    gradient_column,
    factor_stride,
    eps,
    MODE: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
    WHOLE: tl.constexpr,
    UNIT: tl.constexpr,
    IN_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each row's distance; its gradient is ``a * student + b * teacher`` with two numbers a row."""
    outer, place = program_rows(inner, ROWS)
    row = outer * inner + place
    exists = place < (inner if IN_ROWS else aligned(inner, UNIT))
    columns = aligned(columns, UNIT) if IN_ROWS else columns
    factor = tl.load(factor_ptr + row * factor_stride, mask=exists, other=0.0)
    used = factor != 0.0
    student_row = row_starts(student_ptr, outer, place, student_outer, student_inner, UNIT, IN_ROWS)
    teacher_row = row_starts(teacher_ptr, outer, place, teacher_outer, teacher_inner, UNIT, IN_ROWS)
    gradient_row = row_starts(gradient_ptr, outer, place, gradient_outer, gradient_inner, UNIT, IN_ROWS)
    student = tl.zeros((ROWS, BLOCK), tl.float32)
    teacher = tl.zeros((ROWS, BLOCK), tl.float32)
    difference_sum = tl.zeros((ROWS,), tl.float32)
    student_sum = tl.zeros((ROWS,), tl.float32)
    teacher_sum = tl.zeros((ROWS,), tl.float32)
    product_sum = tl.zeros((ROWS,), tl.float32)
    AGAIN: tl.constexpr = WRITE_GRADIENT and not WHOLE
    for start in range(0, BLOCK if WHOLE else columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        student = load_tile(student_row, column, student_column, columns, exists, used, 0.0, UNIT, IN_ROWS, AGAIN)
        teacher = load_tile(teacher_row, column, teacher_column, columns, exists, used, 0.0, UNIT, IN_ROWS, AGAIN)
        if MODE == 0:
            difference = student - teacher
            difference_sum += tl.sum(difference * difference, axis=1)
        else:
            student_sum += tl.sum(student * student, axis=1)
            teacher_sum += tl.sum(teacher * teacher, axis=1)
            product_sum += tl.sum(student * teacher, axis=1)

    if MODE == 0:
        distance = difference_sum / columns
        of_student = (2.0 / columns) * factor
        of_teacher = -of_student
    else:
        student_norm = tl.sqrt(student_sum)
        teacher_norm = tl.sqrt(teacher_sum)
        # Vectors without direction count as zeros and get no gradient.
        per_student = tl.where(student_norm > eps, 1.0 / student_norm, 0.0)
        per_teacher = tl.where(teacher_norm > eps, 1.0 / teacher_norm, 0.0)
        cosine = product_sum * per_student * per_teacher
        scale = 1.0 if MODE == 2 else 2.0
        of_teacher = -scale * factor * per_student * per_teacher
        of_student = scale * factor * cosine * per_student * per_student
        if MODE == 2:
            distance = 1.0 - cosine
        elif WHOLE:
            unit_difference = student * per_student[:, None] - teacher * per_teacher[:, None]
            distance = tl.sum(unit_difference * unit_difference, axis=1)
        else:
            units = student_sum * per_student * per_student + teacher_sum * per_teacher * per_teacher
            distance = tl.maximum(units - 2.0 * cosine, 0.0)
    tl.store(rows_ptr + row, tl.where(used, distance * factor, 0.0), mask=exists)

    if WRITE_GRADIENT:
        for start in range(0, BLOCK if WHOLE else columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            in_row = (column < columns)[None, :]
            if not WHOLE:
                student = load_tile(student_row, column, student_column, columns, exists, used, 0.0, UNIT, IN_ROWS)
                teacher = load_tile(teacher_row, column, teacher_column, columns, exists, used, 0.0, UNIT, IN_ROWS)
            if MODE == 0:
                gradient = (student - teacher) * of_student[:, None]
            else:
                gradient = student * of_student[:, None] + teacher * of_teacher[:, None]
            gradient = tl.where(used[:, None], gradient, 0.0)
            store_tile(gradient_row, column, gradient_column, gradient, exists[:, None] & in_row, UNIT, IN_ROWS)


@triton.jit
def _power(x, exponent):
    """|x| ** exponent, 0 at 0 for exponents above 0 and 1 for exponent 0."""
    magnitude = tl.abs(x)
    return tl.where(magnitude == 0.0, tl.where(exponent == 0.0, 1.0, 0.0), tl.exp2(exponent * tl.log2(magnitude)))


@triton.jit
def power_sum_kernel(
    features_ptr,  # (outer, inner, columns) by strides
    sums_ptr,  # (outer * inner) float32, written
    inner,
    columns,
    features_outer,
    features_inner,
    features_column,
    power,
    SQUARE: tl.constexpr,
    UNIT: tl.constexpr,
    IN_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``sum |x| ** power`` of each row."""
    outer, place = program_rows(inner, ROWS)
    exists = place < (inner if IN_ROWS else aligned(inner, UNIT))
    columns = aligned(columns, UNIT) if IN_ROWS else columns
    features_row = row_starts(features_ptr, outer, place, features_outer, features_inner, UNIT, IN_ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        within = exists[:, None] & (column < columns)[None, :]
        x = load_tile(features_row, column, features_column, columns, exists, exists, 0.0, UNIT, IN_ROWS)
        powers = x * x if SQUARE else tl.where(within, _power(x, power), 0.0)
        total += tl.sum(powers, axis=1)
    tl.store(sums_ptr + outer * inner + place, total, mask=exists)


@triton.jit
def power_gradient_kernel(
    features_ptr,  # (outer, inner, columns) by strides
    gradient_ptr,  # the same shape, written
    upstream_ptr,  # (outer * inner) float32
    inner,
    columns,
    features_outer,
    features_inner,
    features_column,
    gradient_outer,
    gradient_inner,
    gradient_column,
    power,
    SQUARE: tl.constexpr,
    UNIT: tl.constexpr,
    IN_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``power * |x| ** (power - 1) * sign(x)`` times each row's gradient."""
    outer, place = program_rows(inner, ROWS)
    exists = place < (inner if IN_ROWS else aligned(inner, UNIT))
    columns = aligned(columns, UNIT) if IN_ROWS else columns
    features_row = row_starts(features_ptr, outer, place, features_outer, features_inner, UNIT, IN_ROWS)
    gradient_row = row_starts(gradient_ptr, outer, place, gradient_outer, gradient_inner, UNIT, IN_ROWS)
    upstream = tl.load(upstream_ptr + outer * inner + place, mask=exists, other=0.0) * power
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        within = exists[:, None] & (column < columns)[None, :]
        x = load_tile(features_row, column, features_column, columns, exists, exists, 0.0, UNIT, IN_ROWS)
        sign = tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))
        slope = x if SQUARE else sign * _power(x, power - 1.0)
        gradient = slope * upstream[:, None]
        store_tile(gradient_row, column, gradient_column, gradient, within, UNIT, IN_ROWS)


def _walk(tensors: list[Tensor], axis: int, *, crowded: bool = False) -> tuple[RowLayout, RowTiles]:
    layout = row_layout(tensors, (axis,))
    assert layout is not None, "the caller copies what cannot be walked"
    tiles = row_tiles(gpu_family(tensors[0].device), layout.columns, layout.rows_are_contiguous, crowded=crowded)
    return layout, tiles


def _launch_distances(
    student: Tensor, teacher: Tensor, factors: Tensor, mode: str, axis: int, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    gradient = torch.empty_like(student) if with_gradient else student.new_empty(0)
    layout, tiles = _walk([student, teacher, gradient if with_gradient else student], axis)
    rows = torch.empty(row_shape(student.shape, (axis,)), dtype=torch.float32, device=student.device)
    flat = factors.reshape(-1)
    distance_kernel[walk_grid(layout, tiles)](
        student,
        teacher,
        gradient,
        flat,
        rows,
        *walk_arguments(layout),
        flat.stride(0),
        EPSILONS[mode],
        MODE=MODE_NUMBERS[mode],
        WRITE_GRADIENT=with_gradient,
        WHOLE=tiles.whole,
        **walk_options(layout, tiles),
    )
    return rows, gradient


def _launch_power_sums(features: Tensor, power: float, axis: int) -> Tensor:
    layout, tiles = _walk([features], axis, crowded=True)
    sums = torch.empty(row_shape(features.shape, (axis,)), dtype=torch.float32, device=features.device)
    power_sum_kernel[walk_grid(layout, tiles)](
        features,
        sums,
        *walk_arguments(layout),
        power,
        SQUARE=power == 2.0,
        **walk_options(layout, tiles),
    )
    return sums


def _launch_power_gradient(features: Tensor, upstream: Tensor, power: float, axis: int) -> Tensor:
    gradient = torch.empty_like(features)
    layout, tiles = _walk([features, gradient], axis, crowded=True)
    power_gradient_kernel[walk_grid(layout, tiles)](
        features,
        gradient,
        upstream.contiguous(),
        *walk_arguments(layout),
        power,
        SQUARE=power == 2.0,
        **walk_options(layout, tiles),
    )
    return gradient


_distances = torch.library.custom_op(
    "compressor::feature_distances",
    _launch_distances,
    mutates_args=(),
    schema=(
        "(Tensor student, Tensor teacher, Tensor factors, str mode, int axis, bool with_gradient) -> (Tensor, Tensor)"
    ),
)
_power_sums = torch.library.custom_op(
    "compressor::power_sums",
    _launch_power_sums,
    mutates_args=(),
    schema="(Tensor features, float power, int axis) -> Tensor",
)
_power_gradient = torch.library.custom_op(
    "compressor::power_gradient",
    _launch_power_gradient,
    mutates_args=(),
    schema="(Tensor features, Tensor upstream, float power, int axis) -> Tensor",
)


@_distances.register_fake
def _fake_distances(
    student: Tensor, teacher: Tensor, factors: Tensor, mode: str, axis: int, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    rows = student.new_empty(row_shape(student.shape, (axis,)), dtype=torch.float32)
    return rows, torch.empty_like(student) if with_gradient else student.new_empty(0)


@_power_sums.register_fake
def _fake_power_sums(features: Tensor, power: float, axis: int) -> Tensor:
    return features.new_empty(row_shape(features.shape, (axis,)), dtype=torch.float32)


@_power_gradient.register_fake
def _fake_power_gradient(features: Tensor, upstream: Tensor, power: float, axis: int) -> Tensor:
    return torch.empty_like(features)


class Distances(torch.autograd.Function):
    """Each place's distance times its factor; the gradient is made in the forward pass and scaled later."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, factors: Tensor, mode: str, axis: int) -> Tensor:
        with_gradient = ctx.needs_input_grad[0]
        rows, gradient = torch.ops.compressor.feature_distances(student, teacher, factors, mode, axis, with_gradient)
        if with_gradient:
            ctx.save_for_backward(gradient)
        ctx.axis = axis
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return scale_gradient(gradient, rows, (ctx.axis,)), None, None, None, None


class PowerSums(torch.autograd.Function):
    """``sum |x| ** power`` along an axis."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, power: float, axis: int) -> Tensor:
        ctx.save_for_backward(features)
        ctx.power, ctx.axis = power, axis
        return torch.ops.compressor.power_sums(features, power, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (features,) = ctx.saved_tensors
        return torch.ops.compressor.power_gradient(features, upstream, ctx.power, ctx.axis), None, None
