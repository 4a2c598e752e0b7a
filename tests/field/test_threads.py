"""Engines compared with different numbers of threads: their defaults decide, not they."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from compressor.cli.app import execute
from compressor.cli.benchmark import measure_artifacts
from compressor.measurement import LoadedEngine
from compressor.profiles.machine import describe_machine, usable_threads
from compressor.profiles.report_facts import machine_lines
from compressor.runtimes.manifest import MANIFEST_FILE
from tests.small_artifacts import classifier


@pytest.fixture
def files(tmp_path):
    """One graph for two engines."""
    openvino = pytest.importorskip("openvino")
    weight = numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ports[:1], ports[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "graph.onnx").write_bytes(model.SerializeToString())
    openvino.save_model(openvino.convert_model(str(tmp_path / "graph.onnx")), str(tmp_path / "graph.xml"))
    return [tmp_path / "graph.onnx", tmp_path / "graph.xml"]


def test_engines_that_are_compared_have_the_same_threads_and_the_result_names_them(files, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    arguments = ["bench", *map(str, files), "--batch", "1", "--seconds", "0.05", "--rounds", "3", "--json"]
    assert execute(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["threads"] for row in result["artifacts"]] == [2, 2]
    assert result["machine"]["cpu"]["threads"] == 2
    assert execute([*arguments, "--threads", "1"]) == 0
    assert [row["threads"] for row in json.loads(capsys.readouterr().out)["artifacts"]] == [1, 1]


def test_targets_with_threads_of_their_own_are_told_apart(tmp_path):
    folders = [classifier(tmp_path / name) for name in ("one", "three")]
    manifest = json.loads((folders[1] / MANIFEST_FILE).read_text())
    manifest["target"]["options"]["threads"] = 3
    (folders[1] / MANIFEST_FILE).write_text(json.dumps(manifest))
    measured = measure_artifacts(folders, batches=[1], seconds=0.05, rounds=3)
    assert [facts["threads"] for facts in measured.facts.values()] == [1, 3]
    assert measured.thread_note().startswith("threads differ: one has 1, three has 3")


def test_engine_of_a_run_gets_the_threads_that_the_report_names(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = classifier(tmp_path / "artifact")
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["target"]["options"] = {}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    engine = LoadedEngine(folder)
    options = engine.graphs["classifier"].runtime._session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert any(name == "Threads" and text.startswith("1 ") for name, text in machine_lines(describe_machine()))


def test_usable_threads_are_the_cores_of_this_process_when_nothing_is_said(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert 1 <= usable_threads() <= (os.cpu_count() or 1)
    monkeypatch.setattr("compressor.profiles.machine._cpu_quota", lambda: 1.5)
    monkeypatch.setattr("compressor.profiles.machine._affinity", lambda: [0, 1, 2, 5])
    assert usable_threads() == 2 and describe_machine()["cpu"]["cpus"] == "0-2,5"
