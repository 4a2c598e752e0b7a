"""Simplify an exported graph: fold constants, drop what does nothing, merge what is equal."""

from __future__ import annotations

from typing import Any

import onnx_ir
import onnxscript.optimizer
from onnx_ir.passes import common
from onnxscript import rewriter

__all__ = ["simplify"]

_LAST_PASSES: dict[str, dict[str, Any]] = {
    "RemoveUnusedFunctionsPass": {},
    "RemoveUnusedOpsetsPass": {},
    "LiftConstantsToInitializersPass": {"lift_all_constants": True, "size_limit": 0},
    "LiftSubgraphInitializersToMainGraphPass": {},
    "DeduplicateInitializersPass": {},
    "CommonSubexpressionEliminationPass": {},
    "OutputFixPass": {},
    "NameFixPass": {},
}


def simplify(model: onnx_ir.Model) -> None:
    """Simplify in place with onnxscript's default passes, without two kinds of its rules where they are known.

    Rules that look for several results at once compare every node with every other one, which takes minutes on graphs
    of a few thousand nodes. Rules that drop "+ 0" also drop an epsilon of 1e-12, which keeps a division from failing.
    """
    rules = _rules()
    if not rules:
        onnxscript.optimizer.optimize_ir(model)
        return
    common.InlinePass()(model)
    for _ in range(2):
        onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True)
        rewriter.RewritePass(rules)(model)
        common.RemoveUnusedNodesPass()(model)
    for name, options in _LAST_PASSES.items():
        kind = getattr(common, name, None)  # older versions lack the newest
        if kind is not None:
            kind(**options)(model)


def _rules() -> list[Any]:
    try:
        from onnxscript.rewriter.rules.common import _no_op
    except ImportError:
        return []
    inexact = {id(rule) for rule in _no_op.rules}
    known = getattr(rewriter, "_DEFAULT_REWRITE_RULES", ())
    return [rule for rule in known if id(rule) not in inexact and _has_one_result(rule)]


def _has_one_result(rule: Any) -> bool:
    pattern = getattr(rule, "_target_pattern", None)
    return bool(getattr(pattern, "has_single_output_node", False))
