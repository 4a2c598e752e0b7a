"""One call of a classifier: normalise the image, run the graph, give class probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from compressor.errors import RequestError
from compressor.runtimes.runtime import Array, Port, Run

__all__ = ["DRIVER", "Predict"]


class Predict:
    """Classifies images.

    Graphs:
        classifier: input ``image`` (B, C, H, W) float32, normalised; output ``logits`` (B, K). Further outputs of the
            graph are handed on as they are.

    Settings:
        mean, std: Of the normalisation, C numbers each, for pixels in [0, 1]; without them pixels go in as they are.
        shape: (C, H, W) of an image; free sizes are None.
        classes: Number of classes K.
        probabilities: True where the graph's ``logits`` already are probabilities (they are then not normalised again).

    Inputs:
        image: (B, C, H, W), float in [0, 1], or uint8 in [0, 255].

    Outputs:
        logits: (B, K) float32.
        probabilities: (B, K) float32, rows sum to 1.
    """

    def __init__(
        self, graphs: Mapping[str, Run], settings: Mapping[str, Any], assets: Mapping[str, Array | str]
    ) -> None:
        self.classifier = graphs["classifier"]
        shape = tuple(settings.get("shape") or (None, None, None))
        self.mean = _per_channel(settings.get("mean"), 0.0)
        self.std = _per_channel(settings.get("std"), 1.0)
        self.normalised = bool(settings.get("probabilities", False))
        names = ("channels", "height", "width")
        sizes = tuple(name if size is None else int(size) for name, size in zip(names, shape, strict=True))
        classes = settings.get("classes")
        row = ("batch", "classes" if classes is None else int(classes))
        self.inputs = (Port("image", "image", ("batch", *sizes), "float32"),)
        self.outputs = (Port("logits", "scores", row, "float32"), Port("probabilities", "scores", row, "float32"))

    def __call__(self, inputs: Mapping[str, Array], seed: int = 0) -> dict[str, Array]:
        image = np.asarray(inputs["image"])
        if image.ndim != 4:
            raise RequestError(f"`image` must have the shape (batch, channels, height, width), got {image.shape}")
        pixels = image.astype(np.float32) / np.float32(255.0) if image.dtype == np.uint8 else image.astype(np.float32)
        outputs = dict(self.classifier({"image": (pixels - self.mean) / self.std}))
        logits = outputs["logits"].astype(np.float32)
        return {**outputs, "logits": logits, "probabilities": logits if self.normalised else _softmax(logits)}


def _per_channel(values: Any, default: float) -> Array:
    numbers = [default] if values is None else list(values)
    return np.asarray(numbers, np.float32).reshape(1, -1, 1, 1)


def _softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), np.float32)


DRIVER = Predict
