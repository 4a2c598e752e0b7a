"""Graphs beyond protobuf's 2 GB on every route: python benchmarks/large_graph.py [--targets ort-fp32 openvino-fp16]

A vision transformer of few and wide blocks (608 million parameters, 2.4 GB in float32) is exported to each target,
packed as a bundle, and the bundle is loaded and run; each of these in a process of its own, one after the other, with
one folder of exported graphs for all: the first target's export makes the float32 graph. Its weights are random, so
what is measured is the way and the arithmetic, not a figure of a task.

Of every process: seconds, the largest resident size (pages of mapped files included, which the system may take back)
and the largest anonymous size (what it must hold), sampled every 50 ms. Of every engine that runs here: the largest
difference of its outputs from torch's over their largest absolute value, as the export judged it, and once more for the
probabilities of an image through the loaded bundle, which is unlike the recorded inputs (uniform noise, not normal), so
that 8-bit ranges were not taken for it. A process whose anonymous size passes ``--memory-gb`` is ended and said to have
failed.

Prints a table; results go to ``benchmarks/results/large_graph.json``, by target: others that are there stay.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from compressor.atomic import write_json
from compressor.profiles.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "large_graph.json"
MODEL = "vit_base_patch16_224"
SHAPE = {"img_size": 32, "embed_dim": 4096, "depth": 3, "num_heads": 32, "num_classes": 10}
TARGETS = (
    "ort-fp32", "openvino-fp16", "ort-fp16", "trt-rtx-fp16", "ort-int8", "openvino-int8",
)  # fmt: skip
SAMPLES = 4


def network() -> Any:
    """The classifier, the same in every process."""
    import timm
    import torch

    torch.manual_seed(0)
    return timm.create_model(MODEL, **SHAPE).eval()


def images() -> Any:
    """Inputs that the graph gets, (samples, 3, 32, 32)."""
    import torch

    return torch.randn(SAMPLES, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def export_to(target: str, folder: Path) -> dict[str, Any]:
    """Export, in this process; what the manifest says of it."""
    import torch

    from compressor.deployable import Deployable, DriverSpec, Graph
    from compressor.exporters.calibration import CalibrationData
    from compressor.exporters.export import export
    from compressor.profiles.target import load_target

    class Net(torch.nn.Module):
        """Its input is called ``image``."""

        def __init__(self, network: torch.nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.network(image)
            return logits

    model, rows = network(), images()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    graph = Graph(Net(model), {"image": rows[:2]}, ("logits",), {"image": {0: "batch"}})
    settings = {"mean": [0.0] * 3, "std": [1.0] * 3, "shape": [3, 32, 32], "classes": SHAPE["num_classes"]}
    deployable = Deployable({"classifier": graph}, DriverSpec("predict", settings))
    records = {"classifier": [{"image": row[None].numpy()} for row in rows]}
    began = time.perf_counter()
    manifest = export(
        deployable,
        load_target(target),
        folder / target,
        records=records,
        calibration=CalibrationData(records=records),
        cache=folder / "graphs",
    )
    entry = manifest.graphs["classifier"]
    return {
        "parameters": parameters,
        "seconds": time.perf_counter() - began,
        "bytes": entry.bytes,
        "parity": [judged.model_dump(mode="json") for judged in entry.parity],
        "islands": sorted({island.reason for island in entry.fp32_islands}),
        "eight_bits": dict(entry.quantization.operators) if entry.quantization is not None else {},
        "runs_here": manifest.runnable_here,
    }


def bundle(target: str, folder: Path) -> dict[str, Any]:
    """Pack an artifact."""
    from compressor.exporters.bundle import write_bundle

    began, path = time.perf_counter(), folder / f"{target}.zip"
    write_bundle(folder / target, path)
    return {"seconds": time.perf_counter() - began, "bytes": path.stat().st_size}


def serve(target: str, folder: Path) -> dict[str, Any]:
    """Load a bundle as an app does, without torch, and ask it; its probabilities."""
    import numpy as np

    from compressor.runtimes import load

    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    began = time.perf_counter()
    with load(folder / f"{target}.zip") as model:
        loaded = time.perf_counter()
        found = {label.index: label.probability for label in model(image)}
        answered = time.perf_counter()
    if "torch" in sys.modules:
        raise RuntimeError("the bundle's reader has imported torch")
    probabilities = [float(found[place]) for place in sorted(found)]
    return {"load_seconds": loaded - began, "first_inference_seconds": answered - loaded, "answer": probabilities}


def reference(target: str, folder: Path) -> dict[str, Any]:
    """Torch's probabilities for the image that `serve` takes."""
    import numpy as np
    import torch

    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        return {"answer": network()(pixels).softmax(1)[0].tolist()}


