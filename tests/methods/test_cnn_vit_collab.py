"""CNN-ViT collaboration as a method: whom each loss trains, resuming, other libraries, two students delivered."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from compressor import pipeline
from compressor.context import RunContext
from compressor.errors import RequestError
from compressor.log import Log
from compressor.methods.segmentation.cnn_vit_collab import CnnVitCollab
from compressor.models.model import Model, load_model
from compressor.models.spec import load_model_spec
from compressor.recipe import Recipe
from compressor.registry import load_method
from compressor.tasks.segmentation import Segmentation
from compressor.training.distributed import Distributed
from compressor.training.engine import Engine
from compressor.training.phase import Train, Update
from compressor.training.random import Randomness
from tests.method_runs import Killed, killed_at

CNN = "timm:resnet18?layers=[1,1,1,1],channels=[4,4,8,8],width=16"
VIT = (
    "transformers:segformer?depths=[1,1,1,1],hidden_sizes=[8,8,16,16],num_attention_heads=[1,1,2,2],"
    "mlp_ratios=[2,2,2,2],decoder_hidden_size=24"
)
DATA = "scenes:32?masks=true"
ALONE = {"hfd_weight": 0, "region_weight": 0, "pixel_weight": 0}


def context(
    cnn: str | Model = CNN, vit: str | Model = VIT, data: str = DATA, options: Mapping[str, Any] | None = None
) -> RunContext:
    task = Segmentation({"train": data}, options or {})
    torch.manual_seed(1)

    def made(spec: str | Model) -> Model:
        if isinstance(spec, Model):
            return spec.copy()
        return load_model_spec(spec, defaults=task.student_defaults(), task="segmentation")

    models = {"cnn": made(cnn), "vit": made(vit)}
    makers: Any = {role: model.copy for role, model in models.items()}
    return RunContext(task, {}, Randomness(0), Distributed.single("cpu"), students=makers, name="0-cnn-vit-collab")


def phase_of(config: Mapping[str, Any] | None = None, ctx: RunContext | None = None) -> tuple[CnnVitCollab, Train]:
    method = CnnVitCollab(CnnVitCollab.Config.model_validate({"steps": 3, "batch": 4, **(config or {})}))
    torch.manual_seed(2)
    phase: Any = next(method.phases(ctx or context()))
    return method, phase


def trained(
    directory: Path,
    config: Mapping[str, Any] | None = None,
    ctx: RunContext | None = None,
    change: Callable[[Train], Any] = lambda phase: None,
) -> tuple[CnnVitCollab, Mapping[str, Any]]:
    ctx = ctx or context()
    method, phase = phase_of(config, ctx)
    change(phase)
    engine = Engine(
        directory,
        distributed=ctx.distributed,
        randomness=ctx.randomness,
        fingerprint="test",
        checkpoint_steps=1,
    )

    def phases() -> Any:
        yield phase

    engine.run(phases())
    return method, engine.history


def weights(method: CnnVitCollab) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, model in method.students().items()
        for key, value in model.module.state_dict().items()
    }


def gradients(phase: Train) -> dict[str, set[str]]:
    """Which part (cnn, vit, adapters.NAME) receives a gradient of each loss."""
    for module in phase.state.values():
        assert isinstance(module, nn.Module)
        module.train()
    update = next(iter(phase.step({"train": phase.streams["train"][0]}, 0)))
    assert isinstance(update, Update)
    assert update.owner == ("cnn", "vit")
    parts: dict[str, nn.Module] = {name: module for name, module in phase.state.items() if name != "adapters"}  # type: ignore[misc]
    parts |= dict(phase.state["adapters"].named_children())  # type: ignore[attr-defined]
    reached = {}
    for name, loss in update.losses.items():
        for module in parts.values():
            module.zero_grad()
        loss.backward(retain_graph=True)
        reached[name] = {
            part
            for part, module in parts.items()
            if any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())
        }
    return reached


def test_each_loss_trains_the_learner_alone_and_the_adapters_on_its_side() -> None:
    assert gradients(phase_of()[1]) == {
        "labels-cnn": {"cnn"},
        "labels-vit": {"vit"},
        "hfd-cnn": {"cnn", "cnn_to_vit"},
        "hfd-vit": {"vit", "vit_to_cnn"},
        "region-cnn": {"cnn"},
        "region-vit": {"vit", "last"},
        "pixel-cnn": {"cnn"},
        "pixel-vit": {"vit"},
    }


def test_each_optimiser_owns_its_student_and_adapters_and_no_parameter_has_two_owners() -> None:
    _, phase = phase_of()
    owned = {
        name: {id(p) for group in optimizer.params for p in group["params"]}  # type: ignore[index]
        for name, optimizer in phase.optimizers.items()
    }
    every = {id(p) for module in phase.state.values() for p in module.parameters()}  # type: ignore[attr-defined]
    assert owned["cnn"] | owned["vit"] == every
    assert not owned["cnn"] & owned["vit"]


def test_the_papers_optimisers_are_the_defaults() -> None:
    _, phase = phase_of({"steps": 10})
    cnn, vit = phase.optimizers["cnn"], phase.optimizers["vit"]
    assert (cnn.kind, cnn.lr, cnn.options) == ("sgd", 0.01, {"momentum": 0.9})
    assert (vit.kind, vit.lr) == ("adamw", 6e-5)
    assert cnn.schedule(5) == pytest.approx(0.5**0.9)
    assert vit.schedule(5) == pytest.approx(0.5)
    assert cnn.schedule(10) == vit.schedule(10) == 0
    decays = {group["weight_decay"] for optimizer in (cnn, vit) for group in optimizer.params}  # type: ignore[index]
    assert decays == {5e-4, 0.01, 0.0}


def test_students_of_one_width_need_no_projection() -> None:
    narrow = VIT.replace("decoder_hidden_size=24", "decoder_hidden_size=16")
    _, phase = phase_of(ctx=context(vit=narrow))
    assert isinstance(phase.state["adapters"].last, nn.Identity)  # type: ignore[attr-defined]
    assert gradients(phase)["region-vit"] == {"vit"}


def test_without_the_weights_each_student_learns_by_itself(tmp_path: Path) -> None:
    """The other student may be another network: nothing of it is seen."""
    config = {"cnn": {"lr": 0.1}, "vit": {"lr": 1e-3}, **ALONE}
    first, _ = trained(tmp_path / "first", config, context())
    ctx = context()
    other = ctx.student("vit")
    for parameter in other.module.parameters():
        parameter.data.mul_(1.5)
    ctx._students["vit"] = other.copy
    second, _ = trained(tmp_path / "second", config, ctx)
    alone, beside = weights(first), weights(second)
    assert all(torch.equal(alone[key], beside[key]) for key in alone if key.startswith("cnn."))
    together, _ = trained(tmp_path / "third", {**config, "pixel_weight": 1}, context())
    assert not all(torch.equal(alone[key], weights(together)[key]) for key in alone if key.startswith("cnn."))


def test_a_batch_without_labels_trains_by_the_early_features_alone() -> None:
    _, phase = phase_of()
    batch = phase.streams["train"][0]
    batch["mask"] = torch.full_like(batch["mask"], 255)
    update: Any = next(iter(phase.step({"train": batch}, 0)))
    zero = {name for name, loss in update.losses.items() if loss == 0}
    assert zero == set(update.losses) - {"hfd-cnn", "hfd-vit"}
    sum(update.losses.values()).backward()


def test_losses_fall_when_one_batch_is_learnt(tmp_path: Path) -> None:
    def one_batch(phase: Train) -> None:
        phase.streams = {role: replace(stream, period=1) for role, stream in phase.streams.items()}

    config = {"steps": 25, "batch": 8, "cnn": {"lr": 0.05}, "vit": {"lr": 3e-3}}
    _, history = trained(tmp_path, config, change=one_batch)
    curves = next(iter(history.values()))
    for name in ("loss/labels-cnn", "loss/labels-vit", "labels-cnn", "labels-vit"):
        if name in curves:
            assert curves[name][-1][1] < 0.7 * curves[name][0][1]
    assert {name.removeprefix("loss/") for name in curves} >= {"hfd-cnn", "region-vit", "pixel-cnn"}


def test_a_killed_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def kill(phase: Train) -> None:
        phase.step = killed_at(phase.step, 2)

    config = {"cnn": {"lr": 0.1}, "vit": {"lr": 1e-3}}
    whole = weights(trained(tmp_path / "whole", config)[0])
    with pytest.raises(Killed):
        trained(tmp_path / "killed", config, change=kill)
    resumed = weights(trained(tmp_path / "killed", config)[0])
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_students_may_be_of_other_libraries_and_images_need_not_be_square(tmp_path: Path) -> None:
    config = SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16
    )
    config.num_labels = 11
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "segformer")
    ctx = context(
        "torchvision:lraspp_mobilenet_v3_large",
        f"transformers:{tmp_path / 'segformer'}",
        "scenes:32?masks=true,channels=3",
    )
    _, history = trained(tmp_path / "run", {"steps": 1}, ctx)
    losses = [points[-1][1] for curve in history.values() for points in curve.values()]
    assert losses and np.isfinite(losses).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [({"cnn": {"low_layer": "layer9"}}, "no layer 'layer9'"), ({"vit": {"head": "classifier9"}}, "no layer")],
)
def test_wrong_layers_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        phase_of(config)


def test_layers_that_are_named_are_read() -> None:
    named = {"cnn": {"low_layer": "backbone.layer2"}, "vit": {"low_layer": "segformer.stages.1"}}
    adapters: Any = phase_of(named)[1].state["adapters"]
    assert adapters.cnn_to_vit[0].in_channels == 4
    assert adapters.vit_to_cnn[0].in_channels == 8


def test_it_comes_first_in_a_chain_and_its_default_recipe_resolves_to_itself() -> None:
    recipe = Recipe.parse({"methods": ["cnn-vit-collab"]}).resolve()
    assert recipe.task == "segmentation"
    assert set(recipe.students) == {"cnn", "vit"}
    assert recipe.resolve() == recipe
    assert all(field.description for field in load_method("cnn-vit-collab").Config.model_fields.values())
    with pytest.raises(RequestError, match="two students"):
        Recipe.parse({"task": "segmentation", "methods": ["kd", "cnn-vit-collab"]}).resolve()


def test_a_run_delivers_both_students_and_an_engine_has_its_students_figures(tmp_path: Path) -> None:
    recipe = Recipe.parse(
        {
            "methods": [{"name": "cnn-vit-collab", "config": {"steps": 2, "batch": 4, "main": "vit"}}],
            "students": {"cnn": CNN, "vit": VIT},
            "targets": ["ort-fp32"],
            "evaluation": {"samples": 20},
            "benchmark": {"batches": [1], "seconds": 0.2, "rounds": 3},
        }
    ).resolve()
    page = pipeline.run(recipe, tmp_path / "run", log=Log(quiet=True))
    report = json.loads((page.parent / "report.json").read_text())
    figures = {model["name"]: model["metrics"]["miou"] for model in report["models"]}
    engines = {engine["model"]: engine for engine in report["engines"]}
    assert set(figures) == set(engines) == {"student", "cnn"}
    for name, engine in engines.items():
        assert engine["metrics"]["miou"] == pytest.approx(figures[name], abs=1e-3)
        assert engine["end_to_end"]["1"]["p50"] > 0
    assert {point["model"] for point in report["curve"]} == {"student", "cnn"}
    assert any("student is the vit" in note for note in report["notes"])
    assert len(report["samples"]) == 4
    for where, spec in (("student", str(tmp_path / "run")), ("students/cnn", f"{tmp_path / 'run'}#cnn")):
        kept, loaded = load_model(tmp_path / "run" / where), load_model_spec(f"run:{spec}")
        assert kept.info.architecture == loaded.info.architecture
        assert all(torch.equal(v, loaded.module.state_dict()[k]) for k, v in kept.module.state_dict().items())
    assert loaded.info.library == "python"
