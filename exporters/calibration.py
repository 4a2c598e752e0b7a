"""What 8-bit graphs are calibrated on, and whether it is of any use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compressor.errors import RequestError
from compressor.runtimes.runtime import Array, Run

__all__ = ["CalibrationData", "check_records"]

FEW = 32
"""Below so many samples a warning is given: ranges then hang on chance."""


@dataclass(frozen=True)
class CalibrationData:
    """What the caller of the export brings for an 8-bit target.

    Attributes:
        records: By graph, inputs that it really gets while the driver runs training data.
        judge: What is lost of the task's figures when the driver runs on the given graphs: 0.01 is a point of a share,
            or a hundredth of another figure; None where the task cannot be judged.
        notes: What a reader should know of the data, one sentence each.
    """

    records: Mapping[str, Sequence[Mapping[str, Array]]]
    judge: Callable[[Mapping[str, Run]], float] | None = None
    notes: tuple[str, ...] = ()


def check_records(graph: str, records: Sequence[Mapping[str, Array]]) -> tuple[int, tuple[str, ...]]:
    """Refuse recorded inputs that no range can be taken from.

    Args:
        graph: Its name, for messages.
        records: By input name, arrays whose first axis counts the samples.

    Returns:
        The number of samples, and warnings.

    Raises:
        RequestError: There is none, a value is not finite, or all samples are flat or the same.
    """
    if not records:
        raise RequestError(f"graph {graph!r} has no calibration data: give the task some training data")
    floats = [name for name, array in records[0].items() if array.dtype.kind == "f"]
    rich = []
    for name in floats:
        arrays = [np.asarray(record[name]) for record in records]
        if not all(np.isfinite(array).all() for array in arrays):
            raise RequestError(
                f"the calibration data of graph {graph!r} are not finite: input {name!r} holds NaN or infinity; "
                "clean the data"
            )
        if arrays[0][:1].size > 1:
            rich += [(name, [row.ravel() for array in arrays for row in array])]
    for said, useless in (("flat: every sample of", _flat), ("one sample: all values of", _same)):
        if rich and all(useless(rows) for _, rows in rich):
            what = "has one value" if useless is _flat else "are the same in all samples"
            raise RequestError(
                f"the calibration data of graph {graph!r} are {said} input {rich[0][0]!r} {what}; give real data"
            )
    samples = sum(len(next(iter(record.values()))) for record in records)
    if samples < FEW:
        return samples, (f"Graph {graph!r} is calibrated on {samples} samples only; {FEW} or more are better.",)
    return samples, ()


def _flat(rows: Sequence[Array]) -> bool:
    return all(float(np.ptp(row)) == 0.0 for row in rows)


def _same(rows: Sequence[Array]) -> bool:
    return len(rows) > 1 and all(np.array_equal(row, rows[0]) for row in rows[1:])
