"""Attention as OpenVINO sees it: the logits, the softmax and the product with the values are one operation.

It takes its precision from the last of the three, so a mark on the logits alone ("precise": stay in float32) is lost,
and logits that overflow halves become NaN on devices with half arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from onnx import GraphProto, NodeProto

from compressor.exporters.graph_edges import makers_of, readers_of
from compressor.exporters.typed_graph import MOVES

__all__ = ["with_whole_attention"]

_BETWEEN = MOVES | {"Add", "Sub", "Mul", "Div", "Where", "Cast", "Clip"}
"""What may stand between the products and the softmax: scales, masks, changes of shape."""


def with_whole_attention(graph: GraphProto, kept: Collection[str]) -> list[str]:
    """Names of the nodes that must be marked so that those of ``kept`` stay in float32."""
    makers, readers = makers_of(graph), readers_of(graph)
    marked = dict.fromkeys(kept)
    for softmax in (node for node in graph.node if node.op_type == "Softmax"):
        before = list(_path(softmax, lambda node: [makers[name] for name in node.input if name in makers]))
        if not any(node.name in marked for node in (softmax, *before)):
            continue
        after = _path(softmax, lambda node: [user for name in node.output for user in readers.get(name, [])])
        marked |= dict.fromkeys(node.name for node in (softmax, *before, *after))
    return list(marked)


def _path(start: NodeProto, following: Callable[[NodeProto], list[NodeProto]]) -> Iterator[NodeProto]:
    """The nodes from a softmax to the next products, those included."""
    waiting, seen = following(start), set[str]()
    while waiting:
        node = waiting.pop()
        if node.name in seen or node.op_type not in _BETWEEN | {"MatMul", "Gemm"}:
            continue
        seen.add(node.name)
        yield node
        if node.op_type in _BETWEEN:
            waiting += following(node)
