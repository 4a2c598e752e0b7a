"""Targets that cannot be built: the run goes on with the others, and the report says what to do."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from compressor import pipeline
from compressor.log import Log
from compressor.recipe import Recipe
from tests.small_runs import FAST

SEGMENTER = "timm:resnet18?layers=[1,1,1,1],channels=[4,4,8,8],width=16,num_classes=11"


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed")
def test_target_that_lacks_the_sizes_of_free_axes_is_left_out_and_the_report_says_which_keys_to_set(tmp_path: Path):
    recipe = {
        **FAST,
        "task": "segmentation",
        "methods": [{"name": "kd", "config": {"steps": 1, "batch": 4}}],
        "teachers": SEGMENTER,
        "students": SEGMENTER,
        "data": "scenes:32?masks=true,channels=3",
        "task_options": {"sizes": "free"},
        "targets": ["trt-rtx-fp16", "trt-int8", "ort-fp32"],
    }
    page = pipeline.run(Recipe.parse(recipe).resolve(), tmp_path, log=Log(quiet=True))
    engines = {engine["target"]: engine for engine in json.loads((page.parent / "report.json").read_text())["engines"]}
    assert engines["ort-fp32"]["built"] and engines["ort-fp32"]["metrics"]
    section = (
        (page.parent / "report.md").read_text().partition("## Not measured")[2].partition("\n## ")[0].replace("\\", "")
    )
    for target in ("trt-rtx-fp16", "trt-int8"):
        assert not engines[target]["built"]
        (line,) = [line for line in section.splitlines() if f"student on {target}: " in line]
        assert "set axes.height = [min, opt, max], axes.width = [min, opt, max] in the target's file" in line
