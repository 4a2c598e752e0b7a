"""The quantiser of OpenVINO targets: NNCF. Operators go back to float by taking its roundings out again."""

from __future__ import annotations

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressor.errors import ArtifactError, TargetError, first_line
from compressor.exporters.artifact import Source
from compressor.exporters.layers import layer_of
from compressor.exporters.onnx_graph import OnnxGraph
from compressor.exporters.openvino import convert
from compressor.exporters.quantized_export import Account
from compressor.profiles.target import Target
from compressor.runtimes.openvino import OpenVino, shared_core
from compressor.runtimes.runtime import Array, Run

__all__ = ["OpenVinoQuantizer"]

_PRODUCTS = frozenset({"Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul"})
_SMOOTHING = "nncf_smooth_quant"
"""Part of the names of NNCF's factors that move the size of activations into the weights."""


class OpenVinoQuantizer:
    """Quantises an OpenVINO model with NNCF.

    Args:
        plain: The exported float32 graph.
        records: Inputs that it really gets.
        target: Method and limits.
        engine: "openvino".
        can_run: The target's device is here; else the CPU judges.
        kept: Not used: OpenVINO chooses the precision of the rest.

    Raises:
        TargetError: OpenVINO or NNCF is not installed.
        ArtifactError: NNCF cannot quantise the graph.
    """

    by = "NNCF"

    def __init__(
        self,
        plain: OnnxGraph,
        records: Sequence[Mapping[str, Array]],
        target: Target,
        engine: str,
        can_run: bool,
        kept: Collection[str] = (),
    ) -> None:
        self._plain, self._target = plain, target
        self._device = target.device if can_run else "cpu"
        self.judged_by = f"OpenVINO on {self._device}"
        graph = plain.load().graph
        self._layers = {name: layer_of(node) for node in graph.node for name in (node.name, node.output[0])}
        self._float = convert(plain)
        self._all = _quantized(self._float.clone(), records, target)
        self._reasons = {op.get_friendly_name(): _reason(op) for op in _products(self._all)}

    def operators(self) -> Mapping[str, str]:
        """The products by name, and why they stay in float."""
        return self._reasons

    def layer(self, operator: str) -> str:
        """The module that an operator stems from, as its ONNX node says; else its own name."""
        return self._layers.get(operator.partition("/")[0]) or operator

    def open(self, back: Mapping[str, str], folder: Path) -> tuple[Run, Callable[[], None]]:
        """The model on the target's device, ready to run."""
        import openvino

        path = folder / "tried.xml"
        openvino.save_model(self._without(back), str(path), compress_to_fp16=False)
        threads = self._target.options.threads
        runtime = OpenVino(path, {"device": self._device, "threads": threads, "inference_precision": "f32"})
        names = [spec.name for spec in self._plain.outputs]

        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            return dict(zip(names, runtime(inputs).values(), strict=True))

        return run, runtime.close

    def write(self, back: Mapping[str, str], folder: Path, name: str) -> tuple[Source, Account]:
        """The final model, in memory."""
        model = self._without(back)
        return Source(name, self._plain, self._plain, model=model), self._account(model, back)

    def _account(self, model: Any, back: Mapping[str, str]) -> Account:
        in_bits: Counter[str] = Counter()
        left: dict[tuple[str, str], list[str]] = {}
        for op in _products(model):
            name, kind = op.get_friendly_name(), op.get_type_name()
            reason = back.get(name, self._reasons[name])
            if reason:
                left.setdefault((kind, reason), []).append(self.layer(name))
            else:
                in_bits[kind] += 1
        return Account.of(in_bits, left, _kernels(model, self._device))

    def _without(self, back: Mapping[str, str]) -> Any:
        """A copy of the quantised model in which some operators have their float inputs and weights again."""
        if not back:
            return self._all
        model = self._all.clone()
        exact = {op.get_friendly_name(): op for op in self._float.get_ops()}
        for op in _products(model):
            name = op.get_friendly_name()
            if name not in back:
                continue
            for place, port in enumerate(op.inputs()):
                own = exact[name].input(place).get_source_output()
                if _is_constant(own.get_node()):
                    port.replace_source_output(own)
                else:
                    port.replace_source_output(_before_rounding(port.get_source_output()))
            _restore_bias(op, exact[name])
        model.validate_nodes_and_infer_types()
        return model


