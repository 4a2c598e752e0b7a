"""Run an ONNX file with ONNX Runtime."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.errors import TargetError, first_line
from compressor.runtimes.graph_inputs import InputCheck
from compressor.runtimes.runtime import Array, TensorSpec

__all__ = ["OnnxRuntime"]

_DTYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64", "tensor(bool)": "bool",
    "tensor(int8)": "int8", "tensor(int16)": "int16", "tensor(int32)": "int32", "tensor(int64)": "int64",
    "tensor(uint8)": "uint8", "tensor(uint16)": "uint16", "tensor(uint32)": "uint32", "tensor(uint64)": "uint64",
}  # fmt: skip

_TOO_NEW = {
    "IR version": r"model IR version: (\d+), max supported IR version: (\d+)",
    "opset": r"Opset (\d+) is under development.*support for domain ai.onnx is till opset (\d+)",
}
"""How the engine says that a file is newer than itself."""


class OnnxRuntime:
    """A loaded ONNX graph.

    Args:
        path: The ONNX file.
        options: ``threads`` (0: the engine's choice), ``device`` ("cpu", "cuda", "cuda:N"), ``providers`` and
            ``provider_options`` (override what the device implies).

    Raises:
        TargetError: ONNX Runtime is missing, lacks the provider, or cannot load the file.
    """

    def __init__(self, path: Path | str, options: Mapping[str, Any] | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise TargetError("ONNX Runtime is not installed: pip install 'compressor[ort]'") from error
        options = options or {}
        providers = _providers(options)
        missing = [name for name, _ in providers if name not in onnxruntime.get_available_providers()]
        if missing:
            offered = ", ".join(onnxruntime.get_available_providers())
            raise TargetError(f"the installed ONNX Runtime has no {missing[0]} (it has {offered})")
        session_options = onnxruntime.SessionOptions()
        session_options.log_severity_level = 3
        if options.get("threads"):
            session_options.intra_op_num_threads = int(options["threads"])
            session_options.inter_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(str(path), session_options, providers=providers)
        except Exception as error:  # the engine's exceptions have no common base
            reason = _too_new(error, onnxruntime.__version__) or first_line(error)
            raise TargetError(f"ONNX Runtime cannot load {path}: {reason}") from error
        if self._session.get_providers()[0] != providers[0][0]:
            raise TargetError(f"{providers[0][0]} does not start on this machine: check its libraries and the driver")
        self.inputs = tuple(_spec(tensor) for tensor in self._session.get_inputs())
        self.outputs = tuple(_spec(tensor) for tensor in self._session.get_outputs())
        self._ready, self._names = InputCheck(self.inputs), [spec.name for spec in self.outputs]

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        ready = self._ready(inputs)
        try:
            values = self._session.run(self._names, ready)
        except Exception as error:  # the engine's exceptions have no common base
            raise TargetError(f"ONNX Runtime failed: {first_line(error)}") from error
        return dict(zip(self._names, values, strict=True))

    def close(self) -> None:
        """Free the graph; it cannot be called afterwards."""
        self._session = None


def _providers(options: Mapping[str, Any]) -> list[tuple[str, dict[str, str]]]:
    device = str(options.get("device", "cpu"))
    named = list(options.get("providers") or ())
    if not named:
        named = ["CPUExecutionProvider"] if device == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
    given = options.get("provider_options") or {}
    result = []
    for name in named:
        settings = dict(given.get(name, {}))
        if device.startswith("cuda:") and name != "CPUExecutionProvider":
            settings.setdefault("device_id", device.partition(":")[2])
        result.append((name, settings))
    return result


def _spec(tensor: Any) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else str(size or f"axis{n}") for n, size in enumerate(tensor.shape))
    return TensorSpec(tensor.name, shape, _DTYPES.get(tensor.type, tensor.type))


def _too_new(error: Exception, version: str) -> str:
    """What a file asks for and what this engine has, where the file is newer; empty for any other error."""
    for what, pattern in _TOO_NEW.items():
        found = re.search(pattern, str(error), re.DOTALL)
        if found:
            needs, has = found.groups()
            return f"it needs ONNX {what} {needs}, ONNX Runtime {version} has {has}: upgrade it"
    return ""
