"""Export a deployable to a target: graph files, assets and a manifest, in a folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compressor.atomic import atomic_directory, write_json
from compressor.deployable import Deployable, Graph
from compressor.errors import ArtifactError, RequestError, TargetError
from compressor.evaluate import TorchRun
from compressor.exporters.artifact import Built, Source
from compressor.exporters.calibration import CalibrationData, check_records
from compressor.exporters.free_sizes import Sized, check_other_sizes, other_sizes, resized
from compressor.exporters.graph_store import GraphStore, StoredHalf
from compressor.exporters.half_arithmetic import JUDGE
from compressor.exporters.layers import model_path
from compressor.exporters.onnx_graph import OnnxGraph, evaluation_form, module_outputs
from compressor.exporters.openvino import OPENVINO_ISLANDS
from compressor.exporters.parity import TOLERANCES, worst
from compressor.exporters.quantized_export import Case, quantize_graph
from compressor.exporters.tensorrt import check_axes
from compressor.exporters.tied_entries import compare_sorted, possible_scores
from compressor.exporters.torchscript_route import TORCHSCRIPT
from compressor.exporters.typed_graph import HALVES
from compressor.layer_patterns import check_patterns
from compressor.profiles.target import Availability, Target, availability, with_overrides
from compressor.runtimes.load import open_graph, runtime_options
from compressor.runtimes.manifest import (
    ASSETS_FILE,
    MANIFEST_FILE,
    Assets,
    DriverEntry,
    GraphEntry,
    Island,
    Manifest,
    Parity,
    Quantization,
    check_relative_path,
    hash_file,
)
from compressor.runtimes.runtime import Array, Run, Runtime
from compressor.versions import installed_versions

__all__ = ["export"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_FEW = 2
"""Samples with which engines are tried at other sizes."""
_LIBRARIES = ("compressor", "torch", "onnx", "onnxscript", "openvino", "diffusers", "timm")


def export(
    deployable: Deployable,
    target: Target,
    directory: Path,
    *,
    records: Mapping[str, list[Mapping[str, Array]]] | None = None,
    calibration: CalibrationData | None = None,
    cache: Path | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Manifest:
    """Export a deployable and check it against its torch modules.

    Args:
        deployable: Graphs, driver, assets, files.
        target: What to build for. The ``torch`` runtime has no artifact: the student itself is what it measures.
        directory: The artifact's folder; replaced whole, only if everything succeeds.
        records: By graph, inputs that it really gets (`record_inputs`); the example inputs otherwise. They measure
            float32 islands and parity.
        calibration: What 8-bit targets take their ranges from, and what judges them; ``records`` otherwise, and the
            outputs' error. Other targets need none.
        cache: Folder of exported ONNX graphs, shared by all targets and runs; None exports anew.
        metadata: JSON values for the manifest.

    Returns:
        The manifest as written.

    Raises:
        TargetError: The target cannot be built here; the message says why and what to install.
        RequestError: The deployable is not well formed, or the target excludes a layer that the model lacks.
        ArtifactError: A graph cannot be exported, drifts past its tolerance, or does not hold at other sizes of its
            free axes.
    """
    found = _buildable(target)
    settings = _json(deployable.driver.settings, f"the settings of driver {deployable.driver.name!r}")
    extra = _json(metadata or {}, "the metadata")
    modules = {model_path(path) for graph in deployable.graphs.values() for path, _ in graph.module.named_modules()}
    check_patterns(target.calibration.exclude, modules, "calibration.exclude")
    with ExitStack() as stack:
        folder = cache if cache is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = GraphStore(folder)
        temporary = stack.enter_context(atomic_directory(directory))
        done = {}
        whole = _Whole(deployable, calibration)
        for name, graph in deployable.graphs.items():
            if not _NAME.fullmatch(name):
                raise RequestError(f"the graph's name {name!r} is no file name: use letters, digits, - and _")
            given = (records or {}).get(name)
            done[name] = _export_graph(name, graph, target, found, store, temporary, given, whole)
        if not done:
            raise RequestError("the deployable has no graph: only its files could be kept, and no target runs them")
        first = next(iter(done.values()))
        reasons = [item.not_run for item in done.values() if item.not_run]
        manifest = Manifest(
            target=_told(target, done.values()).model_dump(mode="json"),
            engine=first.engine,
            driver=DriverEntry(name=deployable.driver.name, settings=settings),
            graphs={name: item.entry for name, item in done.items()},
            assets=_write_assets(deployable.assets, temporary),
            files=_write_files(deployable, temporary),
            versions=installed_versions(_LIBRARIES),
            notes=_distinct(whole.notes(target), *(item.notes for item in done.values())),
            runnable_here=found.can_run and not reasons,
            reason=(reasons or [found.reason])[0],
            metadata=extra,
        )
        write_json(temporary / MANIFEST_FILE, manifest.model_dump(mode="json"))
    return manifest


@dataclass(frozen=True)
class _Exported:
    entry: GraphEntry
    engine: Any
    notes: tuple[str, ...]
    not_run: str
    properties: Mapping[str, str]


class _Whole:
    """The deployable around a graph: its figures can be judged with one graph replaced, and earlier ones as exported.

    Args:
        deployable: Its graphs and their modules.
        calibration: Records, judge and notes.
    """

    def __init__(self, deployable: Deployable, calibration: CalibrationData | None) -> None:
        self.calibration, self.several = calibration, len(deployable.graphs) > 1
        self._runs: dict[str, Run] = {
            name: TorchRun(graph.module, graph.outputs) for name, graph in deployable.graphs.items()
        }

    def records(self, name: str) -> Sequence[Mapping[str, Array]] | None:
        """The recorded inputs of a graph."""
        return self.calibration.records.get(name) if self.calibration is not None else None

    def judge(self, name: str) -> Callable[[Run], float] | None:
        """The judge of one graph among the others."""
        judge = self.calibration.judge if self.calibration is not None else None
        return (lambda run: judge({**self._runs, name: run})) if judge is not None else None

    def use(self, name: str, run: Run) -> None:
        """From now on judge with this graph instead of the model's: what it has lost, the next ones cannot lose."""
        self._runs[name] = run

    def notes(self, target: Target) -> tuple[str, ...]:
        """What there is to say of the data."""
        return self.calibration.notes if self.calibration is not None and target.quantized else ()


