"""Augmentations of training batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from compressor.data.dataset import DataInfo, Sample
from compressor.data.mixing import cutmix
from compressor.data.views import Augmentation, chosen_augmentation, training_view


def info(shape: tuple[int, ...], **extra: object) -> DataInfo:
    return DataInfo("set", "mark", ("a", "b"), shape, extra=extra)


def samples(count: int, shape: tuple[int, ...]) -> list[Sample]:
    images = np.random.default_rng(1).random((count, *shape)).astype(np.float32)
    return [{"image": image, "label": k % 2, "index": k} for k, image in enumerate(images)]


def rngs(count: int, seed: int = 0) -> Sequence[np.random.Generator]:
    return [np.random.default_rng([seed, k]) for k in range(count)]


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        (info((1, 8, 8)), "shift"),
        (info((3, 32, 32)), "shift-flip"),
        (info((3, 224, 224)), "crop-flip"),
        (info((3, 224, 224), augment="none"), "none"),
    ],
)
def test_auto_chooses_what_suits_the_set(given: DataInfo, chosen: str) -> None:
    assert chosen_augmentation("auto", given) == chosen
    assert chosen_augmentation("crop", given) == "crop"


@pytest.mark.parametrize("kind", ["none", "shift", "crop", "shift-flip", "crop-flip"])
def test_a_view_keeps_shapes_ranges_and_labels_and_follows_its_generators(kind: Augmentation) -> None:
    given = samples(16, (3, 24, 16))
    view = training_view(kind, info((3, 24, 16)))
    batch, again, other = view(given, rngs(16)), view(given, rngs(16)), view(given, rngs(16, seed=1))
    assert batch["image"].shape == (16, 3, 24, 16)
    assert batch["image"].min() >= 0 and batch["image"].max() <= 1
    assert batch["label"].tolist() == [k % 2 for k in range(16)]
    assert torch.equal(batch["image"], again["image"])
    assert torch.equal(batch["image"], other["image"]) == (kind == "none")


def test_a_sample_is_augmented_by_its_own_generator_wherever_it_stands() -> None:
    given, view = samples(4, (3, 16, 16)), training_view("crop-flip", info((3, 16, 16)))
    whole = view(given, rngs(4))["image"]
    assert torch.equal(view(given[2:3], rngs(4)[2:3])["image"][0], whole[2])


def test_a_shift_moves_the_picture_by_at_most_an_eighth() -> None:
    image = np.zeros((1, 16, 16), np.float32)
    image[0, 8, 8] = 1
    many = [{"image": image, "label": 0}] * 200
    moved = training_view("shift", info((1, 16, 16)))(many, rngs(200))["image"]
    places = {(int(p[1]), int(p[2])) for p in (m.nonzero()[0] for m in moved)}
    assert places == {(y, x) for y in range(6, 11) for x in range(6, 11)}


def test_a_crop_shows_a_part_enlarged() -> None:
    ramp = np.tile(np.linspace(0, 1, 32, dtype=np.float32), (1, 32, 1))
    crops = training_view("crop", info((1, 32, 32)))([{"image": ramp, "label": 0}] * 50, rngs(50))["image"]
    spans = crops[:, 0, 0, -1] - crops[:, 0, 0, 0]
    assert (spans > 0).all() and spans.min() < 0.6 < spans.max() <= 1
    assert torch.allclose(crops, crops[:, :, :1], atol=1e-5)


def test_a_mirrored_picture_comes_every_second_time() -> None:
    ramp = np.tile(np.linspace(0, 1, 32, dtype=np.float32), (3, 32, 1))
    many = [{"image": ramp, "label": 0}] * 200
    batch = training_view("crop-flip", info((3, 32, 32)))(many, rngs(200))["image"]
    mirrored = (batch[:, 0, 0, 0] > batch[:, 0, 0, -1]).float().mean()
    assert 0.4 < mirrored < 0.6


def test_cutmix_takes_one_box_from_other_images_and_keeps_the_rest() -> None:
    images = torch.arange(6.0)[:, None, None, None].expand(6, 1, 12, 12)
    mixed = cutmix(images, np.random.default_rng(2))
    changed = mixed != images
    rows, columns = changed.any(dim=3).any(dim=0)[0], changed.any(dim=2).any(dim=0)[0]
    assert changed.any() and not changed.all()
    box = mixed[:, 0, rows][:, :, columns]
    assert all(len(set(one.flatten().tolist())) == 1 for one in box)
    assert sorted(float(one.flatten()[0]) for one in box) == [0, 1, 2, 3, 4, 5]
    assert torch.equal(images, torch.arange(6.0)[:, None, None, None].expand(6, 1, 12, 12))


@pytest.mark.parametrize("kind", ["shift", "crop", "scale", "shift-flip", "crop-flip", "scale-flip"])
def test_a_mask_goes_where_its_image_goes_and_stays_whole(kind: str) -> None:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 4, (64, 2, 2)).repeat(8, axis=1).repeat(8, axis=2)
    samples = [{"image": (block[None] / 4).astype(np.float32), "mask": block} for block in blocks]
    info = DataInfo("blocks", "", ("a", "b", "c", "d"), (1, 16, 16), extra={"ignore_index": 9})
    view = training_view(kind, info)
    batch = view(samples, [np.random.default_rng(k) for k in range(64)])
    image, mask = batch["image"].numpy()[:, 0], batch["mask"].numpy()
    inside = mask != 9
    assert set(np.unique(mask)) <= {0, 1, 2, 3, 9}
    assert (np.abs(image - mask / 4) < 0.13)[inside].mean() > 0.85  # bilinear edges differ from the nearest class
    assert not np.array_equal(mask, blocks)
    assert kind.startswith("scale") == bool((~inside).any())
