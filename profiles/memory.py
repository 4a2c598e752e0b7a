"""Peak memory of loading and running an artifact, in a process of its own.

``python -m compressor.profiles.memory ARTIFACT_DIR`` loads the artifact through `compressor.runtimes`, runs it and
prints the figures as one line of JSON. A process of its own, because a peak never falls: whatever the present process
has done before would be part of it. Host and device memory are measured apart.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from compressor.errors import CompressorError, TargetError
from compressor.profiles.device_memory import device_memory_in_use, watch_device_memory
from compressor.runtimes.runtime import Array, Port

__all__ = ["ArtifactMemory", "example_inputs", "measure_artifact_memory", "peak_rss_mb"]


class ArtifactMemory(BaseModel):
    """Peak resident memory in MB (10^6 bytes).

    Attributes:
        start_mb: Of the interpreter with numpy, before anything was loaded.
        loaded_mb: After loading the artifact (the engine's library included).
        peak_mb: After the runs.
        device_peak_mb: Of the GPU's memory, above what was in use before; None for an engine on the CPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    start_mb: float
    loaded_mb: float
    peak_mb: float
    device_peak_mb: float | None = None


def peak_rss_mb() -> float:
    """Highest resident set of this process so far, in MB (10^6 bytes).

    Raises:
        TargetError: This system tells neither through ``/proc`` nor through ``getrusage``.
    """
    # VmHWM first: getrusage's figure outlives exec, so in a fresh child it may be that of the parent.
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        raise TargetError("peak memory cannot be measured on this system: it has no /proc and no getrusage") from None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def example_inputs(ports: Sequence[Port], batch: int = 1) -> dict[str, Array]:
    """Arrays that a driver accepts: zeros, with ``batch`` for an axis of that name and 1 for other free axes."""
    sizes = {"batch": batch}
    return {
        port.name: np.zeros([sizes.get(n, 1) if isinstance(n, str) else n for n in port.shape], dtype=port.dtype)
        for port in ports
    }


def measure_artifact_memory(
    artifact: Path, *, inputs: Mapping[str, Array] | None = None, runs: int = 3, timeout: float = 300.0
) -> ArtifactMemory:
    """Load and run an artifact in a fresh process and return its peak memory.

    Args:
        artifact: The artifact's folder.
        inputs: What its driver is called with; by default `example_inputs` of one sample.
        runs: Number of calls.
        timeout: In seconds.

    Raises:
        TargetError: The process failed (its last line is in the message) or took longer than ``timeout`` seconds.
    """
    command = [sys.executable, "-m", "compressor.profiles.memory", str(artifact), "--runs", str(runs)]
    with tempfile.TemporaryDirectory() as folder:
        if inputs is not None:
            file = Path(folder) / "inputs.npz"
            arrays: Any = {name: np.asarray(value) for name, value in inputs.items()}
            np.savez(file, **arrays)
            command += ["--inputs", str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise TargetError(f"measuring the memory of {artifact} took longer than {timeout:.0f} s") from None
    if done.returncode != 0:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise TargetError(f"the memory of {artifact} could not be measured: {last}")
    try:
        return ArtifactMemory.model_validate_json(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValidationError):
        raise TargetError(f"the memory of {artifact} could not be measured: no figures came back") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the artifact named on the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m compressor.profiles.memory", description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--inputs", type=Path, help="arrays by name (.npz); default: zeros, one sample")
    options = parser.parse_args(arguments)
    from compressor.runtimes.load import load
    from compressor.runtimes.manifest import read_manifest

    start = peak_rss_mb()
    try:
        device = str(read_manifest(options.artifact).target.get("device", "cpu"))
        with watch_device_memory(device_memory_in_use(device)) as on_device:
            driver = load(options.artifact)
            loaded = peak_rss_mb()
            given = dict(np.load(options.inputs, allow_pickle=False)) if options.inputs else None
            inputs = given or example_inputs(driver.inputs)
            for seed in range(options.runs):
                driver(inputs, seed=seed)
    except CompressorError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    device_peak = None if on_device.bytes is None else on_device.bytes / 1e6
    figures = ArtifactMemory(start_mb=start, loaded_mb=loaded, peak_mb=peak_rss_mb(), device_peak_mb=device_peak)
    print(figures.model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
