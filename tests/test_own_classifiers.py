"""Runs with a user's own classifiers: what happens before, beside and after the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compressor import pipeline
from compressor.errors import RequestError
from compressor.log import Log, read_log
from compressor.recipe import Recipe

TINY = "timm:resnet18?layers=[1,1,1,1],channels=[4,4,8,8]"
TEACHER = f"{TINY},in_chans=1,num_classes=10"


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "methods": [{"name": "kd", "config": {"steps": 2, "batch": 8}}],
        "teachers": TEACHER,
        "students": TINY,
        "data": "digits",
        "targets": ["ort-fp32", "torch-fp32"],
        "evaluation": {"samples": 20},
        "benchmark": {"batches": [1], "seconds": 0.1, "rounds": 3},
    }
    return Recipe.parse(values | changes).resolve()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    pipeline.run(recipe(), directory, log=Log(quiet=True))
    return directory


def test_a_teacher_without_weights_is_warned_of(finished: Path) -> None:
    warnings = [event["message"] for event in read_log(finished / "log.jsonl") if event["kind"] == "warning"]
    assert [message for message in warnings if f"the teacher {TEACHER} has random weights" in message]
    notes = json.loads((finished / "report/report.json").read_text())["notes"]
    assert [note for note in notes if "random weights" in note]


def test_a_teacher_without_weights_is_the_same_when_the_run_goes_on(finished: Path) -> None:
    before = (finished / "run.json").read_text()
    pipeline.run(recipe(), finished, log=Log(quiet=True))
    stages = [json.loads(text)["stages"] for text in (before, (finished / "run.json").read_text())]
    for name, stage in stages[0].items():
        assert stages[1][name] == stage


def test_a_target_is_added_to_a_run_with_targets_of_pytorch(finished: Path) -> None:
    pipeline.export_run(finished, ["ort-fp16"], log=Log(quiet=True))
    engines = json.loads((finished / "report/report.json").read_text())["engines"]
    timed = {entry["target"] for entry in engines if entry["model"] == "student" and entry["end_to_end"]}
    assert timed == {"ort-fp32", "torch-fp32", "ort-fp16"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": f"{TINY},in_chans=1,num_classes=9"}, "teacher timm:.*tells 9 classes apart"),
        ({"device": "cuda:99"}, "device cuda:99: "),
    ],
)
def test_what_cannot_be_is_refused_before_work(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    for refuse in (pipeline.plan, lambda made: pipeline.run(made, tmp_path / "run", log=Log(quiet=True))):
        with pytest.raises(RequestError, match=message):
            refuse(recipe(**changes))
