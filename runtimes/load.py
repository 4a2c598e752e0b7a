"""Open a bundle or an artifact: read and check its manifest, load its graphs, build the driver around them."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import math
import pkgutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from compressor.errors import ArtifactError, CompressorError, RequestError, TargetError, nearest
from compressor.runtimes.bundle import unpack
from compressor.runtimes.loaded_model import DRIVER_FAULTS, LoadedModel
from compressor.runtimes.manifest import (
    MANIFEST_FILE,
    GraphEntry,
    Manifest,
    check_relative_path,
    read_assets,
    read_manifest,
)
from compressor.runtimes.runtime import Array, Driver, Runtime

__all__ = ["Named", "driver_class", "driver_names", "load", "load_graphs", "open_graph", "runtime_options"]

_DRIVER_GROUP = "compressor.drivers"
_LARGEST_PORT = 2**28
"""Elements that the fixed sizes of one input or output of a driver may ask for."""


def open_graph(path: Path | str, runtime: str, options: Mapping[str, Any] | None = None) -> Runtime:
    """Load one graph file.

    Args:
        path: ``.onnx``, ``.xml`` or ``.engine``.
        runtime: "onnxruntime", "openvino", "tensorrt" or "tensorrt-rtx".
        options: ``device`` and ``threads`` mean the same for all; the rest is in the runtime's own class.

    Raises:
        RequestError: No such runtime.
        TargetError: The engine is missing or cannot load the file; the message says why.
    """
    if runtime == "onnxruntime":
        from compressor.runtimes.onnxruntime import OnnxRuntime

        return OnnxRuntime(path, options)
    if runtime == "openvino":
        from compressor.runtimes.openvino import OpenVino

        return OpenVino(path, options)
    if runtime in ("tensorrt", "tensorrt-rtx"):
        from compressor.runtimes.tensorrt import TensorRt

        return TensorRt(path, {**(options or {}), "engine": runtime})
    known = ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx")
    raise RequestError(f"no runtime {runtime!r}: {nearest(runtime, known)}")


def load(path: Path | str, options: Mapping[str, Any] | None = None) -> LoadedModel:
    """Load a bundle or an artifact, ready to call.

    Args:
        path: A bundle (.zip), or an artifact's folder. A bundle is unpacked to a private temporary folder while the
            engine reads it.
        options: Replace the target's own: ``threads``, ``device``, ``providers``, ...

    Raises:
        ArtifactError: It is damaged or changed.
        TargetError: Its engine does not run here; the message says why.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / MANIFEST_FILE).is_file() and (path / "artifacts").is_dir():
            raise RequestError(f"{path} is a run: load one of the folders in {path / 'artifacts'}, or a bundle of it")
        return _load_folder(path, read_manifest(path), options)
    with unpack(path) as (folder, manifest):
        try:
            return _load_folder(folder, manifest, options)
        except CompressorError as error:  # the folder will be gone; what the user has is the bundle
            raise type(error)(str(error).replace(str(folder), str(path))) from error


def _load_folder(folder: Path, manifest: Manifest, options: Mapping[str, Any] | None) -> LoadedModel:
    name, opened = manifest.driver.name, ExitStack()
    driver = driver_class(name)
    assets = read_assets(folder, manifest)
    try:
        graphs = load_graphs(folder, manifest, options)
        for graph in graphs.values():
            opened.callback(graph.close)
        built = driver(graphs, manifest.driver.settings, assets)
        _check_ports(built)
        return LoadedModel(built, manifest, opened.close)
    except DRIVER_FAULTS as error:
        opened.close()
        reason = ("misses " if isinstance(error, KeyError) else "cannot use ") + " ".join(str(error).split())[:200]
        raise ArtifactError(f"{folder}: the driver {name!r} {reason} in the artifact") from error


def _check_ports(driver: Driver) -> None:
    for port in (*driver.inputs, *driver.outputs):
        fixed = [size for size in port.shape if not isinstance(size, str)]
        if any(size < 1 for size in fixed) or math.prod(fixed) > _LARGEST_PORT:
            raise ValueError(f"the shape {tuple(port.shape)} of {port.name!r}")


def load_graphs(folder: Path, manifest: Manifest, options: Mapping[str, Any] | None = None) -> dict[str, Named]:
    """Load every graph of an artifact, by name."""
    merged = {**runtime_options(manifest.target), **(options or {})}
    graphs = {}
    for name, entry in manifest.graphs.items():
        path = check_relative_path(folder, entry.file)
        graphs[name] = Named(open_graph(path, manifest.engine.name, merged), entry)
    return graphs


def runtime_options(target: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a resolved target (its JSON form) as `open_graph` takes them."""
    options = dict(target.get("options") or {})
    options["device"] = target.get("device", "cpu")
    if target.get("runtime") == "openvino" and not options.get("inference_precision"):
        options["inference_precision"] = {"fp16": "f16", "bf16": "bf16"}.get(str(target.get("precision")), "f32")
    return options


class Named:
    """A runtime whose tensors carry the names and shapes of the manifest; engines forget the names of dynamic axes.

    Args:
        runtime: The loaded graph.
        entry: Its description.
    """

    def __init__(self, runtime: Runtime, entry: GraphEntry) -> None:
        self.runtime, self.inputs, self.outputs = runtime, entry.inputs, entry.outputs
        unknown = [spec.name for spec in runtime.inputs if spec.name not in {given.name for given in entry.inputs}]
        if unknown or len(runtime.outputs) != len(entry.outputs):
            raise ArtifactError(f"{entry.file} has other inputs or outputs than its manifest says: export it again")

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        given = self.runtime(inputs)
        if set(given) == {spec.name for spec in self.outputs}:
            return given
        return {spec.name: given[own.name] for spec, own in zip(self.outputs, self.runtime.outputs, strict=True)}

    def close(self) -> None:
        """Free the graph."""
        self.runtime.close()


def driver_names() -> list[str]:
    """Names of all drivers: the modules of `compressor.runtimes.drivers` and the installed ones."""
    import compressor.runtimes.drivers as package

    own = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return sorted({*own, *(entry.name for entry in importlib.metadata.entry_points(group=_DRIVER_GROUP))})


def driver_class(name: str) -> type[Driver]:
    """The class of a driver: the ``DRIVER`` of its module, or an entry point of ``compressor.drivers``.

    Raises:
        RequestError: No such driver.
        TargetError: An installed driver cannot be imported.
    """
    module = f"compressor.runtimes.drivers.{name}"
    if name.isidentifier() and importlib.util.find_spec(module) is not None:
        found: type[Driver] | None = getattr(importlib.import_module(module), "DRIVER", None)
        if found is not None:
            return found
    for entry in importlib.metadata.entry_points(group=_DRIVER_GROUP):
        if entry.name == name:
            try:
                loaded: type[Driver] = entry.load()
            except Exception as error:  # a third party's code may fail in any way
                raise TargetError(f"the driver {name!r} of {entry.value} cannot be loaded: {error}") from error
            return loaded
    raise RequestError(f"no driver {name!r}: {nearest(name, driver_names())}")
