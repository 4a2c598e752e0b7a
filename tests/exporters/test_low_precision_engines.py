"""bfloat16, int8 and fp8 for TensorRT, sparse weights: built ahead of time where TensorRT-RTX is installed."""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto
from torch import Tensor, nn

from compressor.deployable import Deployable, DriverSpec, Graph
from compressor.errors import TargetError
from compressor.exporters.export import export
from compressor.exporters.half_arithmetic import judge_of, rounding_graph
from compressor.exporters.interpreter import Interpreter
from compressor.exporters.onnx_graph import export_onnx
from compressor.exporters.precision import convert_to_half
from compressor.exporters.sparse_weights import count_zeros
from compressor.exporters.typed_graph import BFLOAT16
from compressor.models.edits.sparsity import sparsity_mask
from compressor.profiles.target import load_target, with_overrides
from compressor.runtimes.manifest import read_manifest

ENGINES = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed"
)


class Layers(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 16)
        self.scale = scale

    def forward(self, image: Tensor) -> Tensor:
        h = self.first(image) * self.scale
        result: Tensor = self.second(self.norm(h / self.scale))
        return result


def packed(net: nn.Module) -> Deployable:
    torch.manual_seed(1)
    graph = Graph(net, {"image": torch.randn(40, 64)}, ("logits",), {"image": {0: "batch"}})
    return Deployable({"classifier": graph}, DriverSpec("predict", {"classes": 16}))


# --- bfloat16 --------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(arrays(np.float32, 7, elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_bfloat16_constants_are_rounded_as_torch_rounds_them(values):
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    assert np.array_equal(BFLOAT16.array(BFLOAT16.tensor(values)), expected)


def test_bfloat16_graph_computes_as_torch_does_and_nothing_overflows(tmp_path):
    net = Layers(scale=1e6)  # past the largest float16
    graph = packed(net).graphs["classifier"]
    model = export_onnx(graph, tmp_path / "graph.onnx").load()
    records = [{"image": graph.inputs["image"].numpy()}]
    made = convert_to_half(model, records, kind=BFLOAT16)
    too_large = {"overflow", "constant"}
    assert not too_large & {island.reason for island in made.islands}
    assert too_large & {island.reason for island in convert_to_half(model, records).islands}
    halves = [t for t in made.model.graph.initializer if t.data_type == TensorProto.BFLOAT16]
    assert len(halves) >= 3
    given_logits = Interpreter(rounding_graph(made.model, BFLOAT16))(records[0])["logits"]
    with torch.no_grad():
        exact = net(graph.inputs["image"]).numpy()
        torch_logits = net.to(torch.bfloat16)(graph.inputs["image"].to(torch.bfloat16)).float().numpy()
    ours, torchs = (np.abs(one - exact).max() for one in (given_logits, torch_logits))
    assert 1e-4 < ours < 2 * torchs


# --- engines ---------------------------------------------------------------------------------------------------------


@ENGINES
@pytest.mark.parametrize("name", ["trt-bf16", "trt-int8", "trt-rtx-int8", "trt-fp8"])
def test_engine_is_built_ahead_of_time_and_judged_on_the_cpu(tmp_path, name):
    export(packed(Layers()), load_target(name), tmp_path / "artifact")
    manifest = read_manifest(tmp_path / "artifact")
    entry = manifest.graphs["classifier"]
    assert manifest.engine.name == "tensorrt-rtx" and entry.bytes > 10_000 and not manifest.runnable_here
    assert all(parity.relative <= parity.tolerance for parity in entry.parity)
    if name == "trt-bf16":
        assert entry.parity[0].judged_by == judge_of(BFLOAT16)
        return
    assert sum(entry.quantization.operators.values()) == 2 and entry.quantization.error < 0.1
    assert entry.quantization.per_channel == (name != "trt-fp8")
    assert {"LayerNormalization"} <= {name for island in entry.fp32_islands for name in island.operations}


