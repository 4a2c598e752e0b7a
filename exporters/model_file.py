"""ONNX models whose weights stay in a file: protobuf holds no message beyond 2 GB, and memory few copies of such ones.

A model that is read here is its graph alone. Its large tensors say where their bytes lie (``external_data``, with an
absolute path) and are mapped when their values are asked for; so the graph can be copied, changed and typed at will,
and all sessions of it share the same pages. `write_model` makes a file of it that others can read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.helper import make_tensor_value_info, tensor_dtype_to_np_dtype

from compressor.runtimes.runtime import Array

__all__ = [
    "INLINE_LIMIT", "SMALL", "check_model", "filled", "infer_types", "is_stored", "read_model", "rounded", "size_of",
    "stored_bits", "unrounded", "values_of", "with_weights_beside", "without_weights", "write_model",
]  # fmt: skip

INLINE_LIMIT = 1_500_000_000
"""Bytes of weights up to which a model is one file."""
SMALL = 1024
"""Bytes up to which a tensor always lies in the graph: inference of shapes reads such values."""
_PAGE, _WIDEST = 4096, 8
_CHUNK = 2**24
_NO_WHOLE_BYTES = frozenset({
    TensorProto.STRING, TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1,
})  # fmt: skip
_ROUNDED_FROM = "rounded_from"
"""Key of a tensor in memory whose bytes in the file are float32 and which is rounded when it is read."""


def read_model(path: Path) -> ModelProto:
    """The graph of a file; weights in a side file stay there."""
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        if is_stored(tensor):
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = str(path.parent.absolute() / entry.value)
    return model


def write_model(model: ModelProto, path: Path, inline_limit: int | None = None) -> None:
    """Write a model; its weights go into ``NAME.data`` beside it above the limit. The model stays as it is.

    Args:
        model: With weights in memory, in files, or both. What lies in ``NAME.data`` already stays there.
        path: ``NAME``.
        inline_limit: Bytes of weights up to which there is one file; `INLINE_LIMIT` by default.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_name(path.name + ".data")
    tensors = model.graph.initializer
    beside = sum(map(size_of, tensors)) > (INLINE_LIMIT if inline_limit is None else inline_limit)
    written = _graph_alone(model)
    if beside:
        in_place = any(is_stored(tensor) and _place(tensor)[0] == str(data.absolute()) for tensor in tensors)
        with open(data, "ab" if in_place else "wb") as file:
            written.graph.initializer.extend(_put(tensor, data, file) for tensor in tensors)
    else:
        written.graph.initializer.extend(map(_in_memory, tensors))
    path.write_bytes(written.SerializeToString())


def with_weights_beside(model: Any, path: Path, inline_limit: int | None = None) -> ModelProto:
    """A model of onnx_ir as a graph; above the limit its weights are written to ``NAME.data`` without a copy in memory.

    Args:
        model: An ``onnx_ir.Model``, changed to read its weights from that file.
        path: ``NAME``, which is not written.
        inline_limit: Bytes of weights up to which they stay in the graph; `INLINE_LIMIT` by default.
    """
    import onnx_ir

    known = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    if sum(tensor.nbytes for tensor in known) > (INLINE_LIMIT if inline_limit is None else inline_limit):
        name = path.name + ".data"
        onnx_ir.external_data.unload_from_model(model, path.parent, name, size_threshold_bytes=SMALL)
    made: ModelProto = onnx_ir.to_proto(model)
    for tensor in made.graph.initializer:
        if is_stored(tensor):
            offset, length = _place(tensor)[1:]
            _refer(tensor, path.with_name(path.name + ".data"), offset, length)
    return made


# --- tensors ---------------------------------------------------------------------------------------------------------


def is_stored(tensor: TensorProto) -> bool:
    """Whether a tensor's bytes lie in a file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def values_of(tensor: TensorProto) -> Array:
    """A tensor's values; those that lie in a file are a read-only view of it, and cost memory when they are read."""
    if not is_stored(tensor):
        return numpy_helper.to_array(tensor)
    kind = np.dtype(tensor_dtype_to_np_dtype(tensor.data_type))
    return stored_bits(tensor).view(kind).reshape(tuple(tensor.dims))


def stored_bits(tensor: TensorProto) -> Array:
    """The bytes of a tensor, wherever they lie: one axis, uint8."""
    if not is_stored(tensor):
        if tensor.HasField("raw_data"):
            return np.frombuffer(tensor.raw_data, np.uint8)
        return np.ascontiguousarray(numpy_helper.to_array(tensor)).reshape(-1).view(np.uint8)
    location, offset, length = _place(tensor)
    if not length:
        return np.zeros(0, np.uint8)
    mapped: Array = np.memmap(location, np.uint8, "r", offset, (length,))
    if offset % _WIDEST:
        mapped = np.array(mapped)
    return _to_half(mapped.view(np.float32), tensor.data_type).view(np.uint8) if _is_deferred(tensor) else mapped


def size_of(tensor: TensorProto) -> int:
    """Bytes of a tensor's values."""
    if is_stored(tensor):
        return _place(tensor)[2] // (2 if _is_deferred(tensor) else 1)
    return math.prod(tensor.dims) * int(np.dtype(tensor_dtype_to_np_dtype(tensor.data_type)).itemsize)


def _is_large(tensor: TensorProto) -> bool:
    return tensor.data_type not in _NO_WHOLE_BYTES and size_of(tensor) > SMALL


