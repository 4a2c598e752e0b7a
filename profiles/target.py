"""Targets: what an artifact is built for. A target is a TOML file; this module reads, checks and judges it.

Built-in targets lie in ``targets/*.toml``. A user's own file is given by its path (``./jetson.toml``). A package may
bring more through the entry-point group ``compressor.targets``: the value is a function that returns a `Target`, or the
path of a TOML file.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from compressor.errors import RequestError, nearest
from compressor.runtimes.gpu import RTX_CAPABILITIES, nvidia_gpu

__all__ = [
    "Availability",
    "Batch",
    "Calibration",
    "Options",
    "Target",
    "availability",
    "engine_for",
    "load_target",
    "target_names",
    "with_overrides",
]

PRECISIONS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "fp16", "int8"),
    "tensorrt": ("fp32", "fp16", "bf16", "int8", "fp8"),
    "tensorrt-rtx": ("fp32", "fp16", "bf16", "int8", "fp8"),
    "torch": ("fp32", "fp16"),
    "torch-compile": ("fp32", "fp16"),
    "torch-tensorrt": ("fp32", "fp16"),
}
"""What the exporters make for each runtime."""
RUNTIMES = tuple(PRECISIONS)
QUANTIZED = ("int8", "fp8")
"""Precisions that need calibration."""
FIRST_CAPABILITY = {"bf16": "8.0", "fp8": "8.9"}
"""First compute capability that has a precision's arithmetic."""
_EXTRAS = {"nncf": "openvino", "onnxruntime": "ort"}
_FOLDER = Path(__file__).parent / "targets"
_GROUP = "compressor.targets"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Batch(_Section):
    """Batch sizes: what the engine must accept, what it is tuned for, what is measured."""

    min: int = Field(default=1, ge=1)
    """Smallest batch size that the engine accepts."""
    opt: int = Field(default=1, ge=1)
    """Batch size that the engine is tuned for."""
    max: int = Field(default=16, ge=1)
    """Largest batch size that the engine accepts."""
    benchmark: tuple[int, ...] = (1, 8)
    """Batch sizes to measure, unless the recipe names its own."""

    @model_validator(mode="after")
    def _ordered(self) -> Batch:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"needs min <= opt <= max, got {self.min}, {self.opt}, {self.max}")
        outside = [size for size in self.benchmark if not self.min <= size <= self.max]
        if outside:
            raise ValueError(
                f"benchmark sizes {outside} lie outside min to max ({self.min} to {self.max}): set batch.benchmark too"
            )
        return self


class Calibration(_Section):
    """How an 8-bit graph gets its ranges, and how much it may cost."""

    samples: int = Field(default=256, ge=1)
    """Samples of the training data that the driver runs while each graph's inputs are recorded."""
    method: Literal["minmax", "entropy", "percentile"] = "minmax"
    """Range of an activation: all that was seen, the range that loses the least information, or a percentile."""
    percentile: float = Field(default=99.99, gt=50, le=100)
    """The percentile, in percent of the recorded values."""
    per_channel: bool = True
    """One scale for each output channel of a weight; fp8 has one a weight."""
    weight_bits: Literal[7, 8] = 8
    """Bits of ONNX Runtime's weights: with 8, products saturate on x86 CPUs without VNNI."""
    max_drop: float = Field(default=0.01, ge=0)
    """Largest loss of the task's headline figures: 0.01 is a point of a share (accuracy), a hundredth of other ones."""
    max_error: float = Field(default=0.1, gt=0)
    """Largest root-mean-square difference of an output over its root mean square, where the task gives no figure."""
    judged_samples: int = Field(default=500, ge=10)
    """Samples of the validation data that the figures are taken on while operators are chosen."""
    exclude: tuple[str, ...] = ()
    """Layers that stay in float, with all in them: paths of modules in the model, with * and ?, e.g. "blocks.*.mlp"."""
    seconds: float = Field(default=300.0, gt=0)
    """Time for ranking the operators of a graph that lost too much; those not reached by then count as harmless."""


class Options(_Section):
    """What the engine is told when it builds and loads the graph."""

    threads: int = Field(default=0, ge=0)
    """Threads of one inference on a CPU; 0 leaves it to the engine."""
    providers: tuple[str, ...] = ()
    """ONNX Runtime execution providers in order of preference; empty chooses by ``device``."""
    provider_options: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Options of ONNX Runtime's providers, by provider."""
    inference_precision: Literal["", "f32", "f16", "bf16"] = ""
    """Precision hint for OpenVINO; empty follows the target's precision. A device without it uses float32."""
    properties: dict[str, str] = Field(default_factory=dict)
    """Further properties for OpenVINO's ``compile_model``, as they are."""
    static_shapes: int | None = Field(default=None, ge=0)
    """OpenVINO: so many input shapes get a compiled model of their own when they come again. It can be several times
    faster than the one for any shape, and costs that call and memory; None is 4 below 64 MB of weights, else 0."""
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    """TensorRT's builder optimisation level; None is its default (3)."""
    workspace_mb: int | None = Field(default=None, ge=1)
    """Limit of TensorRT's scratch memory while it builds, in MB; None is no limit."""
    sparse_weights: Literal["auto", "on", "off"] = "auto"
    """Use of zeros in the weights. TensorRT's 2:4 tactics: auto allows them where weights are 2:4. OpenVINO's sparse
    decompression: auto uses it where it is measured to be faster on this machine's CPU, on wherever it runs."""


