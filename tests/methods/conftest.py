"""A small world for methods that distil classifiers: untrained teachers, real data, the real engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.models.model import Model
from compressor.models.spec import load_model_spec
from compressor.registry import load_method
from compressor.tasks.classification import Classification
from compressor.training.phase import Train
from tests.method_runs import Trained, run_method

TEACHER = "timm:resnet18?layers=[1,1,1,1],channels=[8,8,16,16],num_classes=10,in_chans=1"
STUDENT = "timm:resnet18?layers=[1,1,1,1],channels=[4,4,8,8]"


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
        watch: Callable[[Train], object] = lambda phase: None,
    ) -> Trained:
        task = Classification({"train": data}, {})
        torch.manual_seed(1)
        loaded = [load_model_spec(one) if isinstance(one, str) else one for one in teachers]
        students = {"student": lambda: load_model_spec(student, defaults=task.student_defaults())}
        method_class = load_method(name)
        small = {"steps": 4, "batch": 8} | dict(config or {})
        method = method_class(method_class.Config.model_validate(small))
        kill = None if kill_at is None else ("distil", kill_at)
        return run_method(
            tmp_path / directory, method, task, teachers=loaded, students=students, seed=seed, kill=kill, watch=watch
        )

    return run
