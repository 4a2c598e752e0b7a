"""The facts of a report as sentences and tables of text, which the HTML and the Markdown rendering both draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from compressor.profiles.latency import Latency
from compressor.profiles.report import Comparison, EngineEntry, MetricInfo, ModelEntry, Report
from compressor.profiles.report_numbers import (
    NONE,
    format_bytes,
    format_count,
    format_difference,
    format_metric,
    format_ms,
    format_number,
    format_ratio,
    format_share,
    sentence_case,
)

__all__ = [
    "Column", "Fact", "Row", "Table", "Verdict", "batch_columns", "comparison_table", "curve_table", "engine_table",
    "headline_metrics", "ladder_table", "latency_table", "machine_lines", "not_measured", "notes", "parity_text",
    "quality_table", "summary_table", "verdict", "zeros_lines",
]  # fmt: skip

Tone = Literal["good", "bad", "plain"]
MANY_ZEROS = 0.05
"""So much larger a share of zeros than the model before has is a sparsity pattern."""
NOISY = "~"
"""Stands before a latency whose rounds disagree."""


@dataclass(frozen=True)
class Fact:
    """One figure of the verdict."""

    value: str
    label: str
    detail: str
    tone: Tone = "plain"
    value_first: bool = True

    @property
    def phrase(self) -> str:
        """The fact within a sentence."""
        return f"{self.value} {self.label}" if self.value_first else f"{self.label} {self.value}"


@dataclass(frozen=True)
class Verdict:
    """The result in one sentence and a few figures."""

    sentence: str
    facts: list[Fact]


@dataclass(frozen=True)
class Column:
    """A column's heading; numbers are aligned to the right."""

    heading: str
    numeric: bool = True


@dataclass(frozen=True)
class Row:
    """Cells of text. A ``lead`` row opens a group (a model above its engines)."""

    cells: list[str]
    lead: bool = False


@dataclass(frozen=True)
class Table:
    """Columns, rows and remarks below them."""

    columns: list[Column]
    rows: list[Row]
    notes: list[str]


def headline_metrics(report: Report) -> list[MetricInfo]:
    """The metrics marked as headline; the first two where none is."""
    marked = [info for info in report.task.metrics if info.headline]
    return marked or report.task.metrics[:2]


def batch_columns(report: Report) -> list[str]:
    """The batch sizes of the summary: 1 and 8 where they were measured, else the smallest and the largest."""
    known = sorted({batch for engine in report.engines for batch in engine.whole}, key=int)
    chosen = [batch for batch in known if batch in ("1", "8")]
    return chosen if len(chosen) == 2 or len(known) < 2 else [known[0], known[-1]]


def verdict(report: Report) -> Verdict:
    """Student against teacher: parameters, latency and quality."""
    student, teacher = report.student, report.teacher
    if student is None:
        return Verdict("No model was measured.", [])
    facts = [_size_fact(student, teacher), _latency_fact(report, student, teacher)]
    facts += [_quality_fact(info, student, teacher) for info in headline_metrics(report)]
    known = [fact for fact in facts if fact is not None]
    against = f" against the {teacher.name}" if teacher else ""
    parts = [fact.phrase for fact in known]
    listed = " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:]))) or "nothing was measured"
    return Verdict(f"The {student.name}{against}: {listed}.", known)


def _size_fact(student: ModelEntry, teacher: ModelEntry | None) -> Fact | None:
    for unit, mine, theirs in (
        ("parameters", student.parameters, teacher.parameters if teacher else None),
        ("bytes of weights", student.bytes, teacher.bytes if teacher else None),
    ):
        show = format_count if unit == "parameters" else format_bytes
        if mine and theirs:
            change, sentence = _factor(theirs / mine, "fewer", "more")
            detail = f"{show(theirs)} → {show(mine)}"
            if teacher and unit == "parameters" and student.block_parameters and teacher.block_parameters:
                detail += f"; blocks {format_ratio(teacher.block_parameters / student.block_parameters)}"
            return Fact(change, f"{sentence} {unit}".strip(), detail, "good" if theirs > mine else "plain")
        if mine:
            return Fact(show(mine), unit, student.name)
    return None


