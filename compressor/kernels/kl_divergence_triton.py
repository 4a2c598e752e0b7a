"""Launch and autograd of the kernels in `kl_rows_triton`: what `kl_divergence` calls on a GPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compressor.kernels.configurations import row_tiles
from compressor.kernels.dispatch import gpu_family
from compressor.kernels.gradient_scale_triton import scale_gradient
from compressor.kernels.kl_rows_triton import long_rows_kernel, whole_rows_kernel
from compressor.kernels.row_layout import row_layout, row_shape
from compressor.kernels.row_walk_triton import walk_arguments, walk_grid, walk_options

__all__ = ["MODE_NUMBERS", "Rows"]

MODE_NUMBERS = {"forward": 0, "reverse": 1, "jsd": 2}


def _launch(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    kl_scale: Tensor,
    ce_scale: Tensor | None,
    temperature: float,
    mode: int,
    beta: float,
    dims: list[int],
    kl_weight: float,
    ce_weight: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gradient = torch.empty_like(student) if with_gradient else student.new_empty(0)
    walked = [student, teacher, gradient if with_gradient else student]
    layout = row_layout(walked, dims)
    assert layout is not None, "the caller copies what cannot be walked"
    # Numbers of four bytes wait for their turn in twice as many registers.
    crowded = labels is not None or mode == MODE_NUMBERS["jsd"] or max(x.element_size() for x in (student, teacher)) > 2
    tiles = row_tiles(gpu_family(student.device), layout.columns, layout.rows_are_contiguous, crowded=crowded)
    shape = row_shape(student.shape, dims)
    kl_rows = torch.empty(shape, dtype=torch.float32, device=student.device)
    ce_rows = torch.empty_like(kl_rows) if labels is not None else kl_rows.new_zeros(shape)
    flat_kl, flat_ce = kl_scale.reshape(-1), (kl_scale if ce_scale is None else ce_scale).reshape(-1)
    kernel = whole_rows_kernel if tiles.whole else long_rows_kernel
    kernel[walk_grid(layout, tiles)](
        student,
        teacher,
        gradient,
        kl_rows if labels is None else labels.reshape(-1).to(torch.int64),
        flat_kl,
        flat_ce,
        kl_rows,
        ce_rows,
        *walk_arguments(layout),
        flat_kl.stride(0),
        flat_ce.stride(0),
        temperature,
        beta,
        math.log2(beta) if mode == MODE_NUMBERS["jsd"] else 0.0,
        math.log1p(-beta) / math.log(2) if mode == MODE_NUMBERS["jsd"] else 0.0,
        kl_weight,
        ce_weight,
        MODE=mode,
        HAS_LABELS=labels is not None,
        WRITE_GRADIENT=with_gradient,
        **walk_options(layout, tiles),
    )
    return kl_rows, ce_rows, gradient


_rows_operator = torch.library.custom_op(
    "compressor::divergence_rows",
    _launch,
    mutates_args=(),
    schema=(
        "(Tensor student, Tensor teacher, Tensor? labels, Tensor kl_scale, Tensor? ce_scale, float temperature, "
        "int mode, float beta, int[] dims, float kl_weight, float ce_weight, bool with_gradient) "
        "-> (Tensor, Tensor, Tensor)"
    ),
)


@_rows_operator.register_fake
def _fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    dims, with_gradient = arguments[7], arguments[10]
    rows = student.new_empty(row_shape(student.shape, dims), dtype=torch.float32)
    return rows, torch.empty_like(rows), torch.empty_like(student) if with_gradient else student.new_empty(0)


class Rows(torch.autograd.Function):
    """``(total, divergence, cross_entropy)`` of each row; the gradient is made in the forward pass and scaled later."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        kl_scale: Tensor,
        ce_scale: Tensor | None,
        temperature: float,
        mode: str,
        beta: float,
        dims: tuple[int, ...],
        kl_weight: float,
        ce_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with_gradient = ctx.needs_input_grad[0]
        kl_rows, ce_rows, gradient = torch.ops.compressor.divergence_rows(
            student,
            teacher,
            labels,
            kl_scale,
            ce_scale,
            float(temperature),
            MODE_NUMBERS[mode],
            float(beta),
            list(dims),
            float(kl_weight),
            float(ce_weight),
            with_gradient,
        )
        if with_gradient:
            ctx.save_for_backward(gradient)
        ctx.dims = dims
        total = kl_weight * kl_rows if labels is None else kl_weight * kl_rows + ce_weight * ce_rows
        ctx.mark_non_differentiable(kl_rows, ce_rows)
        return total, kl_rows, ce_rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return scale_gradient(gradient, total, ctx.dims), *([None] * 10)
