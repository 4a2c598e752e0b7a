"""Other sizes of axes that a graph declares free: which are tried, the inputs at them, and whether an engine holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from compressor.errors import ArtifactError, CompressorError
from compressor.exporters.interpreter import Interpreter
from compressor.exporters.tied_entries import compare_sorted, possible_scores
from compressor.runtimes.runtime import Array, Run

__all__ = ["Sized", "check_other_sizes", "other_sizes", "resized", "said"]

Dynamic = Mapping[str, Mapping[int, str]]
"""Names of the free axes by input and axis."""
Limits = Mapping[str, tuple[int, int]]
"""Smallest and largest size of a free axis, by its name."""
Sized = tuple[Mapping[str, int], Mapping[str, Array]]
"""Sizes of free axes, and inputs that have them."""


def other_sizes(inputs: Mapping[str, Array], dynamic: Dynamic, limits: Limits | None = None) -> list[dict[str, int]]:
    """Sizes to try besides those of the inputs, one axis at a time.

    A batch of one and of one more than given: engines and modules treat 1 in a way of its own. Other axes twice the
    size, since networks often want multiples of a stride.

    Args:
        inputs: Arrays by name, at the sizes that hold already.
        dynamic: The free axes.
        limits: What is allowed; all sizes otherwise.
    """
    given = {
        label: inputs[key].shape[axis] for key, axes in dynamic.items() for axis, label in axes.items() if key in inputs
    }
    found = []
    for label, size in sorted(given.items()):
        for wanted in (1, size + 1) if label == "batch" else (2 * size,):
            low, high = (limits or {}).get(label, (1, wanted))
            tried = min(max(wanted, low), high)
            if tried == size:  # the other end of what is allowed
                tried = low if wanted > size else high
            if tried != size and {label: tried} not in found:
                found.append({label: tried})
    return found


def resized(inputs: Mapping[str, Array], dynamic: Dynamic, sizes: Mapping[str, int]) -> dict[str, Array]:
    """The inputs with the named axes at other sizes, filled by going round the given entries."""
    result = {}
    for key, array in inputs.items():
        for axis, label in dynamic.get(key, {}).items():
            if label in sizes:
                array = np.take(array, np.arange(sizes[label]) % array.shape[axis], axis=axis)
        result[key] = array
    return result


def said(sizes: Mapping[str, int]) -> str:
    """Sizes for a message: "batch = 3"."""
    return ", ".join(f"{label} = {size}" for label, size in sizes.items())


def check_other_sizes(
    name: str, engine: Run, judge: str, plain: Path, others: Sequence[Sized], tolerance: float
) -> None:
    """Compare an engine with the float32 graph at other sizes of the free axes.

    The float32 graph itself was compared with the module at other sizes when it was exported.

    Args:
        name: Of the graph, for messages.
        engine: What was built.
        judge: What it is called.
        plain: The float32 ONNX graph.
        others: What to try.
        tolerance: Largest relative difference.

    Raises:
        ArtifactError: The engine fails there, or gives something else.
    """
    if not others:
        return
    reference, scores = Interpreter(plain), possible_scores(plain)
    for sizes, inputs in others:
        where = f"graph {name!r} does not hold on {judge} at {said(sizes)}, which is declared dynamic"
        try:
            expected = reference(inputs)
        except ArtifactError:
            continue  # the module takes no such size: a record may be larger than the example, which was tried
        try:
            parity = compare_sorted(expected, engine(inputs), tolerance, judge, scores)
        except CompressorError as error:
            raise ArtifactError(f"{where}: {error}") from error
        if not parity.relative <= parity.tolerance:
            raise ArtifactError(
                f"{where}: output {parity.output!r} differs from the float32 graph's by {parity.relative:.1e} of its "
                f"scale (allowed: {parity.tolerance:.0e})"
            )