class Target(_Section):
    """One target: runtime, precision, device, shapes and options."""

    name: str = ""
    """Name, ``runtime-precision`` by custom; the file's name by default."""
    description: str = ""
    """One line for `compress targets`."""
    runtime: str
    """Engine: onnxruntime, openvino, tensorrt, tensorrt-rtx; or torch, torch-compile, torch-tensorrt, which have no
    artifact: the student itself is measured."""
    precision: Literal["fp32", "fp16", "bf16", "int8", "fp8"] = "fp32"
    """Element type: fp32, fp16 and bf16 are the graph's, strongly typed with float32 islands; int8, fp8 its products'.
    Inputs and outputs stay float32."""
    rest: Literal["fp32", "fp16"] = "fp32"
    """Element type of what an int8 or fp8 graph does not quantise; fp16 for TensorRT alone."""
    device: str = "cpu"
    """Where it runs: cpu, cuda, cuda:N; for OpenVINO also gpu, npu, auto."""
    compute_capability: str | None = None
    """GPU that an engine is built for when it is built without one, e.g. "8.9"; None is the GPU of this machine."""
    batch: Batch = Field(default_factory=Batch)
    """Batch sizes."""
    axes: dict[str, tuple[int, int, int]] = Field(default_factory=dict)
    """Sizes of other free axes by name (height, width): smallest, tuned for, largest. TensorRT has to be told."""
    calibration: Calibration = Field(default_factory=Calibration)
    """Ranges of 8-bit graphs."""
    options: Options = Field(default_factory=Options)
    """Engine options."""

    @field_validator("runtime")
    @classmethod
    def _known_runtime(cls, value: str) -> str:
        if value not in RUNTIMES:
            raise ValueError(f"no runtime {value!r}: {nearest(value, RUNTIMES)}")
        return value

    @field_validator("compute_capability")
    @classmethod
    def _well_formed(cls, value: str | None) -> str | None:
        if value is not None and not (value.count(".") == 1 and value.replace(".", "").isdigit()):
            raise ValueError(f'must look like "8.9", got {value!r}')
        return value

    @field_validator("axes")
    @classmethod
    def _ordered_axes(cls, value: dict[str, tuple[int, int, int]]) -> dict[str, tuple[int, int, int]]:
        for name, (low, middle, high) in value.items():
            if name == "batch":
                raise ValueError("the axis batch has its own section: set batch.min, batch.opt and batch.max")
            if not 1 <= low <= middle <= high:
                raise ValueError(f"axis {name} needs 1 <= min <= opt <= max, got {low}, {middle}, {high}")
        return value

    @model_validator(mode="after")
    def _half_rest_is_typed(self) -> Target:
        if self.rest == "fp16" and not (self.quantized and self.runtime.startswith("tensorrt")):
            raise ValueError('rest = "fp16" is for int8 and fp8 graphs of TensorRT and TensorRT-RTX')
        return self

    @property
    def quantized(self) -> bool:
        """Whether its graphs need calibration."""
        return self.precision in QUANTIZED

    @property
    def has_artifact(self) -> bool:
        """False for PyTorch's runtimes: there is nothing to export, the student itself is what runs."""
        return not self.runtime.startswith("torch")


@dataclass(frozen=True)
class Availability:
    """Whether a target can be built and run on this machine.

    Attributes:
        can_build: An artifact can be made here.
        can_run: The artifact can be run, and so measured, here.
        reason: Why not, or what is special about it; empty where all is well.
        install_hint: What to install so that it can; empty where nothing helps or nothing is missing.
        engine: What builds it here: "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx" or "torch".
    """

    can_build: bool
    can_run: bool
    reason: str = ""
    install_hint: str = ""
    engine: str = ""


def target_names() -> list[str]:
    """Names of all built-in and installed targets, sorted."""
    return sorted({*(path.stem for path in _FOLDER.glob("*.toml")), *_entry_points()})


