"""The anatomy of a block stack: begin, run one block, end. What methods walk that need the state between blocks.

One stack class a library class (see `diffusion_transformers`); a stack's own ``forward`` walks all blocks and equals
the library's. Blocks of our own (`OwnBlock`) may stand among the library's: they take and return the whole state.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.models.anatomy.diffusion_nets import DiffusionNet, known_nets

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


class BlockStack(DiffusionNet):
    """A model seen as a stack of blocks."""

    joint: ClassVar[bool] = False
    """Whether blocks carry a text stream beside the image's."""

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

    def middle(self, sample: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The image tokens after the first half of the blocks."""
        state = self.begin(sample, timestep, condition)
        for block in self.blocks[: max(len(self.blocks) // 2, 1)]:
            state = self.run(block, state)
        return self.token_map(state)


def walkable_classes() -> list[str]:
    """Names of the library classes whose blocks can be walked."""
    return [name for name, net in known_nets().items() if issubclass(net, BlockStack)]


def block_stack(module: nn.Module) -> BlockStack:
    """The anatomy of a module.

    Raises:
        ModelError: There is none for its class.
    """
    name = type(module).__name__
    net = known_nets().get(name)
    if net is None or not issubclass(net, BlockStack):
        raise ModelError(f"the blocks of a {name} cannot be walked; classes that can: {', '.join(walkable_classes())}")
    return net(module)
