"""What a run says: events appended to ``log.jsonl`` for programs, lines for people."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from compressor.errors import CompressorError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Log", "process_rank", "read_log"]


def process_rank() -> int:
    """This process's number among those of one launch (``accelerate launch``, ``torchrun``); 0 where it is alone."""
    value = os.environ.get("RANK", "0")
    return int(value) if value.isdigit() else 0


class Log:
    """Events for ``log.jsonl`` and lines for people; silent on all processes but the first.

    Args:
        quiet: Print nothing; events are still written.
        console: Where lines go; standard output by default.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.leads = process_rank() == 0
        self.quiet = quiet or not self.leads
        self._console = console
        self._file: IO[str] | None = None

    def attach(self, path: Path) -> None:
        """Append events to ``path`` from now on.

        Raises:
            CompressorError: The file cannot be written.
        """
        self.close()
        if not self.leads:
            return
        try:
            whole = _ends_whole(path)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
            if not whole:  # a kill in the middle of a line
                self._file.write("\n")
        except OSError as error:
            raise CompressorError(f"cannot write {path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Close the file; later events are printed only."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def event(self, kind: str, message: str = "", **fields: Any) -> None:
        """Record an event, and print ``message`` if there is one.

        Args:
            kind: What happened: "stage", "train", "export", ...
            message: One line for people.
            fields: JSON values; numbers that JSON lacks (NaN, infinity) are written as null.

        Raises:
            CompressorError: The disk is full.
        """
        if self._file is not None:
            record = {"time": round(time.time(), 3), "kind": kind, **({"message": message} if message else {})}
            line = json.dumps(_finite(record | fields), ensure_ascii=False, allow_nan=False, default=str)
            try:
                self._file.write(line + "\n")
                self._file.flush()
            except OSError as error:
                name = self._file.name
                self.close()
                raise CompressorError(f"cannot write {name}: {error.strerror or error}") from error
        if message:
            self._print(message)

    def say(self, message: str, **fields: Any) -> None:
        """Print a line and record it."""
        self.event("message", message, **fields)

    def warn(self, message: str, **fields: Any) -> None:
        """Print a warning and record it."""
        self.event("warning", f"warning: {message}", **fields)

    @property
    def console(self) -> Console:
        """The rich console that lines go to."""
        if self._console is None:
            from rich.console import Console

            self._console = Console(highlight=False, soft_wrap=True)
        return self._console

    def _print(self, message: str) -> None:
        if not self.quiet:
            self.console.print(message, markup=False)


def _ends_whole(path: Path) -> bool:
    """Whether the file is absent, empty or ends with a line break."""
    if not path.exists() or path.stat().st_size == 0:
        return True
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _finite(value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a scalar of numpy or torch
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def read_log(path: Path) -> list[dict[str, Any]]:
    """The events of a ``log.jsonl``; a line that a kill cut short is left out. No file is no events."""
    events = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            events.append(value)
    return events
