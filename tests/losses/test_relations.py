"""Relations within a batch, against loops over samples."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.losses.relations import pairwise_distances, pearson_correlation, triplet_angles


@settings(max_examples=15, deadline=None)
@given(samples=st.integers(1, 6), dimension=st.integers(1, 5), seed=st.integers(0))
def test_pairwise_distances_equal_those_of_a_loop(samples: int, dimension: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(samples, dimension))
    expected = [[math.dist(a, b) for b in x] for a in x]

    np.testing.assert_allclose(pairwise_distances(torch.tensor(x)), expected, rtol=1e-9)


def test_pairwise_distances_are_exactly_zero_for_equal_rows_and_have_a_finite_gradient() -> None:
    x = (torch.randn(40, 8) + 100).requires_grad_()

    distances = pairwise_distances(torch.cat([x, x]))
    distances.sum().backward()

    assert torch.equal(distances.diagonal(offset=40), torch.zeros(40))
    assert x.grad.isfinite().all()


@settings(max_examples=10, deadline=None)
@given(samples=st.integers(3, 5), dimension=st.integers(1, 4), seed=st.integers(0))
def test_triplet_angles_equal_those_of_a_loop(samples: int, dimension: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(samples, dimension))

    angles = triplet_angles(torch.tensor(x))

    for j, i, k in itertools.permutations(range(samples), 3):
        sides = math.dist(x[i], x[j]), math.dist(x[k], x[j]), math.dist(x[i], x[k])
        by_the_law_of_cosines = (sides[0] ** 2 + sides[1] ** 2 - sides[2] ** 2) / (2 * sides[0] * sides[1])
        np.testing.assert_allclose(angles[j, i, k], by_the_law_of_cosines, rtol=1e-6, atol=1e-8)


def test_triplet_angles_of_coinciding_samples_are_zero_with_a_finite_gradient() -> None:
    x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]], requires_grad=True)

    angles = triplet_angles(x)
    angles.square().sum().backward()

    assert angles[0, 1, 2] == 0
    assert x.grad.abs().max() < 10


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 4), observations=st.integers(3, 9), seed=st.integers(0))
def test_pearson_correlation_equals_numpys(rows: int, observations: int, seed: int) -> None:
    x, y = np.random.default_rng(seed).normal(size=(2, rows, observations))
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True)]

    np.testing.assert_allclose(pearson_correlation(torch.tensor(x), torch.tensor(y)), expected, rtol=1e-8, atol=1e-10)


def test_pearson_correlation_with_a_constant_is_zero_without_gradient() -> None:
    x = torch.full((1, 5), 0.2, requires_grad=True)

    correlation = pearson_correlation(x, torch.randn(1, 5))
    correlation.sum().backward()

    assert correlation.item() == 0
    assert torch.equal(x.grad, torch.zeros(1, 5))
