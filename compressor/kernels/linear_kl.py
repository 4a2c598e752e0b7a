"""Linear layers and the divergence of their logits in one: the logits are made in chunks and never held whole.

For N rows, V classes and widths D_s and D_t the cost is three matrix products for the student (logits, and the
gradients of hidden states and weight) and one for the teacher; memory beyond the inputs is a chunk of both logits and
the gradients (the weight's in float32). `kl_div_from_logits` of the two linear layers is the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from compressor.errors import RequestError, nearest
from compressor.kernels.kl_divergence import REDUCTIONS, Divergence, Mode, Reduction, RowTerms, divergence_rows
from compressor.kernels.row_weights import check_row_weights, row_factors

__all__ = ["linear_kl_div"]


def linear_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    mode: Mode = "forward",
    beta: float = 0.5,
    reduction: Reduction = "batchmean",
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """`kl_div_from_logits` of ``student_hidden @ student_weight.T`` and ``teacher_hidden @ teacher_weight.T``.

    Gradients go to the student's hidden states, weight and bias; the teacher gets none. With "batchmean" and "sum" in
    float32 and bfloat16 they are made in the forward pass; with "none", and in float16 (where they would vanish before
    the loss scale reaches them), the backward pass makes the logits a second time. Under autocast all is computed in
    its dtype.

    Args:
        student_hidden: ``(..., D_s)`` float.
        student_weight: ``(V, D_s)``, of the same dtype.
        teacher_hidden: ``(..., D_t)``: the same leading axes.
        teacher_weight: ``(V, D_t)``.
        student_bias: ``(V,)``.
        teacher_bias: ``(V,)``.
        temperature: As in `kl_div_from_logits`, like the options below.
        mode: "forward", "reverse" or "jsd".
        beta: The teacher's share of the mixture of "jsd".
        reduction: "batchmean", "sum" or "none".
        mask: Bool, the leading axes.
        weights: Float, the leading axes.
        chunk_rows: Rows whose logits exist at once; by default so many that a chunk of logits is as large as the
            hidden states, but at least 256.

    Returns:
        Scalar or, with "none", the leading axes; float32 or wider.

    Raises:
        RequestError: Shapes or options do not fit together.
    """
    divergence = Divergence(temperature, mode, beta)
    _check(student_hidden, student_weight, student_bias, "student")
    _check(teacher_hidden, teacher_weight, teacher_bias, "teacher")
    shape = tuple(student_hidden.shape[:-1])
    if shape != tuple(teacher_hidden.shape[:-1]) or student_weight.shape[0] != teacher_weight.shape[0]:
        raise RequestError(
            f"student {tuple(student_hidden.shape)} and teacher {tuple(teacher_hidden.shape)} must have the same rows, "
            f"and their weights the same classes ({student_weight.shape[0]} and {teacher_weight.shape[0]})"
        )
    if reduction not in REDUCTIONS:
        raise RequestError(f"no reduction is named {reduction!r}: {nearest(str(reduction), REDUCTIONS)}")
    if chunk_rows is not None and chunk_rows < 1:
        raise RequestError(f"chunk_rows must be at least 1, not {chunk_rows}")
    check_row_weights(shape, mask, weights)
    factors = row_factors(student_hidden, shape, mask, weights, mean=reduction == "batchmean").reshape(-1)
    rows = math.prod(shape)
    width = max(student_hidden.shape[-1], teacher_hidden.shape[-1])
    step = chunk_rows or max(256, rows * width // student_weight.shape[0])

    device_type = student_hidden.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else student_hidden.dtype
    student = _Layer.of(student_hidden, student_weight, student_bias, dtype)
    with torch.no_grad():
        teacher = _Layer.of(teacher_hidden, teacher_weight, teacher_bias, _teacher_dtype(teacher_hidden, dtype))
    in_backward = reduction == "none" or student.hidden.dtype == torch.float16
    with torch.autocast(device_type, enabled=False):
        value = _LinearKL.apply(
            student.hidden, student.weight, student.bias, teacher, divergence, factors, step, in_backward
        )
    if reduction == "none":
        return value.reshape(shape)
    return value.sum() if in_backward else value


@dataclass(frozen=True)
class _Layer:
    """Inputs and parameters of a linear layer, the rows flattened."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> _Layer:
        flat = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
        return _Layer(flat, weight.to(dtype), None if bias is None else bias.to(dtype))

    def logits(self, part: slice) -> Tensor:
        return F.linear(self.hidden[part], self.weight, self.bias)


