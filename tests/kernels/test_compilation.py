"""Every kernel compiles ahead of time for the GPUs that are named, without one here, and spills no register."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed on this system"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"),
]


@pytest.fixture(scope="module")
def compilation() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "kernel_compilation.py"
    spec = importlib.util.spec_from_file_location("kernel_compilation", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernel_compilation"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_default_configurations_compile_without_spills_and_fit_the_gpu(compilation, capability):
    cases = [
        compilation.divergence_case(8192, 1000, "forward"),
        compilation.divergence_case(8192, 131072, "jsd", labels=True),
        compilation.dense_divergence_case((8, 19, 128, 128), [1], "forward"),
        next(case for case in compilation.feature_cases() if "normalized_mse" in case.name),
        compilation.attention_case("forward", 128, 128, length=16000, causal=True, padding=True),
        compilation.attention_case("backward", 128, 128),
        compilation.probe_case(128),
    ]
    reports = [report for case in cases for report in compilation.compile_case(case, capability)]
    wrong = [report for report in reports if report.spills or not report.programs_per_multiprocessor]
    assert not wrong, "\n" + compilation.table(wrong)
    if capability >= 90:
        kinds = {"HGMMA", "UTCHMMA", "UTCMMA", "HMMA"}
        attention = [report for report in reports if report.kernel == "forward_kernel"]
        assert all(kinds & set(report.instructions) for report in attention), "attention multiplies on tensor cores"


def test_every_kernel_of_the_package_has_a_case(compilation):
    cases = {name for names in compilation.KERNELS.values() for name in names}
    launched = set()
    for case in compilation.default_cases():
        with compilation.recording(90) as launches:
            case.run()
        launched |= {launch.kernel.__name__ for launch in launches}
    package = Path(__file__).parents[2] / "compressor" / "kernels"
    written = {
        line.split("(")[0].removeprefix("def ")
        for path in package.glob("*_triton.py")
        for line in path.read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    assert cases == launched == written