@dataclass(frozen=True)
class _Typed:
    """A graph in the target's precision, before an engine is built of it."""

    source: Source
    islands: tuple[Island, ...] = ()
    parities: tuple[Parity, ...] = ()
    notes: tuple[str, ...] = ()
    quantization: Quantization | None = None


def _export_graph(
    name: str,
    graph: Graph,
    target: Target,
    found: Availability,
    store: GraphStore,
    directory: Path,
    records: list[Mapping[str, Array]] | None,
    whole: _Whole,
) -> _Exported:
    if found.engine.startswith("tensorrt"):
        check_axes(name, graph, target)
    with evaluation_form(graph) as plain:
        inputs = _records(name, plain, target, records)
        references = [module_outputs(plain, record, name) for record in inputs]
        ranges = _records(name, plain, target, whole.records(name) or records) if target.quantized else []
    exported, kind = store.plain(name, graph), HALVES.get(target.precision)
    others = _other_inputs(graph, target, inputs[0]) if found.can_run else []
    with tempfile.TemporaryDirectory() as folder:
        if target.quantized:
            cases = list(zip(inputs, references, strict=True))
            kept = store.half(name, graph, inputs, references) if target.rest == "fp16" else None
            typed = _quantized(name, exported, target, found, kept, cases, ranges, whole, Path(folder))
        elif kind is not None:
            half = store.half(name, graph, inputs, references, kind)
            typed = _Typed(Source(name, exported, half.graph, half.kept), half.islands, (half.parity,))
        else:
            typed = _Typed(Source(name, exported, exported))
        source = typed.source
        if found.can_run:
            tuned = resized(inputs[0], graph.dynamic, {"batch": target.batch.opt})
            source = replace(source, records=[tuned, *(given for _, given in others)])
        built = _builder(found.engine)(source, target, directory)
    parities, islands, not_run = list(typed.parities), typed.islands, ""
    if found.can_run:
        try:
            parities.append(_tried(name, built, target, directory, exported, inputs, references, others))
        except TargetError as error:
            if target.device == "cpu":
                raise
            not_run = str(error)
    elif target.precision == "fp32":
        parities.append(store.plain_parity(exported, inputs, references))
    if found.engine == "openvino" and target.precision == "fp16":
        islands = tuple(island for island in islands if island.reason in OPENVINO_ISLANDS)
        parities = [parity for parity in parities if not parity.judged_by.startswith(JUDGE)] or parities
    for parity in parities:
        if not parity.relative <= parity.tolerance:
            start = store.drift(exported, source.typed, inputs, kind) if kind is not None else ""
            raise ArtifactError(_drifted(name, parity, target, start))
    entry = _entry(built, target, directory, source.typed, tuple(parities), islands, typed.quantization)
    said = (*typed.notes, *_route_notes(name, exported), *_notes(target, built))
    return _Exported(entry, built.engine, said, not_run, built.properties)


