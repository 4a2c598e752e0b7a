"""Nested states on disk: tensors as safetensors, the rest as JSON, in a directory that is whole or absent."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from compressor.atomic import atomic_directory
from compressor.errors import CheckpointError, CompressorError
from compressor.training.distributed import is_sharded

__all__ = ["describe", "load", "pack", "place_like", "save", "unpack", "write"]

_FORMAT = 1
_INDEX, _TENSORS = "checkpoint.json", "tensors.safetensors"


def save(directory: Path, value: Any, about: Mapping[str, Any] | None = None) -> None:
    """Write a nested value of tensors and JSON values: `pack`, then `write`."""
    write(directory, *pack(value), about=about)


def write(directory: Path, tree: Any, tensors: dict[str, Tensor], about: Mapping[str, Any] | None = None) -> None:
    """Write a packed value, atomically.

    Args:
        directory: Replaced if it exists.
        tree: First result of `pack`.
        tensors: Second result of `pack`.
        about: Small JSON values that `describe` reads without the tensors.

    Raises:
        CheckpointError: It cannot be written; what was there before is untouched.
    """
    try:
        with atomic_directory(directory) as temporary:
            data = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
            try:
                safetensors.torch.save_file(data, temporary / _TENSORS)
            except safetensors.SafetensorError as error:
                raise OSError(str(error)) from error
            checksum, size = _checksum(temporary / _TENSORS)
            body = json.dumps(tree, allow_nan=False)
            index = {
                "format": _FORMAT,
                "about": dict(about or {}),
                "tensors": {"bytes": size, "crc32": checksum},
                "tree_crc32": zlib.crc32(body.encode()),
                "tree": tree,
            }
            (temporary / _INDEX).write_text(json.dumps(index, allow_nan=False), encoding="utf-8")
            for name in (_TENSORS, _INDEX):
                with open(temporary / name, "rb") as file:
                    os.fsync(file.fileno())
    except CheckpointError:
        raise
    except CompressorError as error:
        advice = "what was saved before is intact: make room, then run the same command again"
        raise CheckpointError(f"{error}; {advice}") from error


def describe(directory: Path) -> dict[str, Any]:
    """Return what was said ``about`` a stored value.

    Raises:
        CheckpointError: The index is missing or damaged.
    """
    about: dict[str, Any] = _index(Path(directory))["about"]
    return about


def load(directory: Path) -> Any:
    """Return a stored value, bit for bit, its tensors on the CPU and in memory of their own.

    Raises:
        CheckpointError: A file is missing, truncated or damaged; the message names it.
    """
    directory = Path(directory)
    index = _index(directory)
    path = directory / _TENSORS
    try:
        found = _checksum(path)
        if found != (index["tensors"]["crc32"], index["tensors"]["bytes"]):
            raise CheckpointError(f"{path} is damaged (its contents are not those that were written)")
        tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}
        return unpack(index["tree"], tensors)
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({_one_line(error)})") from error


def _index(directory: Path) -> dict[str, Any]:
    path = directory / _INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != _FORMAT:
            raise CheckpointError(f"{path} has format {index['format']}, this version reads format {_FORMAT}")
        if zlib.crc32(json.dumps(index["tree"], allow_nan=False).encode()) != index["tree_crc32"]:
            raise CheckpointError(f"{path} is damaged (its contents are not those that were written)")
        return {"about": index["about"], "tree": index["tree"], "tensors": index["tensors"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({_one_line(error)})") from error


def _checksum(path: Path) -> tuple[int, int]:
    checksum, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return checksum, size


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def pack(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split a nested value into a JSON tree and tensors by name.

    Dicts (any keys), lists, tuples, tensors, numpy arrays and numbers, strings, numbers, booleans and None come back
    from `unpack` as they were; tensors that are the same memory are stored once. A sharded tensor is gathered whole,
    so with sharded states all processes must call this.

    Raises:
        CheckpointError: Something else is in it; the message names the place.
    """
    tensors: dict[str, Tensor] = {}
    known: dict[tuple[Any, ...], str] = {}
    return _pack(value, "", tensors, known), tensors


