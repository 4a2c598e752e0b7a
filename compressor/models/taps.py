"""Taps: what layers inside a network see and return while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from compressor.errors import RequestError, nearest

__all__ = ["tap"]


@contextmanager
def tap(module: nn.Module, *where: str | type[nn.Module], inputs: bool = False) -> Iterator[dict[str, Tensor]]:
    """Record layers of a network while the block runs.

        with tap(net, "layer2", "layer3") as features:
            logits = net(image)
        features["layer2"]

    What is recorded is a copy, because the next layer may work in place, and never detached: losses on it train the
    network. Of a layer that runs several times the last call counts; of outputs with several parts, the first tensor.

    Args:
        module: The network.
        where: Layers by name, as in ``named_modules``, or by class: then every layer of the class, in the order of
            their calls.
        inputs: Record what goes into the layers instead of what comes out.

    Yields:
        Tensors by the layers' names, filled as they run.

    Raises:
        RequestError: There is no such layer.
    """
    known = dict(module.named_modules())
    layers: dict[str, nn.Module] = {}
    for place in where:
        if isinstance(place, str):
            if place not in known:
                raise RequestError(
                    f"{type(module).__name__} has no layer {place!r}: {nearest(place, known.keys() - {''})}"
                )
            layers[place] = known[place]
        else:
            layers |= {name: layer for name, layer in known.items() if isinstance(layer, place)}
    recorded: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(_recorder(recorded, name, inputs), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _recorder(recorded: dict[str, Tensor], name: str, inputs: bool) -> Any:
    def record(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        found = first_tensor((args, tuple(kwargs.values())) if inputs else output)
        if found is not None:
            recorded.pop(name, None)  # the order is that of the last calls
            recorded[name] = found.clone()

    return record


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)
