"""What the stages of one run share: the task, the models, the training of the chain."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor import __version__
from compressor.chain import link_names
from compressor.errors import RequestError
from compressor.log import Log
from compressor.recipe import MethodEntry, Recipe
from compressor.run_directory import RunDirectory, fingerprint

if TYPE_CHECKING:
    from torch import nn

    from compressor.context import RunContext
    from compressor.deployable import Deployable
    from compressor.method import Method
    from compressor.models.model import Model
    from compressor.tasks.task import Task
    from compressor.training.distributed import Distributed

__all__ = ["Made", "Work", "check_teacher", "device_of", "task_of", "weights_hash"]


def device_of(name: str) -> str | None:
    """A recipe's device as `Distributed` takes it."""
    return None if name == "auto" else name


def task_of(recipe: Recipe) -> Task:
    """The recipe's task over its data, with the judge that the recipe names, if any.

    Raises:
        RequestError: The task, its options, its data or the judge are wrong.
    """
    from compressor.data.sources import import_object
    from compressor.registry import load_task

    task: Any = load_task(str(recipe.task))(recipe.data, recipe.task_options)
    if recipe.judge is not None:
        kind, _, argument = recipe.judge.partition(":")
        if kind != "python" or not hasattr(task, "judge"):
            raise RequestError(
                f"judge {recipe.judge!r}: give python:module:factory, a function that returns a Run, and a task that "
                "is judged by a network (image-generation)"
            )
        task.judge = import_object(argument, "a judge")()
    made: Task = task
    return made


def check_teacher(task: Task, spec: str, model: Model) -> None:
    """Refuse a teacher that does not fit the task's data, by the name that the user gave it.

    Raises:
        RequestError: It does not.
    """
    try:
        task.check(model)
    except RequestError as error:
        hint = " (a demo is for its own data alone: name a teacher for yours)" if spec.startswith("demo:") else ""
        raise RequestError(f"teacher {spec}: {error}{hint}") from error


