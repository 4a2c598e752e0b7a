"""Runs that are stopped, damaged or repeated: nothing is lost, nothing is done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compressor import pipeline
from compressor.errors import CompressorError, ModelError
from compressor.log import Log
from compressor.recipe import Recipe
from tests.small_runs import recipe, run, save_tiny, student_bytes


def test_finished_stages_are_not_repeated(tmp_path: Path) -> None:
    made = recipe(save_tiny(tmp_path / "teacher"), intervals=[[1, 2]], keep=0.9)
    first = run(made, tmp_path / "run")
    stages = json.loads((tmp_path / "run/run.json").read_text())["stages"]
    second = run(made, tmp_path / "run")
    assert first["task"] == second["task"] and first["models"] == second["models"]
    again = json.loads((tmp_path / "run/run.json").read_text())["stages"]
    done = {name: stage.get("finished") for name, stage in stages.items() if name != "notes"}
    assert done and all(again[name].get("finished") == when for name, when in done.items())
    events = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert sum(event["kind"] == "phase-start" and event["phase"] == "0-ppcl/depth" for event in events) == 1


SCRIPT = """
import sys
from pathlib import Path
from compressor import pipeline
from compressor.log import Log
from compressor.recipe import Recipe
pipeline.run(Recipe.from_yaml(Path(sys.argv[1])), Path(sys.argv[2]), log=Log(quiet=True))
"""


def _slow_recipe(tmp_path: Path) -> Path:
    """A run long enough to be killed in several places."""
    made = recipe(save_tiny(tmp_path / "teacher"), intervals=[[1, 2], [3, 4]], ffn=1, text_similarity=0.5)
    config = {**made.methods[0].config, "depth": {"steps": 1500, "lr": 1e-3, "batch": 8}}
    config["finetune"] = {"steps": 1000, "lr": 1e-3, "batch": 8}
    values = made.to_dict() | {"methods": [{"name": "ppcl", "config": config}], "checkpoint_seconds": 0.3}
    path = tmp_path / "recipe.yaml"
    Recipe.parse(values).to_yaml(path)
    return path


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    path = _slow_recipe(tmp_path)
    command = [sys.executable, "-c", SCRIPT, str(path)]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=_environment(), timeout=280)
    killed = tmp_path / "killed"
    for marker in ("*depth/step-*", "*finetune/step-*", "student/compressor.json"):
        process = subprocess.Popen([*command, str(killed)], env=_environment())
        deadline = time.monotonic() + 120
        places = ("checkpoints/0-ppcl", "")
        while not any(list((killed / place).glob(marker)) for place in places) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, str(killed)], check=True, env=_environment(), timeout=280)
    assert student_bytes(killed) == student_bytes(tmp_path / "whole")
    assert (killed / "report/report.html").exists()


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    path = _slow_recipe(tmp_path)
    command = [sys.executable, "-m", "compressor", "run", "--recipe", str(path), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, env=_environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoints/0-ppcl/*depth/step-*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    line = errors.strip().splitlines()[-1]
    assert "saved at step" in line and "run the same command again" in line


def test_second_run_in_one_directory_refuses(tmp_path: Path) -> None:
    path = _slow_recipe(tmp_path)
    first = subprocess.Popen([sys.executable, "-c", SCRIPT, str(path), str(tmp_path / "run")], env=_environment())
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run/run.json").exists():
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.05)
        with pytest.raises(CompressorError, match=rf"another run works in .*process {first.pid}"):
            pipeline.run(Recipe.from_yaml(path), tmp_path / "run", log=Log(quiet=True))
    finally:
        first.kill()
        first.wait()


@pytest.mark.parametrize("damage", ["truncated weights", "no config", "no directory", "corrupt checkpoint", "nan"])
def test_damage_is_one_clear_line(damage: str, tmp_path: Path) -> None:
    teacher, out = tmp_path / "teacher", tmp_path / "run"
    spec = save_tiny(teacher)
    made = recipe(spec, intervals=[[1, 2]], keep=0.9)
    expected: type[Exception] = ModelError
    if damage == "truncated weights":
        weights = next(teacher.glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-100])
        message = "is truncated or damaged"
    elif damage == "no config":
        (teacher / "config.json").unlink()
        message = "is no diffusers model"
    elif damage == "no directory":
        made, message = recipe(f"diffusers:{tmp_path}/nothing", intervals=[[1, 2]]), "there is no such directory"
    elif damage == "corrupt checkpoint":
        run(made, out)
        stored = next((out / "checkpoints/0-ppcl").glob("*depth/finished/*.safetensors"))
        stored.write_bytes(stored.read_bytes()[:-50])
        expected, message = CompressorError, "depth"
    else:
        made = recipe(spec, intervals=[[1, 2]], keep=0.9, depth={"steps": 1500, "lr": 1e30, "batch": 8})
        expected, message = CompressorError, "(?i)non-finite|diverged|lower"
    with pytest.raises(expected, match=message) as caught:
        run(made, out)
    assert "\n" not in str(caught.value)
