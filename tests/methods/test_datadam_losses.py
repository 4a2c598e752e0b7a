"""DataDAM's mathematics: class-mean attention and embedding matching."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import RequestError
from compressor.methods.dataset.datadam import attention_matching_loss, feature_matching_loss


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@settings(max_examples=15, deadline=None)
@given(
    classes=st.integers(1, 3),
    counts=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    power=st.sampled_from([1.0, 4.0]),
    seed=st.integers(0),
)
def test_attention_matching_loss_equals_that_of_a_loop(
    classes: int, counts: tuple[int, int], power: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    real, syn = (random.normal(size=(classes, count, 2, 3, 2)) for count in counts)
    expected = 0.0
    for k in range(classes):
        means = []
        for images in (real[k], syn[k]):
            maps = [(abs(image) ** power).sum(axis=0).ravel() for image in images]
            means.append(np.mean([m / np.linalg.norm(m) for m in maps], axis=0))
        expected += 100 * ((means[0] - means[1]) ** 2).sum()

    loss = attention_matching_loss(
        torch.tensor(real).flatten(0, 1), torch.tensor(syn).flatten(0, 1), num_classes=classes, power=power
    )

    assert loss.item() == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_feature_matching_loss_sums_over_classes_and_coordinates() -> None:
    real = torch.tensor([[1.0, 1.0], [3.0, 1.0], [0.0, 0.0], [0.0, 2.0]])
    syn = torch.tensor([[2.0, 2.0], [0.0, 4.0]])

    loss = feature_matching_loss(real, syn, num_classes=2, task_balance=0.02, scale=10.0)

    assert loss.item() == pytest.approx(10 * 0.02 * (1 + 9))


@pytest.mark.parametrize(("loss", "shape"), [(attention_matching_loss, (4, 3, 2, 2)), (feature_matching_loss, (4, 5))])
def test_matching_losses_give_the_synthetic_side_alone_a_gradient(loss: object, shape: tuple[int, ...]) -> None:
    real, syn = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)

    loss(real, syn, num_classes=2).backward()  # type: ignore[operator]

    assert syn.grad.isfinite().all()
    assert syn.grad.abs().sum() > 0
    assert real.grad is None


def test_gradient_reaches_the_pixels_through_a_frozen_network() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU()).requires_grad_(False)
    pixels = torch.randn(2, 1, 6, 6, requires_grad=True)

    attention_matching_loss(network(torch.randn(4, 1, 6, 6)), network(pixels), num_classes=2).backward()

    assert pixels.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in network.parameters())


def test_matching_losses_refuse_batches_that_are_not_blocked_by_class() -> None:
    with pytest.raises(RequestError, match="equal size"):
        feature_matching_loss(torch.randn(5, 3), torch.randn(4, 3), num_classes=2)
