"""Launch and autograd of the kernels in `attention_kernels_triton`: what `sparse_attention` calls on a GPU."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from compressor.kernels.attention_kernels_triton import (
    LOG2_E,
    delta_kernel,
    forward_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)
from compressor.kernels.configurations import AttentionTiles, attention_tiles, next_power_of_two
from compressor.kernels.dispatch import gpu_family

__all__ = ["Attention"]


def _rows_last(x: Tensor) -> Tensor:
    """The tensor with neighbours in memory along the last axis."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _list_strides(mask_shape: list[int], blocks: int) -> tuple[int, int]:
    """How far apart the lists of two batches and of two heads are."""
    batches, heads = mask_shape
    return (heads * blocks if batches > 1 else 0), (blocks if heads > 1 else 0)


def _tiles(part: str, q: Tensor, block_size: int) -> AttentionTiles:
    return attention_tiles(
        gpu_family(q.device), part, block_size, next_power_of_two(max(q.shape[-1], 16)), q.element_size()
    )


def _constants(q: Tensor, block_size: int, causal: bool, has_padding: bool, tiles: AttentionTiles) -> dict[str, Any]:
    # Three products of tensor cores make up for the digits that one of them drops from float32 factors.
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 or q.dtype != torch.float32 else "tf32x3"
    return {
        "CAUSAL": causal,
        "HAS_PADDING": has_padding,
        "BLOCK_SIZE": block_size,
        "QUERIES": tiles.queries,
        "KEYS": tiles.keys,
        "HEAD_DIM": q.shape[-1],
        "BLOCK_D": next_power_of_two(max(q.shape[-1], 16)),
        "PRECISION": precision,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    starts: Tensor,
    entries: Tensor,
    mask_shape: list[int],
    block_size: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    q, k, v = _rows_last(q), _rows_last(k), _rows_last(v)
    batch, heads, query_length, _ = q.shape
    key_length = k.shape[2]
    output = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    tiles = _tiles("forward", q, block_size)
    forward_kernel[(triton.cdiv(query_length, tiles.queries), batch * heads)](
        q,
        k,
        v,
        output,
        lse,
        starts if padding is None else padding.contiguous().view(torch.uint8),
        starts,
        entries,
        heads,
        query_length,
        key_length,
        *_list_strides(mask_shape, triton.cdiv(query_length, block_size)),
        *_strides(q, k, v, output),
        scale * LOG2_E.value,
        RAGGED=key_length % block_size != 0,
        **_constants(q, block_size, causal, padding is not None, tiles),
    )
    return output, lse


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    output: Tensor,
    lse: Tensor,
    output_gradient: Tensor,
    lse_gradient: Tensor | None,
    query_starts: Tensor,
    query_entries: Tensor,
    key_starts: Tensor,
    key_entries: Tensor,
    mask_shape: list[int],
    block_size: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, output_gradient = _rows_last(q), _rows_last(k), _rows_last(v), _rows_last(output_gradient)
    batch, heads, query_length, head_dim = q.shape
    key_length = k.shape[2]
    delta = torch.empty_like(lse)
    to_base_2 = scale * LOG2_E.value
    padding = key_starts if padding is None else padding.contiguous().view(torch.uint8)
    has_padding = padding is not key_starts
    delta_kernel[(triton.cdiv(query_length, 64), batch * heads)](
        output,
        output_gradient,
        lse,
        lse if lse_gradient is None else lse_gradient.contiguous(),
        delta,
        heads,
        query_length,
        *_strides(output, output_gradient),
        HAS_LSE_GRADIENT=lse_gradient is not None,
        QUERIES=64,
        HEAD_DIM=head_dim,
        BLOCK_D=next_power_of_two(max(head_dim, 16)),
    )
    q_gradient, k_gradient, v_gradient = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    tiles = _tiles("query_gradient", q, block_size)
    query_gradient_kernel[(triton.cdiv(query_length, tiles.queries), batch * heads)](
        q,
        k,
        v,
        output_gradient,
        q_gradient,
        lse,
        delta,
        padding,
        query_starts,
        query_entries,
        heads,
        query_length,
        key_length,
        *_list_strides(mask_shape, triton.cdiv(query_length, block_size)),
        *_strides(q, k, v, output_gradient, q_gradient),
        scale,
        to_base_2,
        RAGGED=key_length % block_size != 0,
        **_constants(q, block_size, causal, has_padding, tiles),
    )
    tiles = _tiles("key_gradient", q, block_size)
    key_gradient_kernel[(triton.cdiv(key_length, tiles.keys), batch * heads)](
        q,
        k,
        v,
        output_gradient,
        k_gradient,
        v_gradient,
        lse,
        delta,
        padding,
        key_starts,
        key_entries,
        heads,
        query_length,
        key_length,
        *_list_strides(mask_shape, triton.cdiv(key_length, block_size)),
        *_strides(q, k, v, output_gradient, k_gradient, v_gradient),
        scale,
        to_base_2,
        RAGGED=query_length % block_size != 0,
        **_constants(q, block_size, causal, has_padding, tiles),
    )
    return q_gradient, k_gradient, v_gradient


_forward_operator = torch.library.custom_op(
    "compressor::block_sparse_attention",
    _forward,
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? padding, Tensor starts, Tensor entries, int[] mask_shape, "
        "int block_size, float scale, bool causal) -> (Tensor, Tensor)"
    ),
)
_backward_operator = torch.library.custom_op(
    "compressor::block_sparse_attention_backward",
    _backward,
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? padding, Tensor output, Tensor lse, Tensor output_gradient, "
        "Tensor? lse_gradient, Tensor query_starts, Tensor query_entries, Tensor key_starts, Tensor key_entries, "
        "int[] mask_shape, int block_size, float scale, bool causal) -> (Tensor, Tensor, Tensor)"
    ),
)


@_forward_operator.register_fake
def _fake_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward_operator.register_fake
def _fake_backward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class Attention(torch.autograd.Function):
    """Output and log-sum-exp, both differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        padding: Tensor | None,
        query_starts: Tensor,
        query_entries: Tensor,
        key_starts: Tensor,
        key_entries: Tensor,
        mask_shape: list[int],
        block_size: int,
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        output, lse = torch.ops.compressor.block_sparse_attention(
            q, k, v, padding, query_starts, query_entries, mask_shape, block_size, scale, causal
        )
        ctx.save_for_backward(q, k, v, padding, output, lse, query_starts, query_entries, key_starts, key_entries)
        ctx.options = (mask_shape, block_size, scale, causal)
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor | None, lse_gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, padding, output, lse, *lists = ctx.saved_tensors
        if output_gradient is None:
            output_gradient = torch.zeros_like(output)
        gradients = torch.ops.compressor.block_sparse_attention_backward(
            q, k, v, padding, output, lse, output_gradient, lse_gradient, *lists, *ctx.options
        )
        return *gradients, *([None] * 9)
