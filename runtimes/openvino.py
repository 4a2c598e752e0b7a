"""Run an OpenVINO model (.xml with .bin) on a CPU, GPU or NPU."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import TargetError
from compressor.runtimes.graph_inputs import InputCheck
from compressor.runtimes.runtime import Array, TensorSpec

__all__ = ["OpenVino", "shared_core"]

_IR_VERSION = 11
"""The newest version of the file format that is known here."""
_STATIC_SHAPES = 4
"""Shapes with a compiled model of their own, where the options leave it open."""
_STATIC_LIMIT = 64 * 2**20
"""Bytes of weights above which there are none then: the gain is in the small operators, the cost in the weights."""
_COUNTED = 64
"""Shapes whose calls are counted."""

_Shapes = tuple[tuple[int, ...], ...]
"""Shapes of all inputs."""


@functools.cache
def shared_core() -> Any:
    """The one `openvino.Core` of this process, which lives as long as it: nobody should set properties of it.

    A core's CPU plugin gives the thread that first compiles with it a stack for signal handlers, and takes it back when
    the core and its models are gone. Of several cores that do not go in the reverse order of their coming, one leaves
    the thread with a stack that is unmapped: the next signal, a Ctrl-C or the end of a time limit, then kills the
    process without a word instead of being handled.
    """
    import openvino

    return openvino.Core()


class OpenVino:
    """A compiled OpenVINO model.

    Args:
        path: The .xml file; its .bin lies beside it. An ONNX file works too.
        options: ``device`` ("cpu", "gpu", "npu", "auto"), ``threads`` (0: the engine's choice), ``inference_precision``
            ("f32", "f16", "bf16" or "" for the device's default; a device without half arithmetic computes "f16" in
            float32), ``properties`` (as they are), ``static_shapes`` (so many shapes of the inputs get a compiled model
            of their own, when they come for the second time; None is 4 below 64 MB of weights, else 0).

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
        try:
            core = shared_core()
            if options.get("inference_precision"):
                properties["INFERENCE_PRECISION_HINT"] = _precision(core, device, str(options["inference_precision"]))
            properties.update(options.get("properties") or {})
            model = core.read_model(str(path))
            self._model = core.compile_model(model, device, properties)
            self._any: Any = _Request(self._model)
            self._compile = lambda model: core.compile_model(model, device, properties)
        except Exception as error:  # the engine raises plain RuntimeErrors of many lines
            reason = _too_new(Path(path), openvino.__version__) or _reason(error)
            raise TargetError(f"OpenVINO cannot load {path} on {device}: {reason}") from error
        # names are the file's: compiling may merge an output with the tensor that it is a copy of
        self.inputs = _specs(model.inputs, self._model.inputs)
        self.outputs = _specs(model.outputs, self._model.outputs)
        self._ready, self._names = InputCheck(self.inputs), [spec.name for spec in self.outputs]
        self._read, self._static = model, 0
        if any(port.get_partial_shape().is_dynamic for port in model.inputs):
            wanted = options.get("static_shapes")
            self._static = _static_shapes(Path(path)) if wanted is None else int(wanted)
        self._calls: dict[_Shapes, int] = {}
        self._specialised: dict[_Shapes, _Request] = {}

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        arrays = list(self._ready(inputs).values())
        shapes = tuple([array.shape for array in arrays])
        try:
            results = (self._specialised.get(shapes) or self._request_for(shapes))(arrays)
        except Exception as error:  # the engine raises plain RuntimeErrors of many lines
            raise TargetError(f"OpenVINO failed: {_reason(error)}") from error
        return dict(zip(self._names, results, strict=True))

    def _request_for(self, shapes: _Shapes) -> _Request:
        """The request of a model to be compiled for these new shapes, or of the one for any."""
        if len(self._specialised) >= self._static:
            return self._any
        if len(self._calls) > _COUNTED:
            self._calls.clear()
        self._calls[shapes] = self._calls.get(shapes, 0) + 1
        if self._calls[shapes] < 2:  # many sizes come once
            return self._any
        try:
            model = self._read.clone()
            model.reshape({number: list(shape) for number, shape in enumerate(shapes)})
            self._specialised[shapes] = _Request(self._compile(model))
        except Exception:  # a part of the graph that cannot be given sizes ahead of time
            self._specialised[shapes] = self._any
        return self._specialised[shapes]

    @property
    def inference_precision(self) -> str:
        """The precision that the device really computes in: "float32", "float16" or "bfloat16"."""
        kind = self._model.get_property("INFERENCE_PRECISION_HINT")
        return str(kind.to_dtype().name) if kind.get_type_name() != "bf16" else "bfloat16"

    def close(self) -> None:
        """Free the model; it cannot be called afterwards."""
        self._any = self._model = self._read = None
        self._specialised.clear()


class _Request:
    """A compiled model, called with arrays in the order of its inputs; gives copies of its outputs in their order.

    `CompiledModel.__call__` would look all names and types up again, a tenth of a millisecond a call, and `infer` would
    copy all outputs once more if they were not shared.
    """

    def __init__(self, compiled: Any) -> None:
        import openvino

        self._compiled, self._tensor = compiled, openvino.Tensor
        self._request = compiled.create_infer_request()
        self._count = len(compiled.outputs)
        # Where no size is free, arrays are copied to tensors that stay: the engine prepares itself anew for other ones.
        fixed = not any(port.get_partial_shape().is_dynamic for port in (*compiled.inputs, *compiled.outputs))
        numbers = range(len(compiled.inputs))
        self._inputs = [self._request.get_input_tensor(number).data for number in numbers] if fixed else None
        self._outputs = [self._request.get_output_tensor(number).data for number in range(self._count)] if fixed else []

    def __call__(self, arrays: Sequence[Array]) -> list[Array]:
        if self._inputs is not None:
            for place, array in zip(self._inputs, arrays, strict=True):
                place[...] = array
            self._request.infer(share_outputs=True)
            return [output.copy() for output in self._outputs]
        for number, array in enumerate(arrays):
            self._request.set_input_tensor(number, self._tensor(_writable(array), shared_memory=True))
        self._request.infer(share_outputs=True)
        return [self._request.get_output_tensor(number).data.copy() for number in range(self._count)]


def _static_shapes(path: Path) -> int:
    """How many shapes get a model of their own where nothing says it: by the size of the weights."""
    weights = path.with_suffix(".bin") if path.suffix == ".xml" else path
    return _STATIC_SHAPES if weights.is_file() and weights.stat().st_size <= _STATIC_LIMIT else 0


def _precision(core: Any, device: str, asked: str) -> str:
    """The precision to ask a device for. OpenVINO's CPU would compute halves in bfloat16, which has fewer digits."""
    if asked != "f16":
        return asked
    try:
        return asked if "FP16" in core.get_property(device, "OPTIMIZATION_CAPABILITIES") else "f32"
    except RuntimeError:  # a device that does not tell
        return asked


def _writable(array: Array) -> Array:
    """The array itself, or a copy where it may not be written to: the engine shares no memory with such a one."""
    return array if array.flags.writeable else array.copy()


def _specs(named: Sequence[Any], compiled: Sequence[Any]) -> tuple[TensorSpec, ...]:
    pairs = zip(named, compiled, strict=True)
    return tuple(_spec(source, port, number) for number, (source, port) in enumerate(pairs))


def _spec(named: Any, port: Any, number: int) -> TensorSpec:
    shape = port.get_partial_shape()
    sizes = tuple(
        ("batch" if axis == 0 else f"axis{axis}") if size.is_dynamic else size.get_length()
        for axis, size in enumerate(shape)
    )
    name = named.get_any_name() if named.get_names() else f"port{number}"
    return TensorSpec(name, sizes, np.dtype(port.get_element_type().to_dtype()).name)


def _too_new(path: Path, version: str) -> str:
    """What a file asks for and what this engine has, where the file is newer; empty for any other error."""
    if path.suffix != ".xml" or not path.is_file():
        return ""
    with open(path, "rb") as file:
        found = re.search(rb"<net\b[^>]*\bversion=\"(\d+)\"", file.read(4096))
    if found is None or int(found[1]) <= _IR_VERSION:
        return ""
    return f"it needs OpenVINO IR version {int(found[1])}, OpenVINO {version} reads up to {_IR_VERSION}: upgrade it"


def _reason(error: Exception) -> str:
    """The last telling line of OpenVINO's message: its first lines are places in its own source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (telling or lines or [type(error).__name__])[-1]
