"""Which layer of the model an operation of its graph stems from."""

from __future__ import annotations

import ast

from onnx import NodeProto

__all__ = ["LAYER_KEY", "layer_of", "model_path"]

LAYER_KEY = "pkg.torch.onnx.name_scopes"
"""Key of a node's metadata that holds the paths of the modules it stems from (a list literal, outermost first)."""


def layer_of(node: NodeProto) -> str:
    """Path of the module that a node stems from; empty at the top or where it is unknown."""
    for item in node.metadata_props:
        if item.key == LAYER_KEY:
            scopes = ast.literal_eval(item.value)
            return str(scopes[-2]) if len(scopes) > 1 else ""
    return ""


def model_path(layer: str) -> str:
    """A layer's path in the model itself: what packs a model into a graph holds it as ``module``."""
    return layer.removeprefix("module.")
