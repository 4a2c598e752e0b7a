"""From what a run directory remembers to the report: teacher, student, engines, comparisons, curve, samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from compressor.chain import link_names
from compressor.errors import ArtifactError
from compressor.profiles.engine_remarks import slower_than_float
from compressor.profiles.latency import Latency
from compressor.profiles.machine import describe_machine
from compressor.profiles.report import (
    Comparison,
    CurvePoint,
    EngineEntry,
    MetricInfo,
    ModelEntry,
    Parity,
    Report,
    SampleSheet,
    TaskInfo,
    is_teacher,
)
from compressor.recipe import Recipe
from compressor.results import result_lines, result_sheets
from compressor.run_directory import RunDirectory
from compressor.runtimes.manifest import Manifest, read_manifest
from compressor.tasks.task import Task

__all__ = ["make_report", "task_facts"]


def task_facts(task: Task) -> dict[str, Any]:
    """What a report says of a task, as JSON values: with them it is written without the task's data."""
    figures = getattr(task, "all_figures", task.figures)
    caption = getattr(task, "pictures_caption", "Same labels, same noise for all.")
    return {"name": task.name, "figures": [vars(figure) for figure in figures], "caption": caption}


def make_report(recipe: Recipe, folder: RunDirectory, task: Mapping[str, Any], notes: list[str]) -> Report:
    """Build the report of a run from its stored stages; nothing is measured here.

    Args:
        recipe: The run's.
        folder: Its directory.
        task: `task_facts`.
        notes: Lines for the report's notes.
    """
    stages = folder.stages
    evaluated = {
        n.removeprefix("evaluate "): s.get("facts", {}) for n, s in stages.items() if n.startswith("evaluate ")
    }
    timings = _timings(folder)
    artifacts = [name.removeprefix("export ") for name in stages if name.startswith("export ")]
    engines = [_engine(folder, name, evaluated.get(name, {}), timings.get(name, {})) for name in artifacts]
    models = [_model(name, facts) for name, facts in evaluated.items() if "macs" in facts]
    computed = {name for model in models for name in (model.metrics or {})}  # a judge may be missing
    figures = [MetricInfo(**figure) for figure in task["figures"] if figure["name"] in computed]
    links = link_names(recipe)
    ladder = [m.name for m in models if is_teacher(m.name) or m.name in (*links, "student")] if links else []
    method = " + ".join(entry.name for entry in recipe.methods)
    return Report(
        title=f"{method} on {', '.join(recipe.data.values())}",
        recipe=recipe.to_dict(),
        machine=describe_machine(),
        task=TaskInfo(name=task["name"], metrics=figures),
        models=models,
        engines=engines,
        ladder=ladder,
        comparisons=_comparisons(timings, [model.name for model in models], recipe),
        curve=_curve(models, engines, links),
        training=_training(folder.checkpoints / "history.json"),
        samples=[
            *_samples(evaluated, task["caption"]),
            *result_sheets(folder),
        ],
        skipped=[f"{e.model} on {e.target}: {e.reason}" for e in engines if e.reason],
        notes=[*result_lines(folder), *notes, *slower_than_float(engines)],
    )


def _timings(folder: RunDirectory) -> dict[str, dict[str, Any]]:
    """Latencies by artifact, of all benchmarks."""
    found: dict[str, dict[str, Any]] = {}
    for name, stage in folder.stages.items():
        if name.startswith("benchmark"):
            for artifact, values in stage.get("facts", {}).items():
                parsed = {
                    "latency": {g: _latencies(one) for g, one in values["latency"].items()},
                    "end_to_end": _latencies(values["end_to_end"]),
                }
                # the run's own benchmark has all of them side by side; a later one only adds
                found.setdefault(artifact, parsed)
    return found


def _latencies(values: Mapping[str, Any]) -> dict[str, Latency]:
    return {batch: Latency.model_validate(value) for batch, value in values.items()}


def _model(name: str, facts: Mapping[str, Any]) -> ModelEntry:
    kept = ("parameters", "block_parameters", "zeros", "bytes", "macs", "calls", "metrics")
    return ModelEntry(name=name, **{key: facts.get(key) for key in kept})