def _latency_fact(report: Report, student: ModelEntry, teacher: ModelEntry | None) -> Fact | None:
    measured = [(e, *_smallest(e.whole)) for e in report.engines if e.model == student.name and e.whole]
    if not measured:
        return None
    measured.sort(key=lambda item: (int(item[1]), item[2].p50))
    targets = {e.target: e for e in report.engines if teacher and e.model == teacher.name}
    for engine, batch, mine in measured:
        other = targets.get(engine.target)
        if other is None or batch not in other.whole:
            continue
        theirs = other.whole[batch]
        value, spread = theirs.p50 / mine.p50, ""
        for entry in report.comparisons:
            same = (entry.what, entry.a, entry.b, entry.target) == ("latency", other.model, engine.model, engine.target)
            if same and entry.ratio and entry.batch in (None, int(batch)):
                value = entry.ratio
                spread = f"; rounds {format_number(entry.low)} to {format_ratio(entry.high)}"
        change, word = _factor(value, "faster", "slower")
        detail = f"{format_ms(theirs.p50)} → {format_ms(mine.p50)} ms, median, batch {batch}{spread}"
        return Fact(change, f"{word} on {engine.target}".strip(), detail, "good" if value > 1.02 else "plain")
    engine, batch, mine = measured[0]
    return Fact(f"{format_ms(mine.p50)} ms", f"on {engine.target}", f"median, batch {batch}; {student.name} alone")


def _quality_fact(info: MetricInfo, student: ModelEntry, teacher: ModelEntry | None) -> Fact | None:
    mine = (student.metrics or {}).get(info.name)
    theirs = (teacher.metrics or {}).get(info.name) if teacher else None
    if mine is None:
        return None
    if theirs is None:
        detail = f"{student.name}; nothing comparable was measured"
        return Fact(format_metric(mine, info), info.label, detail, value_first=False)
    change = mine - theirs
    improved = change > 0 if info.better == "higher" else change < 0
    text = format_difference(change, info)
    tone: Tone = "plain" if text.startswith("±") else "good" if improved else "bad"
    detail = f"{format_metric(theirs, info)} → {format_metric(mine, info)}, {info.better} is better"
    return Fact(text, info.label, detail, tone, value_first=False)


def _factor(value: float, above: str, below: str) -> tuple[str, str]:
    if 0.98 < value < 1.02:
        return "1×", f"(neither {above} nor {below})"
    return (format_ratio(value), above) if value > 1 else (format_ratio(1 / value), below)


def summary_table(report: Report) -> Table:
    """Every model and its engines: size, latency, quality, parity."""
    batches, infos = batch_columns(report), headline_metrics(report)
    columns = [Column("Model and engine", False), Column("Parameters"), Column("Size")]
    columns += [Column(f"Batch {batch}, ms") for batch in batches]
    columns += [Column("Per item, ms"), *(Column(sentence_case(info.label)) for info in infos), Column("Parity", False)]
    rows = []
    for model in _model_names(report):
        entry = next((m for m in report.models if m.name == model), ModelEntry(name=model))
        cells = [f"{model}, PyTorch", format_count(entry.parameters), format_bytes(entry.bytes)]
        cells += [NONE] * (len(batches) + 1) + _metric_cells(entry.metrics, infos) + [NONE]
        rows.append(Row(cells, lead=True))
        for engine in (e for e in report.engines if e.model == model):
            cells = [engine.target, "", format_bytes(engine.bytes)]
            cells += [_p50(engine.whole.get(batch)) for batch in batches] + [_per_item(engine.whole)]
            cells += [*_metric_cells(engine.metrics, infos), parity_text(engine) if engine.built else "not built"]
            rows.append(Row(cells))
    notes = ["Latencies are medians of whole requests; per item is the best over all batch sizes."] if batches else []
    counted = [f"{model.name} {format_count(model.macs)}" for model in report.models if model.macs]
    if counted:
        notes.append(f"Multiply-accumulate operations of one call, per sample: {', '.join(counted)}.")
    if any(engine.parity for engine in report.engines):
        notes.append("Parity: the largest relative deviation from PyTorch over all outputs, and its limit.")
    if any(NOISY in cell for row in rows for cell in row.cells):
        notes.append(f"{NOISY} The machine was noisy while this was measured: see the latencies below.")
    return Table(columns, rows, notes)