def load_target(spec: str | Path) -> Target:
    """Load a target by its name, or from the user's own TOML file.

    Args:
        spec: A name ("trt-fp16") or a path; what ends in ``.toml`` or holds a separator is a path.

    Raises:
        RequestError: No such target or file, or the file is not a valid target.
    """
    text = str(spec)
    if text.endswith(".toml") or "/" in text or "\\" in text:
        return _read(Path(text))
    if (_FOLDER / f"{text}.toml").is_file():
        return _read(_FOLDER / f"{text}.toml")
    entry = _entry_points().get(text)
    if entry is not None:
        return _from_entry_point(text, entry)
    hint = nearest(text, target_names())
    raise RequestError(f"no target {text!r}: {hint}; your own target is given by its path, e.g. ./{text}.toml")


def with_overrides(target: Target, overrides: Mapping[str, Any]) -> Target:
    """A copy of ``target`` with some keys replaced.

    Args:
        target: The target to start from.
        overrides: Values by key; a dot goes into a section: ``{"precision": "fp32", "batch.max": 8}``.

    Raises:
        RequestError: Unknown key or impossible value.
    """
    values = target.model_dump()
    for key, value in overrides.items():
        place, model = values, Target.model_fields
        *sections, last = key.split(".")
        for section in sections:
            if not isinstance(place.get(section), dict):
                raise RequestError(f"target {target.name}: no key {key!r}: {nearest(key, _keys())}")
            place = place[section]
        if last not in place and not sections and last not in model:
            raise RequestError(f"target {target.name}: no key {key!r}: {nearest(key, _keys())}")
        place[last] = value
    return _validated(values, f"target {target.name}")


def availability(target: Target) -> Availability:
    """Say whether ``target`` can be built and run here, and if not, why and what to install."""
    made = PRECISIONS[target.runtime]
    if target.precision not in made:
        reason = f"{target.runtime} gets no {target.precision}: use {' or '.join(made)}"
        return Availability(False, False, reason, engine=engine_for(target))
    if not target.has_artifact:
        return _torch(target)
    check = {"onnxruntime": _onnxruntime, "openvino": _openvino}.get(target.runtime, _tensorrt)
    found = check(target)
    quantizer = {"openvino": "nncf"}.get(target.runtime, "onnxruntime") if target.quantized else None
    for extra, names in (("train", ("torch", "onnx", "onnxscript")), (_EXTRAS.get(quantizer or ""), (quantizer,))):
        missing = [name for name in names if name and not _installed(name)]
        if missing and found.can_build:
            reason = f"building needs {', '.join(missing)}"
            return Availability(False, found.can_run, reason, f"pip install 'compressor[{extra}]'", found.engine)
    return found


def engine_for(target: Target) -> str:
    """The engine that builds and runs ``target`` on this machine.

    A ``tensorrt`` target uses TensorRT where it is installed beside a GPU, otherwise TensorRT-RTX where that is
    installed, which builds ahead of time without a GPU.
    """
    if target.runtime != "tensorrt":
        return target.runtime
    if _installed("tensorrt") and nvidia_gpu() is not None:
        return "tensorrt"
    return "tensorrt-rtx" if _rtx_installed() else "tensorrt"


def _onnxruntime(target: Target) -> Availability:
    engine = "onnxruntime"
    if not _installed("onnxruntime"):
        hint = "pip install 'compressor[ort]'" if target.device == "cpu" else "pip install 'compressor[ort-gpu]'"
        return Availability(True, False, "ONNX Runtime is not installed: the file is built but not run", hint, engine)
    if target.device == "cpu" and not target.options.providers:
        return Availability(True, True, engine=engine)
    if target.device.startswith("cuda") and nvidia_gpu() is None:
        return Availability(True, False, "no NVIDIA GPU is visible: the file is built but not run here", engine=engine)
    import onnxruntime

    offered = onnxruntime.get_available_providers()
    wanted = target.options.providers[:1] or ("CUDAExecutionProvider",)
    if wanted[0] not in offered:
        reason = f"the installed ONNX Runtime has no {wanted[0]} (it has {', '.join(offered)})"
        return Availability(True, False, reason, "pip install 'compressor[ort-gpu]'", engine)
    return Availability(True, True, engine=engine)


def _openvino(target: Target) -> Availability:
    engine = "openvino"
    if not _installed("openvino"):
        return Availability(False, False, "OpenVINO is not installed", "pip install 'compressor[openvino]'", engine)
    if target.device.lower() in ("cpu", "auto"):
        return Availability(True, True, engine=engine)
    from compressor.runtimes.openvino import shared_core

    devices = shared_core().available_devices
    if not any(device.split(".")[0] == target.device.upper().split(".")[0] for device in devices):
        reason = f"OpenVINO finds no {target.device.upper()} here (it finds {', '.join(devices)}): built but not run"
        return Availability(True, False, reason, "", engine)
    return Availability(True, True, engine=engine)


