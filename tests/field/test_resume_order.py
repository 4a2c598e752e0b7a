"""A run stopped in the middle of an epoch goes on with other samples than it would have had."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from compressor.data.dataset import ArrayDataset, DataInfo
from compressor.data.stream import Stream
from compressor.training.distributed import Distributed
from compressor.training.engine import Engine
from compressor.training.phase import Optim, Phases, Train, Update
from compressor.training.random import Randomness

STEPS, COUNT = 11, 8


class Stopped(BaseException):
    """The end of the process."""


def train(folder, seen: list[list[int]], stop: int | None = None) -> None:
    """Train on eight numbers in batches of three, epochs end in the middle of batches; note what each step gets."""
    dataset = ArrayDataset(DataInfo("numbers", "numbers"), {"x": np.arange(COUNT, dtype=np.float32)})
    module = nn.Linear(1, 1)

    def step(batches, i):
        if i == stop:
            raise Stopped
        seen.append(batches["train"]["x"].int().tolist())
        yield Update("module", {"loss": module(batches["train"]["x"][:, None]).mean()})

    def phases() -> Phases:
        yield Train(
            "only", STEPS, {"module": Optim(module.parameters(), lr=0.1)}, {"train": Stream(dataset, 3, seed=5)}, step,
            {"module": module},
        )  # fmt: skip

    engine = Engine(
        folder, distributed=Distributed.single(), randomness=Randomness(0), fingerprint="", checkpoint_steps=1
    )
    engine.run(phases())


@pytest.mark.parametrize("stop", [1, 2, 4, 9])
def test_samples_after_a_stop_are_those_of_the_uninterrupted_run(tmp_path, stop):
    whole: list[list[int]] = []
    train(tmp_path / "whole", whole)
    parts: list[list[int]] = []
    torch.manual_seed(stop)  # what the process did before must not matter
    with pytest.raises(Stopped):
        train(tmp_path / "parts", parts, stop)
    np.random.default_rng().random()
    train(tmp_path / "parts", parts)
    assert parts == whole and len(whole) == STEPS
    drawn = [number for batch in whole for number in batch]
    assert all(sorted(drawn[start : start + COUNT]) == list(range(COUNT)) for start in (0, COUNT, 2 * COUNT))
