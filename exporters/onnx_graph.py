"""From a torch module to one ONNX file: evaluation mode, named inputs and outputs, dynamic axes that were tried."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.deployable import Graph
from compressor.errors import ArtifactError, CompressorError, RequestError, first_line
from compressor.exporters.free_sizes import other_sizes, resized, said
from compressor.exporters.interpreter import Interpreter
from compressor.exporters.layers import LAYER_KEY
from compressor.exporters.model_file import read_model, with_weights_beside, write_model
from compressor.exporters.parity import TOLERANCES, compare
from compressor.exporters.tied_entries import OrderError, compare_sorted, possible_scores
from compressor.exporters.torchscript_route import ROUTE_KEY, TORCHSCRIPT, other_values, trace_torchscript
from compressor.runtimes.runtime import Array, TensorSpec

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn

    from compressor.exporters.replacements import Replacement

__all__ = ["OPSET", "OnnxGraph", "evaluation_form", "export_onnx", "module_outputs"]

OPSET = 20


@dataclass(frozen=True)
class OnnxGraph:
    """An exported graph on disk.

    Attributes:
        path: The ONNX file; above 1.5 GB its weights lie beside it in ``NAME.data``.
        inputs: Inputs, a string in a shape names a dynamic axis.
        outputs: Outputs, likewise.
        opset: ONNX opset.
        route: Exporter that made it: "torch.export", or "torchscript" where that could not.
    """

    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int = OPSET
    route: str = "torch.export"

    @classmethod
    def read(cls, path: Path) -> OnnxGraph:
        """Describe an ONNX file."""
        import onnx

        model = onnx.load(str(path), load_external_data=False)
        opset = next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
        inputs, outputs = _specs(model.graph.input), _specs(model.graph.output)
        route = next((item.value for item in model.metadata_props if item.key == ROUTE_KEY), cls.route)
        return cls(path, inputs, outputs, opset, route)

    def load(self) -> ModelProto:
        """The graph in memory; weights in a side file stay there (`model_file`)."""
        return read_model(self.path)


def export_onnx(
    graph: Graph,
    path: Path,
    *,
    name: str = "graph",
    replacements: list[Replacement] | None = None,
    inline_limit: int | None = None,
) -> OnnxGraph:
    """Export a graph to ONNX in float32 and verify it: valid, equal to the module, dynamic where declared.

    The module keeps its weights, its training mode and its device.

    Args:
        graph: Module, example inputs, names, dynamic axes.
        path: The file to write.
        name: What the graph is called in messages.
        replacements: Export-time replacements; None means all registered.
        inline_limit: Bytes of weights above which they lie in a file beside the graph; 1.5 GB by default.

    Returns:
        The exported graph.

    Raises:
        RequestError: The example inputs or output names do not fit the module.
        ArtifactError: The module cannot be expressed in ONNX, or an axis declared dynamic is not.
    """
    from compressor.exporters.replacements import replaced

    with evaluation_form(graph) as plain, _quiet():
        _check_example(plain, name)
        with replaced(plain.module, plain.inputs, replacements):
            path.parent.mkdir(parents=True, exist_ok=True)
            model = _convert(plain, name, path, inline_limit)
        _name_axes(model, plain)
        write_model(model, path, inline_limit)
        exported = OnnxGraph.read(path)
        _verify(exported, plain, name)
    return exported


@contextlib.contextmanager
def evaluation_form(graph: Graph) -> Iterator[Graph]:
    """The graph with its module in evaluation mode, float32, on the CPU, masks and other parametrisations folded.

    The module itself is used where that changes nothing but its mode, which is restored; otherwise a copy.
    """
    from torch.nn.utils import parametrize

    module = graph.module
    tensors = [*module.parameters(), *module.buffers()]
    foreign = any(tensor.device.type != "cpu" or _single_precision(tensor) != tensor.dtype for tensor in tensors)
    parametrized = [part for part in module.modules() if parametrize.is_parametrized(part)]
    if foreign or parametrized:
        # Module.to would make complex tables real
        module = copy.deepcopy(module)._apply(lambda tensor: tensor.to("cpu", _single_precision(tensor)))
        for part in list(module.modules()):
            if parametrize.is_parametrized(part):
                for tensor_name in list(part.parametrizations):  # type: ignore[arg-type]
                    parametrize.remove_parametrizations(part, tensor_name, leave_parametrized=True)
    modes = [(part, part.training) for part in module.modules()]
    inputs = {
        key: value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()
        for key, value in graph.inputs.items()
    }
    try:
        for part, _ in modes:
            part.training = False  # some modules ignore eval()
        yield Graph(module, inputs, graph.outputs, graph.dynamic, graph.keep_fp32)
    finally:
        for part, mode in modes:
            part.training = mode


def _single_precision(tensor: Any) -> Any:
    """The 32-bit type of a tensor's numbers, real or complex; whole numbers keep theirs."""
    import torch

    if tensor.is_complex():
        return torch.complex64
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


