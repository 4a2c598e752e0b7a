"""Which operations stay in float32, why, and that the result holds in real half arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from compressor.deployable import Graph
from compressor.errors import RequestError
from compressor.exporters.drift import first_drift
from compressor.exporters.graph_store import GraphStore
from compressor.exporters.half_arithmetic import rounding_graph
from compressor.exporters.interpreter import Interpreter
from compressor.exporters.onnx_graph import export_onnx
from compressor.exporters.precision import convert_to_half, half_error
from compressor.exporters.typed_graph import normalised, type_graph


class Attention(nn.Module):
    """Attention after a norm whose gain makes the logits overflow halves; the residual hides nothing."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.norm, self.query, self.key = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.value = nn.Linear(32, 32)
        nn.init.constant_(self.norm.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        weights = torch.softmax(self.query(h) @ self.key(h).transpose(1, 2) / 32**0.5, dim=-1)
        return weights @ self.value(x)


class Cancels(nn.Module):
    """Adds what it subtracts again: nothing overflows, but a half has no digits left for the difference."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        offset = 900.0 * (1.0 + h.mean(1, keepdim=True).tanh().abs())
        result: Tensor = self.last((h + offset) - offset)
        return result


def exported(module: nn.Module, folder: Path, *shape: int) -> tuple[onnx.ModelProto, list[dict[str, np.ndarray]]]:
    torch.manual_seed(0)
    graph = Graph(module, {"x": torch.randn(2, *shape)}, ("y",), {"x": {0: "batch"}})
    model = export_onnx(graph, folder / "graph.onnx").load()
    rng = np.random.default_rng(0)
    return model, [{"x": rng.standard_normal((4, *shape)).astype(np.float32)} for _ in range(3)]


def types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    found = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    return found | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def test_overflowing_logits_become_an_island_and_the_rest_stays_half(tmp_path):
    torch.manual_seed(0)
    model, records = exported(Attention(1e3), tmp_path, 8, 32)
    plain = normalised(model)
    kinds_only = {node.name for node in plain.graph.node if node.op_type in ("Softmax", "LayerNormalization")}
    assert half_error(plain, type_graph(plain, kinds_only), records) == float("inf")
    half = convert_to_half(model, records)
    assert half_error(plain, half.model, records) < 1e-2
    overflow = [island for island in half.islands if island.reason == "overflow"]
    assert any("MatMul" in island.operations and island.peak > 65504 for island in overflow)
    products = [node for node in half.model.graph.node if node.op_type in ("MatMul", "Gemm")]
    assert {types(half.model)[node.output[0]] for node in products} == {TensorProto.FLOAT, TensorProto.FLOAT16}


def test_cancellation_is_found_by_its_error(tmp_path):
    torch.manual_seed(0)
    model, records = exported(Cancels(), tmp_path, 16)
    plain = normalised(model)
    half = convert_to_half(model, records)
    assert half_error(plain, half.model, records) < 1e-2
    moved = {operation for island in half.islands if island.reason == "accuracy" for operation in island.operations}
    assert moved & {"Add", "Sub"}
    assert any(value == TensorProto.FLOAT16 for value in types(half.model).values())


def test_layer_that_the_method_names_stays_float32(tmp_path):
    model, records = exported(Named(), tmp_path, 16)
    half = convert_to_half(model, records, ["block.first"])
    assert [(island.layer, island.reason) for island in half.islands] == [("block.first", "asked")]
    with pytest.raises(RequestError, match=r"'block\.third'"):
        convert_to_half(model, records, ["block.third"])


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"first": nn.Linear(16, 16), "second": nn.Linear(16, 16)})

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block["second"](torch.relu(self.block["first"](x)))
        return result


def test_epsilon_that_vanishes_in_half_keeps_its_operation(tmp_path):
    class Normalise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / (x.abs().amax(1, keepdim=True) + 1e-12)

    model, records = exported(Normalise(), tmp_path, 16)
    reasons = {island.reason: island.operations for island in convert_to_half(model, records).islands}
    assert "Add" in reasons["constant"]


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "vit"])
def test_typed_graph_has_float32_ports_and_no_needless_cast(models, graphs, name):
    key, graph = next(iter(models(name).graphs.items()))
    record = {key: value.numpy() for key, value in graph.inputs.items()}
    typed = convert_to_half(GraphStore(graphs).plain(key, graph).load(), [record]).model
    floats = [v for v in (*typed.graph.input, *typed.graph.output) if v.type.tensor_type.elem_type != TensorProto.INT64]
    assert {value.type.tensor_type.elem_type for value in floats} == {TensorProto.FLOAT}
    casts = [node for node in typed.graph.node if node.op_type == "Cast"]
    assert not {node.input[0] for node in casts} & {node.output[0] for node in casts}, "a cast of a cast"
    wanted = [(node.input[0], node.attribute[0].i) for node in casts]
    assert len(wanted) == len(set(wanted)), "one value is cast twice"
    known = types(typed) | {value.name: value.type.tensor_type.elem_type for value in typed.graph.input}
    assert all(known[source] != target for source, target in wanted), "a cast to the type it has"


def test_sines_get_their_angle_in_float32(models, graphs):
    key, graph = next(iter(models("SD3Transformer2DModel").graphs.items()))
    record = {key: value.numpy() for key, value in graph.inputs.items()}
    half = convert_to_half(GraphStore(graphs).plain(key, graph).load(), [record])
    angle = next(island for island in half.islands if island.reason == "angle")
    assert {"Sin", "Cos", "Mul"} <= set(angle.operations) and "time_proj" in angle.layer


def test_rounding_graph_agrees_with_the_reference_evaluator_on_real_halves(tmp_path):
    model, records = exported(Named(), tmp_path, 16)
    typed = convert_to_half(model, records).model
    (judged,) = Interpreter(rounding_graph(typed))(records[0]).values()
    (expected,) = ReferenceEvaluator(typed).run(None, records[0])
    (exact,) = ReferenceEvaluator(model).run(None, records[0])
    # products and sums of a matrix product may round in another order: one digit of a half
    assert np.abs(judged - expected).max() <= 2**-10 * np.abs(expected).max()
    assert not np.array_equal(judged, exact)


HALVES = arrays(np.float32, 5, elements=st.floats(-300, 300, width=32))


@settings(max_examples=50, deadline=None)
@given(HALVES, HALVES)
def test_rounding_graph_computes_as_numpy_halves_do(x, y):
    nodes = [helper.make_node("Mul", ["x", "y"], ["product"]), helper.make_node("Sub", ["product", "x"], ["z"])]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [5]) for name in "xyz"]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ports[:2], ports[2:]), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    typed = type_graph(normalised(model), ())
    with np.errstate(over="ignore", invalid="ignore"):
        a, b = x.astype(np.float16), y.astype(np.float16)
        expected = (a * b - a).astype(np.float32)
    assert np.array_equal(Interpreter(rounding_graph(typed))({"x": x, "y": y})["z"], expected, equal_nan=True)


def test_drift_is_traced_to_the_layer_where_it_starts(tmp_path):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.scale, self.after = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            nn.init.constant_(self.scale.weight, 1e5)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.after(self.scale(self.before(x)) / 1e5)
            return result

    model, records = exported(Scaled(), tmp_path, 8)
    typed = type_graph(normalised(model), ())
    assert "layer scale (Gemm)" in first_drift(model, typed, records[0], 1e-2)
