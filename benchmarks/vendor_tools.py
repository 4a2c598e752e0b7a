"""Our latencies beside the vendors' own tools, on the same files: python benchmarks/vendor_tools.py [--rounds 14]

Three models (timm's ResNet-50 and a small ResNet on 64x64 pictures, the digits transformer's denoiser), each as ONNX,
as OpenVINO and, beside an NVIDIA GPU, as an engine of TensorRT and TensorRT-RTX. In every round our profiler and the
vendor's tool measure the same file in turn, with one thread, one stream and the same batch:

- ONNX files: a bare loop over `onnxruntime.InferenceSession.run`, which keeps its own clock;
- OpenVINO files: OpenVINO's `benchmark_app` (``-hint none -nstreams 1 -nthreads 1 -api sync``), as a process of its
  own, without the start of the process and its loading; both compile the model for the batch (``-shape`` there,
  `options.static_shapes` here);
- engines: NVIDIA's `trtexec` and `tensorrt_rtx` (``--infStreams=1``, with the copies to the device and back), where
  they are on the PATH. What is left out is said with its reason.

A loop in this process takes 20 turns for each of these, a twentieth as long, so that a neighbour disturbs both alike.

The agreement is the median over the rounds of (our p50 / theirs), with its 10th and 90th percentile; the aim is within
5 %. What Python adds to a call is in ours and not in theirs, 0.03 to 0.07 ms here: it shows in models that take one or
two milliseconds. A spread above 15 % is called noisy; beside it stands the ratio of the quietest rounds, the smallest
p50 of each, which neighbours on a shared machine disturb least.

Prints a line an artifact; results go to ``benchmarks/results/vendor_tools.json``.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from compressor.atomic import write_json
from compressor.cli.benchmark import Candidate, request
from compressor.errors import CompressorError
from compressor.profiles.latency import NOISY_SPREAD, WarmUp, measure_interleaved
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
_TURNS = 20
"""Turns of a loop in this process for one of a tool with a process of its own."""
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "onnxruntime": {"threads": 1},
    "openvino": {"threads": 1, "inference_precision": "f32", "static_shapes": 1, "properties": {"NUM_STREAMS": 1}},
    "tensorrt": {"device": "cuda"},
    "tensorrt-rtx": {"device": "cuda"},
}
NVIDIA_TOOLS = {"tensorrt": "trtexec", "tensorrt-rtx": "tensorrt_rtx"}
Measure = Callable[[], float]


class File(NamedTuple):
    """A graph file and the engine that reads it, a key of `OPTIONS`."""

    path: Path
    engine: str


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


def ours(file: File, inputs: Mapping[str, Array], seconds: float) -> Measure:
    """Our profiler's p50 of a graph file, in milliseconds, each time it is called."""
    graph = open_graph(file.path, file.engine, OPTIONS[file.engine])
    warmup = WarmUp(max_seconds=seconds)

    def measure() -> float:
        calls = {"": lambda: graph(inputs)}
        return measure_interleaved(calls, rounds=3, budget_seconds=seconds, warmup=warmup)[""].p50

    return measure


def onnxruntime_loop(path: Path, inputs: Mapping[str, Array], seconds: float) -> Measure:
    """The shortest loop that a user of ONNX Runtime would write."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def measure() -> float:
        for _ in range(5):
            session.run(None, dict(inputs))
        durations, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            session.run(None, dict(inputs))
            durations.append(time.perf_counter() - start)
        return 1e3 * float(np.median(durations))

    return measure


def benchmark_app(path: Path, inputs: Mapping[str, Array], seconds: float) -> Measure:
    """OpenVINO's own tool, on the same arrays."""
    program = Path(sys.executable).with_name("benchmark_app")
    folder = Path(tempfile.mkdtemp(dir=path.parent))
    given, shapes, types = [], [], []
    for name, array in inputs.items():
        np.save(folder / f"{name}.npy", array)
        given.append(f"{name}:{folder / f'{name}.npy'}")
        shapes.append(f"{name}[{','.join(map(str, array.shape))}]")
        types.append(f"{name}:{TYPES[array.dtype.name]}")  # else it takes four axes for a picture of bytes
    command = [
        str(program), "-m", str(path), "-d", "CPU", "-hint", "none", "-nstreams", "1", "-nthreads", "1", "-api", "sync",
        "-infer_precision", "f32", "-inference_only", "false", "-t", str(max(1, round(seconds))),
        "-shape", ",".join(shapes), "-i", ",".join(given),
        "-iop", ",".join(types),
    ]  # fmt: skip
    return lambda: median_of(command, r"Median:\s+([\d.]+) ms")


