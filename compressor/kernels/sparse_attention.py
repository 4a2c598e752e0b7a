"""Attention over the blocks of a mask, exact within them, with the log-sum-exp as an output of its own.

Cost, for n kept pairs of blocks of size b and heads of width D: ``4 n b^2 D`` floating-point operations forward and
``14 n b^2 D`` backward, and about ``4 n b D`` numbers moved; memory beyond inputs and outputs is four bytes a pair in
each direction and eight bytes a query. The mask itself is read once, to make the lists of pairs.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from compressor.errors import RequestError
from compressor.kernels.block_indices import BlockIndices, causal_blocks
from compressor.kernels.dispatch import use_triton

__all__ = ["block_sparse_attention", "dense_mask"]

_LARGEST_HEAD = 128


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor | BlockIndices,
    *,
    block_size: int = ...,
    scale: float | None = ...,
    causal: bool = ...,
    key_padding_mask: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor | BlockIndices,
    *,
    block_size: int = ...,
    scale: float | None = ...,
    causal: bool = ...,
    key_padding_mask: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor | BlockIndices,
    *,
    block_size: int = 64,
    scale: float | None = None,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which each block of queries sees the key blocks that the mask gives it.

    Queries that see no key (no block, or only padding) give zeros, a log-sum-exp of minus infinity and zero gradients.

    Args:
        q: ``(B, H, N, D)`` float; D up to 128 (wider heads take the reference).
        k: ``(B, H, M, D)``; M may differ from N.
        v: ``(B, H, M, D)``.
        block_mask: Bool, ``(B or 1, H or 1, ceil(N / block_size), ceil(M / block_size))``, or the `BlockIndices` of
            such a mask, which save making the lists anew.
        block_size: Tokens of a block, for queries and keys; the last block may be shorter. 64 or 128 on a GPU; other
            multiples of 16 run in smaller tiles, anything else takes the reference.
        scale: Factor of the scores, above 0; ``1 / sqrt(D)`` by default.
        causal: Query i sees keys 0..i (counted from the start where N and M differ).
        key_padding_mask: Bool ``(B, M)``, true where a key is padding and not seen, as torch.nn.MultiheadAttention
            has it.
        return_lse: Also return the natural logarithm of the sum of the exponentials of the scaled scores. Its
            gradient flows: outputs over disjoint keys can be merged with it.

    Returns:
        ``(B, H, N, D)`` in the dtype of q; with ``return_lse`` also ``(B, H, N)`` float32 or wider.

    Raises:
        RequestError: Shapes, dtypes or options do not fit together.
    """
    mask = block_mask.mask if isinstance(block_mask, BlockIndices) else block_mask
    _check(q, k, v, mask, block_size, key_padding_mask)
    if isinstance(block_mask, BlockIndices) and block_mask.causal != causal:
        raise RequestError(f"the BlockIndices were made with causal={block_mask.causal}: make them anew")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if not 0 < scale < math.inf:
        raise RequestError(f"scale must be above 0 and finite, not {scale}")
    if _in_kernel(q, k, v, block_size):
        from compressor.kernels.sparse_attention_triton import Attention

        needs_keys = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        indices = _indices(block_mask, causal, needs_keys)
        by_key = indices.by_key if indices.by_key is not None else indices.by_query
        output, lse = Attention.apply(
            q,
            k,
            v,
            key_padding_mask,
            indices.by_query.starts,
            indices.by_query.entries,
            by_key.starts,
            by_key.entries,
            list(mask.shape[:2]),
            block_size,
            float(scale),
            causal,
        )
    else:
        output, lse = reference_attention(q, k, v, mask, block_size, scale, causal, key_padding_mask)
    return (output, lse) if return_lse else output


