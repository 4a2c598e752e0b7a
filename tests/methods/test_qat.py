"""The method `qat`: what it trains under, what stays as it was, and what an 8-bit engine then makes of the student."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.data.digits import digits
from compressor.errors import RequestError
from compressor.models.edits.fake_quantisation import quantised_weights
from compressor.models.edits.sparsity import masked_weights
from compressor.models.model import Model, ModelInfo, load_model, save_model
from compressor.models.spec import load_model_spec
from compressor.tasks.classification import Classification
from compressor.tasks.segmentation import Segmentation
from tests.exporters.test_quantization import DigitNet, accuracy, calibration, packed, torch_accuracy

from . import changed_models
from .changed_models import denoiser, images, resolved, run, state_of, zeros
from .conftest import TEACHER

SMALL = changed_models.SMALL["qat"]


# --- what is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4])
def test_fine_tuning_brings_the_rounded_logits_back_to_the_float_model(distil: Callable[..., Any], bits: int) -> None:
    config = {"weight_bits": bits, "steps": 40, "batch": 16, "augment": "none"}
    curve = distil("qat", config, student=TEACHER).history["distil"]["match"]
    assert curve[0][1] > 1e-3  # the rounding costs something
    assert curve[-1][1] < 0.6 * curve[0][1]


def test_model_as_it_came_is_matched_and_neither_it_nor_any_statistics_change(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = load_model_spec(TEACHER)
    before, modes = state_of(teacher), []
    watch = lambda phase: modes.extend(phase.modes)  # noqa: E731
    trained = run(tmp_path, "qat", SMALL, task=images(), teacher=teacher, watch=watch)
    assert all(torch.equal(value, before[name]) for name, value in state_of(teacher).items())
    after = state_of(trained.student())
    assert sorted(after) == sorted(before)
    statistics = [name for name in before if "running_" in name]
    assert statistics and all(torch.equal(after[name], before[name]) for name in statistics)
    assert not torch.equal(after["layer1.0.conv1.weight"], before["layer1.0.conv1.weight"])
    assert {mode for _, mode in modes} == {"eval"}


def test_student_has_plain_weights_in_a_plain_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = load_model_spec(TEACHER)
    trained = run(tmp_path / "run", "qat", SMALL, task=images(), teacher=teacher)
    student = trained.student()
    assert student.info == teacher.info and not quantised_weights(student.module)
    assert (
        "7-bit weights in 14 layers (18,656 of 19,082 parameters)" in trained.method.notes[0]
        and "8-bit inputs of 14" in trained.method.notes[0]
    )
    save_model(student, tmp_path / "student")
    loaded, image = load_model(tmp_path / "student"), torch.randn(2, 1, 32, 32)
    assert torch.equal(loaded.module.eval()(image), student.module.eval()(image))


def test_excluded_layers_are_not_rounded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rounded: list[str] = []
    watch = lambda phase: rounded.extend(w.layer for w in quantised_weights(phase.state["student"]))  # noqa: E731
    config = {**SMALL, "exclude": ["layer1", "fc"]}
    trained = run(tmp_path, "qat", config, task=images(), teacher=load_model_spec(TEACHER), watch=watch)
    assert rounded and not any(layer == "fc" or layer.startswith("layer1.") for layer in rounded)
    assert f"8-bit inputs of {len(rounded)};" in trained.method.notes[0]
    with pytest.raises(RequestError, match=r"qat.exclude: the model has no layer 'layer9'"):
        run(
            tmp_path / "wrong", "qat", {**SMALL, "exclude": ["layer9"]}, task=images(), teacher=load_model_spec(TEACHER)
        )


def test_no_steps_leave_the_weights_as_they_were(tmp_path: Path) -> None:
    teacher = denoiser()
    before = state_of(teacher)
    after = state_of(run(tmp_path, "qat", {**SMALL, "steps": 0}, teacher=teacher).student())
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_segmenter_is_brought_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = Segmentation({"train": "scenes:32?masks=true"}, {})
    spec = "timm:resnet18?layers=[1,1,1,1],channels=[4,4,8,8],width=16"
    model = load_model_spec(spec, defaults=task.student_defaults(), task="segmentation")
    config = {**SMALL, "steps": 40, "augment": "none", "weight_bits": 3}
    curve = run(tmp_path, "qat", config, task=task, teacher=model).history["distil"]["match"]
    assert curve[-1][1] < 0.6 * curve[0][1]


def test_model_without_layers_to_quantise_is_refused(tmp_path: Path) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(10))

        def forward(self, image: Tensor) -> Tensor:
            return image.flatten(1)[:, :10] * self.factor

    model = Model(Scale(), ModelInfo("python", "tests:scale", {}))
    with pytest.raises(RequestError, match="qat: a Scale has no linear or convolution layer to quantise"):
        run(tmp_path, "qat", SMALL, task=Classification({"train": "digits"}, {}), teacher=model)


# --- what holds ------------------------------------------------------------------------------------------------------


def test_zeros_of_a_sparse_model_hold(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = load_model_spec(TEACHER)
    sparse = run(tmp_path / "a", "sparsity", changed_models.SMALL["sparsity"], task=images(), teacher=teacher).student()
    before = zeros(sparse)
    after = run(tmp_path / "b", "qat", SMALL, task=images(), teacher=teacher, chained=sparse).student()
    assert before and all(torch.equal(mask, before[name]) for name, mask in zeros(after).items())
    assert len(masked_weights(after.module)) == len(before) and after.info.edits == sparse.info.edits


def test_any_chain_can_end_in_it_and_a_student_can_be_named_for_it() -> None:
    alone, chained = resolved(methods=["kd"]), resolved(methods=["kd", "qat"], targets=["ort-int8"])
    assert [entry.name for entry in chained.methods] == ["kd", "qat"]
    assert (chained.teachers, chained.students, chained.data) == (alone.teachers, alone.students, alone.data)
    assert [entry.name for entry in resolved(methods=["dmd2", "qat"], sparsity="2:4").methods][-1] == "sparsity"
    assert resolved(methods=["qat"], students=["run:runs/kd"]).students == {"student": "run:runs/kd"}
    with pytest.raises(RequestError, match="weight_bits"):
        resolved(methods=["qat"], settings=["weight_bits=9"])


# --- what is exported ------------------------------------------------------------------------------------------------


def test_exported_graph_is_the_plain_student(tmp_path: Path) -> None:
    from compressor.exporters.export import export
    from compressor.measurement import LoadedEngine, torch_driver
    from compressor.profiles.target import load_target

    torch.manual_seed(0)
    trained = run(tmp_path / "run", "qat", SMALL, task=images(), teacher=load_model_spec(TEACHER))
    deployable = trained.method.deployables(trained.ctx)["student"]
    export(deployable, load_target("ort-fp32"), tmp_path / "artifact")
    engine, request = LoadedEngine(tmp_path / "artifact"), trained.ctx.task.request(3)
    expected = torch_driver(deployable)(request, seed=0)["logits"]
    np.testing.assert_allclose(engine.driver(request, seed=0)["logits"], expected, atol=1e-4)
    engine.close()


def unbalanced() -> DigitNet:
    """A classifier of the digits, one column of whose last layer is 50 times larger than what it is multiplied by.

    In floats that changes nothing; on a grid of seven bits the other columns lose most of their levels to it.
    """
    torch.manual_seed(0)
    data, net = digits("train").fields, DigitNet()
    image, label = torch.from_numpy(data["image"]), torch.from_numpy(data["label"])
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(150):
        chosen = torch.arange(64 * step, 64 * step + 64) % len(label)
        optimizer.zero_grad()
        F.cross_entropy(net(image[chosen]), label[chosen]).backward()
        optimizer.step()
    seen: list[Tensor] = []
    handle = net.hidden.register_forward_hook(lambda _layer, _inputs, output: seen.append(F.relu(output).mean(0)))
    with torch.no_grad():
        net.eval()(image)
        busiest = int(seen[0].argmax())
        net.hidden.weight[busiest] /= 50
        net.hidden.bias[busiest] /= 50
        net.last.weight[:, busiest] *= 50
    handle.remove()
    return net


def eight_bit_accuracy(net: nn.Module, folder: Path) -> float:
    """On the test split, of ONNX Runtime's engine, with all operators in eight bits whatever they cost."""
    from compressor.exporters.export import export
    from compressor.profiles.target import load_target, with_overrides
    from compressor.runtimes.load import load_graphs
    from compressor.runtimes.manifest import read_manifest

    target = with_overrides(load_target("ort-int8"), {"calibration.max_drop": 1.0})
    export(packed(net), target, folder, calibration=calibration(net))
    graph = load_graphs(folder, read_manifest(folder), {"threads": 1})["classifier"]
    found = accuracy(graph, "test")
    graph.close()
    return found


def test_onnx_runtime_s_eight_bits_cost_a_trained_student_less(tmp_path: Path) -> None:
    net = unbalanced()
    teacher = Model(copy.deepcopy(net), ModelInfo("python", "tests:digit_net", {}))
    config = {"steps": 150, "batch": 32, "augment": "none"}
    task = Classification({"train": "digits"}, {})
    student = run(tmp_path / "run", "qat", config, task=task, teacher=teacher).student().module
    own = torch_accuracy(net, "test")
    after_training, trained = eight_bit_accuracy(net, tmp_path / "before"), eight_bit_accuracy(student, tmp_path / "a")
    assert own - after_training > 0.02, "the rounding of the model as it came costs nothing here"
    assert own - trained < 0.5 * (own - after_training)
