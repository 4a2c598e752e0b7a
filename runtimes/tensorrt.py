"""Run a TensorRT or TensorRT-RTX engine on an NVIDIA GPU. Both have the same Python interface."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from compressor.errors import ArtifactError, RequestError, TargetError
from compressor.runtimes.gpu import nvidia_gpu
from compressor.runtimes.graph_inputs import InputCheck
from compressor.runtimes.runtime import Array, TensorSpec

__all__ = ["TensorRt", "engine_messages", "import_tensorrt", "tensorrt_logger"]

_MODULES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}


@functools.cache
def import_tensorrt(engine: str) -> ModuleType:
    """The Python module of "tensorrt" or "tensorrt-rtx".

    Raises:
        TargetError: It is not installed, or its libraries do not load.
    """
    reason = ""
    for name in _MODULES[engine]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except Exception as error:  # a library that does not load raises what it likes
            reason = f"{name} is installed but does not load: {error}"
    title = "TensorRT" if engine == "tensorrt" else "TensorRT-RTX"
    raise TargetError(reason or f"{title} is not installed: pip install 'compressor[{engine}]'")


@functools.cache
def tensorrt_logger(engine: str) -> Any:
    """The one logger of the process (TensorRT keeps the first it sees); it gathers what the engine says."""
    trt = import_tensorrt(engine)

    class Gathering(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(str(message))

    return Gathering()


def engine_messages(engine: str) -> str:
    """The errors that the engine logged since the last call, as one line."""
    logger = tensorrt_logger(engine)
    text = "; ".join(" ".join(message.split()) for message in logger.errors[:2])
    logger.errors.clear()
    return text or "no reason given"


class TensorRt:
    """A loaded engine with its own stream and device buffers, which grow with the largest batch seen.

    Args:
        path: The engine file.
        options: ``engine`` ("tensorrt" or "tensorrt-rtx"), ``device`` ("cuda" or "cuda:N").

    Raises:
        TargetError: No GPU, no TensorRT, or an engine for another GPU or version.
    """

    def __init__(self, path: Path | str, options: Mapping[str, Any] | None = None) -> None:
        options = options or {}
        self._kind = str(options.get("engine", "tensorrt"))
        trt = import_tensorrt(self._kind)
        if nvidia_gpu() is None:
            raise TargetError(f"no NVIDIA GPU is visible here, so {Path(path).name} cannot run: copy it to the device")
        self._cuda = _Cuda(str(options.get("device") or "cuda"))
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
        self._runtime = trt.Runtime(tensorrt_logger(self._kind))
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise TargetError(f"{path} does not load on this GPU: {engine_messages(self._kind)}")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise TargetError(f"{path} does not start: {engine_messages(self._kind)}")
        names = [self._engine.get_tensor_name(number) for number in range(self._engine.num_io_tensors)]
        ins = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._trt = trt
        self.inputs = tuple(self._spec(name) for name in ins)
        self.outputs = tuple(self._spec(name) for name in names if name not in ins)
        self._ready = InputCheck(self.inputs)

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        ready = self._ready(inputs)
        for name, array in ready.items():
            if not self._context.set_input_shape(name, tuple(array.shape)):
                low, _, high = self._engine.get_tensor_profile_shape(name, 0)
                limits = f"{tuple(low)} to {tuple(high)}"
                raise RequestError(f"input {name!r} of shape {array.shape} is outside what the engine takes: {limits}")
            address = self._cuda.upload(name, array)
            self._context.set_tensor_address(name, address)
        results = {}
        for spec in self.outputs:
            shape = tuple(self._context.get_tensor_shape(spec.name))
            if any(size < 0 for size in shape):
                raise TargetError(f"output {spec.name!r} has a size that depends on the data, which is not supported")
            results[spec.name] = np.empty(shape, np.dtype(spec.dtype))
            self._context.set_tensor_address(spec.name, self._cuda.reserve(spec.name, results[spec.name].nbytes))
        if not self._context.execute_async_v3(self._cuda.stream):
            raise TargetError(f"the engine failed: {engine_messages(self._kind)}")
        for name, array in results.items():
            self._cuda.download(name, array)
        self._cuda.synchronize()
        return results

    def close(self) -> None:
        """Free the engine and its device memory; it cannot be called afterwards."""
        self._context = self._engine = self._runtime = None
        self._cuda.free()

    def _spec(self, name: str) -> TensorSpec:
        labels = {0: "batch"}
        sizes = enumerate(self._engine.get_tensor_shape(name))
        shape = tuple(int(size) if size >= 0 else labels.get(axis, f"axis{axis}") for axis, size in sizes)
        return TensorSpec(name, shape, np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name))).name)


class _Cuda:
    """A stream and named device buffers, through NVIDIA's own Python bindings."""

    def __init__(self, device: str) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise TargetError("running an engine needs NVIDIA's CUDA bindings: pip install cuda-python") from error
        self._api = runtime
        number = device.partition(":")[2] or "0"
        self._check(runtime.cudaSetDevice(int(number)))
        self.stream = int(self._check(runtime.cudaStreamCreate()))
        self._buffers: dict[str, tuple[int, int]] = {}

    def reserve(self, name: str, size: int) -> int:
        """Address of a device buffer of at least ``size`` bytes."""
        address, have = self._buffers.get(name, (0, 0))
        if have < max(size, 1):
            if address:
                self._check(self._api.cudaFree(address))
            address = int(self._check(self._api.cudaMalloc(max(size, 1))))
            self._buffers[name] = (address, max(size, 1))
        return address

    def upload(self, name: str, array: Array) -> int:
        """Copy an array to its device buffer and return the address."""
        address = self.reserve(name, array.nbytes)
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._check(self._api.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, self.stream))
        return address

    def download(self, name: str, array: Array) -> None:
        """Copy a device buffer into an array; done only after `synchronize`."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        address = self._buffers[name][0]
        self._check(self._api.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, self.stream))

    def synchronize(self) -> None:
        self._check(self._api.cudaStreamSynchronize(self.stream))

    def free(self) -> None:
        for address, _ in self._buffers.values():
            self._check(self._api.cudaFree(address))
        self._buffers.clear()

    def _check(self, answer: tuple[Any, ...]) -> Any:
        """The value of a CUDA call: it answers (error, value...)."""
        if int(answer[0]):
            _, text = self._api.cudaGetErrorString(answer[0])
            reason = text.decode() if isinstance(text, bytes) else str(text)
            raise TargetError(f"CUDA failed: {reason}")
        return answer[1] if len(answer) > 1 else None