def nvidia_tool(program: str) -> Callable[[Path, Mapping[str, Array], float], Measure]:
    """NVIDIA's own tool, on the same arrays. Its "Latency" is that of the copies and the computation together."""

    def tool(path: Path, inputs: Mapping[str, Array], seconds: float) -> Measure:
        folder = Path(tempfile.mkdtemp(dir=path.parent))
        given, shapes = [], []
        for name, array in inputs.items():
            array.tofile(folder / f"{name}.bin")
            given.append(f"{name}:{folder / f'{name}.bin'}")
            shapes.append(f"{name}:{'x'.join(map(str, array.shape))}")
        command = [
            program, f"--loadEngine={path}", "--infStreams=1", "--useSpinWait", f"--duration={max(1, round(seconds))}",
            f"--shapes={','.join(shapes)}", f"--loadInputs={','.join(given)}",
        ]  # fmt: skip
        return lambda: median_of(command, r"\bLatency: min = .*?median = ([\d.]+) ms")

    return tool


TOOLS: Mapping[str, Callable[[Path, Mapping[str, Array], float], Measure]] = {
    "onnxruntime": onnxruntime_loop,
    "openvino": benchmark_app,
    **{engine: nvidia_tool(program) for engine, program in NVIDIA_TOOLS.items()},
}
NAMES = {"onnxruntime": "onnxruntime_loop", "openvino": "benchmark_app", **NVIDIA_TOOLS}


def median_of(command: list[str], pattern: str) -> float:
    """Run a vendor's tool and find its median in what it prints; how it ends after that does not matter.

    Raises:
        CompressorError: It printed no median.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(pattern, done.stdout)
    if found is None:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["no output"]
        raise CompressorError(f"{Path(command[0]).name} gave no median: {last[0]}")
    return float(found[1])


def compare(file: File, batch: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Our p50 and the vendor's on one file, in turn; the order changes from round to round."""
    graph = open_graph(file.path, file.engine, OPTIONS[file.engine])
    specs = tuple((spec.name, spec.shape, spec.dtype) for spec in graph.inputs)
    graph.close()
    inputs = request(Candidate(file.path.stem, graph, specs), batch, {})
    if TOOLS[file.engine] is onnxruntime_loop:
        rounds, seconds = _TURNS * rounds, seconds / _TURNS
    tools = {"ours": ours(file, inputs, seconds), "theirs": TOOLS[file.engine](file.path, inputs, seconds)}
    measured: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(rounds):
        for name in list(tools)[:: 1 if number % 2 else -1]:
            measured[name].append(tools[name]())
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
        "ratio_of_quietest": min(measured["ours"]) / min(measured["theirs"]),
        "within_5_percent": abs(middle - 1) <= AIM,
        "noisy": high - low > NOISY_SPREAD,
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure all artifacts, print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
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
                f"({one['low']:.3f} to {one['high']:.3f}{', noisy' if one['noisy'] else ''}), "
                f"of the quietest rounds {one['ratio_of_quietest']:.3f}",
                flush=True,
            )
    for program, reason in missing.items():
        print(f"{program}: not measured: {reason}")
    measured = {"seconds": options.seconds, "rounds": options.rounds, "artifacts": found, "not_measured": missing}
    result = {"machine": describe_machine(), **measured}
    write_json(options.out, result)
    return result


if __name__ == "__main__":
    main()
