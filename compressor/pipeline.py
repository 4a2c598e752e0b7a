"""The whole way: teachers, methods, student, export, measurement, report; a finished stage is not repeated.

The training part (`work`) runs on all processes of a launch; from the export on (`delivery`) the main process works
alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.delivery import deliver, export_all, measure_variant, write_report
from compressor.errors import RequestError, nearest
from compressor.log import Log
from compressor.recipe import Recipe
from compressor.run_directory import RunDirectory
from compressor.work import Made, Work, check_teacher, device_of, task_of

if TYPE_CHECKING:
    from compressor.tasks.task import Task
    from compressor.training.distributed import Distributed

__all__ = ["export_run", "plan", "report_run", "run"]


def plan(recipe: Recipe) -> list[str]:
    """Names of the stages in order; models and data are checked as far as that is cheap.

    Raises:
        RequestError: A model, data set or target cannot be had.
    """
    from compressor.training.distributed import device_problem

    device = device_of(recipe.device)
    if device is not None and (problem := device_problem(device)):
        raise RequestError(problem)
    task = task_of(recipe)
    for role in recipe.data:
        task.dataset(role)
    for specs in recipe.teachers.values():
        for spec in specs:
            _check_spec(spec, recipe, task)
    for spec in recipe.students.values():
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
    distributed = Distributed(device_of(recipe.device))
    leads = distributed.is_main
    with _open(recipe, directory, overwrite, leads, distributed) as folder:
        if leads:
            log.attach(folder.log)
        work = Work(recipe, folder, log, distributed)
        trained = work.train()
        if leads:
            deliver(work, trained)
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
    from compressor.training.distributed import Distributed, device_problem

    log = log or Log()
    targets = [str(Path(name).absolute()) if Path(name).is_file() else name for name in targets]
    with RunDirectory.existing(directory.absolute()) as folder, folder.where_it_was_started():
        log.attach(folder.log)
        recipe = Recipe.parse(folder.recipe)
        changed = recipe.model_copy(update={"targets": list(targets) or recipe.targets})
        device = device_of(recipe.device)
        if device is not None and device_problem(device):  # trained elsewhere; nothing is trained here
            device = None
        work = Work(changed, folder, log, Distributed(device))
        if settings:
            made = _variant(work, settings)
        else:
            made = work.train(replay=True)
        paths = export_all(work, made, only=targets)
        measure_variant(work, made)
        write_report(work)
    return [directory / path.relative_to(folder.path) for path in paths]


def report_run(directory: Path) -> Path:
    """Write a run's report anew from what was measured; the path of ``report.html``."""
    with RunDirectory.existing(directory) as folder:
        return write_report(Work(Recipe.parse(folder.recipe), folder, Log(quiet=True), None))


# --- opening ---------------------------------------------------------------------------------------------------------


def _open(recipe: Recipe, path: Path, overwrite: bool, leads: bool, distributed: Distributed) -> RunDirectory:
    """The run's directory; a refusal on the main process stops all."""
    opened: list[RunDirectory] = []
    distributed.on_main(lambda: opened.append(RunDirectory.create(path, recipe.to_dict(), overwrite=overwrite)))
    return opened[0] if leads else RunDirectory.create(path, recipe.to_dict(), leads=False)


def _check_spec(spec: str, recipe: Recipe, task: Task | None = None) -> None:
    """Refuse a model that cannot be loaded, as far as its files tell, or (``task``) does not fit the data."""
    from compressor.models.demos.catalogue import demo
    from compressor.models.spec import load_model_spec, split_spec

    kind, argument = split_spec(spec)
    if kind == "demo":
        demo(argument)
    else:
        model = load_model_spec(spec, trust_remote_code=recipe.trust_remote_code, task=recipe.task)
        if task is not None:
            check_teacher(task, spec, model)


# --- another student -------------------------------------------------------------------------------------------------


def _variant(work: Work, settings: Mapping[str, object]) -> Made:
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
