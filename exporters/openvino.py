"""Build for OpenVINO: the float32 graph as .xml and .bin, weights stored as halves where the target says fp16."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from compressor.errors import ArtifactError, TargetError
from compressor.exporters.artifact import Built, Source
from compressor.profiles.target import Target
from compressor.runtimes.manifest import Engine

__all__ = ["build"]


def build(source: Source, target: Target, directory: Path) -> Built:
    """Write ``NAME.xml`` and ``NAME.bin``.

    OpenVINO chooses the precision of each operation when it compiles the model for a device, and keeps its own float32
    islands, so it gets the float32 graph; fp16 halves the stored weights and asks for halves at inference.

    Raises:
        TargetError: OpenVINO is not installed.
        ArtifactError: OpenVINO cannot convert the graph.
    """
    try:
        import openvino
    except ImportError as error:
        raise TargetError("OpenVINO is not installed: pip install 'compressor[openvino]'") from error
    path = directory / f"{source.name}.xml"
    half = target.precision == "fp16"
    try:
        model = openvino.convert_model(str(source.plain.path))
        for value, spec in zip(model.outputs, source.plain.outputs, strict=True):
            value.get_tensor().set_names({spec.name})
        openvino.save_model(model, str(path), compress_to_fp16=half)
    except Exception as error:  # the engine raises plain RuntimeErrors of many lines
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
        raise ArtifactError(f"OpenVINO cannot convert graph {source.name!r}: {lines[-1]}") from error
    notes: tuple[str, ...] = ()
    if half:
        notes = ("Weights are stored as halves; a device without half arithmetic computes in float32.",)
    engine = Engine(name="openvino", version=importlib.metadata.version("openvino"))
    return Built(path.name, engine, f"{source.name}.bin", notes)
