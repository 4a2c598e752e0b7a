"""The anatomy of a block stack: begin, run one block, end. What methods walk that need the state between blocks.

One stack class a library class (see `diffusion_transformers`); a stack's own ``forward`` walks all blocks and equals
the library's. Blocks of our own (`OwnBlock`) may stand among the library's: they take and return the whole state.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from compressor.errors import ModelError

__all__ = ["Anchor", "BlockStack", "OwnBlock", "State", "block_stack", "walkable_classes"]


@dataclass(frozen=True)
class Anchor:
    """What blocks without a text stream of their own read: the last whole block's text.

    Attributes:
        tokens: (B, M, d) the normalised, modulated text that entered that block's attention.
    """

    tokens: Tensor


@dataclass(frozen=True)
class State:
    """What passes from block to block.

    Attributes:
        image: (B, N, d) image tokens.
        text: (B, M, d) text tokens, or None where the text is no stream of its own.
        context: Further arguments of every block, the same for all (time embedding, positions, masks, labels).
        size: (height, width) of the sample.
        anchor: Set inside a run of blocks that lost their text stream.
    """

    image: Tensor
    text: Tensor | None
    context: Mapping[str, Any]
    size: tuple[int, int]
    anchor: Anchor | None = None

    def streams(self) -> dict[str, Tensor]:
        """The streams by name."""
        return {"image": self.image} | ({} if self.text is None else {"text": self.text})

    def detached(self) -> State:
        """The same values without history."""
        return replace(self, image=self.image.detach(), text=None if self.text is None else self.text.detach())


class OwnBlock(nn.Module):
    """A block that takes the whole state; base of the blocks that edits put into a stack."""

    def step(self, state: State) -> State:
        raise NotImplementedError

    def forward(self, state: State) -> State:
        return self.step(state)


@dataclass(frozen=True)
class ConditionField:
    """A condition that a model takes: shape of one row ("tokens" is free), and whether it holds integers."""

    shape: tuple[int | str, ...]
    integer: bool = False
    optional: bool = False


class BlockStack(ABC):
    """A model seen as a stack of blocks.

    Args:
        module: An instance of `library_class`.
    """

    library_class: ClassVar[str]
    joint: ClassVar[bool] = False
    """Whether blocks carry a text stream beside the image's."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """All blocks in order."""

    @abstractmethod
    def begin(self, sample: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> State:
        """Embed: sample (B, C, H, W), timestep (B,) in the model's own unit, condition fields (B, ...)."""

    @abstractmethod
    def end(self, state: State) -> Tensor:
        """The model's output (B, C_out, H, W)."""

    @abstractmethod
    def rebuild(self, blocks: Sequence[nn.Module]) -> nn.Module:
        """Put other blocks in place of the present ones (in the module itself) and update its configuration."""

    @abstractmethod
    def condition_fields(self) -> dict[str, ConditionField]:
        """Conditions by name."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of the sample."""

    def call(self, block: nn.Module, state: State) -> State:
        """Run a library block on the state."""
        text, image = block(hidden_states=state.image, encoder_hidden_states=state.text, **state.context)
        return replace(state, image=image, text=text)

    def run(self, block: nn.Module, state: State) -> State:
        """Run one block, the library's or our own."""
        if isinstance(block, OwnBlock):
            result: State = block(state)
            return result
        return self.call(block, state)

    def token_map(self, state: State) -> Tensor:
        """The image tokens where their patches lie: (B, N, d) to (B, d, H / p, W / p)."""
        height, width = state.size
        patch = math.isqrt(height * width // state.image.shape[1])
        return state.image.transpose(1, 2).unflatten(2, (height // patch, width // patch))

    def forward(self, sample: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Walk the whole stack."""
        state = self.begin(sample, timestep, condition)
        for block in self.blocks:
            state = self.run(block, state)
        return self.end(state)


_STACKS: dict[str, type[BlockStack]] = {}


def register(stack: type[BlockStack]) -> type[BlockStack]:
    """Make a stack class known under its library class's name."""
    _STACKS[stack.library_class] = stack
    return stack


def walkable_classes() -> list[str]:
    """Names of the library classes whose blocks can be walked."""
    from compressor.models.anatomy import diffusion_transformers  # noqa: F401  registers its stacks

    return sorted(_STACKS)


def block_stack(module: nn.Module) -> BlockStack:
    """The anatomy of a module.

    Raises:
        ModelError: There is none for its class.
    """
    known = walkable_classes()
    name = type(module).__name__
    if name not in _STACKS:
        raise ModelError(f"the blocks of a {name} cannot be walked; classes that can: {', '.join(known)}")
    return _STACKS[name](module)
