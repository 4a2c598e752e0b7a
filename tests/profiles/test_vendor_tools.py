"""The benchmark beside the vendors' tools runs, reads their medians, and says how far apart both are."""

from __future__ import annotations

import importlib.util
import itertools
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
    result = tools.main(["--rounds", "1", "--seconds", "0.5", "--only", "small-resnet", "--out", str(out)])
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert {name: one["tool"] for name, one in result["artifacts"].items()} == {
        "small-resnet ort-fp32": "onnxruntime_loop", "small-resnet openvino-fp32": "benchmark_app",
    }  # fmt: skip
    for one in result["artifacts"].values():
        assert len(one["ours_ms"]) == len(one["theirs_ms"]) == 1
        assert 0.2 < one["ratio"] < 5, "the two clocks measure other things"


def test_tools_run_in_turn_and_never_at_once(tools: ModuleType, tmp_path: Path) -> None:
    """Two programs that write down the time every millisecond: in the order of time they change rarely."""
    program = (
        "import sys, time\nend = time.perf_counter() + 1.5\nwith open(sys.argv[1], 'w') as file:\n"
        "    while time.perf_counter() < end:\n        file.write(f'{time.perf_counter()}\\n')\n"
        "        time.sleep(0.001)\nprint('1 ms')"
    )
    files = {name: tmp_path / name for name in "ab"}
    tools.take_turns({
        name: tools.Tool([sys.executable, "-c", program, str(file)], r"(\d+) ms") for name, file in files.items()
    })  # fmt: skip
    times = sorted((float(line), name) for name, file in files.items() for line in file.read_text().splitlines())
    changes = sum(one != other for (_, one), (_, other) in itertools.pairwise(times))
    assert {name for _, name in times} == {"a", "b"}
    assert 2 <= changes <= 20 < len(times)


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
    np.savez(tmp_path / "inputs.npz", x=np.arange(6, dtype=np.float32).reshape(2, 3))
    tool = tools.nvidia_tool(str(program))(tools.File(tmp_path / "x.engine", "tensorrt"), tmp_path / "inputs.npz", 0.1)
    assert tools.take_turns({"theirs": tool}) == {"theirs": 0.45}


def test_tool_that_does_not_start_or_prints_no_median_is_an_error_that_names_it(tools: ModuleType) -> None:
    def printing(text: str) -> object:
        return tools.Tool([sys.executable, "-c", f"print({text!r})"], r"Median:\s+([\d.]+) ms")

    with pytest.raises(CompressorError, match=r"gave no median: hello"):
        tools.take_turns({"theirs": printing("hello")})
    assert tools.take_turns({"theirs": printing("Median:   1.25 ms")}) == {"theirs": 1.25}
    with pytest.raises(CompressorError, match=r"no-such-tool cannot be started: No such file"):
        tools.take_turns({"ours": printing("Median: 1 ms"), "theirs": tools.Tool(["/no-such-tool"], "")})
