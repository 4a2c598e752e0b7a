"""How far an exported graph's outputs are from the model's, and whether that is near enough."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from compressor.errors import ArtifactError
from compressor.runtimes.manifest import Parity
from compressor.runtimes.runtime import Array

__all__ = ["TOLERANCES", "compare", "root_mean_square", "worst"]

TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 1.0, "fp8": 1.0}
"""Largest difference over the largest absolute value of the output, by precision. For 8-bit graphs it only catches what
is broken: how good they are, the task's figures or `root_mean_square` decide."""


def compare(
    reference: Mapping[str, Array], outputs: Mapping[str, Array], tolerance: float, judged_by: str, records: int = 1
) -> Parity:
    """Compare outputs with the model's own; gives the output that differs most.

    Args:
        reference: The model's outputs.
        outputs: The artifact's outputs, under the same names.
        tolerance: Largest relative difference that passes.
        judged_by: What computed ``outputs``.
        records: Number of inputs that went in.

    Returns:
        The parity of the worst output: largest absolute difference, and that over the output's largest absolute value.
        For whole numbers and truth values the second is the share of entries that differ. Values that are not finite
        where the reference is finite make both infinite.

    Raises:
        ArtifactError: An output is missing or has another shape.
    """
    found: Parity | None = None
    for name, expected in reference.items():
        if name not in outputs:
            raise ArtifactError(f"the exported graph has no output {name!r}; it has {', '.join(outputs)}")
        given = outputs[name]
        if given.shape != expected.shape:
            raise ArtifactError(f"output {name!r} has the shape {given.shape}, the model's has {expected.shape}")
        absolute, relative = _difference(expected, given)
        if found is None or not relative <= found.relative:
            found = Parity(
                output=name, max_absolute=absolute, relative=relative, tolerance=tolerance, judged_by=judged_by,
                records=records,
            )  # fmt: skip
    if found is None:
        raise ArtifactError("there is no output to compare")
    return found


def root_mean_square(reference: Mapping[str, Array], outputs: Mapping[str, Array]) -> float:
    """Root-mean-square difference of the worst float output over its own root mean square; infinite if not finite."""
    found = 0.0
    for name, expected in reference.items():
        if expected.dtype.kind != "f":
            continue
        wide, other = expected.astype(np.float64), outputs[name].astype(np.float64)
        if not np.isfinite(other).all():
            return float("inf")
        scale = float(np.sqrt(np.mean(wide**2)))
        error = float(np.sqrt(np.mean((wide - other) ** 2)))
        found = max(found, error / scale if scale else error)
    return found


def worst(parities: list[Parity]) -> Parity:
    """The worst of several comparisons by one judge, counted together."""
    return max(parities, key=lambda parity: parity.relative).model_copy(
        update={"records": sum(parity.records for parity in parities)}
    )


def _difference(expected: Array, given: Array) -> tuple[float, float]:
    wide, other = expected.astype(np.float64), given.astype(np.float64)
    if expected.dtype.kind != "f":
        unlike = wide != other
        return float(np.abs(wide - other).max(initial=0.0)), float(unlike.mean()) if unlike.size else 0.0
    finite = np.isfinite(wide)
    if not np.array_equal(wide[~finite], other[~finite], equal_nan=True) or not np.isfinite(other[finite]).all():
        return float("inf"), float("inf")
    if not finite.any():
        return 0.0, 0.0
    absolute = float(np.abs(wide[finite] - other[finite]).max())
    scale = float(np.abs(wide[finite]).max())
    return absolute, absolute / scale if scale else (0.0 if absolute == 0.0 else float("inf"))