@dataclass
class Made:
    """A student, how it is packed, and under which label it stands ("" for the run's own).

    ``others`` are further students of the same training, by the names of their deployables.
    """

    student: Model
    deployables: dict[str, Deployable]
    label: str = ""
    others: Mapping[str, Model] = field(default_factory=dict)
    history: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Work:
    """What the stages of one run share; models and task are loaded when they are first asked for.

    Attributes:
        deployables: What has been packed, by the model's name; "" is the run's own student.
    """

    def __init__(self, recipe: Recipe, folder: RunDirectory, log: Log, distributed: Distributed | None) -> None:
        self.recipe, self.folder, self.log, self._distributed = recipe, folder, log, distributed
        self.deployables: dict[str, Deployable] = {}
        self._task: Task | None = None
        self._teachers: dict[str, list[Model]] = {}
        self._references: dict[str, Model] | None = None

    @property
    def distributed(self) -> Distributed:
        if self._distributed is None:
            raise RuntimeError("this work trains nothing")
        return self._distributed

    @property
    def task(self) -> Task:
        if self._task is None:
            self._task = task_of(self.recipe)
        return self._task

    @property
    def teachers(self) -> dict[str, list[Model]]:
        if not self._teachers:
            for role, specs in self.recipe.teachers.items():
                self._teachers[role] = [self._teacher(spec, f"teacher-{role}", k) for k, spec in enumerate(specs)]
        return self._teachers

    def _teacher(self, spec: str, role: str, place: int) -> Model:
        """A teacher; where its spec names no weights, the same random ones every time, so that a run can go on."""
        import torch

        from compressor.training.random import Randomness

        randomness = Randomness(self.recipe.seed)
        randomness.phase = role
        randomness.seed_global(place, "weights", shared=True, device=torch.device("cpu"))
        model = self.load(spec)
        check_teacher(self.task, spec, model)
        return model

    def untrained_teachers(self) -> list[str]:
        """A warning for each teacher that has random weights."""
        from compressor.models.spec import has_new_weights

        return [
            f"the teacher {spec} has random weights, from which nothing is learnt: name its weights (timm:NAME@FILE, "
            "pretrained=true)"
            for specs in self.recipe.teachers.values()
            for spec in specs
            if has_new_weights(spec)
        ]

    @property
    def references(self) -> dict[str, Model]:
        """What the student is compared with, as the report names it: teachers of the first role, the chain's links."""
        from compressor.models.model import load_model

        if self._references is None:
            models = next(iter(self.teachers.values()), [])
            names = ["teacher"] if len(models) == 1 else [f"teacher-{number}" for number in range(1, len(models) + 1)]
            kept = {name: self.folder.link(name) for name in link_names(self.recipe)}
            links = {name: load_model(folder) for name, folder in kept.items() if folder.is_dir()}
            self._references = {**dict(zip(names, models, strict=True)), **links}
        return self._references

    def load(self, spec: str, *, student: bool = False) -> Model:
        """A model of the recipe; demos are trained by the main process while the others wait.

        What a student's spec leaves open (the number of classes), the task's data decide.
        """
        from compressor.models.demos.catalogue import demo_model
        from compressor.models.spec import load_model_spec, split_spec

        kind, argument = split_spec(spec)
        if kind != "demo":
            defaults: dict[str, Any] | None = getattr(self.task, "student_defaults", dict)() if student else None
            trust, task = self.recipe.trust_remote_code, str(self.recipe.task)
            return load_model_spec(spec, trust_remote_code=trust, defaults=defaults, task=task)
        device = str(self.distributed.device)
        self.distributed.on_main(
            lambda: demo_model(argument, budget=min(1.0, self.recipe.budget), log=self.log, device=device) and None
        )
        return demo_model(argument, budget=min(1.0, self.recipe.budget), device=device)

    def train(self, *, replay: bool = False, changes: Mapping[str, object] | None = None) -> Made:
        """Run the chain of methods, or load what they left.

        Args:
            replay: Only load; raise where something would have to be trained.
            changes: Configuration of the last method, for another student of the same training.
        """
        from compressor.training.random import Randomness, hash_seed

        student: Model | None = None
        deployables: dict[str, Deployable] = {}
        others: dict[str, Model] = {}
        history: dict[str, Any] = {}
        notes = self.untrained_teachers()
        for note in [] if replay else notes:
            self.log.warn(note)
        mark = self._mark()
        for k, entry in enumerate(self.recipe.methods):
            last = k == len(self.recipe.methods) - 1
            method = scaled_entry(entry, self.recipe, changes if last else None).build()
            seed = hash_seed(self.recipe.seed, k, entry.name)
            randomness = Randomness(seed, self.distributed.rank, self.distributed.processes)
            ctx = self._context(method, randomness, student, f"{k}-{entry.name}")
            engine = self._engine(randomness, mark, replay)
            if not replay:
                self.log.event("stage", stage=f"train {k}-{entry.name}")
            engine.run(method.phases(ctx), prefix=f"{k}-{entry.name}/")
            student = method.student()
            student.module.eval()
            notes += getattr(method, "notes", [])
            history |= engine.history
            mark = fingerprint(mark, entry.name, entry.config)
            if last:
                others = _other_students(method)
                deployables = method.deployables(ctx)
            elif not replay:
                self._keep(student, mark, f"student {k}-{entry.name}", self.folder.link(f"{k}-{entry.name}"))
        if student is None:
            raise RequestError("the recipe names no method")
        if not replay:
            self._keep(student, mark, "student", self.folder.student)
            for name, other in others.items():
                self._keep(other, mark, f"student {name}", self.folder.link(name))
        return Made(student, deployables, "", others, history, notes)

    def _keep(self, student: Model, mark: str, name: str, folder: Path) -> None:
        """Save a student of the chain, on the main process."""
        self.distributed.on_main(lambda: self._save(student, mark, name, folder))

    def _save(self, student: Model, mark: str, name: str, folder: Path) -> None:
        from compressor.models.model import save_model

        with self.folder.stage(name, mark) as stage:
            if not stage.finished or not folder.is_dir():
                save_model(student, folder)
                self.log.event("stage", f"student saved in {folder}", stage=name)

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
        if kind == "phase-start" and facts.get("kind") == "train":
            done, steps = facts["step"], facts["steps"]
            said = f"{phase}: going on at step {done} of {steps}" if done else f"{phase}: training, {steps} steps"
        elif kind == "phase-end":
            losses = [f"{name.removeprefix('loss/')} {value:.4g}" for name, value in facts.items() if "loss/" in name]
            said = f"{phase}: done in {facts.get('seconds', 0):.0f} s" + (f" ({', '.join(losses)})" if losses else "")
        elif kind in ("phase-stale", "skipped"):
            said = f"{phase}: {facts.get('reason') or facts.get('cause')}"
        self.log.event(kind, said, phase=phase, **{key: value for key, value in facts.items() if key != "kind"})

    def _mark(self) -> str:
        """The fingerprint of everything before the first method."""
        recipe = self.recipe
        data = {role: self.task.dataset(role).info.fingerprint for role in recipe.data}
        teachers = {role: [weights_hash(model.module) for model in models] for role, models in self.teachers.items()}
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


def _other_students(method: Any) -> dict[str, Model]:
    """The students of a method that trains several (``students()``) beside the main one, in eval mode."""
    students: dict[str, Model] = getattr(method, "students", dict)()
    others = dict(list(students.items())[1:])
    for model in others.values():
        model.module.eval()
    return others


def weights_hash(module: nn.Module) -> str:
    """A hash of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()[:16]


def scaled_entry(entry: MethodEntry, recipe: Recipe, changes: Mapping[str, object] | None) -> MethodEntry:
    """The method's configuration with its steps scaled by the budget."""

    def scale(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {
            key: max(1, round(inner * recipe.budget)) if key == "steps" and inner else scale(inner)
            for key, inner in value.items()
        }

    return MethodEntry(name=entry.name, config=scale({**entry.config, **(changes or {})}))
