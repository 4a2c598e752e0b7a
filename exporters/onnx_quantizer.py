"""The quantiser of ONNX Runtime, TensorRT and TensorRT-RTX targets: ONNX graphs with pairs of quantisation."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto

from compressor.exporters.artifact import Source
from compressor.exporters.float8_graph import to_float8
from compressor.exporters.half_arithmetic import rounding_graph
from compressor.exporters.interpreter import Interpreter
from compressor.exporters.layers import layer_of
from compressor.exporters.model_file import values_of, write_model
from compressor.exporters.onnx_graph import OnnxGraph
from compressor.exporters.quantization import QdqQuantizer, QdqScheme
from compressor.exporters.quantized_export import Account
from compressor.exporters.quantized_operators import QuantizedOperators
from compressor.exporters.typed_graph import FLOAT16, MOVES, float_values, normalised, type_graph
from compressor.profiles.target import Target
from compressor.runtimes.runtime import Array, Run

__all__ = ["OnnxQuantizer"]

_KERNELS = frozenset({
    "QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger", "QLinearAdd",
    "QLinearMul", "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearConcat", "QLinearSigmoid",
    "QLinearLeakyRelu",
})  # fmt: skip
"""ONNX Runtime's 8-bit kernels."""
_FLOAT_PRODUCTS = frozenset({"Conv", "FusedConv", "MatMul", "FusedMatMul", "Gemm", "FusedGemm"})


class OnnxQuantizer:
    """Quantises for engines that read ONNX.

    Args:
        plain: The exported float32 graph.
        records: Inputs that it really gets.
        target: Precision, method, device.
        engine: "onnxruntime", "tensorrt" or "tensorrt-rtx".
        can_run: The engine runs here, so that it can judge itself; else the graph's arithmetic is computed as written.
        kept: Nodes that stay in float32 where the rest is in halves.
    """

    by = "ONNX Runtime"

    def __init__(
        self,
        plain: OnnxGraph,
        records: Sequence[Mapping[str, Array]],
        target: Target,
        engine: str,
        can_run: bool,
        kept: Collection[str] = (),
    ) -> None:
        self._plain, self._target, self._kept = plain, target, frozenset(kept)
        self._itself = engine == "onnxruntime" and can_run
        scheme = QdqScheme.of(engine, target.device)
        settings = target.calibration
        if target.precision == "fp8":
            settings = settings.model_copy(update={"per_channel": False})
        self._quantizer = QdqQuantizer(plain.load(), records, settings, scheme)
        self.model = self._quantizer.model
        self._layers = {node.name: layer_of(node) for node in self.model.graph.node}
        self.judged_by = f"ONNX Runtime on {target.device}" if self._itself else "8-bit arithmetic simulated on the CPU"
        self._refused: dict[str, str] = {}
        self._last: tuple[object, ModelProto] | None = None
        self._cpu = engine == "onnxruntime" and target.device == "cpu" and can_run
        if self._cpu:
            chosen = self._quantizer.choose({})
            _, unused = _kernels(self._make({}))
            self._refused = {name: "kernel" for name in chosen.products if name in unused}

    def operators(self) -> Mapping[str, str]:
        """The products by name, and why they stay in float."""
        chosen = self._quantizer.choose(self._refused)
        return {
            node.name: chosen.left.get(node.name, "")
            for node in self.model.graph.node
            if node.name in chosen.left or node.name in chosen.products
        }

    def layer(self, operator: str) -> str:
        """Path of the module that a product stems from; its own name where that is unknown."""
        return self._layers.get(operator) or operator

    def open(self, back: Mapping[str, str], folder: Path) -> tuple[Run, Callable[[], None]]:
        """The graph as the engine will get it, ready to run."""
        model = self._make(back)
        if not self._itself:
            return Interpreter(rounding_graph(model)), lambda: None
        from compressor.runtimes.load import open_graph, runtime_options

        path = folder / "tried.onnx"
        write_model(model, path)
        runtime = open_graph(path, "onnxruntime", runtime_options(self._target.model_dump()))
        return runtime, runtime.close

    def write(self, back: Mapping[str, str], folder: Path, name: str) -> tuple[Source, Account]:
        """The final graph, in a file of the folder."""
        model = self._make(back)
        path = folder / f"{name}.onnx"
        write_model(model, path)
        source = Source(name, self._plain, OnnxGraph.read(path))
        return source, self._account(back, _kernels(model)[0] if self._cpu else {})

    def _account(self, back: Mapping[str, str], kernels: Mapping[str, int]) -> Account:
        """What is in eight bits and what is not, by kind and reason; moves and shapes are left out."""
        chosen = self._quantizer.choose(self._refused | dict(back))
        floats, in_bits = float_values(self.model.graph), set(chosen.all)
        counts: Counter[str] = Counter()
        left: dict[tuple[str, str], list[str]] = {}
        for node in self.model.graph.node:
            if node.name in in_bits:
                counts[node.op_type] += 1
            elif node.op_type not in MOVES and floats.intersection(node.output):
                left.setdefault((node.op_type, chosen.left.get(node.name, "between")), []).append(layer_of(node))
        return Account.of(counts, left, kernels)

    def _make(self, back: Mapping[str, str]) -> ModelProto:
        """The graph with some products in float; what is tried last is often what is written, so that one is kept."""
        chosen = self._quantizer.choose(self._refused | dict(back))
        operators = (chosen.products, chosen.between, chosen.rounded)
        if self._last is None or self._last[0] != operators:
            self._last = None  # before the next one: both may be large
            self._last = operators, self._quantized(chosen)
        return self._last[1]

    def _quantized(self, chosen: QuantizedOperators) -> ModelProto:
        model = self._quantizer.quantize(chosen)
        if self._target.precision == "fp8":
            weights = {t.name: t for t in self.model.graph.initializer}
            model = to_float8(model, weights)
        if self._target.rest == "fp16":
            model = normalised(model)
            model = type_graph(model, self._kept | _fine_pairs(model))
        return model


def _fine_pairs(model: ModelProto) -> set[str]:
    """Pairs whose scale has too few digits in a half: they stay in float32."""
    fine = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and _smallest(values_of(tensor)) < FLOAT16.smallest
    }
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    return {node.name for node in pairs if node.input[1] in fine}


def _smallest(values: Array) -> float:
    return float(np.abs(values).min(initial=np.inf))


def _kernels(model: ModelProto) -> tuple[dict[str, int], set[str]]:
    """ONNX Runtime's 8-bit kernels for a graph on this CPU, and the products that it left in float between pairs."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path, chosen = Path(folder) / "graph.onnx", Path(folder) / "chosen.onnx"
        write_model(model, path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(chosen)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "chosen.data")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(str(chosen), load_external_data=False).graph
    rounded = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    products = [node for node in graph.node if node.op_type in _FLOAT_PRODUCTS and rounded.intersection(node.input)]
    unused = {node.name.removeprefix("fused ") for node in products}
    return dict(Counter(node.op_type for node in graph.node if node.op_type in _KERNELS)), unused