def rounded(tensor: TensorProto, kind: int, name: str) -> TensorProto:
    """A float32 tensor in a 16-bit type, to the nearest, to even between two. One in a file is rounded when it is read.

    Args:
        tensor: The float32 tensor.
        kind: ONNX's number of float16 or bfloat16.
        name: Of the result.
    """
    made = TensorProto(name=name, data_type=kind, dims=tensor.dims)
    if is_stored(tensor):
        _refer(made, *_place(tensor))
        made.external_data.add(key=_ROUNDED_FROM, value="float32")
    else:
        made.raw_data = _to_half(np.ascontiguousarray(numpy_helper.to_array(tensor)), kind).tobytes()
    return made


def unrounded(tensor: TensorProto, name: str) -> TensorProto | None:
    """The float32 tensor in a file that another is rounded from when it is read; None for all others."""
    if not (is_stored(tensor) and _is_deferred(tensor)):
        return None
    made = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=tensor.dims)
    _refer(made, *_place(tensor))
    return made


def _to_half(values: Array, kind: int) -> Array:
    if kind == TensorProto.FLOAT16:
        with np.errstate(over="ignore"):  # overflows are for the judge to find
            return values.astype(np.float16)
    bits = values.view(np.uint32)
    made = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), made).astype(np.uint16)


def _is_deferred(tensor: TensorProto) -> bool:
    return any(entry.key == _ROUNDED_FROM for entry in tensor.external_data)


def _place(tensor: TensorProto) -> tuple[str, int, int]:
    """File, first byte and number of bytes of a tensor that lies in a file."""
    pairs = {entry.key: entry.value for entry in tensor.external_data}
    offset = int(pairs.get("offset", 0))
    length = int(pairs["length"]) if "length" in pairs else os.path.getsize(pairs["location"]) - offset
    return pairs["location"], offset, length


def _refer(tensor: TensorProto, location: Path | str, offset: int, length: int, absolute: bool = True) -> None:
    path = Path(location)
    where = {"location": str(path.absolute()) if absolute else path.name, "offset": offset, "length": length}
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in where.items():
        tensor.external_data.add(key=key, value=str(value))


def _in_memory(tensor: TensorProto) -> TensorProto:
    """A copy of a tensor that holds its values itself."""
    made = TensorProto()
    made.CopyFrom(tensor)
    if is_stored(tensor):
        del made.external_data[:]
        made.ClearField("data_location")
        made.raw_data = stored_bits(tensor).tobytes()
    return made


def _put(tensor: TensorProto, path: Path, file: Any) -> TensorProto:
    """A tensor as it stands in the file of the graph; appends the bytes of a large one to the file of the weights."""
    if not _is_large(tensor):
        return _in_memory(tensor)
    made = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    if is_stored(tensor) and _place(tensor)[0] == str(path.absolute()):
        _refer(made, path, *_place(tensor)[1:], absolute=False)
        return made
    file.write(b"\0" * (-file.tell() % _PAGE))  # whole pages can be mapped
    bits, start = stored_bits(tensor), file.tell()
    for first in range(0, len(bits), _CHUNK):
        file.write(bits[first : first + _CHUNK].data)
    _refer(made, path, start, len(bits), absolute=False)
    return made


# --- models ----------------------------------------------------------------------------------------------------------


def filled(model: ModelProto) -> ModelProto:
    """A copy with all its weights in memory, for libraries that change them there."""
    made = _graph_alone(model)
    for tensor in model.graph.initializer:
        made.graph.initializer.append(_in_memory(tensor))
    return made


def without_weights(model: ModelProto) -> tuple[ModelProto, dict[str, TensorProto], Path | None]:
    """A copy that holds no large tensor.

    Returns:
        The copy, in which those refer to files; the tensors that no file has as they are (they are in memory, or to be
        rounded), whose files do not exist; and the folder of the files of all others.
    """
    made, taken, folder = _graph_alone(model), dict[str, TensorProto](), None
    for tensor in model.graph.initializer:
        if not _is_large(tensor):
            made.graph.initializer.append(_in_memory(tensor))
            continue
        light = made.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        if is_stored(tensor) and not _is_deferred(tensor):
            location, offset, length = _place(tensor)
            if folder in (None, Path(location).parent):
                folder = Path(location).parent
                _refer(light, location, offset, length, absolute=False)
                continue
        taken[tensor.name] = tensor
        _refer(light, "absent", 0, size_of(tensor), absolute=False)
    return made, taken, folder


def infer_types(model: ModelProto) -> None:
    """Infer the types and shapes of all values, in place."""
    inferred = onnx.shape_inference.infer_shapes(without_weights(model)[0]).graph
    for field in ("value_info", "output"):
        found = getattr(model.graph, field)
        del found[:]
        found.extend(getattr(inferred, field))


def check_model(model: ModelProto) -> None:
    """Let ONNX check a model, its types and its shapes; large tensors stand as inputs of their type.

    Raises:
        Exception: What the checker and the inference raise.
    """
    light = without_weights(model)[0]
    known = {value.name for value in light.graph.input}
    small = []
    for tensor in light.graph.initializer:
        if not is_stored(tensor):
            small.append(_in_memory(tensor))
        elif tensor.name not in known:
            light.graph.input.append(make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    del light.graph.initializer[:]
    light.graph.initializer.extend(small)
    onnx.checker.check_model(light, full_check=True)


def _graph_alone(model: ModelProto) -> ModelProto:
    """A copy without initializers; the weights are never copied on the way."""
    made = ModelProto()
    _copy_fields(model.ListFields(), made, "graph")
    _copy_fields(model.graph.ListFields(), made.graph, "initializer")
    return made


def _copy_fields(fields: Iterable[tuple[Any, Any]], target: Any, but: str) -> None:
    for field, value in fields:
        if field.name == but:
            continue
        if isinstance(value, (str, bytes, int, float)):
            setattr(target, field.name, value)
        elif hasattr(value, "extend"):
            getattr(target, field.name).extend(value)
        else:
            getattr(target, field.name).CopyFrom(value)
