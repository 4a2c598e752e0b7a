"""Read a bundle: one zip with the files of an artifact and their manifest. Nothing in it is trusted.

Names, sizes and places are checked before anything is unpacked, every byte is hashed while it is, and an engine sees a
file only after its hash is right. Hashes show that a file is the one that the manifest was written for; they do not
show who wrote both. A graph is given to its engine as it is, and a TensorRT plan holds code for the GPU: load bundles
of people whom you trust.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compressor.errors import ArtifactError, TargetError
from compressor.runtimes.manifest import MANIFEST_FILE, Manifest, check_references, parse_manifest
from compressor.runtimes.plain_json import LARGEST_JSON
from compressor.runtimes.zip_reader import LIMITS, Limits, ZipReader

__all__ = ["check_bundle", "file_options", "read_bundle", "unpack"]

_SPARE = 64 * 2**20
_MOST_THREADS = 1024
_ABOUT_FILES = re.compile(r"path|dir|file|cache|lib|plugin|config|dump|log|prefix", re.IGNORECASE)


def read_bundle(path: Path | str, limits: Limits = LIMITS) -> Manifest:
    """The manifest of a bundle; its files are listed right, but not read.

    Raises:
        ArtifactError: It is no bundle, damaged, or was tampered with.
    """
    with ZipReader(Path(path), limits) as archive:
        return _manifest(archive)


def check_bundle(path: Path | str, limits: Limits = LIMITS) -> Manifest:
    """The manifest of a bundle after all its files were read and found to be what it says; nothing is written.

    Raises:
        ArtifactError: It is no bundle, damaged, or was tampered with.
    """
    with ZipReader(Path(path), limits) as archive:
        manifest = _manifest(archive)
        for name, expected in _hashes(archive, manifest).items():
            digest = hashlib.sha256()
            for chunk in archive.chunks(name):
                digest.update(chunk)
            _compare(archive, name, digest.hexdigest(), expected)
    return manifest


@contextmanager
def unpack(path: Path | str, limits: Limits = LIMITS) -> Iterator[tuple[Path, Manifest]]:
    """Unpack a bundle into a folder of its own, which nobody else can enter and which is removed behind the block.

    Raises:
        ArtifactError: It is no bundle, damaged, or was tampered with; then nothing stays on the disk.
        TargetError: There is no room for it.
    """
    with ZipReader(Path(path), limits) as archive:
        manifest = _manifest(archive)
        hashes = _hashes(archive, manifest)
        total = sum(archive.entries[name].size for name in hashes)
        with tempfile.TemporaryDirectory(prefix="compressor-bundle-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            free = shutil.disk_usage(folder).free
            if total + _SPARE > free:
                raise TargetError(f"{path} unpacks to {total / 2**20:.0f} MB, {folder.parent} has {free / 2**20:.0f}")
            try:
                for file, expected in hashes.items():
                    _write(archive, file, expected, folder)
            except OSError as error:
                raise TargetError(f"cannot unpack {path} to {folder}: {error.strerror or error}") from error
            try:
                check_references(folder, manifest)
            except ArtifactError as error:  # the folder will be gone; what the user has is the bundle
                raise ArtifactError(str(error).replace(str(folder), str(path))) from error
            yield folder, manifest


def _manifest(archive: ZipReader) -> Manifest:
    if MANIFEST_FILE not in archive.entries:
        raise ArtifactError(f"{archive.path} is no bundle: it has no {MANIFEST_FILE}")
    where = archive.path / MANIFEST_FILE
    manifest = parse_manifest(archive.read(MANIFEST_FILE, LARGEST_JSON), where)
    threads = (manifest.target.get("options") or {}).get("threads") if _has_options(manifest, where) else None
    if threads is not None and not (isinstance(threads, int) and 0 <= threads <= _MOST_THREADS):
        raise ArtifactError(f"{where} is damaged: options.threads must be 0 to {_MOST_THREADS}")
    named = file_options(manifest.target)
    if named:
        raise ArtifactError(
            f"{where} sets engine options that name files ({', '.join(named)}), which a bundle may not: "
            "leave them out, and give your own to load(path, options)"
        )
    return manifest


def _has_options(manifest: Manifest, where: Path) -> bool:
    options = manifest.target.get("options") or {}
    inside = [options.get(key) for key in ("properties", "provider_options")] if isinstance(options, dict) else [0]
    if any(value is not None and not isinstance(value, dict) for value in inside):
        raise ArtifactError(f"{where} is damaged: target.options is not what a target has")
    return True


def file_options(target: Mapping[str, Any]) -> list[str]:
    """Engine options of a target that name files or folders: a cache to write, a library to load."""
    found: list[str] = []
    options = target.get("options") or {}
    level = [(key, options.get(key)) for key in ("properties", "provider_options")]
    while level:
        key, value = level.pop()
        if isinstance(value, dict):
            level += list(value.items())
        elif isinstance(value, list):
            level += [(key, item) for item in value]
        elif _ABOUT_FILES.search(key) or (isinstance(value, str) and re.search(r"[/\\]", value)):
            found.append(key)
    return sorted(key[:40] for key in found)


def _hashes(archive: ZipReader, manifest: Manifest) -> dict[str, str]:
    """The hash of every file, which are those in the archive and no others."""
    hashes: dict[str, str] = {}
    for name, sha256 in manifest.paths():
        if name not in archive.entries:
            raise ArtifactError(f"{archive.path} lacks {name[:80]!r}, which its manifest lists")
        if hashes.setdefault(name, sha256) != sha256:
            raise ArtifactError(f"{archive.path} is damaged: its manifest gives {name} two hashes")
    unlisted = sorted(archive.entries.keys() - hashes.keys() - {MANIFEST_FILE})
    if unlisted or MANIFEST_FILE in hashes:
        raise ArtifactError(f"{archive.path} holds {(unlisted or [MANIFEST_FILE])[0]!r}, which no hash protects")
    return hashes


def _write(archive: ZipReader, name: str, expected: str, folder: Path) -> None:
    target = folder / name
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    digest = hashlib.sha256()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    with open(os.open(target, flags, 0o600), "wb") as file:
        for chunk in archive.chunks(name):
            digest.update(chunk)
            file.write(chunk)
    _compare(archive, name, digest.hexdigest(), expected)


def _compare(archive: ZipReader, name: str, found: str, expected: str) -> None:
    if found != expected:
        raise ArtifactError(f"{archive.path}: {name} differs from the manifest: it is damaged or was changed")
