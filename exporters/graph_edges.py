"""Who makes and who reads the values of an ONNX graph."""

from __future__ import annotations

from onnx import GraphProto, NodeProto

__all__ = ["makers_of", "readers_of"]


def makers_of(graph: GraphProto) -> dict[str, NodeProto]:
    """The node of each value that is computed."""
    return {name: node for node in graph.node for name in node.output}


def readers_of(graph: GraphProto) -> dict[str, list[NodeProto]]:
    """The nodes that read each value, in the graph's order; one that reads it twice stands there twice."""
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers
