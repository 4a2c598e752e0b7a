"""Running a method's phases on the real engine, looked at, and ended at a step as a kill would end them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.context import RunContext
from compressor.models.model import Model
from compressor.tasks.task import Task
from compressor.training.distributed import Distributed
from compressor.training.engine import Engine
from compressor.training.phase import Phases, Step, Train
from compressor.training.random import Randomness


class Killed(BaseException):
    """Stands for the end of the process."""


@dataclass
class Trained:
    """What a training left."""

    method: Any
    ctx: RunContext
    history: Mapping[str, Any]

    def student(self) -> Model:
        """The method's result."""
        student: Model = self.method.student()
        return student

    @property
    def weights(self) -> dict[str, Tensor]:
        """The student's."""
        state: dict[str, Tensor] = self.student().module.state_dict()
        return state


def run_method(
    directory: Path,
    method: Any,
    task: Task,
    *,
    teachers: Sequence[Model] = (),
    students: Mapping[str, Callable[[], Model]] | None = None,
    chained: Model | None = None,
    seed: int = 0,
    kill: tuple[str, int] | None = None,
    watch: Callable[[Train], object] = lambda phase: None,
) -> Trained:
    """Run all phases, or as far as the step (phase, i) that kills them; ``watch`` may change a phase before it runs."""
    randomness, alone = Randomness(seed), Distributed.single("cpu")
    ctx = RunContext(
        task,
        {"teacher": list(teachers)} if teachers else {},
        randomness,
        alone,
        students=students or {},
        chained=chained,
        name=f"0-{method.name}",
    )
    engine = Engine(
        directory,
        distributed=alone,
        randomness=randomness,
        fingerprint="test",
        checkpoint_steps=1 if kill is not None else None,
    )
    engine.run(_watched(method.phases(ctx), watch, kill))
    return Trained(method, ctx, engine.history)


def _watched(phases: Phases, watch: Callable[[Train], object], kill: tuple[str, int] | None) -> Phases:
    answer = None
    while True:
        try:
            phase = phases.send(answer)
        except StopIteration:
            return
        if isinstance(phase, Train):
            watch(phase)
            if kill is not None and phase.name == kill[0]:
                phase.step = killed_at(phase.step, kill[1])
        answer = yield phase


def killed_at(step: Step, at: int) -> Step:
    """A phase's step that ends the process when it is the turn of ``at``."""

    def wrapped(batches: Any, i: int) -> Any:
        if i == at:
            raise Killed
        return step(batches, i)

    return wrapped
