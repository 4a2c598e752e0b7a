"""Runs of the whole pipeline that take seconds: a tiny random teacher, a few steps, few samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compressor import pipeline
from compressor.log import Log
from compressor.recipe import Recipe
from tests.tiny_transformers import tiny

FAST: dict[str, Any] = {
    "budget": 0.02,  # scales the judge's steps; the method's are given below
    "evaluation": {"samples": 20},
    "task_options": {"num_inference_steps": 2},
    "benchmark": {"batches": [1], "seconds": 0.2, "rounds": 3},
}
STAGES: dict[str, Any] = {
    "calibration": 64,
    "depth": {"steps": 100, "lr": 1e-3, "batch": 8},  # times the budget: two steps
    "finetune": {"steps": 100, "lr": 1e-3, "batch": 8},
}


def save_tiny(directory: Path, name: str = "QwenImageTransformer2DModel", layers: int = 6) -> str:
    tiny(name, layers=layers).module.save_pretrained(directory)
    return f"diffusers:{directory}"


def recipe(teacher: str, targets: tuple[str, ...] = ("ort-fp32",), **config: Any) -> Recipe:
    entry = {"name": "ppcl", "config": {**STAGES, **config}}
    return Recipe.parse({**FAST, "methods": [entry], "teachers": teacher, "targets": list(targets)}).resolve()


def run(made: Recipe, directory: Path) -> dict[str, Any]:
    page = pipeline.run(made, directory, log=Log(quiet=True))
    report: dict[str, Any] = json.loads((page.parent / "report.json").read_text())
    return report


def student_bytes(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted((directory / "student").glob("*.safetensors")))
