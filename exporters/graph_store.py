"""ONNX graphs by content: each module is exported once, and every target and later run takes it from here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compressor.atomic import atomic_directory, write_json
from compressor.deployable import Graph
from compressor.errors import ArtifactError
from compressor.exporters.fingerprint import graph_fingerprint, records_fingerprint
from compressor.exporters.half_arithmetic import judge_of, rounding_graph
from compressor.exporters.interpreter import Interpreter
from compressor.exporters.model_file import write_model
from compressor.exporters.onnx_graph import OnnxGraph, export_onnx
from compressor.exporters.parity import TOLERANCES, compare, worst
from compressor.exporters.precision import convert_to_half
from compressor.exporters.typed_graph import FLOAT16, Half
from compressor.runtimes.manifest import Island, Parity
from compressor.runtimes.runtime import Array

__all__ = ["GraphStore", "StoredHalf"]

_GRAPH, _SEARCH = "graph.onnx", "search.json"


@dataclass(frozen=True)
class StoredHalf:
    """A strongly typed half-precision graph and how it was judged."""

    graph: OnnxGraph
    islands: tuple[Island, ...]
    parity: Parity
    kept: dict[str, str]


class GraphStore:
    """Exports graphs, or takes them from a folder where they were exported before; weights lie beside them there.

    Args:
        folder: Where the graphs lie; made as needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def plain(self, name: str, graph: Graph) -> OnnxGraph:
        """The float32 graph."""
        place = self.folder / f"{graph_fingerprint(graph)}-fp32"
        if not (place / _GRAPH).is_file():
            with atomic_directory(place) as temporary:
                export_onnx(graph, temporary / _GRAPH, name=name, inline_limit=0)
        return OnnxGraph.read(place / _GRAPH)

    def half(
        self,
        name: str,
        graph: Graph,
        records: Sequence[Mapping[str, Array]],
        references: Sequence[Mapping[str, Array]],
        kind: Half = FLOAT16,
    ) -> StoredHalf:
        """The half-precision graph with its float32 islands, searched on ``records`` and judged in half arithmetic."""
        key = f"{graph_fingerprint(graph)}-{records_fingerprint(records, graph.keep_fp32)}-{kind.precision}"
        place = self.folder / key
        if not (place / _SEARCH).is_file():
            converted = convert_to_half(self.plain(name, graph).load(), records, graph.keep_fp32, kind=kind)
            run = Interpreter(rounding_graph(converted.model, kind))
            found_parity = _parity(run, records, references, kind.precision, judge_of(kind))
            with atomic_directory(place) as temporary:
                write_model(converted.model, temporary / _GRAPH, inline_limit=0)
                found = [island.model_dump(mode="json") for island in converted.islands]
                judged = found_parity.model_dump(mode="json")
                write_json(temporary / _SEARCH, {"islands": found, "parity": judged, "kept": dict(converted.kept)})
        try:
            stored = json.loads((place / _SEARCH).read_text(encoding="utf-8"))
            islands = tuple(Island.model_validate(item) for item in stored["islands"])
            parity = Parity.model_validate(stored["parity"])
            return StoredHalf(OnnxGraph.read(place / _GRAPH), islands, parity, stored["kept"])
        except (OSError, ValueError, KeyError) as error:
            raise ArtifactError(f"the stored graph {place} is damaged: delete it and export again") from error

    def drift(
        self, plain: OnnxGraph, typed: OnnxGraph, records: Sequence[Mapping[str, Array]], kind: Half = FLOAT16
    ) -> str:
        """Where the half-precision graph starts to drift from the float32 one."""
        from compressor.exporters.drift import first_drift

        return first_drift(plain.load(), typed.load(), records[0], TOLERANCES[kind.precision], kind)

    def plain_parity(
        self, graph: OnnxGraph, records: Sequence[Mapping[str, Array]], references: Sequence[Mapping[str, Array]]
    ) -> Parity:
        """Judge the float32 graph on the CPU, for an engine that does not run here."""
        run = Interpreter(graph.path)
        return _parity(run, records, references, "fp32", f"{run.name} on cpu")


def _parity(
    run: Interpreter,
    records: Sequence[Mapping[str, Array]],
    references: Sequence[Mapping[str, Array]],
    precision: str,
    judge: str,
) -> Parity:
    pairs = zip(references, records, strict=True)
    return worst([compare(reference, run(record), TOLERANCES[precision], judge) for reference, record in pairs])
