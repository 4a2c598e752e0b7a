"""Run an ONNX graph on the CPU while exporting: ONNX Runtime where it is installed, else ONNX's reference evaluator."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.errors import ArtifactError, first_line
from compressor.runtimes.runtime import Array

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

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
                self._session, self._weights = _session(model, threads)
                self.name = "ONNX Runtime"
                self._outputs = [tensor.name for tensor in self._session.get_outputs()]
                self._inputs = {tensor.name for tensor in self._session.get_inputs()}
            else:
                from onnx.reference import ReferenceEvaluator

                from compressor.exporters.model_file import filled

                given = str(model) if isinstance(model, Path) else filled(model)
                self._session, self.name = ReferenceEvaluator(given), "ONNX's reference evaluator"
                self._outputs, self._inputs = list(self._session.output_names), set(self._session.input_names)
        except Exception as error:  # both raise many types
            raise ArtifactError(f"the exported graph is not valid: {first_line(error)}") from error

    def __call__(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        names = list(self._outputs if outputs is None else outputs)
        feed = {name: value for name, value in inputs.items() if name in self._inputs}
        try:
            values = self._session.run(names, feed)
        except Exception as error:  # both raise many types
            raise ArtifactError(f"the exported graph fails: {first_line(error)}") from error
        return dict(zip(names, values, strict=True))


def _session(model: Path | ModelProto, threads: int) -> tuple[Any, list[Array]]:
    """A session, and the weights in memory that it reads there: they must live as long."""
    import onnxruntime

    from compressor.exporters.model_file import without_weights

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")  # it copies every weight
    if threads:
        options.intra_op_num_threads = threads
    providers, weights = ["CPUExecutionProvider"], dict[str, Array]()
    if isinstance(model, Path):
        return onnxruntime.InferenceSession(str(model), options, providers=providers), []
    light, taken, folder = without_weights(model)
    if folder is not None:  # these it maps
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    for name, tensor in taken.items():
        weights[name] = _carried(tensor)
    values = [
        onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, taken[name].data_type)
        for name, array in weights.items()
    ]
    options.add_external_initializers(list(weights), values)
    session = onnxruntime.InferenceSession(light.SerializeToString(), options, providers=providers)
    return session, list(weights.values())


def _carried(tensor: TensorProto) -> Array:
    """A tensor's bytes as whole numbers of its width: numpy has not all of ONNX's types."""
    from compressor.exporters.model_file import size_of, stored_bits

    shape = tuple(tensor.dims)
    width = size_of(tensor) // math.prod(shape)
    return stored_bits(tensor).view(np.dtype(f"u{width}")).reshape(shape)
