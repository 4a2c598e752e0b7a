"""Triton kernels of block-sparse attention: forward, and the gradients of queries and of keys and values.

A program owns a tile of queries (or of keys) and walks the list of blocks that its block is paired with; time is
proportional to the pairs. Scores are kept in base 2. Lists ascend, so that the only key block that can be cut (the
ragged last one, or the one on the causal diagonal) comes last, and all others run without masks.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernel arguments have Triton's own types.
from __future__ import annotations

import math

import triton
import triton.language as tl

__all__ = ["delta_kernel", "forward_kernel", "key_gradient_kernel", "query_gradient_kernel"]

LN_2 = tl.constexpr(math.log(2.0))
LOG2_E = tl.constexpr(math.log2(math.e))
INFINITY = tl.constexpr(math.inf)


@triton.jit
def _tile(
    ptr, first, stride, length, TILE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CUT: tl.constexpr
):
    """``(TILE, BLOCK_D)`` rows of a ``(length, HEAD_DIM)`` matrix, zeros outside; CUT: rows may lie outside."""
    row = first + tl.arange(0, TILE)
    column = tl.arange(0, BLOCK_D)
    at = ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    if CUT:
        if HEAD_DIM == BLOCK_D:
            return tl.load(at, mask=(row < length)[:, None], other=0.0)
        return tl.load(at, mask=(row < length)[:, None] & (column < HEAD_DIM)[None, :], other=0.0)
    if HEAD_DIM == BLOCK_D:
        return tl.load(at)
    return tl.load(at, mask=(column < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store(ptr, first, stride, length, value, TILE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    row = first + tl.arange(0, TILE)
    column = tl.arange(0, BLOCK_D)
    at = ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    mask = (row < length)[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _seen(query, key, key_length, padding_ptr, CAUSAL: tl.constexpr, HAS_PADDING: tl.constexpr, CUT: tl.constexpr):
    """Which keys each query may see within a pair of blocks; the shapes of query and key broadcast."""
    seen = key >= 0
    if CUT:
        seen = seen & (key < key_length)
        if CAUSAL:
            seen = seen & (key <= query)
    if HAS_PADDING:
        seen = seen & (tl.load(padding_ptr + key, mask=key < key_length, other=1) == 0)
    return seen


@triton.jit
def _attend(
    q,
    query,
    key_first,
    k_ptr,
    v_ptr,
    padding_ptr,
    k_stride,
    v_stride,
    key_length,
    to_base_2,
    maximum,
    total,
    output,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    CUT: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of keys: the online softmax's step."""
    k = _tile(k_ptr, key_first, k_stride, key_length, KEYS, HEAD_DIM, BLOCK_D, CUT)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if CUT or HAS_PADDING:
        key = key_first + tl.arange(0, KEYS)
        seen = _seen(query[:, None], key[None, :], key_length, padding_ptr, CAUSAL, HAS_PADDING, CUT)
        scores = tl.where(seen, scores, -INFINITY)
    joined = tl.maximum(maximum, tl.max(scores, axis=1) * to_base_2)
    shift = joined
    if CUT or HAS_PADDING:
        shift = tl.where(joined == -INFINITY, 0.0, joined)
    weights = tl.exp2(scores * to_base_2 - shift[:, None])
    kept = tl.exp2(maximum - shift)
    total = total * kept + tl.sum(weights, axis=1)
    v = _tile(v_ptr, key_first, v_stride, key_length, KEYS, HEAD_DIM, BLOCK_D, CUT)
    output = tl.dot(weights.to(v.dtype), v, output * kept[:, None], input_precision=PRECISION)
    return joined, total, output