def module_outputs(graph: Graph, inputs: Mapping[str, Array], name: str = "graph") -> dict[str, Array]:
    """What the module of an `evaluation_form` gives for some inputs, by output name.

    Raises:
        RequestError: The module returns another number of tensors than it has output names.
    """
    import torch

    given = {}
    for key, example in graph.inputs.items():
        given[key] = torch.from_numpy(np.array(inputs[key])).to(example.dtype)
    with torch.no_grad():
        result = graph.module(**given)
    values = result if isinstance(result, (tuple, list)) else (result,)
    if len(values) != len(graph.outputs) or not all(isinstance(value, torch.Tensor) for value in values):
        raise RequestError(
            f"graph {name!r} returns {len(values)} values, but the outputs are named {', '.join(graph.outputs)}: "
            "return one tensor a name"
        )
    return {key: value.numpy() for key, value in zip(graph.outputs, values, strict=True)}


def _check_example(graph: Graph, name: str) -> None:
    unknown = [key for key in graph.dynamic if key not in graph.inputs]
    if unknown:
        raise RequestError(f"graph {name!r} declares dynamic axes of {unknown[0]!r}, which is no input of it")
    for key, axes in graph.dynamic.items():
        shape = graph.inputs[key].shape
        for axis, label in axes.items():
            if axis >= len(shape):
                raise RequestError(f"graph {name!r}: input {key!r} has no axis {axis} (its shape is {tuple(shape)})")
            if shape[axis] < 2:
                raise RequestError(
                    f"graph {name!r}: the example of {key!r} has size {shape[axis]} on its dynamic axis {label!r}; "
                    "give at least 2"
                )
    example = {key: value.numpy() for key, value in graph.inputs.items()}
    try:
        first, second = (module_outputs(graph, example, name) for _ in range(2))
    except CompressorError:
        raise
    except Exception as error:  # user code
        raise RequestError(f"graph {name!r} does not run on its example inputs: {first_line(error)}") from error
    if any(first[key].shape != value.shape or _unlike(first[key], value) for key, value in second.items()):
        raise RequestError(
            f"graph {name!r} gives other outputs for the same inputs each time: dropout that is on in evaluation "
            "(F.dropout without training=self.training) or noise drawn inside; make noise an input of the graph"
        )


def _unlike(first: Array, second: Array) -> bool:
    """True for a difference that no order of summation explains."""
    return not compare({"": first}, {"": second}, TOLERANCES["fp32"], "").relative <= TOLERANCES["fp32"]


def _convert(graph: Graph, name: str, path: Path, inline_limit: int | None) -> ModelProto:
    import torch

    from compressor.exporters.complex_values import in_real_pairs
    from compressor.exporters.simplify import simplify
    from compressor.exporters.traced_program import (
        fold_constants,
        free_lengths,
        has_complex_values,
        repair_attention,
        repair_squeezes,
    )

    try:
        with free_lengths(graph.module):
            program = _trace(graph.module, graph)
        if has_complex_values(program):
            folded = fold_constants(program)
            in_real_pairs(folded)
            program = _trace(folded, graph)
        repair_squeezes(program)
        repair_attention(program)
        result = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            optimize=False,
            verbose=False,
        )
        simplify(result.model)  # type: ignore[union-attr]
    except CompressorError:
        raise
    except Exception as error:  # torch raises many types
        traced = _traced(graph) if _depends_on_values(error) else None
        if traced is None:
            raise ArtifactError(f"graph {name!r} cannot be exported to ONNX: {_explain(error)}") from error
        return traced
    return _cleaned(with_weights_beside(result.model, path, inline_limit))  # type: ignore[union-attr]


def _traced(graph: Graph) -> ModelProto | None:
    """The graph by the second route; None where that fails too: the first one's reason is the better one."""
    try:
        model = _cleaned(trace_torchscript(graph, OPSET))
    except Exception:  # torch raises many types
        return None
    entry = model.metadata_props.add()
    entry.key, entry.value = ROUTE_KEY, TORCHSCRIPT
    return model


def _trace(module: nn.Module, graph: Graph) -> Any:
    """Trace with the named axes; where their sizes obey a relation that a plain name cannot say, let torch find it."""
    import torch

    names = {label for axes in graph.dynamic.values() for label in axes.values()}
    named = {label: torch.export.Dim(label) for label in names}
    for dims in (named, dict.fromkeys(names, torch.export.Dim.DYNAMIC)):
        shapes: dict[str, Any] = {
            key: {axis: dims[label] for axis, label in graph.dynamic.get(key, {}).items()} or None
            for key in graph.inputs
        }
        try:
            with torch.no_grad():
                return torch.export.export(
                    module, (), kwargs=dict(graph.inputs), dynamic_shapes=shapes if names else None, strict=False
                )
        except torch._dynamo.exc.UserError:
            if dims is not named:
                raise
    raise AssertionError("unreachable")


