"""Diffusion networks as methods call them, whatever their class: sample, time and conditions in, prediction out.

One adapter a library class: the block stacks (`diffusion_transformers`), which can also be walked, and the UNets
(`diffusion_unets`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from compressor.errors import ModelError

__all__ = ["ConditionField", "DiffusionNet", "diffusion_net", "known_nets", "register"]


@dataclass(frozen=True)
class ConditionField:
    """A condition that a model takes.

    Attributes:
        shape: Of one row; "tokens" is free.
        embeddings: Of a field of integers: how many values the model knows, that of the empty condition included.
        optional: The model can be called without it.
        constant: One row that serves every condition, the empty one too (SDXL's sizes).
    """

    shape: tuple[int | str, ...]
    embeddings: int | None = None
    optional: bool = False
    constant: tuple[float, ...] | None = None

    @property
    def integer(self) -> bool:
        """Whether it holds integers."""
        return self.embeddings is not None


class DiffusionNet(ABC):
    """A model of one library class.

    Args:
        module: An instance of `library_class`.
    """

    library_class: ClassVar[str]

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of the sample."""

    @abstractmethod
    def condition_fields(self) -> dict[str, ConditionField]:
        """Conditions by name."""

    @abstractmethod
    def forward(self, sample: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The model's output (B, C_out, H, W).

        Args:
            sample: (B, C, H, W).
            timestep: (B,) in the model's own unit.
            condition: Fields (B, ...).
        """

    @abstractmethod
    def middle(self, sample: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """What the model knows of the sample half way through, as a map (B, d, h, w); the rest of it is not run."""


NetClass = TypeVar("NetClass", bound=type[DiffusionNet])

_NETS: dict[str, type[DiffusionNet]] = {}


def register(net: NetClass) -> NetClass:
    """Make an adapter known under its library class's name."""
    _NETS[net.library_class] = net
    return net


def known_nets() -> dict[str, type[DiffusionNet]]:
    """The adapters by library class."""
    from compressor.models.anatomy import diffusion_transformers, diffusion_unets  # noqa: F401  they register

    return dict(sorted(_NETS.items()))


def diffusion_net(module: nn.Module) -> DiffusionNet:
    """The adapter of a module.

    Raises:
        ModelError: There is none for its class.
    """
    known, name = known_nets(), type(module).__name__
    if name not in known:
        raise ModelError(f"a {name} is no diffusion model that is known here; known are {', '.join(known)}")
    return known[name](module)