@triton.jit
def forward_kernel(
    q_ptr,  # (B, H, query_length, HEAD_DIM) by strides, the last one 1; so are k, v and output
    k_ptr,
    v_ptr,
    output_ptr,  # written
    lse_ptr,  # (B, H, query_length) float32, written: natural logarithm
    padding_ptr,  # (B, key_length) uint8, read where HAS_PADDING
    starts_ptr,  # lists of key blocks by (batch, head, query block)
    entries_ptr,
    heads,
    query_length,
    key_length,
    list_batch,
    list_head,
    q_batch,
    q_head,
    q_stride,
    k_batch,
    k_head,
    k_stride,
    v_batch,
    v_head,
    v_stride,
    output_batch,
    output_head,
    output_stride,
    to_base_2,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and log-sum-exp of a tile of queries."""
    first = tl.program_id(0) * QUERIES
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    at = starts_ptr + batch * list_batch + head * list_head + first // BLOCK_SIZE
    begin = tl.load(at)
    end = tl.load(at + 1)
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    padding_ptr += batch * key_length
    query = first + tl.arange(0, QUERIES)
    q = _tile(
        q_ptr + batch * q_batch + head * q_head, first, q_stride, query_length, QUERIES, HEAD_DIM, BLOCK_D, CUT=True
    )
    maximum = tl.full((QUERIES,), -INFINITY, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    output = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    PARTS: tl.constexpr = BLOCK_SIZE // KEYS
    steps = (end - begin) * PARTS
    whole = steps
    if RAGGED or CAUSAL:
        whole = tl.maximum(steps - PARTS, 0)
    for step in range(whole):
        key_first = tl.load(entries_ptr + begin + step // PARTS) * BLOCK_SIZE + step % PARTS * KEYS
        maximum, total, output = _attend(
            q,
            query,
            key_first,
            k_ptr,
            v_ptr,
            padding_ptr,
            k_stride,
            v_stride,
            key_length,
            to_base_2,
            maximum,
            total,
            output,
            CAUSAL=CAUSAL,
            HAS_PADDING=HAS_PADDING,
            CUT=False,
            KEYS=KEYS,
            HEAD_DIM=HEAD_DIM,
            BLOCK_D=BLOCK_D,
            PRECISION=PRECISION,
        )
    if RAGGED or CAUSAL:
        for step in range(whole, steps):
            key_first = tl.load(entries_ptr + begin + step // PARTS) * BLOCK_SIZE + step % PARTS * KEYS
            maximum, total, output = _attend(
                q,
                query,
                key_first,
                k_ptr,
                v_ptr,
                padding_ptr,
                k_stride,
                v_stride,
                key_length,
                to_base_2,
                maximum,
                total,
                output,
                CAUSAL=CAUSAL,
                HAS_PADDING=HAS_PADDING,
                CUT=True,
                KEYS=KEYS,
                HEAD_DIM=HEAD_DIM,
                BLOCK_D=BLOCK_D,
                PRECISION=PRECISION,
            )
    empty = total == 0.0
    output = output * (1.0 / tl.where(empty, 1.0, total))[:, None]
    lse = tl.where(empty, -INFINITY, (maximum + tl.log2(total)) * LN_2)
    output_ptr += batch * output_batch + head * output_head
    _store(output_ptr, first, output_stride, query_length, output, QUERIES, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * query_length + query, lse, mask=query < query_length)


@triton.jit
def delta_kernel(
    output_ptr,  # (B, H, query_length, HEAD_DIM) by strides
    output_gradient_ptr,  # the same shape
    lse_ptr,  # (B, H, query_length) float32
    lse_gradient_ptr,  # (B, H, query_length) float32, read where HAS_LSE_GRADIENT
    delta_ptr,  # (B, H, query_length) float32, written
    heads,
    query_length,
    output_batch,
    output_head,
    output_stride,
    gradient_batch,
    gradient_head,
    gradient_stride,
    HAS_LSE_GRADIENT: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``sum(output * gradient) - lse gradient`` of each query: what is taken off the scores' gradient; 0 where the
    query saw no key, whatever gradient arrives."""
    first = tl.program_id(0) * QUERIES
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    output_ptr += batch * output_batch + head * output_head
    output_gradient_ptr += batch * gradient_batch + head * gradient_head
    output = _tile(output_ptr, first, output_stride, query_length, QUERIES, HEAD_DIM, BLOCK_D, CUT=True)
    gradient = _tile(output_gradient_ptr, first, gradient_stride, query_length, QUERIES, HEAD_DIM, BLOCK_D, CUT=True)
    delta = tl.sum(output.to(tl.float32) * gradient.to(tl.float32), axis=1)
    query = first + tl.arange(0, QUERIES)
    exists = query < query_length
    at = tl.program_id(1).to(tl.int64) * query_length + query
    if HAS_LSE_GRADIENT:
        delta -= tl.load(lse_gradient_ptr + at, mask=exists, other=0.0)
    lse = tl.load(lse_ptr + at, mask=exists, other=0.0)
    tl.store(delta_ptr + at, tl.where(lse == -INFINITY, 0.0, delta), mask=exists)


@triton.jit
def _log_sum(lse_ptr, at, exists):
    """log2 of each query's sum; plus infinity where it saw no key or does not exist, so that its weights are 0."""
    lse = tl.load(lse_ptr + at, mask=exists, other=-INFINITY)
    return tl.where(lse == -INFINITY, INFINITY, lse * LOG2_E)


@triton.jit
def _query_gradient_step(
    q,
    output_gradient,
    log_sum,
    delta,
    query,
    key_first,
    k_ptr,
    v_ptr,
    padding_ptr,
    k_stride,
    v_stride,
    key_length,
    to_base_2,
    gradient,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    CUT: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k = _tile(k_ptr, key_first, k_stride, key_length, KEYS, HEAD_DIM, BLOCK_D, CUT)
    v = _tile(v_ptr, key_first, v_stride, key_length, KEYS, HEAD_DIM, BLOCK_D, CUT)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    weights = tl.exp2(scores * to_base_2 - log_sum[:, None])
    if CUT or HAS_PADDING:
        key = key_first + tl.arange(0, KEYS)
        seen = _seen(query[:, None], key[None, :], key_length, padding_ptr, CAUSAL, HAS_PADDING, CUT)
        weights = tl.where(seen, weights, 0.0)
    weights_gradient = tl.dot(output_gradient, tl.trans(v), input_precision=PRECISION)
    scores_gradient = weights * (weights_gradient - delta[:, None])
    return tl.dot(scores_gradient.to(k.dtype), k, gradient, input_precision=PRECISION)


@triton.jit
def query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    output_gradient_ptr,
    gradient_ptr,  # of q, written
    lse_ptr,
    delta_ptr,
    padding_ptr,
    starts_ptr,  # lists of key blocks by (batch, head, query block)
    entries_ptr,
    heads,
    query_length,
    key_length,
    list_batch,
    list_head,
    q_batch,
    q_head,
    q_stride,
    k_batch,
    k_head,
    k_stride,
    v_batch,
    v_head,
    v_stride,
    output_gradient_batch,
    output_gradient_head,
    output_gradient_stride,
    gradient_batch,
    gradient_head,
    gradient_stride,
    scale,
    to_base_2,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of a tile of queries; arguments as in `forward_kernel`."""
    first = tl.program_id(0) * QUERIES
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    at = starts_ptr + batch * list_batch + head * list_head + first // BLOCK_SIZE
    begin = tl.load(at)
    end = tl.load(at + 1)
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    output_gradient_ptr += batch * output_gradient_batch + head * output_gradient_head
    padding_ptr += batch * key_length
    query = first + tl.arange(0, QUERIES)
    row = tl.program_id(1).to(tl.int64) * query_length + query
    exists = query < query_length
    q = _tile(q_ptr, first, q_stride, query_length, QUERIES, HEAD_DIM, BLOCK_D, CUT=True)
    output_gradient = _tile(
        output_gradient_ptr, first, output_gradient_stride, query_length, QUERIES, HEAD_DIM, BLOCK_D, CUT=True
    )
    log_sum = _log_sum(lse_ptr, row, exists)
    delta = tl.load(delta_ptr + row, mask=exists, other=0.0)
    gradient = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    PARTS: tl.constexpr = BLOCK_SIZE // KEYS
    steps = (end - begin) * PARTS
    whole = steps
    if RAGGED or CAUSAL:
        whole = tl.maximum(steps - PARTS, 0)
    for step in range(whole):
        key_first = tl.load(entries_ptr + begin + step // PARTS) * BLOCK_SIZE + step % PARTS * KEYS
        gradient = _query_gradient_step(
            q,
            output_gradient,
            log_sum,
            delta,
            query,
            key_first,
            k_ptr,
            v_ptr,
            padding_ptr,
            k_stride,
            v_stride,
            key_length,
            to_base_2,
            gradient,
            CAUSAL=CAUSAL,
            HAS_PADDING=HAS_PADDING,
            CUT=False,
            KEYS=KEYS,
            HEAD_DIM=HEAD_DIM,
            BLOCK_D=BLOCK_D,
            PRECISION=PRECISION,
        )
    if RAGGED or CAUSAL:
        for step in range(whole, steps):
            key_first = tl.load(entries_ptr + begin + step // PARTS) * BLOCK_SIZE + step % PARTS * KEYS
            gradient = _query_gradient_step(
                q,
                output_gradient,
                log_sum,
                delta,
                query,
                key_first,
                k_ptr,
                v_ptr,
                padding_ptr,
                k_stride,
                v_stride,
                key_length,
                to_base_2,
                gradient,
                CAUSAL=CAUSAL,
                HAS_PADDING=HAS_PADDING,
                CUT=True,
                KEYS=KEYS,
                HEAD_DIM=HEAD_DIM,
                BLOCK_D=BLOCK_D,
                PRECISION=PRECISION,
            )
    gradient_ptr += batch * gradient_batch + head * gradient_head
    _store(gradient_ptr, first, gradient_stride, query_length, gradient * scale, QUERIES, HEAD_DIM, BLOCK_D)


@triton.jit
def key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    output_gradient_ptr,
    k_gradient_ptr,  # written
    v_gradient_ptr,  # written
    lse_ptr,
    delta_ptr,
    padding_ptr,
    starts_ptr,  # lists of query blocks by (batch, head, key block)
    entries_ptr,
    heads,
    query_length,
    key_length,
    list_batch,
    list_head,
    q_batch,
    q_head,
    q_stride,
    k_batch,
    k_head,
    k_stride,
    v_batch,
    v_head,
    v_stride,
    output_gradient_batch,
    output_gradient_head,
    output_gradient_stride,
    k_gradient_batch,
    k_gradient_head,
    k_gradient_stride,
    v_gradient_batch,
    v_gradient_head,
    v_gradient_stride,
    scale,
    to_base_2,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a tile of keys and values. Keys that do not exist are computed with, but not stored."""
    first = tl.program_id(0) * KEYS
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    at = starts_ptr + batch * list_batch + head * list_head + first // BLOCK_SIZE
    begin = tl.load(at)
    end = tl.load(at + 1)
    q_ptr += batch * q_batch + head * q_head
    output_gradient_ptr += batch * output_gradient_batch + head * output_gradient_head
    lse_ptr += tl.program_id(1).to(tl.int64) * query_length
    delta_ptr += tl.program_id(1).to(tl.int64) * query_length
    k = _tile(k_ptr + batch * k_batch + head * k_head, first, k_stride, key_length, KEYS, HEAD_DIM, BLOCK_D, CUT=True)
    v = _tile(v_ptr + batch * v_batch + head * v_head, first, v_stride, key_length, KEYS, HEAD_DIM, BLOCK_D, CUT=True)
    key = first + tl.arange(0, KEYS)
    k_gradient = tl.zeros((KEYS, BLOCK_D), tl.float32)
    v_gradient = tl.zeros((KEYS, BLOCK_D), tl.float32)
    PARTS: tl.constexpr = BLOCK_SIZE // QUERIES
    for step in range((end - begin) * PARTS):
        query_first = tl.load(entries_ptr + begin + step // PARTS) * BLOCK_SIZE + step % PARTS * QUERIES
        query = query_first + tl.arange(0, QUERIES)
        exists = query < query_length
        q = _tile(q_ptr, query_first, q_stride, query_length, QUERIES, HEAD_DIM, BLOCK_D, RAGGED)
        log_sum = _log_sum(lse_ptr, query, exists)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        weights = tl.exp2(scores * to_base_2 - log_sum[None, :])
        if CAUSAL:
            weights = tl.where(key[:, None] <= query[None, :], weights, 0.0)
        output_gradient = _tile(
            output_gradient_ptr, query_first, output_gradient_stride, query_length, QUERIES, HEAD_DIM, BLOCK_D, RAGGED
        )
        v_gradient = tl.dot(weights.to(q.dtype), output_gradient, v_gradient, input_precision=PRECISION)
        delta = tl.load(delta_ptr + query, mask=exists, other=0.0)
        weights_gradient = tl.dot(v, tl.trans(output_gradient), input_precision=PRECISION)
        scores_gradient = weights * (weights_gradient - delta[None, :])
        k_gradient = tl.dot(scores_gradient.to(q.dtype), q, k_gradient, input_precision=PRECISION)
    if HAS_PADDING:
        padded = tl.load(padding_ptr + batch * key_length + key, mask=key < key_length, other=1) != 0
        k_gradient = tl.where(padded[:, None], 0.0, k_gradient)
        v_gradient = tl.where(padded[:, None], 0.0, v_gradient)
    k_gradient_ptr += batch * k_gradient_batch + head * k_gradient_head
    v_gradient_ptr += batch * v_gradient_batch + head * v_gradient_head
    _store(k_gradient_ptr, first, k_gradient_stride, key_length, k_gradient * scale, KEYS, HEAD_DIM, BLOCK_D)
    _store(v_gradient_ptr, first, v_gradient_stride, key_length, v_gradient, KEYS, HEAD_DIM, BLOCK_D)
