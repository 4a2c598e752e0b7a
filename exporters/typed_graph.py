"""Write types into an ONNX graph: float16 or bfloat16 everywhere but in the operations that must stay in float32.

The result is strongly typed: each value has the type that it is computed in, casts stand at the borders of the float32
islands alone, one a value and direction. Inputs and outputs of the graph stay float32, so a driver need not know.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import make_attribute, make_node

from compressor.errors import ArtifactError, first_line
from compressor.exporters.model_file import check_model, infer_types, rounded
from compressor.runtimes.runtime import Array

__all__ = [
    "BFLOAT16", "FLOAT16", "HALVES", "MOVES", "Half", "float_inputs", "float_values", "normalised", "type_graph",
]  # fmt: skip


@dataclass(frozen=True)
class Half:
    """A 16-bit type.

    Attributes:
        precision: "fp16" or "bf16".
        title: As numpy and the manifest call it.
        onnx: ONNX's number of it.
        largest: Largest finite value.
        smallest: Smallest positive value with all its digits.
    """

    precision: str
    title: str
    onnx: int
    largest: float
    smallest: float

    def tensor(self, array: Array, name: str = "") -> TensorProto:
        """A float32 array as a tensor of this type, rounded to the nearest, to even between two."""
        plain = numpy_helper.from_array(np.ascontiguousarray(array, np.float32).reshape(array.shape))
        return rounded(plain, self.onnx, name)

    def array(self, tensor: TensorProto) -> Array:
        """A tensor of this type as float32."""
        if self.onnx == TensorProto.FLOAT16:
            return numpy_helper.to_array(tensor).astype(np.float32)
        bits = np.frombuffer(tensor.raw_data, np.uint16).astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32).reshape(tuple(tensor.dims))


FLOAT16 = Half("fp16", "float16", TensorProto.FLOAT16, 65504.0, 2.0**-14)
BFLOAT16 = Half("bf16", "bfloat16", TensorProto.BFLOAT16, 3.3895314e38, 2.0**-126)
HALVES = {"fp16": FLOAT16, "bf16": BFLOAT16}
"""The 16-bit types by precision."""

MOVES = frozenset({
    "Reshape", "Transpose", "Slice", "Concat", "Split", "Squeeze", "Unsqueeze", "Expand", "Gather",
    "GatherElements", "GatherND", "Identity", "Flatten", "Tile", "DepthToSpace", "SpaceToDepth", "Pad", "Trilu",
})  # fmt: skip
"""Operations that move values and compute nothing: as exact in halves as in float32."""

_BFLOAT16_OPSET = 22
"""First opset in which convolutions and pools take bfloat16."""
_ANY_INPUT = frozenset({"Cast", "Shape", "Size", "CastLike"})
"""Operations that take floats of any type, so that no cast is needed before them."""
_FIXED_FLOAT_INPUTS = {"Resize": (1, 2)}
"""Inputs that are float32 by the operator's definition."""


def normalised(model: ModelProto) -> ModelProto:
    """A copy in the form that this module works on: no constant nodes, unique node names, all types inferred."""
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    kept, names = [], set()
    for number, node in enumerate(graph.node):
        constant = _constant(node)
        if constant is not None:
            constant.name = node.output[0]
            graph.initializer.append(constant)
            continue
        if not node.name or node.name in names:
            node.name = f"node_{number}_{node.op_type}"
        names.add(node.name)
        kept.append(node)
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(nodes)
    infer_types(result)
    return result


def float_values(graph: GraphProto) -> set[str]:
    """Names of all float32 values: inputs, constants, results."""
    names = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            names.add(value.name)
    return names


def float_inputs(node: NodeProto, floats: Collection[str]) -> list[str]:
    """The float inputs of a node whose type follows the node's own."""
    fixed = _FIXED_FLOAT_INPUTS.get(node.op_type, ())
    return [name for place, name in enumerate(node.input) if name in floats and place not in fixed]


def type_graph(model: ModelProto, keep: Collection[str], kind: Half = FLOAT16) -> ModelProto:
    """The strongly typed half-precision form of a float32 graph.

    Args:
        model: A `normalised` graph.
        keep: Names of the nodes that stay in float32.
        kind: The 16-bit type.

    Raises:
        ArtifactError: A value's type is unknown, or the typed graph is not valid.
    """
    typed = _Typing(model, frozenset(keep), kind).run()
    if kind is BFLOAT16:
        _set_opset(typed, _BFLOAT16_OPSET)
    try:
        check_model(typed)
    except Exception as error:  # checker and inference raise their own types
        raise ArtifactError(f"the half-precision graph is not valid: {first_line(error)}") from error
    return typed


