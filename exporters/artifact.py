"""What every engine's exporter takes and gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressor.exporters.onnx_graph import OnnxGraph
from compressor.runtimes.manifest import Engine
from compressor.runtimes.runtime import Array

__all__ = ["Built", "Source"]


@dataclass(frozen=True)
class Source:
    """A graph in the forms that an engine may want.

    Attributes:
        name: Of the graph; the engine's file is called after it.
        plain: Float32.
        typed: Strongly typed in the target's precision, or with pairs of quantisation; the same as ``plain`` for fp32.
        kept: Nodes of ``plain`` that stay in float32, with the reason.
        model: OpenVINO's own model, where NNCF has quantised it.
        records: Inputs to try the engine on, the first at the batch that the target is tuned for; empty where the
            engine does not run here.
    """

    name: str
    plain: OnnxGraph
    typed: OnnxGraph
    kept: Mapping[str, str] = field(default_factory=dict)
    model: Any = None
    records: Sequence[Mapping[str, Array]] = ()


@dataclass(frozen=True)
class Built:
    """The files that an engine's exporter wrote.

    Attributes:
        file: Name of the graph's file in the artifact's folder.
        engine: What built it.
        data_file: Name of the file of its weights, where they lie apart.
        notes: Sentences for the manifest.
        properties: What the engine must be told when it loads the file, besides the target's own.
    """

    file: str
    engine: Engine
    data_file: str | None = None
    notes: tuple[str, ...] = field(default=())
    properties: Mapping[str, str] = field(default_factory=dict)

    def path(self, directory: Path) -> Path:
        """The graph's file in the artifact's folder."""
        return directory / self.file
