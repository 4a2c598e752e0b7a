"""The whole way: teachers, methods, student, export, measurement, report; a finished stage is not repeated.

The training part runs on all processes of a launch; from the export on the main process works alone.
"""

from __future__ import annotations

import base64
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor import __version__
from compressor.errors import RequestError, TargetError, nearest
from compressor.log import Log
from compressor.recipe import MethodEntry, Recipe
from compressor.run_directory import RunDirectory, fingerprint

if TYPE_CHECKING:
    from compressor.context import RunContext
    from compressor.deployable import Deployable
    from compressor.method import Method
    from compressor.models.model import Model
    from compressor.profiles.report import Report
    from compressor.profiles.target import Target
    from compressor.tasks.task import Task
    from compressor.training.distributed import Distributed

__all__ = ["export_run", "plan", "report_run", "run"]


def plan(recipe: Recipe) -> list[str]:
    """Names of the stages in order; models and data are checked as far as that is cheap.

    Raises:
        RequestError: A model, data set or target cannot be had.
    """
    task = _task(recipe)
    for role in recipe.data:
        task.dataset(role)
    for spec in _specs(recipe):
        _check_spec(spec, recipe)
    targets = recipe.load_targets()
    stages = [f"teacher {spec}" for specs in recipe.teachers.values() for spec in specs]
    stages += [f"train {k}-{entry.name}" for k, entry in enumerate(recipe.methods)] + ["student"]
    stages += [f"export {target.name}" for target in targets if target.has_artifact]
    return [*stages, "evaluate", "benchmark", "report"]


def run(recipe: Recipe, directory: Path, *, overwrite: bool = False, log: Log | None = None) -> Path:
    """Do everything that the recipe says; the path of ``report.html``.

    The same call goes on where a killed one stopped.

    Raises:
        CompressorError: One line that says what is wrong and what to do.
    """
    from compressor.training.distributed import Distributed

    log = log or Log()
    recipe = recipe.resolve()
    distributed = Distributed(_device(recipe.device))
    leads = distributed.is_main
    with _open(recipe, directory, overwrite, leads, distributed) as folder:
        if leads:
            log.attach(folder.log)
        work = _Work(recipe, folder, log, distributed)
        trained = work.train()
        if leads:
            _deliver(work, trained)
        distributed.barrier()
    return folder.report / "report.html"


def export_run(
    directory: Path, targets: Sequence[str], settings: Mapping[str, object] | None = None, log: Log | None = None
) -> list[Path]:
    """Export a finished run to more targets, or (``settings``) another student of the same training.

    Args:
        directory: The run.
        targets: Names or TOML files; the run's own if empty.
        settings: Keys of the method's configuration that need no training, e.g. ``{"keep": 0.7}``.
        log: Where to say what happens.

    Returns:
        The artifacts' folders. The report is written anew, with a point for every student in its curve.

    Raises:
        RequestError: No such run, or a setting that would need training.
    """
    from compressor.training.distributed import Distributed

    log = log or Log()
    with RunDirectory.existing(directory) as folder:
        log.attach(folder.log)
        recipe = Recipe.parse(folder.recipe)
        changed = recipe.model_copy(update={"targets": list(targets) or recipe.targets})
        work = _Work(changed, folder, log, Distributed(_device(recipe.device)))
        if settings:
            made = _variant(work, settings)
        else:
            made = work.train(replay=True)
        paths = _export_all(work, made, only=targets)
        _measure_variant(work, made)
        _write_report(work)
    return paths


def report_run(directory: Path) -> Path:
    """Write a run's report anew from what was measured; the path of ``report.html``."""
    with RunDirectory.existing(directory) as folder:
        return _write_report(_Work(Recipe.parse(folder.recipe), folder, Log(quiet=True), None))


# --- opening ---------------------------------------------------------------------------------------------------------


def _open(recipe: Recipe, path: Path, overwrite: bool, leads: bool, distributed: Distributed) -> RunDirectory:
    """The run's directory; a refusal on the main process stops all."""
    opened: list[RunDirectory] = []
    distributed.on_main(lambda: opened.append(RunDirectory.create(path, recipe.to_dict(), overwrite=overwrite)))
    return opened[0] if leads else RunDirectory.create(path, recipe.to_dict(), leads=False)


