"""The engines behave alike: names, element types, shapes, options, and what they say when they cannot run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
from onnx import TensorProto, helper

from compressor.errors import RequestError, TargetError
from compressor.runtimes.gpu import nvidia_gpu
from compressor.runtimes.load import open_graph
from compressor.runtimes.runtime import Runtime, TensorSpec

ENGINES = ("onnxruntime", "openvino")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """``y = x * t`` with a free batch, for each engine."""
    ports = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3]),
        helper.make_tensor_value_info("t", TensorProto.FLOAT, []),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3]),
    ]
    graph = helper.make_graph([helper.make_node("Mul", ["x", "t"], ["y"])], "g", ports[:2], ports[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(tmp_path / "graph.onnx"))
    openvino.save_model(openvino.convert_model(str(tmp_path / "graph.onnx")), str(tmp_path / "graph.xml"))
    return {"onnxruntime": tmp_path / "graph.onnx", "openvino": tmp_path / "graph.xml"}


@pytest.mark.parametrize("engine", ENGINES)
def test_engine_describes_the_graph_and_is_a_runtime(files, engine):
    run = open_graph(files[engine], engine, {"threads": 1})
    assert isinstance(run, Runtime)
    assert run.inputs == (TensorSpec("x", ("batch", 3), "float32"), TensorSpec("t", (), "float32"))
    assert run.outputs == (TensorSpec("y", ("batch", 3), "float32"),)
    run.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_engine_casts_inputs_and_takes_any_batch_and_layout(files, engine):
    run = open_graph(files[engine], engine, {"threads": 1})
    for batch in (1, 4):
        x = np.arange(3 * batch).reshape(3, batch).T
        outputs = run({"x": x, "t": 2, "unused": np.zeros(1)})
        assert list(outputs) == ["y"] and outputs["y"].dtype == np.float32
        assert np.array_equal(outputs["y"], 2 * x)


@pytest.mark.parametrize("engine", ENGINES)
def test_outputs_of_one_call_survive_the_next(files, engine):
    run = open_graph(files[engine], engine, {"threads": 1})
    first = run({"x": np.ones((1, 3)), "t": 1})["y"]
    run({"x": np.full((1, 3), 7.0), "t": 1})
    assert np.array_equal(first, np.ones((1, 3)))


@pytest.mark.parametrize("engine", ENGINES)
def test_read_only_input_is_taken_and_stays_as_it_was(files, engine):
    x = np.arange(3, dtype=np.float32)[None]
    x.flags.writeable = False
    run = open_graph(files[engine], engine, {"threads": 1})
    assert np.array_equal(run({"x": x, "t": 2})["y"], [[0, 2, 4]]) and np.array_equal(x, [[0, 1, 2]])


def test_openvino_never_computes_halves_in_bfloat16_unless_told_to(files):
    halves = open_graph(files["openvino"], "openvino", {"inference_precision": "f16"})
    assert halves.inference_precision in ("float16", "float32")
    told = {"inference_precision": "f16", "properties": {"INFERENCE_PRECISION_HINT": "f32"}}
    assert open_graph(files["openvino"], "openvino", told).inference_precision == "float32"


def run_at(run, *batches):
    """Run at each batch in turn, with other numbers every time, and look at what comes out."""
    for number, batch in enumerate(batches):
        x = np.arange(3 * batch, dtype=np.float32).reshape(batch, 3) + number
        assert np.array_equal(run({"x": x, "t": 2})["y"], 2 * x), batch


def test_openvino_compiles_as_many_shapes_of_their_own_as_it_may(files):
    run = open_graph(files["openvino"], "openvino", {"threads": 1, "static_shapes": 2})
    run_at(run, 1, 4, 7)
    assert not run._specialised, "sizes that come once are left alone"
    run_at(run, 4, 1, 4, 7, 7, 1, 2, 4)
    assert list(run._specialised) == [((4, 3), ()), ((1, 3), ())]
    assert run.inputs[0] == TensorSpec("x", ("batch", 3), "float32")
    run.close()


def test_openvino_left_to_itself_compiles_shapes_of_light_graphs_alone(files, monkeypatch):
    light = open_graph(files["openvino"], "openvino", {"threads": 1})
    run_at(light, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 5)
    assert len(light._specialised) == 4
    monkeypatch.setattr("compressor.runtimes.openvino._STATIC_LIMIT", -1)
    heavy = open_graph(files["openvino"], "openvino", {"threads": 1})
    run_at(heavy, 1, 1, 1, 2)
    assert not heavy._specialised
    never = open_graph(files["openvino"], "openvino", {"threads": 1, "static_shapes": 0})
    run_at(never, 1, 1, 1, 2)
    assert not never._specialised


def test_signals_are_handled_after_engines_were_closed_in_the_order_of_their_opening(files):
    script = (
        "import signal, sys; from compressor.runtimes.load import open_graph\n"
        "runs = [open_graph(sys.argv[1], 'openvino', {'threads': 1}) for _ in range(3)]\n"
        "while runs: runs.pop(0).close()\n"
        "try: signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt: print('handled')"
    )
    done = subprocess.run([sys.executable, "-c", script, str(files["openvino"])], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"x": np.zeros((1, 3))}, "needs the inputs t"),
        ({"x": np.zeros((1, 4)), "t": 1}, r"'x' must have the shape \(batch, 3\), got \(1, 4\)"),
    ],
)
def test_wrong_inputs_are_named(files, engine, inputs, said):
    with pytest.raises(RequestError, match=said):
        open_graph(files[engine], engine)(inputs)


@pytest.mark.parametrize("engine", ENGINES)
def test_damaged_file_is_refused_in_one_line(tmp_path, engine):
    path = tmp_path / ("graph.onnx" if engine == "onnxruntime" else "graph.xml")
    path.write_bytes(b"not a graph")
    with pytest.raises(TargetError, match="cannot load") as caught:
        open_graph(path, engine)
    assert "\n" not in str(caught.value)


def test_provider_that_is_not_installed_is_refused(files):
    with pytest.raises(TargetError, match=r"has no MIGraphXExecutionProvider \(it has"):
        open_graph(files["onnxruntime"], "onnxruntime", {"providers": ["MIGraphXExecutionProvider"]})


def test_device_that_openvino_lacks_is_refused(files):
    with pytest.raises(TargetError, match="on NPU.7"):
        open_graph(files["openvino"], "openvino", {"device": "npu.7"})


def test_openvino_computes_in_the_precision_asked_for(files):
    run = open_graph(files["openvino"], "openvino", {"inference_precision": "f32"})
    assert run.inference_precision == "float32"


def test_unknown_runtime_names_the_nearest(files):
    with pytest.raises(RequestError, match="did you mean openvino"):
        open_graph(files["openvino"], "openvin")


@pytest.mark.skipif(nvidia_gpu() is not None, reason="there is a GPU")
def test_engine_file_without_a_gpu_says_why_it_cannot_run(tmp_path):
    pytest.importorskip("tensorrt_rtx_bindings")
    (tmp_path / "net.engine").write_bytes(b"ftrt")
    with pytest.raises(TargetError, match=r"no NVIDIA GPU is visible here, so net\.engine cannot run"):
        open_graph(tmp_path / "net.engine", "tensorrt-rtx")


def test_tensorrt_that_is_not_installed_says_how_to_install_it(tmp_path):
    try:
        import tensorrt  # noqa: F401

        pytest.skip("TensorRT is installed")
    except ImportError:
        pass
    with pytest.raises(TargetError, match=r"TensorRT is not installed: pip install 'compressor\[tensorrt\]'"):
        open_graph(tmp_path / "net.engine", "tensorrt")


@pytest.mark.gpu
@pytest.mark.skipif(nvidia_gpu() is None, reason="needs an NVIDIA GPU")
def test_tensorrt_engine_runs_at_every_batch_of_its_profile(tmp_path):
    pytest.importorskip("tensorrt")
    import torch

    from compressor.deployable import Deployable, DriverSpec, Graph
    from compressor.exporters.export import export
    from compressor.profiles.target import load_target
    from compressor.runtimes.load import load_graphs
    from compressor.runtimes.manifest import read_manifest

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 4)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.layer(image).relu()

    net = Net()
    graph = Graph(net, {"image": torch.randn(2, 8)}, ("logits",), {"image": {0: "batch"}})
    export(Deployable({"classifier": graph}, DriverSpec("predict")), load_target("trt-fp16"), tmp_path / "artifact")
    run = load_graphs(tmp_path / "artifact", read_manifest(tmp_path / "artifact"))["classifier"]
    for batch in (1, 16, 3):
        x = torch.randn(batch, 8)
        given = run({"image": x.numpy()})["logits"]
        assert np.allclose(given, net(x).detach().numpy(), atol=1e-2)
    with pytest.raises(RequestError, match="outside what the engine takes"):
        run({"image": np.zeros((17, 8))})
    run.close()