def _teacher_dtype(hidden: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, who: str) -> None:
    if hidden.ndim < 1 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise RequestError(
            f"the {who}'s hidden states {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not multiply: "
            "they must be (..., D) and (V, D)"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise RequestError(f"the {who}'s bias must have the shape ({weight.shape[0]},), not {tuple(bias.shape)}")


@dataclass
class _Gradients:
    """Sums over the chunks: the hidden states' rows one after the other, the parameters' in float32 or wider."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @staticmethod
    def of(student: _Layer, needed: tuple[bool, bool, bool]) -> _Gradients:
        wide = torch.promote_types(student.weight.dtype, torch.float32)
        return _Gradients(
            torch.empty_like(student.hidden) if needed[0] else None,
            torch.zeros_like(student.weight, dtype=wide) if needed[1] else None,
            torch.zeros_like(student.bias, dtype=wide) if needed[2] and student.bias is not None else None,
        )

    def add(self, student: _Layer, part: slice, logits: Tensor) -> None:
        """Take in the gradient of a chunk's logits."""
        if self.hidden is not None:
            torch.mm(logits, student.weight, out=self.hidden[part])
        if self.weight is not None:
            self.weight += logits.t() @ student.hidden[part]
        if self.bias is not None:
            self.bias += logits.sum(dim=0, dtype=self.bias.dtype)

    def finished(self, student: _Layer) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients in the dtypes of their tensors."""

        def cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
            return None if gradient is None or like is None else gradient.to(like.dtype)

        return cast(self.hidden, student.hidden), cast(self.weight, student.weight), cast(self.bias, student.bias)


def _chunks(
    student: _Layer, teacher: _Layer, divergence: Divergence, factors: Tensor, step: int, gradients: _Gradients | None
) -> Iterator[Tensor]:
    """The rows' values chunk by chunk; their gradients are taken in on the way."""
    for start in range(0, student.hidden.shape[0], step):
        part = slice(start, start + step)
        with torch.no_grad():
            student_logits, teacher_logits = student.logits(part), teacher.logits(part)
        terms = RowTerms(factors[part])
        if gradients is None:
            yield divergence_rows(student_logits, teacher_logits, divergence, (1,), terms)[0]
            continue
        with torch.enable_grad():
            student_logits.requires_grad_(True)
            rows = divergence_rows(student_logits, teacher_logits, divergence, (1,), terms)[0]
            (logits_gradient,) = torch.autograd.grad(rows.sum(), student_logits)
        gradients.add(student, part, logits_gradient)
        yield rows.detach()


class _LinearKL(torch.autograd.Function):
    """The sum of the rows with its gradients made on the way, or the rows with a second walk in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: _Layer,
        divergence: Divergence,
        factors: Tensor,
        step: int,
        in_backward: bool,
    ) -> Tensor:
        student = _Layer(hidden, weight, bias)
        needed = tuple(ctx.needs_input_grad[:3])
        ctx.arguments = (teacher, divergence, factors, step, in_backward)
        gradients = None
        if any(needed) and not in_backward:
            gradients = _Gradients.of(student, needed)
        values = list(_chunks(student, teacher, divergence, factors, step, gradients))
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        rows = torch.cat(values) if values else hidden.new_empty(0, dtype=dtype)
        if in_backward:
            ctx.save_for_backward(hidden, weight, bias)
            return rows
        if gradients is not None:
            ctx.save_for_backward(*gradients.finished(student))
        return rows.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        teacher, divergence, factors, step, in_backward = ctx.arguments
        if not in_backward:
            return *(None if made is None else made * upstream for made in ctx.saved_tensors), *([None] * 5)
        student = _Layer(*ctx.saved_tensors)
        gradients = _Gradients.of(student, tuple(ctx.needs_input_grad[:3]))
        for _ in _chunks(student, teacher, divergence, factors * upstream, step, gradients):
            pass
        return *gradients.finished(student), *([None] * 5)
