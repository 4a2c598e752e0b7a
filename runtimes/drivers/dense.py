"""A class for every pixel: normalise, run the graph (tile by tile where the image is not of its size), choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from compressor.errors import RequestError
from compressor.runtimes.runtime import Array, Port, Run
from compressor.runtimes.tiling import run_tiled, tile_window

__all__ = ["DRIVER", "Dense"]


class Dense:
    """Segments images.

    Graphs:
        segmenter: input ``image`` (B, C, h, w) float32, normalised; output ``logits`` (B, K, h, w).

    Settings:
        mean, std: Of the normalisation, C numbers each, for pixels in [0, 1]; without them pixels go in as they are.
        channels: C.
        classes: Number of classes K.
        tile: (h, w) that the graph takes.
        largest: (h, w) up to which the graph takes larger images whole; the tile where its size is fixed.
        overlap: Least share of a tile that it has in common with the next, in [0, 1); 0.25 by default.
        window: How tiles are blended: "hann", "linear" or "flat".
        tiles: Tiles in one call of the graph, at most.
        scores: Also return the logits; true by default.

    Inputs:
        image: (B, C, H, W), float in [0, 1], or uint8 in [0, 255]; any height and width.

    Outputs:
        classes: (B, H, W) int32, the class with the largest logit; -1 where logits are not finite.
        logits: (B, K, H, W) float32.
    """

    def __init__(
        self, graphs: Mapping[str, Run], settings: Mapping[str, Any], assets: Mapping[str, Array | str]
    ) -> None:
        self.segmenter = graphs["segmenter"]
        self.mean, self.std = _per_channel(settings.get("mean"), 0.0), _per_channel(settings.get("std"), 1.0)
        height, width = settings["tile"]
        self.tile = int(height), int(width)
        rows, columns = settings.get("largest") or self.tile
        self.largest = max(int(rows), self.tile[0]), max(int(columns), self.tile[1])
        self.overlap = float(settings.get("overlap", 0.25))
        if not 0 <= self.overlap < 1:
            raise RequestError(f"tiles overlap by a share in [0, 1), not {self.overlap}")
        self.window = str(settings.get("window", "hann"))
        tile_window(1, 1, self.window)  # an unknown shape is an error before any image
        self.tiles, self.scores = int(settings.get("tiles", 8)), bool(settings.get("scores", True))
        channels, classes = settings.get("channels"), settings.get("classes")
        self.inputs = (Port("image", "image", ("batch", channels or "channels", "height", "width"), "float32"),)
        self.outputs: tuple[Port, ...] = (Port("classes", "mask", ("batch", "height", "width"), "int32"),)
        if self.scores:
            shape = ("batch", classes or "classes", "height", "width")
            self.outputs += (Port("logits", "scores", shape, "float32"),)

    def __call__(self, inputs: Mapping[str, Array], seed: int = 0) -> dict[str, Array]:
        image = np.asarray(inputs["image"])
        if image.ndim != 4 or 0 in image.shape:
            raise RequestError(f"`image` must have the shape (batch, channels, height, width), got {image.shape}")
        pixels = image.astype(np.float32) / np.float32(255.0) if image.dtype == np.uint8 else image.astype(np.float32)
        logits = self._logits((pixels - self.mean) / self.std)
        classes = logits.argmax(axis=1).astype(np.int32)
        classes[~np.isfinite(logits).all(axis=1)] = -1
        return {"classes": classes, "logits": logits} if self.scores else {"classes": classes}

    def _logits(self, image: Array) -> Array:
        height, width = image.shape[-2:]
        if self.tile[0] <= height <= self.largest[0] and self.tile[1] <= width <= self.largest[1]:
            return self._run(image)
        return run_tiled(self._run, image, self.tile, overlap=self.overlap, window=self.window, batch=self.tiles)

    def _run(self, image: Array) -> Array:
        return np.asarray(self.segmenter({"image": np.ascontiguousarray(image)})["logits"], np.float32)


def _per_channel(values: Any, default: float) -> Array:
    numbers = [default] if values is None else list(values)
    return np.asarray(numbers, np.float32).reshape(1, -1, 1, 1)


DRIVER = Dense
