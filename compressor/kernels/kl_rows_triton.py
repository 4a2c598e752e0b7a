"""Triton kernels that walk rows of logits: divergence, cross-entropy and their gradient in one launch.

Everything is computed in float32 and in base 2. The row's maximum is subtracted from the logits *before* they are
divided by the temperature, so that logits of 10,000 lose nothing. In the comments s is the student, t the teacher.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernel arguments have Triton's own types.
from __future__ import annotations

import math

import triton
import triton.language as tl

from compressor.kernels.row_walk_triton import aligned, load_tile, program_rows, row_starts, store_tile

__all__ = ["long_rows_kernel", "whole_rows_kernel"]

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
MINUS_INFINITY = tl.constexpr(-math.inf)


@triton.jit
def _mixture(log_student, log_teacher, log_beta, log_rest):
    """log2 of the mixture; minus infinity (or NaN, which its callers drop) where neither has probability."""
    a = log_teacher + log_beta
    b = log_student + log_rest
    larger = tl.maximum(a, b)
    return larger + tl.log2(1.0 + tl.exp2(tl.minimum(a, b) - larger))


@triton.jit
def _product(probability, logarithm):
    """probability * logarithm, 0 where there is no probability."""
    return tl.where(probability == 0.0, 0.0, probability * logarithm)


@triton.jit
def _shift(maximum):
    return tl.where(maximum == MINUS_INFINITY, 0.0, maximum)


@triton.jit
def _load_logits(
    student_row,
    teacher_row,
    student_column,
    teacher_column,
    column,
    columns,
    exists,
    used,
    UNIT: tl.constexpr,
    IN_ROWS: tl.constexpr,
    READ_AGAIN: tl.constexpr = False,
):
    """The same columns of both sides, as `load_tile` gives them; minus infinity where there is nothing."""
    student = load_tile(
        student_row, column, student_column, columns, exists, used, MINUS_INFINITY, UNIT, IN_ROWS, READ_AGAIN
    )
    teacher = load_tile(
        teacher_row, column, teacher_column, columns, exists, used, MINUS_INFINITY, UNIT, IN_ROWS, READ_AGAIN
    )
    return student, teacher


@triton.jit
def whole_rows_kernel(
    student_ptr,  # (outer, inner, columns) by strides
    teacher_ptr,  # the same shape
    gradient_ptr,  # the same shape; written where WRITE_GRADIENT
    labels_ptr,  # (outer * inner) int64; read where HAS_LABELS
    kl_scale_ptr,  # (outer * inner) float32 by stride
    ce_scale_ptr,  # the same; read where HAS_LABELS
    kl_rows_ptr,  # (outer * inner) float32, written
    ce_rows_ptr,  # the same; written where HAS_LABELS
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
    kl_scale_stride,
    ce_scale_stride,
    temperature,
    beta,
    log_beta,  # log2
    log_rest,  # log2(1 - beta)
    kl_weight,
    ce_weight,
    MODE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
    UNIT: tl.constexpr,
    IN_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows that fit in a tile: each logit is read once."""
    outer, place = program_rows(inner, ROWS)
    column = tl.arange(0, BLOCK)
    row = outer * inner + place
    exists = place < (inner if IN_ROWS else aligned(inner, UNIT))
    columns = aligned(columns, UNIT) if IN_ROWS else columns
    kl_scale = tl.load(kl_scale_ptr + row * kl_scale_stride, mask=exists, other=0.0)
    ce_scale = kl_scale
    used = kl_scale != 0.0
    if HAS_LABELS:
        ce_scale = tl.load(ce_scale_ptr + row * ce_scale_stride, mask=exists, other=0.0)
        used = used | (ce_scale != 0.0)
    student_row = row_starts(student_ptr, outer, place, student_outer, student_inner, UNIT, IN_ROWS)
    teacher_row = row_starts(teacher_ptr, outer, place, teacher_outer, teacher_inner, UNIT, IN_ROWS)
    student, teacher = _load_logits(
        student_row, teacher_row, student_column, teacher_column, column, columns, exists, used, UNIT, IN_ROWS
    )

    to_base_2 = 1.0 / temperature * LOG2_E
    student_max = tl.max(student, axis=1)
    teacher_max = tl.max(teacher, axis=1)
    used = used & (student_max != MINUS_INFINITY) & (teacher_max != MINUS_INFINITY)
    student = student - _shift(student_max)[:, None]
    y_student = student * to_base_2
    y_teacher = (teacher - _shift(teacher_max)[:, None]) * to_base_2
    e_student = tl.exp2(y_student)
    e_teacher = tl.exp2(y_teacher)
    student_sum = tl.sum(e_student, axis=1)
    teacher_sum = tl.sum(e_teacher, axis=1)
    log_ratio = tl.log2(student_sum) - tl.log2(teacher_sum)

    # Few tiles stay alive at a time: sums are taken before the normalisers are applied.
    factor = kl_weight * temperature * kl_scale
    if MODE == 0:
        value = tl.sum(_product(e_teacher, y_teacher - y_student), axis=1) / teacher_sum + log_ratio
        gradient = e_student * (factor / student_sum)[:, None] - e_teacher * (factor / teacher_sum)[:, None]
    elif MODE == 1:
        weighted = _product(e_student, y_student - y_teacher)
        mean = tl.sum(weighted, axis=1) / student_sum
        value = mean - log_ratio
        gradient = (weighted - e_student * mean[:, None]) * (factor * LN_2 / student_sum)[:, None]
    else:
        log_student = y_student - tl.log2(student_sum)[:, None]
        log_teacher = y_teacher - tl.log2(teacher_sum)[:, None]
        mixture = _mixture(log_student, log_teacher, log_beta, log_rest)
        of_teacher = tl.sum(_product(e_teacher, log_teacher - mixture), axis=1) / teacher_sum
        weighted = _product(e_student, log_student - mixture)
        of_student = tl.sum(weighted, axis=1) / student_sum
        value = beta * of_teacher + (1.0 - beta) * of_student
        gradient = (weighted - e_student * of_student[:, None]) * (factor * (1.0 - beta) * LN_2 / student_sum)[:, None]
    value = value * (temperature * temperature * LN_2) * kl_scale
    tl.store(kl_rows_ptr + row, tl.where(used & (kl_scale != 0.0), value, 0.0), mask=exists)

    if HAS_LABELS:
        label = tl.load(labels_ptr + row, mask=used, other=0)
        picked = tl.load(student_row + label * student_column, mask=used, other=0.0).to(tl.float32)
        e_plain = tl.exp2(student * LOG2_E)
        plain_sum = tl.sum(e_plain, axis=1)
        cross_entropy = (tl.log2(plain_sum) * LN_2 - (picked - _shift(student_max))) * ce_scale
        tl.store(ce_rows_ptr + row, tl.where(used & (ce_scale != 0.0), cross_entropy, 0.0), mask=exists)
        one_hot = tl.where(column[None, :] == label[:, None], 1.0, 0.0)
        gradient += (e_plain * (1.0 / plain_sum)[:, None] - one_hot) * (ce_weight * ce_scale)[:, None]
    if WRITE_GRADIENT:
        gradient = tl.where(used[:, None], gradient, 0.0)
        gradient_row = row_starts(gradient_ptr, outer, place, gradient_outer, gradient_inner, UNIT, IN_ROWS)
        writes = exists[:, None] & (column < columns)[None, :]
        store_tile(gradient_row, column, gradient_column, gradient, writes, UNIT, IN_ROWS)


