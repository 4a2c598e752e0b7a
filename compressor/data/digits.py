"""scikit-learn's handwritten digits: 1,797 real 8x8 images that ship inside a dependency."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np

from compressor.data.dataset import ArrayDataset, DataInfo
from compressor.errors import RequestError

__all__ = ["digits"]

SHARES = {"train": (0.0, 0.7), "val": (0.7, 0.8), "test": (0.8, 1.0)}


@lru_cache(maxsize=4)
def digits(split: str = "train", size: int = 8) -> ArrayDataset:
    """One split of the digits.

    Args:
        split: "train" (70 %), "val" (10 %) or "test" (20 %); disjoint, always the same.
        size: Edge of an image: 8, or a multiple of it (every pixel repeated).

    Returns:
        Samples with ``image`` (1, size, size) float32 in [0, 1] and ``label`` int64.
    """
    from sklearn.datasets import load_digits

    if split not in SHARES:
        raise RequestError(f"the digits have the splits {', '.join(SHARES)}, not {split!r}")
    if size < 8 or size % 8:
        raise RequestError(f"digits come in sizes that are multiples of 8, not {size}")
    raw = load_digits()
    order = np.random.default_rng(0).permutation(len(raw.target))
    first, last = (round(share * len(order)) for share in SHARES[split])
    chosen = order[first:last]
    images: np.ndarray[Any, Any] = (raw.images[chosen] / 16.0).astype(np.float32)[:, None]
    if size > 8:
        images = images.repeat(size // 8, axis=2).repeat(size // 8, axis=3)
    labels = raw.target[chosen].astype(np.int64)
    key = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16]
    info = DataInfo(f"digits/{split}", key, tuple(str(d) for d in range(10)), images.shape[1:])
    return ArrayDataset(info, {"image": images, "label": labels})
