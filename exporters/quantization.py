"""8-bit integer graphs by ONNX Runtime's quantiser: QuantizeLinear/DequantizeLinear pairs around the chosen operators.

Ranges are taken once from recorded inputs; graphs with other choices of operators are then made of the same ranges.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import ModelProto, NodeProto

from compressor.errors import ArtifactError, first_line
from compressor.exporters.graph_edges import makers_of
from compressor.exporters.model_file import filled, write_model
from compressor.exporters.quantized_operators import QuantizedOperators, choose_operators
from compressor.exporters.typed_graph import normalised
from compressor.profiles.target import Calibration
from compressor.runtimes.runtime import Array

__all__ = ["QdqQuantizer", "QdqScheme"]

_ENTROPY_BINS = 512
"""Histogram bins of the entropy method. ONNX Runtime's own 128 are as many as its quantised bins, which leaves one
threshold to choose from: the largest value."""


@dataclass(frozen=True)
class QdqScheme:
    """What an engine wants of an 8-bit graph.

    Attributes:
        engine: "onnxruntime" or "tensorrt".
        symmetric: Activations are signed with zero point 0; else unsigned with a zero point.
        output_free: Operators whose result needs no quantisation for the kernel to be found.
        integer_bias: Biases become int32.
    """

    engine: str
    symmetric: bool
    output_free: tuple[str, ...]
    integer_bias: bool

    @classmethod
    def of(cls, engine: str, device: str) -> QdqScheme:
        """The scheme for an engine of a target ("onnxruntime", "tensorrt", "tensorrt-rtx") on a device."""
        if engine == "onnxruntime":
            return cls("onnxruntime", device != "cpu", ("MatMul",), True)
        return cls("tensorrt", True, ("Conv", "ConvTranspose", "MatMul", "Gemm"), False)


class QdqQuantizer:
    """Calibrates a graph and quantises it, with any operators left out.

    Args:
        model: The exported float32 graph.
        records: Inputs that the graph really gets.
        settings: Method and granularity.
        scheme: What the engine wants.

    Attributes:
        model: The float32 graph in normal form: the nodes that the choices name.
    """

    def __init__(
        self, model: ModelProto, records: Sequence[Mapping[str, Array]], settings: Calibration, scheme: QdqScheme
    ) -> None:
        self.model, self.settings, self.scheme = normalised(model), settings, scheme
        chosen = choose_operators(self.model, scheme.engine, {})
        kinds = {node.name: node.op_type for node in self.model.graph.node}
        self._kinds = sorted({kinds[name] for name in chosen.all})
        self._ranges = self._calibrate(records) if chosen.products else None

    def choose(self, back: Mapping[str, str]) -> QuantizedOperators:
        """The operators to quantise when some go back to float."""
        return choose_operators(self.model, self.scheme.engine, back)

    def quantize(self, chosen: QuantizedOperators) -> ModelProto:
        """The graph with quantised operators; the float graph itself where none is chosen."""
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
        from onnxruntime.quantization.quant_utils import add_infer_metadata

        if not chosen.products:
            result = ModelProto()
            result.CopyFrom(self.model)
            return result
        result = filled(self.model)  # the quantiser reads and replaces weights in memory
        add_infer_metadata(result)  # its types are known; the quantiser would copy it twice to infer them again
        options = {
            "ActivationSymmetric": self.scheme.symmetric,
            "WeightSymmetric": True,
            "MatMulConstBOnly": True,
            "OpTypesToExcludeOutputQuantization": list(self.scheme.output_free),
            "QuantizeBias": self.scheme.integer_bias,
            "DedicatedQDQPair": False,
        }
        with _quiet():
            quantizer = QDQQuantizer(
                result,
                self.settings.per_channel,
                self.settings.weight_bits == 7 and self.scheme.engine == "onnxruntime",
                QuantType.QInt8,
                QuantType.QInt8 if self.scheme.symmetric else QuantType.QUInt8,
                self._ranges,
                chosen.all,
                [],
                self._kinds,
                options,
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
        made: ModelProto = quantizer.model.model
        _release_float_readers(made, chosen, self._stays_quantized(chosen))
        return made

    def _stays_quantized(self, chosen: QuantizedOperators) -> set[str]:
        """Values whose maker's kernel gives eight bits: all their readers get those."""
        names = {*chosen.rounded, *chosen.between}
        return {name for node in self.model.graph.node if node.name in names for name in node.output}

    def _calibrate(self, records: Sequence[Mapping[str, Array]]) -> Any:
        """Ranges of all values around the operators."""
        from onnxruntime.quantization import CalibrationMethod
        from onnxruntime.quantization.calibrate import create_calibrator

        method = {
            "minmax": CalibrationMethod.MinMax,
            "entropy": CalibrationMethod.Entropy,
            "percentile": CalibrationMethod.Percentile,
        }[self.settings.method]
        options: dict[str, Any] = {"symmetric": self.scheme.symmetric}
        if self.settings.method == "entropy":
            options |= {"num_bins": _ENTROPY_BINS}
        elif self.settings.method == "percentile":
            options |= {"percentile": self.settings.percentile}
        with tempfile.TemporaryDirectory() as folder, _quiet():
            path = Path(folder) / "graph.onnx"
            write_model(self.model, path)
            large = path.with_name(path.name + ".data").is_file()
            try:
                calibrator = create_calibrator(
                    path,
                    self._kinds,
                    augmented_model_path=str(Path(folder) / "augmented.onnx"),
                    calibrate_method=method,
                    use_external_data_format=large,
                    extra_options=options,
                )
                for record in records:  # one at a time: histograms of all at once would hold every value in memory
                    calibrator.collect_data(_Reader(record))
                return calibrator.compute_data()
            except Exception as error:  # the quantiser raises plain exceptions of many kinds
                raise ArtifactError(f"the calibration of the graph fails: {first_line(error)}") from error


