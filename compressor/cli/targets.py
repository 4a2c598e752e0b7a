"""`compress targets`: what every target needs, and whether it can be built and run on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from compressor.cli.terminal import Terminal, plain_table

if TYPE_CHECKING:
    from rich.table import Table

    from compressor.profiles.target import Target

__all__ = ["target_rows", "targets", "targets_table"]


def targets(context: typer.Context) -> None:
    """Every target: can it be built here, can it run here; if not, why and what to install."""
    from compressor.profiles.target import load_target, target_names

    rows = target_rows(load_target(name) for name in target_names())
    terminal: Terminal = context.obj
    terminal.show({"targets": rows}, lambda console: console.print(targets_table(rows)))


def target_rows(chosen: Iterable[Target]) -> list[dict[str, Any]]:
    """What there is to say of targets on this machine, as JSON values."""
    from compressor.profiles.target import availability

    rows = []
    for target in chosen:
        found = availability(target)
        facts: dict[str, Any] = {"name": target.name, "description": target.description, "device": target.device}
        facts |= {"can_build": found.can_build, "can_run": found.can_run, "engine": found.engine}
        rows.append(facts | {"reason": found.reason, "install": found.install_hint})
    return rows


def targets_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of `target_rows` as a table."""
    from rich.text import Text

    table = plain_table("target", "build here", "run here", "engine", "notes")
    for row in rows:
        notes = [row["reason"] or row["description"], row["install"]]
        cells = [Text("yes", "green") if row[key] else Text("no", "yellow") for key in ("can_build", "can_run")]
        table.add_row(Text(row["name"], "bold"), *cells, Text(row["engine"]), Text("\n".join(filter(None, notes))))
    return table
