"""Losses on dense maps: per pixel, and per region of a grid."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.losses.dense import pixel_cross_entropy, region_mean


def test_pixel_cross_entropy_is_minus_the_log_probability_of_the_label() -> None:
    logits, labels = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randint(0, 3, (2, 4, 5))
    labels[0, 1, 2] = 255

    cross_entropy, valid = pixel_cross_entropy(logits, labels)

    expected = -logits.softmax(dim=1)[1, labels[1, 0, 4], 0, 4].log()
    torch.testing.assert_close(cross_entropy[1, 0, 4], expected)
    assert not valid[0, 1, 2]
    assert cross_entropy[0, 1, 2] == 0
    assert valid.sum() == 39


@settings(max_examples=20, deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    share=st.floats(0, 1),
    seed=st.integers(0),
)
def test_region_mean_equals_that_of_a_loop(
    size: tuple[int, int], grid: tuple[int, int], share: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    values, valid = random.normal(size=(1, *size)), random.random((1, *size)) < share

    means, occupied = region_mean(torch.tensor(values), torch.tensor(valid), grid)

    for i, j in np.ndindex(*grid):
        rows = slice(i * size[0] // grid[0], math.ceil((i + 1) * size[0] / grid[0]))
        columns = slice(j * size[1] // grid[1], math.ceil((j + 1) * size[1] / grid[1]))
        inside = values[0, rows, columns][valid[0, rows, columns]]
        assert occupied[0, i, j] == (inside.size > 0)
        np.testing.assert_allclose(means[0, i, j], inside.mean() if inside.size else 0, atol=1e-12)


def test_region_mean_does_not_read_invalid_pixels() -> None:
    values = torch.tensor([[[1.0, float("nan")]]])

    means, _ = region_mean(values, torch.tensor([[[True, False]]]), (1, 1))

    assert means.item() == 1
