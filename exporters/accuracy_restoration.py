"""Give operators of an 8-bit graph back to float until it holds its accuracy, as few as that takes.

The operators are ranked by what each costs alone; then the shortest beginning of that ranking is found with which the
graph holds. The ranking runs on few inputs, the choice is measured as a whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

__all__ = ["Fit", "Restoration", "restore_accuracy"]

_GROUPS = 64
"""Groups of neighbouring operators that are ranked; one operator each where there are no more than that."""


@dataclass(frozen=True)
class Fit:
    """How an 8-bit graph does.

    Attributes:
        drop: What it loses of the task's figures; None where they are not judged.
        error: Root-mean-square difference of its worst output over the output's root mean square.
        holds: Whether that is within the limits.
    """

    drop: float | None
    error: float
    holds: bool


@dataclass(frozen=True)
class Restoration:
    """What was given back.

    Attributes:
        back: Operators that went to float, those that cost most first.
        blind: The graph with all operators in eight bits.
        final: The graph as it is now.
        ranked: Operators whose cost was measured; fewer than there are where the time ran out.
    """

    back: tuple[str, ...]
    blind: Fit
    final: Fit
    ranked: int


def restore_accuracy(
    operators: Sequence[str],
    fit: Callable[[Collection[str]], Fit],
    cost: Callable[[Collection[str]], float],
    seconds: float,
) -> Restoration:
    """Find the operators that must go back.

    Args:
        operators: All that are in eight bits, in the order of the graph.
        fit: Judges the graph with the given operators in float.
        cost: Error of the graph with nothing but the given operators in eight bits.
        seconds: Time for the ranking.
    """
    blind = fit(())
    if blind.holds or not operators:
        return Restoration((), blind, blind, 0)
    order, ranked = _ranking(operators, cost, seconds)

    def first(count: int) -> list[str]:
        return [name for group in order[:count] for name in group]

    enough, final = 1, fit(first(1))
    while not final.holds and enough < len(order):
        enough = min(2 * enough, len(order))
        final = fit(first(enough))
    too_few = enough // 2
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        found = fit(first(middle))
        if found.holds:
            enough, final = middle, found
        else:
            too_few = middle
    return Restoration(tuple(first(enough)), blind, final, ranked)


def _ranking(
    operators: Sequence[str], cost: Callable[[Collection[str]], float], seconds: float
) -> tuple[list[list[str]], int]:
    """Groups of operators, the costliest first, and how many operators were measured."""
    size = math.ceil(len(operators) / _GROUPS)
    groups = [list(operators[start : start + size]) for start in range(0, len(operators), size)]
    until, costs, ranked = time.monotonic() + seconds, {}, 0
    for number in _spread(len(groups)):
        if time.monotonic() > until:
            break
        costs[number] = cost(groups[number])
        ranked += len(groups[number])
    order = sorted(range(len(groups)), key=lambda number: -costs.get(number, 0.0))
    return [groups[number] for number in order], ranked


def _spread(count: int) -> list[int]:
    """The numbers below ``count`` in an order that has gone through all parts of the range at any time."""
    half, order = 1 << max(0, count - 1).bit_length(), [0]
    while half > 1:
        half //= 2
        order += [number + half for number in order]
    return [number for number in order if number < count]
