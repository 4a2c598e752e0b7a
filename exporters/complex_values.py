"""Complex numbers in a traced program, as rotary embeddings have them: moves and exponentials on pairs of real numbers.

ONNX has no complex numbers. PyTorch's exporter writes products, sums and shapes of them as real arithmetic; what it
leaves out (indexing, repeating, choosing, exponentials) is rewritten here: a complex (...) becomes its real (..., 2),
the operation works on that, and the result is complex again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["in_real_pairs"]

_ATEN = torch.ops.aten
_ALONG = {
    _ATEN.unsqueeze.default, _ATEN.squeeze.dim, _ATEN.select.int, _ATEN.index_select.default, _ATEN.cumsum.default,
    _ATEN.repeat_interleave.self_int, _ATEN.split.Tensor, _ATEN.split_with_sizes.default, _ATEN.chunk.default,
    _ATEN.unbind.int,
}  # fmt: skip
"""Operations along one axis: counted from the front it is the same axis of the pairs."""


def in_real_pairs(module: fx.GraphModule) -> None:
    """Rewrite the complex operations of a traced module that PyTorch's exporter does not know, in place.

    Args:
        module: Its nodes know their values (``meta["val"]``); those that it does not know are left as they are.
    """
    for node in list(module.graph.nodes):
        rewrite = _REWRITES.get(node.target) if node.op == "call_function" else None
        if rewrite is not None and any(_is_complex(item) for item in node.all_input_nodes):
            pairs = _Pairs(module.graph)
            with module.graph.inserting_before(node):
                result = rewrite(pairs, *node.args, **node.kwargs)
            if node.target not in _SEVERAL:
                _replace(node, result)
                continue
            for item in list(node.users):
                with module.graph.inserting_before(item):
                    _replace(item, pairs.pack(pairs.call(item.target, result, item.args[1])))
    module.graph.eliminate_dead_code()
    module.recompile()


def _replace(node: fx.Node, result: fx.Node) -> None:
    result.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(result)


def _is_complex(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.is_complex()


class _Pairs:
    """Writes operations into a graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph

    def call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)

    def real(self, node: fx.Node) -> fx.Node:
        """(..., 2) of a complex value, or of a real one with zeros as imaginary parts."""
        if _is_complex(node):
            return self.call(_ATEN.view_as_real.default, node)
        zeros = self.call(_ATEN.zeros_like.default, node)
        return self.call(_ATEN.stack.default, [node, zeros], -1)

    def pack(self, node: fx.Node) -> fx.Node:
        return self.call(_ATEN.view_as_complex.default, node)


def _along(target: Any) -> Callable[..., fx.Node]:
    """An operation along one axis, whose place among the arguments its schema tells."""
    names = [argument.name for argument in target._schema.arguments]
    place = names.index("dim")
    default = target._schema.arguments[place].default_value

    def rewrite(pairs: _Pairs, *args: Any, **kwargs: Any) -> fx.Node:
        given = dict(zip(names, args, strict=False)) | kwargs
        rank = args[0].meta["val"].dim() + (1 if target is _ATEN.unsqueeze.default else 0)
        dim = given.get("dim", default)
        given["dim"] = (rank + dim) if dim < 0 else dim
        given[names[0]] = pairs.real(args[0])
        result = pairs.call(target, *(given[name] for name in names if name in given and name != "dtype"))
        return result if target in _SEVERAL else pairs.pack(result)

    return rewrite


def _index(pairs: _Pairs, value: fx.Node, indices: Any) -> fx.Node:
    return pairs.pack(pairs.call(_ATEN.index.Tensor, pairs.real(value), indices))


def _gather(pairs: _Pairs, value: fx.Node, dim: int, index: fx.Node) -> fx.Node:
    rank = value.meta["val"].dim()
    both = pairs.call(_ATEN.stack.default, [index, index], -1)
    return pairs.pack(pairs.call(_ATEN.gather.default, pairs.real(value), dim % rank, both))


def _repeat(pairs: _Pairs, value: fx.Node, repeats: Any) -> fx.Node:
    missing = max(0, value.meta["val"].dim() - len(repeats))  # `tile` may name the last axes alone
    return pairs.pack(pairs.call(_ATEN.repeat.default, pairs.real(value), [*[1] * missing, *repeats, 1]))


def _expand(pairs: _Pairs, value: fx.Node, size: Any, **_: Any) -> fx.Node:
    return pairs.pack(pairs.call(_ATEN.expand.default, pairs.real(value), [*size, 2]))


def _where(pairs: _Pairs, condition: fx.Node, first: fx.Node, second: fx.Node) -> fx.Node:
    chosen = pairs.call(_ATEN.unsqueeze.default, condition, -1)
    return pairs.pack(pairs.call(_ATEN.where.self, chosen, pairs.real(first), pairs.real(second)))


def _exponential(pairs: _Pairs, value: fx.Node) -> fx.Node:
    both = pairs.real(value)
    real, imaginary = (pairs.call(_ATEN.select.int, both, -1, part) for part in (0, 1))
    size = pairs.call(_ATEN.exp.default, real)
    parts = [
        pairs.call(_ATEN.mul.Tensor, size, pairs.call(turn, imaginary))
        for turn in (_ATEN.cos.default, _ATEN.sin.default)
    ]
    return pairs.pack(pairs.call(_ATEN.stack.default, parts, -1))


_SEVERAL = {_ATEN.split.Tensor, _ATEN.split_with_sizes.default, _ATEN.chunk.default, _ATEN.unbind.int}
"""They give a list, whose items are packed one by one."""
_REWRITES: dict[Any, Callable[..., fx.Node]] = {
    **{target: _along(target) for target in _ALONG},
    _ATEN.index.Tensor: _index,
    _ATEN.gather.default: _gather,
    _ATEN.repeat.default: _repeat,
    _ATEN.tile.default: _repeat,
    _ATEN.expand.default: _expand,
    _ATEN.where.self: _where,
    _ATEN.exp.default: _exponential,
}