def _cleaned(model: ModelProto) -> ModelProto:
    """Drop what describes the machine that exported: stack traces with its paths, source texts."""
    if model.functions:
        from onnx.inliner import inline_local_functions

        model = inline_local_functions(model)
    del model.metadata_props[:]
    model.graph.doc_string = model.doc_string = ""
    for node in model.graph.node:
        kept = [item for item in node.metadata_props if item.key == LAYER_KEY]
        node.doc_string = ""
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    return model


def _name_axes(model: ModelProto, graph: Graph) -> None:
    """Give the dynamic axes of inputs and outputs the declared names, where tracing has found its own."""
    own: dict[str, str] = {}
    for value in model.graph.input:
        for axis, label in graph.dynamic.get(value.name, {}).items():
            dim = value.type.tensor_type.shape.dim[axis]
            if dim.dim_param and dim.dim_param != label:
                own[dim.dim_param] = label
    if not own:
        return
    symbols = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in own))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = symbols.sub(lambda found: own[found.group()], dim.dim_param)


def _verify(exported: OnnxGraph, graph: Graph, name: str) -> None:
    """Compare with the module at the example's sizes, at 1 and at other sizes of every dynamic axis.

    A graph that was traced may have fixed a branch that other values do not take, so those are tried too.
    """
    run, scores = Interpreter(exported.path), possible_scores(exported.path)
    example = {key: value.numpy() for key, value in graph.inputs.items()}
    for size in ({}, *other_sizes(example, graph.dynamic)):
        where = f" at {said(size)}" if size else ""
        inputs = resized(example, graph.dynamic, size)
        try:
            expected = module_outputs(graph, inputs)
        except Exception as error:  # user code
            raise RequestError(f"graph {name!r}: the module itself fails{where}: {first_line(error)}") from error
        try:
            parity = compare_sorted(expected, run(inputs), TOLERANCES["fp32"], run.name, scores)
        except ArtifactError as error:
            raise ArtifactError(f"graph {name!r} does not hold{where}: {error}") from error
        if not parity.relative <= parity.tolerance:
            raise ArtifactError(
                f"graph {name!r}: output {parity.output!r} of the exported graph differs from the module's by "
                f"{parity.relative:.1e} of its scale{where} (allowed: {parity.tolerance:.0e})"
            )
    if exported.route == TORCHSCRIPT:
        _verify_values(run, graph, example, name, scores)


def _verify_values(
    run: Interpreter, graph: Graph, example: Mapping[str, Array], name: str, scores: tuple[str, ...]
) -> None:
    for inputs in other_values(example):
        expected = module_outputs(graph, inputs)
        try:
            parity = compare_sorted(expected, run(inputs), TOLERANCES["fp32"], run.name, scores)
        except OrderError as error:
            raise ArtifactError(f"graph {name!r} gives something else for other values: {error}") from error
        except ArtifactError as error:
            raise ArtifactError(f"graph {name!r} holds for its example alone: with other values {error}") from error
        if not parity.relative <= parity.tolerance:
            raise ArtifactError(
                f"graph {name!r} holds for its example alone: with other values output {parity.output!r} differs by "
                f"{parity.relative:.1e} of its scale; a branch of the module depends on values: use torch.where"
            )


def _specs(values: Any) -> tuple[TensorSpec, ...]:
    from onnx.helper import tensor_dtype_to_np_dtype

    specs = []
    for value in values:
        kind = value.type.tensor_type
        shape = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
        specs.append(TensorSpec(value.name, shape, np.dtype(tensor_dtype_to_np_dtype(kind.elem_type)).name))
    return tuple(specs)


def _causes(error: BaseException) -> list[BaseException]:
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    return causes


def _fixes_a_size(error: BaseException) -> bool:
    """True where the module computes with a number in place of a size that was declared dynamic."""
    return any("specializ" in str(item) or "Constraints violated" in str(item) for item in _causes(error))


def _depends_on_values(error: BaseException) -> bool:
    """True where torch.export had to decide something that only the values of a tensor tell."""
    return any("data-dependent" in str(item) or "DataDependent" in type(item).__name__ for item in _causes(error))


def _explain(error: BaseException) -> str:
    """One line for the deepest cause that says something to a person."""
    causes = _causes(error)
    for item in causes:
        text = str(item)
        if "No ONNX function found for" in text:
            operator = text.partition("op='")[2].partition("'")[0] or "an operator"
            if "complex" in text:
                return (
                    f"{operator} works on complex numbers, which ONNX has not: give the graph's module a real form, "
                    "or register one in compressor.exporters.replacements"
                )
            return f"ONNX has no translation of {operator}: leave it out of the graph's module"
        if _fixes_a_size(item):
            axis = re.search(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]", text)
            which = f"axis {axis[2]} of input {axis[1]!r}" if axis else "an axis"
            return (
                f"{which} is declared dynamic, but the module fixes its size: compute with x.shape, not with a number"
            )
    return first_line(causes[-1] if "Failed to convert the exported program" in str(error) else error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and advice off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        silent = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
