"""Which indices make batch i: pure functions, so that a position in the data is one integer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from compressor.errors import RequestError

__all__ = ["PerField", "Sampler", "Sequential", "Shuffled", "WithReplacement"]

Rng = Callable[[int], np.random.Generator]


class Sampler(Protocol):
    """Indices of batch ``i``: ``size`` numbers below ``length``; ``rng(k)`` gives the k-th independent generator."""

    def __call__(self, i: int, size: int, length: int, rng: Rng) -> Sequence[int]: ...


def _positions(i: int, size: int, length: int) -> list[tuple[int, int]]:
    """(epoch, place) of each sample of batch i in an endless concatenation of epochs."""
    return [divmod(position, length) for position in range(i * size, (i + 1) * size)]


def _order(generator: np.random.Generator, length: int) -> np.ndarray[Any, Any]:
    """The permutation that a fresh generator draws; the last few are kept: every batch of an epoch asks for it."""
    key = (repr(generator.bit_generator.state), length)
    order = _orders.get(key)
    if order is None:
        order = _orders[key] = generator.permutation(length)
        while len(_orders) > KEPT_ORDERS:
            _orders.pop(next(iter(_orders)), None)
    return order


KEPT_ORDERS = 4
_orders: dict[tuple[str, int], np.ndarray[Any, Any]] = {}


@dataclass(frozen=True)
class Shuffled:
    """Every sample once an epoch, in a new order each epoch; batches run on across the epochs' ends."""

    def __call__(self, i: int, size: int, length: int, rng: Rng) -> Sequence[int]:
        positions = _positions(i, size, length)
        orders = {epoch: _order(rng(epoch), length) for epoch in {epoch for epoch, _ in positions}}
        return [int(orders[epoch][place]) for epoch, place in positions]


@dataclass(frozen=True)
class Sequential:
    """In order, from the start again at the end."""

    def __call__(self, i: int, size: int, length: int, rng: Rng) -> Sequence[int]:
        return [place for _, place in _positions(i, size, length)]


@dataclass(frozen=True)
class WithReplacement:
    """Independent uniform draws."""

    def __call__(self, i: int, size: int, length: int, rng: Rng) -> Sequence[int]:
        return [int(k) for k in rng(i).integers(0, length, size)]


@dataclass(frozen=True)
class PerField:
    """Equal parts for every value of a field: class blocks, or as many samples of each domain.

    Args:
        values: The field's value of every sample, e.g. the labels.
        parts: Equal parts of the batch (the processes') that hold every value each, blocked alike.
    """

    values: tuple[int, ...]
    parts: int = 1

    def __call__(self, i: int, size: int, length: int, rng: Rng) -> Sequence[int]:
        kinds = sorted(set(self.values))
        if size % (len(kinds) * self.parts):
            raise RequestError(f"a batch of {size} cannot hold {len(kinds)} classes in equal parts: use a multiple")
        values, draw, indices = np.asarray(self.values), rng(i), []
        for kind in kinds:
            members = np.flatnonzero(values == kind)
            each = size // len(kinds)
            indices += [int(k) for k in draw.choice(members, each, replace=len(members) < each)]
        blocks = np.asarray(indices).reshape(len(kinds), self.parts, -1)
        return [int(k) for k in blocks.transpose(1, 0, 2).ravel()]
