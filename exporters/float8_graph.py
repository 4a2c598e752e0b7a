"""8-bit float graphs: the pairs of a symmetric integer graph, with 8-bit floats (e4m3) between them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper

from compressor.exporters.model_file import values_of
from compressor.runtimes.runtime import Array

__all__ = ["FLOAT8_MAX", "to_float8"]

FLOAT8_MAX = 448.0
"""Largest finite value of float8 e4m3fn."""
_INT8_MAX = 127.0


def to_float8(model: ModelProto, weights: Mapping[str, TensorProto]) -> ModelProto:
    """Replace 8-bit integers by 8-bit floats of the same range.

    A scale keeps its meaning, the range over the largest value of the type. Weights are rounded anew from what they
    were in float32.

    Args:
        model: A graph with symmetric int8 pairs, one scale a tensor.
        weights: The float32 constants of the graph that was quantised, by name.

    Returns:
        The same graph with float8e4m3fn pairs.
    """
    result = ModelProto()
    result.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in result.graph.initializer}
    done: set[str] = set()
    for node in result.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero = constants[node.input[1]], constants[node.input[2]]
        if scale.name not in done:
            done.add(scale.name)
            wider = numpy_helper.to_array(scale) * np.float32(_INT8_MAX / FLOAT8_MAX)
            scale.CopyFrom(numpy_helper.from_array(np.asarray(wider, np.float32), scale.name))
        if zero.name not in done:
            done.add(zero.name)
            zero.CopyFrom(_float8(np.zeros(tuple(zero.dims), np.float32), zero.name))
        weight = constants.get(node.input[0])
        if weight is not None and weight.name not in done:
            done.add(weight.name)
            exact = values_of(weights[weight.name.removesuffix("_quantized")])
            weight.CopyFrom(_float8(exact / numpy_helper.to_array(scale), weight.name))
    del result.graph.value_info[:]
    return result


def _float8(values: Array, name: str) -> TensorProto:
    """Values as float8 e4m3fn, rounded to the nearest, cut at its largest."""
    import ml_dtypes

    cut = np.clip(values, -FLOAT8_MAX, FLOAT8_MAX).astype(ml_dtypes.float8_e4m3fn)
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT8E4M3FN, raw_data=cut.tobytes())
    tensor.dims.extend(values.shape)
    return tensor
