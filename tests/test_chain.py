"""A chain of methods: every student is kept, measured beside the teacher, and a rung of the report's ladder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compressor import pipeline
from compressor.chain import chain_lines
from compressor.log import Log
from compressor.models.edits.sparsity import masked_weights
from compressor.models.model import load_model
from compressor.profiles import report_facts as facts
from compressor.profiles.report import Report
from compressor.recipe import Recipe
from compressor.recipe_resolution import Flags
from tests.small_runs import FAST, STAGES, run, save_tiny

STAGE = {"steps": 100, "lr": 1e-3, "fake_lr": 1e-3, "warmup": 0}
DMD2 = {"num_steps": 2, "fake_updates": 1, "batch": 4, "match": STAGE, "adversarial": STAGE}


def chain(teacher: str) -> Recipe:
    methods = [
        {"name": "ppcl", "config": {**STAGES, "intervals": [[1, 2], [3, 4]], "active": [1], "ffn": 0}},
        {"name": "dmd2", "config": DMD2},
        {"name": "sparsity", "config": {"steps": 100, "batch": 8, "min_weights": 16}},
    ]
    options = {"num_inference_steps": 5}
    given = {**FAST, "task_options": options, "methods": methods, "teachers": teacher, "targets": ["torch-fp32"]}
    return Recipe.parse(given).resolve()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("chain")
    made = chain(save_tiny(folder / "teacher"))
    return folder / "run", Report.model_validate(run(made, folder / "run"))


def test_every_student_is_a_rung_with_size_calls_latency_and_quality(finished: tuple[Path, Report]) -> None:
    report = finished[1]
    assert report.ladder == ["teacher", "0-ppcl", "1-dmd2", "student"] == [model.name for model in report.models]
    teacher, pruned, few, sparse = report.models
    assert [model.calls for model in report.models] == [5, 5, 2, 2]
    assert teacher.parameters and pruned.parameters and pruned.parameters < teacher.parameters
    assert pruned.parameters == few.parameters == sparse.parameters
    assert pruned.bytes == few.bytes == sparse.bytes
    assert few.zeros is not None and few.zeros < 0.01 and 0.3 < (sparse.zeros or 0) < 0.5
    assert all(model.metrics for model in report.models)
    engines = {engine.model: engine for engine in report.engines}
    assert set(engines) == set(report.ladder)
    assert all(engine.end_to_end["1"].p50 > 0 and engine.metrics for engine in engines.values())


def test_models_are_compared_with_the_teacher_and_with_the_link_before(finished: tuple[Path, Report]) -> None:
    pairs = [(c.a, c.b) for c in finished[1].comparisons if c.what == "latency"]
    to_teacher = [("teacher", "0-ppcl"), ("teacher", "1-dmd2"), ("teacher", "student")]
    assert pairs == [*to_teacher, ("0-ppcl", "1-dmd2"), ("1-dmd2", "student")]


def test_students_on_the_way_are_kept_as_models(finished: tuple[Path, Report]) -> None:
    folder = finished[0]
    pruned, few = (load_model(folder / "students" / name) for name in ("0-ppcl", "1-dmd2"))
    final = load_model(folder / "student")
    assert "student_timesteps" not in pruned.info.extra
    assert few.info.extra["student_timesteps"] == final.info.extra["student_timesteps"] == [999, 499]
    assert not masked_weights(few.module) and masked_weights(final.module)


def test_report_draws_the_ladder_and_says_what_the_zeros_bought(finished: tuple[Path, Report]) -> None:
    folder, report = finished
    table = facts.ladder_table(report)
    assert table is not None
    assert [row.cells[0] for row in table.rows] == report.ladder
    assert [row.cells[4] for row in table.rows] == ["5", "5", "2", "2"]
    assert any(note.startswith("student, ") and "the speed of 1-dmd2" in note for note in table.notes)
    assert "## Chain" in (folder / "report/report.md").read_text()
    assert ">Chain</h2>" in (folder / "report/report.html").read_text()


def test_finished_chain_is_not_repeated_and_its_report_is_remade_under_its_own_command(
    finished: tuple[Path, Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished[0]
    before = json.loads((folder / "run.json").read_text())
    monkeypatch.setattr("sys.argv", ["compress", "report", str(folder)])
    pipeline.report_run(folder)
    report = json.loads((folder / "report/report.json").read_text())
    assert report["command"] == finished[1].command and "report" not in report["command"].split()[:2]
    run(Recipe.parse(before_recipe(folder)), folder)
    after = json.loads((folder / "run.json").read_text())["stages"]
    same = ("student 0-ppcl", "student 1-dmd2", "student", "evaluate 1-dmd2", "benchmark")
    assert all(after[name] == before["stages"][name] for name in same)


def before_recipe(folder: Path) -> dict[str, Any]:
    from compressor.plain_yaml import load_yaml

    stored: dict[str, Any] = load_yaml((folder / "recipe.yaml").read_text())
    return stored


def test_single_method_has_no_ladder(tmp_path: Path) -> None:
    method = {"name": "sparsity", "config": {"steps": 1, "batch": 8, "min_weights": 16}}
    given = {
        **FAST,
        "methods": [method],
        "teachers": save_tiny(tmp_path / "teacher", layers=2),
        "targets": ["torch-fp32"],
    }
    report = Report.model_validate(run(Recipe.parse(given).resolve(), tmp_path / "run"))
    assert report.ladder == [] and facts.ladder_table(report) is None
    assert [model.name for model in report.models] == ["teacher", "student"]
    assert not (tmp_path / "run/students").exists()
    assert any("the speed of teacher" in line for line in facts.notes(report))


def test_each_of_several_teachers_has_a_row_and_the_best_is_what_the_student_is_held_against(tmp_path: Path) -> None:
    spec = "timm:resnet18?layers=[1,1,1,1],channels=[8,8,16,16],num_classes=10,in_chans=1"
    values = {
        "methods": [{"name": "meal-v2", "config": {"steps": 1, "batch": 8}}],
        "teachers": {"teacher": [spec, spec]},
        "students": spec,
        "data": "scenes",
        "targets": ["torch-fp32"],
    }
    fast = {key: value for key, value in FAST.items() if key != "task_options"}
    pipeline.run(Recipe.parse({**fast, **values}).resolve(), tmp_path / "run", log=Log(quiet=True))
    report = Report.model_validate_json((tmp_path / "run/report/report.json").read_text())
    assert [model.name for model in report.models] == ["teacher-1", "teacher-2", "student"]
    assert {engine.model for engine in report.engines} == {"teacher-1", "teacher-2", "student"}
    best = max(report.models[:2], key=lambda model: (model.metrics or {})["top1"] or 0)
    assert report.teacher is not None and report.teacher.metrics == best.metrics
    assert ("teacher-2", "student") in {(c.a, c.b) for c in report.comparisons}


def test_plan_says_what_every_method_of_a_chain_starts_from_and_learns_from() -> None:
    recipe = Recipe().resolve(Flags(methods=["ppcl", "dmd2"], sparsity="2:4"))
    assert chain_lines(recipe)[:3] == [
        "ppcl starts from a copy of demo:digits-mmdit; its teacher is demo:digits-mmdit",
        "dmd2 goes on with the student of ppcl; its teacher is demo:digits-mmdit",
        "sparsity 2:4 goes on with the student of dmd2; its teacher is dmd2",
    ]
    assert chain_lines(Recipe().resolve(Flags(methods=["ppcl"]))) == []
