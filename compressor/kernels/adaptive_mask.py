"""The adaptive block-sparse attention of Video-BLADE (arXiv 2508.10774): which blocks matter, and attention over them.

A probe attends between a few sampled tokens of each block; every query block keeps the key blocks that hold most of
its probe's mass. A pooled global branch can stand in for the blocks that are left out. Where the authors' kernel
departs from their paper (rows scaled by their maximum, not by a softmax's sum), the kernel is followed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.errors import RequestError
from compressor.kernels.dispatch import use_triton
from compressor.kernels.sparse_attention import block_sparse_attention, dense_mask

__all__ = [
    "asa_attention",
    "block_importance",
    "dense_asa_attention",
    "energy_block_mask",
    "evenly_spaced_offsets",
    "random_offsets",
]

_SCORES_AT_ONCE = 2**24


def evenly_spaced_offsets(block_size: int, samples: int) -> Tensor:
    """Fixed probe offsets, for graphs that must not draw: the middles of equal parts of a block.

    Args:
        block_size: Tokens of a block.
        samples: How many of them are probed, at most ``block_size``.

    Returns:
        ``(samples,)`` int64, ascending.

    Raises:
        RequestError: There are fewer tokens than samples.
    """
    _check_samples(block_size, samples)
    return (torch.arange(samples) * 2 + 1) * block_size // (2 * samples)


def random_offsets(
    batch: int, heads: int, block_size: int, samples: int, generator: torch.Generator | None = None
) -> Tensor:
    """Probe offsets drawn without replacement, each (batch, head) for itself, the same for all of its blocks.

    Args:
        batch: B.
        heads: H.
        block_size: Tokens of a block.
        samples: How many of them are probed, at most ``block_size``.
        generator: Gives the numbers, and their device.

    Returns:
        ``(B, H, samples)`` int64.

    Raises:
        RequestError: There are fewer tokens than samples.
    """
    _check_samples(block_size, samples)
    device = None if generator is None else generator.device
    return torch.rand(batch, heads, block_size, generator=generator, device=device).argsort(dim=-1)[..., :samples]


def _check_samples(block_size: int, samples: int) -> None:
    if not 1 <= samples <= block_size:
        raise RequestError(f"a block of {block_size} tokens cannot be probed at {samples} of them")


@torch.no_grad()
def block_importance(q: Tensor, k: Tensor, q_index: Tensor, k_index: Tensor, block_size: int = 128) -> Tensor:
    """How much each block of queries wants each block of keys.

    Of the scaled scores S between sampled tokens, each row is taken relative to its own maximum, the largest
    ``exp(S - max)`` of a pair of blocks is kept, and rows of blocks are divided by their sum. Blocks that are not full
    are filled by repeating the last token.

    Args:
        q: ``(B, H, N, D)`` float, after position embedding and normalisation.
        k: ``(B, H, M, D)``.
        q_index: ``(B, H, s)`` int64: offsets within each block of queries.
        k_index: ``(B, H, s)``: offsets within each block of keys.
        block_size: Tokens of a block.

    Returns:
        ``(B, H, ceil(N / block_size), ceil(M / block_size))`` float32, without gradient; rows sum to 1. On a GPU
        memory is ``B H s`` numbers a pair of blocks, elsewhere a bounded chunk of scores.
    """
    q_tokens = _sampled_tokens(q_index, q.shape[2], block_size)
    k_tokens = _sampled_tokens(k_index, k.shape[2], block_size)
    if q.shape[-1] <= 128 and use_triton(q, k, matrix_products=True):
        import compressor.kernels.adaptive_mask_triton  # noqa: F401 - registers the operator

        weights = torch.ops.compressor.largest_weights(q, k, q_tokens, k_tokens)
    else:
        weights = _largest_weights(q, k, q_tokens, k_tokens)
    return weights / weights.sum(dim=-1, keepdim=True)


def _sampled_tokens(index: Tensor, length: int, block_size: int) -> Tensor:
    """``(B, H, blocks, s)``: places of the sampled tokens; what lies behind the last token is the last token."""
    first = torch.arange(0, length, block_size, device=index.device)
    return (first[:, None] + index[:, :, None, :]).clamp(max=length - 1)


def _take(x: Tensor, tokens: Tensor) -> Tensor:
    """``(B, H, blocks, s, D)`` float32."""
    flat = tokens.flatten(start_dim=2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, flat).float().unflatten(2, tokens.shape[2:])


def _largest_weights(q: Tensor, k: Tensor, q_tokens: Tensor, k_tokens: Tensor) -> Tensor:
    """The largest exp(score - row maximum) of each pair of blocks, some query blocks at a time."""
    sampled_q, sampled_k = _take(q, q_tokens) / math.sqrt(q.shape[-1]), _take(k, k_tokens)
    keys = sampled_k.flatten(2, 3).transpose(-1, -2)
    if torch.compiler.is_exporting():
        parts = [sampled_q]
    else:
        scores_a_block = max(keys[..., 0, :].numel() * q_tokens.shape[-1], 1)
        parts = list(sampled_q.split(max(1, _SCORES_AT_ONCE // scores_a_block), dim=2))
    results = []
    for part in parts:
        scores = part.flatten(2, 3) @ keys
        of_blocks = scores.unflatten(-1, k_tokens.shape[2:]).amax(dim=-1)
        weights = (of_blocks - of_blocks.amax(dim=-1, keepdim=True)).exp()
        results.append(weights.unflatten(2, part.shape[2:4]).amax(dim=3))
    return torch.cat(results, dim=2)


@torch.no_grad()
def energy_block_mask(
    importance: Tensor,
    energy_threshold: float = 0.95,
    min_retain_ratio: float = 0.05,
    max_retain_ratio: float = 0.17,
    force_last: int = 0,
) -> Tensor:
    """Keep the most important key blocks of each query block until their mass reaches the threshold.

    The block that crosses the threshold is not counted, as in the authors' code. Between ``max(1, int(n r_min))`` and
    ``max(1, int(n r_max))`` blocks of n are kept; where the two contradict each other, the upper one holds.

    Args:
        importance: ``(B, H, query blocks, n)`` float, at least 0.
        energy_threshold: Share of each row's mass, in (0, 1].
        min_retain_ratio: r_min, in [0, 1].
        max_retain_ratio: r_max, in [0, 1].
        force_last: So many rows and columns at the end are turned on afterwards (text tokens).

    Returns:
        The same shape, bool: no row is empty.
    """
    blocks = importance.shape[-1]
    ordered, order = importance.sort(dim=-1, descending=True)
    mass = ordered.cumsum(dim=-1)
    kept = (mass < energy_threshold * mass[..., -1:]).sum(dim=-1, keepdim=True)
    lowest, highest = max(1, int(blocks * min_retain_ratio)), max(1, int(blocks * max_retain_ratio))
    kept = kept.clamp(min=lowest).clamp(max=highest)
    rank = torch.arange(blocks, device=importance.device)
    mask = torch.zeros_like(importance, dtype=torch.bool).scatter(-1, order, rank < kept)
    if force_last:
        last_row = torch.arange(importance.shape[-2], device=mask.device) >= importance.shape[-2] - force_last
        mask = mask | last_row[:, None] | (rank >= blocks - force_last)
    return mask


def asa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    block_size: int = 128,
    pool_size: int | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Attention over the kept blocks and, where wanted, over pooled keys and values beside them.

    With a pool size this is one softmax over the kept keys and the pooled ones, whose logits are raised by
    ``ln(pool_size)``. Gradients flow through both branches and through their weights. While a graph is exported, it is
    computed as that one softmax: dense attention with a mask, which every engine has.

    Args:
        q: ``(B, H, N, D)`` float.
        k: The same shape as q.
        v: The same shape as q.
        block_mask: ``(B or 1, H or 1, n, n)`` bool.
        block_size: Tokens of a block.
        pool_size: Consecutive tokens of a pooled key, or None for the kept blocks alone.
        key_padding_mask: ``(B, N)`` bool, true at padding; pooled keys that hold any are left out.

    Returns:
        ``(B, H, N, D)`` in the dtype of q.
    """
    if torch.compiler.is_exporting():
        return dense_asa_attention(q, k, v, block_mask, block_size, pool_size, key_padding_mask)
    if pool_size is None:
        return block_sparse_attention(q, k, v, block_mask, block_size=block_size, key_padding_mask=key_padding_mask)
    kept, kept_lse = block_sparse_attention(
        q, k, v, block_mask, block_size=block_size, key_padding_mask=key_padding_mask, return_lse=True
    )
    pooled_k, pooled_v = _pooled(k, pool_size), _pooled(v, pool_size)
    # Dense attention with its log-sum-exp: the same kernel with every block kept.
    blocks = -(-pooled_k.shape[2] // block_size)
    everything = torch.ones(1, 1, block_mask.shape[-2], blocks, dtype=torch.bool, device=q.device)
    pooled, pooled_lse = block_sparse_attention(
        q,
        pooled_k,
        pooled_v,
        everything,
        block_size=block_size,
        key_padding_mask=_pooled_padding(key_padding_mask, pool_size),
        return_lse=True,
    )
    difference = kept_lse - (pooled_lse + math.log(pool_size))
    # A query that sees nothing in either branch has no share to give; its outputs are 0.
    share = torch.sigmoid(torch.where(difference.isnan(), torch.zeros_like(difference), difference))[..., None]
    return (share * kept + (1 - share) * pooled).to(q.dtype)


def dense_asa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    block_size: int = 128,
    pool_size: int | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """`asa_attention` by one dense attention with a mask; memory is B H N N. Queries must see a key."""
    length = k.shape[2]
    seen = dense_mask(block_mask, q.shape[2], length, block_size, key_padding_mask=key_padding_mask)
    if pool_size is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    pooled_k, pooled_v = _pooled(k, pool_size), _pooled(v, pool_size)
    bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -math.inf)
    pooled_bias = torch.full((*bias.shape[:-1], pooled_k.shape[2]), math.log(pool_size), dtype=q.dtype, device=q.device)
    padding = _pooled_padding(key_padding_mask, pool_size)
    if padding is not None:
        pooled_bias = pooled_bias.masked_fill(padding[:, None, None, :], -math.inf)
    return F.scaled_dot_product_attention(
        q,
        torch.cat([k, pooled_k], dim=2),
        torch.cat([v, pooled_v], dim=2),
        attn_mask=torch.cat([bias, pooled_bias], dim=-1),
    )


def _filled(x: Tensor, size: int, dim: int) -> Tensor:
    """Windows of ``size`` along an axis, in an axis after it; the last one is filled by repeating the last entry."""
    missing = -x.shape[dim] % size
    if missing:
        shape = list(x.shape)
        shape[dim] = missing
        x = torch.cat([x, x.narrow(dim, x.shape[dim] - 1, 1).expand(shape)], dim=dim)
    return x.unflatten(dim, (-1, size))


def _pooled(x: Tensor, size: int) -> Tensor:
    """Mean of windows of consecutive tokens."""
    return _filled(x, size, 2).mean(dim=3)


def _pooled_padding(key_padding_mask: Tensor | None, size: int) -> Tensor | None:
    return None if key_padding_mask is None else _filled(key_padding_mask, size, 1).any(dim=2)
