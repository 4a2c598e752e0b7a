"""Fewer samples than a batch holds: loaders that drop the rest make no batch at all, and training does nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from compressor.data.dataset import ArrayDataset, DataInfo
from compressor.data.stream import Stream
from compressor.errors import RequestError


def numbers(count: int) -> ArrayDataset:
    return ArrayDataset(DataInfo("numbers", f"numbers-{count}"), {"x": np.arange(count)})


def test_batch_is_full_when_the_data_are_fewer_and_every_sample_is_as_frequent():
    stream = Stream(numbers(10), 64)
    batches = [stream[i]["x"].tolist() for i in range(5)]
    assert [len(batch) for batch in batches] == [64] * 5
    counts = Counter(number for batch in batches for number in batch)
    assert set(counts) == set(range(10)) and max(counts.values()) - min(counts.values()) == 0


def test_data_without_samples_are_refused_before_any_step():
    with pytest.raises(RequestError, match="has no samples"):
        Stream(numbers(0), 4)
