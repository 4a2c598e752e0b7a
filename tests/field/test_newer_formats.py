"""A file newer than the engine: the engine's own words name neither what it needs nor what is there."""

from __future__ import annotations

import json

import pytest
from onnx import TensorProto, helper

from compressor.errors import ArtifactError, TargetError
from compressor.runtimes.load import load, open_graph
from compressor.runtimes.manifest import MANIFEST_FILE
from tests.small_artifacts import classifier


def relu(ir_version: int, opset: int) -> bytes:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    return model.SerializeToString()


@pytest.mark.parametrize(("ir_version", "opset", "said"), [(99, 17, "IR version 99"), (8, 99, "opset 99")])
def test_newer_onnx_file_says_what_it_needs_and_what_the_engine_has(tmp_path, ir_version, opset, said):
    (tmp_path / "graph.onnx").write_bytes(relu(ir_version, opset))
    with pytest.raises(TargetError, match=rf"needs ONNX {said}, ONNX Runtime [\d.]+ has \d+") as caught:
        open_graph(tmp_path / "graph.onnx", "onnxruntime")
    assert "\n" not in str(caught.value)


def test_newer_openvino_file_is_refused_in_one_line(tmp_path):
    openvino = pytest.importorskip("openvino")
    (tmp_path / "graph.onnx").write_bytes(relu(8, 17))
    openvino.save_model(openvino.convert_model(str(tmp_path / "graph.onnx")), str(tmp_path / "graph.xml"))
    text = (tmp_path / "graph.xml").read_text()
    assert 'version="11"' in text
    (tmp_path / "graph.xml").write_text(text.replace('version="11"', 'version="99"', 1))
    with pytest.raises(TargetError, match="needs OpenVINO IR version 99, OpenVINO .* reads up to 11") as caught:
        open_graph(tmp_path / "graph.xml", "openvino")
    assert "\n" not in str(caught.value)


def test_newer_manifest_is_refused_by_its_version(tmp_path):
    folder = classifier(tmp_path / "artifact")
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(ArtifactError, match="99") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
