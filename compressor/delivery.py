"""From a trained student to what is delivered: artifacts, measurements of all models and engines, the report."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor import __version__
from compressor.errors import TargetError
from compressor.results import write_results
from compressor.run_directory import fingerprint
from compressor.work import Made, Work, weights_hash

if TYPE_CHECKING:
    from compressor.deployable import Deployable
    from compressor.exporters.calibration import CalibrationData
    from compressor.models.model import Model
    from compressor.profiles.report import Report
    from compressor.profiles.target import Target
    from compressor.tasks.task import Task

__all__ = ["deliver", "export_all", "measure_variant", "write_report"]


def deliver(work: Work, made: Made) -> None:
    """Export, measure and report what a run has trained."""
    write_results(work, made)
    export_all(work, made)
    _measure(work, made)
    path = write_report(work, made)
    work.log.say(f"report: {path}")


def _name(made: Made, deployable: str, target: str) -> str:
    """Folder of an artifact below ``artifacts/``."""
    first = next(iter(made.deployables)) == deployable
    parts = [made.label, "" if first else deployable, target]
    return "/".join(part for part in parts if part)


def _model_of(artifact: str) -> str:
    """The model's part of an artifact's name; empty for the run's own student."""
    return artifact.rpartition("/")[0]


def export_all(work: Work, made: Made, only: Sequence[str] = ()) -> list[Path]:
    """Export every deployable to every target, and what it is compared with to those that run here."""
    from compressor.profiles.target import availability

    paths = []
    targets = work.recipe.load_targets()
    for name, deployable in made.deployables.items():
        paths += [_export(work, deployable, target, _name(made, name, target.name)) for target in targets]
    for label, model in {} if made.label else work.references.items():
        deployable = work.task.deployable(model)
        for target in targets:
            if availability(target).can_run:
                _export(work, deployable, target, f"{label}/{target.name}")
    return [path for path in paths if path is not None]


def _export(work: Work, deployable: Deployable, target: Target, name: str) -> Path | None:
    """One artifact; a target that cannot be built here is noted and left out."""
    from compressor.exporters.export import export
    from compressor.exporters.record import record_inputs

    work.deployables[_model_of(name)] = deployable
    directory = work.folder.artifact(name)
    weights = {key: weights_hash(graph.module) for key, graph in deployable.graphs.items()}
    mark = fingerprint(__version__, weights, dict(deployable.driver.settings), target.model_dump(mode="json"))
    with work.folder.stage(f"export {name}", mark) as stage:
        if not target.has_artifact:
            stage.facts["torch"] = target.model_dump(mode="json")
            return None
        if stage.finished and (directory.is_dir() or stage.facts.get("reason")):
            return directory if directory.is_dir() else None
        recorded = record_inputs(deployable, [work.task.request(8)], limit=8)
        records: dict[str, list[Mapping[str, Any]]] = {graph: list(values) for graph, values in recorded.items()}
        try:
            manifest = export(
                deployable,
                target,
                directory,
                records=records,
                calibration=_calibration(work, deployable, target) if target.quantized else None,
                cache=work.folder.path / "graphs",
                metadata={"recipe": work.recipe.to_dict(), "artifact": name},
            )
        except TargetError as error:
            stage.facts["reason"] = str(error)
            work.log.warn(f"{name}: not built: {error}")
            return None
        parity = max((p.relative for g in manifest.graphs.values() for p in g.parity), default=None)
        said = f"exported {name} ({manifest.engine.name}" + (f", parity {parity:.1e})" if parity is not None else ")")
        work.log.event("export", said, artifact=str(directory))
    return directory


def _calibration(work: Work, deployable: Deployable, target: Target) -> CalibrationData:
    from compressor.calibration import calibration_data

    data = calibration_data(work.judged(), deployable, target)
    for note in data.notes:
        work.log.warn(f"{target.name}: {note}")
    return data


