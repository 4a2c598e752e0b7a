"""Time and memory of the cases of `kernel_suites` on a GPU, beside what the machine can do at best.

A time is the median of replays of a CUDA graph, each after the second-level cache was filled with something else: what
the GPU needs, without the time that Python takes to launch it. What cannot be recorded as a graph is timed call by
call, and marked. The floor is what must move over the bandwidth of a large copy, or what must be multiplied over the
speed of a large matrix product, both measured here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from kernel_suites import FULL, OURS, QUICK, SMALL, SUITES, Case, Sizes

from compressor.kernels import backend

__all__ = ["Measured", "Speeds", "check", "measure", "speeds", "targets", "time_table"]

_REPEATS = 20
_CACHE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Speeds:
    """What the GPU reaches: bytes a second of a copy (read and written), operations a second of a bfloat16 product."""

    bandwidth: float
    operations: float


@dataclass(frozen=True)
class Measured:
    """One candidate on one case.

    Attributes:
        suite: Group of the case.
        case: Its sizes and options.
        candidate: Who solved it.
        milliseconds: Median; None where it failed.
        floor: Milliseconds that nothing can go below; None where none is known.
        extra_share: Peak memory beyond inputs and gradients, as a share of the inputs.
        replayed: Whether a CUDA graph was timed.
        error: Of ours: largest difference from float64, over the largest value.
        note: Why there is no time.
    """

    suite: str
    case: str
    candidate: str
    milliseconds: float | None = None
    floor: float | None = None
    extra_share: float | None = None
    replayed: bool = True
    error: float | None = None
    note: str = ""

    @property
    def times_floor(self) -> float | None:
        """How many times the floor; None where either is unknown."""
        return None if self.milliseconds is None or not self.floor else self.milliseconds / self.floor

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"times_floor": self.times_floor}


def speeds() -> Speeds:
    """Measure copy and matrix product."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))[0]
    matrix = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    product = milliseconds(lambda: matrix @ matrix)[0]
    return Speeds(2 * source.numel() / copy * 1e3, 2 * 8192**3 / product * 1e3)


def milliseconds(run: Callable[[], Any]) -> tuple[float, bool]:
    """Median of a function's time on the GPU, and whether it could be recorded as a graph."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    call, replayed = run, False
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        call, replayed = graph.replay, True
    except RuntimeError:
        torch.cuda.synchronize()
    flush = torch.empty(_CACHE_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), replayed


def extra_bytes(run: Callable[[], Any], gradient_bytes: int) -> int:
    """Peak memory of one run beyond what was there before and the gradients."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = run()
    torch.cuda.synchronize()
    del made
    return max(0, torch.cuda.max_memory_allocated() - before - gradient_bytes)


def measure(only: Sequence[str] | None, *, quick: bool, report: Callable[[Measured], None]) -> dict[str, Any]:
    """Hold every case against float64 and time its candidates.

    Args:
        only: Names of suites; all by default.
        quick: Fewer sizes.
        report: Called with each result as it comes.

    Returns:
        What the result file holds.
    """
    device, best, results = torch.device("cuda"), speeds(), []
    for case in _cases(only, QUICK if quick else FULL, device):
        for one in _time_case(case, best):
            report(one)
            results.append(one)
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "bandwidth_gb_per_second": best.bandwidth / 1e9,
        "bf16_tflop_per_second": best.operations / 1e12,
        "correct": all(one.candidate != OURS or not one.note for one in results),
        "targets": targets(results),
        "results": [one.as_json() for one in results],
    }


def _cases(only: Sequence[str] | None, sizes: Sizes, device: torch.device) -> Iterator[Case]:
    for name, suite in SUITES.items():
        if not only or name in only:
            yield from suite(sizes, device)


def _time_case(case: Case, best: Speeds) -> Iterator[Measured]:
    floor = 1e3 * max(case.floor_bytes / best.bandwidth, case.floor_operations / best.operations)
    for name, run in case.candidates.items():
        named = {"suite": case.suite, "case": case.name, "candidate": name, "floor": floor or None}
        error = case.error() if name == OURS else None
        try:
            run()  # compiles
            extra = extra_bytes(run, case.gradient_bytes)
            time, replayed = milliseconds(run)
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as problem:
            yield Measured(**named, error=error, note=str(problem).strip().splitlines()[0][:120])
            torch.cuda.empty_cache()
            continue
        share = extra / case.input_bytes if case.input_bytes else None
        note = f"differs from float64 by {error:.1e}" if error is not None and not error <= case.tolerance else ""
        yield Measured(**named, milliseconds=time, extra_share=share, replayed=replayed, error=error, note=note)


def check(only: Sequence[str] | None, report: Callable[[Measured], None]) -> dict[str, Any]:
    """Run every candidate once on small problems in Triton's interpreter, and hold ours against float64: no times."""
    results = []
    with backend("triton"):
        for case in _cases(only, SMALL, torch.device("cpu")):
            for name, run in case.candidates.items():
                run()
                error = case.error() if name == OURS else None
                wrong = error is not None and not error <= 1e-4
                note = f"differs from float64 by {error:.1e}" if wrong else "ran"
                results.append(Measured(case.suite, case.name, name, error=error, note=note))
                report(results[-1])
    correct = not any(one.note.startswith("differs") for one in results)
    return {"correct": correct, "results": [one.as_json() for one in results]}


def targets(results: Sequence[Measured]) -> list[dict[str, Any]]:
    """What was aimed at, and what came out; a target without a measurement is left out."""
    by_case: dict[tuple[str, str], dict[str, Measured]] = {}
    for one in results:
        by_case.setdefault((one.suite, one.case), {})[one.candidate] = one
    found = []
    for (suite, case), candidates in by_case.items():
        ours = candidates[OURS]
        if ours.milliseconds is None:
            continue
        if suite == "kl" and ours.times_floor is not None:
            found.append(_target(suite, case, "time over the floor", ours.times_floor, at_most=1.25))
        if suite == "kl" and ours.extra_share is not None:
            found.append(_target(suite, case, "extra memory over the logits", ours.extra_share, at_most=0.01))
        for other, least in (("dense flash", 4.0 if "80% sparse" in case else None), ("FlexAttention", 1.0)):
            time = candidates[other].milliseconds if other in candidates else None
            if suite == "attention" and least is not None and time is not None:
                found.append(
                    _target(suite, case, f"{other}'s time over ours", time / ours.milliseconds, at_least=least)
                )
    return found


def _target(
    suite: str, case: str, what: str, value: float, *, at_most: float | None = None, at_least: float | None = None
) -> dict[str, Any]:
    met = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
    return {
        "suite": suite,
        "case": case,
        "what": what,
        "value": value,
        "at_most": at_most,
        "at_least": at_least,
        "met": met,
    }


HEAD = f"{'suite':<10} {'case':<46} {'candidate':<20} {'ms':>9} {'x floor':>8} {'extra':>7} {'error':>8}  note"


def time_table(one: Measured) -> str:
    """One line of the table under `HEAD`."""

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    note = one.note or ("" if one.replayed else "call by call")
    return (
        f"{one.suite:<10} {one.case:<46} {one.candidate:<20} {shown(one.milliseconds, '9.3f'):>9} "
        f"{shown(one.times_floor, '8.2f'):>8} {shown(one.extra_share, '7.2%'):>7} {shown(one.error, '8.1e'):>8}  {note}"
    )
