"""Augmentations of labelled pictures: what a training batch shows of its samples. All are drawn per sample.

none          as they are
shift         moved by up to an eighth of the edge, mirrored into what becomes free
crop          a random part, 8 to 100 % of the area, resized to the whole
scale         scaled by a factor of 0.5 to 2 and cut to the size at a random place; what is free repeats the border
shift-flip, crop-flip, scale-flip   the same, mirrored every second time
auto          what suits the set: its own word (``info.extra["augment"]``), else shift for gray pictures,
              shift-flip up to 64 pixels, crop-flip for larger ones

A ``mask`` (H, W) of class numbers goes along with its ``image``; pixels that "scale" has to invent are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.data.dataset import DataInfo, Sample
from compressor.data.stream import Batch, View, stack

__all__ = ["Augmentation", "chosen_augmentation", "training_view"]

Augmentation = Literal["auto", "none", "shift", "shift-flip", "crop", "crop-flip", "scale", "scale-flip"]

SMALL_EDGE = 64
CROP_SCALE, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
SCALES = (0.5, 2.0)
IGNORED = 255


def chosen_augmentation(kind: Augmentation, info: DataInfo) -> str:
    """What "auto" means for a set; every other kind is itself."""
    if kind != "auto":
        return kind
    if "augment" in info.extra:
        return str(info.extra["augment"])
    if info.shape[0] == 1:
        return "shift"
    return "shift-flip" if max(info.shape[1:]) <= SMALL_EDGE else "crop-flip"


def training_view(kind: Augmentation, info: DataInfo) -> View:
    """The view that augments ``image``, and ``mask`` with it, and leaves every other field alone.

    Args:
        kind: See above.
        info: Of the set; ``extra["ignore_index"]`` is the class number of pixels that a mask says nothing of.
    """
    chosen = chosen_augmentation(kind, info)
    if chosen == "none":
        return stack
    flip = chosen.endswith("-flip")
    change = {"shift": _shifted, "crop": _cropped, "scale": _scaled}[chosen.removesuffix("-flip")]
    ignored = int(info.extra.get("ignore_index", IGNORED))

    def view(samples: Sequence[Sample], rngs: Sequence[np.random.Generator]) -> Batch:
        batch = stack(samples)
        image, mask = change(batch["image"], batch.get("mask"), rngs, ignored)
        if flip:
            mirrored = torch.tensor([bool(rng.random() < 0.5) for rng in rngs])
            image = torch.where(mirrored[:, None, None, None], image.flip(-1), image)
            mask = None if mask is None else torch.where(mirrored[:, None, None], mask.flip(-1), mask)
        return batch | {"image": image} | ({} if mask is None else {"mask": mask})

    return view


Generators = Sequence[np.random.Generator]


def _shifted(images: Tensor, masks: Tensor | None, rngs: Generators, ignored: int) -> tuple[Tensor, Tensor | None]:
    height, width = images.shape[-2:]
    down, right = max(1, height // 8), max(1, width // 8)
    places = [(int(rng.integers(0, 2 * down + 1)), int(rng.integers(0, 2 * right + 1))) for rng in rngs]

    def moved(maps: Tensor) -> Tensor:
        padded = F.pad(maps, (right, right, down, down), mode="reflect")
        return torch.stack([m[:, y : y + height, x : x + width] for m, (y, x) in zip(padded, places, strict=True)])

    return moved(images), None if masks is None else moved(masks[:, None].float())[:, 0].to(masks.dtype)


def _cropped(images: Tensor, masks: Tensor | None, rngs: Generators, ignored: int) -> tuple[Tensor, Tensor | None]:
    height, width = images.shape[-2:]
    return _sampled(images, masks, [_box(height, width, rng) for rng in rngs], ignored)


def _scaled(images: Tensor, masks: Tensor | None, rngs: Generators, ignored: int) -> tuple[Tensor, Tensor | None]:
    height, width = images.shape[-2:]
    boxes = []
    for rng in rngs:
        share = 1 / math.exp(
            rng.uniform(math.log(SCALES[0]), math.log(SCALES[1]))
        )  # of the picture that is seen, each way
        h, w = share * height, share * width
        boxes.append((rng.uniform() * (height - h), rng.uniform() * (width - w), h, w))
    return _sampled(images, masks, boxes, ignored)


def _sampled(
    images: Tensor, masks: Tensor | None, boxes: Sequence[tuple[float, float, float, float]], ignored: int
) -> tuple[Tensor, Tensor | None]:
    """Boxes (y, x, h, w) of the images, which may reach beyond them, at the images' size."""
    height, width = images.shape[-2:]
    # The grid of `affine_grid` runs from -1 to 1: a box is its centre and its half size.
    theta = torch.tensor(
        [[[w / width, 0, (2 * x + w) / width - 1], [0, h / height, (2 * y + h) / height - 1]] for y, x, h, w in boxes]
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    seen = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    if masks is None:
        return seen, None
    numbers = F.grid_sample(masks[:, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False)
    outside = (grid.abs() > 1).any(dim=-1)
    return seen, numbers[:, 0].to(masks.dtype).masked_fill(outside, ignored)


def _box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(y, x, h, w) of a random crop: area and shape drawn until they fit, at most ten times; else the whole picture."""
    for _ in range(10):
        area = height * width * rng.uniform(*CROP_SCALE)
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    return 0, 0, height, width
