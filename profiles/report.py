"""The report of a run: a stable schema (``report.json``), with a Markdown and an HTML rendering of the same facts."""

from __future__ import annotations

import base64
import binascii
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from compressor.atomic import write_text
from compressor.errors import ArtifactError, RequestError
from compressor.profiles.latency import Latency

__all__ = [
    "SCHEMA_VERSION", "Comparison", "CurvePoint", "EngineEntry", "MetricInfo", "ModelEntry", "Parity", "Report",
    "SampleSheet", "TaskInfo", "is_teacher", "load_report",
]  # fmt: skip

SCHEMA_VERSION = 1
FILE_NAME = "report.json"

Figures = dict[str, float | None]
"""Metrics by name; None: computed, but not finite."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class MetricInfo(_Entry):
    """How a figure of quality is read."""

    name: str
    """Key in the ``metrics`` of models and engines."""
    label: str
    """For people: "top-1 accuracy"."""
    better: Literal["higher", "lower"]
    unit: str = ""
    """Shown behind the number; "%" means that values are fractions in [0, 1], shown times 100."""
    headline: bool = False
    """Part of the verdict, the summary and the plots."""


class TaskInfo(_Entry):
    """The task and what is measured of it."""

    name: str
    metrics: list[MetricInfo] = []


class ModelEntry(_Entry):
    """A model as PyTorch runs it: the reference of its engines."""

    name: str
    """"teacher" (of several "teacher-1", ...), "student", a link of a chain ("0-ppcl"), or any other."""
    parameters: int | None = None
    block_parameters: int | None = None
    """Of the repeated blocks alone, where embeddings and heads would hide the compression."""
    zeros: float | None = None
    """Share of the parameters that are exactly zero."""
    bytes: int | None = None
    """Weights on disk."""
    macs: int | None = None
    """Multiply-accumulate operations per sample (per call of the network)."""
    calls: int | None = None
    """Calls of its networks for one request (a sampler's steps)."""
    metrics: Figures | None = None
    notes: list[str] = []


class Parity(_Entry):
    """How far an engine's output is from PyTorch's on the same inputs."""

    graph: str = ""
    output: str = ""
    relative: float | None = None
    """Largest difference over largest value; None where it could not be computed."""
    tolerance: float | None = None
    """Largest relative difference that passes."""
    max_absolute: float | None = None
    judged_by: str = ""
    """What computed the engine's outputs, where it was not the engine itself."""
    records: int | None = None
    """Number of recorded inputs that were compared."""

    @property
    def passed(self) -> bool:
        """Whether the output is near enough; true where there is no limit."""
        return self.tolerance is None or (self.relative is not None and self.relative <= self.tolerance)


class EngineEntry(_Entry):
    """A model, exported to a target."""

    model: str
    target: str
    runtime: str = ""
    engine: str = ""
    """What really built and ran it, with its version."""
    precision: str = ""
    built: bool = True
    runnable: bool = True
    reason: str = ""
    """Why it was not built or not measured."""
    bytes: int | None = None
    parity: list[Parity] = []
    load_ms: float | None = None
    first_ms: float | None = None
    peak_memory_mb: float | None = None
    """Of the host."""
    peak_device_memory_mb: float | None = None
    """Of the GPU, for engines that run on one."""
    latency: dict[str, dict[str, Latency]] = {}
    """One call of a graph: graph name, batch size, latency."""
    end_to_end: dict[str, Latency] = {}
    """One request through the driver (a generated image, a detected picture): batch size, latency."""
    metrics: Figures | None = None
    notes: list[str] = []

    @property
    def whole(self) -> dict[str, Latency]:
        """Latency of a whole request by batch size: end to end, or that of the only graph."""
        if self.end_to_end or len(self.latency) != 1:
            return self.end_to_end
        return next(iter(self.latency.values()))


class Comparison(_Entry):
    """Two candidates measured side by side: ``ratio`` is a / b, so above 1 b is faster or smaller."""

    what: str
    """"latency", "size", ..."""
    a: str
    """Name of a model, or any label."""
    b: str
    ratio: float | None
    low: float | None = None
    """10th percentile of the rounds' ratios."""
    high: float | None = None
    """90th percentile."""
    target: str = ""
    batch: int | None = None


class CurvePoint(_Entry):
    """One of several students of the same run: where it stands between size, quality and latency."""

    label: str
    model: str
    parameters: int | None = None
    bytes: int | None = None
    metrics: Figures = {}
    latency_ms: float | None = None
    target: str = ""


class SampleSheet(_Entry):
    """A picture of results."""

    title: str
    png_base64: str
    caption: str = ""

    @field_validator("png_base64")
    @classmethod
    def _is_png(cls, value: str) -> str:
        try:
            data = base64.b64decode(value, validate=True)
        except binascii.Error as error:
            raise ValueError("a sample sheet is a PNG in base64") from error
        if not data.startswith(b"\x89PNG\r\n\x1a\n"):
            raise ValueError("a sample sheet is a PNG in base64")
        return value


class Report(_Entry):
    """Everything that a run has measured, and what it has not."""

    schema_version: Literal[1] = 1
    title: str
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """ISO 8601."""
    command: str = ""
    recipe: dict[str, Any] = {}
    machine: dict[str, Any] = {}
    """As `compressor.profiles.machine.describe_machine` returns it."""
    task: TaskInfo
    models: list[ModelEntry] = []
    ladder: list[str] = []
    """Models of a chain in order: teachers, the student of every method, the last of which is the run's; else empty."""
    engines: list[EngineEntry] = []
    comparisons: list[Comparison] = []
    curve: list[CurvePoint] = []
    training: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    """Phase, loss, [step, value] pairs."""
    samples: list[SampleSheet] = []
    skipped: list[str] = []
    """What was not measured, and why."""
    notes: list[str] = []

    @property
    def student(self) -> ModelEntry | None:
        """The model called "student", else the last one."""
        return next((m for m in self.models if m.name == "student"), self.models[-1] if self.models else None)

    @property
    def teacher(self) -> ModelEntry | None:
        """What the student is compared with: the teacher, the best of several, else the first other model."""
        student = self.student
        others = [model for model in self.models if model is not student]
        teachers = [model for model in others if is_teacher(model.name)]
        info = next((metric for metric in self.task.metrics if metric.headline), None)
        if info is None or len(teachers) < 2:
            return next(iter(teachers or others), None)

        def quality(model: ModelEntry) -> float:
            value = (model.metrics or {}).get(info.name)
            return -math.inf if value is None else value if info.better == "higher" else -value

        return max(teachers, key=quality)

    def finite(self) -> Report:
        """Return a copy in which NaN and infinite numbers are None, each place named in ``notes``."""
        places: list[str] = []
        cleaned = _without_nonfinite(self.model_dump(mode="python"), "", places)
        if places:
            named = ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")
            cleaned["notes"].append(f"Not finite, so left out: {named}.")
        return Report.model_validate(cleaned)

    def save(self, directory: Path) -> Path:
        """Write ``report.json``, ``report.md`` and ``report.html``; return the path of the last.

        Raises:
            CompressorError: The directory cannot be written.
        """
        from compressor.profiles.report_html import render_html
        from compressor.profiles.report_markdown import render_markdown

        directory, report = Path(directory), self.finite()
        page = directory / "report.html"
        text = json.dumps(report.model_dump(mode="json"), allow_nan=False, ensure_ascii=False)
        write_text(directory / FILE_NAME, text + "\n")
        write_text(directory / "report.md", render_markdown(report))
        write_text(page, render_html(report))
        return page


def is_teacher(name: str) -> bool:
    """Whether a model of a report is a teacher, told from its name."""
    return name == "teacher" or name.startswith("teacher-")


def load_report(path: Path) -> Report:
    """Read a report from its ``report.json`` or from the directory that holds it.

    Raises:
        RequestError: There is no such file.
        ArtifactError: It is no report, or one of another schema version.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"cannot read the report {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ArtifactError(f"{path} is no report: it is not JSON; make it again with `compress report`") from error
    version = value.get("schema_version") if isinstance(value, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}; make it again")
    try:
        return Report.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"{path} is no valid report: {place}: {first['msg']}; make it again") from error


def _without_nonfinite(value: Any, place: str, places: list[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without_nonfinite(item, f"{place}.{key}".lstrip("."), places) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        names = [str((isinstance(item, dict) and item.get("name")) or i) for i, item in enumerate(value)]
        return [_without_nonfinite(item, f"{place}[{n}]", places) for n, item in zip(names, value, strict=True)]
    if isinstance(value, float) and not math.isfinite(value):
        places.append(place)
        return None
    return value
