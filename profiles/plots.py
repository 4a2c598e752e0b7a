"""The plots of a report, as inline SVG: narrow, so that they stay legible on a phone, with the data named directly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compressor.profiles.latency import Latency
from compressor.profiles.plot_svg import CARD, GRID, INK, MUTED, SERIES, inline_svg, new_axes, styled
from compressor.profiles.report import MetricInfo, Report
from compressor.profiles.report_numbers import (
    format_bytes,
    format_count,
    format_metric,
    format_ms,
    format_number,
    sentence_case,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

__all__ = [
    "Plot", "curve_plots", "latency_plot", "model_series", "pareto_plot", "size_plot", "training_plot",
]  # fmt: skip

WIDTH = 460.0
MAX_ROWS = 24
_MAX_POINTS = 120


@dataclass(frozen=True)
class Plot:
    """A drawing with what is written around it."""

    key: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class _Point:
    x: float
    y: float
    label: str
    series: int


def model_series(report: Report) -> dict[str, int]:
    """Number of each model's colour, from 1: the teacher's is the first (grey), the student's the second."""
    first = [model.name for model in (report.teacher, report.student) if model]
    if report.teacher is None:
        first.insert(0, "")
    others = [*(m.name for m in report.models), *(e.model for e in report.engines), *(p.model for p in report.curve)]
    return {name: index % len(SERIES) + 1 for index, name in enumerate(dict.fromkeys(first + others)) if name}


@styled
def pareto_plot(report: Report, info: MetricInfo) -> Plot | None:
    """Quality over latency of every engine that ran; None where there is none."""
    series, points, batch = model_series(report), [], "1"
    batches = [set(engine.whole) for engine in report.engines if engine.whole]
    if batches and "1" not in set.union(*batches):
        batch = min(set.union(*batches), key=int)
    for engine in report.engines:
        value, latency = (engine.metrics or {}).get(info.name), engine.whole.get(batch)
        if value is not None and latency is not None:
            points.append(_Point(latency.p50, _scale(info) * value, engine.target, series[engine.model]))
    if not points:
        return None
    figure, axes = new_axes(WIDTH, 330)
    reference = (report.teacher.metrics or {}).get(info.name) if report.teacher else None
    _scatter(axes, points, info, None if reference is None else _scale(info) * reference)
    axes.set_xlabel(f"median latency, batch {batch}, ms")
    front = [point.label for point in _front(points, info.better)]
    way = "Up" if info.better == "higher" else "Down"
    caption = f"{way} and to the left is better; the dashed line joins the best."
    if reference is not None and report.teacher:
        caption += f" Dotted: the {report.teacher.name} in PyTorch, {format_metric(reference, info)}."
    told = f"{info.label} against latency of {len(points)} engines; the best trade-offs: {', '.join(front)}"
    key = f"pareto-{_identifier(info.name)}"
    return Plot(key, f"{_titled(info)} against latency", caption, inline_svg(figure, key, told))


@styled
def latency_plot(report: Report) -> Plot | None:
    """How the durations of each engine are distributed, at the smallest batch; fastest first."""
    series, rows = model_series(report), []
    for engine in report.engines:
        if engine.whole:
            batch = min(engine.whole, key=int)
            rows.append((engine.whole[batch], f"{engine.model} · {engine.target}", series[engine.model], batch))
    if not rows:
        return None
    rows = sorted(rows, key=lambda row: row[0].p50)[:MAX_ROWS]
    figure, axes = new_axes(WIDTH, 48 + 42 * len(rows))
    low, high = min(row[0].min for row in rows), max(row[0].p99 for row in rows)
    log = high / max(low, 1e-9) > 6
    axes.set_xscale("log" if log else "linear")
    axes.set_xlim(low / 1.15 if log else 0, high * (1.15 if log else 1.04))
    for number, (latency, label, colour, _) in enumerate(rows):
        _distribution(axes, latency, -number, SERIES[colour - 1], log)
        _row_label(axes, -number + 0.64, label, f"{'~' if latency.noisy else ''}{format_ms(latency.p50)} ms")
    _finish_rows(axes, len(rows), top=0.9)
    _plain_ticks(axes.xaxis, log, low, high)
    axes.set_xlabel("ms, logarithmic" if log else "ms")
    batches = {row[3] for row in rows}
    caption = f"Batch {', '.join(sorted(batches, key=int))}. Line: median; ticks: 90th and 99th percentile."
    told = "; ".join(f"{row[1]} {format_ms(row[0].p50)} ms" for row in rows)
    return Plot("latency", "Latency distributions", caption, inline_svg(figure, "latency", f"median latencies: {told}"))


