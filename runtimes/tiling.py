"""Large images through a network of one size: overlapping tiles, whose outputs are blended with weights.

Pure numpy. A tile's weight falls towards its edges, where a network sees least, so no seam shows; where one tile is
alone, its weight does not matter. Images smaller than a tile are padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from compressor.errors import RequestError
from compressor.runtimes.runtime import Array

__all__ = ["WINDOWS", "pad_to", "run_tiled", "tile_places", "tile_window"]

WINDOWS = ("hann", "linear", "flat")
"""Shapes of a tile's weight."""


def tile_places(length: int, tile: int, overlap: float) -> list[int]:
    """Starts of the tiles along an axis: the first at 0, the last ends with the axis, neighbours share at least a part.

    Args:
        length: Of the axis, at least ``tile``.
        tile: Of a tile.
        overlap: Least share of a tile that it has in common with the next, in [0, 1).
    """
    step = max(1, int(tile * (1 - overlap)))
    count = 1 + -(-(length - tile) // step)
    return [round(k * (length - tile) / max(count - 1, 1)) for k in range(count)]


def tile_window(height: int, width: int, shape: str = "hann") -> Array:
    """Weights (height, width) float32 of a tile's positions, above 0.

    Args:
        height, width: Of a tile.
        shape: "hann" (a raised cosine), "linear" (a tent) or "flat" (the mean of what overlaps).

    Raises:
        RequestError: An unknown shape.
    """
    if shape not in WINDOWS:
        raise RequestError(f"a tile's window is {', '.join(WINDOWS)}, not {shape!r}")
    sides = []
    for length in (height, width):
        place = (np.arange(length) + 0.5) / length  # the middles of the positions: no weight is 0
        if shape == "hann":
            sides.append(np.sin(np.pi * place) ** 2)
        elif shape == "linear":
            sides.append(1 - np.abs(2 * place - 1))
        else:
            sides.append(np.ones(length))
    return np.asarray(np.outer(*sides), np.float32)


def pad_to(images: Array, height: int, width: int) -> Array:
    """Images (B, C, H, W) padded at the bottom and the right to at least a size, by repeating the border."""
    down, right = max(0, height - images.shape[-2]), max(0, width - images.shape[-1])
    return np.pad(images, ((0, 0), (0, 0), (0, down), (0, right)), mode="edge") if down or right else images


def run_tiled(
    run: Callable[[Array], Array],
    images: Array,
    tile: tuple[int, int],
    *,
    overlap: float = 0.25,
    window: str = "hann",
    batch: int = 8,
) -> Array:
    """What a network gives for images of any size.

    Args:
        run: (N, C, *tile) to (N, K, *tile), N at most ``batch``.
        images: (B, C, H, W).
        tile: (h, w).
        overlap: Least share of a tile that it has in common with the next.
        window: Shape of a tile's weight, see `tile_window`.
        batch: Tiles in one call.

    Returns:
        (B, K, H, W) float32.
    """
    size, (height, width) = images.shape[-2:], tile
    padded = pad_to(images, height, width)
    weights = tile_window(height, width, window)
    total: Array | None = None
    mass = np.zeros(padded.shape[-2:], np.float32)
    places = [
        (row, column)
        for row in tile_places(padded.shape[-2], height, overlap)
        for column in tile_places(padded.shape[-1], width, overlap)
    ]
    for row, column in places:
        mass[row : row + height, column : column + width] += weights
    cuts = [(image, row, column) for image in range(len(padded)) for row, column in places]
    for some in _in_parts(cuts, batch):
        given = np.stack([padded[i, :, row : row + height, column : column + width] for i, row, column in some])
        outputs = np.asarray(run(given), np.float32)
        if total is None:
            total = np.zeros((len(padded), outputs.shape[1], *padded.shape[-2:]), np.float32)
        for (i, row, column), output in zip(some, outputs, strict=True):
            total[i, :, row : row + height, column : column + width] += weights * output
    if total is None:
        raise RequestError("there is no image to run on")
    total /= mass
    return total[:, :, : size[0], : size[1]]


def _in_parts(items: Sequence[tuple[int, int, int]], size: int) -> Iterator[Sequence[tuple[int, int, int]]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
