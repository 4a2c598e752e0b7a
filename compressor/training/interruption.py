"""Ctrl-C and SIGTERM: let a step finish, so that the run can be saved and go on later."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interruption"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While entered and patient, the first signal is only remembered; otherwise it is a KeyboardInterrupt at once.

    Attributes:
        asked: Whether a signal has come.
        patient: Whether something is under way whose end is near and worth waiting for.
    """

    def __init__(self) -> None:
        self.asked = self.patient = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        self.asked = self.patient = False
        if threading.current_thread() is threading.main_thread():
            for kind in _SIGNALS:
                self._before[kind] = signal.signal(kind, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self.patient:
            raise KeyboardInterrupt
        self.asked = True