@styled
def size_plot(report: Report) -> Plot | None:
    """Bytes of every model and engine file."""
    series = model_series(report)
    rows = [(m.bytes, f"{m.name} · weights", series[m.name]) for m in report.models if m.bytes]
    rows += [(e.bytes, f"{e.model} · {e.target}", series[e.model]) for e in report.engines if e.bytes]
    if not rows:
        return None
    rows = sorted(rows, key=lambda row: -row[0])[:MAX_ROWS]
    figure, axes = new_axes(WIDTH, 12 + 34 * len(rows))
    for number, (size, label, colour) in enumerate(rows):
        axes.barh(-number, size, height=0.26, color=SERIES[colour - 1], linewidth=0)
        _row_label(axes, -number + 0.44, label, format_bytes(size))
    axes.set_xlim(0, max(row[0] for row in rows))
    _finish_rows(axes, len(rows), top=0.7)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    told = "; ".join(f"{label} {format_bytes(size)}" for size, label, _ in rows)
    svg = inline_svg(figure, "sizes", told)
    return Plot("sizes", "Size on disk", "Model weights and engine files, largest first.", svg)


@styled
def curve_plots(report: Report) -> list[Plot]:
    """Quality over parameters, and over latency, of the students of one run."""
    series, plots = model_series(report), []
    for info in [i for i in report.task.metrics if any(p.metrics.get(i.name) is not None for p in report.curve)][:2]:
        for key, label, form in (
            ("parameters", "parameters", format_count),
            ("latency_ms", "median latency, ms", format_ms),
        ):
            points = [
                _Point(float(getattr(p, key)), _scale(info) * value, p.label, series[p.model])
                for p in report.curve
                if getattr(p, key) and (value := p.metrics.get(info.name)) is not None
            ]
            if len(points) < 2:
                continue
            figure, axes = new_axes(WIDTH, 290)
            _scatter(axes, points, info, None)
            if key == "parameters":
                axes.xaxis.set_major_formatter(lambda value, _: _short_count(value))
            axes.set_xlabel(label)
            name = f"curve-{_identifier(info.name)}-{key}"
            told = "; ".join(f"{p.label}: {form(p.x)}, {format_number(p.y)}" for p in points)
            title = f"{_titled(info)} against {label.partition(',')[0].removeprefix('median ')}"
            plots.append(Plot(name, title, "", inline_svg(figure, name, told)))
    return plots


@styled
def training_plot(key: str, phase: str, loss: str, values: Sequence[tuple[float, float | None]]) -> Plot | None:
    """One loss over the steps of a phase: means of equal stretches, with their range behind."""
    pairs = np.array([(step, value) for step, value in values if value is not None], dtype=float)
    if len(pairs) < 2:
        return None
    parts = np.array_split(pairs, min(_MAX_POINTS, len(pairs)))
    steps = np.array([part[:, 0].mean() for part in parts])
    mean = np.array([part[:, 1].mean() for part in parts])
    low, high = (np.array([choose(part[:, 1]) for part in parts]) for choose in (np.min, np.max))
    figure, axes = new_axes(264, 140)
    if len(pairs) > _MAX_POINTS:
        axes.fill_between(steps, low, high, color=SERIES[1], alpha=0.16, linewidth=0)
    axes.plot(steps, mean, color=SERIES[1])
    log = low.min() > 0 and high.max() / low.min() > 50
    if log:
        axes.set_yscale("log")
    _plain_ticks(axes.yaxis, log, float(low.min()), float(high.max()), few=True)
    axes.grid(axis="y")
    axes.margins(x=0.01)
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter(lambda value, _: _short_count(value))
    first, last = format_number(float(mean[0])), format_number(float(mean[-1]))
    caption = f"{first} → {last}{', logarithmic' if log else ''}"
    told = f"{loss} of {phase} over {int(pairs[-1, 0])} steps, from {first} to {last}"
    return Plot(key, f"{phase}: {loss}", caption, inline_svg(figure, key, told))


def _scatter(axes: Axes, points: list[_Point], info: MetricInfo, reference: float | None) -> None:
    xs, ys = [p.x for p in points], [p.y for p in points] + ([] if reference is None else [reference])
    log = max(xs) / max(min(xs), 1e-12) > 6
    axes.set_xscale("log" if log else "linear")
    pad = 0.12 * (max(ys) - min(ys)) or 0.05 * abs(ys[0]) or 1.0
    axes.set_ylim(min(ys) - pad, max(ys) + pad)
    if log:
        axes.set_xlim(min(xs) / 1.4, max(xs) * 1.6)
    else:
        axes.set_xlim(0, max(xs) * 1.15)
    axes.grid()
    if reference is not None:
        axes.axhline(reference, color=SERIES[0], linewidth=1.2, linestyle=(0, (1, 3)))
    front = _front(points, info.better)
    axes.plot([p.x for p in front], [p.y for p in front], color=MUTED, linewidth=1.2, linestyle=(0, (5, 4)))
    for point in points:
        colour = SERIES[point.series - 1]
        axes.scatter(point.x, point.y, s=80, color=colour, edgecolors=CARD, linewidths=1.5, zorder=3, clip_on=False)
    _plain_ticks(axes.xaxis, log, min(xs), max(xs))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    figure = axes.get_figure(root=True)
    if figure is not None:
        figure.draw_without_rendering()
    _place_labels(axes, points)


