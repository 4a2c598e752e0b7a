"""Simplify an exported graph: fold constants, drop what does nothing, merge what is equal."""

from __future__ import annotations

import onnx_ir
import onnxscript.optimizer
from onnx_ir.passes import common
from onnxscript import rewriter

__all__ = ["simplify"]


def simplify(model: onnx_ir.Model) -> None:
    """Simplify in place with onnxscript's default passes.

    Its rules that look for several results at once are left out where that is possible: they compare every node with
    every other one, which takes minutes on graphs of a few thousand nodes, and seldom find anything.
    """
    rules = [rule for rule in getattr(rewriter, "_DEFAULT_REWRITE_RULES", ()) if _has_one_result(rule)]
    if not rules:
        onnxscript.optimizer.optimize_ir(model)
        return
    onnx_ir.passes.Sequential(common.InlinePass())(model)
    for _ in range(2):
        onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True)
        rewriter.RewritePass(rules)(model)
        common.RemoveUnusedNodesPass()(model)
    onnx_ir.passes.Sequential(
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def _has_one_result(rule: object) -> bool:
    pattern = getattr(rule, "_target_pattern", None)
    return bool(getattr(pattern, "has_single_output_node", False))
