"""A report as Markdown: the same facts as the HTML page, as tables."""

from __future__ import annotations

import json
import re

import yaml

from compressor.profiles import report_facts as facts
from compressor.profiles.report import Report
from compressor.profiles.report_facts import Table

__all__ = ["render_markdown"]


def render_markdown(report: Report) -> str:
    """Return the text, one block a section; pictures and training curves are in the HTML page alone."""
    result = facts.verdict(report)
    blocks = [
        f"# {_text(report.title)}",
        f"Task {_text(report.task.name)}, {_text(report.created)}.",
        _text(result.sentence),
    ]
    blocks += ["\n".join(f"- **{_text(f.value)}** {_text(f.label)}: {_text(f.detail)}" for f in result.facts)]
    blocks += _fenced(report.command, "sh")
    for title, table in (
        ("Summary", facts.summary_table(report)),
        ("Chain", facts.ladder_table(report)),
        ("Quality", facts.quality_table(report)),
        ("Measured side by side", facts.comparison_table(report)),
        ("Students of this run", facts.curve_table(report)),
        ("Latency", facts.latency_table(report)),
        ("Engines", facts.engine_table(report)),
    ):
        if table is not None and table.rows:
            blocks += [f"## {title}", _table(table), *map(_text, table.notes)]
    for title, lines in (
        ("Training", _training(report)),
        ("Not measured", facts.not_measured(report)),
        ("Notes", facts.notes(report)),
        ("Machine and versions", [f"{name}: {value}" for name, value in facts.machine_lines(report.machine)]),
    ):
        if lines:
            blocks += [f"## {title}", "\n".join(f"- {_text(line)}" for line in lines)]
    if report.recipe:
        recipe = yaml.safe_dump(json.loads(json.dumps(report.recipe, default=str)), sort_keys=False, allow_unicode=True)
        blocks += ["## Recipe", *_fenced(recipe, "yaml")]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _training(report: Report) -> list[str]:
    lines = []
    for phase, losses in report.training.items():
        for loss, values in losses.items():
            known = [(step, value) for step, value in values if value is not None]
            if known:
                lines.append(f"{phase}, {loss}: {known[0][1]:.4g} → {known[-1][1]:.4g} at step {known[-1][0]:g}")
    return lines


def _table(table: Table) -> str:
    lines = [
        [column.heading for column in table.columns],
        *[[f"**{row.cells[0]}**", *row.cells[1:]] if row.lead else row.cells for row in table.rows],
    ]
    head, *body = ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines]
    rule = "|" + "|".join("---:" if column.numeric else "---" for column in table.columns) + "|"
    return "\n".join([head, rule, *body])


def _fenced(text: str, language: str) -> list[str]:
    if not text:
        return []
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}\n{text.rstrip()}\n{fence}"]


def _cell(text: str) -> str:
    bold = text.startswith("**") and text.endswith("**") and len(text) > 4
    escaped = _text(text[2:-2] if bold else text).replace("|", "\\|")
    return f"**{escaped}**" if bold else escaped


def _text(text: str) -> str:
    """Escape what Markdown or HTML would read as markup; keep it on one line."""
    return re.sub(r"([\\`*_<>\[\]])", r"\\\1", " ".join(str(text).split()))
