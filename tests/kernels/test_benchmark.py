"""The benchmark of the kernels runs to its end without a GPU, and what it concludes follows from what it measured."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed on this system"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the command interprets by itself"),
]


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import kernel_timing

    return kernel_timing


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(FOLDER / "kernels.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_every_suite_runs_without_a_gpu_and_equals_float64_when_checked() -> None:
    checked = run("--check")
    assert checked.returncode == 0, checked.stdout[-3000:] + checked.stderr[-2000:]
    lines = checked.stdout.splitlines()
    assert lines[-1] == "22 kernels' values and gradients equal float64"
    assert {line.split()[0] for line in lines[2:-1]} == {"kl", "dense", "ce_and_kl", "linear", "features", "attention"}
    times = slice(lines[1].index("candidate") + 20, lines[1].index("x floor"))
    assert not any(line[times].strip() for line in lines[2:-1]), "a self-check tells no time"


def test_command_says_what_is_missing_when_there_is_no_gpu() -> None:
    refused = run("--only", "kl")
    assert refused.returncode == 2
    assert refused.stderr.startswith("no GPU here, so no time can be measured") and refused.stderr.count("\n") == 1


def test_targets_are_judged_by_what_was_measured(timing: ModuleType) -> None:
    measured = timing.Measured
    results = [
        measured("kl", "forward 8x8", "compressor", milliseconds=1.2, floor=1.0, extra_share=0.02),
        measured("attention", "forward N=1 D=64 80% sparse", "compressor", milliseconds=1.0),
        measured("attention", "forward N=1 D=64 80% sparse", "dense flash", milliseconds=5.0),
        measured("attention", "forward N=1 D=64 80% sparse", "FlexAttention", milliseconds=0.9),
        measured("attention", "forward N=1 D=64 50% sparse", "compressor", note="out of memory"),
        measured("attention", "forward N=1 D=64 50% sparse", "dense flash", milliseconds=5.0),
    ]
    judged = {(one["suite"], one["what"]): (one["value"], one["met"]) for one in timing.targets(results)}
    assert judged == {
        ("kl", "time over the floor"): (1.2, True),
        ("kl", "extra memory over the logits"): (0.02, False),
        ("attention", "dense flash's time over ours"): (5.0, True),
        ("attention", "FlexAttention's time over ours"): (0.9, False),
    }
