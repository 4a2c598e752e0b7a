"""Run an ONNX graph on the CPU while exporting: ONNX Runtime where it is installed, else ONNX's reference evaluator."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import ArtifactError
from compressor.runtimes.runtime import Array

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["Interpreter"]


class Interpreter:
    """A graph ready to run. Nothing in it is fused or reordered, so every rounding that it writes down happens.

    Args:
        model: A file or a graph in memory.
        threads: Threads of one run; 0 leaves it to the engine.

    Attributes:
        name: What computes, for the manifest.

    Raises:
        ArtifactError: The graph is not valid.
    """

    def __init__(self, model: Path | ModelProto, threads: int = 0) -> None:
        try:
            if importlib.util.find_spec("onnxruntime") is not None:
                self._session, self.name = _session(model, threads), "ONNX Runtime"
                self._outputs = [tensor.name for tensor in self._session.get_outputs()]
                self._inputs = {tensor.name for tensor in self._session.get_inputs()}
            else:
                from onnx.reference import ReferenceEvaluator

                given = str(model) if isinstance(model, Path) else model
                self._session, self.name = ReferenceEvaluator(given), "ONNX's reference evaluator"
                self._outputs, self._inputs = list(self._session.output_names), set(self._session.input_names)
        except Exception as error:  # both raise many types
            raise ArtifactError(f"the exported graph is not valid: {_first_line(error)}") from error

    def __call__(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        names = list(self._outputs if outputs is None else outputs)
        feed = {name: value for name, value in inputs.items() if name in self._inputs}
        try:
            values = self._session.run(names, feed)
        except Exception as error:  # both raise many types
            raise ArtifactError(f"the exported graph fails: {_first_line(error)}") from error
        return dict(zip(names, values, strict=True))


def _session(model: Path | ModelProto, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if threads:
        options.intra_op_num_threads = threads
    given = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
