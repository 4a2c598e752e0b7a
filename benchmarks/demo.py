"""The demo's cost and its student's worth: python benchmarks/demo.py [--seeds 0 1 2] [--out FILE]

Runs the default recipe, `compress run --method ppcl --target trt-fp16 --target ort-fp32 --target openvino-fp16`, once a
seed, from an empty cache the first time (the teacher is trained then), and reads the reports: wall time, peak memory,
share of block parameters kept, loss of class-conditional accuracy, Fréchet distance, speed of the exported engines
against the teacher's, parity. Results go to ``benchmarks/results/demo.json``, or to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from compressor.atomic import write_json
from compressor.profiles.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "demo.json"
COMMAND = ["run", "--method", "ppcl", "--target", "trt-fp16", "--target", "ort-fp32", "--target", "openvino-fp16"]


def run_once(seed: int, folder: Path) -> dict[str, Any]:
    """One run; what its report says."""
    out = folder / f"seed{seed}"
    command = [sys.executable, "-m", "compressor", *COMMAND, "--seed", str(seed), "--out", str(out)]
    began = time.monotonic()
    subprocess.run(command, check=True, env={**os.environ, "COMPRESSOR_CACHE": str(folder / "cache")})
    seconds = time.monotonic() - began
    report = json.loads((out / "report/report.json").read_text(encoding="utf-8"))
    return {"seed": seed, "seconds": round(seconds, 1), **summarise(report)}


def summarise(report: dict[str, Any]) -> dict[str, Any]:
    """The figures that the project promises, of one report."""
    teacher, student = (next(m for m in report["models"] if m["name"] == name) for name in ("teacher", "student"))
    loss = 1 - student["metrics"]["accuracy"] / teacher["metrics"]["accuracy"]
    speed = {
        f"{c['target']}, batch {c['batch']}, {c['what']}": {key: c[key] for key in ("ratio", "low", "high")}
        for c in report["comparisons"]
    }
    parity = {
        e["target"]: max(p["relative"] for p in e["parity"]) for e in report["engines"] if e["model"] == "student"
    }
    accuracy = {
        f"{e['model']} on {e['target']}": e["metrics"]["accuracy"] for e in report["engines"] if e.get("metrics")
    }
    return {
        "block parameters kept": student["block_parameters"] / teacher["block_parameters"],
        "accuracy": {"teacher": teacher["metrics"]["accuracy"], "student": student["metrics"]["accuracy"], **accuracy},
        "relative accuracy loss": loss,
        "frechet distance": {m["name"]: m["metrics"]["frechet_distance"] for m in (teacher, student)},
        "times faster than the teacher": speed,
        "parity": parity,
    }


def main() -> None:
    """Run all seeds and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="compressor-demo-") as name:
        runs = [run_once(seed, Path(name)) for seed in options.seeds]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    value = {
        "command": "python benchmarks/demo.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "peak memory of one process (GB)": round(peak, 2),
        "runs": runs,
    }
    write_json(options.out, value)
    print(json.dumps({key: value[key] for key in ("peak memory of one process (GB)", "runs")}, indent=2))


if __name__ == "__main__":
    main()
