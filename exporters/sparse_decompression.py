"""OpenVINO's sparse weights: tried in a process of its own, and used where they are faster.

OpenVINO's CPU can keep the weights of a fully connected layer without their zeros and fill them in while it
multiplies. It does so for 8-bit layers whose sizes are multiples of 64, on CPUs with matrix instructions (AMX), from a
share of zeros that a property names. Whether that is faster depends on the layers and on the machine, and OpenVINO
2026.4 may crash with it, so it is tried first where a crash ends nothing but the trial.

``python -m compressor.exporters.sparse_decompression MODEL.xml INPUTS.npz RATE`` is that process.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import CompressorError
from compressor.exporters.parity import root_mean_square
from compressor.profiles.latency import Ratio, WarmUp, measure_interleaved, ratio
from compressor.runtimes.openvino import OpenVino
from compressor.runtimes.runtime import Array

__all__ = ["SPARSE_RATE", "Trial", "cpu_can", "rates_to_try", "try_sparse", "zero_shares"]

SPARSE_RATE = "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"
"""OpenVINO's property: the share of zeros from which a layer's weights are kept sparse."""
RATES = (0.4, 0.8)
"""Shares that are tried: all layers with half zeros (and what rounding spares of them), or the emptiest alone."""
_BLOCK = 64
_LARGEST_ERROR = 0.01
"""Root-mean-square difference over the outputs' root mean square; the sums are whole numbers, so it should be none."""
_LEAST_GAIN = 1.03
_SECONDS = 1.0
_TIMEOUT = 60.0


@dataclass(frozen=True)
class Trial:
    """What came of one trial.

    Attributes:
        rate: Value of the property.
        gain: How many times faster it was than without, over interleaved rounds; None where it was not measured.
        error: Root-mean-square difference of the outputs to those without, over their root mean square.
        fault: What went wrong; empty where nothing did.
    """

    rate: float
    gain: Ratio | None = None
    error: float = 0.0
    fault: str = ""

    @property
    def used(self) -> bool:
        """Whether it is right, and faster in nine rounds of ten and by more than a few percent."""
        if self.fault or self.gain is None or not self.error <= _LARGEST_ERROR:
            return False
        return self.gain.low > 1.0 and self.gain.value >= _LEAST_GAIN

    def said(self, chosen: bool) -> str:
        """For a note: what came of it, and whether the artifact has it."""
        if self.fault:
            what = self.fault
        elif not self.error <= _LARGEST_ERROR:
            what = f"the outputs differ by {self.error:.1e} of their size"
        elif self.gain is None:
            what = "it was not measured"
        else:
            what = f"{self.gain.value:.2f} times as fast ({self.gain.low:.2f} to {self.gain.high:.2f})"
        return f"from {self.rate:.0%} zeros {what}, {'used' if chosen else 'not used'}"


def zero_shares(model: Any) -> list[float]:
    """Shares of zeros of the weights that OpenVINO could keep sparse: of 8-bit products, in blocks of 64.

    Args:
        model: OpenVINO's model (``openvino.Model``).
    """
    return [
        float((weight == 0).mean())
        for op in model.get_ops()
        if op.get_type_name() == "MatMul"
        for weight in [_integers(op.input(1).get_source_output().get_node())]
        if weight is not None and weight.ndim == 2 and not any(size % _BLOCK for size in weight.shape)
    ]


def rates_to_try(shares: Sequence[float]) -> list[float]:
    """The rates that choose different layers, of those that choose any."""
    chosen = {sum(share >= rate for share in shares): rate for rate in RATES}
    return sorted(rate for count, rate in chosen.items() if count)


def cpu_can(path: Path = Path("/proc/cpuinfo")) -> bool:
    """False where this CPU is known to lack the instructions (AMX) that OpenVINO's sparse kernels are written in."""
    try:
        return "amx_int8" in path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True


def try_sparse(
    model: Path,
    options: Mapping[str, Any],
    inputs: Sequence[Mapping[str, Array]],
    rate: float,
    *,
    measured: bool = True,
    timeout: float = _TIMEOUT,
) -> Trial:
    """Run a model with and without sparse weights in a process of its own.

    Args:
        model: The .xml file.
        options: Of `compressor.runtimes.openvino.OpenVino`.
        inputs: What is run; the outputs must agree on all, and the first is timed.
        rate: Value of the property.
        measured: Whether it is timed.
        timeout: In seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inputs.npz"
        arrays: Any = {f"{number}/{key}": array for number, one in enumerate(inputs) for key, array in one.items()}
        np.savez(file, **arrays)
        command = [sys.executable, "-m", __name__, str(model), str(file), str(rate), "--options", json.dumps(options)]
        try:
            done = subprocess.run(
                [*command, *(["--measure"] if measured else [])], capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return Trial(rate, fault=f"it took longer than {timeout:g} s")
    if done.returncode:
        return Trial(rate, fault=_fault(done.returncode, done.stderr))
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return Trial(rate, Ratio(*found["gain"]) if measured else None, float(found["error"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the model named on the command line with itself with sparse weights; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m compressor.exporters.sparse_decompression", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("inputs", type=Path, help="arrays by NUMBER/NAME (.npz)")
    parser.add_argument("rate", type=float)
    parser.add_argument("--options", type=json.loads, default={}, help="of the runtime, as JSON")
    parser.add_argument("--measure", action="store_true")
    given = parser.parse_args(arguments)
    records: dict[str, dict[str, Array]] = {}
    with np.load(given.inputs, allow_pickle=False) as arrays:
        for key in arrays.files:
            number, _, name = key.partition("/")
            records.setdefault(number, {})[name] = arrays[key]
    told = {**(given.options.get("properties") or {}), SPARSE_RATE: str(given.rate)}
    try:
        plain, sparse = (
            OpenVino(given.model, given.options),
            OpenVino(given.model, {**given.options, "properties": told}),
        )
        error = max(root_mean_square(plain(record), sparse(record)) for record in records.values())
    except CompressorError as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code
    result: dict[str, Any] = {"error": error}
    if given.measure:
        first = records["0"]
        measured = measure_interleaved(
            {"plain": lambda: plain(first), "sparse": lambda: sparse(first)},
            budget_seconds=_SECONDS,
            warmup=WarmUp(max_seconds=0.25),
        )
        result["gain"] = ratio(measured["plain"], measured["sparse"])
    print(json.dumps(result))
    return 0


def _integers(node: Any) -> Array | None:
    """The 8-bit constant that a weight is computed from; None where there is none."""
    while node.get_type_name() in ("Convert", "Multiply", "Subtract"):
        node = node.input(0).get_source_output().get_node()
    if node.get_type_name() != "Constant" or str(node.get_element_type().get_type_name()) != "i8":
        return None
    values: Array = node.get_data()
    return values


def _fault(code: int, errors: str) -> str:
    """What ended a process with an exit code that is not 0."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"the engine crashed ({name})"
    if code > 255:  # Windows: 0xC0000005 and its like
        return f"the engine crashed ({code:#x})"
    return (errors.strip() or f"exit code {code}").splitlines()[-1]


if __name__ == "__main__":
    sys.exit(main())
