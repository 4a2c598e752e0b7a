"""Weights that edits put a parametrisation on (masks, low-rank adapters), and the way back to plain parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["Weight", "fold_layer", "layer_weights", "parametrisations"]


@dataclass(frozen=True)
class Weight:
    """A weight that an edit can be put on.

    Attributes:
        name: Its path in the module, without what a parametrisation adds.
        owner: The layer.
        attribute: Its name in the layer.
    """

    name: str
    owner: nn.Module
    attribute: str

    @property
    def value(self) -> Tensor:
        """The weight as the layer uses it."""
        found: Tensor = getattr(self.owner, self.attribute)
        return found

    @property
    def layer(self) -> str:
        """The layer's path."""
        return self.name.removesuffix(self.attribute).rstrip(".")


# Layers that use their weight as it stands. Others (weight standardisation, for one) would make of zeros, or of what an
# adapter adds, something else, so a class has to be known.
_PLAIN_LAYERS = ("Linear", "NonDynamicallyQuantizableLinear", "Conv1d", "Conv2d", "Conv3d", "Conv2dSame")


def layer_weights(module: nn.Module, *allowed: type[nn.Module]) -> Iterator[Weight]:
    """The weights of linear and convolution layers, and the joint projections of PyTorch's own attention, in order.

    Args:
        module: Searched.
        allowed: Parametrisations that a weight may have already; weights with others are left out.
    """
    for path, layer in module.named_modules():
        prefix = f"{path}." if path else ""
        kind = type(layer).__name__.removeprefix("Parametrized")
        if kind in _PLAIN_LAYERS and isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            attribute = "weight"
        elif kind == "MultiheadAttention" and getattr(layer, "in_proj_weight", None) is not None:
            attribute = "in_proj_weight"
        else:
            continue
        if all(isinstance(one, allowed) for one in parametrisations(layer, attribute)):
            yield Weight(prefix + attribute, layer, attribute)


def parametrisations(layer: nn.Module, attribute: str) -> list[nn.Module]:
    """What is put on a weight, in order."""
    if not parametrize.is_parametrized(layer, attribute):
        return []
    put_on: Any = layer.parametrizations
    return list(put_on[attribute])


def fold_layer(layer: Any) -> None:
    """Make a layer's parametrised weights parameters again, of the values that the layer uses.

    PyTorch's own removal deletes properties of the layer's class, which a copy shares with what it was copied from.
    """
    values = {name: getattr(layer, name).detach().clone() for name in layer.parametrizations}
    needed = {name: layer.parametrizations[name].original.requires_grad for name in values}
    del layer.parametrizations
    layer.__class__ = type(layer).__bases__[0]
    for name, value in values.items():
        layer.register_parameter(name, nn.Parameter(value, needed[name]))
