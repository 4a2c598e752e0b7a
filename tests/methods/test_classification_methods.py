"""What every method that distils one classifier promises: any library, gradients, resuming, export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from compressor.errors import RequestError
from compressor.models.spec import load_model_spec
from compressor.recipe import Recipe
from compressor.registry import load_method, method_facts
from compressor.training.phase import Train
from tests.method_runs import Killed

METHODS = ("kd", "fitnet", "at", "rkd", "crd", "dkd", "dist", "meal-v2")
SMALL: dict[str, dict[str, Any]] = {"crd": {"negatives": 16}, "fitnet": {"hint": {"steps": 2, "batch": 8}}}
VIT = "timm:vit_tiny_patch16_224?img_size=16,patch_size=4,embed_dim=16,depth=2,num_heads=2"

Distil = Callable[..., Any]


@pytest.fixture
def vit_folder(tmp_path: Path) -> str:
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=10)
    config.update({"image_size": 16, "patch_size": 4, "num_channels": 1})
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    return f"transformers:{tmp_path / 'vit'}"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_its_student_and_nothing_else(distil: Distil, name: str) -> None:
    phases: list[Train] = []

    def watch(phase: Train) -> None:
        phases.append(phase)
        before.update({k: v.clone() for k, v in phase.state["student"].state_dict().items()} if not before else {})

    before: dict[str, torch.Tensor] = {}
    teacher = load_model_spec("timm:resnet18?layers=[1,1,1,1],channels=[8,8,16,16],num_classes=10,in_chans=1")
    frozen = {k: v.clone() for k, v in teacher.module.state_dict().items()}
    config = {"optimizer": "adamw", "lr": 1e-2} | SMALL.get(name, {})  # steps that show in every weight
    trained = distil(name, config, teachers=[teacher], watch=watch)
    after = trained.weights
    moved = [k for k, v in trained.method.student().module.named_parameters() if not torch.equal(v, before[k])]
    assert set(moved) == {k for k, _ in trained.method.student().module.named_parameters()}
    assert any(not torch.equal(after[k], before[k]) for k in after if "running_mean" in k)
    assert all(torch.equal(v, frozen[k]) for k, v in teacher.module.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.module.parameters())
    assert phases[-1].name == "distil"


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_training_goes_on_to_the_same_bits(distil: Distil, name: str) -> None:
    whole = distil(name, SMALL.get(name), directory="whole").weights
    with pytest.raises(Killed):
        distil(name, SMALL.get(name), directory="killed", kill_at=2)
    resumed = distil(name, SMALL.get(name), directory="killed").weights
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pair", ["torchvision-to-timm", "transformers-to-timm", "timm-to-transformers"])
def test_teachers_and_students_may_be_of_any_library(distil: Distil, vit_folder: str, name: str, pair: str) -> None:
    teacher, student = {
        "torchvision-to-timm": ("torchvision:resnet18?num_classes=10", "timm:mobilenetv3_small_050"),
        "transformers-to-timm": (vit_folder, "timm:resnet18?layers=[1,1,1,1],channels=[4,4,8,8]"),
        "timm-to-transformers": (f"{VIT},num_classes=10,in_chans=1", f"{vit_folder}?pretrained=false"),
    }[pair]
    data = "scenes:32" if pair == "torchvision-to-timm" else "scenes"
    config = {"steps": 1} | SMALL.get(name, {})
    trained = distil(name, config, teachers=[teacher], student=student, data=data)
    losses = [points[-1][1] for curves in trained.history.values() for points in curves.values()]
    assert losses and np.isfinite(losses).all()


@pytest.mark.parametrize("name", METHODS)
def test_losses_fall_when_one_batch_is_learnt(distil: Distil, name: str) -> None:
    """A stream of one batch that repeats is learnt by heart."""
    config = {"steps": 25, "batch": 8, "lr": 1e-2, "schedule": "constant", "optimizer": "adamw"}
    teacher = load_model_spec("timm:resnet18?layers=[1,1,1,1],channels=[8,8,16,16],num_classes=10,in_chans=1")
    teacher.module.fc.weight.data *= 30  # sure of itself, so that there is something to learn from it

    def one_batch(phase: Train) -> None:
        phase.streams = {role: replace(stream, period=1) for role, stream in phase.streams.items()}

    curves = distil(name, config | SMALL.get(name, {}), teachers=[teacher], watch=one_batch).history["distil"]
    first, last = (sum(points[place][1] for points in curves.values()) for place in (0, -1))
    assert last < 0.8 * first


def test_the_exported_student_equals_the_trained_one(distil: Distil, tmp_path: Path) -> None:
    from compressor.exporters.export import export
    from compressor.measurement import torch_driver
    from compressor.profiles.target import load_target
    from compressor.runtimes.load import load

    trained = distil("kd")
    deployable = trained.method.deployables(trained.ctx)["student"]
    expected = torch_driver(deployable)(trained.ctx.task.request(3))
    export(deployable, load_target("ort-fp32"), tmp_path / "artifact")
    given = load(tmp_path / "artifact")(trained.ctx.task.request(3))
    assert np.allclose(given["logits"], expected["logits"], atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_a_student_that_does_not_fit_the_data_is_refused_before_any_step(distil: Distil, name: str) -> None:
    with pytest.raises(RequestError, match="7 classes apart"):
        distil(name, SMALL.get(name), student="timm:resnet18?num_classes=7")


@pytest.mark.parametrize("name", METHODS)
def test_the_default_recipe_is_complete_and_resolves_to_itself(name: str) -> None:
    recipe = Recipe.parse({"methods": [name]}).resolve()
    assert recipe.task == "classification"
    assert recipe.data == {"train": "scenes"}
    assert recipe.resolve() == recipe
    assert all(field.description for field in load_method(name).Config.model_fields.values())
    assert next(facts for facts in method_facts() if facts.name == name).title
