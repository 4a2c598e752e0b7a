"""Figures of a segmentation from one confusion matrix of all pixels: mIoU, pixel accuracy, mean accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from compressor.data.dataset import Sample

__all__ = ["SegmentationMetric", "confusion_matrix", "segmentation_figures"]

Array = np.ndarray[Any, Any]


def confusion_matrix(predicted: Array, labels: Array, classes: int, *, ignore_index: int = 255) -> Array:
    """How often each class was taken for which.

    Args:
        predicted: Class numbers, any shape; numbers outside 0..K-1 (-1: no answer) count as wrong.
        labels: The same shape; ``ignore_index`` does not count.
        classes: K.
        ignore_index: Number of pixels that belong to no class.

    Returns:
        (K, K + 1) int64: rows are labels, columns predictions; the last column counts those outside 0..K-1.
    """
    valid = labels != ignore_index
    rows, columns = labels[valid].astype(np.int64), predicted[valid].astype(np.int64)
    columns = np.where((columns >= 0) & (columns < classes), columns, classes)
    counts = np.bincount(rows * (classes + 1) + columns, minlength=classes * (classes + 1))
    return counts.reshape(classes, classes + 1)


def segmentation_figures(confusion: Array) -> dict[str, float]:
    """mIoU, pixel accuracy and mean accuracy of a `confusion_matrix`, each in [0, 1].

    Classes that occur neither among the labels nor among the predictions leave the mean of the mIoU, classes without
    labels that of the accuracy. Without any labelled pixel all figures are NaN.
    """
    hits, labelled = np.diag(confusion), confusion.sum(axis=1)
    union = labelled + confusion[:, : len(hits)].sum(axis=0) - hits
    iou, accuracy = (hits[of > 0] / of[of > 0] for of in (union, labelled))
    total = labelled.sum()
    if total == 0:
        return dict.fromkeys(("miou", "pixel_accuracy", "mean_accuracy"), float("nan"))
    return {
        "miou": float(iou.mean()),
        "pixel_accuracy": float(hits.sum() / total),
        "mean_accuracy": float(accuracy.mean()),
    }


class SegmentationMetric:
    """The figures over all samples; a driver's ``classes`` (B, H, W) against the samples' ``mask``.

    Args:
        classes: K.
        ignore_index: Number of pixels that do not count.
    """

    def __init__(self, classes: int, ignore_index: int = 255) -> None:
        names = ("miou", "pixel_accuracy", "mean_accuracy")
        self.better: Mapping[str, Literal["higher", "lower"]] = dict.fromkeys(names, "higher")
        self._ignore = ignore_index
        self._confusion = np.zeros((classes, classes + 1), np.int64)

    def update(self, feed: str, outputs: Mapping[str, Array], samples: Sequence[Sample]) -> None:
        labels = np.stack([np.asarray(sample["mask"]) for sample in samples])
        predicted = np.asarray(outputs["classes"])
        self._confusion += confusion_matrix(predicted, labels, len(self._confusion), ignore_index=self._ignore)

    def compute(self) -> dict[str, float]:
        return segmentation_figures(self._confusion)
