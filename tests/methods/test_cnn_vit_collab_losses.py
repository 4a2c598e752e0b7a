"""The mathematics of CNN-ViT collaboration: who teaches whom, where, and with what gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.errors import RequestError
from compressor.methods.segmentation.cnn_vit_collab import (
    hfd_loss,
    pixel_bsd_loss,
    region_bsd_loss,
    region_reliability,
)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def logits_of(predictions: list[list[float]]) -> Tensor:
    """Two-class logits ``(1, 2, H, W)``, whose difference is given."""
    difference = torch.tensor(predictions)
    return torch.stack([torch.zeros_like(difference), difference])[None]


def test_hfd_loss_resizes_the_projected_map_to_the_targets_size() -> None:
    projected, target = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 6)
    resized = torch.nn.functional.interpolate(projected, (8, 6), mode="bilinear", align_corners=False)

    torch.testing.assert_close(hfd_loss(projected, target), hfd_loss(resized, target))


def test_hfd_loss_gives_the_peer_no_gradient_and_zero_vectors_a_finite_one() -> None:
    projected, target = torch.randn(1, 3, 2, 2), torch.randn(1, 3, 2, 2, requires_grad=True)
    projected[..., 0, 0] = 0
    projected.requires_grad_()

    hfd_loss(projected, target).backward()

    assert projected.grad.isfinite().all()
    assert projected.grad.abs().max() < 100
    assert target.grad is None


def test_hfd_loss_refuses_features_of_other_channels() -> None:
    with pytest.raises(RequestError, match="channels"):
        hfd_loss(torch.randn(1, 3, 2, 2), torch.randn(1, 4, 2, 2))


@settings(max_examples=15, deadline=None)
@given(size=st.tuples(st.integers(2, 7), st.integers(2, 7)), ignored=st.floats(0, 1), seed=st.integers(0))
def test_region_reliability_equals_that_of_a_loop(size: tuple[int, int], ignored: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    grid = (2, 3)
    cnn, vit = random.normal(size=(2, 1, 3, *size)) * 2
    labels = np.where(random.random((1, *size)) < ignored, 255, random.integers(3, size=(1, *size)))

    cnn_wins, valid = region_reliability(*map(torch.tensor, (cnn, vit, labels)), grid)

    for i, j in np.ndindex(*grid):
        rows = range(i * size[0] // grid[0], math.ceil((i + 1) * size[0] / grid[0]))
        columns = range(j * size[1] // grid[1], math.ceil((j + 1) * size[1] / grid[1]))
        errors: dict[str, list[float]] = {"cnn": [], "vit": []}
        for y in rows:
            for x in columns:
                if labels[0, y, x] != 255:
                    for name, logits in (("cnn", cnn), ("vit", vit)):
                        pixel = logits[0, :, y, x]
                        errors[name].append(np.log(np.exp(pixel).sum()) - pixel[labels[0, y, x]])
        assert valid[0, i, j] == bool(errors["cnn"])
        if errors["cnn"]:
            assert cnn_wins[0, i, j] == (np.mean(errors["cnn"]) < np.mean(errors["vit"]))
        else:
            assert not cnn_wins[0, i, j]


def test_region_reliability_trusts_labels_and_not_confidence() -> None:
    labels = torch.ones(1, 1, 2, dtype=torch.int64)
    hesitant, confidently_wrong = logits_of([[0.5, 0.5]]), logits_of([[-9.0, -9.0]])

    cnn_wins, _ = region_reliability(confidently_wrong, hesitant, labels, (1, 1))

    assert not cnn_wins.any()


def test_region_reliability_gives_ties_to_the_transformer() -> None:
    logits, labels = torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)

    cnn_wins, valid = region_reliability(logits, logits.clone(), labels, (2, 2))

    assert valid.all()
    assert not cnn_wins.any()


def test_region_bsd_teaches_each_student_where_the_other_wins() -> None:
    cnn, vit = torch.randn(1, 3, 2, 2, requires_grad=True), torch.randn(1, 3, 2, 2, requires_grad=True)
    cnn_wins = torch.tensor([[[True, False], [False, False]]])
    valid = torch.tensor([[[True, True], [False, True]]])

    loss_cnn, loss_vit = region_bsd_loss(cnn, vit, cnn_wins, valid)
    (loss_cnn + loss_vit).backward()

    taught_cnn, taught_vit = (features.grad.abs().sum(dim=1)[0] > 0 for features in (cnn, vit))
    assert torch.equal(taught_cnn, torch.tensor([[False, True], [False, True]]))
    assert torch.equal(taught_vit, torch.tensor([[True, False], [False, False]]))


def test_region_bsd_averages_over_the_taught_regions() -> None:
    cnn, vit = torch.randn(2, 1, 3, 1, 4)
    distance = 1 - torch.nn.functional.cosine_similarity(cnn, vit, dim=1)[0, 0]

    loss_cnn, loss_vit = region_bsd_loss(
        cnn, vit, torch.tensor([[[True, False, False, False]]]), torch.tensor([[[True, True, True, False]]])
    )

    torch.testing.assert_close(loss_cnn, distance[1:3].mean())
    torch.testing.assert_close(loss_vit, distance[0])


def test_region_bsd_is_a_differentiable_zero_when_nobody_is_taught() -> None:
    cnn = torch.randn(1, 3, 2, 2, requires_grad=True)
    nowhere = torch.zeros(1, 2, 2, dtype=torch.bool)

    loss_cnn, loss_vit = region_bsd_loss(cnn, torch.randn(1, 3, 2, 2), nowhere, nowhere)
    loss_cnn.backward()

    assert loss_cnn.item() == loss_vit.item() == 0
    assert torch.equal(cnn.grad, torch.zeros_like(cnn))


def test_pixel_bsd_teaches_the_student_with_the_higher_error_at_each_pixel() -> None:
    labels = torch.tensor([[[1, 1, 1, 255]]])
    cnn = logits_of([[3.0, -1.0, 0.5, 0.0]]).requires_grad_()
    vit = logits_of([[1.0, 2.0, 0.5, 9.0]]).requires_grad_()

    loss_cnn, loss_vit = pixel_bsd_loss(cnn, vit, labels)
    (loss_cnn + loss_vit).backward()

    assert (cnn.grad.abs().sum(dim=1) > 0)[0, 0].tolist() == [False, True, False, False]
    assert (vit.grad.abs().sum(dim=1) > 0)[0, 0].tolist() == [True, False, False, False]


def test_pixel_bsd_is_the_scaled_kl_averaged_over_the_taught_pixels() -> None:
    labels = torch.tensor([[[1, 1, 0]]])
    cnn, vit = logits_of([[-1.0, -2.0, -4.0]]).double(), logits_of([[2.0, 1.0, 3.0]]).double()

    loss_cnn, loss_vit = pixel_bsd_loss(cnn, vit, labels, temperature=2.0)

    def kl(teacher: float, student: float) -> float:
        p, q = (1 / (1 + math.exp(-x / 2)) for x in (teacher, student))
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    assert loss_cnn.item() == pytest.approx(4 * (kl(2, -1) + kl(1, -2)) / 2)
    assert loss_vit.item() == pytest.approx(4 * kl(-4, 3))


def test_pixel_bsd_is_a_differentiable_zero_when_all_pixels_are_ignored() -> None:
    cnn = torch.randn(1, 3, 2, 2, requires_grad=True)

    loss_cnn, loss_vit = pixel_bsd_loss(cnn, torch.randn(1, 3, 2, 2), torch.full((1, 2, 2), 255))
    (loss_cnn + loss_vit).backward()

    assert loss_cnn.item() == loss_vit.item() == 0
    assert torch.equal(cnn.grad, torch.zeros_like(cnn))
