"""Semantic segmentation: a class for every pixel; mIoU, pixel accuracy and mean accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from compressor.data.dataset import Dataset
from compressor.data.stream import Batch
from compressor.deployable import Deployable, DriverSpec, Graph
from compressor.errors import RequestError
from compressor.evaluate import Metric
from compressor.losses.dense import map_cross_entropy
from compressor.metrics.segmentation import SegmentationMetric
from compressor.models.image_network import ImageNetwork, ImageNetworkGraph
from compressor.models.model import Model
from compressor.models.segmenter import Segmenter
from compressor.runtimes.runtime import Array, Driver
from compressor.tasks.image_networks import ImageNetworkOptions, ImageNetworkTask
from compressor.tasks.task import Figure
from compressor.validation import validated

__all__ = ["TASK", "Segmentation"]

SMALLEST_FREE = 64
"""Least edge of the example images of free sizes: an axis of one position, deep inside, would be taken for fixed."""


class Options(ImageNetworkOptions):
    """Options of the task."""

    batch: int = Field(16, ge=1)
    """Images that a driver gets at once while it is measured."""
    sizes: Literal["fixed", "free"] = "fixed"
    """"fixed": graphs take the size of the data's images, and the driver runs others in tiles; "free": height and width
    of the graph are dynamic, and images up to twice the size run whole; a target's `axes` tell TensorRT."""
    overlap: float = Field(0.25, ge=0, lt=1)
    """Least share of a tile that it has in common with the next."""
    window: Literal["hann", "linear", "flat"] = "hann"
    """How overlapping tiles are blended."""
    scores: bool = True
    """Whether the driver also returns the logits of the pixels."""


class Segmentation(ImageNetworkTask):
    """Samples hold ``image`` (C, H, W) and ``mask`` (H, W).

    Images are raw pixels in [0, 1] everywhere: every model normalises for itself, and a deployable's settings tell its
    driver how. Pixels of the class ``ignore_index`` (255, unless the set says otherwise) belong to none.
    """

    name: ClassVar[str] = "segmentation"
    fields: ClassVar[Mapping[str, str]] = {
        "image": "(C, H, W) float32 pixels in [0, 1]",
        "mask": "(H, W) int64 classes in 0..K-1, or the set's ignore_index (255)",
    }
    options: Options
    target: ClassVar[str] = "mask"
    pictures_caption: ClassVar[str] = "Images, their masks, and what the model says; gray belongs to no class."
    figures: tuple[Figure, ...] = (
        Figure("miou", "mIoU", "higher", headline=True),
        Figure("pixel_accuracy", "Pixel accuracy", "higher"),
        Figure("mean_accuracy", "Mean accuracy", "higher"),
    )

    def __init__(self, data: Mapping[str, str], options: Mapping[str, Any]) -> None:
        super().__init__(data, validated(Options, options, prefix="task_options"))

    def check_data(self, dataset: Dataset) -> None:
        if len(dataset) and self.target not in dataset[0]:
            raise RequestError(
                f"the set {dataset.info.name!r} has no masks: segmentation needs them (scenes:32?masks=true, "
                "segfolder:DIR)"
            )

    @property
    def ignore_index(self) -> int:
        """Number of the pixels that belong to no class."""
        return int(self.info.extra.get("ignore_index", 255))

    def network(self, model: Model) -> Segmenter:
        """The model as a function of raw pixels."""
        return Segmenter(model)

    def loss(self, model: Model | ImageNetwork, batch: Batch) -> dict[str, Tensor]:
        """The supervised loss: the cross-entropy with the masks, mean over the pixels that belong to a class."""
        segmenter = model if isinstance(model, ImageNetwork) else Segmenter(model)
        logits = segmenter(batch["image"])
        return {"cross_entropy": map_cross_entropy(logits, batch["mask"], ignore_index=self.ignore_index)}

    def deployable(self, model: Model) -> Deployable:
        segmenter, (channels, height, width), free = Segmenter(model), self.info.shape, self.options.sizes == "free"
        if free and segmenter.size is not None:
            raise RequestError(f"{model.info.architecture} takes one size of images: leave task_options.sizes at fixed")
        device = next(model.module.parameters()).device
        pixels = torch.from_numpy(self.request(2)["image"]).to(device)
        if free and min(height, width) < SMALLEST_FREE:
            pixels = pixels.repeat(1, 1, 2, 2)
        axes = {0: "batch", 2: "height", 3: "width"} if free else {0: "batch"}
        graph = Graph(
            ImageNetworkGraph(segmenter), {"image": segmenter.normalise(pixels)}, ("logits",), {"image": axes}
        )
        settings = {
            "mean": list(segmenter.mean),
            "std": list(segmenter.std),
            "channels": channels,
            "classes": self.classes,
            "labels": list(self.info.classes),
            "tile": [height, width],
            "largest": [2 * height, 2 * width] if free else [height, width],
            "overlap": self.options.overlap,
            "window": self.options.window,
            "tiles": 8,
            "scores": self.options.scores,
        }
        return Deployable({"segmenter": graph}, DriverSpec("dense", settings))

    def metrics(self) -> list[Metric]:
        return [SegmentationMetric(self.classes, self.ignore_index)]

    def pictures(self, driver: Driver, seed: int = 0, columns: int = 8) -> bytes:
        """A sheet as PNG: images, their masks in colours, and what the driver says of them; ignored pixels are gray."""
        from io import BytesIO

        from PIL import Image

        dataset = self.measured
        count = min(columns, len(dataset))
        images = self.request(count)["image"]
        masks = np.stack([np.asarray(dataset[k]["mask"]) for k in range(count)])
        answers = driver({"image": images}, seed=seed)["classes"]
        colours = class_colours(self.classes)
        shown = np.broadcast_to(images[:, :3] if images.shape[1] >= 3 else images[:, :1], (count, 3, *images.shape[2:]))
        rows = [
            (shown.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8),
            *(colours[np.where((values < 0) | (values >= self.classes), -1, values)] for values in (masks, answers)),
        ]
        scale = max(1, 96 // images.shape[-1])
        sheet = np.stack(rows).repeat(scale, axis=2).repeat(scale, axis=3)
        sheet = np.pad(sheet, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
        high, wide = sheet.shape[2:4]
        buffer = BytesIO()
        Image.fromarray(sheet.transpose(0, 2, 1, 3, 4).reshape(3 * high, count * wide, 3)).save(buffer, format="PNG")
        return buffer.getvalue()


def class_colours(classes: int) -> Array:
    """(K + 1, 3) uint8: black for class 0, hues for the others, gray for what is no class (the last row)."""
    import colorsys

    hues = [colorsys.hsv_to_rgb((0.61803 * k) % 1, 0.75, 0.95) for k in range(1, classes)]
    return (np.array([(0, 0, 0), *hues, (0.5, 0.5, 0.5)]) * 255).round().astype(np.uint8)


TASK = Segmentation