def _split(name: str) -> tuple[str, str]:
    """(model, target) of an artifact's name."""
    model, _, target = name.rpartition("/")
    return model or "student", target


def _engine(folder: RunDirectory, name: str, facts: Mapping[str, Any], timing: Mapping[str, Any]) -> EngineEntry:
    model, target = _split(name)
    export_facts = folder.stages[f"export {name}"].get("facts", {})
    measured = {
        "load_ms": facts.get("load_ms"),
        "first_ms": facts.get("first_ms"),
        "latency": timing.get("latency", {}),
        "end_to_end": timing.get("end_to_end", {}),
        "metrics": facts.get("metrics"),
    }
    if "torch" in export_facts:
        kind, precision = (str(export_facts["torch"][key]) for key in ("runtime", "precision"))
        reason = str(facts.get("reason", ""))
        return EngineEntry(
            model=model, target=target, runtime=kind, engine=kind, precision=precision, runnable=not reason,
            reason=reason, **measured,
        )  # fmt: skip
    try:
        manifest = read_manifest(folder.artifact(name), verify=False)
    except ArtifactError as error:
        reason = str(export_facts.get("reason") or error)
        return EngineEntry(model=model, target=target, built=False, runnable=False, reason=reason)
    reason = str(facts.get("reason", ""))
    return EngineEntry(
        model=model,
        target=target,
        runtime=str(manifest.target.get("runtime", "")),
        engine=f"{manifest.engine.name} {manifest.engine.version}".strip(),
        precision=str(manifest.target.get("precision", "")),
        runnable=not reason,
        reason=reason,
        bytes=facts.get("bytes"),
        parity=_parity(manifest),
        peak_memory_mb=facts.get("peak_memory_mb"),
        peak_device_memory_mb=facts.get("peak_device_memory_mb"),
        notes=list(manifest.notes),
        **measured,
    )


def _parity(manifest: Manifest) -> list[Parity]:
    kept = ("output", "relative", "tolerance", "max_absolute", "judged_by", "records")
    return [
        Parity(graph=graph, **{key: getattr(parity, key) for key in kept if hasattr(parity, key)})
        for graph, entry in manifest.graphs.items()
        for parity in entry.parity
    ]


def _comparisons(timings: Mapping[str, Any], models: list[str], recipe: Recipe) -> list[Comparison]:
    """The student and the links of its chain against every teacher, and each against the link before it."""
    from compressor.measurement import compare_latency

    teachers, steps = [name for name in models if is_teacher(name)], [*link_names(recipe), "student"]
    pairs = [(teacher, step) for step in steps for teacher in teachers] + list(pairwise(steps))
    found = []
    for target in [name for name in timings if "/" not in name]:
        engines = {name: target if name == "student" else f"{name}/{target}" for name in (*teachers, *steps)}
        for before, after in pairs:
            if engines[before] in timings and engines[after] in timings:
                found += compare_latency(timings, engines[before], engines[after], target, (before, after))
    return found


def _curve(models: list[ModelEntry], engines: list[EngineEntry], links: list[str]) -> list[CurvePoint]:
    """Every student of the same training on every engine that was timed, where there are several students."""
    teachers = [model for model in models if is_teacher(model.name)]
    students = [model for model in models if model not in teachers and model.name not in links]
    if len(students) < 2:
        return []
    points = []
    for model in teachers + students:
        for engine in engines:
            if engine.model == model.name and engine.whole:
                batch = next(iter(engine.whole))
                points.append(
                    CurvePoint(
                        label=model.name,
                        model=model.name,
                        parameters=model.parameters,
                        bytes=engine.bytes,
                        metrics=engine.metrics or {},
                        latency_ms=engine.whole[batch].p50,
                        target=engine.target,
                    )
                )
    return points


def _training(path: Path) -> dict[str, dict[str, list[Any]]]:
    try:
        history: dict[str, dict[str, list[Any]]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return history


def _samples(evaluated: Mapping[str, Mapping[str, Any]], caption: str) -> list[SampleSheet]:
    sheets = []
    for name, facts in evaluated.items():
        if "png" in facts:
            model, target = _split(name)
            title = name if "macs" in facts else f"{model} on {target}"
            sheets.append(SampleSheet(title=title, png_base64=facts["png"], caption=caption))
    return sheets
