"""The manifest of an artifact: what lies in the folder, what built it, how near it is to the model it was made of.

An artifact is a folder with ``manifest.json``, the graph files, ``assets.npz`` and the files that are no graph. Reading
one trusts nothing: the schema, every path and every hash are checked before a file is opened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compressor.errors import ArtifactError
from compressor.runtimes.runtime import Array, TensorSpec

__all__ = [
    "ASSETS_FILE",
    "MANIFEST_FILE",
    "Assets",
    "DriverEntry",
    "Engine",
    "GraphEntry",
    "Island",
    "Manifest",
    "Parity",
    "check_relative_path",
    "hash_file",
    "read_assets",
    "read_manifest",
]

MANIFEST_FILE = "manifest.json"
ASSETS_FILE = "assets.npz"
SCHEMA_VERSION = 1
_MANIFEST_LIMIT = 256 * 2**20


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Engine(_Entry):
    """What really built the graphs, and runs them."""

    name: str
    """onnxruntime, openvino, tensorrt or tensorrt-rtx."""
    version: str
    """Version of the engine that built the files; "any" where the file is plain ONNX."""
    compute_capability: str | None = None
    """GPU that the engine was built for, e.g. "8.9"."""
    ahead_of_time: bool = False
    """Built without the GPU that it runs on."""


class Parity(_Entry):
    """How far the artifact's outputs are from the model's, on the same inputs."""

    output: str
    """The output that differs most."""
    max_absolute: float
    """Largest absolute difference of that output."""
    relative: float
    """That difference over the largest absolute value of the output."""
    tolerance: float
    """Largest ``relative`` that passes."""
    judged_by: str
    """What computed the artifact's outputs: the engine itself, or half arithmetic simulated on the CPU."""
    records: int
    """Number of recorded inputs compared."""


class Island(_Entry):
    """Operations of one layer that stay in float32 in a half-precision graph."""

    layer: str
    """Path of the module in the model; empty at the top."""
    operations: tuple[str, ...]
    """ONNX operators."""
    reason: Literal["kind", "angle", "asked", "overflow", "constant", "accuracy"]
    """kind: halves are known to be bad for it; angle: the argument of a sine or cosine; asked: the method said so;
    overflow: values near or past 65504 were measured; constant: a constant would vanish or overflow; accuracy: its half
    error was measured to be too large."""
    peak: float | None = None
    """Largest absolute value measured, where the reason is overflow."""


class GraphEntry(_Entry):
    """One graph."""

    file: str
    """Path inside the folder."""
    sha256: str
    """Hash of the file."""
    bytes: int
    """Size of the file and its data file."""
    data_file: str | None = None
    """Weights beside the file (OpenVINO's .bin, ONNX external data)."""
    data_sha256: str | None = None
    """Hash of the data file."""
    precision: str
    """Element type of the graph: fp32, fp16, bf16 or int8."""
    inputs: tuple[TensorSpec, ...]
    """Inputs; a string in a shape names a dynamic axis."""
    outputs: tuple[TensorSpec, ...]
    """Outputs."""
    opset: int
    """ONNX opset that it was exported with."""
    parity: tuple[Parity, ...] = ()
    """Differences from the model, one entry a judge."""
    fp32_islands: tuple[Island, ...] = ()
    """What stays in float32 in a half-precision graph."""


class DriverEntry(_Entry):
    """The loop around the graphs."""

    name: str
    """Module of ``compressor.runtimes.drivers``, or an entry point of ``compressor.drivers``."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """JSON settings."""


class Assets(_Entry):
    """What the driver reads."""

    file: str | None = None
    """The arrays (.npz), if there are any."""
    sha256: str | None = None
    """Hash of the file."""
    strings: dict[str, str] = Field(default_factory=dict)
    """The assets that are text."""


class Manifest(_Entry):
    """The content of ``manifest.json``."""

    schema_version: Literal[1] = 1
    """Version of this schema."""
    target: dict[str, Any]
    """The target, all keys resolved."""
    engine: Engine
    """What really built the graphs."""
    driver: DriverEntry
    """The loop around the graphs."""
    graphs: dict[str, GraphEntry]
    """The graphs by name."""
    assets: Assets = Field(default_factory=Assets)
    """What the driver reads."""
    files: dict[str, str] = Field(default_factory=dict)
    """Hash of every file that is no graph, by path inside the folder."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of the libraries that made the artifact."""
    notes: tuple[str, ...] = ()
    """What a reader should know, one sentence each."""
    runnable_here: bool = True
    """The artifact could be run on the machine that built it."""
    reason: str = ""
    """Why not, or what is special about it."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """What the caller adds: recipe, labels, figures."""

    @property
    def name(self) -> str:
        """Name of the target."""
        return str(self.target.get("name", ""))

    def paths(self) -> Iterator[tuple[str, str]]:
        """Every file of the artifact with its hash."""
        for graph in self.graphs.values():
            yield graph.file, graph.sha256
            if graph.data_file is not None:
                yield graph.data_file, graph.data_sha256 or ""
        if self.assets.file is not None:
            yield self.assets.file, self.assets.sha256 or ""
        yield from self.files.items()


def read_manifest(directory: Path | str, *, verify: bool = True) -> Manifest:
    """Read ``manifest.json`` of an artifact.

    Args:
        directory: The artifact's folder.
        verify: Also check the hash of every file.

    Raises:
        ArtifactError: Not an artifact, an unknown schema, a path that leaves the folder, a missing or changed file.
    """
    folder = Path(directory)
    path = folder / MANIFEST_FILE
    try:
        if path.stat().st_size > _MANIFEST_LIMIT:
            raise ArtifactError(f"{path} is larger than {_MANIFEST_LIMIT // 2**20} MB: it is not a manifest")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{folder} is not an artifact: cannot read {MANIFEST_FILE} ({error.strerror})") from error
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(f"{path} has schema {version!r}; this version reads {SCHEMA_VERSION}: export it again")
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"{path} is damaged: {where}: {first['msg']}") from error
    for name, sha256 in manifest.paths():
        file = check_relative_path(folder, name)
        if not file.is_file():
            raise ArtifactError(f"{folder} lacks {name}: export it again or copy the whole folder")
        if verify and hash_file(file) != sha256:
            raise ArtifactError(f"{file} differs from the manifest: it is damaged or was changed; export it again")
    return manifest


def check_relative_path(folder: Path, name: str) -> Path:
    """The path of ``name`` in ``folder``.

    Raises:
        ArtifactError: The name is absolute, leaves the folder, or goes through a link out of it.
    """
    pure = PurePosixPath(name)
    bad = not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or PureWindowsPath(name).drive
    path = folder / name
    if bad or not path.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{folder} names a file outside itself ({name!r}): do not use this artifact")
    return path


def read_assets(directory: Path, manifest: Manifest) -> dict[str, Array | str]:
    """The arrays and strings that the driver reads. Arrays of Python objects are refused: nothing is unpickled.

    Raises:
        ArtifactError: The file of arrays is damaged.
    """
    assets: dict[str, Array | str] = dict(manifest.assets.strings)
    if manifest.assets.file is None:
        return assets
    path = check_relative_path(directory, manifest.assets.file)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            assets.update({name: arrays[name] for name in arrays.files})
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    return assets


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
