"""What the measurements were made on: processor, memory, system, libraries, GPUs. Reads files and versions only."""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from compressor.versions import installed_versions

__all__ = ["LIBRARIES", "describe_machine", "usable_threads"]

LIBRARIES = (
    "compressor", "numpy", "torch", "torchvision", "timm", "diffusers", "transformers", "accelerate", "onnx",
    "onnxscript", "onnxruntime", "onnxruntime-gpu", "openvino", "nncf", "tensorrt", "tensorrt-rtx-cu13-bindings",
    "torch-tensorrt", "triton", "scipy", "scikit-learn",
)  # fmt: skip
"""Distributions whose versions are part of a report."""

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_AFFINITY", "KMP_BLOCKTIME",
    "GOMP_CPU_AFFINITY", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET",
)  # fmt: skip


def describe_machine() -> dict[str, Any]:
    """Describe this machine as JSON values; what cannot be found out is None or absent.

    Returns:
        ``cpu`` {model, architecture, cores (logical), affinity (usable by this process), cpus (which those are, as
        "0-3,8"), quota (cores granted by the container, or None), threads (of an inference on the CPU, unless a target
        or a flag says otherwise)}, ``memory_mb`` (1 MB = 10^6 bytes; the container's limit where it is lower), ``os``,
        ``python``, ``libraries`` {name: version}, ``gpus`` [{name, memory, driver}], ``environment`` (variables that
        steer threads and devices).
    """
    return {
        "cpu": {
            "model": _cpu_model(),
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "affinity": len(_affinity()) or None,
            "cpus": _ranges(_affinity()) or None,
            "quota": _cpu_quota(),
            "threads": usable_threads(),
        },
        "memory_mb": _memory_mb(),
        "os": _system(),
        "python": platform.python_version(),
        "libraries": installed_versions(LIBRARIES),
        "gpus": _gpus(),
        "environment": {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
    }


def usable_threads() -> int:
    """Threads that an inference on the CPU gets, the same for every engine, or a comparison compares their defaults.

    ``OMP_NUM_THREADS`` where it is set; else the cores that this process may use, as far as its container grants them.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    cores = len(_affinity()) or os.cpu_count() or 1
    quota = _cpu_quota()
    return max(1, min(cores, math.ceil(quota))) if quota is not None else cores


def _affinity() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _ranges(numbers: list[int]) -> str:
    """Whole numbers as ranges: "0-3,8"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def _cpu_model() -> str | None:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.lower().startswith(("model name", "hardware")):
            return line.partition(":")[2].strip()
    return platform.processor() or None


def _cpu_quota() -> float | None:
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _memory_mb() -> int | None:
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    known = [int(limit)] if limit.isdigit() else []
    try:
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        pass
    return round(min(known) / 1e6) if known else None


def _system() -> str:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except (OSError, AttributeError):
        name = ""
    kernel = f"{platform.system()} {platform.release()}"
    return f"{name} ({kernel})" if name else kernel


def _gpus() -> list[dict[str, str]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
    return [dict(zip(("name", "memory", "driver"), row, strict=True)) for row in rows if len(row) == 3]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