def _indices(block_mask: Tensor | BlockIndices, causal: bool, needs_keys: bool) -> BlockIndices:
    if isinstance(block_mask, BlockIndices):
        if block_mask.by_key is not None or not needs_keys:
            return block_mask
        block_mask = block_mask.mask
    # A compiled graph cannot wait for the number of blocks: it makes room for all.
    capacity = block_mask.numel() if torch.compiler.is_compiling() else None
    return BlockIndices.of(block_mask, causal=causal, with_keys=needs_keys, capacity=capacity)


def _in_kernel(q: Tensor, k: Tensor, v: Tensor, block_size: int) -> bool:
    return (
        block_size % 16 == 0
        and q.shape[-1] <= _LARGEST_HEAD
        and q.numel() > 0
        and k.numel() > 0
        and q.dtype == k.dtype == v.dtype
        and use_triton(q, k, v, matrix_products=True)
    )


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block_size: int, key_padding_mask: Tensor | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise RequestError(
            "q must be (B, H, N, D) and k and v (B, H, M, D), "
            f"not {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if block_size < 1:
        raise RequestError(f"block_size must be at least 1, not {block_size}")
    blocks = (-(-q.shape[2] // block_size), -(-k.shape[2] // block_size))
    batch, heads = q.shape[:2]
    fits = (
        mask.dtype == torch.bool
        and mask.ndim == 4
        and mask.shape[0] in (1, batch)
        and mask.shape[1] in (1, heads)
        and tuple(mask.shape[2:]) == blocks
    )
    if not fits:
        raise RequestError(
            f"block_mask must be bool ({batch} or 1, {heads} or 1, {blocks[0]}, {blocks[1]}) "
            f"for blocks of {block_size}, not {mask.dtype} {tuple(mask.shape)}"
        )
    if key_padding_mask is not None and (
        key_padding_mask.dtype != torch.bool or tuple(key_padding_mask.shape) != (batch, k.shape[2])
    ):
        raise RequestError(
            f"key_padding_mask must be bool {(batch, k.shape[2])}, true at padding, "
            f"not {key_padding_mask.dtype} {tuple(key_padding_mask.shape)}"
        )


def dense_mask(
    block_mask: Tensor,
    query_length: int,
    key_length: int,
    block_size: int,
    *,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Which key each query sees: what a dense attention takes as its mask.

    Args:
        block_mask: ``(B or 1, H or 1, query blocks, key blocks)`` bool.
        query_length: N.
        key_length: M.
        block_size: Tokens of a block.
        causal: Query i sees keys 0..i.
        key_padding_mask: ``(B, M)`` bool, true at padding.

    Returns:
        ``(B or 1, H or 1, N, M)`` bool.
    """
    if causal:
        block_mask = causal_blocks(block_mask)
    # Views and one copy: repeat_interleave does not export everywhere.
    batch, heads, rows, columns = block_mask.shape
    spread = block_mask[:, :, :, None, :, None].expand(batch, heads, rows, block_size, columns, block_size)
    seen = spread.reshape(batch, heads, rows * block_size, columns * block_size)[..., :query_length, :key_length]
    if causal:
        seen = seen & torch.ones(query_length, key_length, dtype=torch.bool, device=seen.device).tril()
    return seen if key_padding_mask is None else seen & ~key_padding_mask[:, None, None, :]


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    block_size: int,
    scale: float,
    causal: bool,
    key_padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`block_sparse_attention` by dense attention under the mask: output and log-sum-exp. Memory is B H N M."""
    wide = torch.promote_types(q.dtype, torch.float32)
    seen = dense_mask(block_mask, q.shape[2], k.shape[2], block_size, causal=causal, key_padding_mask=key_padding_mask)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    sees_any = seen.any(dim=-1, keepdim=True)
    # Where nothing is seen the scores stay finite, so that neither values nor gradients become NaN.
    scores = scores.masked_fill(~seen & sees_any, -math.inf)
    weights = scores.softmax(dim=-1).masked_fill(~sees_any, 0)
    lse = scores.logsumexp(dim=-1).masked_fill(~sees_any[..., 0], -math.inf)
    return (weights @ v.to(wide)).to(q.dtype), lse
