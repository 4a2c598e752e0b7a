"""The whole ladder of a chain, measured: python benchmarks/ladder.py [--out DIR] [--seed 0]

Runs the command below: the digits' transformer is pruned to half, distilled to four steps against the original and made
sparse; all of its students are exported and measured. From the report it reads parameters, zeros, calls of the network
and quality of each, and on every engine file size and latency of one generated image. The table is printed; it and what
the run took go to ``benchmarks/results/ladder.json``. With ``--out`` the run is kept, and one that was stopped goes on
there (then the seconds of its phases and stages are known, those of the whole are not).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from compressor.atomic import write_json
from compressor.profiles.report import EngineEntry, ModelEntry, Report, load_report
from compressor.profiles.report_facts import zeros_lines
from compressor.profiles.report_numbers import NONE, format_bytes, format_count, format_ms, format_number, format_share

RESULTS = Path(__file__).parent / "results" / "ladder.json"
COMMAND = "run --method ppcl --method dmd2 --sparsity 2:4 --target trt-fp16 --target openvino-fp16 --target ort-fp32"


def run(out: Path, seed: int) -> dict[str, Any]:
    """Run the command; what it took, the demo teacher's training included where it is not cached."""
    fresh, began = not (out / "run.json").exists(), time.monotonic()
    command = [sys.executable, "-m", "compressor", *COMMAND.split(), "--seed", str(seed), "--out", str(out)]
    subprocess.run(command, check=True)
    if not fresh:
        return {}
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = {"seconds": round(time.monotonic() - began, 1), "cpu_seconds": round(used.ru_utime + used.ru_stime, 1)}
    return {**seconds, "peak_memory_gb": round(used.ru_maxrss * 1024 / 1e9, 2)}


def rungs(report: Report) -> list[dict[str, Any]]:
    """One entry a model, with its engines."""
    models = {model.name: model for model in report.models}
    return [_rung(models[name], [e for e in report.engines if e.model == name]) for name in report.ladder]


def _rung(model: ModelEntry, engines: list[EngineEntry]) -> dict[str, Any]:
    facts = model.model_dump(include={"name", "parameters", "zeros", "bytes", "macs", "calls", "metrics"})
    return facts | {"engines": {engine.target: _engine(engine) for engine in engines}}


def _engine(engine: EngineEntry) -> dict[str, Any]:
    whole = {batch: {"p50_ms": one.p50, "noisy": one.noisy} for batch, one in engine.whole.items()}
    facts = {"bytes": engine.bytes, "latency": whole, "metrics": engine.metrics}
    return facts | ({"not_measured": engine.reason} if engine.reason else {})


def table(report: Report) -> str:
    """The ladder in Markdown: latency of one image, file sizes behind it."""
    found = rungs(report)
    targets = list(dict.fromkeys(target for rung in found for target in rung["engines"]))
    heads = ["model", "parameters", "zeros", "calls", "class accuracy", "Fréchet distance", *targets]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for rung in found:
        metrics = rung["metrics"] or {}
        cells = [rung["name"], format_count(rung["parameters"]), format_share(rung["zeros"]), str(rung["calls"])]
        cells += [format_number(metrics.get("accuracy")), format_number(metrics.get("frechet_distance"))]
        cells += [_cell(rung["engines"].get(target)) for target in targets]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(engine: dict[str, Any] | None) -> str:
    if engine is None:
        return NONE
    latency = engine["latency"].get("1")
    milliseconds = f"{format_ms(latency['p50_ms'])} ms" if latency else "not run"
    return f"{milliseconds}, {format_bytes(engine['bytes'])}"


def main() -> None:
    """Run, record, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the run's directory, kept; a temporary one by default")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="compressor-ladder-") as name:
        out = options.out or Path(name) / "run"
        cost = run(out, options.seed)
        report = load_report(out / "report")
        stages = json.loads((out / "run.json").read_text(encoding="utf-8"))["stages"]
        events = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    phases = [(event["phase"], event["seconds"]) for event in events if event.get("event") == "phase-end"]
    value = {
        "command": "python benchmarks/ladder.py",
        "runs": f"compress {COMMAND}",
        "seed": options.seed,
        "date": time.strftime("%Y-%m-%d"),
        "machine": report.machine,
        "whole": cost,
        "phase_seconds": {name: round(seconds, 1) for name, seconds in phases},
        "stage_seconds": {name: round(stage["seconds"], 1) for name, stage in stages.items() if "seconds" in stage},
        "ladder": rungs(report),
        "comparisons": [entry.model_dump() for entry in report.comparisons],
        "zeros": zeros_lines(report),
    }
    write_json(RESULTS, value)
    print(table(report))
    print("\n" + "\n".join(zeros_lines(report)))
    print(f"\n{cost}" if cost else "")


if __name__ == "__main__":
    main()
