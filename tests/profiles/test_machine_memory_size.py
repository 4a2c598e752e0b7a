"""What the machine is, what an artifact needs, how big a model is."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from compressor.errors import RequestError, TargetError
from compressor.profiles.device_memory import device_memory_in_use, watch_device_memory
from compressor.profiles.machine import describe_machine
from compressor.profiles.memory import example_inputs, measure_artifact_memory, peak_rss_mb
from compressor.profiles.size import macs, parameter_count, total_bytes
from compressor.runtimes.gpu import nvidia_gpu
from compressor.runtimes.manifest import DriverEntry, Engine, GraphEntry, Manifest, hash_file
from compressor.runtimes.runtime import Port, TensorSpec


def test_the_machine_is_described_in_json_values_with_the_installed_libraries(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    machine = json.loads(json.dumps(describe_machine()))
    assert machine["cpu"]["cores"] == os.cpu_count() and machine["memory_mb"] > 100
    assert machine["libraries"]["numpy"] == np.__version__
    assert machine["environment"]["OMP_NUM_THREADS"] == "3"
    assert machine["python"] and machine["os"] and isinstance(machine["gpus"], list)


def test_gpus_are_named_by_nvidia_smi_when_it_is_there(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA L4, 23034 MiB, 580.65.06'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert describe_machine()["gpus"] == [{"name": "NVIDIA L4", "memory": "23034 MiB", "driver": "580.65.06"}]


def test_profiling_and_reports_do_not_import_torch():
    modules = ("machine", "latency", "memory", "device_memory", "report", "report_html", "report_markdown", "size")
    names = ", ".join(f"compressor.profiles.{module}" for module in modules)
    code = f"import sys, {names}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_peak_memory_rises_with_what_the_process_holds():
    code = (
        "import numpy as np; from compressor.profiles.memory import peak_rss_mb as peak; a = peak();"
        "x = np.ones(8_000_000); b = peak(); del x; print(a, b, peak())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, held, after = map(float, done.stdout.split())
    assert 60 < held - before < 90 and after > held - 1


def test_peak_memory_of_a_fresh_process_is_its_own_and_not_its_parents():
    ballast = np.ones(60_000_000)
    code = "from compressor.profiles.memory import peak_rss_mb; print(peak_rss_mb())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 300 < peak_rss_mb() and ballast.size


def test_example_inputs_have_the_ports_shapes_and_types():
    ports = (Port("image", "image", ("batch", 3, "height", 8), "float32"), Port("label", "label", ("batch",), "int64"))
    inputs = example_inputs(ports, batch=4)
    assert inputs["image"].shape == (4, 3, 1, 8) and inputs["image"].dtype == np.float32
    assert inputs["label"].shape == (4,) and inputs["label"].dtype == np.int64


@pytest.fixture
def artifact(tmp_path) -> Path:
    """A linear classifier of 40 MB for ONNX Runtime."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    weight = onnx.numpy_helper.from_array(np.zeros((1000, 10_000), np.float32), "weight")
    nodes = [
        onnx.helper.make_node("Flatten", ["image"], ["flat"]),
        onnx.helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
    ]
    tensors = [onnx.helper.make_tensor_value_info("image", 1, ["batch", 1, 10, 100])]
    outputs = [onnx.helper.make_tensor_value_info("logits", 1, ["batch", 10_000])]
    graph = onnx.helper.make_graph(nodes, "classifier", tensors, outputs, [weight])
    file = tmp_path / "classifier.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9), file)
    entry = GraphEntry(
        file=file.name, sha256=hash_file(file), bytes=file.stat().st_size, precision="fp32", opset=18,
        inputs=(TensorSpec("image", ("batch", 1, 10, 100), "float32"),),
        outputs=(TensorSpec("logits", ("batch", 10_000), "float32"),),
    )  # fmt: skip
    manifest = Manifest(
        target={"name": "ort-fp32", "runtime": "onnxruntime"}, engine=Engine(name="onnxruntime", version="any"),
        driver=DriverEntry(name="predict", settings={"shape": [1, 10, 100]}), graphs={"classifier": entry},
    )  # fmt: skip
    (tmp_path / "manifest.json").write_text(manifest.model_dump_json())
    return tmp_path


def test_memory_of_an_artifact_holds_at_least_its_weights(artifact):
    memory = measure_artifact_memory(artifact)
    assert memory.start_mb < memory.loaded_mb <= memory.peak_mb
    assert memory.peak_mb - memory.start_mb > 40
    assert memory.device_peak_mb is None, "the engine runs on the CPU"


def test_device_peak_is_the_largest_use_above_that_at_the_start():
    held = [100]
    with watch_device_memory(lambda: held[0]) as peak:
        assert peak.bytes == 0
        held[0] = 350
        deadline = time.monotonic() + 10
        while peak.bytes == 0 and time.monotonic() < deadline:
            time.sleep(0.005)
        held[0] = 120
    assert peak.bytes == 250


def test_devices_without_an_nvidia_gpu_have_no_peak():
    assert device_memory_in_use("cpu") is None and device_memory_in_use("cuda:4096") is None
    with watch_device_memory(None) as peak:
        pass
    assert peak.bytes is None


@pytest.mark.skipif(nvidia_gpu() is None, reason="needs an NVIDIA GPU")
def test_device_peak_holds_what_a_process_allocates_on_the_gpu():
    torch = pytest.importorskip("torch")
    torch.zeros(1, device="cuda")
    with watch_device_memory(device_memory_in_use("cuda")) as peak:
        torch.ones(64 << 20, device="cuda")
        torch.cuda.synchronize()
        time.sleep(0.01)
    assert peak.bytes >= 256 << 20


def test_memory_of_an_artifact_grows_with_the_given_inputs(artifact):
    big = {"image": np.zeros((2000, 1, 10, 100), np.float32)}
    memory = measure_artifact_memory(artifact, inputs=big, runs=1)
    assert memory.peak_mb - memory.start_mb > 40 + 80, "weights and the outputs of 2000 samples"


def test_memory_of_something_that_is_no_artifact_is_a_one_line_error(tmp_path):
    with pytest.raises(TargetError, match="could not be measured") as caught:
        measure_artifact_memory(tmp_path)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_total_bytes_sums_files_below_a_directory_without_following_links(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.bin").write_bytes(b"x" * 10)
    (tmp_path / "deep" / "b.bin").write_bytes(b"x" * 5)
    (tmp_path / "link").symlink_to(tmp_path / "a.bin")
    assert total_bytes(tmp_path) == 15
    assert total_bytes([tmp_path / "a.bin", tmp_path / "deep"]) == 15
    with pytest.raises(RequestError, match="no such file"):
        total_bytes(tmp_path / "none")


def test_macs_count_products_convolutions_and_attention():
    import torch
    from torch import nn

    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    projections, attention, mlp = 10 * 32 * 32 * 4, 2 * 10 * 10 * 32, 2 * 10 * 32 * 64
    assert macs(layer, {"src": torch.zeros(1, 10, 32)}) == projections + attention + mlp
    assert layer.training and torch.backends.mha.get_fastpath_enabled()
    convolution = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    assert macs(convolution, {"input": torch.zeros(2, 3, 16, 16)}) == 2 * 16 * 16 * 8 * 3 * 9


def test_shared_parameters_count_once():
    from torch import nn

    first = nn.Linear(4, 4, bias=False)
    assert parameter_count(nn.Sequential(first, nn.ReLU(), first)) == 16