def _device(name: str) -> str | None:
    return None if name == "auto" else name


def _task(recipe: Recipe) -> Task:
    from compressor.registry import load_task

    return load_task(str(recipe.task))(recipe.data, recipe.task_options)


def _specs(recipe: Recipe) -> list[str]:
    return [*(spec for specs in recipe.teachers.values() for spec in specs), *recipe.students.values()]


def _check_spec(spec: str, recipe: Recipe) -> None:
    """Refuse a model that cannot be loaded, as far as its files tell."""
    from compressor.models.demos.catalogue import demo
    from compressor.models.spec import load_model_spec, split_spec

    kind, argument = split_spec(spec)
    if kind == "demo":
        demo(argument)
    else:
        load_model_spec(spec, trust_remote_code=recipe.trust_remote_code)


# --- training --------------------------------------------------------------------------------------------------------


@dataclass
class _Made:
    """A student, how it is packed, and under which label it stands ("" for the run's own)."""

    student: Model
    deployables: dict[str, Deployable]
    label: str = ""
    history: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class _Work:
    """What the stages of one run share; models and task are loaded when they are first asked for."""

    def __init__(self, recipe: Recipe, folder: RunDirectory, log: Log, distributed: Distributed | None) -> None:
        self.recipe, self.folder, self.log, self._distributed = recipe, folder, log, distributed
        self.deployables: dict[str, Deployable] = {}
        self._task: Task | None = None
        self._teachers: dict[str, list[Model]] = {}

    @property
    def distributed(self) -> Distributed:
        if self._distributed is None:
            raise RuntimeError("this work trains nothing")
        return self._distributed

    @property
    def task(self) -> Task:
        if self._task is None:
            self._task = _task(self.recipe)
        return self._task

    @property
    def teachers(self) -> dict[str, list[Model]]:
        if not self._teachers:
            for role, specs in self.recipe.teachers.items():
                self._teachers[role] = [self.load(spec) for spec in specs]
                for model in self._teachers[role]:
                    self.task.check(model)
        return self._teachers

    @property
    def reference(self) -> Model | None:
        """The model that students are compared with: the only teacher of the first role."""
        models = next(iter(self.teachers.values()), [])
        return models[0] if len(models) == 1 else None

    def load(self, spec: str, *, student: bool = False) -> Model:
        """A model of the recipe; demos are trained by the main process while the others wait.

        What a student's spec leaves open (the number of classes), the task's data decide.
        """
        from compressor.models.demos.catalogue import demo_model
        from compressor.models.spec import load_model_spec, split_spec

        kind, argument = split_spec(spec)
        if kind != "demo":
            defaults = getattr(self.task, "student_defaults", dict)() if student else None
            return load_model_spec(spec, trust_remote_code=self.recipe.trust_remote_code, defaults=defaults)
        device = str(self.distributed.device)
        self.distributed.on_main(
            lambda: demo_model(argument, budget=min(1.0, self.recipe.budget), log=self.log, device=device) and None
        )
        return demo_model(argument, budget=min(1.0, self.recipe.budget), device=device)

    def train(self, *, replay: bool = False, changes: Mapping[str, object] | None = None) -> _Made:
        """Run the chain of methods, or load what they left.

        Args:
            replay: Only load; raise where something would have to be trained.
            changes: Configuration of the last method, for another student of the same training.
        """
        from compressor.models.model import save_model
        from compressor.training.random import Randomness, hash_seed

        student: Model | None = None
        deployables: dict[str, Deployable] = {}
        history: dict[str, Any] = {}
        notes: list[str] = []
        mark = self._mark()
        for k, entry in enumerate(self.recipe.methods):
            last = k == len(self.recipe.methods) - 1
            method = _scaled(entry, self.recipe, changes if last else None).build()
            seed = hash_seed(self.recipe.seed, k, entry.name)
            randomness = Randomness(seed, self.distributed.rank, self.distributed.processes)
            ctx = self._context(method, randomness, student, f"{k}-{entry.name}")
            engine = self._engine(randomness, mark, replay)
            if not replay:
                self.log.event("stage", f"{k}-{entry.name}: training", stage=f"train {k}-{entry.name}")
            engine.run(method.phases(ctx), prefix=f"{k}-{entry.name}/")
            student = method.student()
            student.module.eval()
            notes += getattr(method, "notes", [])
            history |= engine.history
            if last:
                deployables = method.deployables(ctx)
            mark = fingerprint(mark, entry.name, entry.config)
        if student is None:
            raise RequestError("the recipe names no method")
        if not replay:
            self.distributed.on_main(lambda: self._keep(student, mark, save_model))
        return _Made(student, deployables, "", history, notes)

    def _keep(self, student: Model, mark: str, save: Any) -> None:
        with self.folder.stage("student", mark) as stage:
            if not stage.finished or not self.folder.student.is_dir():
                save(student, self.folder.student)
                self.log.event("stage", f"student saved in {self.folder.student}", stage="student")

    def _context(self, method: Method, randomness: Any, student: Model | None, name: str) -> RunContext:
        from compressor.context import RunContext

        makers = {
            role: (lambda spec=spec: self.load(spec, student=True)) for role, spec in self.recipe.students.items()
        }
        return RunContext(
            self.task, self.teachers, randomness, self.distributed, chained=student, students=makers, name=name
        )

    def _engine(self, randomness: Any, mark: str, replay: bool) -> Any:
        from compressor.training.engine import Engine

        return Engine(
            self.folder.checkpoints,
            distributed=self.distributed,
            randomness=randomness,
            fingerprint=mark,
            log=self._train_event,
            checkpoint_seconds=self.recipe.checkpoint_seconds,
            progress=not self.log.quiet and sys.stderr.isatty(),
            replay=replay,
        )

    def _train_event(self, event: Mapping[str, Any]) -> None:
        facts = dict(event)
        kind, phase = facts.pop("event"), facts.pop("phase")
        said = ""
        if kind == "phase-end":
            losses = [f"{name.removeprefix('loss/')} {value:.4g}" for name, value in facts.items() if "loss/" in name]
            said = f"{phase}: done in {facts.get('seconds', 0):.0f} s" + (f" ({', '.join(losses)})" if losses else "")
        elif kind in ("phase-stale", "skipped"):
            said = f"{phase}: {facts.get('reason') or facts.get('cause')}"
        self.log.event(kind, said, phase=phase, **{key: value for key, value in facts.items() if key != "kind"})

    def _mark(self) -> str:
        """The fingerprint of everything before the first method."""
        recipe = self.recipe
        data = {role: self.task.dataset(role).info.fingerprint for role in recipe.data}
        teachers = {role: [_weights_hash(model) for model in models] for role, models in self.teachers.items()}
        return fingerprint(
            __version__, recipe.seed, recipe.task, recipe.task_options, data, teachers, recipe.students,
            self.distributed.processes,
        )  # fmt: skip

    def judged(self) -> Task:
        """The task, ready to measure."""
        task: Any = self.task
        if getattr(task, "judge", "none") is None:
            from compressor.models.demos.judges import judge_of

            task.judge = judge_of(task, budget=min(1.0, self.recipe.budget), log=self.log)
        return self.task


