"""Build for TensorRT and TensorRT-RTX: one exporter, for both have the same parser and builder.

TensorRT builds beside the GPU that will run the engine. TensorRT-RTX builds ahead of time, without any GPU, for a
compute capability that the target names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from compressor.deployable import Graph
from compressor.errors import ArtifactError, TargetError
from compressor.exporters.artifact import Built, Source
from compressor.exporters.sparse_weights import WeightZeros, count_zeros
from compressor.profiles.target import Target, engine_for
from compressor.runtimes.gpu import nvidia_gpu
from compressor.runtimes.manifest import Engine
from compressor.runtimes.runtime import TensorSpec
from compressor.runtimes.tensorrt import engine_messages, import_tensorrt, tensorrt_logger

__all__ = ["build", "check_axes"]


def check_axes(name: str, graph: Graph, target: Target) -> None:
    """Check that the target knows the sizes of all free axes, before anything is made for it.

    Raises:
        TargetError: It does not; the message says which keys to set.
    """
    known = {"batch", *target.axes}
    missing = sorted({label for axes in graph.dynamic.values() for label in axes.values()} - known)
    if missing:
        axes = " and ".join(missing) if len(missing) < 3 else f"{', '.join(missing[:-1])} and {missing[-1]}"
        keys = ", ".join(f"axes.{axis} = [min, opt, max]" for axis in missing)
        raise TargetError(
            f"graph {name!r} has the free {'axis' if len(missing) == 1 else 'axes'} {axes}, whose sizes TensorRT must "
            f"know: set {keys} in the target's file"
        )


def build(source: Source, target: Target, directory: Path) -> Built:
    """Write ``NAME.engine``: strongly typed, with an optimisation profile of the target's batch sizes.

    Raises:
        TargetError: No TensorRT here, or it cannot build for the target's GPU.
        ArtifactError: The parser or the builder refuses the graph; the message names the operation.
    """
    kind = engine_for(target)
    trt = import_tensorrt(kind)
    logger = tensorrt_logger(kind)
    logger.errors.clear()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(source.typed.path)):
        raise ArtifactError(f"{_title(kind)} cannot read graph {source.name!r}: {_parser_errors(parser)}")
    config = builder.create_builder_config()
    capability = _set_device(trt, config, kind, target)
    if target.options.optimization_level is not None:
        config.builder_optimization_level = target.options.optimization_level
    if target.options.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, target.options.workspace_mb * 10**6)
    zeros = count_zeros(source.plain.load())
    sparse = target.options.sparse_weights == "on" or (
        target.options.sparse_weights == "auto" and zeros.two_of_four > 0
    )
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    _add_profile(builder, config, source, target)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ArtifactError(f"{_title(kind)} cannot build graph {source.name!r}: {engine_messages(kind)}")
    path = directory / f"{source.name}.engine"
    path.write_bytes(memoryview(plan))
    ahead = kind == "tensorrt-rtx"
    engine = Engine(name=kind, version=str(trt.__version__), compute_capability=capability, ahead_of_time=ahead)
    return Built(path.name, engine, notes=(*_notes(target, kind, capability), *_sparse_notes(zeros, sparse)))


def _set_device(trt: ModuleType, config: Any, kind: str, target: Target) -> str | None:
    """Say which GPU to build for; give its compute capability."""
    gpu = nvidia_gpu()
    if kind == "tensorrt":
        return gpu.compute_capability if gpu is not None else None
    wanted = target.compute_capability or (gpu.compute_capability if gpu is not None else None)
    known = {name: value for name, value in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    name = f"SM{(wanted or '').replace('.', '')}"
    if name not in known:
        offered = ", ".join(f"{label[2:-1]}.{label[-1]}" for label in sorted(known, key=lambda label: int(label[2:])))
        raise TargetError(f"TensorRT-RTX builds for compute capability {offered}; target {target.name} says {wanted}")
    config.num_compute_capabilities = 1
    config.set_compute_capability(known[name], 0)
    return wanted


def _add_profile(builder: Any, config: Any, source: Source, target: Target) -> None:
    """Give every free axis the target's sizes."""
    if not any(isinstance(size, str) for spec in source.typed.inputs for size in spec.shape):
        return
    profile, batch = builder.create_optimization_profile(), target.batch
    sizes = {"batch": (batch.min, batch.opt, batch.max), **target.axes}
    for spec in source.typed.inputs:
        profile.set_shape(spec.name, *(_sized(spec, sizes, place, source.name) for place in range(3)))
    if config.add_optimization_profile(profile) < 0:
        raise TargetError(f"target {target.name}: its sizes do not fit graph {source.name!r}")


def _sized(spec: TensorSpec, sizes: Mapping[str, tuple[int, int, int]], place: int, graph: str) -> tuple[int, ...]:
    """A shape with the smallest, usual or largest size (place 0, 1, 2) of every free axis."""
    other = [size for size in spec.shape if isinstance(size, str) and size not in sizes]
    if other:
        raise TargetError(
            f"graph {graph!r}: input {spec.name!r} has the free axis {other[0]!r}; TensorRT wants its sizes: set "
            f"axes.{other[0]} = [min, opt, max] in the target"
        )
    return tuple(sizes[size][place] if isinstance(size, str) else size for size in spec.shape)


def _parser_errors(parser: Any) -> str:
    first = parser.get_error(0) if parser.num_errors else None
    if first is None:
        return "no reason given"
    return f"{first.node_operator()} ({first.node_name()}): {' '.join(first.desc().split())}"


def _notes(target: Target, kind: str, capability: str | None) -> tuple[str, ...]:
    if kind == "tensorrt" or target.runtime == "tensorrt-rtx":
        return ()
    return (
        f"Built ahead of time by TensorRT-RTX for compute capability {capability}, because TensorRT is not installed "
        "beside a GPU here; it needs TensorRT-RTX to run.",
    )


def _sparse_notes(zeros: WeightZeros, sparse: bool) -> tuple[str, ...]:
    """What zeros in the weights buy: the builder chooses the tactics itself, by timing on the GPU."""
    if not zeros.half_zero:
        return ()
    if sparse:
        used = "the engine may use sparse tensor cores (Ampere and newer) where they are faster"
    else:
        used = "the engine computes them like all others: only 2:4 has tactics, and options.sparse_weights allows them"
    return (f"{zeros.said}; {used}.",)


def _title(kind: str) -> str:
    return "TensorRT" if kind == "tensorrt" else "TensorRT-RTX"
