"""What `compress bench` measures: whole requests through the drivers of artifacts, or single calls of graph files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import CompressorError, RequestError, TargetError
from compressor.profiles.latency import Latency, Ratio, measure_interleaved, ratio, timed
from compressor.profiles.machine import usable_threads
from compressor.profiles.size import total_bytes
from compressor.runtimes.bundle import read_bundle
from compressor.runtimes.load import load, open_graph
from compressor.runtimes.manifest import MANIFEST_FILE, read_manifest
from compressor.runtimes.runtime import Array

__all__ = ["Candidate", "Measurement", "Row", "measure_artifacts", "parse_sizes", "request"]

GRAPH_FILES = {".onnx": "onnxruntime", ".xml": "openvino"}
BUNDLE = ".zip"
BATCH_AXIS = "batch"


@dataclass(frozen=True)
class Candidate:
    """Something loaded that can be timed.

    Attributes:
        call: Takes named arrays.
        inputs: (name, shape, dtype) of each; a string in a shape names a free axis.
        largest: Largest batch size, or None.
        facts: ``threads`` of an inference (0: the engine's choice), ``load_ms``, ``bytes`` of its files.
    """

    name: str
    call: Callable[[Mapping[str, Array]], object]
    inputs: tuple[tuple[str, tuple[int | str, ...], str], ...]
    largest: int | None = None
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One candidate at one batch size; ``speedup`` is against the first candidate, None for itself."""

    batch: int
    name: str
    latency: Latency
    speedup: Ratio | None


@dataclass
class Measurement:
    """All rows, facts of each candidate by name, and what was not measured and why."""

    rows: list[Row] = field(default_factory=list)
    facts: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        from compressor.profiles.machine import describe_machine

        rows = []
        for row in self.rows:
            figures = row.latency.model_dump(mode="json", exclude={"samples_ms", "round_medians_ms"})
            figures |= {"throughput": row.latency.throughput(row.batch)}
            speedup = None if row.speedup is None else row.speedup._asdict()
            rows.append({"batch": row.batch, "artifact": row.name, **figures, "speedup": speedup})
        skipped = [{"artifact": name, "reason": reason} for name, reason in self.skipped]
        artifacts = [{"artifact": name, **facts} for name, facts in self.facts.items()]
        return {"machine": describe_machine(), "artifacts": artifacts, "rows": rows, "skipped": skipped}

    def thread_note(self) -> str:
        """What to say where the candidates do not have the same threads; empty where they do."""
        threads = {name: int(facts["threads"]) for name, facts in self.facts.items() if facts["threads"]}
        if len(set(threads.values())) < 2:
            return ""
        return (
            f"threads differ: {', '.join(f'{name} has {n}' for name, n in threads.items())}; --threads sets all alike"
        )


def measure_artifacts(
    paths: Sequence[Path],
    *,
    batches: Sequence[int],
    seconds: float,
    rounds: int,
    options: Mapping[str, Any] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Measurement:
    """Measure candidates side by side, one batch size after the other.

    Args:
        paths: Artifact folders, bundles, run directories, graph files.
        batches: Batch sizes.
        seconds: For all candidates of one batch size.
        rounds: At least 3.
        options: For the runtimes, e.g. ``{"threads": 1}``.
        sizes: Sizes of free axes other than the batch.

    Raises:
        RequestError: Nothing to measure at a path, a free axis without a size, or batches too large for all.
        TargetError: None of them runs on this machine.
    """
    measured = Measurement()
    candidates = _open_all(_artifacts(paths), options or {}, measured)
    measured.facts = {candidate.name: candidate.facts for candidate in candidates}
    for batch in batches:
        calls: dict[str, Callable[[], object]] = {}
        for candidate in candidates:
            if candidate.largest is not None and batch > candidate.largest:
                reason = f"batch {batch} is larger than the engine's {candidate.largest}"
                measured.skipped.append((candidate.name, reason))
                continue
            calls[candidate.name] = partial(candidate.call, request(candidate, batch, sizes or {}))
        if not calls:
            continue
        for name, call in calls.items():
            if "first_ms" not in measured.facts[name]:
                measured.facts[name]["first_ms"] = timed(call).milliseconds
        found = measure_interleaved(calls, rounds=rounds, budget_seconds=seconds)
        first = next(iter(found.values()))
        for name, latency in found.items():
            measured.rows.append(Row(batch, name, latency, None if latency is first else ratio(first, latency)))
    if not measured.rows:
        raise RequestError("nothing is measured: " + "; ".join(f"{name}: {why}" for name, why in measured.skipped))
    return measured


def parse_sizes(texts: Iterable[str]) -> dict[str, int]:
    """``AXIS=N`` strings as a mapping.

    Raises:
        RequestError: A string of another form.
    """
    sizes = {}
    for text in texts:
        axis, _, number = text.partition("=")
        if not axis or not number.isdigit() or int(number) < 1:
            raise RequestError(f"--size {text}: write --size AXIS=N, e.g. height=224")
        sizes[axis] = int(number)
    return sizes


def request(candidate: Candidate, batch: int, sizes: Mapping[str, int]) -> dict[str, Array]:
    """Arrays of the given batch size: integers are 0 (the first class, the first token), floats noise in [0, 1).

    Raises:
        RequestError: A free axis other than the batch has no size.
    """
    rng = np.random.default_rng(0)
    arrays: dict[str, Array] = {}
    for name, shape, dtype in candidate.inputs:
        known = {BATCH_AXIS: batch, **sizes}
        for axis in shape:
            if isinstance(axis, str) and axis not in known:
                raise RequestError(f"{candidate.name}: the axis {axis!r} of {name!r} is free: add --size {axis}=N")
        concrete = tuple(known[axis] if isinstance(axis, str) else axis for axis in shape)
        kind = np.dtype(dtype)
        values = rng.random(concrete) if np.issubdtype(kind, np.floating) else np.zeros(concrete)
        arrays[name] = values.astype(kind)
    return arrays


def _artifacts(paths: Sequence[Path]) -> list[Path]:
    """What to open: a run stands for all of its artifacts, the teacher's first, as the reference of the others."""
    found: list[Path] = []
    for path in paths:
        if (path.is_file() and path.suffix in (*GRAPH_FILES, BUNDLE)) or (path / MANIFEST_FILE).is_file():
            found.append(path)
            continue
        inside = [manifest.parent for manifest in (path / "artifacts").rglob(MANIFEST_FILE)]
        inside.sort(key=lambda folder: (folder.parent.name != "teacher", folder))
        if not inside:
            kinds = ", ".join(GRAPH_FILES)
            raise RequestError(f"{path} is no artifact, no bundle, no run with artifacts and no {kinds} file")
        found += inside
    return list(dict.fromkeys(found))


def _open_all(paths: Sequence[Path], options: Mapping[str, Any], measured: Measurement) -> list[Candidate]:
    candidates = []
    names = _short_names(paths)
    for path in paths:
        try:
            candidates.append(_open(path, names[path], options))
        except CompressorError as error:
            if len(paths) == 1:
                raise
            measured.skipped.append((names[path], str(error)))
    if not candidates:
        raise TargetError(
            f"none of the {len(paths)} artifacts runs on this machine; the first: {measured.skipped[0][1]}"
        )
    return candidates


def _open(path: Path, name: str, options: Mapping[str, Any]) -> Candidate:
    """Load with the threads asked for, else the target's own, else as many as every other candidate gets."""
    bundle = path.is_file() and path.suffix == BUNDLE
    if path.is_file() and not bundle:
        options = {"threads": usable_threads(), **options}
        loaded = timed(lambda: open_graph(path, GRAPH_FILES[path.suffix], options))
        graph: Any = loaded.value
        specs = tuple((spec.name, spec.shape, spec.dtype) for spec in graph.inputs)
        files = [path, *(side for side in _side_files(path) if side.is_file())]
        return Candidate(name, graph, specs, None, _facts(options, loaded.milliseconds, files))
    manifest = read_bundle(path) if bundle else read_manifest(path, verify=False)
    if manifest.target.get("device", "cpu") == "cpu":
        own = (manifest.target.get("options") or {}).get("threads")
        options = {"threads": own or usable_threads(), **options}
    loaded = timed(lambda: load(path, options))
    driver: Any = loaded.value
    largest = (manifest.target.get("batch") or {}).get("max")
    ports = tuple((port.name, port.shape, port.dtype) for port in driver.inputs)
    return Candidate(name, driver, ports, largest, _facts(options, loaded.milliseconds, [path]))


def _side_files(path: Path) -> tuple[Path, Path]:
    """Where the weights of a graph file may lie."""
    return path.with_name(path.name + ".data"), path.with_suffix(".bin")


def _facts(options: Mapping[str, Any], load_ms: float, files: Sequence[Path]) -> dict[str, float]:
    return {"threads": int(options.get("threads", 0)), "load_ms": load_ms, "bytes": total_bytes(files)}


def _short_names(paths: Sequence[Path]) -> dict[Path, str]:
    """The paths below the folder that they share."""
    if len(paths) == 1:
        return {paths[0]: paths[0].name}
    shared = os.path.commonpath([path.resolve().parent for path in paths])
    return {path: path.resolve().relative_to(shared).as_posix() for path in paths}
