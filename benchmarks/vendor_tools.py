"""Our latencies beside the vendors' own tools, on the same files: python benchmarks/vendor_tools.py [--rounds 6]

Three models (timm's ResNet-50 and a small ResNet on 64x64 pictures, the digits transformer's denoiser), each as ONNX,
as OpenVINO and, beside an NVIDIA GPU, as an engine of TensorRT and TensorRT-RTX. In every round our profiler and the
vendor's tool measure the same file on the same arrays, with one thread, one stream and the same batch:

- ONNX files: a bare loop over `onnxruntime.InferenceSession.run`, which keeps its own clock;
- OpenVINO files: OpenVINO's `benchmark_app` (``-hint none -nstreams 1 -nthreads 1 -api sync``); both compile the model
  for the batch (``-shape`` there, `options.static_shapes` here);
- engines: NVIDIA's `trtexec` and `tensorrt_rtx` (``--infStreams=1``, with the copies to the device and back), where
  they are on the PATH. What is left out is said with its reason.

Both are processes of their own, new in every round: where a process happens to put its weights in memory moves a small
model's latency by some percent for as long as it lives. They run at the same time but never at once: each in turn goes
on for a quarter of a second while the other is stopped (SIGSTOP), so that a neighbour on the machine disturbs both
alike. The call that a stop falls into is long; a median does not notice.

The agreement is the median over the rounds of (our p50 / theirs), with its 10th and 90th percentile; the aim is within
5 %. A spread above 15 % is called noisy. What Python adds to a call is in ours and in the bare loop but not in the
others: `benchmark_app` reads a clock inside OpenVINO, and NVIDIA's tools are not in Python.

Prints a line an artifact; results go to ``benchmarks/results/vendor_tools.json``.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from compressor.atomic import write_json
from compressor.cli.benchmark import Candidate, request
from compressor.errors import CompressorError
from compressor.profiles.latency import NOISY_SPREAD, measure_interleaved
from compressor.profiles.machine import describe_machine
from compressor.runtimes.gpu import nvidia_gpu
from compressor.runtimes.load import open_graph
from compressor.runtimes.runtime import Array

RESULTS = Path(__file__).parent / "results" / "vendor_tools.json"
CLASSIFIERS = {
    "resnet50": "timm:resnet50?num_classes=10",
    "small-resnet": "timm:resnet18?layers=[1,1,1,1],num_classes=10",
}
TYPES = {"float32": "f32", "float16": "f16", "int64": "i64", "int32": "i32", "bool": "bool"}
AIM = 0.05
TURN_SECONDS = 0.25
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "onnxruntime": {"threads": 1},
    "openvino": {"threads": 1, "inference_precision": "f32", "static_shapes": 1, "properties": {"NUM_STREAMS": 1}},
    "tensorrt": {"device": "cuda"},
    "tensorrt-rtx": {"device": "cuda"},
}
NVIDIA_TOOLS = {"tensorrt": "trtexec", "tensorrt-rtx": "tensorrt_rtx"}


class File(NamedTuple):
    """A graph file and the engine that reads it, a key of `OPTIONS`."""

    path: Path
    engine: str


class Tool(NamedTuple):
    """The command that measures a file, and the pattern of the median in what it prints, in milliseconds."""

    command: list[str]
    pattern: str


def make_artifacts(folder: Path, targets: Sequence[str], only: str = "") -> dict[str, File]:
    """Export all models for every target; the graph files by name, those alone whose name holds ``only``."""
    import torch

    from compressor.exporters.export import export
    from compressor.models.demos.diffusion import DigitsMMDiT
    from compressor.models.spec import load_model_spec
    from compressor.profiles.target import load_target
    from compressor.tasks.classification import Classification
    from compressor.tasks.image_generation import ImageGeneration

    torch.manual_seed(0)
    models = {
        **{
            name: Classification({"train": "scenes:64?channels=3"}, {}).deployable(load_model_spec(spec))
            for name, spec in CLASSIFIERS.items()
        },
        "denoiser": ImageGeneration({"train": "digits"}, {}).deployable(DigitsMMDiT().build()),
    }
    files = {}
    for name, deployable in models.items():
        for target in targets:
            if only not in f"{name} {target}":
                continue
            artifact = folder / name / target
            manifest = export(deployable, load_target(target), artifact, cache=folder / "graphs")
            (entry,) = manifest.graphs.values()
            files[f"{name} {target}"] = File(artifact / entry.file, manifest.engine.name)
    return files


def nvidia_targets() -> tuple[list[str], dict[str, str]]:
    """(targets whose engines both we and NVIDIA's tool can time here, why a tool is left out)."""
    missing = {}
    for program in NVIDIA_TOOLS.values():
        if nvidia_gpu() is None:
            missing[program] = "no NVIDIA GPU is visible here"
        elif shutil.which(program) is None:
            missing[program] = "it is not on the PATH"
    targets = {"trtexec": "trt-fp16", "tensorrt_rtx": "trt-rtx-fp16"}
    return [target for program, target in targets.items() if program not in missing], missing


def our_profiler(file: File, inputs: Path, seconds: float) -> Tool:
    """Our profiler, in a process of its own: `measure_alone`."""
    return _alone("ours", file, inputs, seconds)


def onnxruntime_loop(file: File, inputs: Path, seconds: float) -> Tool:
    """The shortest loop that a user of ONNX Runtime would write, in a process of its own: `measure_alone`."""
    return _alone("loop", file, inputs, seconds)


def _alone(which: str, file: File, inputs: Path, seconds: float) -> Tool:
    command = [sys.executable, __file__, which, str(file.path), file.engine, str(inputs), str(seconds)]
    return Tool(command, r"p50 ([\d.]+) ms")


def benchmark_app(file: File, inputs: Path, seconds: float) -> Tool:
    """OpenVINO's own tool."""
    program = Path(sys.executable).with_name("benchmark_app")
    given, shapes, types = [], [], []
    for name, array in read(inputs).items():
        single = inputs.with_name(f"{name}.npy")
        np.save(single, array)
        given.append(f"{name}:{single}")
        shapes.append(f"{name}[{','.join(map(str, array.shape))}]")
        types.append(f"{name}:{TYPES[array.dtype.name]}")  # else it takes four axes for a picture of bytes
    command = [
        str(program), "-m", str(file.path), "-d", "CPU", "-hint", "none", "-nstreams", "1", "-nthreads", "1",
        "-api", "sync", "-infer_precision", "f32", "-inference_only", "false", "-t", str(max(1, round(seconds))),
        "-shape", ",".join(shapes), "-i", ",".join(given), "-iop", ",".join(types),
    ]  # fmt: skip
    return Tool(command, r"Median:\s+([\d.]+) ms")


def nvidia_tool(program: str) -> Callable[[File, Path, float], Tool]:
    """NVIDIA's own tool. Its "Latency" is that of the copies and the computation together."""

    def tool(file: File, inputs: Path, seconds: float) -> Tool:
        given, shapes = [], []
        for name, array in read(inputs).items():
            single = inputs.with_name(f"{name}.bin")
            array.tofile(single)
            given.append(f"{name}:{single}")
            shapes.append(f"{name}:{'x'.join(map(str, array.shape))}")
        command = [
            program, f"--loadEngine={file.path}", "--infStreams=1", "--useSpinWait",
            f"--duration={max(1, round(seconds))}", f"--shapes={','.join(shapes)}", f"--loadInputs={','.join(given)}",
        ]  # fmt: skip
        return Tool(command, r"\bLatency: min = .*?median = ([\d.]+) ms")

    return tool


TOOLS: Mapping[str, Callable[[File, Path, float], Tool]] = {
    "onnxruntime": onnxruntime_loop,
    "openvino": benchmark_app,
    **{engine: nvidia_tool(program) for engine, program in NVIDIA_TOOLS.items()},
}
NAMES = {"onnxruntime": "onnxruntime_loop", "openvino": "benchmark_app", **NVIDIA_TOOLS}


def measure_alone(which: str, path: str, engine: str, inputs: str, seconds: str) -> None:
    """Measure a file in this process and print the median: by "ours", our profiler, or by a bare "loop"."""
    arrays, budget = read(Path(inputs)), float(seconds)
    if which == "ours":
        graph = open_graph(path, engine, OPTIONS[engine])
        p50 = measure_interleaved({"": lambda: graph(arrays)}, budget_seconds=budget)[""].p50
    else:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for _ in range(10):
            session.run(None, arrays)
        durations, end = [], time.perf_counter() + budget
        while time.perf_counter() < end:
            start = time.perf_counter()
            session.run(None, arrays)
            durations.append(time.perf_counter() - start)
        p50 = 1e3 * float(np.median(durations))
    print(f"p50 {p50:.6f} ms")


def read(inputs: Path) -> dict[str, Array]:
    """The arrays of an .npz file by name."""
    with np.load(inputs) as file:
        return {name: file[name] for name in file.files}


def take_turns(tools: Mapping[str, Tool]) -> dict[str, float]:
    """Run tools side by side, one going on while the others are stopped; the median that each prints at its end.

    Raises:
        CompressorError: One cannot be started, or printed no median. How it ends after that does not matter.
    """
    found = {}
    with ExitStack() as stack:
        logs = {name: stack.enter_context(tempfile.TemporaryFile("w+")) for name in tools}
        running = {}
        for name, tool in tools.items():
            try:
                process = subprocess.Popen(tool.command, stdout=logs[name], stderr=subprocess.STDOUT)
            except OSError as error:
                raise CompressorError(f"{tool.command[0]} cannot be started: {error.strerror}") from error
            stack.callback(process.wait)
            stack.callback(process.kill)
            process.send_signal(signal.SIGSTOP)
            running[name] = process
        while running:
            for name, process in list(running.items()):
                process.send_signal(signal.SIGCONT)
                try:
                    process.wait(TURN_SECONDS)
                    del running[name]
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGSTOP)
        for name, tool in tools.items():
            logs[name].seek(0)
            found[name] = median_in(logs[name].read(), tool)
    return found