class _Reader:
    """One recorded input, as ONNX Runtime's calibrators read them."""

    def __init__(self, record: Mapping[str, Array]) -> None:
        self._records: Iterator[dict[str, Array]] = iter([dict(record)])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._records, None)


def _release_float_readers(model: ModelProto, chosen: QuantizedOperators, quantized: set[str]) -> None:
    """Give operators in float the exact value again where the quantiser gave them the rounded one.

    It puts a pair between a value and all its readers, although a residual or a norm could read the value itself, and
    behind results that need none.
    """
    makers = makers_of(model.graph)
    names = set(chosen.all)
    for node in model.graph.node:
        if node.name in names or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for place, name in enumerate(node.input):
            exact = _before_pair(makers, name)
            if exact is not None and exact not in quantized:
                node.input[place] = exact
    for value in model.graph.output:
        exact = _before_pair(makers, value.name)
        if exact is not None and exact.removesuffix("_QuantizeLinear_Input") not in quantized:
            makers[value.name].output[0] = f"{value.name}_unused"
            _rename(model, exact, value.name)
    used = {value.name for value in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if used.intersection(node.output):
            used.update(_read_by(node))
            kept.append(node)
    copies = [NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    for place in reversed(range(len(model.graph.initializer))):  # scales of pairs that are gone: engines warn of them
        if model.graph.initializer[place].name not in used:
            del model.graph.initializer[place]


def _read_by(node: NodeProto) -> Iterator[str]:
    """Names that a node reads, the graphs within it included."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from (value.name for value in graph.output)
            for inner in graph.node:
                yield from _read_by(inner)


def _rename(model: ModelProto, name: str, new: str) -> None:
    for node in model.graph.node:
        for names in (node.input, node.output):
            for place, given in enumerate(names):
                if given == name:
                    names[place] = new


def _before_pair(makers: Mapping[str, NodeProto], name: str) -> str | None:
    """The value that a pair of QuantizeLinear and DequantizeLinear rounds; None for a weight or no pair."""
    inner = makers.get(name)
    if inner is None or inner.op_type != "DequantizeLinear":
        return None
    outer = makers.get(inner.input[0])
    return outer.input[0] if outer is not None and outer.op_type == "QuantizeLinear" else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser prints its progress, and warns on the root logger of what is meant here."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
