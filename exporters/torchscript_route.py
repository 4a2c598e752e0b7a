"""The second way to ONNX: PyTorch's TorchScript exporter, for graphs whose sizes depend on values (detectors).

`torch.export` wants a proof for every branch on a value that it does not know, such as "is any box left"; libraries
like torchvision are written for tracing instead, where such a branch is an ``If`` of the graph, or the one that the
example takes. So what comes out is compared with the module on other values too, and the artifact says how it was made.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compressor.deployable import Graph
from compressor.exporters.layers import LAYER_KEY
from compressor.runtimes.runtime import Array

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["ROUTE_KEY", "TORCHSCRIPT", "other_values", "trace_torchscript"]

ROUTE_KEY = "compressor.route"
"""Key of a model's metadata that says which exporter made it; absent for `torch.export`."""
TORCHSCRIPT = "torchscript"


def trace_torchscript(graph: Graph, opset: int) -> ModelProto:
    """Export by tracing.

    Args:
        graph: In its evaluation form.
        opset: ONNX opset.

    Raises:
        Exception: Whatever the exporter raises.
    """
    import onnx
    import torch

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "traced.onnx"
        torch.onnx.export(
            graph.module,
            (),
            path,
            kwargs=dict(graph.inputs),
            dynamo=False,
            opset_version=opset,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_axes={key: dict(axes) for key, axes in graph.dynamic.items()},
            verbose=False,
        )
        model = onnx.load(str(path))
    for node in model.graph.node:
        scopes = ["", *_layer(node.name), node.name]
        node.metadata_props.append(onnx.StringStringEntryProto(key=LAYER_KEY, value=repr(scopes)))
    return model


def other_values(inputs: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    """The inputs with other values of the same kind: darker, mirrored, noise over the same range."""
    rng = np.random.default_rng(0)

    def noise(array: Array) -> Array:
        return rng.uniform(array.min(), array.max(), array.shape).astype(array.dtype)

    for change in (lambda array: array * array.dtype.type(0.25), lambda array: array[..., ::-1].copy(), noise):
        yield {key: change(array) if array.dtype.kind == "f" else array for key, array in inputs.items()}


def _layer(name: str) -> list[str]:
    """The module's path in a traced node's name: ``/body/body.0/conv/Conv`` is of ``body.0.conv``."""
    path: list[str] = []
    for part in name.split("/")[1:-1]:
        if path and part.startswith(f"{path[-1]}."):
            path.pop()
        path.append(part)
    return [".".join(path)] if path else []