def _quantized(model: Any, records: Sequence[Mapping[str, Array]], target: Target) -> Any:
    try:
        import nncf
    except ImportError as error:
        raise TargetError("int8 for OpenVINO needs NNCF: pip install 'compressor[openvino]'") from error
    nncf.set_log_level(logging.ERROR)
    with_attention = any(op.get_type_name() == "ScaledDotProductAttention" for op in model.get_ops())
    method = target.calibration.method
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return nncf.quantize(
                model,
                nncf.Dataset([dict(record) for record in records]),
                subset_size=len(records),
                preset=nncf.QuantizationPreset.MIXED,
                model_type=nncf.ModelType.TRANSFORMER if with_attention else None,
                advanced_parameters=_ranges(nncf, method, target.calibration.percentile),
            )
    except Exception as error:  # NNCF raises many types
        raise ArtifactError(f"NNCF cannot quantise the graph: {first_line(error)}") from error


def _ranges(nncf: Any, method: str, percentile: float) -> Any:
    """Activations' ranges by the target's method; weights take their own largest values always."""
    from nncf.quantization.range_estimator import (
        AggregatorType,
        RangeEstimatorParameters,
        RangeEstimatorParametersSet,
        StatisticsCollectorParameters,
        StatisticsType,
    )

    if method == "percentile":
        outside = 1 - percentile / 100
        collect = StatisticsCollectorParameters(
            statistics_type=StatisticsType.QUANTILE, aggregator_type=AggregatorType.MEAN, quantile_outlier_prob=outside
        )
        chosen = RangeEstimatorParameters(min=collect, max=collect)
    elif method == "entropy":
        chosen = RangeEstimatorParametersSet.HISTOGRAM
    else:
        chosen = RangeEstimatorParametersSet.MINMAX
    return nncf.AdvancedQuantizationParameters(activations_range_estimator_params=chosen)


def _products(model: Any) -> list[Any]:
    return [op for op in model.get_ordered_ops() if op.get_type_name() in _PRODUCTS]


def _reason(op: Any) -> str:
    """Why a product stays in float; "" for one that NNCF has quantised: its data are rounded."""
    sources = [port.get_source_output().get_node() for port in op.inputs()]
    constants = [source for source in sources if _is_constant(source)]
    if any(_holds_integers(source) for source in constants) or any(_is_rounding(source) for source in sources):
        return ""
    return "kernel" if constants else "activations"


def _is_rounding(node: Any) -> bool:
    return str(node.get_type_name()) == "FakeQuantize"


def _holds_integers(node: Any) -> bool:
    """Whether a constant is computed from one of eight bits: a weight that NNCF has rounded."""
    if node.get_type_name() == "Constant":
        return str(node.get_element_type().get_type_name()) in ("i8", "u8")
    return any(_holds_integers(port.get_source_output().get_node()) for port in node.inputs())


def _is_constant(node: Any) -> bool:
    """Whether a node depends on no input of the model."""
    if node.get_type_name() == "Parameter":
        return False
    return all(_is_constant(port.get_source_output().get_node()) for port in node.inputs())


def _before_rounding(value: Any) -> Any:
    """The value before NNCF rounded it, and before it took a factor out of it."""
    node = value.get_node()
    if _is_rounding(node):
        value = node.input(0).get_source_output()
        node = value.get_node()
    return node.input(0).get_source_output() if _SMOOTHING in node.get_friendly_name() else value


def _restore_bias(op: Any, exact: Any) -> None:
    """Take the correction out of the bias: it made up for the rounding."""
    reader, own = _adder(op), _adder(exact)
    if reader is None or own is None:
        return
    for port, exact_port in zip(reader.inputs(), own.inputs(), strict=True):
        if exact_port.get_source_output().get_node().get_type_name() == "Constant":
            port.replace_source_output(exact_port.get_source_output())


def _adder(op: Any) -> Any:
    """The addition of a bias behind a product."""
    readers = [port.get_node() for port in op.output(0).get_target_inputs()]
    return readers[0] if len(readers) == 1 and readers[0].get_type_name() == "Add" else None


def _kernels(model: Any, device: str) -> dict[str, int]:
    """Kernels that run in eight bits on a device, by kind, as the compiled model tells."""
    compiled = shared_core().compile_model(model, device.upper(), {"INFERENCE_PRECISION_HINT": "f32"})
    found: Counter[str] = Counter()
    for op in compiled.get_runtime_model().get_ops():
        facts = op.get_rt_info()
        if facts["runtimePrecision"].astype(str) in ("i8", "u8"):
            found[facts["layerType"].astype(str)] += 1
    return {kind: count for kind, count in found.items() if kind not in ("Const", "Reorder", "Input", "Output")}
