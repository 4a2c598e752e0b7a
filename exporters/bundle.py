"""Write a bundle: one zip with the files of an artifact and a manifest that describes and protects them.

The same artifact gives the same bytes: entries are in order, without times or owners.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import stat
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.atomic import atomic_path
from compressor.errors import ArtifactError, RequestError
from compressor.runtimes.bundle import check_bundle, file_options
from compressor.runtimes.file_names import name_problem
from compressor.runtimes.load import driver_class
from compressor.runtimes.manifest import (
    MANIFEST_FILE,
    BundleFacts,
    GraphEntry,
    Manifest,
    check_relative_path,
    read_assets,
    read_manifest,
)
from compressor.runtimes.runtime import Array
from compressor.runtimes.zip_reader import LIMITS

__all__ = ["write_bundle"]

_CHUNK = 2**20
_TRIED = 256 * 2**20
"""Larger files are weights, which hardly shrink: they are stored without trying."""
_EARLIEST = (1980, 1, 1, 0, 0, 0)
_MODE = (stat.S_IFREG | 0o644) << 16


def write_bundle(
    artifact: Path,
    path: Path,
    *,
    metrics: Mapping[str, Mapping[str, float | None]] | None = None,
    licence: str = "",
) -> Manifest:
    """Write an artifact's folder as one file that appears whole or not at all, and read it back.

    Args:
        artifact: The folder.
        path: The bundle, ``NAME.zip``; replaced if it is there.
        metrics: Figures by model: "teacher", "student", "engine".
        licence: What is known of the licences of teacher and data.

    Returns:
        The manifest in the bundle.

    Raises:
        ArtifactError: The artifact is damaged, or a graph keeps weights in a file that it does not list.
        RequestError: The bundle's name is not that of a zip.
    """
    artifact, path = Path(artifact), Path(path)
    if path.suffix.lower() != ".zip":
        raise RequestError(f"a bundle is called NAME.zip, got {path.name}")
    manifest = _described(artifact, read_manifest(artifact), metrics or {}, licence)
    hashes = dict(sorted(manifest.paths()))
    bad = next((name for name in hashes if name_problem(name)), None)
    if bad is not None:
        raise ArtifactError(f"{artifact}: the name {bad!r} {name_problem(bad)}: rename the file")
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    with atomic_path(path) as temporary:
        with zipfile.ZipFile(temporary, "w") as archive:
            with archive.open(_entry(MANIFEST_FILE, zipfile.ZIP_DEFLATED), "w") as file:
                file.write(text.encode())
            for name, expected in hashes.items():
                _add(archive, check_relative_path(artifact, name), name, expected)
        return check_bundle(temporary)


def _entry(name: str, packing: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EARLIEST)
    entry.compress_type, entry.external_attr, entry.create_system = packing, _MODE, 3
    return entry


def _add(archive: zipfile.ZipFile, source: Path, name: str, expected: str) -> None:
    digest = hashlib.sha256()
    large = source.stat().st_size > zipfile.ZIP64_LIMIT // 2
    with open(source, "rb") as file, archive.open(_entry(name, _packing(source)), "w", force_zip64=large) as out:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            out.write(chunk)
    if digest.hexdigest() != expected:
        raise ArtifactError(f"{source} changed while it was bundled: bundle it again when nobody works on it")


def _packing(source: Path) -> int:
    """Deflated where that saves a twentieth, and not so much that it looks like a zip bomb."""
    size = source.stat().st_size
    if size > _TRIED:
        return zipfile.ZIP_STORED
    compressor, packed = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, -zlib.MAX_WBITS), 0
    with open(source, "rb") as file:
        while chunk := file.read(_CHUNK):
            packed += len(compressor.compress(chunk))
    packed += len(compressor.flush())
    worth = size / LIMITS.ratio * 2 < packed < size * 0.95
    return zipfile.ZIP_DEFLATED if worth else zipfile.ZIP_STORED


# --- what it says ----------------------------------------------------------------------------------------------------


def _described(
    artifact: Path, manifest: Manifest, metrics: Mapping[str, Mapping[str, float | None]], licence: str
) -> Manifest:
    """The artifact's manifest with what an app that has only the bundle wants to know."""
    driver = driver_class(manifest.driver.name)
    graphs = {name: _Described(entry) for name, entry in manifest.graphs.items()}
    try:
        built = driver(graphs, manifest.driver.settings, read_assets(artifact, manifest))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{artifact}: its driver {manifest.driver.name!r} does not fit it ({reason})") from error
    labels = manifest.driver.settings.get("labels")
    facts = BundleFacts(
        inputs=built.inputs,
        outputs=built.outputs,
        processing=inspect.getdoc(driver) or "",
        labels=tuple(map(str, labels)) if isinstance(labels, list) else (),
        metrics={name: dict(figures) for name, figures in metrics.items()},
        licence=licence,
    )
    target, dropped = _without_files(manifest.target)
    notes = manifest.notes
    if dropped:
        notes = (*notes, f"Engine options that name files of the building machine were left out: {', '.join(dropped)}.")
    return manifest.model_copy(update={"bundle": facts, "target": target, "notes": notes})


class _Described:
    """A graph that is described but not loaded: drivers may look at it while they are built, not call it."""

    def __init__(self, entry: GraphEntry) -> None:
        self.inputs, self.outputs = entry.inputs, entry.outputs

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        raise TypeError("a driver may not run its graphs while it is built")


def _without_files(target: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The target without engine options that name files, and their names."""
    dropped = file_options(target)
    if not dropped:
        return dict(target), []
    options = dict(target["options"])
    for section in ("properties", "provider_options"):
        options[section] = _kept(options.get(section) or {})
    return {**target, "options": options}, dropped


def _kept(values: Mapping[str, Any]) -> dict[str, Any]:
    inside = {key: _kept(value) if isinstance(value, dict) else value for key, value in values.items()}
    alone = {key: {"options": {"properties": {key: value}}} for key, value in inside.items()}
    return {key: value for key, value in inside.items() if not file_options(alone[key])}
