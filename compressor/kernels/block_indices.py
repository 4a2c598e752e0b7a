"""Which blocks a sparse attention visits, as lists: the key blocks of each query block, and the other way round."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.errors import RequestError
from compressor.kernels.dispatch import use_triton

__all__ = ["BlockIndices", "BlockLists"]


@dataclass(frozen=True)
class BlockLists:
    """Lists of blocks, one after the other.

    Attributes:
        starts: ``(lists + 1,)`` int32: where each list begins; list i is ``entries[starts[i]:starts[i + 1]]``.
        entries: int32, ascending within a list; as long as all lists together, or longer where room was reserved.
    """

    starts: Tensor
    entries: Tensor

    @staticmethod
    def of(mask: Tensor, capacity: int | None = None) -> BlockLists:
        """The true columns of each row.

        Args:
            mask: Bool, ``(..., rows, columns)``, any strides.
            capacity: Entries to make room for, at least as many as the mask has. Without it the device is asked for
                their number, which waits for it.
        """
        counts = mask.sum(dim=-1, dtype=torch.int32).flatten()
        starts = F.pad(counts.cumsum(dim=0, dtype=torch.int32), (1, 0))
        if use_triton(mask.new_empty(0, dtype=torch.float32)):
            import compressor.kernels.block_indices_triton  # noqa: F401 - registers the operator

            length = int(starts[-1]) if capacity is None else capacity
            return BlockLists(starts, torch.ops.compressor.fill_lists(mask, starts, length))
        return BlockLists(starts, mask.nonzero()[:, -1].to(torch.int32))


@dataclass(frozen=True)
class BlockIndices:
    """A block mask and its lists, for use in several calls.

    Attributes:
        mask: ``(B or 1, H or 1, query blocks, key blocks)`` bool; without the blocks that causality excludes.
        by_query: For each batch, head and query block, the key blocks.
        by_key: For each batch, head and key block, the query blocks: what a backward pass needs.
        causal: Whether the mask was cut to the causal part.
    """

    mask: Tensor
    by_query: BlockLists
    by_key: BlockLists | None
    causal: bool

    @staticmethod
    def of(
        block_mask: Tensor, *, causal: bool = False, with_keys: bool = True, capacity: int | None = None
    ) -> BlockIndices:
        """Make the lists.

        Args:
            block_mask: ``(B or 1, H or 1, query blocks, key blocks)`` bool.
            causal: Leave out key blocks after the query block.
            with_keys: Make the lists of a backward pass too.
            capacity: Upper bound of the number of true blocks, where one is known: then nothing waits for the device
                (``capacity=block_mask.numel()`` always holds).

        Raises:
            RequestError: The mask is no bool tensor of four axes.
        """
        if block_mask.dtype != torch.bool or block_mask.ndim != 4:
            raise RequestError(
                "block_mask must be bool (B or 1, H or 1, query blocks, key blocks), "
                f"not {block_mask.dtype} {tuple(block_mask.shape)}"
            )
        mask = causal_blocks(block_mask) if causal else block_mask
        by_key = BlockLists.of(mask.transpose(-1, -2), capacity) if with_keys else None
        return BlockIndices(mask, BlockLists.of(mask, capacity), by_key, causal)


def causal_blocks(block_mask: Tensor) -> Tensor:
    """The mask without key blocks that begin after the query block ends: query i sees keys 0..i."""
    return block_mask.tril()
