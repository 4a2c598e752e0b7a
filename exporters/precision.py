"""Half precision with float32 islands: which operations of a graph must stay in float32, found by measuring.

The search starts from operations that are known to suffer in halves and from those that the method names, adds what
overflows on recorded inputs, and then moves into float32 whatever dominates the half error, until the outputs hold
their tolerance in real half arithmetic.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, TensorProto

from compressor.errors import RequestError
from compressor.exporters.graph_edges import makers_of, readers_of
from compressor.exporters.half_arithmetic import JUDGE, rounding_graph
from compressor.exporters.interpreter import Interpreter
from compressor.exporters.island_search import find_inaccurate, measure_peaks
from compressor.exporters.layers import layer_of
from compressor.exporters.model_file import values_of
from compressor.exporters.parity import TOLERANCES, compare
from compressor.exporters.typed_graph import FLOAT16, MOVES, Half, float_inputs, float_values, normalised, type_graph
from compressor.runtimes.manifest import Island
from compressor.runtimes.runtime import Array

__all__ = ["KINDS", "HalfGraph", "convert_to_half", "half_error"]

MARGIN = 4.0
"""Measured values must stay this factor below the largest half: other inputs may go higher than the recorded ones."""
SAFETY = 0.7
"""The search aims at this part of the tolerance."""

KINDS = frozenset({
    # norms, and the reductions and roots that decomposed norms are made of
    "LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization", "LpNormalization",
    "BatchNormalization",
    "MeanVarianceNormalization", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp",
    "ReduceProd", "Sqrt", "Reciprocal", "Pow",
    # exponentials and angles
    "Softmax", "LogSoftmax", "Exp", "Log", "Softplus", "Tan", "Sinh", "Cosh",
    # counting and running sums
    "Range", "CumSum", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike",
    # no halves by definition, or none worth having
    "NonMaxSuppression", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "DFT", "STFT", "LSTM",
    "GRU", "RNN", "Det",
})  # fmt: skip
"""Operators that start in float32."""

_FEW = 16
"""Values of a constant that may be an epsilon."""
_SCALES = frozenset({"Sqrt", "Reciprocal", "ReduceMean", "ReduceSum", "ReduceL2", "Div"})
_ELEMENTWISE = frozenset({
    "Add", "Sub", "Mul", "Div", "Neg", "Abs", "Sigmoid", "Tanh", "Relu", "Clip", "Min", "Max", "Where",
})  # fmt: skip


@dataclass(frozen=True)
class HalfGraph:
    """A strongly typed graph and what stayed in float32.

    Attributes:
        model: The typed graph.
        islands: What stayed, by layer and reason.
        kept: The same by node, with the reason.
    """

    model: ModelProto
    islands: tuple[Island, ...]
    kept: Mapping[str, str]


def convert_to_half(
    model: ModelProto,
    records: Sequence[Mapping[str, Array]],
    keep_fp32: Collection[str] = (),
    tolerance: float | None = None,
    kind: Half = FLOAT16,
) -> HalfGraph:
    """Convert a float32 graph to strongly typed halves with float32 islands.

    Args:
        model: The exported float32 graph.
        records: Inputs that the graph really gets, to measure on.
        keep_fp32: Module paths that must stay in float32.
        tolerance: Largest difference of an output from the float32 graph's, over its largest absolute value; the
            precision's own by default.
        kind: The 16-bit type.

    Raises:
        RequestError: A path of ``keep_fp32`` names no layer of the graph.
        ArtifactError: The typed graph is not valid.
    """
    tolerance = TOLERANCES[kind.precision] if tolerance is None else tolerance
    plain = normalised(model)
    reasons = _seeds(plain, keep_fp32, kind)
    peaks = measure_peaks(plain, records)
    _add_overflows(plain, peaks, reasons, kind)
    _spread(plain, reasons)
    typed = type_graph(plain, reasons, kind)
    aim = SAFETY * tolerance
    while half_error(plain, typed, records, kind) > tolerance:
        found = find_inaccurate(plain, reasons, records, aim, kind)
        reasons.update(dict.fromkeys(found, "accuracy"))
        _spread(plain, reasons)
        typed = type_graph(plain, reasons, kind)
        if not found:
            break
        aim *= SAFETY  # the search measures on some of the records only
    return HalfGraph(typed, _islands(plain, reasons, peaks), reasons)


def half_error(
    plain: ModelProto, typed: ModelProto, records: Sequence[Mapping[str, Array]], kind: Half = FLOAT16
) -> float:
    """Largest relative difference between a graph in float32 and its typed form in half arithmetic."""
    run, judge = Interpreter(plain), Interpreter(rounding_graph(typed, kind))
    errors = [compare(run(record), judge(record), 0.0, JUDGE).relative for record in records]
    return max(errors, default=0.0)


def _seeds(model: ModelProto, keep_fp32: Collection[str], kind: Half) -> dict[str, str]:
    """Nodes that start in float32, with the reason: by kind, asked for, or a constant that no half can hold."""
    floats = float_values(model.graph)
    fragile = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and _breaks_in_half(t, kind)}
    angles = _angles(model)
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
        if node.name in angles:
            reasons[node.name] = "angle"
        elif node.op_type in KINDS:
            reasons[node.name] = "kind"
        elif any(name in fragile for name in float_inputs(node, floats)):
            reasons[node.name] = "constant"
    missing = [path for path, found in wanted.items() if not found]
    if missing:
        raise RequestError(f"keep_fp32 names {missing[0]!r}, but no operation of the graph stems from such a module")
    return reasons


def _angles(model: ModelProto) -> set[str]:
    """Sines, cosines and what computes their argument: an angle of hundreds of turns has no digits left in a half."""
    makers = makers_of(model.graph)
    waiting = [node for node in model.graph.node if node.op_type in ("Sin", "Cos")]
    found = {node.name for node in waiting}
    while waiting:
        for name in waiting.pop().input:
            maker = makers.get(name)
            if maker is not None and maker.name not in found and maker.op_type in _ELEMENTWISE | MOVES | {"Cast"}:
                found.add(maker.name)
                waiting.append(maker)
    return found


def _add_overflows(model: ModelProto, peaks: Mapping[str, float], reasons: dict[str, str], kind: Half) -> None:
    """Keep in float32 what makes or reads a value that came near the largest half."""
    for node in model.graph.node:
        touched = max((peaks.get(name, 0.0) for name in (*node.input, *node.output)), default=0.0)
        if touched > kind.largest / MARGIN:
            reasons.setdefault(node.name, "overflow")


def _spread(model: ModelProto, reasons: dict[str, str]) -> None:
    """Let an island swallow what lies inside it, so that no value goes to half and straight back.

    Moves between float32 operations stay float32; so do elementwise operations between islands, and the product of a
    value with the factor of its norm, where the factor is what loses accuracy.
    """
    floats = float_values(model.graph)
    constants = {tensor.name for tensor in model.graph.initializer}
    makers = makers_of(model.graph)
    users = readers_of(model.graph)
    for node in reversed(model.graph.node):
        consumers = [user for name in node.output for user in users.get(name, [])]
        moves = node.op_type in MOVES and any(name in floats for name in node.output)
        if moves and consumers and all(user.name in reasons for user in consumers):
            reasons.setdefault(node.name, reasons[consumers[0].name])
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


def _breaks_in_half(tensor: TensorProto, kind: Half) -> bool:
    """True for a constant that overflows in half, or a small one (an epsilon) of which a value vanishes."""
    values = values_of(tensor)
    if values.size > _FEW:
        largest = max(float(values.max()), -float(values.min()))
        if np.isfinite(largest):
            return largest > kind.largest
    array = np.abs(values)
    finite = array[np.isfinite(array)]
    if finite.size == 0:
        return False
    if float(finite.max()) > kind.largest:
        return True
    return bool(array.size <= _FEW and ((finite > 0) & (finite < kind.smallest)).any())


def _islands(model: ModelProto, reasons: Mapping[str, str], peaks: Mapping[str, float]) -> tuple[Island, ...]:
    """The float32 operations by layer and reason, in the order of the graph."""
    operations: dict[tuple[str, str], list[str]] = {}
    highest: dict[tuple[str, str], float] = {}
    for node in model.graph.node:
        if node.name not in reasons:
            continue
        place = (layer_of(node), reasons[node.name])
        known = operations.setdefault(place, [])
        if node.op_type not in known:
            known.append(node.op_type)
        found = max((peaks.get(name, 0.0) for name in (*node.input, *node.output)), default=0.0)
        highest[place] = max(highest.get(place, 0.0), found)
    islands = []
    for (layer, reason), names in operations.items():
        peak = highest[layer, reason] if reason == "overflow" and np.isfinite(highest[layer, reason]) else None
        islands.append(Island(layer=layer, operations=tuple(names), reason=reason, peak=peak))  # type: ignore[arg-type]
    return tuple(islands)