def _measure(work: Work, made: Made) -> None:
    """Quality of teachers, links, student and every engine; sizes; latency side by side."""
    for name, model in work.references.items():
        _measure_model(work, name, model, work.task.deployable(model))
    _measure_model(work, "student", made.student, next(iter(made.deployables.values())))
    for name, model in made.others.items():
        _measure_model(work, name, model, made.deployables[name])
    labels = [*work.references, *made.others]
    names = [*(one for label in labels for one in _artifacts(work, f"{label}/")), *_artifacts(work, "")]
    for name in names:
        _measure_engine(work, name)
    _benchmark(work, names, "benchmark")


def measure_variant(work: Work, made: Made) -> None:
    """The same for what `export_run` added."""
    deployable = next(iter(made.deployables.values()))
    if made.label:
        _measure_model(work, made.label, made.student, deployable)
    labels = [f"{made.label}/"] if made.label else ["", *(f"{name}/" for name in made.others)]
    names = [name for label in labels for name in _artifacts(work, label)]
    for name in names:
        _measure_engine(work, name)
    _benchmark(work, names, f"benchmark {made.label}" if made.label else "benchmark added")


def _artifacts(work: Work, prefix: str) -> list[str]:
    """Names of the exported artifacts directly below a prefix."""
    stages = (name.removeprefix("export ") for name in work.folder.stages if name.startswith("export "))
    found = [name for name in stages if name.startswith(prefix) and "/" not in name.removeprefix(prefix)]
    return [name for name in found if work.folder.artifact(name).is_dir() or _torch_target(work, name)]


def _torch_target(work: Work, name: str) -> dict[str, Any] | None:
    """The target of an entry that PyTorch itself runs."""
    found: dict[str, Any] | None = work.folder.facts(f"export {name}").get("torch")
    return found


def _open_engine(work: Work, name: str) -> Any:
    """The engine of an entry, or the reason why it does not run here."""
    from compressor.measurement import TorchEngine, load_engine

    target = _torch_target(work, name)
    if target is not None:
        try:
            return TorchEngine(work.deployables[_model_of(name)], target)
        except TargetError as error:
            return str(error)
    return load_engine(work.folder.artifact(name))


def _batch(work: Work) -> int:
    """The batch that every engine is evaluated in."""
    return min([16, *(target.batch.max for target in work.recipe.load_targets())])


def _measure_model(work: Work, name: str, model: Model, deployable: Deployable) -> None:
    from compressor.measurement import block_parameters, calls_per_request, macs_per_sample, quality, torch_driver
    from compressor.models.edits.sparsity import folded
    from compressor.profiles.size import share_of_zeros

    evaluation = work.recipe.evaluation
    mark = fingerprint(
        weights_hash(model.module), evaluation.model_dump(), dict(deployable.driver.settings), _batch(work)
    )
    with work.folder.stage(f"evaluate {name}", mark) as stage:
        if stage.finished:
            return
        model.module.cpu().eval()
        task, plain = work.judged(), folded(model).module
        driver = torch_driver(deployable)
        stage.facts |= {
            "parameters": model.parameter_count(),
            "block_parameters": block_parameters(model),
            "zeros": share_of_zeros(plain),
            "bytes": sum(value.numel() * value.element_size() for value in plain.state_dict().values()),
            "macs": macs_per_sample(deployable),
            "calls": calls_per_request(deployable, task),
            "metrics": _finite(quality(task, driver, evaluation, _batch(work))),
        }
        pictures = getattr(task, "pictures", None)
        if pictures is not None:
            stage.facts["png"] = base64.b64encode(pictures(driver, seed=evaluation.seed)).decode()
        work.log.event("evaluate", f"{name}: {_figures(task, stage.facts['metrics'])}", **stage.facts["metrics"])


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Figures as JSON has them: what could not be computed is null."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _figures(task: Task, metrics: Mapping[str, float | None]) -> str:
    shown = [(figure.label, metrics.get(figure.name)) for figure in task.figures if figure.headline]
    return ", ".join(f"{label} {value:.4g}" for label, value in shown if value is not None)


