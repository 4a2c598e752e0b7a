"""The Triton kernel of `adaptive_mask`: the probe's scores stay on chip, only their maxima a block are written."""

# mypy: disable-error-code="no-untyped-def"
# Kernel arguments have Triton's own types.
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressor.kernels.configurations import next_power_of_two

__all__ = ["probe_kernel"]

INFINITY = tl.constexpr(math.inf)


@triton.jit
def _gathered(ptr, tokens, exists, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    at = ptr + tokens[:, None] * stride + column[None, :]
    return tl.load(at, mask=exists[:, None] & (column < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def probe_kernel(
    q_ptr,  # (B, H, N, HEAD_DIM) by strides, the last one 1
    k_ptr,  # (B, H, M, HEAD_DIM) by strides
    q_tokens_ptr,  # (B, H, query blocks, samples) int64
    k_tokens_ptr,  # (B, H, key blocks, samples) int64
    maxima_ptr,  # (B, H, query blocks, key blocks, SAMPLES) float32, written and read back
    weights_ptr,  # (B, H, query blocks, key blocks) float32, written
    heads,
    key_blocks,
    samples,
    q_batch,
    q_head,
    q_stride,
    k_batch,
    k_head,
    k_stride,
    to_base_2,
    SAMPLES: tl.constexpr,
    BLOCKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The row of weights of one query block."""
    query_block = tl.program_id(0)
    query_blocks = tl.num_programs(0)
    both = tl.program_id(1).to(tl.int64)
    batch = both // heads
    head = both % heads
    sample = tl.arange(0, SAMPLES)
    exists = sample < samples
    q_tokens = tl.load(q_tokens_ptr + (both * query_blocks + query_block) * samples + sample, mask=exists, other=0)
    q = _gathered(q_ptr + batch * q_batch + head * q_head, q_tokens, exists, q_stride, HEAD_DIM, BLOCK_D)
    k_ptr += batch * k_batch + head * k_head
    k_tokens_ptr += both * key_blocks * samples
    row = (both * query_blocks + query_block) * key_blocks
    maximum = tl.full((SAMPLES,), -INFINITY, tl.float32)
    for block in range(key_blocks):
        k_tokens = tl.load(k_tokens_ptr + block * samples + sample, mask=exists, other=0)
        k = _gathered(k_ptr, k_tokens, exists, k_stride, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * to_base_2
        of_block = tl.max(tl.where(exists[None, :], scores, -INFINITY), axis=1)
        maximum = tl.maximum(maximum, of_block)
        tl.store(maxima_ptr + (row + block) * SAMPLES + sample, of_block)
    tl.debug_barrier()  # what other threads of this program wrote is read now
    for first in range(0, key_blocks, BLOCKS):
        blocks = first + tl.arange(0, BLOCKS)
        within = blocks < key_blocks
        at = maxima_ptr + (row + blocks)[:, None] * SAMPLES + sample[None, :]
        of_blocks = tl.load(at, mask=within[:, None], other=-INFINITY)
        weights = tl.where(exists[None, :], tl.exp2(of_blocks - maximum[None, :]), 0.0)
        tl.store(weights_ptr + row + blocks, tl.max(weights, axis=1), mask=within)


def _largest_weights(q: Tensor, k: Tensor, q_tokens: Tensor, k_tokens: Tensor) -> Tensor:
    """The largest exp(score - row maximum) of each pair of blocks.

    Args:
        q: ``(B, H, N, D)``.
        k: ``(B, H, M, D)``.
        q_tokens: ``(B, H, query blocks, s)`` int64, places of the sampled tokens.
        k_tokens: ``(B, H, key blocks, s)``.

    Returns:
        ``(B, H, query blocks, key blocks)`` float32.
    """
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    batch, heads, query_blocks, samples = q_tokens.shape
    key_blocks = k_tokens.shape[2]
    padded = next_power_of_two(max(samples, 16))
    weights = torch.empty(batch, heads, query_blocks, key_blocks, dtype=torch.float32, device=q.device)
    maxima = torch.empty(*weights.shape, padded, dtype=torch.float32, device=q.device)
    probe_kernel[(query_blocks, batch * heads)](
        q,
        k,
        q_tokens.contiguous(),
        k_tokens.contiguous(),
        maxima,
        weights,
        heads,
        key_blocks,
        samples,
        *q.stride()[:3],
        *k.stride()[:3],
        math.log2(math.e) / math.sqrt(q.shape[-1]),
        SAMPLES=padded,
        BLOCKS=16,
        HEAD_DIM=q.shape[-1],
        BLOCK_D=next_power_of_two(max(q.shape[-1], 16)),
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        num_warps=4,
        num_stages=2,
    )
    return weights


_largest_weights_operator = torch.library.custom_op(
    "compressor::largest_weights",
    _largest_weights,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor q_tokens, Tensor k_tokens) -> Tensor",
)


@_largest_weights_operator.register_fake
def _fake(q: Tensor, k: Tensor, q_tokens: Tensor, k_tokens: Tensor) -> Tensor:
    return q.new_empty((*q_tokens.shape[:3], k_tokens.shape[2]), dtype=torch.float32)
