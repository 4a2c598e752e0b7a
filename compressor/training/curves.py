"""Curves over the steps of a phase (learning rate, momentum, temperature, loss weights): pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from compressor.errors import RequestError
from compressor.training.phase import constant

__all__ = [
    "Curve",
    "between",
    "constant",
    "cosine",
    "linear_decay",
    "linear_warmup",
    "one_cycle",
    "polynomial",
    "step_decay",
]

Curve = Callable[[int], float]
"""Value at step 0, 1, ...; a learning-rate curve is a factor of the base rate."""


def linear_warmup(warmup: int, after: Curve = constant) -> Curve:
    """Rise linearly over the first ``warmup`` steps ((step + 1) / warmup), then follow ``after``, which starts at 0."""
    _check("warmup", warmup)
    return lambda step: (step + 1) / warmup if step < warmup else after(step - warmup)


def cosine(steps: int, *, warmup: int = 0, floor: float = 0.0) -> Curve:
    """Half a cosine from 1 to ``floor`` that reaches the floor at ``steps`` and stays, after a linear warm-up."""
    _check("steps", steps)

    def decay(step: int) -> float:
        share = min(step / max(steps - warmup, 1), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))

    return linear_warmup(warmup, decay)


def linear_decay(steps: int, *, share: float = 1.0, floor: float = 0.0) -> Curve:
    """1 until the last ``share`` of the steps, then linearly down to ``floor`` at ``steps``."""
    _check("steps", steps)
    if not 0 < share <= 1:
        raise RequestError(f"the share of the steps that decay must be in (0, 1], got {share}")
    length = share * steps
    return lambda step: floor + (1 - floor) * min(max((steps - step) / length, 0.0), 1.0)


def polynomial(steps: int, power: float = 0.9) -> Curve:
    """``(1 - step / steps) ** power``: from 1 to 0 at ``steps``; power 1 is a straight line."""
    _check("steps", steps)
    return lambda step: max(1 - step / max(steps, 1), 0.0) ** power


def one_cycle(steps: int, *, rise: float = 0.3, start: float = 0.04, end: float = 1e-4) -> Curve:
    """Half a cosine up from ``start`` to 1 over the share ``rise`` of the steps, half a cosine down to ``end``."""
    _check("steps", steps)
    top = rise * steps

    def factor(step: int) -> float:
        if step < top:
            return _swing(start, 1.0, step / top)
        return _swing(1.0, end, min((step - top) / max(steps - top, 1), 1.0))

    return factor


def step_decay(milestones: Sequence[int], factor: float = 0.1) -> Curve:
    """Multiply by ``factor`` at each of the milestones."""
    return lambda step: factor ** sum(step >= milestone for milestone in milestones)


def between(start: float, end: float, steps: int, *, shape: str = "cosine") -> Curve:
    """From one value to another: "cosine" (an EMA's 0.996 -> 1) or "linear"; reached at ``steps``, then constant."""
    _check("steps", steps)
    if shape not in ("cosine", "linear"):
        raise RequestError(f"a curve is 'cosine' or 'linear', got {shape!r}")

    def value(step: int) -> float:
        share = min(step / max(steps, 1), 1.0)
        return _swing(start, end, share) if shape == "cosine" else start + (end - start) * share

    return value


def _swing(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


def _check(name: str, value: int) -> None:
    if value < 0:
        raise RequestError(f"{name} must not be negative, got {value}")