def _quantized(
    name: str,
    exported: OnnxGraph,
    target: Target,
    found: Availability,
    half: StoredHalf | None,
    cases: Sequence[Case],
    ranges: list[Mapping[str, Array]],
    whole: _Whole,
    folder: Path,
) -> _Typed:
    """The graph in eight bits; ``half`` says what stays in float32 where the rest is in halves."""
    samples, notes = check_records(name, ranges)
    kept = half.kept if half is not None else {}
    quantizer = _quantizer(found)(exported, ranges, target, found.engine, found.can_run, kept)
    made = quantize_graph(name, quantizer, target, cases, whole.judge(name), samples, folder)
    if whole.several:
        whole.use(name, quantizer.open(made.back, folder)[0])
    islands = half.islands if half is not None else ()
    parities = () if found.can_run else (made.parity,)
    return _Typed(made.source, islands, parities, (*notes, *made.notes), made.entry)


def _tried(
    name: str,
    built: Built,
    target: Target,
    directory: Path,
    plain: OnnxGraph,
    inputs: list[Mapping[str, Array]],
    references: list[dict[str, Array]],
    others: Sequence[Sized],
) -> Parity:
    """Run the built engine: its parity, and that it holds at other sizes of free axes.

    Raises:
        TargetError: It does not run here.
        ArtifactError: It does not hold at another size.
    """
    engine, judge, tolerance = _open(built, _with_properties(target, built.properties), directory)
    with contextlib.closing(engine):
        parity = _engine_parity(name, engine, judge, tolerance, plain, inputs, references)
        if parity.relative <= tolerance:
            check_other_sizes(name, engine, judge, plain.path, others, tolerance)
    return parity


def _drifted(name: str, parity: Parity, target: Target, start: str) -> str:
    where = f"; the drift starts at {start}" if start else ""
    return (
        f"graph {name!r}: output {parity.output!r} drifts by {parity.relative:.1e} of its scale on {target.name} "
        f"(allowed: {parity.tolerance:.0e}, judged by {parity.judged_by}){where}"
    )


def _open(built: Built, target: Target, directory: Path) -> tuple[Runtime, str, float]:
    """The built engine, ready to run, what it is called as a judge, and its tolerance."""
    engine = open_graph(built.path(directory), built.engine.name, runtime_options(target.model_dump()))
    computes = getattr(engine, "inference_precision", "")  # what OpenVINO found the device able to do
    judge = f"{built.engine.name} on {target.device}" + (f" in {computes}" if computes else "")
    precision = "bf16" if target.precision == "fp16" and computes == "bfloat16" else target.precision
    return engine, judge, TOLERANCES[precision]


def _engine_parity(
    name: str,
    engine: Run,
    judge: str,
    tolerance: float,
    plain: OnnxGraph,
    inputs: list[Mapping[str, Array]],
    references: list[dict[str, Array]],
) -> Parity:
    scores = possible_scores(plain.path)
    # The first again: nothing of an earlier call may be left, and OpenVINO has compiled its shape by then.
    pairs = [*zip(references, inputs, strict=True), (references[0], inputs[0])]
    try:
        return worst(
            [compare_sorted(reference, engine(record), tolerance, judge, scores) for reference, record in pairs]
        )
    except ArtifactError as error:
        raise ArtifactError(f"graph {name!r} on {judge}: {error}") from error


def _other_inputs(graph: Graph, target: Target, record: Mapping[str, Array]) -> list[Sized]:
    """Sizes of free axes that the target allows and no record has, with inputs of them; of few samples, to be quick."""
    batch = target.batch
    limits = {"batch": (batch.min, batch.max), **{axis: (low, high) for axis, (low, _, high) in target.axes.items()}}
    small = resized(record, graph.dynamic, {"batch": min(max(_FEW, batch.min), batch.max)})
    return [(sizes, resized(small, graph.dynamic, sizes)) for sizes in other_sizes(small, graph.dynamic, limits)]


def _entry(
    built: Built,
    target: Target,
    directory: Path,
    typed: OnnxGraph,
    parities: tuple[Parity, ...],
    islands: tuple[Island, ...],
    quantization: Quantization | None,
) -> GraphEntry:
    path = built.path(directory)
    data = directory / built.data_file if built.data_file is not None else None
    return GraphEntry(
        file=built.file,
        sha256=hash_file(path),
        bytes=path.stat().st_size + (data.stat().st_size if data is not None else 0),
        data_file=built.data_file,
        data_sha256=hash_file(data) if data is not None else None,
        precision=target.precision,
        inputs=typed.inputs,
        outputs=typed.outputs,
        opset=typed.opset,
        parity=parities,
        fp32_islands=islands,
        quantization=quantization,
    )


