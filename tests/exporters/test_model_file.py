"""Models whose weights stay in a file: what protobuf could not hold is never in one message, at any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn

from compressor.deployable import Graph
from compressor.exporters.drift import first_drift
from compressor.exporters.graph_store import GraphStore
from compressor.exporters.half_arithmetic import rounding_graph
from compressor.exporters.interpreter import Interpreter
from compressor.exporters.island_search import HalfSwitches, measure_peaks
from compressor.exporters.model_file import (
    check_model,
    filled,
    infer_types,
    is_stored,
    read_model,
    size_of,
    values_of,
    write_model,
)
from compressor.exporters.onnx_graph import export_onnx
from compressor.exporters.precision import convert_to_half, half_error
from compressor.exporters.sparse_weights import count_zeros
from compressor.exporters.typed_graph import BFLOAT16, FLOAT16, Half, normalised

WIDE = 96
WEIGHTS = 4 * 2 * WIDE * WIDE
ALONE = 8000
"""Bytes that a graph without its weights does not reach."""


class Deep(nn.Module):
    """Two wide layers, a norm, and values that overflow halves in between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(WIDE, WIDE), nn.LayerNorm(WIDE), nn.Linear(WIDE, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x) * 30000.0))


@pytest.fixture
def graph() -> Graph:
    return Graph(Deep(), {"x": torch.randn(2, WIDE)}, ("y",), {"x": {0: "batch"}})


@pytest.fixture
def records() -> list[dict[str, np.ndarray]]:
    return [{"x": torch.randn(3, WIDE, generator=torch.Generator().manual_seed(1)).numpy()}]


@pytest.fixture
def stored(graph: Graph, tmp_path: Path) -> ModelProto:
    model = GraphStore(tmp_path / "graphs").plain("g", graph).load()
    assert sum(size_of(tensor) for tensor in model.graph.initializer if is_stored(tensor)) == WEIGHTS
    return model


def values(model: ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(values_of(tensor)) for tensor in model.graph.initializer}


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("kind", [FLOAT16, BFLOAT16], ids=["fp16", "bf16"])
def test_no_step_of_the_search_for_islands_holds_the_weights(stored, records, kind, monkeypatch):
    sent = []

    def spy(message: ModelProto) -> bytes:
        data = original(message)
        sent.append(len(data))
        return data

    original = ModelProto.SerializeToString
    monkeypatch.setattr(ModelProto, "SerializeToString", spy)
    plain = normalised(stored)
    measure_peaks(plain, records)
    switches = HalfSwitches(plain, records, kind)
    assert switches.error([node.name for node in plain.graph.node]) > 0
    made = convert_to_half(stored, records, kind=kind)
    half_error(plain, made.model, records, kind)
    first_drift(stored, made.model, records[0], 1e-9, kind)
    monkeypatch.undo()
    assert len(sent) > 4 and max(sent) < ALONE
    assert made.model.ByteSize() < ALONE and rounding_graph(made.model, kind).ByteSize() < ALONE


@pytest.mark.parametrize("kind", [FLOAT16, BFLOAT16], ids=["fp16", "bf16"])
def test_halves_are_the_same_with_weights_in_memory_and_in_a_file(stored, records, kind: Half, tmp_path):
    memory, file = (convert_to_half(model, records, kind=kind) for model in (filled(stored), stored))
    assert dict(memory.kept) == dict(file.kept) and memory.islands == file.islands
    judged = [Interpreter(rounding_graph(one.model, kind))(records[0]) for one in (memory, file)]
    assert same(*judged)
    assert same(values(memory.model), values(file.model))
    write_model(file.model, tmp_path / "half.onnx", inline_limit=0)
    again = read_model(tmp_path / "half.onnx")
    assert same(values(again), values(file.model))
    assert same(Interpreter(rounding_graph(again, kind))(records[0]), judged[0])
    assert (tmp_path / "half.onnx.data").stat().st_size < 0.6 * WEIGHTS
    onnx.checker.check_model(str(tmp_path / "half.onnx"), full_check=True)


def test_session_of_a_graph_in_memory_reads_weights_where_they_lie(stored, records, graph):
    expected = graph.module(torch.from_numpy(records[0]["x"])).detach().numpy()
    for model in (stored, filled(stored)):
        (given,) = Interpreter(model)(records[0]).values()
        assert np.abs(given - expected).max() <= 1e-4 * np.abs(expected).max()


def test_model_is_written_beside_or_as_one_file_and_read_alike(stored, tmp_path):
    expected = values(stored)
    for model in (stored, filled(stored)):
        for number, limit in enumerate((0, WEIGHTS - 1, 10**6)):
            path = tmp_path / f"{number}.onnx"
            write_model(model, path, inline_limit=limit)
            assert path.with_name(path.name + ".data").is_file() == (limit < WEIGHTS)
            assert same(values(read_model(path)), expected)
            loaded = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}
            assert same(loaded, expected)
            path.with_name(path.name + ".data").unlink(missing_ok=True)
        assert same(values(model), expected)


def test_weights_that_lie_in_place_are_not_written_again(stored, graph, tmp_path):
    path = export_onnx(graph, tmp_path / "g.onnx", inline_limit=0).path
    data = path.with_name("g.onnx.data")
    before, model = data.read_bytes(), read_model(path)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((32, 32), np.float32), "another"))
    write_model(model, path, inline_limit=0)
    assert data.read_bytes().startswith(before)
    assert same(values(read_model(path)), {**values(stored), "another": np.ones((32, 32), np.float32)})


def test_types_are_inferred_and_checked_without_weights(stored):
    model = filled(stored)
    for one in (model, stored):
        del one.graph.value_info[:]
    expected = onnx.shape_inference.infer_shapes(model).graph.value_info
    infer_types(stored)
    assert len(expected) > 2 and list(stored.graph.value_info) == list(expected)
    check_model(stored)
    next(node for node in stored.graph.node if node.op_type == "Gemm").input[0] = "absent"
    with pytest.raises(onnx.checker.ValidationError):
        check_model(stored)


def test_zeros_are_counted_in_a_file(stored):
    assert count_zeros(stored) == count_zeros(filled(stored))