STAGES = {"export": export_to, "bundle": bundle, "serve": serve, "reference": reference}


def in_process(stage: str, target: str, folder: Path, seconds: float, memory: float) -> dict[str, Any]:
    """Run a stage in a process of its own: what it found, its peak memory, or why it failed."""
    command = [sys.executable, __file__, "--stage", stage, "--targets", target, "--folder", str(folder)]
    resident = anonymous = 0.0
    failed, began = "", time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, text=True)
        while process.poll() is None:
            time.sleep(0.05)
            sizes = _sizes(process.pid)
            resident = max(resident, sizes.get("VmHWM", 0.0))
            anonymous = max(anonymous, sizes.get("RssAnon", 0.0))
            if anonymous > memory or time.monotonic() - began > seconds:
                failed = f"ended after {seconds:g} s" if anonymous <= memory else f"ended: more than {memory:g} GB"
                process.kill()
                process.wait()
        out.seek(0), errors.seek(0)
        said, complaints = out.read().splitlines(), errors.read().strip().splitlines()
    peaks = {"peak_resident_gb": round(resident, 2), "peak_anonymous_gb": round(anonymous, 2)}
    if process.returncode != 0:
        reason = failed or (complaints or [f"ended with {process.returncode}"])[-1]
        return {"failed": reason, "after_seconds": round(time.monotonic() - began, 1), **peaks}
    return {**json.loads(said[-1]), **peaks}


def _sizes(process: int) -> dict[str, float]:
    """Lines of a process's status that are sizes, in GB."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines if line.endswith("kB"))
    return {pair[0].rstrip(":"): int(pair[1]) * 1024 / 1e9 for pair in pairs}


def measure(target: str, folder: Path, expected: list[float], seconds: float, memory: float) -> dict[str, Any]:
    """All stages of a target."""
    found = {"export": in_process("export", target, folder, seconds, memory)}
    if "failed" not in found["export"]:
        found["bundle"] = in_process("bundle", target, folder, seconds, memory)
    if found["export"].get("runs_here") and "failed" not in found["bundle"]:
        shutil.rmtree(folder / target)  # room on the disk for the files that the bundle unpacks to
        served = found["serve"] = in_process("serve", target, folder, seconds, memory)
        if "failed" not in served:
            answer = served.pop("answer")
            gaps = [abs(one - other) for one, other in zip(answer, expected, strict=True)]
            served["error_against_torch"] = max(gaps) / max(expected)
    shutil.rmtree(folder / target, ignore_errors=True)
    (folder / f"{target}.zip").unlink(missing_ok=True)
    return found


def table(targets: dict[str, Any]) -> str:
    """One line a target."""
    lines = [f"{'target':<16} {'export s':>9} {'GB':>6} {'peak GB':>8} {'held GB':>8} {'load s':>7}  error"]
    for name, found in targets.items():
        made = found["export"]
        if "failed" in made:
            lines.append(f"{name:<16} {made['after_seconds']:>9.0f} {made['failed']}")
            continue
        loaded = found.get("serve", {}).get("load_seconds", float("nan"))
        errors = ", ".join(f"{one['relative']:.1e} ({one['judged_by']})" for one in made["parity"]) or "not run here"
        lines.append(
            f"{name:<16} {made['seconds']:>9.0f} {made['bytes'] / 1e9:>6.2f} {made['peak_resident_gb']:>8.1f} "
            f"{made['peak_anonymous_gb']:>8.1f} {loaded:>7.1f}  {errors}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure the targets, print and store; with ``--stage``, be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--seconds", type=float, default=1200, help="time limit of a process")
    parser.add_argument("--memory-gb", type=float, default=16.0, help="limit of a process's anonymous memory")
    parser.add_argument("--folder", type=Path, help="where files go meanwhile (about 15 GB); temporary by default")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.stage:
        print(json.dumps(STAGES[options.stage](options.targets[0], options.folder)))
        return
    known = json.loads(options.out.read_text())["targets"] if options.out.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        expected = in_process("reference", "torch", folder, options.seconds, options.memory_gb)["answer"]
        for target in options.targets:
            found = measure(target, folder, expected, options.seconds, options.memory_gb)
            known[target] = found
            shape = ", ".join(f"{key} {value}" for key, value in SHAPE.items())
            result = {
                "command": "python benchmarks/large_graph.py",
                "date": time.strftime("%Y-%m-%d", time.gmtime()),
                "machine": describe_machine(),
                "model": f"{MODEL}, {shape}, random weights, batch free, {SAMPLES} recorded inputs",
                "targets": known,
            }
            write_json(options.out, result)
            print(table({target: found}), flush=True)


if __name__ == "__main__":
    main()
