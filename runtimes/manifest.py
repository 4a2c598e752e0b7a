"""The manifest of an artifact: what lies in the folder, what built it, how near it is to the model it was made of.

An artifact is a folder with ``manifest.json``, the graph files, ``assets.npz`` and the files that are no graph. Reading
one trusts nothing: the schema, every path and every hash are checked before a file is opened.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compressor.errors import ArtifactError
from compressor.runtimes.arrays import read_arrays
from compressor.runtimes.file_names import clashing_names, name_problem
from compressor.runtimes.onnx_references import external_references
from compressor.runtimes.plain_json import LARGEST_JSON, parse_json
from compressor.runtimes.runtime import Array, Port, TensorSpec

__all__ = [
    "ASSETS_FILE",
    "MANIFEST_FILE",
    "Assets",
    "BundleFacts",
    "DriverEntry",
    "Engine",
    "FloatOperators",
    "GraphEntry",
    "Island",
    "Manifest",
    "Parity",
    "Quantization",
    "check_references",
    "check_relative_path",
    "hash_file",
    "parse_manifest",
    "read_assets",
    "read_manifest",
]

MANIFEST_FILE = "manifest.json"
ASSETS_FILE = "assets.npz"
SCHEMA_VERSION = 1
_DTYPES = frozenset(
    {"bool", "float16", "float32", "float64", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}
)
_LARGEST_TENSOR = 2**32
"""Elements that the fixed sizes of one input or output may ask for."""
_MOST_AXES = 16
_LONGEST_NAME = 200
_SUFFIXES = {"onnxruntime": (".onnx",), "openvino": (".xml", ".onnx")}
"""Names by which an engine takes a file for what it is here; by others it may be taken for another format."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Engine(_Entry):
    """What really built the graphs, and runs them."""

    name: str = Field(max_length=_LONGEST_NAME)
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


class FloatOperators(_Entry):
    """Operators of one kind that an 8-bit graph computes in float, for one reason."""

    operator: str
    """ONNX operator."""
    count: int
    """Number of them."""
    reason: Literal["accuracy", "excluded", "activations", "bias", "kernel", "between"]
    """accuracy: they cost too much of it; excluded: the target's ``calibration.exclude`` names them; activations: a
    product of two activations; bias: a bias that is computed; kernel: the engine has no 8-bit kernel for it, or did not
    use it here; between: no product, and not between two of them."""
    layers: tuple[str, ...] = ()
    """Where they are, for those that went back for their accuracy or were excluded."""


class Quantization(_Entry):
    """How an 8-bit graph was made and what it costs."""

    by: str
    """The quantiser."""
    method: str
    """How ranges were chosen: minmax, entropy or percentile."""
    samples: int
    """Recorded inputs that the ranges come from, counted by sample."""
    per_channel: bool
    """Whether each output channel of a weight has its own scale."""
    operators: dict[str, int]
    """Operators that compute in eight bits, by kind."""
    float_operators: tuple[FloatOperators, ...] = ()
    """Operators that stay in float."""
    kernels: dict[str, int] = Field(default_factory=dict)
    """8-bit kernels that the engine really chose on the machine that built it, where that can be asked."""
    drop: float | None = None
    """What the graph loses of the task's figures; None where they were not judged."""
    blind_drop: float | None = None
    """The same with all operators in eight bits."""
    error: float
    """Root-mean-square difference of the worst output over its root mean square."""
    blind_error: float
    """The same with all operators in eight bits."""
    limit: float
    """Largest ``drop`` (or ``error``, where nothing was judged) that was allowed."""
    judged_by: str
    """What computed the graph while operators were chosen."""


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
    """Element type of the graph: fp32, fp16, bf16, int8 or fp8."""
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
    quantization: Quantization | None = None
    """How an 8-bit graph was made."""


class DriverEntry(_Entry):
    """The loop around the graphs."""

    name: str = Field(max_length=_LONGEST_NAME)
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


