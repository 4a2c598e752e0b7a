"""Siamese augmentation: what each operation does, and that two batches can undergo the same."""

from __future__ import annotations

import pytest
import torch

from compressor.data.dataset import DataInfo
from compressor.data.siamese import OPERATIONS, siamese_augmentation, suitable_operations


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(6, 3, 16, 16, generator=generator(1)) + 0.5  # no zeros: what is cut off can be told


@pytest.mark.parametrize("name", OPERATIONS)
def test_shared_change_is_the_same_for_batches_of_any_size(name: str, images: torch.Tensor) -> None:
    for seed in range(5):
        whole = siamese_augmentation(images, [name], generator(seed), shared=True)
        part = siamese_augmentation(images[:2], [name], generator(seed), shared=True)
        assert torch.allclose(whole[:2], part, atol=1e-6)
        repeated = siamese_augmentation(images[:1].repeat(4, 1, 1, 1), [name], generator(seed), shared=True)
        assert all(torch.allclose(repeated[0], image, atol=1e-6) for image in repeated)


@pytest.mark.parametrize("name", OPERATIONS)
def test_change_differs_between_images_when_it_is_not_shared(name: str, images: torch.Tensor) -> None:
    changed = siamese_augmentation(images[:1].repeat(8, 1, 1, 1), [name], generator(0), shared=False)
    assert len({tuple(image.flatten().tolist()) for image in changed}) > 1


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradient_flows_through_to_the_pixels(name: str, images: torch.Tensor) -> None:
    images.requires_grad_(True)
    siamese_augmentation(images, [name], generator(0), shared=False).square().sum().backward()
    assert (images.grad.flatten(1).abs().sum(dim=1) > 0).all()


def test_crop_moves_by_an_eighth_at_most_and_fills_with_zeros(images: torch.Tensor) -> None:
    moves = set()
    for seed in range(60):
        changed = siamese_augmentation(images, ["crop"], generator(seed), shared=True)
        rows, columns = (changed[0, 0] != 0).any(dim=1), (changed[0, 0] != 0).any(dim=0)
        moves.add((16 - int(rows.sum()), 16 - int(columns.sum())))
        kept = changed[:, :, rows][:, :, :, columns]
        inside = [
            torch.equal(kept, images[:, :, y : y + kept.shape[2], x : x + kept.shape[3]])
            for y in range(3)
            for x in range(3)
        ]
        assert any(inside)
    assert {y for y, _ in moves} == {x for _, x in moves} == {0, 1, 2}


def test_cutout_clears_one_rectangle_of_half_the_edge_at_most(images: torch.Tensor) -> None:
    sizes = set()
    for seed in range(40):
        changed = siamese_augmentation(images, ["cutout"], generator(seed), shared=True)
        cut = changed[0, 0] == 0
        rows, columns = int(cut.any(dim=1).sum()), int(cut.any(dim=0).sum())
        assert int(cut.sum()) == rows * columns and torch.equal(changed[0, 0][~cut], images[0, 0][~cut])
        sizes |= {rows, columns}
    assert max(sizes) == 8 and min(sizes) >= 4


def test_flip_mirrors_every_second_time(images: torch.Tensor) -> None:
    flipped = 0
    for seed in range(100):
        changed = siamese_augmentation(images, ["flip"], generator(seed), shared=True)
        flipped += torch.equal(changed, images.flip(3))
        assert torch.equal(changed, images) or torch.equal(changed, images.flip(3))
    assert 30 < flipped < 70


def test_rotation_and_scale_keep_the_centre_and_the_sum_of_a_disc_near(images: torch.Tensor) -> None:
    axis = torch.arange(16) - 7.5
    disc = ((axis[:, None] ** 2 + axis**2) < 16).float().expand(1, 1, 16, 16)
    for seed in range(20):
        turned = siamese_augmentation(disc, ["rotate"], generator(seed), shared=True)
        assert abs(float(turned.sum() / disc.sum()) - 1) < 0.05 and float(turned[0, 0, 7:9, 7:9].min()) > 0.99
        scaled = siamese_augmentation(disc, ["scale"], generator(seed), shared=True)
        assert 1 / 1.2**2 - 0.05 < float(scaled.sum() / disc.sum()) < 1.2**2 + 0.05


def test_color_changes_brightness_saturation_and_contrast_within_their_ranges() -> None:
    image = torch.zeros(1, 3, 4, 4)
    image[:, 0] = 3.0  # mean 1
    means, spreads = [], []
    for seed in range(50):
        changed = siamese_augmentation(image, ["color"], generator(seed), shared=True)
        means.append(float(changed.mean()) - 1)
        spreads.append(float(changed[0, 0].mean() - changed[0, 1].mean()) / 3)
    assert -0.5 <= min(means) < -0.3 and 0.3 < max(means) <= 0.5
    assert 0 <= min(spreads) < 0.3 and 1.5 < max(spreads) <= 3.0


def test_all_operations_are_drawn_and_none_leaves_the_images_alone(images: torch.Tensor) -> None:
    assert siamese_augmentation(images, [], generator(0), shared=True) is images
    results = {
        tuple(siamese_augmentation(images[:1], OPERATIONS, generator(seed), shared=True).flatten().tolist())
        for seed in range(20)
    }
    assert len(results) > 10


def test_flip_suits_colour_pictures_and_not_gray_ones() -> None:
    assert suitable_operations(DataInfo("a", "", (), (3, 32, 32))) == OPERATIONS
    assert "flip" not in suitable_operations(DataInfo("a", "", (), (1, 32, 32)))
    assert "flip" not in suitable_operations(DataInfo("a", "", (), (3, 32, 32), extra={"augment": "shift"}))
