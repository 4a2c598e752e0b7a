"""`compress bench`: artifacts and graph files side by side, the first one is the reference."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressor.cli.app import execute
from compressor.cli.benchmark import Candidate, measure_artifacts, parse_sizes, request
from compressor.errors import RequestError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def write_graph(path: Path, repeats: int, *, wide: str | int = 64) -> None:
    """A chain of matrix products on ``image`` (batch, wide), giving ``logits``."""
    helper = onnx.helper
    weight = onnx.numpy_helper.from_array(np.eye(64, dtype=np.float32), "weight")
    names = ["image", *(f"x{k}" for k in range(repeats - 1)), "logits"]
    nodes = [helper.make_node("MatMul", [a, "weight"], [b]) for a, b in pairwise(names)]
    ports = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", wide]) for name in ("image", "logits")
    ]
    graph = helper.make_graph(nodes, "chain", ports[:1], ports[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)


@pytest.fixture
def graphs(tmp_path: Path) -> tuple[Path, Path]:
    slow, fast = tmp_path / "slow.onnx", tmp_path / "fast.onnx"
    write_graph(slow, 200)
    write_graph(fast, 2)
    return slow, fast


def test_bench_measures_all_at_every_batch_size_and_compares_with_the_first(
    graphs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(path) for path in graphs]
    code = execute(["bench", *paths, "--batch", "1", "--batch", "4", "--seconds", "0.3", "--rounds", "3", "--json"])
    assert code == 0
    result = json.loads(capsys.readouterr().out)
    assert [(row["batch"], row["artifact"]) for row in result["rows"]] == [
        (1, "slow.onnx"), (1, "fast.onnx"), (4, "slow.onnx"), (4, "fast.onnx"),
    ]  # fmt: skip
    reference, other = result["rows"][:2]
    assert reference["speedup"] is None
    assert other["speedup"]["value"] > 1.5
    assert 0 < reference["p50"] <= reference["p99"]
    assert result["rows"][2]["throughput"] == pytest.approx(4000 / result["rows"][2]["p50"])
    assert "cpu" in result["machine"]


def test_bench_prints_a_table(graphs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["bench", str(graphs[0]), "--batch", "1", "--seconds", "0.05", "--rounds", "3"]) == 0
    out = capsys.readouterr().out
    assert "slow.onnx" in out
    assert "reference" in out


def test_bench_opens_all_artifacts_of_a_run_and_says_what_it_left_out(tmp_path: Path) -> None:
    for name in ("ort-b", "teacher/ort-b"):
        make_artifact(tmp_path / "run" / "artifacts" / name)
    damaged = tmp_path / "run" / "artifacts" / "ort-damaged"
    make_artifact(damaged)
    (damaged / "classifier.onnx").write_bytes(b"changed")
    measured = measure_artifacts([tmp_path / "run"], batches=[1, 9], seconds=0.1, rounds=3)
    assert [(row.batch, row.name) for row in measured.rows] == [(1, "teacher/ort-b"), (1, "ort-b")]
    reasons = dict(measured.skipped)
    assert "differs from the manifest" in reasons["ort-damaged"]
    assert "batch 9 is larger than the engine's 8" in reasons["ort-b"]


def test_bench_refuses_what_it_cannot_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["bench", str(tmp_path)]) == 2
    assert "is no artifact, no bundle, no run with artifacts and no .onnx, .xml file" in capsys.readouterr().err


def test_bench_that_measures_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_artifact(tmp_path / "one")
    assert execute(["bench", str(tmp_path / "one"), "--batch", "9"]) == 2
    assert "nothing is measured: one: batch 9 is larger than the engine's 8" in capsys.readouterr().err


def test_bench_asks_for_the_size_of_a_free_axis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_graph(tmp_path / "free.onnx", 1, wide="width")
    assert execute(["bench", str(tmp_path / "free.onnx")]) == 2
    assert "the axis 'width' of 'image' is free: add --size width=N" in capsys.readouterr().err
    arguments = ["--size", "width=64", "--batch", "1", "--seconds", "0.05", "--rounds", "3"]
    assert execute(["bench", str(tmp_path / "free.onnx"), *arguments]) == 0


def test_request_holds_first_classes_and_noise() -> None:
    candidate = Candidate(
        "x", lambda arrays: None, (("label", ("batch",), "int64"), ("image", ("batch", 3), "float32"))
    )
    arrays = request(candidate, 2, {})
    assert arrays["label"].tolist() == [0, 0]
    assert (arrays["image"].shape, arrays["image"].dtype) == ((2, 3), np.float32)
    assert 0 < arrays["image"].std() < 1


@pytest.mark.parametrize("text", ["height", "height=x", "=3", "height=0"])
def test_wrong_sizes_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="write --size AXIS=N"):
        parse_sizes([text])


def make_artifact(folder: Path) -> None:
    """A classifier's artifact, as the exporter leaves it."""
    from hashlib import sha256

    from compressor.runtimes.manifest import MANIFEST_FILE, DriverEntry, Engine, GraphEntry, Manifest
    from compressor.runtimes.runtime import TensorSpec

    folder.mkdir(parents=True)
    file = folder / "classifier.onnx"
    write_image_graph(file)
    specs: dict[str, Any] = {
        "inputs": (TensorSpec("image", ("batch", 1, 8, 8), "float32"),),
        "outputs": (TensorSpec("logits", ("batch", 64), "float32"),),
    }
    entry = GraphEntry(
        file=file.name, sha256=sha256(file.read_bytes()).hexdigest(), bytes=file.stat().st_size, precision="fp32",
        opset=18, **specs,
    )  # fmt: skip
    manifest = Manifest(
        target={"name": folder.name, "runtime": "onnxruntime", "device": "cpu", "batch": {"min": 1, "max": 8}},
        engine=Engine(name="onnxruntime", version="any"),
        driver=DriverEntry(name="predict", settings={"shape": [1, 8, 8], "classes": 64}),
        graphs={"classifier": entry},
    )
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json())


def write_image_graph(path: Path) -> None:
    helper = onnx.helper
    weight = onnx.numpy_helper.from_array(np.eye(64, dtype=np.float32), "weight")
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
    ]
    image = helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 1, 8, 8])
    logits = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 64])
    graph = helper.make_graph(nodes, "classifier", [image], [logits], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def test_bench_tells_how_each_candidate_starts_and_how_big_it_is(
    graphs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", *map(str, graphs), "--batch", "1", "--seconds", "0.05", "--rounds", "3"]
    assert execute([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    facts = {row["artifact"]: row for row in result["artifacts"]}
    assert list(facts) == ["slow.onnx", "fast.onnx"]
    assert all(row["load_ms"] > 0 and row["first_ms"] > 0 for row in facts.values())
    assert facts["fast.onnx"]["bytes"] == graphs[1].stat().st_size
    speedup = result["rows"][1]["speedup"]
    assert speedup["low"] <= speedup["value"] <= speedup["high"]
    assert execute(arguments) == 0
    out = capsys.readouterr().out
    assert "first call ms" in out and re.search(r"\d\.\d\d \(\d+\.\d\d to \d+\.\d\d\)", out.replace("\n", " "))