def ladder_table(report: Report) -> Table | None:
    """A chain's models, a row each: what every method made smaller, faster and worse; None without a chain."""
    if not report.ladder:
        return None
    infos, entries = headline_metrics(report), {model.name: model for model in report.models}
    targets = list(dict.fromkeys(engine.target for engine in report.engines if engine.whole))
    columns = [Column("Model", False), Column("Parameters"), Column("Zeros"), Column("Weights"), Column("Calls")]
    columns += [Column(f"{target}, ms") for target in targets]
    columns += [Column(sentence_case(info.label)) for info in infos]
    rows = []
    for name in report.ladder:
        entry = entries[name]
        cells = [name, format_count(entry.parameters), format_share(entry.zeros), format_bytes(entry.bytes)]
        cells.append(NONE if entry.calls is None else str(entry.calls))
        for target in targets:
            timed = [e.whole for e in report.engines if (e.model, e.target) == (name, target) and e.whole]
            cells.append(_p50(_smallest(timed[0])[1]) if timed else NONE)
        rows.append(Row(cells + _metric_cells(entry.metrics, infos)))
    lines = ["Calls: of the network, for one request. Latencies are medians of whole requests at the smallest batch."]
    lines += ["Quality is PyTorch's; the summary has every engine's."]
    return Table(columns, rows, lines + zeros_lines(report))


def zeros_lines(report: Report) -> list[str]:
    """What zeros bought: the model that has them against the one before it of the same size, on every engine."""
    lines, faster = [], False
    for dense, sparse in pairwise(report.models):
        if dense.parameters != sparse.parameters or (sparse.zeros or 0) < (dense.zeros or 0) + MANY_ZEROS:
            continue
        found = {(e.model, e.target): e for e in report.engines}
        for engine in [e for e in report.engines if e.model == sparse.name and (dense.name, e.target) in found]:
            before, parts = found[dense.name, engine.target], []
            entry = _compared(report, dense.name, sparse.name, engine.target)
            if entry is not None and entry.ratio and entry.low:
                faster = faster or entry.low > 1.02
                spread = f" (rounds {format_number(entry.low)} to {format_ratio(entry.high)})"
                parts.append(f"{format_ratio(entry.ratio)} the speed of {dense.name}{spread}")
            if before.bytes and engine.bytes:
                parts.append(f"file {format_bytes(before.bytes)} → {format_bytes(engine.bytes)}")
            if parts:
                share = format_share(sparse.zeros)
                lines.append(f"{sparse.name}, {share} zeros, on {engine.target}: {', '.join(parts)}.")
    if lines and not faster:
        lines.append("No engine that ran here computes these zeros faster.")
    return lines


def _compared(report: Report, a: str, b: str, target: str) -> Comparison | None:
    """The latency of two models on a target, side by side, at the smallest batch."""
    known = [c for c in report.comparisons if (c.what, c.a, c.b, c.target) == ("latency", a, b, target)]
    return min(known, key=lambda c: c.batch or 0, default=None)


def quality_table(report: Report) -> Table | None:
    """All metrics of all models and engines; None where the summary has shown them all."""
    infos = report.task.metrics
    if len(infos) <= len(headline_metrics(report)):
        return None
    columns = [Column("Model and engine", False)]
    columns += [Column(f"{sentence_case(info.label)} {'↑' if info.better == 'higher' else '↓'}") for info in infos]
    rows = []
    for name in _model_names(report):
        models = [m for m in report.models if m.name == name and m.metrics]
        engines = [e for e in report.engines if e.model == name and e.metrics]
        if models or engines:
            measured = models[0].metrics if models else None
            rows.append(Row([f"{name}, PyTorch", *_metric_cells(measured, infos)], lead=True))
        rows += [Row([e.target, *_metric_cells(e.metrics, infos)]) for e in engines]
    return Table(columns, rows, ["↑ higher is better, ↓ lower is better."]) if rows else None


