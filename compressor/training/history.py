"""Losses over a phase, thinned while they come in, so that a long run has a short record."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["LossHistory"]


class LossHistory:
    """Means of each loss over windows of equal length.

    Args:
        steps: Length of the phase.
        points: How many windows it is divided into at most.

    Attributes:
        curves: ``(steps done, mean since the point before)`` by loss.
    """

    def __init__(self, steps: int, points: int = 500) -> None:
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self._steps, self._window = steps, max(1, math.ceil(steps / points))
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, name: str, value: float) -> None:
        """Count one value of a loss, of whatever update it comes; a non-finite one is left out."""
        if math.isfinite(value):
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + 1)

    def mark(self, name: str, done: int, value: float) -> None:
        """Record a point as it is (a validation score)."""
        if math.isfinite(value):
            self.curves.setdefault(name, []).append((done, value))

    def close(self, done: int) -> None:
        """End a step; at the end of a window, turn what came in into points."""
        if done % self._window == 0 or done == self._steps:
            for name, (total, count) in self._sums.items():
                self.curves.setdefault(name, []).append((done, total / count))
            self._sums.clear()

    def latest(self) -> dict[str, float]:
        """The newest mean of every loss."""
        means = {name: points[-1][1] for name, points in self.curves.items()}
        return means | {name: total / count for name, (total, count) in self._sums.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"curves": self.curves, "sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.curves = {name: [(step, value) for step, value in points] for name, points in state["curves"].items()}
        self._sums = {name: (total, count) for name, (total, count) in state["sums"].items()}
