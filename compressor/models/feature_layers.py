"""Where features are read in a classifier of any library: its stages, and the head that reads its embedding.

timm says it itself (``feature_info``). Elsewhere a run on one image shows it: a stage is the last unit of a chain of
layers before the resolution falls; a transformer, whose resolution does not fall, is cut into quarters.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import RequestError
from compressor.models.taps import first_tensor, tap

__all__ = ["FeatureLayer", "as_embedding", "as_map", "head_layer", "layers_named", "pair_layers", "stages"]

ImageSize = tuple[int, int] | None

_MAX_PREFIX_TOKENS = 8  # class, distillation and register tokens stand before those of the image


@dataclass(frozen=True)
class FeatureLayer:
    """A layer whose output is a feature map.

    Attributes:
        name: As in ``named_modules``.
        shape: (C, H, W) of its map for one image of the data.
    """

    name: str
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class _Call:
    name: str
    module: nn.Module
    output: Tensor


def stages(module: nn.Module, run: Callable[[], Any], image_size: ImageSize = None) -> list[FeatureLayer]:
    """The stages of a network, shallow to deep.

    Args:
        module: The network.
        run: Calls it once, on one image.
        image_size: (H, W) of that image, by which maps that are not square are told from tokens.

    Raises:
        RequestError: It has no layer whose output is a map or a sequence of tokens.
    """
    calls = _record(module, run)
    named = _timm_names(module, calls) or _by_resolution(module, calls, image_size) or _by_depth(calls)
    if not named:
        raise RequestError(f"{type(module).__name__} shows no feature maps: name the layers in the configuration")
    outputs = {call.name: call.output for call in calls}
    return [FeatureLayer(name, _shape(as_map(outputs[name], image_size))) for name in named]


def layers_named(
    module: nn.Module, run: Callable[[], Any], names: Sequence[str], image_size: ImageSize = None
) -> list[FeatureLayer]:
    """Layers that the user named, with the shapes of their maps.

    Raises:
        RequestError: A layer does not exist, does not run, or returns no map.
    """
    with tap(module, *names) as found, _undisturbed(module):
        run()
    for name in names:
        if name not in found:
            raise RequestError(f"the layer {name!r} of {type(module).__name__} does not run")
    return [FeatureLayer(name, _shape(as_map(found[name], image_size))) for name in names]


def head_layer(module: nn.Module, run: Callable[[], Any], *, axis: int = -1, without: str = "") -> str:
    """The name of the layer that turns the embedding into logits: the last linear layer of their width.

    Args:
        module: The network.
        run: Calls it once, on one image, and returns its logits.
        axis: The classes' axis in the logits.
        without: Layers with this in their names do not count.

    Raises:
        RequestError: There is none.
    """
    logits: list[Tensor] = []
    calls = _record(module, lambda: logits.append(run()))
    width = logits[0].shape[axis]
    found = [c.name for c in calls if isinstance(c.module, (nn.Linear, nn.Conv2d)) and _width(c.module) == width]
    found = [name for name in found if not without or without not in name]
    if not found:
        raise RequestError(f"{type(module).__name__} has no linear layer of {width} outputs to read the embedding at")
    return found[-1]


def pair_layers(
    student: Sequence[FeatureLayer], teacher: Sequence[FeatureLayer], count: int
) -> list[tuple[FeatureLayer, FeatureLayer]]:
    """Pair stages of two networks from the deepest on upwards, shallow to deep in the result.

    Args:
        student: Its stages.
        teacher: Its stages.
        count: How many pairs, at most; maps of a single position tell nothing of places and are left out.

    Raises:
        RequestError: One of them has no map of more than one position.
    """
    sides = [[layer for layer in layers if math.prod(layer.shape[1:]) > 1] for layers in (student, teacher)]
    for side, name in zip(sides, ("student", "teacher"), strict=True):
        if not side:
            raise RequestError(f"the {name}'s feature maps have a single position: images are too small for it")
    number = min(count, *map(len, sides))
    return list(zip(sides[0][-number:], sides[1][-number:], strict=True))


def as_map(features: Tensor, image_size: ImageSize = None) -> Tensor:
    """Features as a map (B, C, H, W): channels last become first, tokens (B, N, C) a grid without prefix tokens.

    Args:
        features: What a layer returned.
        image_size: (H, W) of the image, whose shape a map has; a square by default.

    Raises:
        RequestError: They are neither.
    """
    ratio = image_size[0] / image_size[1] if image_size is not None else 1.0
    if features.dim() == 4:
        _, first, second, third = features.shape
        # Swin and its kin keep channels last; only the shape of the map shows it.
        last = _alike(first, second, ratio) and not _alike(second, third, ratio)
        return features.permute(0, 3, 1, 2) if last else features
    if features.dim() == 3:
        count = features.shape[1]
        for prefix in range(min(_MAX_PREFIX_TOKENS, count)):
            height = round(math.sqrt((count - prefix) * ratio))
            width = round(math.sqrt((count - prefix) / ratio))
            if height * width == count - prefix and _alike(height, width, ratio):
                return features[:, prefix:].transpose(1, 2).unflatten(2, (height, width))
    raise RequestError(f"features of shape {tuple(features.shape)} are no map (B, C, H, W) and no grid of tokens")


def _alike(height: int, width: int, ratio: float) -> bool:
    """Whether a map has an image's shape, up to the rounding of its strides."""
    return height == width if ratio == 1.0 else abs(height - width * ratio) < max(1.0, ratio)