def _place_labels(axes: Axes, points: list[_Point]) -> None:
    """Write each label where it covers neither a point nor another label; leave it out where nothing is free."""
    box = axes.get_window_extent()
    spots = [tuple(axes.transData.transform((p.x, p.y))) for p in points]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    for point, (x, y) in zip(points, spots, strict=True):
        width = 6.4 * len(point.label)
        for dx, dy, align in ((9, 0, 0.0), (-9, 0, 1.0), (0, 14, 0.5), (0, -14, 0.5), (7, 13, 0.0), (7, -13, 0.0),
                              (-7, 13, 1.0), (-7, -13, 1.0), (0, 26, 0.5), (0, -26, 0.5)):  # fmt: skip
            left = x + dx - align * width
            place = (left, y + dy - 6, left + width, y + dy + 6)
            inside = place[0] >= box.x0 and place[2] <= box.x1 and place[1] >= box.y0 and place[3] <= box.y1 + 6
            if inside and not any(_overlap(place, other) for other in taken if other != (x - 6, y - 6, x + 6, y + 6)):
                taken.append(place)
                side = {0.0: "left", 0.5: "center", 1.0: "right"}[align]
                axes.annotate(
                    point.label, (point.x, point.y), (dx, dy), textcoords="offset pixels", fontsize=11.5, color=INK,
                    ha=side, va="center", gid=f"halo-{len(taken)}", annotation_clip=False,
                )  # fmt: skip
                break


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _front(points: list[_Point], better: str) -> list[_Point]:
    """Points that no other beats in both directions, from left to right."""
    sign, best, front = (1 if better == "higher" else -1), -math.inf, []
    for point in sorted(points, key=lambda p: (p.x, -sign * p.y)):
        if sign * point.y > best:
            best = sign * point.y
            front.append(point)
    return front


def _distribution(axes: Axes, latency: Latency, base: float, colour: str, log: bool) -> None:
    samples = np.clip(np.array(latency.samples_ms), None, latency.p99)
    values = np.log(samples) if log else samples
    spread = max(float(values.std()), 1e-3 * max(abs(float(values.mean())), 1e-3))
    width = 1.06 * spread * len(values) ** -0.2
    grid = np.linspace(values.min() - 2 * width, values.max() + 2 * width, 90)
    density = np.exp(-0.5 * ((grid[:, None] - values) / width) ** 2).sum(axis=1)
    places = np.exp(grid) if log else grid
    axes.fill_between(places, base, base + 0.42 * density / density.max(), color=colour, alpha=0.45, linewidth=0)
    axes.plot([latency.min, latency.p99], [base, base], color=colour, linewidth=1.2)
    axes.plot([latency.p50] * 2, [base, base + 0.42], color=colour, linewidth=2.2)
    for mark in (latency.p90, latency.p99):
        axes.plot([mark] * 2, [base - 0.06, base + 0.14], color=colour, linewidth=1.4)


def _row_label(axes: Axes, y: float, label: str, value: str) -> None:
    place = axes.get_yaxis_transform()
    for x, text, side in ((0.0, label, "left"), (1.0, value, "right")):
        axes.text(
            x, y, text, transform=place, ha=side, va="center", fontsize=11.5, gid=f"halo-{side}-{round(-100 * y)}"
        )


def _finish_rows(axes: Axes, rows: int, top: float) -> None:
    axes.set_ylim(-rows + 0.8, top)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=GRID)


def _plain_ticks(axis: Axis, log: bool, low: float, high: float, *, few: bool = False) -> None:
    """Ticks as plain numbers; on a logarithmic axis at 1, 2, 5 times powers of ten as long as they are not too many."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    axis.set_major_formatter(lambda value, _: f"{value:.10g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.0e}")
    if not log:
        axis.set_major_locator(MaxNLocator(4 if few else 6))
        return
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        if sum(low / 1.2 <= tick <= high * 1.2 for tick in ticks) <= (4 if few else 8):
            break
    if len(decades) > 6:
        ticks = ticks[:: math.ceil(len(decades) / 5)]
    axis.set_ticks([tick for tick in ticks if low / 1.3 <= tick <= high * 1.3])
    axis.set_minor_locator(NullLocator())


def _scale(info: MetricInfo) -> float:
    return 100.0 if info.unit == "%" else 1.0


def _short_count(value: float) -> str:
    """A count on an axis: 500 k, 1.5 M."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _titled(info: MetricInfo) -> str:
    return sentence_case(info.label) + (f" ({info.unit})" if info.unit else "")


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in name)