@ENGINES
def test_fp8_is_coarser_than_int8_here_but_holds(tmp_path):
    errors = {}
    for name in ("trt-int8", "trt-fp8"):
        export(packed(Layers()), load_target(name), tmp_path / name)
        errors[name] = read_manifest(tmp_path / name).graphs["classifier"].quantization.error
    assert errors["trt-int8"] < errors["trt-fp8"] < 0.1


@pytest.mark.parametrize(("name", "capability"), [("trt-fp8", "8.6"), ("trt-bf16", "7.5")])
def test_precision_that_the_gpu_has_not_is_refused_with_what_to_use(tmp_path, name, capability):
    target = with_overrides(load_target(name), {"compute_capability": capability})
    with pytest.raises(TargetError, match=f"needs compute capability .* this is for {capability}: use fp16"):
        export(packed(Layers()), target, tmp_path / "artifact")


# --- free axes -------------------------------------------------------------------------------------------------------


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.layer(image)
        return result


@ENGINES
def test_free_height_and_width_are_built_for_the_sizes_of_the_target(tmp_path):
    axes = {"image": {0: "batch", 2: "height", 3: "width"}}
    graph = Graph(Dense(), {"image": torch.randn(2, 1, 16, 24)}, ("logits",), axes)
    deployable = Deployable({"net": graph}, DriverSpec("predict"))
    target = load_target("trt-rtx-fp16")
    with pytest.raises(TargetError, match=r"set axes.height = \[min, opt, max\]"):
        export(deployable, target, tmp_path / "artifact")
    sized = with_overrides(target, {"axes": {"height": (8, 16, 32), "width": (8, 24, 32)}})
    assert export(deployable, sized, tmp_path / "artifact").graphs["net"].bytes > 1000


# --- sparse weights --------------------------------------------------------------------------------------------------


def sparse(pattern: str) -> Layers:
    net = Layers()
    with torch.no_grad():
        for layer in (net.first, net.second):
            layer.weight *= sparsity_mask(layer.weight, pattern)
    return net


def test_zeros_are_counted_by_pattern(tmp_path):
    found = {}
    for pattern in ("2:4", "0.9"):
        graph = packed(sparse(pattern)).graphs["classifier"]
        found[pattern] = count_zeros(export_onnx(graph, tmp_path / f"{pattern[0]}.onnx").load())
    plain = count_zeros(export_onnx(packed(Layers()).graphs["classifier"], tmp_path / "plain.onnx").load())
    assert (found["2:4"].two_of_four, found["2:4"].half_zero, plain.half_zero, plain.weights) == (2, 2, 0, 2)
    assert found["0.9"].two_of_four == 0 and found["0.9"].share == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        pytest.param("trt-rtx-fp16", "may use sparse tensor cores", marks=ENGINES),
        ("ort-fp32", "no kernels for sparse weights"),
        ("openvino-int8", "OpenVINO gains nothing by them|sparse decompression tried"),
    ],
)
def test_every_engine_says_what_zeros_bought(tmp_path, name, said):
    manifest = export(packed(sparse("2:4")), load_target(name), tmp_path / "artifact")
    assert any(re.search(said, note) for note in manifest.notes), manifest.notes


def test_typed_int8_graph_has_halves_between_the_pairs(tmp_path):
    from compressor.exporters.graph_store import GraphStore
    from compressor.exporters.onnx_quantizer import OnnxQuantizer

    deployable = packed(Layers())
    plain = GraphStore(tmp_path).plain("classifier", deployable.graphs["classifier"])
    record = {"image": deployable.graphs["classifier"].inputs["image"].numpy()}
    quantizer = OnnxQuantizer(plain, [record], load_target("trt-int8"), "tensorrt-rtx", False)
    source, _ = quantizer.write({}, tmp_path, "made")
    made = onnx.shape_inference.infer_shapes(source.typed.load(), strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in made.graph.value_info}
    types |= {tensor.name: tensor.data_type for tensor in made.graph.initializer}
    products = [node for node in made.graph.node if node.op_type in ("Gemm", "MatMul")]
    assert len(products) == 2
    assert all(types[name] == TensorProto.FLOAT16 for node in products for name in node.input[:2])
