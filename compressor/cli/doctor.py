"""`compress doctor`: versions, devices, which engines load, what is missing and how to install it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import typer

from compressor import __version__
from compressor.cli.terminal import Terminal, plain_table

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Finding", "doctor", "examine"]

SECONDS = 90
"""A library that takes longer to import counts as one that does not load."""


@dataclass(frozen=True)
class Probe:
    """A library, how it is asked what it finds, and the extra that brings it.

    Attributes:
        code: Python that imports it as ``m`` (the first of several that is installed).
        devices: A Python expression: a list of devices as text.
    """

    name: str
    modules: tuple[str, ...]
    purpose: str
    extra: str
    devices: str = "[]"


@dataclass(frozen=True)
class Finding:
    """What a probe found."""

    name: str
    purpose: str
    loads: bool
    version: str
    devices: tuple[str, ...]
    problem: str
    install: str


PROBES = (
    Probe(
        "torch",
        ("torch",),
        "training",
        "train",
        "['cpu'] + [f'cuda:{i} {m.cuda.get_device_name(i)}' for i in range(m.cuda.device_count())]",
    ),
    Probe("diffusers", ("diffusers",), "models", "train"),
    Probe("transformers", ("transformers",), "models", "train"),
    Probe("timm", ("timm",), "models", "train"),
    Probe("accelerate", ("accelerate",), "several GPUs or machines", "train"),
    Probe("onnx", ("onnx",), "export", "train"),
    Probe("onnxscript", ("onnxscript",), "export", "train"),
    Probe("onnxruntime", ("onnxruntime",), "targets ort-*", "ort", "m.get_available_providers()"),
    Probe("openvino", ("openvino",), "targets openvino-*", "openvino", "m.Core().available_devices"),
    Probe("nncf", ("nncf",), "int8 for OpenVINO", "openvino"),
    Probe("tensorrt", ("tensorrt",), "targets trt-*, beside a GPU", "tensorrt"),
    Probe("tensorrt-rtx", ("tensorrt_rtx", "tensorrt_rtx_bindings"), "targets trt-*, ahead of time", "tensorrt-rtx"),
    Probe("torch-tensorrt", ("torch_tensorrt",), "targets torch-trt-*", "torch-tensorrt"),
)


def doctor(context: typer.Context) -> None:
    """Versions, devices, which engines load, and what is missing."""
    import platform

    findings = examine(PROBES)
    machine = {
        "compressor": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": _gpus(),
    }
    terminal: Terminal = context.obj
    value = {"machine": machine, "libraries": [asdict(finding) for finding in findings]}
    terminal.show(value, lambda console: _print(console, machine, findings))


def examine(probes: Sequence[Probe]) -> list[Finding]:
    """Import every library in a process of its own: one that crashes harms nobody."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(_examine, probes))


def _examine(probe: Probe) -> Finding:
    hint = f"pip install 'compressor[{probe.extra}]'"
    answer, problem = _ask(probe)
    if answer is not None:
        devices = tuple(str(device) for device in answer["devices"])
        return Finding(probe.name, probe.purpose, True, answer["version"], devices, "", "")
    return Finding(probe.name, probe.purpose, False, "", (), problem, hint if problem == "not installed" else "")


def _ask(probe: Probe) -> tuple[dict[str, Any] | None, str]:
    """The library's answer, or why there is none."""
    import subprocess

    code = (
        "import importlib, importlib.util, json\n"
        f"names = [n for n in {probe.modules!r} if importlib.util.find_spec(n)]\n"
        "if not names: raise SystemExit(3)\n"
        "m = importlib.import_module(names[0])\n"
        "version = str(getattr(m, '__version__', ''))\n"
        f"print('\\n' + json.dumps({{'version': version, 'devices': list({probe.devices})}}))\n"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return None, f"does not load within {SECONDS} s"
    if done.returncode == 3:
        return None, "not installed"
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
        return None, f"does not load: {last}"
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer, ""


def _gpus() -> list[str]:
    from compressor.profiles.machine import describe_machine

    return [f"{gpu['name']} ({gpu['memory']}, driver {gpu['driver']})" for gpu in describe_machine()["gpus"]]


def _print(console: Console, machine: Mapping[str, Any], findings: Sequence[Finding]) -> None:
    from rich.text import Text

    for key, value in machine.items():
        text = ", ".join(value) or "none" if isinstance(value, list) else str(value)
        console.print(f"{key}: {text}", markup=False)
    table = plain_table("library", "loads", "version", "for", "devices or problem", "install")
    for one in findings:
        state = Text("yes", "green") if one.loads else Text("no", "yellow")
        detail = ", ".join(one.devices) if one.loads else one.problem
        cells = (Text(part) for part in (one.version, one.purpose, detail, one.install))
        table.add_row(Text(one.name, "bold"), state, *cells)
    console.print()
    console.print(table)
