"""Runs with a user's own classifiers: what happens before, beside and after the training."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

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


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run over pictures beside it, whose recipe names them by a relative path."""
    home = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(40):
        folder = home / "set" / "abcdef"[number % 6]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / f"{number}.png")
    with contextlib.chdir(home):
        made = recipe(data="imagefolder:set", teachers=TEACHER.replace("10", "6"), targets=["ort-fp32"])
        pipeline.run(made, Path("run"), log=Log(quiet=True))
    return home


def test_a_teacher_without_weights_is_warned_of(finished: Path) -> None:
    warnings = [event["message"] for event in read_log(finished / "log.jsonl") if event["kind"] == "warning"]
    assert [message for message in warnings if f"the teacher {TEACHER} has random weights" in message]
    notes = json.loads((finished / "report/report.json").read_text())["notes"]
    assert [note for note in notes if "random weights" in note]


def test_a_teacher_without_weights_is_the_same_when_the_run_goes_on(finished: Path) -> None:
    before, events = (finished / "run.json").read_text(), len(read_log(finished / "log.jsonl"))
    pipeline.run(recipe(), finished, log=Log(quiet=True))
    said = [event.get("message", "") for event in read_log(finished / "log.jsonl")]
    assert "0-kd/distil: training, 2 steps" in said[:events]
    assert not any("training" in message or "going on" in message for message in said[events:])
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


def test_a_report_is_written_again_without_the_data_and_elsewhere(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(pictures / "run", tmp_path / "copy")
    before = json.loads((copy / "report/report.json").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    (pictures / "set").rename(pictures / "gone")
    try:
        page = pipeline.report_run(Path("copy"))
    finally:
        (pictures / "gone").rename(pictures / "set")
    after = json.loads((page.parent / "report.json").read_text())
    assert [after[key] for key in ("task", "models", "engines")] == [
        before[key] for key in ("task", "models", "engines")
    ]


def test_a_run_with_relative_paths_is_exported_from_elsewhere(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.toml").write_text('runtime = "onnxruntime"\nbatch = {max = 2, benchmark = [1]}\n')
    run = Path(os.path.relpath(pictures / "run"))
    assert pipeline.export_run(run, ["own.toml"], log=Log(quiet=True)) == [run / "artifacts/own"]
    assert Path.cwd() == tmp_path


def test_other_targets_and_samples_train_nothing_again(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    student = (run / "student/model.safetensors").stat().st_mtime_ns
    pipeline.run(recipe(targets=["openvino-fp32"], evaluation={"samples": 30}), run, log=Log(quiet=True))
    assert (run / "student/model.safetensors").stat().st_mtime_ns == student
    assert [event["kind"] for event in read_log(run / "log.jsonl")].count("phase-start") == 1
    report = json.loads((run / "report/report.json").read_text())
    own = [entry for entry in report["engines"] if entry["model"] == "student"]
    assert {"openvino-fp32", "ort-fp32", "torch-fp32"} <= {entry["target"] for entry in own}
    assert all(entry["end_to_end"] for entry in own)
    assert report["recipe"]["targets"] == ["openvino-fp32"]
    stages = json.loads((run / "run.json").read_text())["stages"]
    share = stages["evaluate ort-fp32"]["facts"]["metrics"]["top1"] * 30
    assert share == pytest.approx(round(share))
