"""Digit scenes: scikit-learn's handwritten digits on crops of the photographs that it ships, drawn anew in every scene.

Nothing but the digits in the foreground tells the classes apart; training and test share neither a digit nor a part of
a photograph. Every scene is a pure function of its split and its index.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from compressor.data.dataset import DataInfo, Sample
from compressor.data.digits import digits
from compressor.errors import RequestError

__all__ = ["NOISE", "PHOTO_CONTRAST", "DigitScenes", "photograph_part", "scaled_digits", "scenes"]

Array = np.ndarray[Any, Any]

TRAIN_COLUMNS = 424
"""Train and val see the left columns of the photographs, test the others."""
RENDERS = {"train": 20, "val": 2, "test": 2}
"""Scenes of every digit in a split."""
PHOTO_CONTRAST, NOISE = 0.2, 0.1


@dataclass(frozen=True)
class DigitScenes:
    """A set of scenes: ``image`` (C, size, size) float32 in [0, 1], ``label`` of the digit, ``index``.

    Args:
        info: What is known of it.
        split: Its part of the random numbers.
        masks: (N, d, d) float32, the digits scaled to their size in a scene, in [0, 1].
        digit_labels: (N,) int64.
        photographs: (P, H, W, 3) float32 in [0, 1].
        renders: Scenes of every digit.
    """

    info: DataInfo
    split: str
    masks: Array
    digit_labels: Array
    photographs: Array
    renders: int

    def __len__(self) -> int:
        return len(self.masks) * self.renders

    @property
    def labels(self) -> Array:
        """Labels (N,) of all scenes."""
        return np.tile(self.digit_labels, self.renders)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        channels, size, _ = self.info.shape
        mask = self.masks[index % len(self.masks)]
        rng = np.random.default_rng([sorted(RENDERS).index(self.split), index])
        photograph = self.photographs[rng.integers(len(self.photographs))]
        top, left = (int(rng.integers(0, edge - size + 1)) for edge in photograph.shape[:2])
        image = PHOTO_CONTRAST * photograph[top : top + size, left : left + size].transpose(2, 0, 1)
        image = image.mean(axis=0, keepdims=True) if channels == 1 else image
        row, column = (int(place) for place in rng.integers(0, size - mask.shape[0] + 1, 2))
        place = np.s_[:, row : row + mask.shape[0], column : column + mask.shape[1]]
        image = image.copy()
        image[place] += (1 - image[place]) * mask
        image += NOISE * rng.standard_normal((1, size, size), dtype=np.float32)
        pixels = np.clip(image, 0, 1).astype(np.float32)
        return {"image": pixels, "label": int(self.digit_labels[index % len(self.masks)]), "index": index}


@lru_cache(maxsize=8)
def scenes(split: str = "train", size: int = 16, channels: int = 1) -> DigitScenes:
    """One split of the digit scenes.

    Args:
        split: "train" (1,258 digits, 20 scenes each), "val" or "test" (180 and 359 digits, two scenes each).
        size: Edge of a scene, 12 to 256; a digit fills three quarters of it.
        channels: 1 or 3.

    Raises:
        RequestError: An argument outside its range.
    """
    if channels not in (1, 3) or not 12 <= size <= 256:
        raise RequestError(f"scenes have 1 or 3 channels and an edge of 12 to 256, not {channels} and {size}")
    source = digits(split)
    masks = scaled_digits(source.fields["image"][:, 0], size * 3 // 4)
    part = photograph_part(split)
    if min(part.shape[1:3]) < size:
        raise RequestError(f"scenes of the test split have an edge of at most {min(part.shape[1:3])}, not {size}")
    facts = (split, size, channels, RENDERS[split], PHOTO_CONTRAST, NOISE, source.info.fingerprint)
    key = hashlib.sha256(repr(facts).encode() + part[:, ::16, ::16].tobytes()).hexdigest()[:16]
    info = DataInfo(f"scenes/{split}", key, source.info.classes, (channels, size, size), extra={"augment": "none"})
    return DigitScenes(info, split, masks, source.fields["label"], part, RENDERS[split])


def photograph_part(split: str) -> Array:
    """The columns of the photographs that a split sees, (P, H, W, 3) float32 in [0, 1]."""
    photographs = _photographs()
    return photographs[:, :, TRAIN_COLUMNS:] if split == "test" else photographs[:, :, :TRAIN_COLUMNS]


def scaled_digits(images: Array, edge: int) -> Array:
    """Images (N, 8, 8) resized bilinearly to (N, edge, edge)."""
    where = np.clip((np.arange(edge) + 0.5) * images.shape[1] / edge - 0.5, 0, images.shape[1] - 1)
    low = np.minimum(where.astype(int), images.shape[1] - 2)
    weights = np.zeros((edge, images.shape[1]), np.float32)
    weights[np.arange(edge), low] = 1 - (where - low)
    weights[np.arange(edge), low + 1] = where - low
    return np.ascontiguousarray(weights @ images @ weights.T, np.float32)


@lru_cache(maxsize=1)
def _photographs() -> Array:
    from sklearn.datasets import load_sample_images

    return np.stack(load_sample_images().images).astype(np.float32) / 255
