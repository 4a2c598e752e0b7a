"""Weights in a side file: it is forgotten, does not match, or leads out of the folder."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from compressor.errors import ArtifactError
from compressor.exporters import model_file
from compressor.exporters.bundle import write_bundle
from compressor.runtimes.load import load, load_graphs
from compressor.runtimes.manifest import hash_file, read_manifest
from tests.small_artifacts import classifier


def test_small_model_is_one_file(exported):
    made = exported(nn.Linear(4, 3), {"input": torch.rand(2, 4)})
    assert sorted(path.name for path in made.folder.iterdir()) == ["manifest.json", "network.onnx"]


def test_side_file_of_a_large_model_is_listed_hashed_and_missed(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(model_file, "INLINE_LIMIT", 100)
    torch.manual_seed(0)
    module = nn.Linear(64, 64).eval()
    made = exported(module, {"input": torch.rand(2, 64)})
    assert made.entry.data_file == "network.onnx.data"
    assert made.entry.data_sha256 == hash_file(made.folder / "network.onnx.data")
    shutil.move(made.folder, tmp_path / "moved")
    made.folder = tmp_path / "moved"
    assert made.near(module, input=torch.rand(3, 64))
    (made.folder / "network.onnx.data").unlink()
    with pytest.raises(ArtifactError, match=r"network\.onnx\.data") as caught:
        load_graphs(made.folder, read_manifest(made.folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("location", ["../outside.bin", "{outside}"])
def test_side_file_outside_the_folder_is_neither_bundled_nor_loaded(tmp_path, location):
    folder = classifier(tmp_path / "artifact")
    outside = tmp_path / "outside.bin"
    np.arange(16, dtype=np.float32).tofile(outside)
    weight = TensorProto(name="w", data_type=1, dims=[16], data_location=TensorProto.EXTERNAL)
    entry = weight.external_data.add()
    entry.key, entry.value = "location", location.format(outside=outside)
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [16]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", ports[:1], ports[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "classifier.onnx").write_bytes(model.SerializeToString())
    manifest = (folder / "manifest.json").read_text()
    known = read_manifest(folder, verify=False).graphs["classifier"].sha256
    (folder / "manifest.json").write_text(manifest.replace(known, hash_file(folder / "classifier.onnx")))
    for refused in (lambda: write_bundle(folder, tmp_path / "model.zip"), lambda: load(folder)):
        with pytest.raises(ArtifactError) as caught:
            refused()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "model.zip").exists()


def test_small_file_has_no_references_at_all(tmp_path):
    folder = classifier(tmp_path / "artifact")
    model = onnx.load(folder / "classifier.onnx", load_external_data=False)
    assert not any(tensor.external_data for tensor in model.graph.initializer)
