"""The benchmark beside the vendors' tools runs, reads their medians, and says how far apart both are."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from compressor.errors import CompressorError

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def tools() -> ModuleType:
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("vendor_tools", ROOT / "benchmarks" / "vendor_tools.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_engines_are_measured_by_us_and_by_their_own_tools(tools: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    if not Path(sys.executable).with_name("benchmark_app").is_file():
        pytest.skip("openvino's benchmark_app is not installed")
    out = tmp_path / "results.json"
    result = tools.main(["--rounds", "2", "--seconds", "0.1", "--only", "small-resnet", "--out", str(out)])
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert {name: one["tool"] for name, one in result["artifacts"].items()} == {
        "small-resnet ort-fp32": "onnxruntime_loop", "small-resnet openvino-fp32": "benchmark_app",
    }  # fmt: skip
    for one in result["artifacts"].values():
        turns = 40 if one["tool"] == "onnxruntime_loop" else 2
        assert len(one["ours_ms"]) == len(one["theirs_ms"]) == turns
        assert 0.2 < one["ratio"] < 5, "the two clocks measure other things"


def test_tools_of_nvidia_are_left_out_with_a_reason_where_they_cannot_run(tools: ModuleType) -> None:
    targets, missing = tools.nvidia_targets()
    assert len(targets) + len(missing) == 2
    assert all("GPU" in reason or "PATH" in reason for reason in missing.values())


def test_nvidia_tool_gets_the_same_arrays_and_its_latency_is_read(tools: ModuleType, tmp_path: Path) -> None:
    """A script in its place that checks what it is given, and prints what trtexec 10 prints."""
    program = tmp_path / "trtexec"
    program.write_text(
        f"#!{sys.executable}\nimport sys, numpy as np\n"
        "given = dict(part.split('=', 1) for part in sys.argv[1:] if '=' in part)\n"
        "name, _, file = given['--loadInputs'].partition(':')\n"
        "assert given['--shapes'] == 'x:2x3' and name == 'x', given\n"
        "assert np.fromfile(file, np.float32).tolist() == [0, 1, 2, 3, 4, 5]\n"
        "for what, median in (('Enqueue Time', 0.11), ('Latency', 0.45), ('GPU Compute Time', 0.35)):\n"
        "    times = f'min = 0.1 ms, max = 1.2 ms, mean = 0.5 ms, median = {median} ms, percentile(90%) = 0.6 ms'\n"
        "    print(f'[12/01/2026-10:00:00] [I] {what}: {times}')\n"
    )
    program.chmod(0o755)
    inputs = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
    assert tools.nvidia_tool(str(program))(tmp_path / "x.engine", inputs, 0.1)() == 0.45


def test_tool_that_prints_no_median_is_an_error_that_names_it(tools: ModuleType) -> None:
    with pytest.raises(CompressorError, match=r"gave no median: hello"):
        tools.median_of([sys.executable, "-c", "print('hello')"], r"Median:\s+([\d.]+) ms")
    assert tools.median_of([sys.executable, "-c", "print('Median:   1.25 ms')"], r"Median:\s+([\d.]+) ms") == 1.25