def median_in(printed: str, tool: Tool) -> float:
    """The median in what a tool printed, in milliseconds.

    Raises:
        CompressorError: There is none.
    """
    median = re.search(tool.pattern, printed)
    if median is None:
        last = printed.strip().splitlines()[-1:] or ["no output"]
        raise CompressorError(f"{Path(tool.command[0]).name} gave no median: {last[0]}")
    return float(median[1])


def compare(file: File, batch: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Our p50 and the vendor's on one file, both measured anew in every round."""
    graph = open_graph(file.path, file.engine, OPTIONS[file.engine])
    specs = tuple((spec.name, spec.shape, spec.dtype) for spec in graph.inputs)
    graph.close()
    inputs = Path(tempfile.mkdtemp(dir=file.path.parent)) / "inputs.npz"
    np.savez(inputs, **request(Candidate(file.path.stem, graph, specs), batch, {}))
    makers = {"ours": our_profiler, "theirs": TOOLS[file.engine]}
    tools = {name: make(file, inputs, seconds) for name, make in makers.items()}
    measured: dict[str, list[float]] = {name: [] for name in tools}
    for number in range(rounds):
        order = list(tools)[:: 1 if number % 2 else -1]
        for name, median in take_turns({name: tools[name] for name in order}).items():
            measured[name].append(median)
    ratios = np.array(measured["ours"]) / np.array(measured["theirs"])
    low, middle, high = (float(value) for value in np.percentile(ratios, (10, 50, 90)))
    return {
        "tool": NAMES[file.engine],
        "batch": batch,
        "ours_ms": measured["ours"],
        "theirs_ms": measured["theirs"],
        "ratio": middle,
        "low": low,
        "high": high,
        "within_5_percent": abs(middle - 1) <= AIM,
        "noisy": high - low > NOISY_SPREAD,
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure all artifacts, print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each pair of measurements")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--only", default="", help="artifacts whose name holds this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {}
    on_gpu, missing = nvidia_targets()
    with tempfile.TemporaryDirectory() as folder:
        files = make_artifacts(Path(folder), ["ort-fp32", "openvino-fp32", *on_gpu], options.only)
        for name, file in files.items():
            one = found[name] = compare(file, options.batch, options.rounds, options.seconds)
            ours_ms, theirs_ms = (float(np.median(one[key])) for key in ("ours_ms", "theirs_ms"))
            print(
                f"{name}: ours {ours_ms:.3f} ms, {one['tool']} {theirs_ms:.3f} ms, ratio {one['ratio']:.3f} "
                f"({one['low']:.3f} to {one['high']:.3f}{', noisy' if one['noisy'] else ''})",
                flush=True,
            )
    for program, reason in missing.items():
        print(f"{program}: not measured: {reason}")
    measured = {"seconds": options.seconds, "rounds": options.rounds, "artifacts": found, "not_measured": missing}
    result = {"machine": describe_machine(), **measured}
    write_json(options.out, result)
    return result


if __name__ == "__main__":
    if sys.argv[1:2] in (["ours"], ["loop"]):
        measure_alone(*sys.argv[1:])
    else:
        main()
