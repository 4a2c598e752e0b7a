"""Batches as functions of their number: the order replays, and shards are slices of the whole."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from compressor.data.dataset import ArrayDataset, DataInfo, Sample
from compressor.data.samplers import PerField, Sampler, Sequential, Shuffled, WithReplacement
from compressor.data.stream import Batch, Stream
from compressor.errors import RequestError

LABELS = (0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0)
SAMPLERS = [Shuffled(), Sequential(), WithReplacement(), PerField(LABELS)]


def dataset(count: int = 11) -> ArrayDataset:
    fields = {"x": np.arange(count, dtype=np.float32), "label": np.array(LABELS[:count])}
    return ArrayDataset(DataInfo("numbers", "v1"), fields)


def noisy(samples: Sequence[Sample], rngs: Sequence[np.random.Generator]) -> Batch:
    values = [sample["x"] + rng.random() for sample, rng in zip(samples, rngs, strict=True)]
    return {"x": torch.tensor(values), "index": torch.tensor([sample["index"] for sample in samples])}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stream_replays_the_very_order_when_it_starts_in_the_middle(sampler: Sampler) -> None:
    stream = Stream(dataset(), 6, sampler, noisy, seed=3)
    first = [stream[i] for i in range(7)]
    again = Stream(dataset(), 6, sampler, noisy, seed=3)
    for i in (5, 6, 2):
        assert torch.equal(again[i]["x"], first[i]["x"])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("processes", [2, 3])
def test_shards_are_slices_of_the_whole_in_order(sampler: Sampler, processes: int) -> None:
    whole = Stream(dataset(), 6, sampler, noisy, seed=3)
    shards = [Stream(dataset(), 6 // processes, sampler, noisy, seed=3).sharded(r, processes) for r in range(processes)]
    for i in range(5):
        assert torch.equal(whole[i]["x"], torch.cat([shard[i]["x"] for shard in shards]))


def test_shuffled_stream_shows_every_sample_once_an_epoch_in_a_new_order() -> None:
    stream = Stream(dataset(), 4, seed=1)
    indices = [int(k) for i in range(11) for k in stream[i]["index"]]
    epochs = [indices[k : k + 11] for k in range(0, 44, 11)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_streams_of_different_seeds_draw_differently() -> None:
    draws = {tuple(Stream(dataset(), 11, seed=seed)[0]["index"].tolist()) for seed in range(5)}
    assert len(draws) == 5


def test_stream_is_endless_even_when_a_batch_holds_several_epochs() -> None:
    stream = Stream(dataset(3), 8, seed=1)
    assert np.bincount(stream[0]["index"]).sum() == 8
    assert set(stream[1000]["index"].tolist()) == {0, 1, 2}


def test_per_field_gives_every_class_the_same_part_in_blocks() -> None:
    stream = Stream(dataset(), 12, PerField(LABELS), seed=1)
    assert stream[0]["label"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    with pytest.raises(RequestError, match="cannot hold 3 classes in equal parts"):
        Stream(dataset(), 4, PerField(LABELS))[0]


def test_augmentation_of_a_sample_depends_on_its_place_and_the_batch_alone() -> None:
    stream = Stream(dataset(), 6, Sequential(), noisy, seed=3)
    shifts = stream[0]["x"] - stream[0]["index"]
    later = stream[11]["x"] - stream[11]["index"]  # the same samples, one epoch of batches on
    assert len(shifts.unique()) == 6 and not torch.equal(shifts, later)


def test_default_view_stacks_equal_shapes_and_lists_others() -> None:
    def vary(sample: Sample) -> Sample:
        return {**sample, "boxes": np.zeros((sample["index"] % 3, 4), np.float32), "name": str(sample["index"])}

    batch = Stream(ArrayDataset(dataset().info, dataset().fields, vary), 3, Sequential())[0]
    assert batch["x"].shape == (3,) and [tuple(boxes.shape) for boxes in batch["boxes"]] == [(0, 4), (1, 4), (2, 4)]
    assert batch["name"] == ["0", "1", "2"]


def test_stream_is_refused_when_it_cannot_give_a_batch() -> None:
    with pytest.raises(RequestError, match="has no samples"):
        Stream(dataset().select(np.array([], dtype=int)), 4)
    with pytest.raises(RequestError, match="at least one sample"):
        Stream(dataset(), 0)
