"""Graphs as PyTorch itself runs them for a target: eager, compiled, or through Torch-TensorRT.

There is no artifact: what is run is the student in memory, compiled on the machine that measures it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from compressor.deployable import Graph
from compressor.errors import TargetError
from compressor.evaluate import TorchRun

__all__ = ["torch_run"]


def torch_run(graph: Graph, target: Mapping[str, Any]) -> TorchRun:
    """A graph's module, ready to run as the target says.

    Args:
        graph: Stays as it is.
        target: The resolved target; an empty one is the module itself, in float32, where it is.

    Raises:
        TargetError: The target's device or library is not here.
    """
    runtime, device = str(target.get("runtime", "torch")), str(target.get("device", "cpu"))
    half = target.get("precision") == "fp16"
    if runtime == "torch" and not half and device == "cpu":
        return TorchRun(graph.module.eval(), graph.outputs)
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise TargetError("PyTorch finds no NVIDIA GPU here")
    module: Any = copy.deepcopy(graph.module).eval().to(device, torch.float16 if half else torch.float32)
    if runtime == "torch-compile":
        module = torch.compile(module)
    elif runtime == "torch-tensorrt":
        module = _with_tensorrt(module, half)
    return TorchRun(module, graph.outputs)


def _with_tensorrt(module: Any, half: bool) -> Any:
    try:
        import torch_tensorrt  # noqa: F401  (registers the backend)
    except ImportError as error:
        raise TargetError("Torch-TensorRT is not installed: pip install 'compressor[torch-tensorrt]'") from error
    import torch

    options: dict[str, Any] = {"enabled_precisions": {torch.float16, torch.float32} if half else {torch.float32}}
    return torch.compile(module, backend="torch_tensorrt", options=options)
