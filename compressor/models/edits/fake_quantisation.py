"""Fake quantisation: a network that computes in floats with the rounding of an 8-bit engine, and the way back.

A weight has one scale for each output channel, which follows its largest magnitude; the input of a layer has one scale
and zero point, of a range that is held. Gradients pass the rounding as if it were not there (the straight-through
estimator), but not where a value lies outside the range (Jacob et al. 2018, arXiv 1712.05877, section 3).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressor.errors import ModelError, RequestError
from compressor.layer_patterns import lies_in
from compressor.models.edits.sparsity import SparsityMask
from compressor.models.edits.weights import Weight, layer_weights, parametrisations
from compressor.models.model import Model, edit

__all__ = [
    "EDIT",
    "InputRounding",
    "WeightRounding",
    "add_fake_quantisation",
    "input_grid",
    "observed_ranges",
    "plain",
    "quantised_weights",
    "weight_level",
]

EDIT = "fake_quantisation.add"

# --- the grids -------------------------------------------------------------------------------------------------------


def weight_level(bits: int) -> int:
    """The largest level of a weight: levels run from minus to plus this.

    127 for 8 bits. ONNX Runtime's 7 bits have the levels -64 to 64, and fewer bits are counted likewise.
    """
    return 127 if bits == 8 else 2 ** (bits - 1)


def input_grid(low: float, high: float, bits: int, symmetric: bool) -> tuple[float, int, int, int]:
    """The grid of a layer's input: ``(scale, zero_point, first level, last level)``.

    Args:
        low: Smallest value; 0 where that is smaller, since every engine wants an exact zero.
        high: Largest value; 0 where that is larger.
        bits: 2 to 8.
        symmetric: Levels of -(2^(bits-1) - 1) to 2^(bits-1) - 1 around a zero point 0 (TensorRT); else 0 to 2^bits - 1
            with a zero point (ONNX Runtime and OpenVINO on a CPU).
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        last = 2 ** (bits - 1) - 1
        return max(-low, high) / last or 1.0, 0, -last, last
    last = 2**bits - 1
    scale = (high - low) / last or 1.0
    return scale, min(max(round(-low / scale), 0), last), 0, last


class WeightRounding(nn.Module):
    """The parametrisation: the weight on its grid, one symmetric scale for each output channel (first axis).

    The scale is the channel's largest magnitude over the largest level, so no weight lies outside the range; it gets no
    gradient. Zeros stay zeros.

    Args:
        bits: 2 to 8.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.level = weight_level(bits)

    def forward(self, weight: Tensor) -> Tensor:
        scale = weight.detach().flatten(1).abs().amax(1) / self.level
        scale = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, -self.level, self.level)


class InputRounding:
    """A forward pre-hook of a layer: its first input on a held grid (`input_grid`)."""

    def __init__(self, low: float, high: float, bits: int, symmetric: bool) -> None:
        self.grid = input_grid(low, high, bits, symmetric)

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (torch.fake_quantize_per_tensor_affine(inputs[0], *self.grid), *inputs[1:]) if inputs else inputs


# --- ranges ----------------------------------------------------------------------------------------------------------


@contextmanager
def observed_ranges(module: nn.Module, percentile: float = 100.0) -> Iterator[dict[str, tuple[float, float]]]:
    """Record the range of the inputs of linear and convolution layers that are called meanwhile.

    Args:
        module: Watched.
        percentile: Of the values of one call, in percent, 50 to 100: so many lie below the range's end, and above its
            start; 100 takes all. Several calls widen the range.

    Yields:
        ``(low, high)`` by the layer's name. Joint projections of PyTorch's attention have none: its queries, keys and
        values are three inputs.
    """
    ranges: dict[str, tuple[float, float]] = {}

    def watch(name: str, inputs: tuple[Any, ...]) -> None:
        if not inputs:
            return
        values = inputs[0].detach().flatten().float()
        place = max(math.ceil(percentile / 100 * len(values)), 1)
        low, high = (float(values.kthvalue(k).values) for k in (len(values) - place + 1, place))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise RequestError(f"the layer {name} gets values that are not finite; look at the data and the model")
        before = ranges.get(name, (low, high))
        ranges[name] = min(low, before[0]), max(high, before[1])

    handles = [
        weight.owner.register_forward_pre_hook(lambda _layer, inputs, name=weight.layer: watch(name, inputs))
        for weight in _weights(module)
        if weight.attribute == "weight"
    ]
    try:
        yield ranges
    finally:
        for handle in handles:
            handle.remove()


# --- in a module -----------------------------------------------------------------------------------------------------


def _weights(module: nn.Module) -> Iterator[Weight]:
    """The weights that can be rounded, or are; a sparsity mask may lie on them."""
    return layer_weights(module, SparsityMask, WeightRounding)


def quantised_weights(module: nn.Module) -> list[Weight]:
    """The weights that are rounded."""
    return [
        weight
        for weight in _weights(module)
        if any(isinstance(one, WeightRounding) for one in parametrisations(weight.owner, weight.attribute))
    ]


@edit(EDIT)
def add_fake_quantisation(
    module: nn.Module,
    weight_bits: int,
    activation_bits: int,
    ranges: Mapping[str, Sequence[float]],
    symmetric: bool = False,
    exclude: Sequence[str] = (),
) -> nn.Module:
    """Round all weights of linear layers, convolutions and joint attention projections, and inputs of layers.

    Args:
        module: Changed in place.
        weight_bits: See `WeightRounding`.
        activation_bits: See `input_grid`.
        ranges: ``(low, high)`` by layer, as `observed_ranges` finds them; the inputs of others stay as they are.
        symmetric: See `input_grid`.
        exclude: Patterns of the layers whose weights stay as they are (`lies_in`).

    Raises:
        ModelError: The module has no such layer.
    """
    weights = [weight for weight in _weights(module) if not lies_in(weight.layer, exclude)]
    layers = {weight.layer: weight.owner for weight in weights}
    for name, (low, high) in ranges.items():
        if name not in layers:
            raise ModelError(f"a range is given for the layer {name}, which a {type(module).__name__} lacks")
        layers[name].register_forward_pre_hook(InputRounding(low, high, activation_bits, symmetric))
    for weight in weights:
        # a mask comes first: what is rounded is the sparse weight
        parametrize.register_parametrization(weight.owner, weight.attribute, WeightRounding(weight_bits))
    return module


def plain(model: Model) -> Model:
    """A copy of the model whose weights and inputs are not rounded, with the same weights and masks."""
    module = copy.deepcopy(model.module)
    for weight in quantised_weights(module):
        _remove_rounding(weight.owner, weight.attribute)
    for layer in module.modules():
        hooks = layer._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, InputRounding)]:
            del hooks[key]
    return Model(module, replace(model.info, edits=tuple(one for one in model.info.edits if one.name != EDIT)))


def _remove_rounding(layer: Any, attribute: str) -> None:
    """Leave the weight itself, under the masks that it has."""
    put_on = layer.parametrizations[attribute]
    for place in reversed(range(len(put_on))):
        if isinstance(put_on[place], WeightRounding):
            del put_on[place]
    if not len(put_on):
        # As in `fold_layer`, the class that a copy shares keeps its properties. The same parameter goes back, so that
        # what is tied to it stays tied.
        original = put_on.original
        del layer.parametrizations
        layer.__class__ = type(layer).__bases__[0]
        layer.register_parameter(attribute, original)
