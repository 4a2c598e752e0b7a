"""Means over a selection and over classes."""

from __future__ import annotations

import pytest
import torch

from compressor.errors import RequestError
from compressor.losses.statistics import class_means, masked_mean, squared_class_mean_distance


def test_masked_mean_counts_the_selected_entries_only() -> None:
    values = torch.tensor([[1.0, float("nan")], [4.0, float("inf")]], requires_grad=True)

    mean = masked_mean(values, torch.tensor([[True, False], [True, False]]))
    mean.backward()

    assert mean.item() == 2.5
    assert torch.equal(values.grad, torch.tensor([[0.5, 0.0], [0.5, 0.0]]))


def test_class_means_average_each_block_of_rows() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [10.0, 20.0], [30.0, 40.0]])

    assert torch.equal(class_means(x, 2), torch.tensor([[2.0, 3.0], [20.0, 30.0]]))


@pytest.mark.parametrize("num_classes", [0, 3, 8])
def test_class_means_refuse_classes_of_unequal_size(num_classes: int) -> None:
    with pytest.raises(RequestError, match="equal size"):
        class_means(torch.randn(4, 2), num_classes)


def test_class_means_refuse_an_empty_batch() -> None:
    with pytest.raises(RequestError, match="equal size"):
        class_means(torch.randn(0, 2), 2)


def test_squared_class_mean_distance_sums_over_classes_and_coordinates() -> None:
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 5.0], [5.0, 5.0]])
    y = torch.tensor([[1.0, 3.0], [4.0, 3.0]])

    assert squared_class_mean_distance(x, y, 2).item() == 9 + 1 + 4
