"""Half precision with float32 islands: which operations of a graph must stay in float32, found by measuring.

The search starts from operations that are known to suffer in halves and from those that the method names, adds what
overflows on recorded inputs, and then moves into float32 whatever dominates the half error, until the outputs hold
their tolerance in real half arithmetic.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from compressor.errors import RequestError
from compressor.exporters.onnx_graph import LAYER_KEY
from compressor.exporters.typed_graph import HALF_MAX, MOVES, float_inputs, float_values, normalised, type_graph
from compressor.runtimes.manifest import Island
from compressor.runtimes.runtime import Array

__all__ = ["KINDS", "HalfGraph", "convert_to_half", "layer_of"]

KINDS = frozenset({
    # norms, and the reductions and roots that decomposed norms are made of
    "LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization", "LpNormalization",
    "BatchNormalization",
    "MeanVarianceNormalization", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp",
    "ReduceProd", "Sqrt", "Reciprocal", "Pow",
    # exponentials and angles
    "Softmax", "LogSoftmax", "Exp", "Log", "Softplus", "Sin", "Cos", "Tan", "Sinh", "Cosh",
    # counting and running sums
    "Range", "CumSum", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike",
    # no halves by definition, or none worth having
    "NonMaxSuppression", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "DFT", "STFT", "LSTM",
    "GRU", "RNN", "Det",
})  # fmt: skip
"""Operators that start in float32."""

_SCALES = frozenset({"Sqrt", "Reciprocal", "ReduceMean", "ReduceSum", "ReduceL2", "Div"})
_ELEMENTWISE = frozenset({
    "Add", "Sub", "Mul", "Div", "Neg", "Abs", "Sigmoid", "Tanh", "Relu", "Clip", "Min", "Max", "Where",
})  # fmt: skip


@dataclass(frozen=True)
class HalfGraph:
    """A strongly typed graph and what stayed in float32."""

    model: ModelProto
    islands: tuple[Island, ...]


def convert_to_half(
    model: ModelProto, records: Sequence[Mapping[str, Array]], keep_fp32: Collection[str] = ()
) -> HalfGraph:
    """Convert a float32 graph to strongly typed halves with float32 islands.

    Args:
        model: The exported float32 graph.
        records: Inputs that the graph really gets, to measure on.
        keep_fp32: Module paths that must stay in float32.

    Raises:
        RequestError: A path of ``keep_fp32`` names no layer of the graph.
        ArtifactError: The typed graph is not valid.
    """
    plain = normalised(model)
    reasons = _seeds(plain, keep_fp32)
    _spread(plain, reasons)
    return HalfGraph(type_graph(plain, reasons), _islands(plain, reasons))


def layer_of(node: NodeProto) -> str:
    """Path of the module that a node stems from; empty at the top or where it is unknown."""
    for item in node.metadata_props:
        if item.key == LAYER_KEY:
            scopes = ast.literal_eval(item.value)
            return str(scopes[-2]) if len(scopes) > 1 else ""
    return ""


def _seeds(model: ModelProto, keep_fp32: Collection[str]) -> dict[str, str]:
    """Nodes that start in float32, with the reason: by kind, asked for, or a constant that no half can hold."""
    floats = float_values(model.graph)
    fragile = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and _breaks_in_half(t)}
    wanted = {path: False for path in keep_fp32}
    reasons: dict[str, str] = {}
    for node in model.graph.node:
        layer = layer_of(node)
        for path in wanted:
            if layer == path or layer.startswith(f"{path}.") or path == "":
                wanted[path] = True
                reasons[node.name] = "asked"
        if node.name in reasons:
            continue
        if node.op_type in KINDS:
            reasons[node.name] = "kind"
        elif any(name in fragile for name in float_inputs(node, floats)):
            reasons[node.name] = "constant"
    missing = [path for path, found in wanted.items() if not found]
    if missing:
        raise RequestError(f"keep_fp32 names {missing[0]!r}, but no operation of the graph stems from such a module")
    return reasons


def _spread(model: ModelProto, reasons: dict[str, str]) -> None:
    """Let an island swallow what lies inside it, so that no value goes to half and straight back.

    Moves that only carry float32 values stay float32; so do elementwise operations between islands, and the product of
    a value with the factor of its norm, where the factor is what loses accuracy.
    """
    floats = float_values(model.graph)
    constants = {tensor.name for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    users: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for node in model.graph.node:
        sources = [name for name in float_inputs(node, floats) if name not in constants]
        if node.name in reasons or not sources:
            continue
        wide = [name for name in sources if name in makers and makers[name].name in reasons]
        consumers = [user for name in node.output for user in users.get(name, [])]
        inside = bool(consumers) and all(user.name in reasons for user in consumers)
        factor = node.op_type in ("Mul", "Div") and any(makers[name].op_type in _SCALES for name in wide)
        carried = node.op_type in MOVES and len(wide) == len(sources)
        if carried or factor or (node.op_type in _ELEMENTWISE and len(wide) == len(sources) and inside):
            reasons[node.name] = reasons[makers[wide[0]].name]


def _breaks_in_half(tensor: TensorProto) -> bool:
    """True for a constant that overflows in half, or a small one (an epsilon) of which a value vanishes."""
    array = np.abs(numpy_helper.to_array(tensor))
    finite = array[np.isfinite(array)]
    if finite.size == 0:
        return False
    if float(finite.max()) > HALF_MAX:
        return True
    return bool(array.size <= 16 and ((finite > 0) & (finite < 6.2e-5)).any())


def _islands(model: ModelProto, reasons: Mapping[str, str]) -> tuple[Island, ...]:
    """The float32 operations by layer and reason, in the order of the graph."""
    groups: dict[tuple[str, str], list[str]] = {}
    for node in model.graph.node:
        if node.name in reasons:
            operations = groups.setdefault((layer_of(node), reasons[node.name]), [])
            if node.op_type not in operations:
                operations.append(node.op_type)
    return tuple(
        Island(layer=layer, operations=tuple(operations), reason=reason)  # type: ignore[arg-type]
        for (layer, reason), operations in groups.items()
    )