def as_embedding(features: Tensor) -> Tensor:
    """Features as vectors (B, D): the mean over positions of a map (B, D, H, W) or of tokens (B, N, D)."""
    if features.dim() == 4:
        return features.mean(dim=(2, 3))
    return features.mean(dim=1) if features.dim() == 3 else features


def _record(module: nn.Module, run: Callable[[], Any]) -> list[_Call]:
    """Every layer's last call on one image, in the order in which they end."""
    calls: dict[str, _Call] = {}

    def recorder(name: str) -> Any:
        def record(layer: nn.Module, args: Any, output: Any) -> None:
            found = first_tensor(output)
            if found is not None:
                calls.pop(name, None)
                calls[name] = _Call(name, layer, found)

        return record

    handles = [layer.register_forward_hook(recorder(name)) for name, layer in module.named_modules() if name]
    try:
        with _undisturbed(module):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return list(calls.values())


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Without gradients, in eval mode; every layer is put back into its own mode."""
    modes = {layer: layer.training for layer in module.modules()}
    try:
        with torch.no_grad():
            module.eval()
            yield
    finally:
        for layer, training in modes.items():
            layer.training = training


def _timm_names(module: nn.Module, calls: Sequence[_Call]) -> list[str]:
    """What ``feature_info`` of timm lists, one layer a resolution; quarters of it where there is one resolution."""
    info = getattr(module, "feature_info", None)
    entries = info if isinstance(info, list) else list(getattr(info, "info", None) or [])
    ran = {call.name for call in calls}
    named = [entry["module"] for entry in entries if isinstance(entry, dict) and entry.get("module") in ran]
    reductions = {entry.get("reduction") for entry in entries if isinstance(entry, dict)}
    if len(named) < 2 or len(named) < len(entries):
        return []
    return _quarters(named) if len(reductions) == 1 else named


def _by_resolution(module: nn.Module, calls: Sequence[_Call], image_size: ImageSize) -> list[str]:
    """The outermost last unit at each resolution: a child of the network itself, or of a chain of layers."""
    names = dict(module.named_modules())
    last: dict[tuple[int, ...], tuple[int, str]] = {}
    smallest = math.inf
    for call in calls:
        parent, _, _ = call.name.rpartition(".")
        size = _map_size(call.output, image_size)
        if size is None or (parent and not isinstance(names[parent], (nn.Sequential, nn.ModuleList, nn.ModuleDict))):
            continue
        smallest, depth = min(smallest, math.prod(size)), call.name.count(".")
        # A size that grows again is a pooling layer in front of the head.
        if math.prod(size) == smallest and (size not in last or depth <= last[size][0]):
            last[size] = (depth, call.name)
    found = [name for size, (_, name) in last.items() if math.prod(size) > 1]
    return found if len(found) > 1 else []


def _by_depth(calls: Sequence[_Call]) -> list[str]:
    """Quarters of the longest chain of layers that return tokens or maps of one size."""
    chains = Counter(call.name.rpartition(".")[0] for call in calls if call.output.dim() in (3, 4))
    chained = [parent for parent, count in chains.items() if count > 1]
    best: list[str] = []
    for parent in chained:
        members = [c for c in calls if c.name.rpartition(".")[0] == parent and c.output.dim() in (3, 4)]
        shape = Counter(tuple(c.output.shape) for c in members).most_common(1)[0][0]
        kind = Counter(type(c.module) for c in members).most_common(1)[0][0]
        alike = [c.name for c in members if tuple(c.output.shape) == shape and type(c.module) is kind]
        best = alike if len(alike) > len(best) else best
    return _quarters(best)


def _quarters(names: Sequence[str]) -> list[str]:
    """At most four of them, evenly spread, the last included."""
    count = min(4, len(names))
    return [names[(k + 1) * len(names) // count - 1] for k in range(count)]


def _map_size(features: Tensor, image_size: ImageSize) -> tuple[int, int] | None:
    if features.dim() not in (3, 4):
        return None
    try:
        height, width = as_map(features, image_size).shape[-2:]
    except RequestError:
        return None
    return int(height), int(width)


def _shape(features: Tensor) -> tuple[int, int, int]:
    channels, height, width = features.shape[1:]
    return int(channels), int(height), int(width)


def _width(layer: nn.Linear | nn.Conv2d) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
