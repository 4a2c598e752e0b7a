"""The whole way on small models: from `diffusers:DIR` to engines and a report."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from compressor import pipeline
from compressor.errors import RequestError
from compressor.log import Log
from compressor.models.anatomy.blocks import block_stack
from compressor.models.model import load_model
from compressor.recipe import Recipe
from compressor.runtimes import load
from compressor.runtimes.manifest import read_manifest
from tests.small_runs import FAST, STAGES, recipe, run, save_tiny, student_bytes
from tests.tiny_transformers import NAMES, tiny


@pytest.mark.parametrize("name", NAMES)
def test_own_transformer_is_pruned_in_depth_exported_and_loads_as_its_plain_class(name: str, tmp_path: Path) -> None:
    made = recipe(
        save_tiny(tmp_path / "teacher", name), intervals=[[1, 2], [3, 4]], keep=0.8, ffn=0, text_similarity=None
    )
    report = run(made, tmp_path / "run")
    student = tmp_path / "run/student"
    plain = getattr(diffusers, name).from_pretrained(student).eval()
    assert len(block_stack(plain).blocks) in (4, 5)
    example = tiny(name)
    ours = block_stack(load_model(student).module.eval())
    with torch.no_grad():
        expected = ours.forward(example.sample, example.timestep, example.condition)
        walked = block_stack(plain).forward(example.sample, example.timestep, example.condition)
    assert torch.equal(walked, expected)
    graph = read_manifest(tmp_path / "run/artifacts/ort-fp32").graphs["denoiser"]
    assert all(parity.relative < 1e-4 for parity in graph.parity)
    engines = {(entry["model"], entry["target"]): entry for entry in report["engines"]}
    assert engines["student", "ort-fp32"]["metrics"].keys() == report["models"][0]["metrics"].keys()
    assert engines["student", "ort-fp32"]["latency"]["denoiser"]["1"]["p50"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_own_transformer_is_pruned_in_width_where_its_class_allows(name: str, tmp_path: Path) -> None:
    text = [[0, 2]] if name not in ("DiTTransformer2DModel", "PixArtTransformer2DModel") else None
    config = {"intervals": [[1, 2]], "active": [1], "ffn": [0], "text": text, "text_similarity": None}
    made = recipe(save_tiny(tmp_path / "teacher", name), ("openvino-fp16",), **config)
    run(made, tmp_path / "run")
    student = load_model(tmp_path / "run/student")
    assert student.info.edits[0].arguments["plan"][0]["ffn"]
    graph = read_manifest(tmp_path / "run/artifacts/openvino-fp16").graphs["denoiser"]
    assert all(parity.relative < 1e-2 for parity in graph.parity)


def test_engine_samples_what_the_student_samples_and_takes_any_batch(tmp_path: Path) -> None:
    from compressor.measurement import torch_driver
    from compressor.tasks.image_generation import ImageGeneration

    made = recipe(save_tiny(tmp_path / "teacher"), intervals=[[1, 2], [3, 4]], ffn=1, text_similarity=0.5)
    run(made, tmp_path / "run")
    task = ImageGeneration(made.data, made.task_options)
    ours = torch_driver(task.deployable(load_model(tmp_path / "run/student")))
    engine = load(tmp_path / "run/artifacts/ort-fp32")
    for labels in (np.array([3]), np.arange(7)):
        expected = ours({"label": labels}, seed=5)["image"]
        assert np.abs(engine({"label": labels}, seed=5)["image"] - expected).max() < 1e-4


def test_another_size_is_exported_without_training(tmp_path: Path) -> None:
    made = recipe(save_tiny(tmp_path / "teacher"), intervals=[[1, 2], [3, 4]], keep=0.7, ffn=0, text_similarity=None)
    run(made, tmp_path / "run")
    before = (tmp_path / "run/student/model_index.json").exists(), student_bytes(tmp_path / "run")
    paths = pipeline.export_run(tmp_path / "run", ["ort-fp32"], {"keep": 0.9}, Log(quiet=True))
    assert paths == [tmp_path / "run/artifacts/keep=0.9/ort-fp32"]
    report = json.loads((tmp_path / "run/report/report.json").read_text())
    sizes = {point["label"]: point["parameters"] for point in report["curve"]}
    assert sizes["student"] < sizes["keep=0.9"] < sizes["teacher"]
    assert all(point["latency_ms"] > 0 and point["metrics"] for point in report["curve"])
    assert before == ((tmp_path / "run/student/model_index.json").exists(), student_bytes(tmp_path / "run"))
    with pytest.raises(RequestError, match=r"--set calibration: not a key that a trained run can change"):
        pipeline.export_run(tmp_path / "run", ["ort-fp32"], {"calibration": 80}, Log(quiet=True))


def test_model_that_does_not_fit_the_data_is_refused_before_work(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 4,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
    }
    diffusers.DiTTransformer2DModel(in_channels=4, **config).save_pretrained(tmp_path / "teacher")
    made = recipe(f"diffusers:{tmp_path}/teacher", intervals=[[1, 2]])
    with pytest.raises(RequestError, match=r"takes samples of 4 channels, the set 'digits/train' has 1"):
        run(made, tmp_path / "run")


def test_latents_of_ones_own_train_and_measure_without_classes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    (tmp_path / "data").mkdir()
    tensors = {"latents": torch.randn(40, 1, 8, 8), "encoder_hidden_states": torch.randn(41, 3, 32)}
    save_file(tensors, str(tmp_path / "data/train.safetensors"), {"null_row": "40"})
    entry = {"name": "ppcl", "config": {**STAGES, "intervals": [[1, 2]], "keep": 0.9}}
    values = {
        **FAST,
        "methods": [entry],
        "teachers": save_tiny(tmp_path / "teacher"),
        "data": f"latents:{tmp_path}/data",
    }
    report = run(Recipe.parse({**values, "targets": ["ort-fp32"]}).resolve(), tmp_path / "run")
    assert set(report["models"][0]["metrics"]) == {"frechet_distance", "diversity", "pixel_std"}


def test_judge_that_cannot_be_had_is_refused_before_work(tmp_path: Path) -> None:
    made = recipe(save_tiny(tmp_path / "teacher"), intervals=[[1, 2]]).model_copy(update={"judge": "demo:other"})
    with pytest.raises(RequestError, match=r"judge 'demo:other': give python:module:factory"):
        pipeline.plan(made)
