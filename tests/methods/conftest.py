"""A small world for methods that distil classifiers: untrained teachers, real data, the real engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.context import RunContext
from compressor.method import Method
from compressor.models.model import Model
from compressor.models.spec import load_model_spec
from compressor.registry import load_method
from compressor.tasks.classification import Classification
from compressor.training.distributed import Distributed
from compressor.training.engine import Engine
from compressor.training.phase import Phases, Train
from compressor.training.random import Randomness

TEACHER = "timm:resnet18?layers=[1,1,1,1],channels=[8,8,16,16],num_classes=10,in_chans=1"
STUDENT = "timm:resnet18?layers=[1,1,1,1],channels=[4,4,8,8]"


class Killed(BaseException):
    """Stands for the end of the process."""


@dataclass
class Trained:
    """What a training left."""

    method: Method
    ctx: RunContext
    history: Mapping[str, Any]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return self.method.student().module.state_dict()


@pytest.fixture
def distil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trained]:
    """Train a method: ``distil("kd", {"steps": 3}, teachers=[...], student=SPEC, kill_at=2)``."""
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))

    def run(
        name: str,
        config: Mapping[str, Any] | None = None,
        *,
        teachers: Sequence[str | Model] = (TEACHER,),
        student: str = STUDENT,
        data: str = "scenes",
        seed: int = 0,
        kill_at: int | None = None,
        directory: str = "run",
        watch: Callable[[Train], Train] = lambda phase: phase,
    ) -> Trained:
        task = Classification({"train": data}, {})
        torch.manual_seed(1)
        loaded = [load_model_spec(one) if isinstance(one, str) else one for one in teachers]
        distributed, randomness = Distributed.single("cpu"), Randomness(seed)
        students = {"student": lambda: load_model_spec(student, defaults=task.student_defaults())}
        ctx = RunContext(task, {"teacher": loaded}, randomness, distributed, students=students, name=f"0-{name}")
        method_class = load_method(name)
        small = {"steps": 4, "batch": 8} | dict(config or {})
        method = method_class(method_class.Config.model_validate(small))
        engine = Engine(
            tmp_path / directory,
            distributed=distributed,
            randomness=randomness,
            fingerprint="test",
            checkpoint_steps=1 if kill_at is not None else None,
        )
        engine.run(_watched(method.phases(ctx), watch, kill_at))
        return Trained(method, ctx, engine.history)

    return run


def _watched(phases: Phases, watch: Callable[[Train], Train], kill_at: int | None) -> Phases:
    """The same phases, looked at, and ended at a step of the last one as a kill would end them."""
    answer = None
    while True:
        try:
            phase = phases.send(answer)
        except StopIteration:
            return
        if isinstance(phase, Train):
            phase = watch(phase)
            if kill_at is not None:
                phase.step = _killed_at(phase.step, kill_at, last=phase.name == "distil")
        answer = yield phase


def _killed_at(step: Any, kill_at: int, last: bool) -> Any:
    def wrapped(batches: Any, i: int) -> Any:
        if last and i == kill_at:
            raise Killed
        return step(batches, i)

    return wrapped
