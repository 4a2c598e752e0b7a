"""Memories of features."""

from __future__ import annotations

import pytest
import torch

from compressor.errors import RequestError
from compressor.training.queues import FeatureQueue, RunningMean


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None].expand(-1, 2)


def test_queue_grows_then_overwrites_the_oldest_with_wrap_around() -> None:
    queue = FeatureQueue(2, 5)
    assert queue.keys.shape == (0, 2)
    queue.push(rows(1, 2, 3))
    assert queue.keys[:, 0].tolist() == [1, 2, 3]
    queue.push(rows(4, 5, 6))
    assert queue.keys[:, 0].tolist() == [6, 2, 3, 4, 5]
    queue.push(rows(*range(10, 17)))
    assert sorted(queue.keys[:, 0].tolist()) == [12, 13, 14, 15, 16]


def test_queue_hands_out_copies_without_history() -> None:
    queue = FeatureQueue(2, 3)
    queue.push(rows(1.0, 2.0, 3.0).clone().requires_grad_())
    keys = queue.keys
    queue.push(rows(9))
    assert keys[:, 0].tolist() == [1, 2, 3] and not keys.requires_grad


def test_queue_of_identifiers_holds_whole_numbers() -> None:
    queue = FeatureQueue(0, 3, initial=torch.full((3,), -100), dtype=torch.int64)
    queue.push(torch.tensor([7]))
    assert queue.keys.tolist() == [7, -100, -100]


def test_queue_goes_on_from_its_state() -> None:
    queue, twin = FeatureQueue(2, 5), FeatureQueue(2, 5)
    queue.push(rows(1, 2, 3, 4))
    twin.load_state_dict(queue.state_dict())
    queue.push(rows(5, 6))
    assert twin.keys[:, 0].tolist() == [1, 2, 3, 4]
    twin.push(rows(5, 6))
    assert torch.equal(queue.keys, twin.keys)


def test_queue_refuses_rows_and_states_of_another_shape() -> None:
    with pytest.raises(RequestError, match=r"holds rows \(2,\), got \(3,\)"):
        FeatureQueue(2, 5).push(torch.zeros(1, 3))
    with pytest.raises(RequestError, match="the stored queue"):
        FeatureQueue(2, 5).load_state_dict(FeatureQueue(2, 4).state_dict())
    with pytest.raises(RequestError, match="at least one row"):
        FeatureQueue(2, 0)


def test_running_mean_moves_by_its_momentum() -> None:
    center = RunningMean((1, 2), momentum=0.9)
    before = center.value
    center.update(torch.tensor([[1.0, 2.0]]))
    center.update(torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(center.value, torch.tensor([[0.19, 0.38]]))
    assert before.tolist() == [[0, 0]]
    twin = RunningMean((1, 2))
    twin.load_state_dict(center.state_dict())
    assert torch.equal(twin.value, center.value)
