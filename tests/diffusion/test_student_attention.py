"""``--set attention=blade``: the student trains, is saved, and is exported under its own sparse attention."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor.diffusion.student_attention import AttentionConfig, BladeConfig, with_attention
from compressor.errors import ModelError, RequestError
from compressor.measurement import LoadedEngine, torch_driver
from compressor.methods.generation.dmd2 import DMD2, DMD2Config
from compressor.methods.generation.ppcl import PPCL, PPCLConfig, Stage
from compressor.models.model import Model, load_model, save_model
from compressor.tasks.image_generation import ImageGeneration
from tests.method_runs import Trained, run_method
from tests.tiny_transformers import tiny

BLADE = {"block_size": 4, "samples": 4, "min_retain_ratio": 0.5, "max_retain_ratio": 0.5}
STAGE = {"steps": 1, "lr": 1e-3, "fake_lr": 1e-3, "warmup": 0}


def model(name: str, layers: int = 2) -> Model:
    return tiny(name, layers=layers).model()


def train(directory: Path, method: Any, teacher: Model) -> Trained:
    return run_method(directory, method, ImageGeneration({"train": "digits"}, {}), teachers=[teacher])


def processors(made: Model) -> list[str]:
    return [type(part.processor).__name__ for part in made.module.modules() if hasattr(part, "processor")]


@pytest.mark.parametrize(
    ("name", "processor"),
    [("DiTTransformer2DModel", "DiTProcessor"), ("QwenImageTransformer2DModel", "QwenImageProcessor")],
)
def test_sparse_student_is_trained_saved_and_exported_with_its_mask(tmp_path: Path, name: str, processor: str) -> None:
    from compressor.exporters.export import export
    from compressor.profiles.target import load_target

    pytest.importorskip("onnxruntime")
    teacher = model(name)
    config = {"num_steps": 2, "fake_updates": 1, "batch": 4, "match": STAGE, "adversarial": STAGE | {"steps": 0}}
    trained = train(
        tmp_path / "run", DMD2(DMD2Config.model_validate({**config, "attention": "blade", "blade": BLADE})), teacher
    )

    assert set(processors(trained.method.student())) == {processor}
    assert not {processor} & set(processors(teacher)), "the teacher stays dense"
    save_model(trained.method.student(), tmp_path / "student")
    deployable = trained.ctx.task.deployable(load_model(tmp_path / "student"))
    export(deployable, load_target("ort-fp32"), tmp_path / "artifact")
    engine = LoadedEngine(tmp_path / "artifact")
    request = {"label": np.array([1, 4, 9])}
    drawn = engine.driver(request, seed=2)["image"]
    np.testing.assert_allclose(drawn, torch_driver(deployable)(request, seed=2)["image"], atol=1e-3)
    engine.close()
    for part in deployable.graphs["denoiser"].module.modules():
        if hasattr(part, "processor"):
            part.processor.attention = replace(part.processor.attention, min_retain_ratio=1.0, max_retain_ratio=1.0)
    dense = torch_driver(deployable)(request, seed=2)["image"]
    assert np.abs(drawn - dense).max() > 1e-2, "the mask makes a difference"


def test_pruned_student_attends_sparsely_and_records_it(tmp_path: Path) -> None:
    stages = {"depth": Stage(steps=1, lr=1e-3, batch=8), "finetune": Stage(steps=1, lr=1e-3, batch=8)}
    config = PPCLConfig(
        calibration=64, intervals=[(1, 2)], keep=0.8, attention="blade", blade=BladeConfig(**BLADE), **stages
    )
    student = train(tmp_path, PPCL(config), model("QwenImageTransformer2DModel", layers=4)).method.student()
    assert [change.name for change in student.info.edits] == ["attention.blade"]
    assert processors(student) == ["QwenImageProcessor"] * 3
    save_model(student, tmp_path / "student")
    assert processors(load_model(tmp_path / "student")) == ["QwenImageProcessor"] * 3


def test_dense_attention_leaves_the_student_as_it_is() -> None:
    student = model("DiTTransformer2DModel")
    assert with_attention(student, AttentionConfig(), (1, 8, 8)) is student


def test_attention_that_could_leave_nothing_out_is_refused() -> None:
    config = AttentionConfig(attention="blade")
    with pytest.raises(RequestError, match="a sample has 16 tokens and blade.block_size is 128: make it smaller"):
        with_attention(model("DiTTransformer2DModel"), config, (1, 8, 8))
    with pytest.raises(RequestError, match="samples must lie in 1..4"):
        few = AttentionConfig(attention="blade", blade=BladeConfig(block_size=4))
        with_attention(model("DiTTransformer2DModel"), few, (1, 8, 8))
    with pytest.raises(ModelError, match="no self-attention that can be made block-sparse"):
        small = AttentionConfig(attention="blade", blade=BladeConfig(**BLADE))
        with_attention(model("FluxTransformer2DModel"), small, (1, 8, 8))


def test_sparse_network_compiles_into_one_graph() -> None:
    made = tiny("DiTTransformer2DModel", layers=1)
    student = with_attention(
        made.model(),
        AttentionConfig(attention="blade", blade=BladeConfig(**BLADE)),
        (1, 8, 8),
    )
    with torch.no_grad():
        expected = made.library_output()
        made.module = torch.compile(student.module, backend="aot_eager", fullgraph=True)
        compiled = made.module(made.sample, timestep=made.timestep, **made.condition).sample
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
