"""A hash of all that an exported graph depends on, so that one export serves every target and every later run."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressor.deployable import Graph
from compressor.exporters.onnx_graph import OPSET
from compressor.runtimes.runtime import Array
from compressor.versions import installed_versions

__all__ = ["graph_fingerprint", "records_fingerprint"]

_Seen = dict[int, tuple[bytes, Any]]
"""Hashes of the objects met so far, by identity; holding the objects keeps their identities from being reused."""

_LIBRARIES = ("torch", "onnx", "onnxscript", "torchvision", "timm", "diffusers", "transformers")


def graph_fingerprint(graph: Graph) -> str:
    """Hash the weights, the structure, the plain attributes and the code of a graph's module, and its interface."""
    digest = hashlib.sha256()
    interface = {
        "inputs": {name: (list(value.shape), str(value.dtype)) for name, value in graph.inputs.items()},
        "outputs": graph.outputs,
        "dynamic": {name: sorted(axes.items()) for name, axes in graph.dynamic.items()},
        "opset": OPSET,
        "versions": installed_versions(_LIBRARIES),
        "code": _package_code(),
    }
    digest.update(json.dumps(interface).encode())
    seen: _Seen = {}
    for path, part in graph.module.named_modules(remove_duplicate=False):
        digest.update(f"{path}:{type(part).__module__}.{type(part).__qualname__}:{_source(type(part))}".encode())
        for name, value in sorted(vars(part).items()):
            if name not in ("training", "_modules"):
                digest.update(name.encode())
                _add(digest, value, seen)
    return digest.hexdigest()[:32]


def records_fingerprint(records: Sequence[Mapping[str, Array]], keep_fp32: Sequence[str]) -> str:
    """Hash what the search for float32 islands depends on besides the graph."""
    digest = hashlib.sha256(json.dumps(list(keep_fp32)).encode())
    for record in records:
        for name, array in record.items():
            digest.update(f"{name}{array.shape}{array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


def _add(digest: Any, value: Any, seen: _Seen) -> None:
    """Hash a value by its content; objects by their class and attributes, whether shared or not."""
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        digest.update(repr(value).encode())
    else:
        if id(value) not in seen:
            seen[id(value)] = (b"itself", value)
            own = hashlib.sha256()
            _add_object(own, value, seen)
            seen[id(value)] = (own.digest(), value)
        digest.update(seen[id(value)][0])


def _add_object(digest: Any, value: Any, seen: _Seen) -> None:
    digest.update(f"{type(value).__module__}.{type(value).__qualname__}".encode())
    if isinstance(value, Mapping):
        for key, item in value.items():
            digest.update(repr(key).encode())
            _add(digest, item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _add(digest, item, seen)
    elif isinstance(value, (set, frozenset)):
        digest.update(repr(sorted(map(repr, value))).encode())
    elif isinstance(value, types.FunctionType):
        digest.update(value.__code__.co_code + repr(value.__code__.co_names).encode())
        constants = [item for item in value.__code__.co_consts if not isinstance(item, types.CodeType)]
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        for item in (constants, value.__defaults__, cells):
            _add(digest, item, seen)
    elif isinstance(value, types.MethodType):
        _add(digest, value.__func__, seen)
        _add(digest, value.__self__, seen)
    elif isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
        digest.update(getattr(value, "__qualname__", getattr(value, "__name__", "")).encode())
    elif isinstance(value, functools.partial):
        for item in (value.func, value.args, value.keywords):
            _add(digest, item, seen)
    elif isinstance(value, torch.nn.Module):
        for item in (value.state_dict(), {k: v for k, v in vars(value).items() if not k.startswith("_")}):
            _add(digest, item, seen)
    elif hasattr(value, "__dict__"):
        digest.update(_source(type(value)).encode())
        _add(digest, vars(value), seen)


@functools.cache
def _package_code() -> str:
    """Hash of this package's own sources: the modules of the deployables and the exporter itself."""
    digest = hashlib.sha256()
    for name in ("compressor", "compressor.methods", "compressor.exporters"):
        for folder in importlib.import_module(name).__path__:
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _source(kind: type) -> str:
    """Hash of the file that defines a class; empty for what has no source."""
    try:
        return _file_hash(inspect.getfile(kind))
    except (OSError, TypeError):
        return ""


@functools.cache
def _file_hash(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
