"""`compress bundle` and `compress infer`: from a run's folder to labels and pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compressor.cli.app import execute
from compressor.runtimes.bundle import read_bundle
from tests.small_artifacts import classifier, generator, segmenter

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command line; its exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = execute([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is left of a run that `compress bundle` reads: two artifacts, the teacher's, and the measured figures."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "kd-digits"
    recipe = {"teachers": {"teacher": "demo:digits"}, "data": {"train": "digits"}}
    classifier(folder / "artifacts" / "ort-fp32", artifact="ort-fp32", recipe=recipe)
    classifier(folder / "artifacts" / "other", artifact="other")
    classifier(folder / "artifacts" / "teacher" / "ort-fp32", artifact="teacher/ort-fp32")
    stages = {
        "evaluate teacher": {"facts": {"metrics": {"top1": 0.9}, "parameters": 20}},
        "evaluate student": {"facts": {"metrics": {"top1": 0.8}, "png": "..."}},
        "evaluate ort-fp32": {"facts": {"metrics": {"top1": 0.7}, "bytes": 9, "load_ms": 1.5}},
    }
    (folder / "run.json").write_text(json.dumps({"schema": 1, "stages": stages}))
    (folder / "recipe.yaml").write_text("task: classification\n")
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    image = np.zeros((20, 20), np.uint8)
    image[:, :10] = 255
    Image.fromarray(image).save(tmp_path / "half.png")
    return tmp_path / "half.png"


def test_bundle_of_a_run_holds_its_figures(cli: Cli, run: Path) -> None:
    code, out, _ = cli("bundle", run, "--target", "ort-fp32")
    assert (code, out) == (0, "kd-digits-ort-fp32.zip\n")
    facts = read_bundle(out.strip()).bundle
    assert facts is not None
    assert facts.metrics == {
        "teacher": {"top1": 0.9, "parameters": 20},
        "student": {"top1": 0.8},
        "engine": {"top1": 0.7, "bytes": 9, "load_ms": 1.5},
    }
    assert "demo:digits" in facts.licence


def test_bundle_takes_an_artifact_s_folder_and_a_name(cli: Cli, run: Path, tmp_path: Path) -> None:
    code, out, _ = cli("bundle", run / "artifacts" / "other", "--out", tmp_path / "new" / "mine.zip", "--json")
    value = json.loads(out)
    assert (code, value["bundle"]) == (0, str(tmp_path / "new" / "mine.zip"))
    assert value["bytes"] == (tmp_path / "new" / "mine.zip").stat().st_size
    assert value["manifest"]["bundle"]["labels"] == ["dark", "left", "bright"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "has several artifacts: add --target, one of ort-fp32, other, teacher/ort-fp32"),
        (["--target", "ort-fp23"], "has no artifact 'ort-fp23': did you mean ort-fp32"),
        (["--target", "other", "--out", "x.tar"], "a bundle is called NAME.zip"),
    ],
)
def test_bundle_refuses_in_one_line(cli: Cli, run: Path, arguments: list[str], said: str) -> None:
    code, out, err = cli("bundle", run, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_bundle_of_what_is_no_run_is_refused(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("bundle", tmp_path)
    assert code == 2 and "is no artifact and no run with artifacts" in err


@pytest.mark.parametrize("form", ["bundle", "artifact", "run"])
def test_infer_prints_labels_of_a_picture(cli: Cli, run: Path, picture: Path, form: str) -> None:
    cli("bundle", run, "--target", "ort-fp32", "--out", "x.zip")
    model: list[object] = {
        "bundle": ["x.zip"], "artifact": [run / "artifacts" / "ort-fp32"], "run": [run, "--target", "ort-fp32"],
    }[form]  # fmt: skip
    code, out, _ = cli("infer", *model, picture, "--top", 2)
    assert code == 0
    rows = [line.split() for line in out.splitlines() if str(picture) in line]
    assert rows[0][1] == "left" and len(rows) == 2
    code, out, _ = cli("infer", *model, picture, picture, "--json")
    answers = json.loads(out)["answers"]
    assert [answer["labels"][0]["name"] for answer in answers] == ["left", "left"]
    assert answers[0]["labels"][0]["probability"] > 0.5 and answers[0]["labels"][0]["index"] == 1


def test_infer_takes_a_folder_of_pictures(cli: Cli, run: Path, picture: Path, tmp_path: Path) -> None:
    for name in ("b/1.png", "a/2.JPG", "a/notes.txt", "a/.hidden.png"):
        (tmp_path / "many" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(picture).save(tmp_path / "many" / name, "PNG")
    code, out, _ = cli("infer", run / "artifacts" / "ort-fp32", "many", "half.png", "--json")
    assert code == 0
    assert [answer["asked"] for answer in json.loads(out)["answers"]] == ["many/a/2.JPG", "many/b/1.png", "half.png"]
    (tmp_path / "none").mkdir()
    code, _, err = cli("infer", run / "artifacts" / "ort-fp32", "none")
    assert code == 2 and "none holds no pictures (bmp gif" in err


def test_infer_writes_the_pictures_of_labels(cli: Cli, tmp_path: Path) -> None:
    artifact = generator(tmp_path / "draws")
    code, out, _ = cli("infer", artifact, "--label", 2, "--label", 3, "--seed", 5, "--out", tmp_path / "out")
    assert code == 0
    assert [Path(line).name for line in out.splitlines()] == ["2-5.png", "3-5.png"]
    assert np.asarray(Image.open(tmp_path / "out" / "3-5.png")).tolist() == [[0, 255], [0, 255]]


def test_infer_writes_a_mask_as_a_picture_whose_pixels_are_classes(cli: Cli, tmp_path: Path, picture: Path) -> None:
    cli("bundle", segmenter(tmp_path / "cuts"), "--out", tmp_path / "x.zip")
    code, out, _ = cli("infer", tmp_path / "x.zip", picture, "--out", tmp_path)
    assert (code, out) == (0, f"{tmp_path / 'half.classes.png'}\n")
    mask = Image.open(tmp_path / "half.classes.png")
    assert mask.mode == "P" and mask.size == (20, 20)
    assert np.array_equal(np.asarray(mask), np.asarray(Image.open(picture)) > 127)
    colours = np.asarray(mask.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) == 2


def test_infer_writes_latents_as_arrays(cli: Cli, tmp_path: Path) -> None:
    artifact = generator(tmp_path / "draws", clip=None)
    assert cli("infer", artifact, "--label", 2, "--out", tmp_path)[0] == 0
    assert np.load(tmp_path / "2-0.npz")["image"].tolist() == [[[1, 1], [1, 1]]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["looks"], "this model looks at pictures: name one or more"),
        (["looks", "half.png", "--label", "1"], "this model takes no labels"),
        (["looks", "nowhere.png"], "cannot read the picture nowhere.png"),
        (["draws"], "add --label NAME or --label N"),
        (["draws", "half.png"], "this model takes no pictures"),
        (["draws", "--label", "9"], "must lie in [0, 4)"),
        (["draws", "--label", "cat"], "no label 'cat'"),
        (["x.zip", "half.png", "--target", "a"], "leave it out where a bundle is given"),
    ],
)
def test_infer_refuses_in_one_line(
    cli: Cli, tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    classifier(tmp_path / "looks")
    generator(tmp_path / "draws")
    code, out, err = cli("infer", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_infer_of_a_damaged_bundle_fails_in_one_line(cli: Cli, run: Path, picture: Path) -> None:
    cli("bundle", run, "--target", "other", "--out", "x.zip")
    data = Path("x.zip").read_bytes()
    Path("x.zip").write_bytes(data[:-30])
    code, out, err = cli("infer", "x.zip", picture)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "x.zip is no bundle" in err
    shutil.rmtree(run)
    code, _, err = cli("infer", run, picture)
    assert code == 2 and f"there is no {run}" in err


def test_bench_times_a_bundle_beside_its_artifact(cli: Cli, run: Path) -> None:
    cli("bundle", run, "--target", "ort-fp32", "--out", "x.zip")
    arguments = ("--batch", 1, "--seconds", 0.05, "--rounds", 3, "--json")
    code, out, err = cli("bench", run / "artifacts" / "ort-fp32", "x.zip", *arguments)
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [row["artifact"] for row in rows] == ["runs/kd-digits/artifacts/ort-fp32", "x.zip"]
    assert all(row["p50"] > 0 for row in rows)