class BundleFacts(_Entry):
    """What a bundle says beside its artifact, for people and for apps that are not ours."""

    inputs: tuple[Port, ...] = ()
    """What the driver takes."""
    outputs: tuple[Port, ...] = ()
    """What the driver gives."""
    processing: str = ""
    """What happens before and behind the graphs, with the meaning of the driver's settings."""
    labels: tuple[str, ...] = ()
    """Names of the classes, or of the conditions."""
    metrics: dict[str, dict[str, float | None]] = Field(default_factory=dict)
    """Figures measured on the test data: of the teacher, of the student in PyTorch, of this artifact."""
    licence: str = ""
    """What is known of the licences of teacher and data."""


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
    """What the caller adds: the recipe, the artifact's name in its run."""
    bundle: BundleFacts | None = None
    """In a bundle only."""

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
        if not path.is_file():
            raise ArtifactError(f"{folder} is not an artifact: it has no {MANIFEST_FILE}")
        with open(path, "rb") as file:
            data = file.read(LARGEST_JSON + 1)
    except OSError as error:
        raise ArtifactError(f"{folder} is not an artifact: cannot read {MANIFEST_FILE} ({error.strerror})") from error
    manifest = parse_manifest(data, path)
    for name, sha256 in manifest.paths():
        file_path = check_relative_path(folder, name)
        if not file_path.is_file():
            raise ArtifactError(f"{folder} lacks {name}: export it again or copy the whole folder")
        if verify and hash_file(file_path) != sha256:
            raise ArtifactError(f"{file_path} differs from the manifest: it is damaged or was changed; export it again")
    if verify:
        check_references(folder, manifest)
    return manifest


def parse_manifest(data: bytes, path: Path) -> Manifest:
    """The manifest in a file's bytes.

    Raises:
        ArtifactError: It is damaged, of another schema, or describes what cannot be.
    """
    try:
        values = parse_json(data)
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        shown = repr(version)[:40]
        raise ArtifactError(f"{path} has schema {shown}; this version reads {SCHEMA_VERSION}: export it again")
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"{path} is damaged: {where[:200]}: {first['msg']}") from error
    for name, graph in manifest.graphs.items():
        for spec in (*graph.inputs, *graph.outputs):
            problem = _tensor_problem(spec)
            if problem:
                raise ArtifactError(f"{path} is damaged: graphs.{name}: {spec.name[:80]!r} {problem}")
    clash = clashing_names(dict.fromkeys(name for name, _ in manifest.paths()))
    if clash is not None:
        raise ArtifactError(f"{path} is damaged: {clash[0]!r} and {clash[1]!r} are one file on some systems")
    return manifest


def _tensor_problem(spec: TensorSpec) -> str:
    fixed = [size for size in spec.shape if isinstance(size, int)]
    if spec.dtype not in _DTYPES:
        return f"has the unknown element type {spec.dtype[:40]!r}"
    if len(spec.shape) > _MOST_AXES or any(size < 0 for size in fixed) or math.prod(fixed) > _LARGEST_TENSOR:
        return "has a shape that no engine takes"
    return ""


def check_references(folder: Path, manifest: Manifest) -> None:
    """Refuse ONNX files that refer to bytes outside the files that the manifest lists.

    Raises:
        ArtifactError: A reference to a file that is not listed or to bytes that it does not have, or a file whose name
            does not say what it is.
    """
    listed = {name for name, _ in manifest.paths()}
    suffixes = _SUFFIXES.get(manifest.engine.name, ())
    for graph in manifest.graphs.values():
        if suffixes and not graph.file.endswith(suffixes):
            raise ArtifactError(f"{folder / graph.file} is no file for {manifest.engine.name}: {' or '.join(suffixes)}")
        if not graph.file.endswith(".onnx"):
            continue
        for reference in external_references(check_relative_path(folder, graph.file)):
            beside = graph.file.rpartition("/")[0]
            name = f"{beside}/{reference.location}" if beside else reference.location
            if name_problem(reference.location) or name not in listed:
                shown = reference.location[:80]
                raise ArtifactError(
                    f"{folder / graph.file} keeps weights in another file ({shown!r}) that the manifest does not list: "
                    "export it again, or save the model in one file"
                )
            if reference.offset + reference.length > (folder / name).stat().st_size:
                raise ArtifactError(f"{folder / name} is shorter than {graph.file} says: it is damaged")


def check_relative_path(folder: Path, name: str) -> Path:
    """The path of ``name`` in ``folder``.

    Raises:
        ArtifactError: The name is absolute, leaves the folder, goes through a link out of it, or is no file name on
            some system.
    """
    path = folder / name
    if name_problem(name) or not path.resolve().is_relative_to(folder.resolve()):
        reason = name_problem(name) or "leads out of it"
        raise ArtifactError(f"{folder} names a file outside itself ({name[:80]!r} {reason}): do not use this artifact")
    return path


def read_assets(directory: Path, manifest: Manifest) -> dict[str, Array | str]:
    """The arrays and strings that the driver reads. Arrays of Python objects are refused: nothing is unpickled.

    Raises:
        ArtifactError: The file of arrays is damaged.
    """
    assets: dict[str, Array | str] = dict(manifest.assets.strings)
    if manifest.assets.file is None:
        return assets
    return {**assets, **read_arrays(check_relative_path(directory, manifest.assets.file))}


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
