"""Artifacts: what lies in the folder, how near it is to the model, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.deployable import Deployable, DriverSpec, Graph
from compressor.errors import ArtifactError, RequestError, TargetError
from compressor.exporters.export import export
from compressor.exporters.half_arithmetic import judge_of
from compressor.exporters.parity import TOLERANCES
from compressor.exporters.typed_graph import FLOAT16
from compressor.profiles.target import load_target, with_overrides
from compressor.runtimes.load import load_graphs
from compressor.runtimes.manifest import read_assets, read_manifest

TARGETS = ("ort-fp32", "ort-fp16", "openvino-fp16", "trt-fp16")
MODELS = ("FluxTransformer2DModel", "SD3Transformer2DModel", "DiTTransformer2DModel", "PixArtTransformer2DModel",
          "QwenImageTransformer2DModel", "resnet", "vit")  # fmt: skip


def linear(**changes) -> Deployable:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, image: Tensor) -> Tensor:
            logits: Tensor = self.layer(image.flatten(1))
            return logits

    torch.manual_seed(0)
    graph = Graph(Named(), {"image": torch.rand(2, 1, 2, 2)}, ("logits",), {"image": {0: "batch"}})
    values = {"graphs": {"classifier": graph}, "driver": DriverSpec("predict", {"classes": 3})}
    return Deployable(**{**values, **changes})


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", MODELS)
def test_artifact_holds_its_tolerance_at_other_batch_sizes(models, graphs, tmp_path, model, target):
    deployable = models(model)
    export(deployable, load_target(target), tmp_path / "artifact", cache=graphs)
    manifest = read_manifest(tmp_path / "artifact")
    (name, graph), (entry,) = next(iter(deployable.graphs.items())), manifest.graphs.values()
    assert entry.parity and all(parity.relative <= parity.tolerance for parity in entry.parity)
    assert all(spec.dtype in ("float32", "int64") for spec in (*entry.inputs, *entry.outputs))
    if target == "trt-fp16":
        assert manifest.engine.name == "tensorrt-rtx" and manifest.engine.compute_capability == "8.9"
        assert entry.parity[0].judged_by == judge_of(FLOAT16) and not manifest.runnable_here
        return
    run = load_graphs(tmp_path / "artifact", manifest, {"threads": 1})[name]
    rows = [1, 0, 1, 1, 0]
    inputs = {key: value[rows] for key, value in graph.inputs.items()}
    with torch.no_grad():
        expected = graph.module.eval()(**inputs).numpy()
    given = run({key: value.numpy() for key, value in inputs.items()})[graph.outputs[0]]
    assert np.abs(given - expected).max() <= entry.parity[0].tolerance * np.abs(expected).max()
    run.close()


def test_half_artifact_is_half_the_size_and_names_its_islands(models, graphs, tmp_path):
    plain = export(models("vit"), load_target("ort-fp32"), tmp_path / "fp32", cache=graphs).graphs["classifier"]
    half = export(models("vit"), load_target("ort-fp16"), tmp_path / "fp16", cache=graphs).graphs["classifier"]
    assert half.bytes < 0.65 * plain.bytes
    assert {"LayerNormalization", "Softmax"} <= {name for island in half.fp32_islands for name in island.operations}
    assert [parity.judged_by for parity in half.parity] == [judge_of(FLOAT16), "onnxruntime on cpu"]
    assert plain.fp32_islands == ()


def test_engine_ahead_of_time_is_an_engine_and_says_what_it_is(models, graphs, tmp_path):
    manifest = export(models("resnet"), load_target("trt-fp16"), tmp_path / "artifact", cache=graphs)
    data = (tmp_path / "artifact" / "classifier.engine").read_bytes()
    assert len(data) == manifest.graphs["classifier"].bytes > 10_000
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    size = trt.Runtime(trt.Logger()).engine_header_size
    assert len(data) > size and b"trt" in data[:8]
    assert any("Built ahead of time by TensorRT-RTX" in note for note in manifest.notes)
    assert "8.9" in manifest.reason


def test_engine_is_built_for_the_compute_capability_of_the_target(tmp_path):
    target = with_overrides(load_target("trt-rtx-fp16"), {"compute_capability": "12.0"})
    assert export(linear(), target, tmp_path / "artifact").engine.compute_capability == "12.0"
    with pytest.raises(TargetError, match=r"not for 9\.0"):
        export(linear(), with_overrides(target, {"compute_capability": "9.0"}), tmp_path / "other")


def test_same_graph_is_exported_once_for_all_targets(tmp_path):
    for target in ("ort-fp32", "openvino-fp32", "ort-fp16", "openvino-fp16"):
        export(linear(), load_target(target), tmp_path / target, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*-fp32"))) == len(list((tmp_path / "cache").glob("*-fp16"))) == 1


def test_assets_files_settings_and_metadata_come_back(tmp_path):
    labels, table = "seven\neight", np.arange(6, dtype=np.float64).reshape(2, 3)
    deployable = linear(
        assets={"labels": labels, "condition.table": table, "file": np.int64(3)},
        files={"scene/points.ply": lambda path: path.write_bytes(b"ply")},
    )
    export(deployable, load_target("ort-fp32"), tmp_path / "artifact", metadata={"steps": 3})
    manifest = read_manifest(tmp_path / "artifact")
    assets = read_assets(tmp_path / "artifact", manifest)
    assert assets["labels"] == labels and assets["file"] == 3
    assert np.array_equal(assets["condition.table"], table) and assets["condition.table"].dtype == np.float64
    assert (tmp_path / "artifact/scene/points.ply").read_bytes() == b"ply" and "scene/points.ply" in manifest.files
    assert manifest.metadata == {"steps": 3} and manifest.driver.settings == {"classes": 3}


def test_records_measure_parity_and_are_cut_to_the_largest_batch(tmp_path):
    rng = np.random.default_rng(0)
    records = {"classifier": [{"image": rng.random((40, 1, 2, 2))} for _ in range(3)]}
    target = with_overrides(load_target("trt-fp16"), {"batch.max": 8, "batch.benchmark": [1, 8]})
    entry = export(linear(), target, tmp_path / "artifact", records=records).graphs["classifier"]
    assert entry.parity[0].records == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"graphs": {}}, "has no graph"),
        ({"driver": DriverSpec("predict", {"shape": object()})}, "must be JSON values"),
        ({"assets": {"x": np.array([object()])}}, "asset 'x' holds Python objects"),
        ({"files": {"manifest.json": lambda path: None}}, "would replace a file"),
    ],
)
def test_deployable_that_is_not_well_formed_is_refused(tmp_path, changes, said):
    with pytest.raises(RequestError, match=said):
        export(linear(**changes), load_target("ort-fp32"), tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


def test_file_outside_the_folder_is_refused(tmp_path):
    deployable = linear(files={"../escaped": lambda path: path.write_bytes(b"")})
    with pytest.raises(ArtifactError, match="outside itself"):
        export(deployable, load_target("ort-fp32"), tmp_path / "artifact")
    assert not (tmp_path / "escaped").exists()


def test_failing_export_leaves_the_old_artifact(tmp_path):
    export(linear(), load_target("ort-fp32"), tmp_path / "artifact")
    before = (tmp_path / "artifact/manifest.json").read_bytes()
    with pytest.raises(RequestError):
        export(linear(assets={"x": np.array([object()])}), load_target("ort-fp32"), tmp_path / "artifact")
    assert (tmp_path / "artifact/manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_drift_past_the_tolerance_names_the_output(tmp_path, monkeypatch):
    for precision in ("fp16", "bf16"):  # OpenVINO may compute in either
        monkeypatch.setitem(TOLERANCES, precision, 1e-9)
    with pytest.raises(ArtifactError, match=r"output 'logits' drifts by .* judged by"):
        export(linear(), load_target("openvino-fp16"), tmp_path / "artifact")


def test_torch_target_has_no_artifact(tmp_path):
    with pytest.raises(TargetError, match="nothing is exported"):
        export(linear(), load_target("torch-fp32"), tmp_path / "artifact")


def test_manifest_is_plain_json_without_paths_of_this_machine(tmp_path):
    export(linear(), load_target("ort-fp16"), tmp_path / "artifact")
    text = (tmp_path / "artifact/manifest.json").read_text()
    assert json.loads(text)["schema_version"] == 1 and str(tmp_path) not in text
