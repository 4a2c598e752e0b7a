"""Build for ONNX Runtime: the ONNX file itself, in the target's precision."""

from __future__ import annotations

from pathlib import Path

from compressor.exporters.artifact import Built, Source
from compressor.exporters.model_file import write_model
from compressor.exporters.sparse_weights import count_zeros
from compressor.profiles.target import Target
from compressor.runtimes.manifest import Engine

__all__ = ["build"]


def build(source: Source, target: Target, directory: Path) -> Built:
    """Write ``NAME.onnx``. Nothing is optimised ahead of time: the runtime does that for the device that loads it."""
    path = directory / f"{source.name}.onnx"
    write_model(source.typed.load(), path)
    data = path.with_name(path.name + ".data")
    notes: tuple[str, ...] = ()
    if target.precision == "fp16" and target.device == "cpu":
        notes = ("ONNX Runtime computes most half operations in float32 on a CPU: the file is smaller, not faster.",)
    zeros = count_zeros(source.plain.load())
    if zeros.half_zero:
        notes += (f"{zeros.said}; ONNX Runtime has no kernels for sparse weights: they gain nothing in time.",)
    return Built(path.name, Engine(name="onnxruntime", version="any"), data.name if data.is_file() else None, notes)
