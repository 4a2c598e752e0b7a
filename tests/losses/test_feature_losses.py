"""Feature losses: cosine distance, attention maps and their transfer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.losses.features import (
    attention_transfer_loss,
    cosine_similarity,
    spatial_attention_map,
    unit_vectors,
)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)),
    power=st.sampled_from([1.0, 2.0, 3.5, 4.0]),
    seed=st.integers(0),
)
def test_spatial_attention_map_equals_its_definition(shape: tuple[int, ...], power: float, seed: int) -> None:
    features = np.random.default_rng(seed).normal(size=shape)
    maps = np.stack([sum(abs(channel) ** power for channel in sample).reshape(-1) for sample in features])
    expected = maps / np.linalg.norm(maps, axis=1, keepdims=True)

    np.testing.assert_allclose(spatial_attention_map(torch.tensor(features), power=power), expected, rtol=1e-9)


def test_spatial_attention_map_of_a_silent_layer_is_zero_and_has_no_gradient() -> None:
    features = torch.zeros(1, 3, 2, 2, requires_grad=True)

    attention = spatial_attention_map(features)
    attention.sum().backward()

    assert torch.equal(attention, torch.zeros(1, 4))
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_spatial_attention_map_does_not_overflow_in_half_precision() -> None:
    attention = spatial_attention_map(torch.full((1, 2, 2, 2), 300.0, dtype=torch.float16), power=4.0)

    assert attention.dtype == torch.float16
    torch.testing.assert_close(attention, torch.full((1, 4), 0.5, dtype=torch.float16))


def test_attention_transfer_loss_ignores_channels_and_scale() -> None:
    teacher = torch.randn(2, 8, 4, 4)
    student = torch.cat([teacher[:, 4:], teacher[:, :4]], dim=1) * 3

    assert attention_transfer_loss(student, teacher).item() == pytest.approx(0, abs=1e-12)


def test_attention_transfer_loss_pools_the_larger_map_to_the_smaller() -> None:
    student, teacher = torch.randn(2, 3, 4, 6), torch.randn(2, 5, 8, 3)

    loss = attention_transfer_loss(student, teacher)

    pool = torch.nn.functional.adaptive_avg_pool2d
    torch.testing.assert_close(loss, attention_transfer_loss(pool(student, (4, 3)), pool(teacher, (4, 3))))


def test_cosine_similarity_is_known_for_known_angles() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    y = torch.tensor([[5.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [1.0, 0.0]])

    torch.testing.assert_close(cosine_similarity(x, y), torch.tensor([1.0, 0.0, -1.0, 0.5**0.5]))


def test_cosine_similarity_agrees_with_torch_away_from_zero() -> None:
    x, y = torch.randn(2, 3, 7, 5, dtype=torch.float64)

    torch.testing.assert_close(cosine_similarity(x, y, dim=1), torch.nn.functional.cosine_similarity(x, y, dim=1))


def test_cosine_similarity_gives_zero_vectors_no_gradient() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0]], requires_grad=True)

    similarity = cosine_similarity(x, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    similarity.sum().backward()

    assert similarity[0].item() == 0
    assert torch.equal(x.grad[0], torch.zeros(2))
    assert x.grad[1].abs().sum() > 0


def test_unit_vectors_have_length_one_along_the_named_axis() -> None:
    torch.testing.assert_close(unit_vectors(torch.randn(2, 5, 3), dim=1).norm(dim=1), torch.ones(2, 3))
