"""What the kernels cost on this machine's GPU: python benchmarks/kernels.py [--quick] [--only kl attention] [--tune]

Each kernel is first held against float64, then timed, forward and backward, beside PyTorch eager, torch.compile, Liger
(where installed), dense attention (flash, cuDNN) and FlexAttention with the same blocks, and beside the floor: what
must move over the copy bandwidth, or be multiplied over the speed of a large product, both measured here. Prints a
table and writes ``benchmarks/results/kernels-GPU.json``; ends with 1 where a kernel is wrong.

``--tune`` times the neighbours of each launch configuration instead, and prints the fastest.
``--check`` needs no GPU: the same program on small problems in Triton's interpreter, every number against float64; it
measures no time and writes no file.
``--compile-only`` needs no GPU: it compiles every kernel for six GPU families, prints registers, shared memory, spills
and instructions, and what the instructions an entry mean against the memory floor; it writes
``benchmarks/results/kernel-compilation.json``. It measures no time.

Without a GPU anything else ends with exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SUITE_NAMES = ("kl", "dense", "ce_and_kl", "linear", "features", "attention")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument("--only", nargs="+", choices=SUITE_NAMES, help="these groups alone")
    parser.add_argument("--tune", action="store_true", help="time neighbouring launch configurations")
    parser.add_argument("--check", action="store_true", help="small problems in the interpreter; no times")
    parser.add_argument("--compile-only", action="store_true", help="compile for GPUs that are not here; no times")
    parser.add_argument("--capability", nargs="+", type=int, help="with --compile-only: compute capabilities, as 90")
    options = parser.parse_args(arguments)
    if options.compile_only:
        return compile_only(options.capability, quick=options.quick)
    if options.check:
        return self_check(options.only)
    import torch

    if not torch.cuda.is_available():
        print(
            "no GPU here, so no time can be measured: --check runs the program without one, --compile-only compiles",
            file=sys.stderr,
        )
        return 2
    return measure_all(options.only, quick=options.quick, tuning=options.tune)


def measure_all(only: Sequence[str] | None, *, quick: bool, tuning: bool) -> int:
    """Measure (or tune), print, store; 1 where a kernel is wrong."""
    import torch
    from kernel_timing import HEAD, measure, time_table

    if tuning:
        from kernel_tuning import tune

        result = tune(quick, report=print)
    else:
        print(HEAD)
        result = measure(only, quick=quick, report=lambda one: print(time_table(one), flush=True))
        for target in result["targets"]:
            print(f"{'met ' if target['met'] else 'MISSED'} {target['case']}: {target['what']} {target['value']:.3g}")
    import triton

    result = {"torch": torch.__version__, "triton": triton.__version__, "quick": quick, **result}
    name = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name()).strip("-")
    write(f"kernels-{name}{'-tuning' if tuning else ''}.json", result)
    return 0 if result.get("correct", True) else 1


def self_check(only: Sequence[str] | None) -> int:
    """Run every case once without a GPU; 1 where a kernel is wrong."""
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is first imported
    warnings.simplefilter("ignore", RuntimeWarning)  # the interpreter's numpy tells of every masked infinity
    from kernel_timing import HEAD, check, time_table

    print("self-check on the CPU, Triton interpreted: values are checked, nothing is timed")
    print(HEAD)
    result = check(only, report=lambda one: print(time_table(one), flush=True))
    count = sum(one["error"] is not None for one in result["results"])
    print(f"{count} kernels' values and gradients {'equal' if result['correct'] else 'DIFFER FROM'} float64")
    return 0 if result["correct"] else 1


def compile_only(capabilities: Sequence[int] | None, *, quick: bool) -> int:
    """Compile, print the tables, store them; 1 where a default configuration spills or does not fit."""
    import torch
    import triton
    from kernel_compilation import CAPABILITIES, HEAD, compile_case, default_cases, line
    from memory_floor import floor_table, floors

    chosen = tuple(capabilities or CAPABILITIES)
    cases = default_cases()[:: 6 if quick else 1]
    reports = []
    print(HEAD)
    for case in cases:
        for capability in chosen:
            for report in compile_case(case, capability):
                print(line(report), flush=True)
                reports.append(report)
    estimates = floors(reports)
    print("\n" + floor_table(estimates))
    wrong = [report for report in reports if report.spills or not report.programs_per_multiprocessor]
    print(f"\n{len(reports)} kernels compiled for {len(chosen)} GPU families; {len(wrong)} spill or do not fit")
    if not quick:
        content = {
            "what": "compile-time reports; no times were measured",
            "torch": torch.__version__,
            "triton": triton.__version__,
            "kernels": [report.as_json() for report in reports],
            "against_the_floor": [estimate.as_json() for estimate in estimates],
        }
        write("kernel-compilation.json", content)
    return 1 if wrong else 0


def write(name: str, content: dict[str, Any]) -> None:
    """Store a result beside the others."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / name
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    sys.exit(main())