@triton.jit
def _joined(
    maximum, total, cross, other_maximum, other_before, chunk, other_chunk, to_base_2, WITH_CROSS: tl.constexpr
):
    """Take a chunk into the running maximum, sum of exponentials and, with a cross term, sum of exp * log-ratio.

    The cross term is ``sum exp(y) (y - y')`` with both y and y' relative to their running maxima.
    """
    joined = tl.maximum(maximum, tl.max(chunk, axis=1))
    y = (chunk - _shift(joined)[:, None]) * to_base_2
    weight = tl.exp2(y)
    kept = tl.where(maximum == MINUS_INFINITY, 0.0, tl.exp2((maximum - _shift(joined)) * to_base_2))
    if WITH_CROSS:
        y_other = (other_chunk - _shift(other_maximum)[:, None]) * to_base_2
        moved = (_shift(maximum) - _shift(joined)) - (_shift(other_before) - _shift(other_maximum))
        cross = kept * (cross + total * (moved * to_base_2)) + tl.sum(_product(weight, y - y_other), axis=1)
    total = kept * total + tl.sum(weight, axis=1)
    return joined, total, cross


@triton.jit
def _log_probabilities(logits, shift, log_sum, to_base_2):
    return (logits - shift[:, None]) * to_base_2 - log_sum[:, None]


