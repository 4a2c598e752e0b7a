"""Zeros in the weights of an exported graph: how many, and in which pattern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnx import ModelProto, NodeProto, TensorProto

from compressor.exporters.model_file import values_of
from compressor.runtimes.runtime import Array

__all__ = ["WeightZeros", "count_zeros"]


@dataclass(frozen=True)
class WeightZeros:
    """Zeros of the weights of convolutions and products.

    Attributes:
        weights: Number of weights (tensors).
        two_of_four: Those in which two of four neighbouring inputs of every output are zero.
        half_zero: Those of which half or more is zero.
        share: Share of zeros of all their values.
    """

    weights: int
    two_of_four: int
    half_zero: int
    share: float

    @property
    def said(self) -> str:
        """For a note."""
        pattern = f", {self.two_of_four} of them 2:4" if self.two_of_four else ""
        return f"{self.half_zero} of {self.weights} weights are half zeros or more{pattern}"


def count_zeros(model: ModelProto) -> WeightZeros:
    """Look at the constant weights of a float32 graph's convolutions and products."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = [
        _outputs_first(node, constants) for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")
    ]
    known = [weight for weight in weights if weight is not None and weight.size]
    shares = [float((weight == 0).mean()) for weight in known]
    zeros = sum(share * weight.size for share, weight in zip(shares, known, strict=True))
    return WeightZeros(
        len(known),
        sum(_is_two_of_four(weight) for weight in known),
        sum(share >= 0.5 for share in shares),
        zeros / max(1, sum(weight.size for weight in known)),
    )


def _outputs_first(node: NodeProto, constants: Mapping[str, TensorProto]) -> Array | None:
    """A node's constant weight as (outputs, inputs, ...); None where it has none of that form."""
    if node.input[1] not in constants:
        return None
    weight = values_of(constants[node.input[1]])
    if node.op_type == "Conv":
        return weight
    if weight.ndim != 2:
        return None
    flipped = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return weight if flipped else weight.T


def _is_two_of_four(weight: Array) -> bool:
    outputs, inputs = weight.shape[:2]
    if inputs % 4 or not weight.any():
        return False
    groups = weight.reshape(outputs, inputs // 4, 4, *weight.shape[2:])
    return bool(((groups == 0).sum(2) >= 2).all())
