"""Build for OpenVINO: the float32 graph as .xml and .bin, weights stored as halves where the target says fp16."""

from __future__ import annotations

import importlib.metadata
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection
from pathlib import Path
from typing import Any

from compressor.errors import ArtifactError, TargetError
from compressor.exporters.artifact import Built, Source
from compressor.exporters.onnx_graph import OnnxGraph
from compressor.exporters.openvino_attention import with_whole_attention
from compressor.exporters.sparse_decompression import (
    RATES,
    SPARSE_RATE,
    cpu_can,
    rates_to_try,
    try_sparse,
    zero_shares,
)
from compressor.exporters.sparse_weights import WeightZeros, count_zeros
from compressor.profiles.target import Target
from compressor.runtimes.load import runtime_options
from compressor.runtimes.manifest import Engine

__all__ = ["OPENVINO_ISLANDS", "build", "convert"]

OPENVINO_ISLANDS = frozenset({"angle", "asked", "overflow", "constant", "accuracy"})
"""Reasons for which an operation is marked; norms and exponentials OpenVINO keeps in float32 on its own."""


def build(source: Source, target: Target, directory: Path) -> Built:
    """Write ``NAME.xml`` and ``NAME.bin``.

    OpenVINO chooses the precision of each operation when it compiles the model for a device, so it gets the float32
    graph; fp16 halves the stored weights and asks for halves at inference. Operations that need float32 are marked, and
    then keep their constants and their arithmetic in float32 on every device.

    Raises:
        TargetError: OpenVINO is not installed, or fails with the sparse weights that the target asks for.
        ArtifactError: OpenVINO cannot convert the graph.
    """
    path = directory / f"{source.name}.xml"
    half = target.precision == "fp16"
    kept = [name for name, reason in source.kept.items() if reason in OPENVINO_ISLANDS]
    if half and kept:
        kept = with_whole_attention(source.plain.load().graph, kept)
    model = source.model if source.model is not None else convert(source.plain)
    if half and kept:
        model = _marked(model, kept)
    import openvino

    openvino.save_model(model, str(path), compress_to_fp16=half)
    notes: tuple[str, ...] = ()
    if half:
        notes = ("Weights are stored as halves; a device without half arithmetic computes in float32.",)
    engine = Engine(name="openvino", version=importlib.metadata.version("openvino"))
    properties, told = _sparse_weights(source, target, path)
    return Built(path.name, engine, f"{source.name}.bin", (*notes, *told), properties)


def _sparse_weights(source: Source, target: Target, path: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """The property by which OpenVINO's CPU reads sparse weights, where it gains time or is asked for; notes."""
    zeros, asked = count_zeros(source.plain.load()), target.options.sparse_weights
    if SPARSE_RATE in target.options.properties or asked == "off":
        return {}, ()
    device, options = target.device.lower(), runtime_options(target.model_dump())
    if asked == "on":
        if device != "cpu":
            raise TargetError(f'target {target.name}: options.sparse_weights = "on" is for the cpu, not for {device}')
        survived = try_sparse(path, options, source.records, RATES[0], measured=False) if source.records else None
        if survived is not None and survived.fault:
            raise TargetError(
                f'target {target.name}: graph {source.name!r} does not run with options.sparse_weights = "on": '
                f'{survived.fault}; set it to "auto" or "off"'
            )
        limit = "" if cpu_can() else "; this CPU lacks the matrix instructions (AMX) for it"
        return {SPARSE_RATE: str(RATES[0])}, (f"{zeros.said}; OpenVINO is told to read them sparse{limit}.",)
    rates = rates_to_try(zero_shares(source.model)) if source.model is not None else []
    hindrance = _hindrance(zeros, rates, device, bool(source.records))
    if hindrance:
        return {}, (f"{zeros.said}; {hindrance}.",) if zeros.half_zero else ()
    trials = [try_sparse(path, options, source.records, rate) for rate in rates]
    best = max((trial for trial in trials if trial.used), key=lambda trial: trial.gain or (0,), default=None)
    told = "; ".join(trial.said(trial is best) for trial in trials)
    properties = {SPARSE_RATE: str(best.rate)} if best is not None else {}
    return properties, (f"{zeros.said}; sparse decompression tried: {told}.",)


def _hindrance(zeros: WeightZeros, rates: list[float], device: str, can_run: bool) -> str:
    """Why OpenVINO cannot gain by zeros; empty where that must be tried."""
    if not rates:
        return (
            "OpenVINO gains nothing by them: it reads sparse weights of fully connected layers in eight bits alone, "
            "of sizes that are multiples of 64"
        )
    if device != "cpu":
        return "OpenVINO reads sparse weights on CPUs alone"
    if not can_run:
        return "OpenVINO does not run here, so sparse weights were not tried"
    if not cpu_can():
        return (
            "OpenVINO gains nothing by them on this CPU, which lacks the matrix instructions (AMX) for it; "
            'export on one that has them, or set options.sparse_weights = "on"'
        )
    return ""


def convert(graph: OnnxGraph) -> Any:
    """A float32 graph as OpenVINO's model, its outputs named as the graph's.

    Raises:
        TargetError: OpenVINO is not installed.
        ArtifactError: OpenVINO cannot convert the graph.
    """
    try:
        import openvino
    except ImportError as error:
        raise TargetError("OpenVINO is not installed: pip install 'compressor[openvino]'") from error
    try:
        model = openvino.convert_model(str(graph.path))
    except Exception as error:  # the engine raises plain RuntimeErrors of many lines
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
        raise ArtifactError(f"OpenVINO cannot convert graph {graph.path.stem!r}: {lines[-1]}") from error
    for value, spec in zip(model.outputs, graph.outputs, strict=True):
        value.get_tensor().set_names({spec.name})
    return model


def _marked(model: Any, kept: Collection[str]) -> Any:
    """The model with the operations of the named ONNX nodes, and their constants, marked to stay in float32.

    The mark is OpenVINO's own ("precise"), which Python cannot set on a model in memory; its file format holds it.
    """
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "marked.xml"
        openvino.save_model(model, str(path), compress_to_fp16=False)
        tree = ElementTree.parse(path)
        layers = {layer.get("id"): layer for layer in tree.iterfind("layers/layer")}
        # an ONNX node may become several layers, NODE or NODE/PART
        wanted = {key for key, layer in layers.items() if str(layer.get("name")).split("/")[0] in set(kept)}
        for edge in tree.iterfind("edges/edge"):
            origin = edge.get("from-layer")
            if edge.get("to-layer") in wanted and layers[origin].get("type") == "Const":
                wanted.add(origin)
        for key in wanted:
            information = layers[key].find("rt_info")
            if information is None:
                information = ElementTree.Element("rt_info")
                place = 1 if layers[key].find("data") is not None else 0
                layers[key].insert(place, information)
            ElementTree.SubElement(information, "attribute", {"name": "precise", "version": "0"})
        tree.write(path)
        core = openvino.Core()
        core.set_property({"ENABLE_MMAP": False})  # the file goes away: its weights must be read, not mapped
        return core.read_model(str(path))