def engine_table(report: Report) -> Table | None:
    """How each engine was made and how it starts: what built it, load time, first call, peak memory."""
    if not report.engines:
        return None
    columns = [Column(name, False) for name in ("Model and engine", "Built by", "Precision", "State")]
    on_device = any(engine.peak_device_memory_mb is not None for engine in report.engines)
    names = ("Load, ms", "First call, ms", "Peak memory, MB", *(("On the GPU, MB",) if on_device else ()))
    columns += [Column(name) for name in names]
    rows = []
    for model in dict.fromkeys(engine.model for engine in report.engines):
        rows.append(Row([model, *[""] * (len(columns) - 1)], lead=True))
        for engine in (e for e in report.engines if e.model == model):
            state = "runs here" if engine.runnable else "built, not run here"
            starts = [format_ms(engine.load_ms), format_ms(engine.first_ms), format_number(engine.peak_memory_mb)]
            starts += [format_number(engine.peak_device_memory_mb)] if on_device else []
            cells = [
                engine.target,
                engine.engine or engine.runtime or NONE,
                engine.precision or NONE,
                state if engine.built else "not built",
            ]
            rows.append(Row(cells + starts))
    return Table(columns, rows, ["Peak memory is that of a process of its own which loads the engine and runs it."])


def latency_table(report: Report) -> Table | None:
    """Every measured latency."""
    columns = [Column("Model", False), Column("Target", False), Column("Part", False)]
    columns += [Column(name) for name in ("Batch", "p50, ms", "p90", "p99", "Mean", "Min", "Items per s", "Calls")]
    rows, notes = [], []
    for engine in report.engines:
        parts: dict[str, Mapping[str, Latency]] = dict(engine.latency)
        if engine.end_to_end:
            parts = {"end to end": engine.end_to_end, **parts}
        for part, batches in parts.items():
            for batch in sorted(batches, key=int):
                one = batches[batch]
                times = [format_ms(value) for value in (one.p90, one.p99, one.mean, one.min)]
                cells = [engine.model, engine.target, part, batch, _p50(one), *times]
                rows.append(Row([*cells, format_number(one.throughput(int(batch))), f"{one.count:,}"]))
                if one.noisy:
                    notes.append(f"{NOISY} {engine.model} on {engine.target}, {part}, batch {batch}: {one.reason}.")
    return Table(columns, rows, notes) if rows else None


def comparison_table(report: Report) -> Table | None:
    """What was measured side by side, as ratios with their spread."""
    if not report.comparisons:
        return None
    columns = [Column("Of", False), Column("A", False), Column("B", False), Column("Where", False)]
    columns += [Column("A / B"), Column("p10 to p90 of rounds")]
    rows = [
        Row(
            [
                c.what, c.a, c.b, ", ".join(filter(None, (c.target, f"batch {c.batch}" if c.batch else ""))) or NONE,
                format_ratio(c.ratio),
                NONE if c.low is None else f"{format_number(c.low)} to {format_number(c.high)}",
            ]
        )
        for c in report.comparisons
    ]  # fmt: skip
    return Table(columns, rows, ["Above 1, B is faster or smaller. Both ran in the same rounds."])


def curve_table(report: Report) -> Table | None:
    """The students of one run, from small to large."""
    if not report.curve:
        return None
    infos = headline_metrics(report)
    columns = [Column("Variant", False), Column("On", False)]
    columns += [Column(name) for name in ("Parameters", "Size", "Latency, ms")]
    columns += [Column(sentence_case(info.label)) for info in infos]
    points = sorted(report.curve, key=lambda point: point.parameters or 0)
    rows = [
        Row(
            [
                p.label, p.target or NONE, format_count(p.parameters), format_bytes(p.bytes), format_ms(p.latency_ms),
                *_metric_cells(p.metrics, infos),
            ]
        )
        for p in points
    ]  # fmt: skip
    return Table(columns, rows, [])


