"""What a kernel's instruction counts mean against the memory floor: an argument from data sheets, not a measurement.

A kernel that moves b bytes an entry can run at the speed of the memory only if its instructions an entry fit into the
time in which the memory moves those bytes. `floors` sets the two beside each other. Figures of the GPUs are those of
their makers' data sheets (peak bandwidth, multiprocessors, boost clock); a multiprocessor issues 128 instructions of
threads and 16 special functions (exp2, reciprocal) a clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kernel_compilation import Report

__all__ = ["Estimate", "Gpu", "floor_table", "floors"]


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet: bytes a second, multiprocessors, clock in Hz."""

    name: str
    bandwidth: float
    multiprocessors: int
    clock: float


GPUS = {
    80: Gpu("A100 80GB", 2.04e12, 108, 1.41e9),
    86: Gpu("A10", 0.60e12, 72, 1.695e9),
    89: Gpu("L40S", 0.864e12, 142, 2.52e9),
    90: Gpu("H100 SXM", 3.35e12, 132, 1.83e9),
    100: Gpu("B200", 8.0e12, 148, 1.85e9),
    120: Gpu("RTX 5090", 1.79e12, 170, 2.41e9),
}


@dataclass(frozen=True)
class Estimate:
    """One divergence kernel on one GPU.

    Attributes:
        case: Which launch.
        gpu: Whose data sheet.
        bytes_an_entry: What must move.
        instructions_an_entry: Of a thread, for all walks over its row, the fixed part of a program included.
        special_an_entry: Of those, special functions.
        issue_share: Time to issue the instructions, in units of the memory floor; above 1 the kernel cannot reach it.
        special_share: The same for the special functions.
    """

    case: str
    gpu: str
    bytes_an_entry: float
    instructions_an_entry: float
    special_an_entry: float
    issue_share: float
    special_share: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def floors(reports: Sequence[Report]) -> list[Estimate]:
    """Estimates for the divergence kernels, whose listings take every entry of a tile through once a walk."""
    estimates = []
    for report in reports:
        if not report.entries_a_program:
            continue
        gpu = GPUS[report.capability]
        threads = 32 * report.num_warps
        instructions = report.instructions["all"] * threads / report.entries_a_program
        special = report.instructions.get("MUFU", 0) * threads / report.entries_a_program
        floor = report.bytes_an_entry / gpu.bandwidth
        a_second = gpu.multiprocessors * gpu.clock
        estimates.append(
            Estimate(
                case=report.case,
                gpu=gpu.name,
                bytes_an_entry=report.bytes_an_entry,
                instructions_an_entry=round(instructions, 1),
                special_an_entry=round(special, 2),
                issue_share=round(instructions / (128 * a_second) / floor, 2),
                special_share=round(special / (16 * a_second) / floor, 2),
            )
        )
    return estimates


def floor_table(estimates: Sequence[Estimate]) -> str:
    """One line a kernel and GPU."""
    head = (
        f"{'case':<53} {'GPU':<10} {'bytes':>6} {'instr':>6} {'special':>8} {'issue/floor':>12} {'special/floor':>14}"
    )
    lines = ["an entry of the rows, from listings and data sheets (not measured):", head, "-" * len(head)]
    for one in estimates:
        lines.append(
            f"{one.case:<53} {one.gpu:<10} {one.bytes_an_entry:>6.1f} {one.instructions_an_entry:>6.1f} "
            f"{one.special_an_entry:>8.2f} {one.issue_share:>12.2f} {one.special_share:>14.2f}"
        )
    return "\n".join(lines)
