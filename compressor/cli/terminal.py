"""How the commands speak: tables for people or one JSON document, errors as one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["Terminal", "plain_table", "tell_error"]

WIDTH_OF_FILES = 140
"""Columns of a table that is written to a file or a pipe."""


class Terminal:
    """Where a command's result goes.

    Args:
        json_output: One JSON document on standard output instead of text.
        debug: Errors come with their traceback.
    """

    def __init__(self, *, json_output: bool = False, debug: bool = False) -> None:
        self.json_output, self.debug = json_output, debug

    @cached_property
    def console(self) -> Console:
        """The rich console on standard output."""
        from rich.console import Console

        return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_FILES)

    def show(self, value: Any, render: Callable[[Console], None]) -> None:
        """Print a result: ``value`` as JSON, or what ``render`` prints."""
        if self.json_output:
            print(json.dumps(value, indent=2, ensure_ascii=False, default=str))
        else:
            render(self.console)


def plain_table(*columns: str) -> Table:
    """A table without lines around it, whose cells wrap."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def tell_error(message: str, kind: str, exit_code: int, *, json_output: bool, process: int = 0) -> None:
    """Print an error on standard error: one line, or one line of JSON."""
    line = " ".join(message.split())
    if json_output:
        print(json.dumps({"error": line, "type": kind, "exit_code": exit_code}, ensure_ascii=False), file=sys.stderr)
        return
    label = f"error (process {process}): " if process else "error: "
    if sys.stderr.isatty():
        label = f"\033[1;31m{label}\033[0m"
    print(f"{label}{line}", file=sys.stderr)
