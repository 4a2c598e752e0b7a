"""Endless sources of batches: batch i is a pure function of the seed and i, so resuming is remembering i."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.data.dataset import Dataset, Sample
from compressor.data.samplers import Sampler, Shuffled
from compressor.errors import RequestError

__all__ = ["Batch", "Stream", "View", "stack"]

Batch = dict[str, Any]
"""Tensors (or lists of tensors, where shapes differ) by field name."""

View = Callable[[Sequence[Sample], Sequence[np.random.Generator]], Batch]
"""Augmentation and collation: samples and one generator a sample to a batch."""


def stack(samples: Sequence[Sample], rngs: Sequence[np.random.Generator] = ()) -> Batch:
    """The default view: stack every field into a tensor; fields whose shapes differ become lists of tensors."""
    batch: Batch = {}
    for name in samples[0]:
        values = [np.asarray(sample[name]) for sample in samples]
        if values[0].dtype.kind not in "biuf":
            batch[name] = [sample[name] for sample in samples]
        elif len({value.shape for value in values}) == 1:
            batch[name] = torch.from_numpy(np.stack(values))
        else:
            batch[name] = [torch.from_numpy(np.array(value)) for value in values]
    return batch


@dataclass(frozen=True)
class Stream:
    """An endless source of batches.

    Args:
        dataset: Where samples come from.
        size: Samples in a batch *of this process*.
        sampler: Which samples make a batch.
        view: Augmentation and collation.
        seed: All randomness follows from it and the batch's number.
        shard: (rank, processes): the processes' batches together are the batch of one process at
            ``size * processes``, in order.
        device: Where tensors go.
        period: Batches after which it begins again, augmentation included; None for never.
    """

    dataset: Dataset
    size: int
    sampler: Sampler = field(default_factory=Shuffled)
    view: View = stack
    seed: int = 0
    shard: tuple[int, int] = (0, 1)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    period: int | None = None

    def __post_init__(self) -> None:
        if len(self.dataset) == 0:
            raise RequestError(f"the set {self.dataset.info.name!r} has no samples")
        if self.size < 1:
            raise RequestError(f"a batch needs at least one sample, got {self.size}")
        if self.period is not None and self.period < 1:
            raise RequestError(f"a stream begins again after at least one batch, got {self.period}")

    def __getitem__(self, i: int) -> Batch:
        rank, processes = self.shard
        i = i if self.period is None else i % self.period
        whole = self.size * processes
        order = self.sampler(i, whole, len(self.dataset), lambda k: self._rng(zlib.crc32(b"order"), k))
        places = range(rank * self.size, (rank + 1) * self.size)
        samples = [self.dataset[order[place]] for place in places]
        batch = self.view(samples, [self._rng(zlib.crc32(b"view"), i, place) for place in places])
        return {name: _to(value, self.device) for name, value in batch.items()}

    def sharded(self, rank: int, processes: int) -> Stream:
        """The same stream as seen by one of several processes."""
        return replace(self, shard=(rank, processes))

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed & 0xFFFFFFFFFFFFFFFF, *key])


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list):
        return [_to(item, device) for item in value]
    return value
