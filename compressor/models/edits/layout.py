"""The layout of a pruned block stack: which block stands for which of the original's, and what it lost."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from compressor.models.edits.blocks import BlockPlan, TextRole, shape_block

__all__ = ["Slot", "layout_key", "mark_text_runs", "parameters_of", "parameters_of_layout", "slots_of"]


@dataclass(frozen=True)
class Slot:
    """One block of a pruned network: it stands for the original's blocks first..last.

    Attributes:
        first: Original block whose input it reads.
        last: Original block whose output it imitates.
        source: Original block whose structure it has.
        plug: Whether it is a trained replacement of a run.
        ffn: Whether its feed-forward is a linear map.
        text: Its role in a text run.
    """

    first: int
    last: int
    source: int
    plug: bool = False
    ffn: bool = False
    text: TextRole = "whole"

    @property
    def key(self) -> str:
        """ "first-last"."""
        return f"{self.first}-{self.last}"

    @property
    def plan(self) -> BlockPlan:
        """The slot as `blocks.assemble` takes it."""
        return {"source": self.source, "ffn": self.ffn, "text": self.text}

    @property
    def narrow(self) -> bool:
        """Whether linear maps stand in it."""
        return self.ffn or self.text in ("inside", "last")


def slots_of(count: int, plugs: Iterable[Slot] = ()) -> list[Slot]:
    """The layout of ``count`` blocks: plugs in place of their runs, all other blocks whole."""
    chosen = list(plugs)
    covered = {k for slot in chosen for k in range(slot.first, slot.last + 1)}
    whole = [Slot(k, k, k) for k in range(count) if k not in covered]
    return sorted([*chosen, *whole], key=lambda slot: slot.first)


def mark_text_runs(slots: Sequence[Slot], runs: Iterable[tuple[int, int]]) -> list[Slot]:
    """Give the slots of text runs (anchor, last), by place in the layout, their roles."""
    marked = list(slots)
    for anchor, last in runs:
        for place in range(anchor, last + 1):
            role: TextRole = "anchor" if place == anchor else "inside"
            # the text state behind the run matters only where a later block reads it
            if place == last and last + 1 < len(slots):
                role = "last"
            marked[place] = replace(marked[place], text=role)
    return marked


def layout_key(slots: Sequence[Slot]) -> list[dict[str, Any]]:
    """The layout as JSON."""
    return [{**slot.plan, "first": slot.first, "plug": slot.plug} for slot in slots]


def parameters_of(blocks: Iterable[nn.Module]) -> int:
    """Number of parameters of some blocks."""
    return sum(parameter.numel() for block in blocks for parameter in block.parameters())


def parameters_of_layout(blocks: Sequence[nn.Module], slots: Iterable[Slot]) -> int:
    """Number of parameters that the blocks of a layout will have; ``blocks`` are the original's."""
    return sum(parameters_of([shape_block(copy.deepcopy(blocks[slot.source]), slot.ffn, slot.text)]) for slot in slots)
