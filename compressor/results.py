"""What a run hands over beside model and engines: files and folders in ``results/``, with their hashes.

results/manifest.json   schema_version, files: {path: {sha256, bytes}}
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor import __version__
from compressor.atomic import atomic_directory, write_json
from compressor.errors import RequestError
from compressor.run_directory import RunDirectory, fingerprint
from compressor.work import Made, Work, weights_hash

if TYPE_CHECKING:
    from compressor.profiles.report import SampleSheet

__all__ = ["result_lines", "result_sheets", "write_results"]

STAGE = "results"
MANIFEST_FILE = "manifest.json"


def write_results(work: Work, made: Made) -> None:
    """Write the results of a run's deployables, all or none.

    Raises:
        RequestError: Two deployables name one result, or a name is no path inside the folder.
    """
    from compressor.runtimes.manifest import check_relative_path

    writers: dict[str, Callable[[Path], None]] = {}
    for deployable in made.deployables.values():
        for name, write in deployable.results.items():
            if name in writers or name == MANIFEST_FILE:
                raise RequestError(f"the result {name!r} would replace another: rename it")
            writers[name] = write
    if not writers:
        return
    folder = work.folder.results
    mark = fingerprint(__version__, weights_hash(made.student.module), sorted(writers))
    with work.folder.stage(STAGE, mark) as stage:
        if stage.finished and (folder / MANIFEST_FILE).is_file():
            return
        with atomic_directory(folder) as temporary:
            for name, write in writers.items():
                path = check_relative_path(temporary, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path)
            files = _described(temporary)
            write_json(temporary / MANIFEST_FILE, {"schema_version": 1, "files": files})
        stage.facts = {name: _summary(name, files) for name in writers}
        work.log.event("results", f"results in {folder}: {', '.join(writers)}")


def _described(folder: Path) -> dict[str, dict[str, Any]]:
    from compressor.runtimes.manifest import hash_file

    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"sha256": hash_file(path), "bytes": path.stat().st_size} for path in paths
    }


def _summary(name: str, files: dict[str, dict[str, Any]]) -> dict[str, int]:
    mine = [facts["bytes"] for path, facts in files.items() if path == name or path.startswith(f"{name}/")]
    return {"files": len(mine), "bytes": sum(mine)}


def result_lines(folder: RunDirectory) -> list[str]:
    """One line a result: where it lies, how many files it has, how large it is."""
    return [
        f"results/{name}: {facts['files']} file{'s' if facts['files'] > 1 else ''}, {facts['bytes'] / 1000:.1f} kB"
        for name, facts in folder.facts(STAGE).items()
    ]


def result_sheets(folder: RunDirectory) -> list[SampleSheet]:
    """The results that are pictures."""
    from compressor.profiles.report import SampleSheet

    sheets = []
    for name in folder.facts(STAGE):
        path = folder.results / name
        if path.suffix == ".png" and path.is_file():
            png = base64.b64encode(path.read_bytes()).decode()
            sheets.append(SampleSheet(title=path.stem, png_base64=png, caption=f"results/{name}"))
    return sheets