def _measure_engine(work: Work, name: str) -> None:
    from compressor.measurement import quality
    from compressor.profiles.device_memory import device_memory_in_use, watch_device_memory
    from compressor.profiles.latency import timed
    from compressor.profiles.memory import measure_artifact_memory
    from compressor.profiles.size import total_bytes

    directory = work.folder.artifact(name)
    evaluation = work.recipe.evaluation
    mark = fingerprint(work.folder.stages[f"export {name}"]["fingerprint"], evaluation.model_dump(), _batch(work))
    with work.folder.stage(f"evaluate {name}", mark) as stage:
        if stage.finished:
            return
        torch_target = _torch_target(work, name)
        if torch_target is None:
            stage.facts["bytes"] = total_bytes(directory)
        request = work.task.request(1)
        # An artifact's memory is that of a process of its own, below; PyTorch's own run has none.
        device = str((torch_target or {}).get("device", "cpu"))
        with watch_device_memory(device_memory_in_use(device)) as on_device:
            loaded = timed(lambda: _open_engine(work, name))
            engine: Any = loaded.value
            if isinstance(engine, str):
                stage.facts["reason"] = engine
                work.log.event("evaluate", f"{name}: not measured: {engine}")
                return
            first = timed(lambda: engine.driver(request, seed=0))
        task = work.judged()
        stage.facts |= {"load_ms": loaded.milliseconds, "first_ms": first.milliseconds}
        stage.facts["metrics"] = _finite(quality(task, engine.driver, evaluation, _batch(work)))
        pictures = getattr(task, "pictures", None)
        if pictures is not None:
            stage.facts["png"] = base64.b64encode(pictures(engine.driver, seed=evaluation.seed)).decode()
        engine.close()
        try:
            if torch_target is None:
                memory = measure_artifact_memory(directory)
                stage.facts |= {"peak_memory_mb": memory.peak_mb, "peak_device_memory_mb": memory.device_peak_mb}
            elif on_device.bytes is not None:
                stage.facts["peak_device_memory_mb"] = on_device.bytes / 1e6
        except TargetError as error:
            work.log.warn(str(error))
        work.log.event("evaluate", f"{name}: {_figures(task, stage.facts['metrics'])}", **stage.facts["metrics"])


def _benchmark(work: Work, names: Sequence[str], stage_name: str) -> None:
    """Latency of all engines that run here, in interleaved rounds."""
    from compressor.measurement import measure_latency

    marks = [work.folder.stages[f"export {name}"]["fingerprint"] for name in names]
    mark = fingerprint(list(names), marks, work.recipe.benchmark.model_dump())
    with work.folder.stage(stage_name, mark) as stage:
        if stage.finished:
            return
        opened = {name: _open_engine(work, name) for name in names}
        engines = {name: engine for name, engine in opened.items() if not isinstance(engine, str)}
        if not engines:
            return
        work.log.event("benchmark", f"timing {len(engines)} engines side by side")
        measured = measure_latency(engines, work.task, work.recipe.benchmark)
        for engine in engines.values():
            engine.close()
        stage.facts |= {name: _json_latency(value) for name, value in measured.items()}


def _json_latency(value: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "latency": {g: {b: x.model_dump(mode="json") for b, x in one.items()} for g, one in value["latency"].items()},
        "end_to_end": {b: x.model_dump(mode="json") for b, x in value["end_to_end"].items()},
    }


# --- report ----------------------------------------------------------------------------------------------------------


def write_report(work: Work, made: Made | None = None) -> Path:
    """Write the report of everything that the run directory remembers; the path of ``report.html``."""
    from compressor.reporting import make_report, task_facts

    if made is not None:
        work.folder.mark("notes", "done", facts={"notes": made.notes, "task": task_facts(work.task)})
    kept = work.folder.facts("notes")
    about = kept.get("task") or task_facts(work.task)
    report: Report = make_report(work.recipe, work.folder, about, kept.get("notes", []))
    report.command = work.folder.command
    return report.save(work.folder.report)