def _tensorrt(target: Target) -> Availability:
    engine, gpu = engine_for(target), nvidia_gpu()
    built_for = target.compute_capability or (gpu.compute_capability if gpu is not None else None)
    first = FIRST_CAPABILITY.get(target.precision)
    if engine == "tensorrt" and gpu is not None:
        built_for = gpu.compute_capability
    if first is not None and built_for is not None and _number(built_for) < _number(first):
        reason = f"{target.precision} needs compute capability {first} or newer, this is for {built_for}: use fp16"
        return Availability(False, False, reason, engine=engine)
    if engine == "tensorrt":
        if not _installed("tensorrt"):
            reason = "TensorRT is not installed" + (" and neither is TensorRT-RTX" if gpu is None else "")
            extra = "tensorrt" if gpu is not None else "tensorrt-rtx"
            return Availability(False, False, reason, f"pip install 'compressor[{extra}]'", engine)
        if gpu is None:
            reason = "TensorRT builds only beside an NVIDIA GPU; TensorRT-RTX builds without one but is not installed"
            return Availability(False, False, reason, "pip install 'compressor[tensorrt-rtx]'", engine)
        return Availability(True, True, engine=engine)
    if not _rtx_installed():
        hint = "pip install 'compressor[tensorrt-rtx]'"
        return Availability(False, False, "TensorRT-RTX is not installed", hint, engine)
    return _tensorrt_rtx(target)


def _tensorrt_rtx(target: Target) -> Availability:
    engine, gpu = "tensorrt-rtx", nvidia_gpu()
    built_for = target.compute_capability or (gpu.compute_capability if gpu is not None else None)
    if built_for is None:
        reason = 'without a GPU the target must name one: compute_capability = "8.9"'
        return Availability(False, False, reason, engine=engine)
    if built_for not in RTX_CAPABILITIES:
        reason = f"TensorRT-RTX builds for compute capability {', '.join(RTX_CAPABILITIES)}, not for {built_for}"
        return Availability(False, False, reason, engine=engine)
    instead = "TensorRT is not installed beside a GPU: " if target.runtime == "tensorrt" else ""
    built = f"{instead}built ahead of time by TensorRT-RTX for compute capability {built_for}"
    if gpu is None:
        return Availability(True, False, f"{built}; it runs on RTX GPUs, and none is visible here", "", engine)
    if gpu.compute_capability != built_for:
        reason = f"{built}; the GPU here ({gpu.name}) has {gpu.compute_capability}"
        return Availability(True, False, reason, "", engine)
    return Availability(True, True, built if instead else "", "", engine)


def _number(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


def _torch(target: Target) -> Availability:
    engine = target.runtime
    if not _installed("torch"):
        return Availability(False, False, "torch is not installed", "pip install 'compressor[train]'", engine)
    on_gpu = target.device.startswith("cuda") or engine == "torch-tensorrt"
    if on_gpu and nvidia_gpu() is None:
        return Availability(False, False, "no NVIDIA GPU is visible", "", engine)
    if engine == "torch-tensorrt" and not _installed("torch_tensorrt"):
        hint = "pip install 'compressor[torch-tensorrt]'"
        return Availability(False, False, "Torch-TensorRT is not installed", hint, engine)
    return Availability(True, True, engine=engine)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _rtx_installed() -> bool:
    return _installed("tensorrt_rtx") or _installed("tensorrt_rtx_bindings")


def _read(path: Path) -> Target:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"cannot read the target {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the target {path} is not valid TOML: {error}") from error
    return _validated({"name": path.stem, **values}, f"target {path}" if path.parent != _FOLDER else path.stem)


def _validated(values: Mapping[str, Any], where: str) -> Target:
    try:
        return Target.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise RequestError(f"{where}: no key {key!r}: {nearest(key, _keys())}") from error
        message = first["msg"].removeprefix("Value error, ")
        raise RequestError(f"{where}: {key + ': ' if key else ''}{message}") from error


def _keys() -> list[str]:
    keys = list(Target.model_fields)
    for section, model in (("batch", Batch), ("calibration", Calibration), ("options", Options)):
        keys += [f"{section}.{name}" for name in model.model_fields]
    return keys


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=_GROUP)}


def _from_entry_point(name: str, entry: importlib.metadata.EntryPoint) -> Target:
    try:
        value: Target | str | Path | Callable[[], Target] = entry.load()
    except Exception as error:  # a third party's code may fail in any way
        raise RequestError(f"the target {name!r} of {entry.value} cannot be loaded: {error}") from error
    if isinstance(value, (str, Path)):
        return _read(Path(value))
    made = value() if callable(value) else value
    if not isinstance(made, Target):
        raise RequestError(f"the target {name!r} of {entry.value} gives a {type(made).__name__}, not a Target")
    return made if made.name else made.model_copy(update={"name": name})
