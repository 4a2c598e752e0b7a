"""The method `sparsity`: which layers, what is matched, what holds afterwards, and what reaches the exported graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compressor.diffusion.denoiser import Denoiser
from compressor.errors import RequestError
from compressor.models.edits.sparsity import fold, masked_weights, weights_of
from compressor.models.model import Model, ModelInfo, load_model, save_model
from compressor.models.spec import load_model_spec
from compressor.sparsity import layers_called
from compressor.tasks.classification import Classification
from compressor.tasks.segmentation import Segmentation

from . import changed_models
from .changed_models import denoiser, images, resolved, run, zeros
from .conftest import TEACHER

SMALL = changed_models.SMALL["sparsity"]
STAGES = {"steps": 2, "lr": 1e-3, "fake_lr": 1e-3, "warmup": 0}


def is_two_of_four(weight: Tensor) -> bool:
    return bool((weight.movedim(1, -1).unflatten(-1, (-1, 4)) != 0).sum(-1).le(2).all())


# --- which layers ----------------------------------------------------------------------------------------------------


def test_first_and_last_called_layer_stay_dense_whatever_their_place_in_the_module(tmp_path: Path) -> None:
    trained = run(tmp_path, "sparsity", SMALL, teacher=denoiser())
    names = {weight.layer for weight in masked_weights(trained.student().module)}
    every = {weight.layer for weight in weights_of(trained.student().module)}
    assert {"img_in", "proj_out"} <= every - names
    assert {"transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.net.2"} <= names
    assert any("dense (the first layer): img_in" in note for note in trained.method.notes)
    assert all(is_two_of_four(weight.value) for weight in masked_weights(trained.student().module))


def test_excluded_small_and_indivisible_layers_stay_dense_and_are_named(distil: Callable[..., Any]) -> None:
    config = {"pattern": "block:4x4:0.5", "exclude": ["layer2.*"], "min_weights": 100}
    method = distil("sparsity", config).method
    notes = "\n".join(method.notes)
    assert "dense (excluded): layer2." in notes and "dense (the last layer): fc" in notes
    assert "fewer than 100 weights" in notes
    names = [weight.layer for weight in masked_weights(method.student().module)]
    assert names and not any(name.startswith("layer2.") for name in names)


def test_unknown_layer_and_nothing_to_mask_are_one_line(distil: Callable[..., Any]) -> None:
    with pytest.raises(RequestError, match=r"exclude: no layer is called 'lair\*'; layers are called like layer"):
        distil("sparsity", {"exclude": ["lair*"]})
    with pytest.raises(RequestError, match="no layer can be sparse; lower min_weights"):
        distil("sparsity", {"min_weights": 10**9})


def test_layers_are_listed_in_the_order_of_their_first_call() -> None:
    module = torch.nn.ModuleDict({"late": torch.nn.Linear(2, 2), "early": torch.nn.Linear(2, 2)})
    x = torch.ones(1, 2)
    assert layers_called(module, lambda: module["late"](module["early"](module["early"](x)))) == ["early", "late"]


# --- what is matched -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "0.8", "block:4x4:0.5"])
def test_fine_tuning_brings_the_logits_back_to_the_dense_model(distil: Callable[..., Any], pattern: str) -> None:
    config = {"pattern": pattern, "steps": 40, "batch": 16, "lr": 5e-3, "augment": "none"}
    curve = distil("sparsity", config).history["distil"]["match"]
    assert curve[-1][1] < 0.6 * curve[0][1]


class PairOfHeads(Classification):
    """A supervised task of another kind: the network returns several things, the loss wants one."""

    name = "pairs"

    def loss(self, model: Any, batch: Any) -> dict[str, Tensor]:
        first, other = model.module(batch["image"]).values()
        return {"other": (first.mean() - other["b"].mean()).square()}


class TwoHeads(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3))
        self.last = torch.nn.Conv2d(8, 4, 1)

    def forward(self, image: Tensor) -> Any:
        body = self.body(image)
        last = self.last(body)
        return {"a": body, "b": {"b": last, "names": ["x"]}}


def test_supervised_task_without_a_matcher_matches_all_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compressor.deployable import Deployable, DriverSpec, Graph

    torch.manual_seed(0)
    model = Model(TwoHeads(), ModelInfo("python", "tests:two_heads", {}))
    image = torch.zeros(2, 1, 32, 32)
    packed = lambda self, model: Deployable({"net": Graph(model.module, {"image": image}, ("a",))}, DriverSpec("x"))  # noqa: E731
    monkeypatch.setattr(PairOfHeads, "deployable", packed)
    task = PairOfHeads({"train": "scenes"}, {})
    config = {**SMALL, "steps": 30, "lr": 1e-2, "augment": "none"}
    trained = run(tmp_path, "sparsity", config, task=task, teacher=model)
    curve = trained.history["distil"]["match"]
    assert curve[-1][1] < 0.7 * curve[0][1]
    assert [weight.name for weight in masked_weights(trained.student().module)] == ["body.2.weight"]


def test_segmenter_is_brought_back_and_its_zeros_are_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = Segmentation({"train": "scenes:32?masks=true"}, {})
    spec = "timm:resnet18?layers=[1,1,1,1],channels=[4,4,8,8],width=16"
    model = load_model_spec(spec, defaults=task.student_defaults(), task="segmentation")
    config = {**SMALL, "steps": 20, "lr": 5e-3, "augment": "none"}
    trained = run(tmp_path, "sparsity", config, task=task, teacher=model)
    curve = trained.history["distil"]["match"]
    assert curve[-1][1] < 0.8 * curve[0][1]
    packed = next(iter(trained.method.deployables(trained.ctx)["student"].graphs.values())).module
    names = {weight.name for weight in masked_weights(trained.student().module)}
    plain = {weight.name.removeprefix("module."): weight.value for weight in weights_of(packed)}
    assert names and all(is_two_of_four(plain[name]) for name in names)


def test_few_step_generator_is_asked_on_its_own_inputs_at_its_own_levels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, float]] = []
    forward = Denoiser.forward

    def spy(self: Denoiser, noised: Tensor, level: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        asked.append((torch.is_grad_enabled(), level.tolist()))
        return forward(self, noised, level, condition)

    monkeypatch.setattr(Denoiser, "forward", spy)
    config = {**SMALL, "steps": 8, "batch": 4}
    trained = run(tmp_path, "sparsity", config, teacher=denoiser(student_timesteps=[999, 499]))
    with_gradient = [levels for grad, levels in asked if grad]
    assert len(with_gradient) == 8 and {level for levels in with_gradient for level in levels} == {1.0, 0.5}
    assert any(len(set(levels)) == 2 for levels in with_gradient)
    assert trained.student().info.extra["student_timesteps"] == [999, 499]
    assert trained.method.deployables(trained.ctx)["student"].driver.settings["rule"] == "renoise"


def test_no_steps_leave_the_kept_weights_as_they_were(tmp_path: Path) -> None:
    teacher = denoiser()
    dense = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    trained = run(tmp_path, "sparsity", {**SMALL, "steps": 0}, teacher=teacher)
    plain, masks = fold(trained.student().module).state_dict(), zeros(trained.student())
    for name, value in dense.items():
        assert torch.equal(plain[name], value.masked_fill(masks[name], 0) if name in masks else value), name
    assert any("are zero (50.0 %)" in note for note in trained.method.notes)


# --- what holds afterwards -------------------------------------------------------------------------------------------


def test_zeros_hold_in_a_classifier_that_another_method_trains(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = load_model_spec(TEACHER)
    sparse = run(tmp_path / "a", "sparsity", SMALL, task=images(), teacher=teacher).student()
    before, weights = zeros(sparse), sparse.module.state_dict()
    after = run(
        tmp_path / "b", "kd", {"steps": 3, "batch": 8}, task=images(), teacher=teacher, chained=sparse
    ).student()
    assert before and all(torch.equal(mask, before[name]) for name, mask in zeros(after).items())
    name = next(iter(before)).removesuffix("weight") + "parametrizations.weight.original"
    assert not torch.equal(after.module.state_dict()[name], weights[name])
    assert after.info.edits == sparse.info.edits


def test_zeros_hold_in_a_generator_that_is_distilled_to_few_steps(tmp_path: Path) -> None:
    teacher = denoiser()
    sparse = run(tmp_path / "a", "sparsity", SMALL, teacher=teacher).student()
    config = {"num_steps": 2, "fake_updates": 1, "batch": 4, "ema": 0.5, "match": STAGES, "adversarial": STAGES}
    after = run(tmp_path / "b", "dmd2", config, teacher=teacher, chained=sparse).student()
    before = zeros(sparse)
    assert before and all(torch.equal(mask, before[name]) for name, mask in zeros(after).items())
    save_model(after, tmp_path / "student")
    loaded = load_model(tmp_path / "student")
    assert all(torch.equal(mask, before[name]) for name, mask in zeros(loaded).items())


def test_exported_weights_hold_the_zeros_and_no_mask(tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    from compressor.exporters.export import export
    from compressor.measurement import LoadedEngine, torch_driver
    from compressor.profiles.target import load_target

    torch.manual_seed(0)
    trained = run(tmp_path / "run", "sparsity", SMALL, task=images(), teacher=load_model_spec(TEACHER))
    deployable = trained.method.deployables(trained.ctx)["student"]
    export(deployable, load_target("ort-fp32"), tmp_path / "artifact")
    graph = onnx.load(next((tmp_path / "artifact").glob("*.onnx"))).graph
    arrays = [numpy_helper.to_array(one) for one in graph.initializer]
    kernels = [torch.from_numpy(np.array(a)) for a in arrays if a.ndim == 4 and a.shape[1] % 4 == 0]
    assert len(kernels) == len(masked_weights(trained.student().module)) > 3
    assert all(is_two_of_four(kernel) and (kernel == 0).float().mean() == 0.5 for kernel in kernels)
    assert not any(a.dtype == bool for a in arrays)
    assert not masked_weights(deployable.graphs["classifier"].module)
    engine, request = LoadedEngine(tmp_path / "artifact"), trained.ctx.task.request(3)
    expected = torch_driver(deployable)(request, seed=0)["logits"]
    np.testing.assert_allclose(engine.driver(request, seed=0)["logits"], expected, atol=1e-4)
    engine.close()


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "1:8", "0.8", "block:32x32:0.8"])
@pytest.mark.parametrize("method", ["kd", "ppcl", "meal-v2"])
def test_flag_appends_the_method_to_any_chain_and_asks_for_no_other_teacher(method: str, pattern: str) -> None:
    alone, sparse = resolved(methods=[method]), resolved(methods=[method], sparsity=pattern)
    assert [entry.name for entry in sparse.methods] == [method, "sparsity"]
    assert sparse.methods[1].config["pattern"] == pattern
    assert (sparse.teachers, sparse.students, sparse.data) == (alone.teachers, alone.students, alone.data)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"methods": ["kd"], "sparsity": "4:2"}, "in N:M, N of M weights stay"),
        ({"methods": ["kd"], "sparsity": "half"}, r"must be N:M \(2:4\), a share \(0.8\) or block:"),
        ({"methods": ["sparsity"], "settings": ["pattern=3:2"]}, "in N:M, N of M weights stay"),
        ({"methods": ["sparsity"], "students": ["timm:resnet18"]}, "takes no --student: it copies it from its teacher"),
        ({"methods": ["dmd2", "ppcl"]}, "'ppcl' cannot follow 'dmd2': its blocks are copies of the teacher's own; let"),
        ({"methods": ["dmd2", "kd"]}, "the method 'kd' does not serve the task 'image-generation'"),
        ({"methods": ["kd", "dmd2"]}, "the method 'dmd2' does not serve the task 'classification'"),
    ],
)
def test_impossible_chain_is_one_line_before_any_work(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        resolved(**flags)
    assert "\n" not in str(error.value)


def test_student_is_named_for_the_method_that_takes_one() -> None:
    recipe = resolved(methods=["kd"], sparsity="2:4", students=["timm:resnet18"])
    assert recipe.students == {"student": "timm:resnet18"}
