"""A progress bar for people who watch."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["ProgressBar"]


class ProgressBar:
    """A bar over the steps of one phase, on standard error; silent unless ``visible``."""

    def __init__(self, phase: str, start: int, steps: int, visible: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=Console(stderr=True),
            disable=not visible,
        )
        self._task = self._progress.add_task(phase, total=steps, completed=start, losses="")

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, done: int, losses: Mapping[str, float]) -> None:
        """Move to ``done`` steps and show the losses."""
        if not self._progress.disable:
            text = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
            self._progress.update(self._task, completed=done, losses=text)
