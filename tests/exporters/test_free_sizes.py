"""Free axes hold on the engine that was built, not on the graph alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import compressor.exporters.export
from compressor.deployable import Deployable, DriverSpec, Graph
from compressor.errors import ArtifactError
from compressor.exporters.export import export
from compressor.exporters.free_sizes import check_other_sizes, other_sizes, resized
from compressor.exporters.onnx_graph import export_onnx
from compressor.profiles.target import load_target, with_overrides
from compressor.runtimes.load import open_graph

FREE = {"x": {0: "batch", 2: "height", 3: "width"}}
X = {"x": np.random.default_rng(0).random((2, 3, 16, 12), dtype=np.float32)}


class Pooled(nn.Module):
    """The mean of features, over the image's own size or over a number of pixels that is fixed."""

    def __init__(self, pixels: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features, self.pixels = nn.Conv2d(3, 8, 3, padding=1), pixels

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x).relu()
        return h.sum((2, 3)) / self.pixels if self.pixels else h.mean((2, 3))


def graph(module: nn.Module, dynamic: dict[str, dict[int, str]]) -> Graph:
    return Graph(module, {"x": torch.from_numpy(X["x"])}, ("y",), dynamic)


def test_every_free_axis_is_tried_alone_and_a_batch_of_one():
    assert other_sizes(X, FREE) == [{"batch": 1}, {"batch": 3}, {"height": 32}, {"width": 24}]


def test_sizes_stay_within_what_the_target_allows():
    assert other_sizes(X, FREE, {"batch": (2, 2), "height": (8, 16), "width": (12, 20)}) == [
        {"height": 8}, {"width": 20},
    ]  # fmt: skip
    assert other_sizes(X, FREE, {"batch": (1, 2), "height": (16, 16)}) == [{"batch": 1}, {"width": 24}]


def test_inputs_of_another_size_go_round_the_given_ones():
    made = resized(X, FREE, {"batch": 3, "width": 13})["x"]
    assert made.shape == (3, 3, 16, 13)
    assert np.array_equal(made[2, ..., :12], X["x"][0]) and np.array_equal(made[0, ..., 12], X["x"][0, ..., 0])


@pytest.fixture
def seen(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes that built engines were run with."""
    shapes: list[tuple[int, ...]] = []

    class Recording:
        def __init__(self, *arguments) -> None:
            self.runtime = open_graph(*arguments)
            self.close = self.runtime.close

        def __call__(self, inputs):
            shapes.append(inputs["x"].shape)
            return self.runtime(inputs)

    monkeypatch.setattr(compressor.exporters.export, "open_graph", Recording)
    return shapes


@pytest.mark.parametrize("target", ["openvino-fp32", "openvino-fp16", "openvino-int8", "ort-fp16", "ort-int8"])
def test_engine_is_run_twice_and_at_other_sizes_when_it_is_built(tmp_path, seen, target):
    deployable = Deployable({"net": graph(Pooled(), FREE)}, DriverSpec("predict", {"classes": 8}))
    export(deployable, load_target(target), tmp_path / "artifact")
    assert seen == [(2, 3, 16, 12), (2, 3, 16, 12), (1, 3, 16, 12), (3, 3, 16, 12), (2, 3, 32, 12), (2, 3, 16, 24)]


def test_engine_is_tried_at_no_batch_that_the_target_does_not_allow(tmp_path, seen):
    target = with_overrides(load_target("ort-fp32"), {"batch": {"min": 4, "opt": 4, "max": 5, "benchmark": [4]}})
    deployable = Deployable({"net": graph(Pooled(), {"x": {0: "batch"}})}, DriverSpec("predict", {"classes": 8}))
    export(deployable, target, tmp_path / "artifact")
    assert seen == [(4, 3, 16, 12), (4, 3, 16, 12), (5, 3, 16, 12)]


def checked(tmp_path: Path, built: Graph, engine: str) -> None:
    plain = export_onnx(graph(Pooled(), FREE), tmp_path / "plain.onnx")
    runtime = open_graph(export_onnx(built, tmp_path / "built.onnx").path, engine, {"inference_precision": "f32"})
    others = [(sizes, resized(X, FREE, sizes)) for sizes in other_sizes(X, FREE)]
    check_other_sizes("net", runtime, f"{engine} on cpu", plain.path, others, 1e-4)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_engine_that_fixes_a_size_is_refused_by_its_name_the_axis_and_the_size(tmp_path, engine):
    said = (
        rf"graph 'net' does not hold on {engine} on cpu at batch = 1, which is declared dynamic: .*must have the shape"
    )
    with pytest.raises(ArtifactError, match=said) as caught:
        checked(tmp_path, graph(Pooled(), {}), engine)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_engine_that_gives_something_else_at_another_size_is_refused(tmp_path, engine):
    with pytest.raises(ArtifactError, match=r"at height = 32, .*output 'y' differs from the float32 graph's by 1"):
        checked(tmp_path, graph(Pooled(16 * 12), FREE), engine)