def _pack(value: Any, where: str, tensors: dict[str, Tensor], known: dict[tuple[Any, ...], str]) -> Any:
    def inner(item: Any, name: Any) -> Any:
        return _pack(item, f"{where}.{name}" if where else str(name), tensors, known)

    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, Tensor):
        return _pack_tensor(value, where, tensors, known)
    if isinstance(value, np.ndarray):
        return {"$array": _pack_tensor(_from_numpy(value, where), where, tensors, known)}
    if isinstance(value, np.generic):
        return _pack(value.item(), where, tensors, known)
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: inner(item, key) for key, item in value.items()}
        return {"$items": [[inner(key, "key"), inner(item, key)] for key, item in value.items()]}
    if isinstance(value, list):
        return [inner(item, number) for number, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [inner(item, number) for number, item in enumerate(value)]}
    raise CheckpointError(f"a state may hold tensors and JSON values, but {where or 'it'} is a {type(value).__name__}")


def _pack_tensor(value: Tensor, where: str, tensors: dict[str, Tensor], known: dict[tuple[Any, ...], str]) -> Any:
    tensor = value.detach()
    if is_sharded(tensor):
        tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise CheckpointError(f"a state may hold dense tensors only, but {where} is {tensor.layout}")
    if tensor.is_complex():
        return {"$complex": _pack_tensor(torch.view_as_real(tensor.resolve_conj()), where, tensors, known)}
    memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
    if tensor.numel() and memory in known:
        return {"$tensor": known[memory]}
    name, number = where or "value", 1
    while name in tensors:
        number += 1
        name = f"{where}#{number}"
    tensors[name] = tensor if _owns_memory(tensor, tensors) else tensor.clone(memory_format=torch.contiguous_format)
    known[memory] = name
    return {"$tensor": name}


def _owns_memory(tensor: Tensor, others: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is all of its storage, alone: the file format refuses views of shared memory."""
    storage = tensor.untyped_storage()
    if not tensor.is_contiguous() or storage.nbytes() != tensor.numel() * tensor.element_size():
        return False
    return all(other.untyped_storage().data_ptr() != storage.data_ptr() for other in others.values())


def _from_numpy(value: np.ndarray[Any, Any], where: str) -> Tensor:
    try:
        return torch.from_numpy(np.array(value, order="C"))
    except TypeError as error:
        raise CheckpointError(f"an array of type {value.dtype} cannot be stored: {where}") from error


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put together what `pack` took apart."""
    if isinstance(tree, list):
        return [unpack(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        (mark, content), *_ = tree.items()
        if mark in _MARKS:
            return _MARKS[mark](content, tensors)
    return {key: unpack(item, tensors) for key, item in tree.items()}


_MARKS: dict[str, Callable[[Any, Mapping[str, Tensor]], Any]] = {
    "$tensor": lambda content, tensors: tensors[content],
    "$array": lambda content, tensors: unpack(content, tensors).numpy(),
    "$complex": lambda content, tensors: torch.view_as_complex(unpack(content, tensors)),
    "$float": lambda content, tensors: float(content),
    "$tuple": lambda content, tensors: tuple(unpack(item, tensors) for item in content),
    "$items": lambda content, tensors: {unpack(key, tensors): unpack(item, tensors) for key, item in content},
}


def place_like(value: Any, like: Any) -> Any:
    """Shard the tensors of a loaded value as those of ``like`` are; anything else passes as it is."""
    if isinstance(value, Tensor) and isinstance(like, Tensor) and is_sharded(like):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]
    if isinstance(value, dict) and isinstance(like, Mapping):
        return {key: place_like(item, like.get(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and isinstance(like, (list, tuple)) and len(value) == len(like):
        return type(value)(place_like(item, other) for item, other in zip(value, like, strict=True))
    return value