@triton.jit
def long_rows_kernel(
    student_ptr,
    teacher_ptr,
    gradient_ptr,
    labels_ptr,
    kl_scale_ptr,
    ce_scale_ptr,
    kl_rows_ptr,
    ce_rows_ptr,
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
    kl_scale_stride,
    ce_scale_stride,
    temperature,
    beta,
    log_beta,
    log_rest,
    kl_weight,
    ce_weight,
    MODE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
    UNIT: tl.constexpr,
    IN_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of any length, chunk by chunk: arguments as in `whole_rows_kernel`.

    The first walk finds the normalisers and, but for the mixture of "jsd", the value; later walks alternate their
    direction, because the end of the walk before is still in the cache.
    """
    outer, place = program_rows(inner, ROWS)
    row = outer * inner + place
    exists = place < (inner if IN_ROWS else aligned(inner, UNIT))
    columns = aligned(columns, UNIT) if IN_ROWS else columns
    kl_scale = tl.load(kl_scale_ptr + row * kl_scale_stride, mask=exists, other=0.0)
    ce_scale = kl_scale
    used = kl_scale != 0.0
    if HAS_LABELS:
        ce_scale = tl.load(ce_scale_ptr + row * ce_scale_stride, mask=exists, other=0.0)
        used = used | (ce_scale != 0.0)
    student_row = row_starts(student_ptr, outer, place, student_outer, student_inner, UNIT, IN_ROWS)
    teacher_row = row_starts(teacher_ptr, outer, place, teacher_outer, teacher_inner, UNIT, IN_ROWS)
    to_base_2 = 1.0 / temperature * LOG2_E

    s_max = tl.full((ROWS,), MINUS_INFINITY, tl.float32)
    t_max = tl.full((ROWS,), MINUS_INFINITY, tl.float32)
    s_sum = tl.zeros((ROWS,), tl.float32)
    t_sum = tl.zeros((ROWS,), tl.float32)
    plain_sum = tl.zeros((ROWS,), tl.float32)
    cross = tl.zeros((ROWS,), tl.float32)
    no_cross = tl.zeros((ROWS,), tl.float32)
    chunks = tl.cdiv(columns, BLOCK)
    for chunk in range(chunks):
        column = chunk * BLOCK + tl.arange(0, BLOCK)
        student, teacher = _load_logits(
            student_row,
            teacher_row,
            student_column,
            teacher_column,
            column,
            columns,
            exists,
            used,
            UNIT,
            IN_ROWS,
            READ_AGAIN=WRITE_GRADIENT or MODE == 2,
        )
        s_old = s_max
        t_old = t_max
        if HAS_LABELS:
            _, plain_sum, no_cross = _joined(
                s_old, plain_sum, no_cross, t_old, t_old, student, teacher, LOG2_E, WITH_CROSS=False
            )
        if MODE == 0:
            s_max, s_sum, no_cross = _joined(
                s_old, s_sum, no_cross, t_old, t_old, student, teacher, to_base_2, WITH_CROSS=False
            )
            t_max, t_sum, cross = _joined(
                t_old, t_sum, cross, s_max, s_old, teacher, student, to_base_2, WITH_CROSS=True
            )
        else:
            t_max, t_sum, no_cross = _joined(
                t_old, t_sum, no_cross, s_old, s_old, teacher, student, to_base_2, WITH_CROSS=False
            )
            s_max, s_sum, cross = _joined(
                s_old, s_sum, cross, t_max, t_old, student, teacher, to_base_2, WITH_CROSS=MODE == 1
            )

    used = used & (s_max != MINUS_INFINITY) & (t_max != MINUS_INFINITY)
    s_shift = _shift(s_max)
    t_shift = _shift(t_max)
    s_log_sum = tl.log2(s_sum)
    t_log_sum = tl.log2(t_sum)
    of_student = cross / s_sum - s_log_sum + t_log_sum
    value = of_student
    if MODE == 0:
        value = cross / t_sum - t_log_sum + s_log_sum
    if MODE == 2:
        of_student = tl.zeros((ROWS,), tl.float32)
        of_teacher = tl.zeros((ROWS,), tl.float32)
        for step in range(chunks):
            column = (chunks - 1 - step) * BLOCK + tl.arange(0, BLOCK)
            student, teacher = _load_logits(
                student_row,
                teacher_row,
                student_column,
                teacher_column,
                column,
                columns,
                exists,
                used,
                UNIT,
                IN_ROWS,
                READ_AGAIN=WRITE_GRADIENT,
            )
            log_student = _log_probabilities(student, s_shift, s_log_sum, to_base_2)
            log_teacher = _log_probabilities(teacher, t_shift, t_log_sum, to_base_2)
            mixture = _mixture(log_student, log_teacher, log_beta, log_rest)
            of_student += tl.sum(_product(tl.exp2(log_student), log_student - mixture), axis=1)
            of_teacher += tl.sum(_product(tl.exp2(log_teacher), log_teacher - mixture), axis=1)
        value = beta * of_teacher + (1.0 - beta) * of_student
    value = value * (temperature * temperature * LN_2) * kl_scale
    tl.store(kl_rows_ptr + row, tl.where(used & (kl_scale != 0.0), value, 0.0), mask=exists)
    label = tl.zeros((ROWS,), tl.int64)
    if HAS_LABELS:
        label = tl.load(labels_ptr + row, mask=used, other=0)
        picked = tl.load(student_row + label * student_column, mask=used, other=0.0).to(tl.float32)
        cross_entropy = (tl.log2(plain_sum) * LN_2 - (picked - s_shift)) * ce_scale
        tl.store(ce_rows_ptr + row, tl.where(used & (ce_scale != 0.0), cross_entropy, 0.0), mask=exists)

    if WRITE_GRADIENT:
        gradient_row = row_starts(gradient_ptr, outer, place, gradient_outer, gradient_inner, UNIT, IN_ROWS)
        for step in range(chunks):
            column = (step if MODE == 2 else chunks - 1 - step) * BLOCK + tl.arange(0, BLOCK)
            in_row = (column < columns)[None, :]
            student, teacher = _load_logits(
                student_row, teacher_row, student_column, teacher_column, column, columns, exists, used, UNIT, IN_ROWS
            )
            log_student = _log_probabilities(student, s_shift, s_log_sum, to_base_2)
            log_teacher = _log_probabilities(teacher, t_shift, t_log_sum, to_base_2)
            p_student = tl.exp2(log_student)
            if MODE == 0:
                gradient = p_student - tl.exp2(log_teacher)
            elif MODE == 1:
                gradient = (_product(p_student, log_student - log_teacher) - p_student * of_student[:, None]) * LN_2
            else:
                mixture = _mixture(log_student, log_teacher, log_beta, log_rest)
                gradient = _product(p_student, log_student - mixture) - p_student * of_student[:, None]
                gradient = gradient * ((1.0 - beta) * LN_2)
            gradient = gradient * (kl_weight * temperature * kl_scale)[:, None]
            if HAS_LABELS:
                p_plain = tl.exp2((student - s_shift[:, None]) * LOG2_E) * (1.0 / plain_sum)[:, None]
                one_hot = tl.where(column[None, :] == label[:, None], 1.0, 0.0)
                gradient += (p_plain - one_hot) * (ce_weight * ce_scale)[:, None]
            gradient = tl.where(used[:, None], gradient, 0.0)
            writes = exists[:, None] & in_row
            store_tile(gradient_row, column, gradient_column, gradient, writes, UNIT, IN_ROWS)
