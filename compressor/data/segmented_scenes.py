"""Digit scenes with masks: several handwritten digits of several sizes on a photograph, and the class of every pixel.

The parts are those of `compressor.data.scenes`: training and test share neither a digit nor a part of a photograph.
Later digits cover earlier ones; the soft rim of a stroke belongs to no class and is ignored. Every scene is a pure
function of its split and its index.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from compressor.data.dataset import DataInfo, Sample
from compressor.data.digits import digits
from compressor.data.scenes import NOISE, PHOTO_CONTRAST, photograph_part, scaled_digits
from compressor.errors import RequestError

__all__ = ["SegmentedScenes", "segmented_scenes"]

Array = np.ndarray[Any, Any]

COUNTS = {"train": 20_000, "val": 400, "test": 800}
"""Scenes of a split."""
SHARES = (3 / 8, 1 / 2, 5 / 8)
"""Edges of the digits, as shares of the scene's."""
RIM = (0.15, 0.35)
"""Coverages between which a pixel is ignored: below it is background, above it the digit's."""
IGNORED = 255


@dataclass(frozen=True)
class SegmentedScenes:
    """A set of scenes: ``image`` (C, size, size) float32 in [0, 1], ``mask`` (size, size) int64, ``index``.

    Args:
        info: What is known of it; class 0 is the background, class d + 1 the digit d.
        split: Its part of the random numbers.
        strokes: For each size of a digit, (N, d, d) float32 coverages in [0, 1].
        digit_labels: (N,) int64.
        photographs: (P, H, W, 3) float32 in [0, 1].
        objects: The most digits in a scene; one at least.
        count: Scenes.
    """

    info: DataInfo
    split: str
    strokes: Sequence[Array]
    digit_labels: Array
    photographs: Array
    objects: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rng = np.random.default_rng([sorted(COUNTS).index(self.split), 7, index])
        image = self._background(rng)
        mask = np.zeros(image.shape[1:], np.int64)
        for _ in range(int(rng.integers(1, self.objects + 1))):
            self._draw(image, mask, rng)
        image += NOISE * rng.standard_normal((1, *mask.shape), dtype=np.float32)
        return {"image": np.clip(image, 0, 1).astype(np.float32), "mask": mask, "index": index}

    def _background(self, rng: np.random.Generator) -> Array:
        channels, size, _ = self.info.shape
        photograph = self.photographs[rng.integers(len(self.photographs))]
        top, left = (int(rng.integers(0, edge - size + 1)) for edge in photograph.shape[:2])
        image = PHOTO_CONTRAST * photograph[top : top + size, left : left + size].transpose(2, 0, 1)
        return image.mean(axis=0, keepdims=True) if channels == 1 else image.copy()

    def _draw(self, image: Array, mask: Array, rng: np.random.Generator) -> None:
        digit = int(rng.integers(len(self.digit_labels)))
        stroke = self.strokes[int(rng.integers(len(self.strokes)))][digit]
        edge = len(stroke)
        row, column = (int(place) for place in rng.integers(0, len(mask) - edge + 1, 2))
        place = np.s_[row : row + edge, column : column + edge]
        image[:, *place] += (1 - image[:, *place]) * stroke
        mask[place] = np.where(stroke > RIM[0], IGNORED, mask[place])
        mask[place] = np.where(stroke > RIM[1], int(self.digit_labels[digit]) + 1, mask[place])


@lru_cache(maxsize=8)
def segmented_scenes(split: str = "train", size: int = 32, channels: int = 1, objects: int = 3) -> SegmentedScenes:
    """One split of the digit scenes with masks.

    Args:
        split: "train" (20,000 scenes), "val" (400) or "test" (800).
        size: Edge of a scene, 16 to 216.
        channels: 1 or 3.
        objects: The most digits in a scene, 1 to 32.

    Raises:
        RequestError: An argument outside its range.
    """
    if channels not in (1, 3) or not 16 <= size <= 216 or not 1 <= objects <= 32:
        raise RequestError(
            "scenes with masks have 1 or 3 channels, an edge of 16 to 216 and 1 to 32 objects, not "
            f"{channels}, {size} and {objects}"
        )
    source = digits(split)
    strokes = [scaled_digits(source.fields["image"][:, 0], round(share * size)) for share in SHARES]
    part = photograph_part(split)
    facts = (split, size, channels, objects, COUNTS[split], SHARES, RIM, PHOTO_CONTRAST, NOISE, source.info.fingerprint)
    key = hashlib.sha256(repr(facts).encode() + part[:, ::16, ::16].tobytes()).hexdigest()[:16]
    classes = ("background", *source.info.classes)
    extra = {"augment": "none", "ignore_index": IGNORED}
    info = DataInfo(f"scenes with masks/{split}", key, classes, (channels, size, size), extra=extra)
    return SegmentedScenes(info, split, strokes, source.fields["label"], part, objects, COUNTS[split])
