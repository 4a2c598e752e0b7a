"""Fit the linear maps of a pruned layout in closed form, and tell beforehand what each would cost.

PPCL (Ma et al., CVPR 2026), stage 2. Inputs are always the original's states: no fit reads another fit's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from compressor.diffusion.noised_data import walk
from compressor.models.anatomy.blocks import BlockStack, State
from compressor.models.edits.blocks import (
    PrunedJointBlock,
    PrunedSingleBlock,
    ResidualMap,
    after_attention,
    can_prune_ffn,
    can_prune_text,
    text_tokens,
)
from compressor.models.edits.layout import Slot
from compressor.models.linear_fit import LeastSquares, LinearMap

__all__ = ["ffn_errors", "fit_maps", "map_modules", "map_pairs", "set_maps", "text_token_similarity"]

BlockOf = Callable[[Slot], nn.Module]
"""The whole block of a slot: the original's, or a plug."""

Pair = tuple[str, Tensor, Tensor]
"""A map's name, its inputs and its targets."""


def map_pairs(slot: Slot, block: nn.Module, before: State, after: State, anchor: AnchorText | None) -> list[Pair]:
    """What every map of a slot should do, on one batch.

    Args:
        slot: The slot.
        block: Its whole block.
        before: The original's state that the slot reads.
        after: The original's state that it imitates.
        anchor: Text of the text run's anchor, where the slot stands in one.

    Returns:
        ``image`` and ``text``: from the stream behind the attention to the stream behind the block. ``tokens``: from
        the anchor's text tokens to the block's own. ``state``: from the text behind the anchor to that behind the run.
    """
    pairs: list[Pair] = []
    if slot.ffn:
        inner = after_attention(block, before)
        for stream, target in after.streams().items():
            if stream == "image" or slot.text in ("whole", "anchor"):
                pairs.append((stream, inner[stream], target))
    if slot.text in ("inside", "last") and anchor is not None:
        pairs.append(("tokens", anchor.tokens, text_tokens(block, before)))
        if slot.text == "last" and after.text is not None:
            pairs.append(("state", anchor.state, after.text))
    return pairs


class AnchorText:
    """Text of an anchor: the tokens that enter its attention, and the stream behind the block."""

    def __init__(self, tokens: Tensor, state: Tensor) -> None:
        self.tokens, self.state = tokens, state


def with_anchors(
    slots: Sequence[Slot], blocks: Sequence[nn.Module], states: Sequence[State]
) -> Iterable[tuple[Slot, nn.Module, State, State, AnchorText | None]]:
    """Every slot with its whole block, the states around it and the text of its run's anchor."""
    anchor: AnchorText | None = None
    for slot, block in zip(slots, blocks, strict=True):
        before, after = states[slot.first], states[slot.last + 1]
        if slot.text == "anchor" and after.text is not None:
            with torch.no_grad():
                anchor = AnchorText(text_tokens(block, before), after.text)
        yield slot, block, before, after, anchor if slot.text in ("inside", "last") else None


@torch.no_grad()
def fit_maps(
    stack: BlockStack, slots: Sequence[Slot], block_of: BlockOf, data: Iterable[State]
) -> dict[str, LinearMap]:
    """All linear maps of a layout: ``"first-last.name"`` to weight and bias."""
    fits: dict[str, LeastSquares] = {}
    blocks = [block_of(slot) for slot in slots]
    if not any(slot.narrow for slot in slots):
        return {}
    for begun in data:
        for slot, block, before, after, anchor in with_anchors(slots, blocks, list(walk(stack, begun))):
            for name, inputs, target in map_pairs(slot, block, before, after, anchor):
                fits.setdefault(f"{slot.key}.{name}", LeastSquares()).add(inputs, target)
    return {name: fit.solve() for name, fit in fits.items()}


@torch.no_grad()
def ffn_errors(
    stack: BlockStack,
    slots: Sequence[Slot],
    block_of: BlockOf,
    maps: Mapping[str, LinearMap],
    data: Iterable[State],
) -> dict[str, Tensor]:
    """Relative error of every feed-forward map, by slot: ``sum |g + l(g) - T|^2 / sum |T - g|^2``, mean of the streams.

    ``data`` must be other samples than the maps were fitted on.
    """
    sums: dict[tuple[str, str], Tensor] = {}
    for begun in data:
        states = list(walk(stack, begun))
        for slot in slots:
            if not can_prune_ffn(block_of(slot)):
                continue
            pairs = map_pairs(slot, block_of(slot), states[slot.first], states[slot.last + 1], None)
            for name, g, target in pairs:
                weight, bias = maps[f"{slot.key}.{name}"]
                miss, size = (g + g @ weight.T + bias - target).square().sum(), (target - g).square().sum()
                sums[slot.key, name] = sums.get((slot.key, name), 0) + torch.stack([miss, size])
    ratios: dict[str, list[Tensor]] = {}
    for (key, _), pair in sums.items():
        ratios.setdefault(key, []).append(pair[0] / pair[1])
    return {key: torch.stack(values).mean() for key, values in ratios.items()}


@torch.no_grad()
def text_token_similarity(
    stack: BlockStack,
    slots: Sequence[Slot],
    block_of: BlockOf,
    data: Iterable[State],
    similarity: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """(S, S): how alike the text tokens are that two slots attend with; 0 where a slot has none."""
    blocks = [block_of(slot) for slot in slots]
    tokens: list[list[Tensor]] = [[] for _ in slots]
    for begun in data:
        states = list(walk(stack, begun))
        for place, (slot, block) in enumerate(zip(slots, blocks, strict=True)):
            if can_prune_text(block):
                tokens[place].append(text_tokens(block, states[slot.first]))
    joined = [torch.cat(parts) if parts else None for parts in tokens]
    table = torch.eye(len(slots))
    for a, left in enumerate(joined):
        for b, right in enumerate(joined):
            if left is not None and right is not None and a != b:
                table[a, b] = similarity(left, right)
    return table


def map_modules(block: nn.Module) -> dict[str, ResidualMap]:
    """The linear maps of a pruned block by name, as `map_pairs` names them."""
    if isinstance(block, PrunedSingleBlock):
        return {"image": block.map}
    if not isinstance(block, PrunedJointBlock):
        return {}
    found = {"image": block.image.map, "text": block.text.map if block.text is not None else None}
    found |= {"tokens": block.tokens_map, "state": block.text_map}
    return {name: module for name, module in found.items() if module is not None}


def set_maps(slots: Sequence[Slot], blocks: Sequence[nn.Module], maps: Mapping[str, LinearMap]) -> None:
    """Put fitted maps into the blocks of an assembled stack."""
    for slot, block in zip(slots, blocks, strict=True):
        for name, module in map_modules(block).items():
            module.set(*maps[f"{slot.key}.{name}"])
