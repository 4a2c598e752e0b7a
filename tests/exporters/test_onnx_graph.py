"""What comes out of the export to ONNX, and what it says when it cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressor.deployable import Graph
from compressor.errors import ArtifactError, RequestError
from compressor.exporters.graph_store import GraphStore
from compressor.exporters.onnx_graph import export_onnx

BATCH = {"x": {0: "batch"}}


def run(path: Path, **inputs: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def linear(*, size: int = 4) -> nn.Module:
    return Named(nn.Linear(size, size))


class Named(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


@pytest.mark.parametrize(
    "name",
    ["FluxTransformer2DModel", "SD3Transformer2DModel", "DiTTransformer2DModel", "PixArtTransformer2DModel",
     "QwenImageTransformer2DModel", "resnet", "vit"],
)  # fmt: skip
def test_export_equals_the_module_at_batch_sizes_it_was_not_traced_with(models, graphs, name):
    deployable = models(name)
    key, graph = next(iter(deployable.graphs.items()))
    exported = GraphStore(graphs).plain(key, graph)
    assert [spec.shape[0] for spec in exported.inputs] == ["batch"] * len(graph.inputs)
    assert [spec.name for spec in exported.outputs] == list(graph.outputs)
    for rows in ([0], [1, 0, 1, 1, 0]):
        inputs = {key: value[rows] for key, value in graph.inputs.items()}
        with torch.no_grad():
            expected = graph.module.eval()(**inputs).numpy()
        given = run(exported.path, **{key: value.numpy() for key, value in inputs.items()})
        assert np.abs(given - expected).max() < 1e-4 * np.abs(expected).max()


def test_export_leaves_weights_and_training_modes_as_they_were(tmp_path):
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.BatchNorm2d(2)).train()
    module[3].eval()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    graph = Graph(Named(module), {"x": torch.randn(2, 1, 6, 6)}, ("y",), BATCH)
    export_onnx(graph, tmp_path / "graph.onnx")
    assert [part.training for part in module] == [True, True, True, False]
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_export_folds_batch_normalisation_into_the_convolution(tmp_path):
    module = Named(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()))
    export_onnx(Graph(module, {"x": torch.randn(2, 1, 6, 6)}, ("y",), BATCH), tmp_path / "graph.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "graph.onnx").graph.node]
    assert kinds == ["Conv", "Relu"]


def test_export_folds_a_parametrised_weight_and_keeps_the_parametrisation_in_the_module(tmp_path):
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * torch.tensor([1.0, 0.0, 1.0, 0.0])

    module = linear()
    parametrize.register_parametrization(module.layer, "weight", Halved())
    export_onnx(Graph(module, {"x": torch.randn(2, 4)}, ("y",), BATCH), tmp_path / "graph.onnx")
    assert [node.op_type for node in onnx.load(tmp_path / "graph.onnx").graph.node] == ["Gemm"]
    assert parametrize.is_parametrized(module.layer, "weight")


def test_export_of_a_half_precision_module_is_float32(tmp_path):
    module = linear().half()
    exported = export_onnx(Graph(module, {"x": torch.randn(2, 4).half()}, ("y",), BATCH), tmp_path / "graph.onnx")
    assert exported.inputs[0].dtype == exported.outputs[0].dtype == "float32"
    assert module.layer.weight.dtype == torch.float16


def test_exported_file_is_alone_and_tells_nothing_of_this_machine(tmp_path):
    export_onnx(Graph(linear(), {"x": torch.randn(2, 4)}, ("y",), BATCH), tmp_path / "graph.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["graph.onnx"]
    data = (tmp_path / "graph.onnx").read_bytes()
    assert str(Path(__file__).parent).encode() not in data and b"site-packages" not in data


def test_squeeze_of_an_axis_that_is_not_one_is_left_out(tmp_path):
    class Squeeze(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (2 * x).squeeze(1)

    export_onnx(Graph(Squeeze(), {"x": torch.randn(2, 3)}, ("y",), BATCH), tmp_path / "graph.onnx")
    assert [node.op_type for node in onnx.load(tmp_path / "graph.onnx").graph.node] == ["Mul"]


def test_length_of_a_tensor_does_not_fix_the_batch(tmp_path):
    class Length(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(len(x), 2, 2).sum(1)

    exported = export_onnx(Graph(Length(), {"x": torch.randn(2, 4)}, ("y",), BATCH), tmp_path / "graph.onnx")
    assert exported.outputs[0].shape == ("batch", 2) and "len" not in globals()


def test_complex_table_of_a_module_becomes_real_arithmetic(tmp_path):
    class Rotate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.polar(torch.ones(5, 4), torch.randn(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            table = torch.cat(self.table.split([1, 3], dim=1), dim=1)
            numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
            return torch.view_as_real(numbers * table).flatten(-2)

    module, x = Rotate(), torch.randn(2, 5, 8)
    export_onnx(Graph(module, {"x": x}, ("y",), BATCH), tmp_path / "graph.onnx")
    assert np.allclose(run(tmp_path / "graph.onnx", x=x.numpy()), module(x).numpy(), atol=1e-6)


def test_free_image_sizes_keep_their_names(tmp_path):
    module = Named(nn.Conv2d(3, 4, 2, stride=2))
    dynamic = {"x": {0: "batch", 2: "height", 3: "width"}}
    exported = export_onnx(Graph(module, {"x": torch.randn(2, 3, 8, 12)}, ("y",), dynamic), tmp_path / "graph.onnx")
    assert exported.inputs[0].shape == ("batch", 3, "height", "width")
    assert exported.outputs[0].shape == ("batch", 4, "(height//2)", "(width//2)")


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1) * 2


class Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x.unflatten(-1, (2, 2))).abs()


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.zeros(7, 7)


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x + 2


@pytest.mark.parametrize(
    ("module", "rows", "outputs", "error", "said"),
    [
        (FixedBatch(), 2, ("y",), ArtifactError, "axis 0 of input 'x' is declared dynamic"),
        (Fourier(), 2, ("y",), ArtifactError, "aten.linalg_eig"),
        (Broken(), 2, ("y",), RequestError, "does not run on its example inputs"),
        (Two(), 2, ("y",), RequestError, "returns 2 values, but the outputs are named y"),
        (Two(), 1, ("y", "z"), RequestError, "give at least 2"),
    ],
)
def test_graph_that_cannot_be_exported_is_refused_in_one_line(tmp_path, module, rows, outputs, error, said):
    graph = Graph(module, {"x": torch.randn(rows, 4)}, outputs, BATCH)
    with pytest.raises(error) as caught:
        export_onnx(graph, tmp_path / "graph.onnx", name="net")
    assert said in str(caught.value) and "'net'" in str(caught.value) and "\n" not in str(caught.value)


def test_dynamic_axis_of_an_unknown_input_is_refused(tmp_path):
    graph = Graph(linear(), {"x": torch.randn(2, 4)}, ("y",), {"image": {0: "batch"}})
    with pytest.raises(RequestError, match="'image', which is no input"):
        export_onnx(graph, tmp_path / "graph.onnx")
