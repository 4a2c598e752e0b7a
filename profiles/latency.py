"""Latency, measured so that candidates can be compared: interleaved rounds, medians, a word when it was noisy.

A machine drifts (clock, temperature, neighbours). Measuring one candidate after the other turns that drift into a
difference between them; here every round measures all, in rotating order, and a ratio is taken round by round.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from compressor.errors import RequestError

__all__ = ["Latency", "Ratio", "Timed", "WarmUp", "measure_interleaved", "ratio", "summarise", "timed"]

MAX_SAMPLES = 400
NOISY_SPREAD = 0.15
"""Spread of the rounds' medians, (p90 - p10) / median, above which a figure is called noisy."""
MIN_ROUNDS = 3
_MAX_REPEATS = 100

Result = TypeVar("Result")


class Latency(BaseModel):
    """Durations of one candidate, in milliseconds.

    Attributes:
        samples_ms: Single durations in the order of time, evenly thinned to at most 400; statistics use all of them.
        round_medians_ms: Median of each round, which `ratio` pairs.
        mean, p50, p90, p99, min: Over all durations.
        count: Number of durations measured.
        warmup: Number of calls before them.
        noisy: The rounds disagree: read differences below the spread as none.
        reason: Why it is called noisy; empty otherwise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    samples_ms: tuple[float, ...]
    round_medians_ms: tuple[float, ...]
    mean: float
    p50: float
    p90: float
    p99: float
    min: float
    count: int
    warmup: int = 0
    noisy: bool = False
    reason: str = ""

    def throughput(self, batch: int = 1) -> float:
        """Items per second at the median duration, when one call processes ``batch`` items."""
        return 1000.0 * batch / self.p50


class Ratio(NamedTuple):
    """Median of the per-round ratios, with their 10th and 90th percentile."""

    value: float
    low: float
    high: float


class Timed(NamedTuple):
    """What a call returned and how long it took."""

    value: object
    milliseconds: float


@dataclass(frozen=True)
class WarmUp:
    """When a candidate counts as warm.

    Calls are made in windows; it is warm when a window's median differs from that of the window before by at most
    ``tolerance`` (relative). It stops anyway after ``max_seconds``, but never before ``min_calls``.
    """

    window: int = 5
    tolerance: float = 0.05
    min_calls: int = 2
    max_seconds: float = 2.0


def timed(call: Callable[[], object]) -> Timed:
    """Call once and time it: loading an engine, or its first inference."""
    start = time.perf_counter_ns()
    value = call()
    return Timed(value, (time.perf_counter_ns() - start) / 1e6)


def measure_interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    budget_seconds: float = 10.0,
    warmup: WarmUp | None = None,
) -> dict[str, Latency]:
    """Measure candidates side by side.

    Each is warmed up by itself. Then every round runs all candidates, each several times in a row so that its data is
    as warm as in use; the order rotates from round to round. The number of repeats follows from the budget. When the
    budget runs out, the round is finished and the rest left out, after 3 rounds at the earliest.

    Args:
        candidates: By name; a call must return only when its result is there (a device call must synchronise).
        rounds: At most this many, at least 3.
        budget_seconds: For all candidates together, without the warm-up.
        warmup: When a candidate counts as warm; the default suits calls from microseconds to seconds.

    Returns:
        One `Latency` a candidate, all with the same number of rounds. An exception of a candidate goes through.

    Raises:
        RequestError: No candidates, fewer than 3 rounds or no time.
    """
    if not candidates or rounds < MIN_ROUNDS or budget_seconds <= 0:
        raise RequestError(f"measuring needs candidates, at least {MIN_ROUNDS} rounds and a positive time budget")
    names = list(candidates)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        warm = {name: _warm_up(candidates[name], warmup or WarmUp()) for name in names}
        share = budget_seconds * 1e3 / (rounds * len(names))
        repeats = {name: int(np.clip(share / max(warm[name][1], 1e-4), 1, _MAX_REPEATS)) for name in names}
        measured: dict[str, list[list[float]]] = {name: [] for name in names}
        deadline = time.perf_counter() + budget_seconds
        for number in range(rounds):
            if number >= MIN_ROUNDS and time.perf_counter() > deadline:
                break
            first = number % len(names)
            for name in names[first:] + names[:first]:
                measured[name].append([timed(candidates[name]).milliseconds for _ in range(repeats[name])])
    finally:
        if collecting:
            gc.enable()
    return {name: summarise(measured[name], warmup=warm[name][0]) for name in names}


def summarise(rounds: Sequence[Sequence[float]], *, warmup: int = 0) -> Latency:
    """Make a `Latency` of the durations of each round, in milliseconds.

    Raises:
        RequestError: There is no duration, or a round is empty.
    """
    if not rounds or not all(len(one) for one in rounds):
        raise RequestError("a latency needs at least one measured call in every round")
    samples = np.array([value for one in rounds for value in one])
    medians = np.array([np.median(one) for one in rounds])
    p50, p90, p99 = np.percentile(samples, (50, 90, 99))
    keep = np.linspace(0, len(samples) - 1, min(len(samples), MAX_SAMPLES)).round().astype(int)
    low, high = np.percentile(medians, (10, 90))
    spread = float((high - low) / max(float(np.median(medians)), 1e-9))
    noisy = spread > NOISY_SPREAD
    reason = f"the medians of {len(medians)} rounds spread by {spread:.0%} (limit {NOISY_SPREAD:.0%})"
    return Latency(
        samples_ms=tuple(round(float(value), 6) for value in samples[keep]),
        round_medians_ms=tuple(round(float(value), 6) for value in medians),
        mean=float(samples.mean()),
        p50=float(p50),
        p90=float(p90),
        p99=float(p99),
        min=float(samples.min()),
        count=len(samples),
        warmup=warmup,
        noisy=noisy,
        reason=reason if noisy else "",
    )


def ratio(a: Latency, b: Latency) -> Ratio:
    """How many times longer ``a`` takes than ``b``: the median over rounds of their ratio, with its spread.

    Raises:
        RequestError: They were not measured in the same rounds (their number differs).
    """
    if len(a.round_medians_ms) != len(b.round_medians_ms):
        raise RequestError(
            f"a ratio pairs rounds, but these have {len(a.round_medians_ms)} and {len(b.round_medians_ms)}; "
            "measure both in one call of measure_interleaved"
        )
    ratios = np.array(a.round_medians_ms) / np.maximum(np.array(b.round_medians_ms), 1e-9)
    low, value, high = np.percentile(ratios, (10, 50, 90))
    return Ratio(float(value), float(low), float(high))


def _warm_up(call: Callable[[], object], plan: WarmUp) -> tuple[int, float]:
    """Call until warm; return the number of calls and the last window's median in milliseconds."""
    start, calls = time.perf_counter(), 0
    before: float | None = None
    while True:
        window: list[float] = []
        for _ in range(plan.window):
            window.append(timed(call).milliseconds)
            calls += 1
            if time.perf_counter() - start > plan.max_seconds and calls >= plan.min_calls:
                return calls, float(np.median(window))
        median = float(np.median(window))
        if before is not None and abs(median - before) <= plan.tolerance * before and calls >= plan.min_calls:
            return calls, median
        before = median