def not_measured(report: Report) -> list[str]:
    """What was left out and why: the report's own list, then every engine that was not built or not run."""
    lines = list(report.skipped)
    for engine in report.engines:
        if engine.built and engine.runnable:
            continue
        state = "built, not measured" if engine.built else "not built"
        line = f"{engine.model} on {engine.target}: {state}: {engine.reason or 'no reason given'}"
        if not any(engine.reason and engine.reason in other and engine.target in other for other in report.skipped):
            lines.append(line)
    return lines


def notes(report: Report) -> list[str]:
    """The report's remarks, then those of its models and engines."""
    lines = [f"{model.name}: {note}" for model in report.models for note in model.notes]
    lines += [f"{engine.model} on {engine.target}: {note}" for engine in report.engines for note in engine.notes]
    zeros = [] if report.ladder else zeros_lines(report)  # a ladder has them below it
    return report.notes + lines + zeros


def machine_lines(machine: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of name and text, of what `describe_machine` returns and of whatever else is there."""
    lines = []
    for key, value in machine.items():
        if key == "cpu" and isinstance(value, Mapping):
            usable = f", {value['affinity']} usable" if value.get("affinity") not in (None, value.get("cores")) else ""
            quota = f", {value['quota']:g} granted" if value.get("quota") else ""
            text = f"{value.get('model')}, {value.get('cores')} cores{usable}{quota} ({value.get('architecture')})"
            lines.append(("Processor", text))
            if value.get("threads"):
                where = f", on processors {value['cpus']}" if value.get("cpus") else ""
                lines.append(("Threads", f"{value['threads']} an inference unless a target says otherwise{where}"))
        elif key == "memory_mb" and isinstance(value, (int, float)):
            lines.append(("Memory", format_bytes(value * 1e6)))
        elif key == "gpus" and isinstance(value, list):
            named = [", ".join(map(str, gpu.values())) if isinstance(gpu, Mapping) else str(gpu) for gpu in value]
            lines.append(("GPU", "; ".join(named) or "none"))
        elif isinstance(value, Mapping):
            text = ", ".join(f"{name} {item}" for name, item in value.items())
            lines.append((str(key).replace("_", " ").capitalize(), text or "none set"))
        else:
            name = "System" if key == "os" else str(key).replace("_", " ").capitalize()
            lines.append((name, str(value)))
    return lines


def parity_text(engine: EngineEntry) -> str:
    """The worst deviation of an engine and whether it is allowed."""
    if not engine.parity:
        return NONE
    worst = max(engine.parity, key=lambda one: (not one.passed, (one.relative or 0) / (one.tolerance or 1)))
    error = "not finite" if worst.relative is None else f"{worst.relative:.1e}"
    limit = f" (limit {worst.tolerance:.0e})" if worst.tolerance is not None else ""
    return f"{'' if worst.passed else 'failed: '}{error}{limit}"


def _model_names(report: Report) -> list[str]:
    return list(dict.fromkeys([m.name for m in report.models] + [e.model for e in report.engines]))


def _metric_cells(metrics: Mapping[str, float | None] | None, infos: list[MetricInfo]) -> list[str]:
    return [format_metric((metrics or {}).get(info.name), info) for info in infos]


def _p50(latency: Latency | None) -> str:
    if latency is None:
        return NONE
    return (NOISY if latency.noisy else "") + format_ms(latency.p50)


def _per_item(latencies: Mapping[str, Latency]) -> str:
    return format_ms(min((one.p50 / int(batch) for batch, one in latencies.items()), default=None))


def _smallest(latencies: Mapping[str, Latency]) -> tuple[str, Latency]:
    batch = min(latencies, key=int)
    return batch, latencies[batch]
