"""Judge a half-precision graph (float16 or bfloat16) on a CPU in real half arithmetic.

Engines that have no half kernels on the CPU compute a half-precision graph in float32 and say nothing, so they cannot
judge it. Here every half value of the typed graph is rounded to a half after the operation that makes it; inside an
operation sums run in float32, as in a tensor core.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import make_node

from compressor.exporters.model_file import is_stored, unrounded
from compressor.exporters.onnx_graph import OPSET
from compressor.exporters.typed_graph import FLOAT16, MOVES, Half

__all__ = ["JUDGE", "judge_of", "rounding_graph"]

JUDGE = "half arithmetic"
"""Beginning of the judge's name in manifests."""


def judge_of(kind: Half) -> str:
    """The judge's name."""
    return f"{JUDGE} (every operation rounded to {kind.title})"


def rounding_graph(typed: ModelProto, kind: Half = FLOAT16) -> ModelProto:
    """A float32 graph that computes what the typed graph computes where halves are real.

    Args:
        typed: A graph made by `type_graph`.
        kind: Its 16-bit type.

    Returns:
        The same graph in float32, with a rounding to half and back after every half operation.
    """
    result = ModelProto()
    result.CopyFrom(typed)
    for item in result.opset_import:
        if item.domain in ("", "ai.onnx"):
            item.version = min(item.version, OPSET)  # in float32 it is the graph that was exported
    graph = result.graph
    half = {tensor.name for tensor in graph.initializer if tensor.data_type == kind.onnx}
    nodes: list[NodeProto] = []
    for tensor in graph.initializer:
        if tensor.name in half:
            nodes += _widened(tensor, kind)
    for source in typed.graph.node:
        nodes += _rounded(source, half, kind)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return result


def _widened(tensor: TensorProto, kind: Half) -> list[NodeProto]:
    """Make a half constant float32; one that lies in a file is read there at every run, and nodes do it."""
    name = tensor.name
    if not is_stored(tensor):
        tensor.CopyFrom(numpy_helper.from_array(kind.array(tensor), name))
        return []
    exact = unrounded(tensor, f"{name}__exact")
    if exact is None:
        tensor.name = f"{name}__half"
        return [make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT)]
    tensor.CopyFrom(exact)
    return _rounding(name, kind)


def _rounding(name: str, kind: Half) -> list[NodeProto]:
    """Nodes that make a value of the one called ``NAME__exact``."""
    return [
        make_node("Cast", [f"{name}__exact"], [f"{name}__rounded"], to=kind.onnx),
        make_node("Cast", [f"{name}__rounded"], [name], to=TensorProto.FLOAT),
    ]


def _rounded(source: NodeProto, half: set[str], kind: Half) -> list[NodeProto]:
    """A node and the roundings of its half outputs; ``half`` gathers the names of half values."""
    node = NodeProto.FromString(source.SerializeToString())
    makes_half = False
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i == kind.onnx:
            attribute.i, makes_half = TensorProto.FLOAT, True
        elif attribute.name == "value" and attribute.t.data_type == kind.onnx:
            attribute.t.CopyFrom(numpy_helper.from_array(kind.array(attribute.t)))
            makes_half = True
    if node.op_type not in ("Cast", "Shape", "Size"):
        makes_half = makes_half or any(name in half for name in node.input)
    if not makes_half:
        return [node]
    if node.op_type in MOVES:
        half.update(node.output)
        return [node]
    nodes = [node]
    for place, name in enumerate(node.output):
        if not name or _is_index(node, place):
            continue
        half.add(name)
        node.output[place] = f"{name}__exact"
        nodes += _rounding(name, kind)
    return nodes


_BOOLEAN = frozenset({
    "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "IsNaN", "IsInf", "And", "Or", "Not", "Xor",
})  # fmt: skip
_INTEGER = frozenset({"ArgMax", "ArgMin", "NonZero", "NonMaxSuppression", "QuantizeLinear"})


def _is_index(node: NodeProto, place: int) -> bool:
    """True where an output is no float: comparisons, indices."""
    return node.op_type in _BOOLEAN | _INTEGER or (node.op_type in ("TopK", "MaxPool", "Unique") and place > 0)
