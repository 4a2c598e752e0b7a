"""Help for tracing (`torch.export`), and repairs of a traced program before it becomes ONNX."""

from __future__ import annotations

import builtins
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["fold_constants", "free_lengths", "has_complex_values", "repair_attention", "repair_squeezes"]


@contextlib.contextmanager
def free_lengths(module: nn.Module) -> Iterator[None]:
    """Let ``len(tensor)`` be a free size in the files that define the module's classes.

    Python wants a number of ``len``, so tracing would fix the batch size wherever a library writes ``len(x)`` for
    ``x.shape[0]``, as some detectors do.
    """
    names = {type(part).__module__ for part in module.modules()}
    places = [sys.modules[name] for name in names if name in sys.modules and name.partition(".")[0] != "torch"]
    places = [place for place in places if "len" not in vars(place)]

    def length(value: Any) -> Any:
        return value.shape[0] if isinstance(value, Tensor) and value.dim() else builtins.len(value)

    try:
        for place in places:
            vars(place)["len"] = length
        yield
    finally:
        for place in places:
            vars(place).pop("len", None)


def repair_squeezes(program: torch.export.ExportedProgram) -> None:
    """Turn squeezes of an axis whose size is not 1 into copies, in place.

    PyTorch defines them as no operation, but they become an ONNX ``Squeeze``, which forbids them.
    """
    for node in program.graph.nodes:
        if node.target is not torch.ops.aten.squeeze.dim:
            continue
        size = node.args[0].meta["val"].shape[node.args[1]]
        if isinstance(size, int) and size != 1:
            node.target, node.args = torch.ops.aten.clone.default, node.args[:1]
    program.graph_module.recompile()


def repair_attention(program: torch.export.ExportedProgram) -> None:
    """Give attention without an axis of heads one of size 1, in place: the exporter knows no other."""
    for node in list(program.graph.nodes):
        if node.target is not torch.ops.aten.scaled_dot_product_attention.default or _rank(node.args[0]) != 3:
            continue
        with program.graph.inserting_before(node):
            parts = [
                _call(program.graph, torch.ops.aten.unsqueeze.default, part, 1) if _rank(part) == 3 else part
                for part in node.args
            ]
            kwargs = dict(node.kwargs)
            if _rank(kwargs.get("attn_mask")) == 3:
                kwargs["attn_mask"] = _call(program.graph, torch.ops.aten.unsqueeze.default, kwargs["attn_mask"], 1)
            attended = program.graph.call_function(node.target, tuple(parts), kwargs)
            attended.meta["val"] = node.meta["val"].unsqueeze(1)
        # the node itself becomes the last one: outputs of a program are known by their names
        node.target, node.args, node.kwargs = torch.ops.aten.squeeze.dim, (attended, 1), {}
    program.graph_module.recompile()


def _rank(value: Any) -> int:
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    return found.dim() if isinstance(found, Tensor) else -1


def _call(graph: fx.Graph, target: Any, node: fx.Node, axis: int) -> fx.Node:
    """Call an operation on a value and an axis; the result knows its value, as every node of a program does."""
    made = graph.call_function(target, (node, axis))
    made.meta["val"] = target(node.meta["val"], axis)
    return made


def has_complex_values(program: torch.export.ExportedProgram) -> bool:
    """True where some value of the program is complex."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    return any(isinstance(value, Tensor) and value.is_complex() for value in values)


def fold_constants(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program as a module in which everything that depends on no input is computed already.

    Most complex arithmetic (tables of a rotary embedding) vanishes so; what stays (products with the table) ONNX can
    express.
    """
    module = program.module()
    known: dict[fx.Node, Any] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            known[node] = _attribute(module, str(node.target))
        elif node.op == "call_function" and node.all_input_nodes and set(node.all_input_nodes) <= set(known):
            with torch.no_grad():
                known[node] = node.target(*_concrete(node.args, known), **_concrete(node.kwargs, known))
    for number, node in enumerate(list(module.graph.nodes)):
        if node.op == "call_function" and isinstance(known.get(node), Tensor):
            name = f"folded_{number}"
            module.register_buffer(name, known[node].detach().clone())
            with module.graph.inserting_before(node):
                constant = module.graph.get_attr(name)
            node.replace_all_uses_with(constant)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _concrete(arguments: Any, known: dict[fx.Node, Any]) -> Any:
    return fx.node.map_arg(arguments, lambda node: known[node])


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module
