"""What `compress bundle` packs: an artifact of a run, with the run's figures and what is known of licences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.errors import RequestError, nearest
from compressor.runtimes.manifest import MANIFEST_FILE, Manifest, read_manifest

__all__ = ["artifact_of", "bundle_run"]


def bundle_run(run: Path, target: str | None, out: Path | None) -> tuple[Path, Manifest]:
    """Bundle an artifact of a run.

    Args:
        run: A run's directory, or an artifact's folder.
        target: Name of the artifact: a target, or what stands below ``artifacts/`` ("teacher/ort-fp32").
        out: The bundle; ``RUN-TARGET.zip`` in the working directory by default.

    Returns:
        The bundle's path and its manifest.

    Raises:
        RequestError: There is no such run or artifact.
        ArtifactError: The artifact is damaged.
    """
    from compressor.exporters.bundle import write_bundle
    from compressor.exporters.licence import licence_note

    artifact = artifact_of(run, target)
    metadata = read_manifest(artifact, verify=False).metadata
    name = str(metadata.get("artifact") or artifact.name)
    home = _run_of(artifact)
    if out is None:
        out = Path(f"{home.resolve().name}-{name.replace('/', '-')}.zip" if home else f"{artifact.resolve().name}.zip")
    recipe = metadata.get("recipe")
    manifest = write_bundle(
        artifact,
        out,
        metrics=_figures(home, name) if home else {},
        licence=licence_note(recipe if isinstance(recipe, dict) else {}),
    )
    return out, manifest


def artifact_of(path: Path, target: str | None) -> Path:
    """The folder of an artifact: the path itself, or the artifact of the run that lies there.

    Raises:
        RequestError: It is neither, or the run has several artifacts and no target is given.
    """
    if (path / MANIFEST_FILE).is_file():
        if target is not None:
            raise RequestError(f"{path} is one artifact already: leave out --target")
        return path
    folder = path / "artifacts"
    names = sorted(found.parent.relative_to(folder).as_posix() for found in folder.rglob(MANIFEST_FILE))
    own = [name for name in names if not name.startswith("teacher/")]
    if not names:
        raise RequestError(
            f"{path} is no artifact and no run with artifacts: give what `compress run` or `export` made"
        )
    if target is None and len(own) == 1:
        return folder / own[0]
    if target is None:
        raise RequestError(f"{path} has several artifacts: add --target, one of {', '.join(names)}")
    if target not in names:
        raise RequestError(f"{path} has no artifact {target!r}: {nearest(target, names)}")
    return folder / target


def _run_of(artifact: Path) -> Path | None:
    """The run that an artifact lies in."""
    parents = artifact.resolve().parents
    return next((p.parent for p in parents if p.name == "artifacts" and (p.parent / "run.json").is_file()), None)


def _figures(run: Path, name: str) -> dict[str, dict[str, float | None]]:
    """What the run has measured of the teacher, of the student in PyTorch, and of this artifact."""
    from compressor.run_directory import RunDirectory

    folder = RunDirectory.existing(run, lock=False)
    student = name.partition("/")[0] if "/" in name else "student"
    found = {}
    for model, stage in {"teacher": "teacher", "student": student, "engine": name}.items():
        facts = folder.facts(f"evaluate {stage}")
        figures = _numbers(facts.get("metrics") or {})
        figures |= _numbers({key: facts.get(key) for key in ("parameters", "bytes", "load_ms", "peak_memory_mb")})
        if figures:
            found[model] = figures
    return found


def _numbers(values: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
