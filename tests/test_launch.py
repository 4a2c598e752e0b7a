"""Several processes: the launcher's command trains the same thing as one process at twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compressor.launch import processes_left_out
from tests.tiny_transformers import tiny

LAUNCHED = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}
PARENT = ["python", "/venv/bin/accelerate", "launch", "--num_processes", "2", "--cpu", "-m", "compressor", "run"]


@pytest.mark.parametrize(
    ("environment", "parent", "count"),
    [
        (LAUNCHED, PARENT, 2),
        (LAUNCHED, ["python", "accelerate", "launch", "--num_processes=3", "--cpu"], 3),
        (LAUNCHED | {"WORLD_SIZE": "2"}, PARENT, 0),
        (LAUNCHED | {"OMPI_COMM_WORLD_SIZE": "2"}, PARENT, 0),
        ({}, PARENT, 0),
        (LAUNCHED, ["bash", "-c", "--num_processes", "2"], 0),
    ],
)
def test_processes_are_started_only_where_the_launcher_left_them_out(
    environment: dict[str, str], parent: list[str], count: int
) -> None:
    assert processes_left_out(environment, parent) == count


def run(directory: Path, batch: int, launcher: list[str], cache: Path) -> dict[str, Any]:
    stage = f"{{steps: 150, lr: 0.001, batch: {batch}, warmup: 0}}"  # times the budget: three
    settings = ["calibration=64", "intervals=[[1,2],[3,4]]", f"depth={stage}", f"finetune={stage}", "ffn=0"]
    settings += ["text_similarity=null", "evaluation.samples=10", "task_options={num_inference_steps: 1}"]
    settings += ["benchmark={batches: [1], seconds: 0.1, rounds: 3}"]
    command = [*launcher, "-m", "compressor", "run", "--method", "ppcl", "--target", "ort-fp32", "--budget", "0.02"]
    command += ["--teacher", f"diffusers:{directory.parent / 'teacher'}", "--out", str(directory)]
    if "launch" not in launcher:  # the launcher's own --cpu must do
        command += ["--device", "cpu"]
    command += [part for setting in settings for part in ("--set", setting)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COMPRESSOR_CACHE": str(cache)}
    environment.pop("WORLD_SIZE", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    history: dict[str, Any] = json.loads((directory / "checkpoints/history.json").read_text())
    return history


def test_two_processes_train_as_one_at_twice_the_batch(tmp_path: Path) -> None:
    tiny("QwenImageTransformer2DModel", layers=6).module.save_pretrained(tmp_path / "teacher")
    accelerate = str(Path(sys.executable).parent / "accelerate")
    port = str(20000 + os.getpid() % 20000)
    launcher = [accelerate, "launch", "--num_processes", "2", "--cpu", "--main_process_port", port]
    two = run(tmp_path / "two", 4, launcher, tmp_path / "cache")
    one = run(tmp_path / "one", 8, [sys.executable], tmp_path / "cache")
    assert two.keys() == one.keys() == {"0-ppcl/depth", "0-ppcl/finetune"}
    for phase, losses in one.items():
        for name, points in losses.items():
            assert len(points) == 3
            for (step, value), (other_step, other) in zip(points, two[phase][name], strict=True):
                assert step == other_step
                assert other == pytest.approx(value, rel=1e-4), f"{phase} {name} at {step}"