def _route_notes(name: str, exported: OnnxGraph) -> tuple[str, ...]:
    if exported.route != TORCHSCRIPT:
        return ()
    return (
        f"Graph {name!r} was exported by tracing with TorchScript, since torch.export cannot follow sizes that depend "
        "on values; it was compared with the model on other inputs too.",
    )


def _notes(target: Target, built: Built) -> tuple[str, ...]:
    if target.precision not in HALVES:
        return built.notes
    return (*built.notes, "Inputs and outputs are float32; halves are used inside the graph.")


def _told(target: Target, done: Iterable[_Exported]) -> Target:
    """The target with the properties that the export has chosen."""
    chosen = {key: value for item in done for key, value in item.properties.items()}
    return _with_properties(target, chosen)


def _with_properties(target: Target, chosen: Mapping[str, str]) -> Target:
    return with_overrides(target, {"options.properties": {**target.options.properties, **chosen}}) if chosen else target


def _distinct(*notes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(note for group in notes for note in group))


def _buildable(target: Target) -> Availability:
    if not target.has_artifact:
        raise TargetError(f"target {target.name} has no artifact: it runs the student itself, nothing is exported")
    found = availability(target)
    if not found.can_build:
        hint = f": {found.install_hint}" if found.install_hint else ""
        raise TargetError(f"target {target.name} cannot be built here: {found.reason}{hint}")
    return found


def _builder(engine: str) -> Any:
    if engine == "onnxruntime":
        from compressor.exporters.onnxruntime import build as onnxruntime

        return onnxruntime
    if engine == "openvino":
        from compressor.exporters.openvino import build as openvino

        return openvino
    from compressor.exporters.tensorrt import build as tensorrt

    return tensorrt


def _quantizer(found: Availability) -> Any:
    if found.engine == "openvino":
        from compressor.exporters.openvino_quantizer import OpenVinoQuantizer

        return OpenVinoQuantizer
    from compressor.exporters.onnx_quantizer import OnnxQuantizer

    return OnnxQuantizer


def _records(
    name: str, graph: Graph, target: Target, records: Sequence[Mapping[str, Array]] | None
) -> list[Mapping[str, Array]]:
    """The recorded inputs in the example's dtypes, at batch sizes that the target takes; else the example itself."""
    given: list[Mapping[str, Array]] = list(records or [])
    if not given:
        given = [{key: value.numpy() for key, value in graph.inputs.items()}]
    result: list[Mapping[str, Array]] = []
    for record in given:
        missing = [key for key in graph.inputs if key not in record]
        if missing:
            raise RequestError(f"the records of graph {name!r} lack its input {missing[0]!r}")
        ready = {}
        for key, example in graph.inputs.items():
            array = np.asarray(record[key]).astype(example.numpy().dtype)
            for axis, label in graph.dynamic.get(key, {}).items():
                if label == "batch":
                    size = min(max(array.shape[axis], target.batch.min), target.batch.max)
                    array = array.take(np.arange(size) % array.shape[axis], axis=axis)
            ready[key] = array
        result.append(ready)
    return result


def _write_assets(assets: Mapping[str, Array | str], directory: Path) -> Assets:
    strings = {name: value for name, value in assets.items() if isinstance(value, str)}
    arrays = {name: np.asarray(value) for name, value in assets.items() if not isinstance(value, str)}
    if not arrays:
        return Assets(strings=strings)
    path = directory / ASSETS_FILE
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            if array.dtype.hasobject:
                raise RequestError(f"asset {name!r} holds Python objects: give numbers or a string")
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    return Assets(file=ASSETS_FILE, sha256=hash_file(path), strings=strings)


def _write_files(deployable: Deployable, directory: Path) -> dict[str, str]:
    hashes = {}
    for name, write in deployable.files.items():
        path = check_relative_path(directory, name)
        if path.exists() or name == MANIFEST_FILE:
            raise RequestError(f"the deployable's file {name!r} would replace a file of the artifact: rename it")
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
        hashes[name] = hash_file(path)
    return hashes


def _json(values: Mapping[str, Any], what: str) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(json.dumps(dict(values), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise RequestError(f"{what} must be JSON values: {error}") from error
    return result
