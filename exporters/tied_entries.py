"""Outputs that a graph sorts by a score: engines may order entries of equal scores as they like.

A detector gives boxes, scores and labels in the order of the scores. Where two scores are equal, or differ by rounding
alone, the order is no one's fault; an untrained detector has many of them. So such outputs are compared up to the order
of entries whose scores the tolerance cannot tell apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compressor.errors import ArtifactError
from compressor.exporters.parity import compare
from compressor.runtimes.manifest import Parity
from compressor.runtimes.runtime import Array

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

__all__ = ["OrderError", "compare_sorted", "possible_scores"]

_SORTING = frozenset({"TopK", "NonMaxSuppression"})
_ADVICE = (
    "the scores are equal or nearly so, as those of an untrained model are: export trained weights with an example in "
    "which the model finds something, or give the scores and what belongs to them as outputs before they are selected"
)


class OrderError(ArtifactError):
    """Entries of a sorted output differ by more than their order."""


def possible_scores(path: Path) -> tuple[str, ...]:
    """Names of the float outputs by which a graph may sort others; none where it sorts nothing.

    An axis that is free in the inputs (the batch) is no axis of entries.
    """
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    if not any(node.op_type in _SORTING for node in _nodes(graph)):
        return ()
    free = {dim.dim_param for value in graph.input for dim in value.type.tensor_type.shape.dim if dim.dim_param}
    found = []
    for value in graph.output:
        shape = value.type.tensor_type.shape.dim
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT and shape and shape[-1].dim_param not in free:
            found.append(value.name)
    return tuple(found)


def compare_sorted(
    reference: Mapping[str, Array],
    outputs: Mapping[str, Array],
    tolerance: float,
    judged_by: str,
    scores: Collection[str] = (),
) -> Parity:
    """Compare outputs as `compare` does, up to the order of entries with tied scores.

    Args:
        reference: The model's outputs.
        outputs: The artifact's.
        tolerance: Largest relative difference that passes.
        judged_by: What computed ``outputs``.
        scores: Outputs by which others may be sorted (`possible_scores`).

    Raises:
        OrderError: The scores agree, but what belongs to them does not, in any order of the tied ones; or the graph
            keeps another number of entries.
        ArtifactError: An output is missing or has another shape.
    """
    try:
        plain = compare(reference, outputs, tolerance, judged_by)
    except ArtifactError as error:
        if scores and all(name in outputs for name in reference):
            raise OrderError(f"{error}; it selects entries by scores: {_ADVICE}") from error
        raise
    if plain.relative <= tolerance:
        return plain
    failed = ""
    for score in scores:
        size = reference[score].shape
        others = [name for name, value in reference.items() if name != score and value.shape[: len(size)] == size]
        if not others or not _agree(reference[score], outputs[score], tolerance) or not _sorted(reference[score]):
            continue
        moved, left = _reordered(reference, outputs, score, others, tolerance)
        again = compare(reference, moved, tolerance, f"{judged_by}, up to the order of tied {score}")
        if again.relative <= tolerance:
            return again
        named = " and ".join(repr(name) for name in others)
        failed = failed or f"{left} of {reference[score].size} entries of {named} differ while {score!r} agrees"
    if failed:
        raise OrderError(f"{failed}: {_ADVICE}")
    return plain


def _reordered(
    reference: Mapping[str, Array], outputs: Mapping[str, Array], score: str, others: Sequence[str], tolerance: float
) -> tuple[dict[str, Array], int]:
    """The outputs with tied entries in the reference's order where they have equals there, and how many have none."""
    result = {name: value.copy() for name, value in outputs.items()}
    ranks = reference[score].astype(np.float64)
    near = 2 * tolerance * float(np.abs(ranks).max(initial=0.0))
    unmatched = 0
    for place in np.ndindex(ranks.shape[:-1]):
        unused = set(range(ranks.shape[-1]))
        order = []
        for entry in range(ranks.shape[-1]):
            tied = [other for other in unused if abs(ranks[place][other] - ranks[place][entry]) <= near]
            distances = {other: _distance(reference, outputs, others, place, entry, other) for other in tied}
            best = min(distances, key=lambda other: (distances[other], other != entry), default=entry)
            if distances.get(best, np.inf) > tolerance:
                unmatched += 1
                order.append(entry)
                continue
            unused.discard(best)
            order.append(best)
        for name in others:
            result[name][place] = outputs[name][place][order]
    return result, unmatched


def _distance(
    reference: Mapping[str, Array],
    outputs: Mapping[str, Array],
    names: Sequence[str],
    place: tuple[int, ...],
    entry: int,
    other: int,
) -> float:
    """Largest relative difference of an entry of the reference to one of the outputs; infinite for other labels."""
    found = 0.0
    for name in names:
        one, two = reference[name][place][entry], outputs[name][place][other]
        if reference[name].dtype.kind != "f":
            found = max(found, 0.0 if np.array_equal(one, two) else np.inf)
            continue
        scale = float(np.abs(reference[name].astype(np.float64)).max(initial=0.0)) or 1.0
        found = max(found, float(np.abs(np.subtract(one, two, dtype=np.float64)).max(initial=0.0)) / scale)
    return found


def _agree(one: Array, two: Array, tolerance: float) -> bool:
    return compare({"": one}, {"": two}, tolerance, "").relative <= tolerance


def _sorted(scores: Array) -> bool:
    steps = np.diff(scores, axis=-1)
    return bool((steps <= 0).all() or (steps >= 0).all())


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """All nodes, also those of branches and loops."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
