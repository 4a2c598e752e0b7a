"""Find where a half-precision graph starts to drift: the first value, in the order of computation, that is off."""

from __future__ import annotations

from collections.abc import Mapping

from onnx import ModelProto, TensorProto
from onnx.helper import make_tensor_value_info

from compressor.exporters.half_arithmetic import JUDGE, rounding_graph
from compressor.exporters.interpreter import Interpreter
from compressor.exporters.layers import layer_of
from compressor.exporters.parity import compare
from compressor.exporters.typed_graph import FLOAT16, Half, float_values, normalised
from compressor.runtimes.runtime import Array

__all__ = ["first_drift"]

_AT_ONCE = 64


def first_drift(
    plain: ModelProto, typed: ModelProto, record: Mapping[str, Array], tolerance: float, kind: Half = FLOAT16
) -> str:
    """Compare all values of a graph in float32 and in half arithmetic.

    Args:
        plain: The exported float32 graph.
        typed: Its strongly typed form.
        record: One input.
        tolerance: Largest difference of a value over its largest absolute value.
        kind: The 16-bit type.

    Returns:
        "value X of layer Y (Operator)" for the first value that is further off, or "no value alone" where none is.
    """
    base = normalised(plain)
    floats = float_values(base.graph)
    judged = rounding_graph(typed, kind)
    present = {name for node in judged.graph.node for name in node.output}
    places = [(name, node) for node in base.graph.node for name in node.output if name in floats & present]
    names = [name for name, _ in places]
    exact, half = (Interpreter(_with_outputs(model, names)) for model in (base, judged))
    for start in range(0, len(places), _AT_ONCE):
        part = names[start : start + _AT_ONCE]
        expected, given = exact(record, part), half(record, part)
        for name, node in places[start : start + _AT_ONCE]:
            found = compare({name: expected[name]}, given, tolerance, JUDGE)
            if not found.relative <= tolerance:
                layer = layer_of(node) or "the top"
                return f"value {name!r} of layer {layer} ({node.op_type}), off by {found.relative:.1e} of its scale"
    return "no value alone"


def _with_outputs(model: ModelProto, names: list[str]) -> ModelProto:
    result = ModelProto()
    result.CopyFrom(model)
    known = {value.name for value in result.graph.output}
    for name in names:
        if name not in known:
            result.graph.output.append(make_tensor_value_info(name, TensorProto.FLOAT, None))
    return result