def _weights_hash(model: Model) -> str:
    import hashlib

    digest = hashlib.sha256()
    for name, value in sorted(model.module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()[:16]


def _scaled(entry: MethodEntry, recipe: Recipe, changes: Mapping[str, object] | None) -> MethodEntry:
    """The method's configuration with its steps scaled by the budget."""

    def scale(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {
            key: max(1, round(inner * recipe.budget)) if key == "steps" and inner else scale(inner)
            for key, inner in value.items()
        }

    config = {**entry.config, **(changes or {})}
    if recipe.steps is not None:
        config = _with_steps(config, recipe.steps, entry.name)
    return MethodEntry(name=entry.name, config=scale(config))


def _with_steps(config: dict[str, Any], steps: int, name: str) -> dict[str, Any]:
    """Put ``--steps`` where the method's only number of steps stands."""
    places = [
        key for key, value in config.items() if key == "steps" or (isinstance(value, Mapping) and value.get("steps"))
    ]
    if len(places) != 1:
        phases = ", ".join(f"{name}.{place}.steps" for place in places) or "no phase"
        raise RequestError(f"--steps suits methods of one training phase; {name} has {phases}: use --set or --budget")
    place = places[0]
    return {**config, place: steps if place == "steps" else {**config[place], "steps": steps}}


def _variant(work: _Work, settings: Mapping[str, object]) -> _Made:
    """Another student of the same training."""
    from compressor.registry import load_method

    entry = work.recipe.methods[-1]
    method: Any = load_method(entry.name)
    free: frozenset[str] = getattr(method, "free", frozenset())
    for key in settings:
        if key not in free:
            hint = nearest(key, free) if free else f"the method {entry.name!r} makes one student a training"
            raise RequestError(f"--set {key}: not a key that a trained run can change: {hint}")
    changes = dict(settings) | method.without_training(entry.config)
    made = work.train(replay=True, changes=changes)
    made.label = (
        ",".join(f"{key}={value}" for key, value in sorted(settings.items())).replace("/", "_").replace(" ", "")
    )
    return made


# --- export and measurement ------------------------------------------------------------------------------------------


def _deliver(work: _Work, made: _Made) -> None:
    _export_all(work, made)
    _measure(work, made)
    path = _write_report(work, made)
    work.log.say(f"report: {path}")


def _name(made: _Made, deployable: str, target: str) -> str:
    """Folder of an artifact below ``artifacts/``."""
    first = next(iter(made.deployables)) == deployable
    parts = [made.label, "" if first else deployable, target]
    return "/".join(part for part in parts if part)


def _export_all(work: _Work, made: _Made, only: Sequence[str] = ()) -> list[Path]:
    """Export every deployable to every target, and the teacher to those that run here."""
    from compressor.profiles.target import availability

    paths = []
    targets = work.recipe.load_targets()
    for name, deployable in made.deployables.items():
        paths += [_export(work, deployable, target, _name(made, name, target.name)) for target in targets]
    reference = work.reference
    if reference is not None and not made.label:
        deployable = work.task.deployable(reference)
        for target in targets:
            if availability(target).can_run:
                _export(work, deployable, target, f"teacher/{target.name}")
    return [path for path in paths if path is not None]


def _export(work: _Work, deployable: Deployable, target: Target, name: str) -> Path | None:
    """One artifact; a target that cannot be built here is noted and left out."""
    from compressor.exporters.export import export
    from compressor.exporters.record import record_inputs

    work.deployables[name] = deployable
    directory = work.folder.artifact(name)
    weights = {key: _weights_hash_of(graph.module) for key, graph in deployable.graphs.items()}
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


def _weights_hash_of(module: Any) -> str:
    from compressor.models.model import Model, ModelInfo

    return _weights_hash(Model(module, ModelInfo("", "", {})))


def _measure(work: _Work, made: _Made) -> None:
    """Quality of teacher, student and every engine; sizes; latency side by side."""
    models = {"student": (made.student, next(iter(made.deployables.values())))}
    if work.reference is not None:
        models = {"teacher": (work.reference, work.task.deployable(work.reference)), **models}
    for name, (model, deployable) in models.items():
        _measure_model(work, name, model, deployable)
    names = [*_artifacts(work, "teacher/"), *_artifacts(work, "")]
    for name in names:
        _measure_engine(work, name)
    _benchmark(work, names, next(iter(made.deployables.values())), "benchmark")


def _measure_variant(work: _Work, made: _Made) -> None:
    """The same for what `export_run` added."""
    deployable = next(iter(made.deployables.values()))
    if made.label:
        _measure_model(work, made.label, made.student, deployable)
    names = [name for name in _artifacts(work, f"{made.label}/" if made.label else "")]
    for name in names:
        _measure_engine(work, name)
    _benchmark(work, names, deployable, f"benchmark {made.label}".strip() if made.label else "benchmark added")


def _artifacts(work: _Work, prefix: str) -> list[str]:
    """Names of the exported artifacts directly below a prefix."""
    stages = (name.removeprefix("export ") for name in work.folder.stages if name.startswith("export "))
    found = [name for name in stages if name.startswith(prefix) and "/" not in name.removeprefix(prefix)]
    return [name for name in found if work.folder.artifact(name).is_dir() or _torch_target(work, name)]


def _torch_target(work: _Work, name: str) -> dict[str, Any] | None:
    """The target of an entry that PyTorch itself runs."""
    found: dict[str, Any] | None = work.folder.facts(f"export {name}").get("torch")
    return found


def _open_engine(work: _Work, name: str) -> Any:
    """The engine of an entry, or the reason why it does not run here."""
    from compressor.measurement import TorchEngine, load_engine

    target = _torch_target(work, name)
    if target is not None:
        return TorchEngine(work.deployables[name], target)
    return load_engine(work.folder.artifact(name))


def _batch(work: _Work) -> int:
    """The batch that every engine is evaluated in."""
    return min([16, *(target.batch.max for target in work.recipe.load_targets())])


def _measure_model(work: _Work, name: str, model: Model, deployable: Deployable) -> None:
    from compressor.measurement import block_parameters, macs_per_sample, quality, torch_driver

    evaluation = work.recipe.evaluation
    mark = fingerprint(_weights_hash(model), evaluation.model_dump(), dict(deployable.driver.settings), _batch(work))
    with work.folder.stage(f"evaluate {name}", mark) as stage:
        if stage.finished:
            return
        model.module.cpu().eval()
        task = work.judged()
        driver = torch_driver(deployable)
        stage.facts |= {
            "parameters": model.parameter_count(),
            "block_parameters": block_parameters(model),
            "bytes": sum(value.numel() * value.element_size() for value in model.module.state_dict().values()),
            "macs": macs_per_sample(deployable),
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


def _measure_engine(work: _Work, name: str) -> None:
    from compressor.measurement import quality
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
        loaded = timed(lambda: _open_engine(work, name))
        engine: Any = loaded.value
        if isinstance(engine, str):
            stage.facts["reason"] = engine
            work.log.event("evaluate", f"{name}: not measured: {engine}")
            return
        task = work.judged()
        first = timed(lambda: engine.driver(task.request(1), seed=0))
        stage.facts |= {"load_ms": loaded.milliseconds, "first_ms": first.milliseconds}
        stage.facts["metrics"] = _finite(quality(task, engine.driver, evaluation, _batch(work)))
        pictures = getattr(task, "pictures", None)
        if pictures is not None:
            stage.facts["png"] = base64.b64encode(pictures(engine.driver, seed=evaluation.seed)).decode()
        engine.close()
        try:
            if torch_target is None:
                stage.facts["peak_memory_mb"] = measure_artifact_memory(directory).peak_mb
        except TargetError as error:
            work.log.warn(str(error))
        work.log.event("evaluate", f"{name}: {_figures(task, stage.facts['metrics'])}", **stage.facts["metrics"])


def _benchmark(work: _Work, names: Sequence[str], deployable: Deployable, stage_name: str) -> None:
    """Latency of all engines that run here, in interleaved rounds."""
    from compressor.exporters.record import record_inputs
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
        records = record_inputs(deployable, [work.task.request(1)], limit=1)
        work.log.event("benchmark", f"timing {len(engines)} engines side by side")
        measured = measure_latency(
            engines, work.task, {name: values[0] for name, values in records.items()}, work.recipe.benchmark
        )
        for engine in engines.values():
            engine.close()
        stage.facts |= {name: _json_latency(value) for name, value in measured.items()}


def _json_latency(value: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "latency": {g: {b: x.model_dump(mode="json") for b, x in one.items()} for g, one in value["latency"].items()},
        "end_to_end": {b: x.model_dump(mode="json") for b, x in value["end_to_end"].items()},
    }


# --- report ----------------------------------------------------------------------------------------------------------


def _write_report(work: _Work, made: _Made | None = None) -> Path:
    from compressor.reporting import make_report

    notes = work.folder.facts("notes").get("notes", []) if made is None else made.notes
    if made is not None:
        work.folder.mark("notes", "done", facts={"notes": made.notes})
    report: Report = make_report(work.recipe, work.folder, work.task, notes)
    report.command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return report.save(work.folder.report)
