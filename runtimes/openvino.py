"""Run an OpenVINO model (.xml with .bin) on a CPU, GPU or NPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import TargetError
from compressor.runtimes.graph_inputs import check_inputs
from compressor.runtimes.runtime import Array, TensorSpec

__all__ = ["OpenVino"]


class OpenVino:
    """A compiled OpenVINO model.

    Args:
        path: The .xml file; its .bin lies beside it. An ONNX file works too.
        options: ``device`` ("cpu", "gpu", "npu", "auto"), ``threads`` (0: the engine's choice), ``inference_precision``
            ("f32", "f16", "bf16" or "" for the device's default), ``properties`` (as they are).

    Raises:
        TargetError: OpenVINO is missing, has no such device, or cannot load the file.
    """

    def __init__(self, path: Path | str, options: Mapping[str, Any] | None = None) -> None:
        try:
            import openvino
        except ImportError as error:
            raise TargetError("OpenVINO is not installed: pip install 'compressor[openvino]'") from error
        options = options or {}
        device = str(options.get("device") or "cpu").upper()
        properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if options.get("threads"):
            properties["INFERENCE_NUM_THREADS"] = int(options["threads"])
        if options.get("inference_precision"):
            properties["INFERENCE_PRECISION_HINT"] = str(options["inference_precision"])
        properties.update(options.get("properties") or {})
        try:
            core = openvino.Core()
            model = core.read_model(str(path))
            self._model = core.compile_model(model, device, properties)
            self._request = self._model.create_infer_request()
        except Exception as error:  # the engine raises plain RuntimeErrors of many lines
            raise TargetError(f"OpenVINO cannot load {path} on {device}: {_reason(error)}") from error
        self.inputs = tuple(_spec(port, number) for number, port in enumerate(self._model.inputs))
        self.outputs = tuple(_spec(port, number) for number, port in enumerate(self._model.outputs))

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        ready = check_inputs(self.inputs, inputs)
        try:
            result = self._request.infer([ready[spec.name] for spec in self.inputs], share_inputs=True)
        except Exception as error:  # the engine raises plain RuntimeErrors of many lines
            raise TargetError(f"OpenVINO failed: {_reason(error)}") from error
        return {spec.name: np.array(result[number]) for number, spec in enumerate(self.outputs)}

    @property
    def inference_precision(self) -> str:
        """The precision that the device really computes in: "float32", "float16" or "bfloat16"."""
        kind = self._model.get_property("INFERENCE_PRECISION_HINT")
        return str(kind.to_dtype().name) if kind.get_type_name() != "bf16" else "bfloat16"

    def close(self) -> None:
        """Free the model; it cannot be called afterwards."""
        self._request = self._model = None


def _spec(port: Any, number: int) -> TensorSpec:
    shape = port.get_partial_shape()
    sizes = tuple(
        ("batch" if axis == 0 else f"axis{axis}") if size.is_dynamic else size.get_length()
        for axis, size in enumerate(shape)
    )
    name = port.get_any_name() if port.get_names() else f"port{number}"
    return TensorSpec(name, sizes, np.dtype(port.get_element_type().to_dtype()).name)


def _reason(error: Exception) -> str:
    """The last telling line of OpenVINO's message: its first lines are places in its own source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (telling or lines or [type(error).__name__])[-1]
