"""A report as one HTML file that needs nothing else: no request, no script; light, dark, narrow and printed alike."""

from __future__ import annotations

import base64
import html
import importlib.resources
import importlib.util
import json
import re
import struct
from collections.abc import Mapping
from typing import Any

import yaml

from compressor.profiles import report_facts as facts
from compressor.profiles.report import Report, SampleSheet
from compressor.profiles.report_facts import Table

__all__ = ["render_html"]

_OPEN_ROWS = 14
"""Longer tables of detail start folded."""
_MAX_CURVES = 24
_PIXELATED_BELOW = 320
"""Sample sheets narrower than this (pixels) are enlarged without smoothing."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render_html(report: Report) -> str:
    """Return the page. Plots need matplotlib; without it the page says so and keeps its tables."""
    drawn = importlib.util.find_spec("matplotlib") is not None
    sections = {
        "Summary": _summary(report),
        "Chain": _ladder(report),
        "Quality and latency": _pareto(report) if drawn else "",
        "Latency and size": _latency_and_size(report, drawn),
        "Variants": _curve(report, drawn),
        "Training": _training(report) if drawn else "",
        "Samples": _grid("".join(map(_sheet, report.samples))),
        "Engines": _engines(report),
        "Not measured": _list(facts.not_measured(report) + ([] if drawn else ["plots: matplotlib is not installed"])),
        "Notes": _list(facts.notes(report)),
        "Recipe": _recipe(report),
        "Machine": _machine(report.machine),
    }
    present = [(f"part-{number}", title, body) for number, (title, body) in enumerate(sections.items()) if body]
    links = "".join(f'<li><a href="#{key}">{_text(title)}</a></li>' for key, title, _ in present)
    parts = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{_text(title)}</h2>{body}</section>\n'
        for key, title, body in present
    )
    style = importlib.resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(report.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f'{_header(report)}<nav aria-label="Contents"><ul>{links}</ul></nav>\n{parts}'
        "<footer>Made by compressor. MB are 10<sup>6</sup> bytes.</footer>\n</main>\n</body>\n</html>\n"
    )


def _header(report: Report) -> str:
    result = facts.verdict(report)
    cards = "".join(
        f'<div class="fact {fact.tone}"><dt>{_text(fact.label)}</dt><dd class="value">{_text(fact.value)}</dd>'
        f'<dd class="detail">{_text(fact.detail)}</dd></div>'
        for fact in result.facts
    )
    created = report.created.replace("T", " ", 1).replace("+00:00", " UTC")
    return (
        f'<header><p class="eyebrow">{_text(report.task.name)}</p><h1>{_text(report.title)}</h1>'
        f'<p class="meta"><time datetime="{_text(report.created)}">{_text(created)}</time></p>'
        f'<p class="verdict">{_text(result.sentence)}</p><dl class="facts">{cards}</dl></header>\n'
    )


def _summary(report: Report) -> str:
    table = facts.summary_table(report)
    quality = facts.quality_table(report)
    folded = _fold("All measures of quality", quality) if quality else ""
    return (_table(table) if table.rows else "") + folded


def _ladder(report: Report) -> str:
    table = facts.ladder_table(report)
    return _table(table) if table else ""


def _pareto(report: Report) -> str:
    from compressor.profiles.plots import pareto_plot

    plots = [plot for info in facts.headline_metrics(report) if (plot := pareto_plot(report, info))]
    return _legend(report) + _grid("".join(map(_figure, plots))) if plots else ""


def _latency_and_size(report: Report, drawn: bool) -> str:
    parts = ""
    if drawn:
        from compressor.profiles.plots import latency_plot, size_plot

        parts = _grid("".join(_figure(plot) for plot in (latency_plot(report), size_plot(report)) if plot))
    comparisons, every = facts.comparison_table(report), facts.latency_table(report)
    if comparisons:
        parts += _table(comparisons, "Measured side by side")
    return parts + (_fold("Every latency", every) if every else "")


def _curve(report: Report, drawn: bool) -> str:
    table = facts.curve_table(report)
    if table is None:
        return ""
    if not drawn:
        return _table(table)
    from compressor.profiles.plots import curve_plots

    plots = "".join(map(_figure, curve_plots(report)))
    return _grid(plots) + _table(table)


def _training(report: Report) -> str:
    from compressor.profiles.plots import training_plot

    curves = [(phase, loss, values) for phase, losses in report.training.items() for loss, values in losses.items()]
    plots = [training_plot(f"loss-{number}", *curve) for number, curve in enumerate(curves[:_MAX_CURVES])]
    drawn = "".join(_figure(plot) for plot in plots if plot)
    left_out = len(curves) - _MAX_CURVES
    note = f'<p class="note">{left_out} more curves are in report.json.</p>' if left_out > 0 else ""
    return f'<div class="grid small">{drawn}</div>{note}' if drawn else ""


def _engines(report: Report) -> str:
    table = facts.engine_table(report)
    return _table(table) if table else ""


def _recipe(report: Report) -> str:
    parts = ""
    if report.command:
        # Options stay whole where the line breaks.
        options = " ".join(f"<span>{_text(part)}</span>" for part in re.split(r" (?=-)", report.command))
        parts = f'<code class="command">{options}</code>'
    if report.recipe:
        text = yaml.safe_dump(json.loads(json.dumps(report.recipe, default=str)), sort_keys=False, allow_unicode=True)
        parts += f'<details><summary>The resolved recipe</summary><pre tabindex="0">{_text(text)}</pre></details>'
    return parts


def _machine(machine: Mapping[str, Any]) -> str:
    rows = [f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.machine_lines(machine)]
    return f'<div class="card"><dl class="machine">{"".join(rows)}</dl></div>' if rows else ""


def _table(table: Table, caption: str = "") -> str:
    heads = "".join(
        f'<th scope="col"{_aligned(column.numeric)}>{_text(column.heading)}</th>' for column in table.columns
    )
    body = ""
    for row in table.rows:
        cells = "".join(
            f'<th scope="row">{_text(cell)}</th>'
            if number == 0
            else f"<td{_aligned(column.numeric)}>{_text(cell)}</td>"
            for number, (cell, column) in enumerate(zip(row.cells, table.columns, strict=True))
        )
        kind = ' class="lead"' if row.lead else ""
        body += f"<tr{kind}>{cells}</tr>\n"
    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    label = _text(caption or "table")
    grouped = ' class="grouped"' if any(row.lead for row in table.rows) else ""
    notes = "".join(f'<p class="note">{_text(note)}</p>' for note in table.notes)
    return (
        f'<div class="table"><div class="scroll" tabindex="0" role="region" aria-label="{label}">'
        f"<table{grouped}>{title}<thead><tr>{heads}</tr></thead><tbody>\n{body}</tbody></table></div>{notes}</div>"
    )


def _aligned(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


def _fold(title: str, table: Table) -> str:
    state = " open" if len(table.rows) <= _OPEN_ROWS else ""
    return f"<details{state}><summary>{_text(title)} ({len(table.rows)} rows)</summary>{_table(table)}</details>"


def _grid(content: str) -> str:
    return f'<div class="grid">{content}</div>' if content else ""


def _figure(plot: Any) -> str:
    caption = f"<figcaption>{_text(plot.caption)}</figcaption>" if plot.caption else ""
    return f'<figure class="card"><h3>{_text(plot.title)}</h3>{plot.svg}{caption}</figure>'


def _legend(report: Report) -> str:
    from compressor.profiles.plots import model_series

    entries = [
        f'<li><i style="background:var(--series-{number})"></i>{_text(name)}</li>'
        for name, number in model_series(report).items()
    ]
    return f'<ul class="legend" aria-label="Colours of the models">{"".join(entries)}</ul>'


def _sheet(sheet: SampleSheet) -> str:
    width = struct.unpack(">I", base64.b64decode(sheet.png_base64[:32])[16:20])[0]
    kind = ' class="pixels"' if width < _PIXELATED_BELOW else ""
    caption = f"<figcaption>{_text(sheet.caption)}</figcaption>" if sheet.caption else ""
    alt = _text(sheet.caption or sheet.title)
    return (
        f'<figure class="card sheet"><h3>{_text(sheet.title)}</h3>'
        f'<img{kind} alt="{alt}" src="data:image/png;base64,{sheet.png_base64}">{caption}</figure>'
    )


def _list(lines: list[str]) -> str:
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f'<div class="card"><ul class="plain">{items}</ul></div>' if lines else ""


def _text(value: str) -> str:
    return html.escape(str(value), quote=True)
