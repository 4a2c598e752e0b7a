"""Which operators of a graph an engine computes in eight bits, and why the others stay in float.

Quantising an operator that the engine has no 8-bit kernel for costs accuracy and time and buys nothing, so only these
are taken: convolutions and products with a constant weight, and, for ONNX Runtime, what lies between two of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from onnx import ModelProto, NodeProto

from compressor.exporters.graph_edges import makers_of, readers_of
from compressor.exporters.typed_graph import float_values

__all__ = ["PRODUCTS", "QuantizedOperators", "choose_operators", "products"]

PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
"""Operators that the work lies in."""

_KERNELS: Mapping[str, frozenset[str]] = {
    "onnxruntime": frozenset({"Conv", "MatMul", "Gemm"}),  # a transposed convolution has no 8-bit kernel on the CPU
    "tensorrt": frozenset(PRODUCTS),
}
_BETWEEN = frozenset({"Relu", "Clip", "Add", "MaxPool", "AveragePool", "GlobalAveragePool", "Flatten", "Reshape"})
"""What ONNX Runtime computes or moves in eight bits without leaving them, between two convolutions."""
_TAKES_GEMM = frozenset({
    "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Elu", "HardSigmoid", "Selu", "Softplus", "Softsign", "ThresholdedRelu",
})  # fmt: skip
"""Activations that ONNX Runtime joins with a Gemm before them into a float kernel, unless a rounding lies between."""


@dataclass(frozen=True)
class QuantizedOperators:
    """The choice for one graph.

    Attributes:
        products: Names of the nodes whose products are computed in eight bits.
        between: Names of the nodes between them that stay in eight bits.
        rounded: Names of the products whose result is rounded to eight bits too, because the kernel asks for it.
        left: Reason by name, for the products that stay in float.
    """

    products: tuple[str, ...]
    between: tuple[str, ...]
    rounded: frozenset[str]
    left: Mapping[str, str]

    @property
    def all(self) -> list[str]:
        """Every node that is quantised."""
        return [*self.products, *self.between]


def products(model: ModelProto, engine: str) -> dict[str, str]:
    """The convolutions and products of a `normalised` graph: name and why it stays in float, "" where it need not.

    Args:
        model: The graph.
        engine: "onnxruntime" or "tensorrt".
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    floats = float_values(model.graph)
    found = {}
    for node in model.graph.node:
        if node.op_type not in PRODUCTS or node.output[0] not in floats:
            continue
        if node.op_type not in _KERNELS[engine]:
            found[node.name] = "kernel"
        elif node.input[1] not in constants or node.input[0] in constants:
            found[node.name] = "activations"
        elif len(node.input) > 2 and node.input[2] and node.input[2] not in constants:
            found[node.name] = "bias"
        else:
            found[node.name] = ""
    return found


def choose_operators(model: ModelProto, engine: str, back: Mapping[str, str]) -> QuantizedOperators:
    """Choose what is quantised.

    Args:
        model: A `normalised` graph.
        engine: "onnxruntime" or "tensorrt".
        back: Products that go back to float, with the reason.
    """
    left = {name: back.get(name, reason) for name, reason in products(model, engine).items()}
    chosen = tuple(name for name, reason in left.items() if not reason)
    reasons = {name: reason for name, reason in left.items() if reason}
    if engine != "onnxruntime":
        return QuantizedOperators(chosen, (), frozenset(), reasons)
    rounded = _rounded(model, set(chosen))
    return QuantizedOperators(chosen, _between(model, set(chosen), rounded), rounded, reasons)


def _rounded(model: ModelProto, chosen: Collection[str]) -> frozenset[str]:
    """Convolutions, and each Gemm whose only reader would take its integer kernel away."""
    users = readers_of(model.graph)
    found = set()
    for node in model.graph.node:
        if node.name in chosen:
            readers = users.get(node.output[0], [])
            taken = node.op_type == "Gemm" and len(readers) == 1 and readers[0].op_type in _TAKES_GEMM
            if taken or node.op_type == "Conv":
                found.add(node.name)
    return frozenset(found)


def _between(model: ModelProto, chosen: Collection[str], rounded: Collection[str]) -> tuple[str, ...]:
    """Operators that read nothing but 8-bit results (through others of their kind), and that a product reads at last.

    A Relu behind a rounded Gemm is among them always: the rounding does its work.
    """
    makers = makers_of(model.graph)
    floats, users = float_values(model.graph), readers_of(model.graph)
    fed: set[str] = set()
    kept: set[str] = set()
    for node in model.graph.node:
        sources = [name for name in node.input if name in floats and not _is_bound(node, name)]
        givers = [makers.get(name) for name in sources]
        if node.op_type in _BETWEEN and givers and all(_gives_bits(giver, rounded, fed) for giver in givers):
            fed.add(node.name)
            if node.op_type == "Relu" and givers[0] is not None and givers[0].op_type == "Gemm":
                kept.add(node.name)
    for node in reversed(model.graph.node):
        readers = [user.name for name in node.output for user in users.get(name, [])]
        if node.name in fed and any(reader in chosen or reader in kept for reader in readers):
            kept.add(node.name)
    return tuple(node.name for node in model.graph.node if node.name in kept)


def _gives_bits(maker: NodeProto | None, rounded: Collection[str], fed: Collection[str]) -> bool:
    return maker is not None and (maker.name in fed or maker.name in rounded)


def _is_bound(node: NodeProto, name: str) -> bool:
    """The limits of a Clip are constants of the operator, not data."""
    return node.op_type == "Clip" and name in node.input[1:]
