"""Measure what halves would do to a float32 graph: how large its values become, and which operations lose accuracy.

Both run the float32 graph itself. For accuracy every value goes through a switch that rounds it to a half or not, so
that any set of operations can be tried in halves without building the graph anew.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto
from onnx.helper import make_node, make_tensor_value_info

from compressor.exporters.graph_edges import makers_of, readers_of
from compressor.exporters.interpreter import Interpreter
from compressor.exporters.parity import compare
from compressor.exporters.typed_graph import FLOAT16, MOVES, Half, float_inputs, float_values
from compressor.runtimes.runtime import Array

__all__ = ["HalfSwitches", "find_inaccurate", "measure_peaks"]

_RECORDS = 2
_FIRST_PARTS, _PARTS, _ROUNDS = 16, 4, 6


def measure_peaks(model: ModelProto, records: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    """Largest absolute value of every float result of a `normalised` graph, over all records."""
    floats = float_values(model.graph)
    probed = ModelProto()
    probed.CopyFrom(model)
    names = [name for node in model.graph.node for name in node.output if name in floats]
    names += [value.name for value in model.graph.input if value.name in floats]
    for name in names:
        probe = f"{name}__peak"
        probed.graph.node.append(make_node("Abs", [name], [f"{name}__absolute"]))
        probed.graph.node.append(make_node("ReduceMax", [f"{name}__absolute"], [probe], keepdims=0))
        probed.graph.output.append(make_tensor_value_info(probe, TensorProto.FLOAT, []))
    peaks = dict.fromkeys(names, 0.0)
    if not records:
        return peaks
    run, probes = Interpreter(probed), [f"{name}__peak" for name in names]
    for record in records:
        values = run(record, probes)
        for name in names:
            # a value that is not a number has overflowed already
            peaks[name] = max(peaks[name], float(np.nan_to_num(values[f"{name}__peak"], nan=np.inf, posinf=np.inf)))
    return peaks


def find_inaccurate(
    model: ModelProto,
    keep: Collection[str],
    records: Sequence[Mapping[str, Array]],
    target: float,
    kind: Half = FLOAT16,
) -> list[str]:
    """Which further operations must stay in float32 for the outputs to hold ``target``.

    Each part of the graph is tried in halves alone; the part with the largest error is cut into smaller ones, down to
    single operations, and the worst of those go to float32 until the rest, taken as independent errors, holds.

    Args:
        model: A `normalised` graph.
        keep: Names of the nodes that are in float32 already.
        records: Inputs to measure on; the two hardest are used.
        target: Largest difference of an output, over its largest absolute value.
        kind: The 16-bit type.

    Returns:
        Names of nodes; all others together were measured to hold the target.
    """
    candidates = [node.name for node in model.graph.node if node.name not in keep and node.op_type not in MOVES]
    switches = HalfSwitches(model, records, kind)
    switches.choose_hardest(candidates, _RECORDS)
    smallest = max(1, len(candidates) // 256)
    waiting = [(-switches.error(part), part) for part in _cut(candidates, _FIRST_PARTS)]
    heapq.heapify(waiting)
    moved: list[str] = []
    aim = target
    for _ in range(_ROUNDS):
        while waiting and math.sqrt(sum(error**2 for error, _ in waiting)) > aim:
            _, part = heapq.heappop(waiting)
            if len(part) <= smallest:
                moved += part
                continue
            for piece in _cut(part, _PARTS):
                heapq.heappush(waiting, (-switches.error(piece), piece))
        if switches.error([name for _, part in waiting for name in part]) <= target:
            return moved
        aim *= 0.6  # the errors add up worse than independent ones
    return candidates


class HalfSwitches:
    """A float32 graph in which any set of operations can be tried in halves.

    Args:
        model: A `normalised` graph.
        records: Inputs to measure on.
        kind: The 16-bit type.
    """

    def __init__(self, model: ModelProto, records: Sequence[Mapping[str, Array]], kind: Half = FLOAT16) -> None:
        self._model, self._kind = model, kind
        self._floats = float_values(model.graph)
        self._makers = makers_of(model.graph)
        self._users = readers_of(model.graph)
        self._values = self._real_values()
        self._run = Interpreter(self._switched())
        self._off = {f"{name}__switch": np.array(False) for name in self._values}
        self._cases = [(record, self._run({**record, **self._off})) for record in records]

    def error(self, half: Iterable[str]) -> float:
        """Largest relative difference of an output when the named operations run in halves; 1e9 for an overflow."""
        feed = self._feed(frozenset(half))
        return max((self._difference(record, exact, feed) for record, exact in self._cases), default=0.0)

    def choose_hardest(self, half: Iterable[str], count: int) -> None:
        """Go on with the records that suffer most when the named operations run in halves."""
        feed = self._feed(frozenset(half))
        order = sorted(self._cases, key=lambda case: -self._difference(case[0], case[1], feed))
        self._cases = order[:count]

    def _difference(self, record: Mapping[str, Array], exact: Mapping[str, Array], feed: Mapping[str, Array]) -> float:
        return min(compare(exact, self._run({**record, **feed}), 0.0, "half switches").relative, 1e9)

    def _feed(self, half: frozenset[str]) -> dict[str, Array]:
        feed = dict(self._off)
        for name in self._values:
            maker = self._makers.get(name)
            made = maker is not None and maker.name in half
            if made or any(user.name in half for user in self._readers(name)):
                feed[f"{name}__switch"] = np.array(True)
        return feed

    def _readers(self, name: str) -> list[NodeProto]:
        """The operations that compute with a value, seen through those that only move it."""
        found, waiting, seen = [], [name], {name}
        while waiting:
            for user in self._users.get(waiting.pop(), []):
                if user.op_type not in MOVES:
                    found.append(user)
                    continue
                for output in user.output:
                    if output not in seen:
                        seen.add(output)
                        waiting.append(output)
        return found

    def _real_values(self) -> list[str]:
        """Inputs, constants and results of real operations; moved values are rounded where they come from."""
        graph = self._model.graph
        names = [value.name for value in graph.input] + [tensor.name for tensor in graph.initializer]
        names += [name for node in graph.node if node.op_type not in MOVES for name in node.output]
        return [name for name in names if name in self._floats]

    def _switched(self) -> ModelProto:
        result = ModelProto()
        result.CopyFrom(self._model)
        graph = result.graph
        del graph.node[:], graph.value_info[:]
        switched = set(self._values)
        roots = {value.name for value in self._model.graph.input} | {t.name for t in self._model.graph.initializer}
        for name in self._values:
            graph.input.append(make_tensor_value_info(f"{name}__switch", TensorProto.BOOL, []))
            if name in roots:
                graph.node.extend(_switch(name, name, f"{name}__chosen", self._kind))
        for source in self._model.graph.node:
            node = NodeProto.FromString(source.SerializeToString())
            typed = set(float_inputs(source, self._floats))
            for place, name in enumerate(node.input):
                if name in switched and name in roots and name in typed:
                    node.input[place] = f"{name}__chosen"
            graph.node.append(node)
            for place, name in enumerate(node.output):
                if name in switched:
                    node.output[place] = f"{name}__exact"
                    graph.node[-1].output[place] = f"{name}__exact"
            for name in source.output:
                if name in switched:
                    graph.node.extend(_switch(name, f"{name}__exact", name, self._kind))
        return result


def _switch(name: str, source: str, result: str, kind: Half) -> list[NodeProto]:
    return [
        make_node("Cast", [source], [f"{name}__half"], to=kind.onnx),
        make_node("Cast", [f"{name}__half"], [f"{name}__rounded"], to=TensorProto.FLOAT),
        make_node("Where", [f"{name}__switch", f"{name}__rounded", source], [result]),
    ]


def _cut(names: Sequence[str], parts: int) -> list[list[str]]:
    size = max(1, math.ceil(len(names) / parts))
    return [list(names[start : start + size]) for start in range(0, len(names), size)]
