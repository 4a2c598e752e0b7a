"""The whole way on small models: from `diffusers:DIR` to engines and a report, and what happens when it is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from compressor import pipeline
from compressor.errors import CompressorError, ModelError, RequestError
from compressor.log import Log
from compressor.models.anatomy.blocks import block_stack
from compressor.models.model import load_model
from compressor.recipe import Recipe
from compressor.runtimes import load
from compressor.runtimes.manifest import read_manifest
from tests.tiny_transformers import NAMES, tiny

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


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESSOR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


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
    before = (tmp_path / "run/student/model_index.json").exists(), _student_bytes(tmp_path / "run")
    paths = pipeline.export_run(tmp_path / "run", ["ort-fp32"], {"keep": 0.9}, Log(quiet=True))
    assert paths == [tmp_path / "run/artifacts/keep=0.9/ort-fp32"]
    report = json.loads((tmp_path / "run/report/report.json").read_text())
    sizes = {point["label"]: point["parameters"] for point in report["curve"]}
    assert sizes["student"] < sizes["keep=0.9"] < sizes["teacher"]
    assert all(point["latency_ms"] > 0 and point["metrics"] for point in report["curve"])
    assert before == ((tmp_path / "run/student/model_index.json").exists(), _student_bytes(tmp_path / "run"))
    with pytest.raises(RequestError, match=r"--set calibration: not a key that a trained run can change"):
        pipeline.export_run(tmp_path / "run", ["ort-fp32"], {"calibration": 80}, Log(quiet=True))


def _student_bytes(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted((directory / "student").glob("*.safetensors")))


def test_finished_stages_are_not_repeated(tmp_path: Path) -> None:
    made = recipe(save_tiny(tmp_path / "teacher"), intervals=[[1, 2]], keep=0.9)
    run(made, tmp_path / "run")
    stages = json.loads((tmp_path / "run/run.json").read_text())["stages"]
    run(made, tmp_path / "run")
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
    assert _student_bytes(killed) == _student_bytes(tmp_path / "whole")
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