class _Typing:
    """One pass over the nodes in order; casts are put in before their first use."""

    def __init__(self, model: ModelProto, keep: frozenset[str], kind: Half) -> None:
        self.model, self.keep, self.kind = model, keep, kind
        self.graph = model.graph
        self.floats = float_values(self.graph)
        self.constants = {t.name: t for t in self.graph.initializer if t.data_type == TensorProto.FLOAT}
        self.captured = set(_captured(self.graph))
        self.outputs = {value.name for value in self.graph.output}
        self.half: set[str] = set()
        self.casts: dict[tuple[str, bool], str] = {}
        self.made: list[TensorProto] = []
        self.nodes: list[NodeProto] = []

    def run(self) -> ModelProto:
        for node in self.graph.node:
            self._add(node)
        result = ModelProto()
        result.CopyFrom(self.model)
        graph = result.graph
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input} | self.captured | self.outputs
        kept = [TensorProto.FromString(t.SerializeToString()) for t in graph.initializer if t.name in used]
        del graph.initializer[:]
        graph.initializer.extend([*kept, *self.made])
        return result

    def _add(self, source: NodeProto) -> None:
        node = NodeProto.FromString(source.SerializeToString())
        in_half = node.name not in self.keep and not _has_subgraph(node)
        fixed = _FIXED_FLOAT_INPUTS.get(node.op_type, ())
        if node.op_type not in _ANY_INPUT:
            for place, name in enumerate(node.input):
                if name in self.floats:
                    node.input[place] = self._as(name, in_half and place not in fixed)
        else:
            for place, name in enumerate(node.input):
                node.input[place] = self.casts.get((name, True), name) if name in self.half else name
        after = []
        if in_half and any(name in self.floats for name in node.output):
            _make_half(node, self.kind)
            for place, name in enumerate(node.output):
                if name not in self.floats:
                    continue
                if name in self.outputs or name in self.captured:
                    inner = f"{name}_half"
                    node.output[place] = inner
                    self.casts[name, True] = inner
                    after.append(make_node("Cast", [inner], [name], f"{name}_from_half", to=TensorProto.FLOAT))
                else:
                    self.half.add(name)
        self.nodes += [node, *after]

    def _as(self, name: str, half: bool) -> str:
        """The name of a value in the type wanted; puts in a cast, or a converted constant, where there is none yet."""
        if (name in self.half) == half:
            return name
        known = self.casts.get((name, half))
        if known is not None:
            return known
        made = f"{name}_half" if half else f"{name}_float"
        self.casts[name, half] = made
        if name in self.constants:
            self.made.append(rounded(self.constants[name], self.kind.onnx, made))
        else:
            kind = self.kind.onnx if half else TensorProto.FLOAT
            self.nodes.append(make_node("Cast", [name], [made], f"{made}_cast", to=kind))
        return made


def _set_opset(model: ModelProto, version: int) -> None:
    """Read the graph by a later opset, which only adds types to the operators that are in use."""
    for item in model.opset_import:
        if item.domain in ("", "ai.onnx") and item.version < version:
            if any(node.op_type == "GroupNormalization" for node in model.graph.node):
                raise ArtifactError("GroupNormalization means something else in the opset that has bfloat16: use fp16")
            item.version = version


def _make_half(node: NodeProto, kind: Half) -> None:
    """Set the attributes that say the type of a node's result."""
    if node.op_type == "ConstantOfShape" and not node.attribute:
        node.attribute.append(make_attribute("value", kind.tensor(np.zeros(1, np.float32))))
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT:
            attribute.i = kind.onnx
        elif attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(kind.tensor(numpy_helper.to_array(attribute.t)))


def _constant(node: NodeProto) -> TensorProto | None:
    if node.op_type != "Constant":
        return None
    attribute = node.attribute[0]
    if attribute.name == "value":
        return TensorProto.FromString(attribute.t.SerializeToString())
    values: dict[str, Array] = {
        "value_float": np.array(attribute.f, np.float32),
        "value_int": np.array(attribute.i, np.int64),
        "value_floats": np.array(attribute.floats, np.float32),
        "value_ints": np.array(attribute.ints, np.int64),
    }
    found = values.get(attribute.name)
    return None if found is None else numpy_helper.from_array(found)


def _has_subgraph(node: NodeProto) -> bool:
    return any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)


def _captured(graph: GraphProto) -> Iterator[str]:
    """Names of outer values that the bodies of loops and branches read; they keep their name and type."""
    for node in graph.node:
        for attribute in node.attribute:
            for body in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                for inner in body.node:
                    yield from inner.input
                yield from _captured(body)
                yield from (value.name for value in body.output)
