"""Figures of a classifier, from labels and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compressor.errors import RequestError
from compressor.runtimes.runtime import Array

__all__ = ["ClassFigures", "accuracy", "per_class"]


@dataclass(frozen=True)
class ClassFigures:
    """How one class fares.

    Attributes:
        name: The class.
        precision: Share of the predictions of this class that are right; 0 when it was never predicted.
        recall: Share of the samples of this class that were found; 0 when there are none.
        support: Number of samples of this class.
        predicted: Number of predictions of this class.
    """

    name: str
    precision: float
    recall: float
    support: int
    predicted: int


def accuracy(labels: Array, predictions: Array) -> float:
    """Share of right predictions, in [0, 1]; both of shape (N,), N at least 1.

    Raises:
        RequestError: The shapes differ or are empty.
    """
    labels, predictions = _checked(labels, predictions)
    return float(np.mean(labels == predictions))


def per_class(labels: Array, predictions: Array, classes: int | Sequence[str]) -> list[ClassFigures]:
    """Precision and recall of every class.

    Args:
        labels: Shape (N,), integers in [0, number of classes).
        predictions: Shape (N,), likewise.
        classes: Number of the classes, or their names.

    Returns:
        One entry a class, in the order of the labels, also for classes that do not occur.

    Raises:
        RequestError: The shapes differ or are empty, or a label lies outside the classes.
    """
    from sklearn.metrics import precision_recall_fscore_support

    names = [str(index) for index in range(classes)] if isinstance(classes, int) else [str(name) for name in classes]
    labels, predictions = _checked(labels, predictions)
    for kind, values in (("labels", labels), ("predictions", predictions)):
        if values.min() < 0 or values.max() >= len(names):
            raise RequestError(f"{kind} lie in [{values.min()}, {values.max()}], but there are {len(names)} classes")
    precision, recall, _, support = precision_recall_fscore_support(
        labels, predictions, labels=np.arange(len(names)), zero_division=0.0
    )
    predicted = np.bincount(predictions, minlength=len(names))
    rows = zip(names, precision, recall, support, predicted, strict=True)
    return [ClassFigures(name, float(p), float(r), int(n), int(q)) for name, p, r, n, q in rows]


def _checked(labels: Array, predictions: Array) -> tuple[Array, Array]:
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.ndim != 1 or labels.shape != predictions.shape or len(labels) == 0:
        shapes = f"{labels.shape} and {predictions.shape}"
        raise RequestError(f"labels and predictions must be two lists of one length, not {shapes}")
    return labels.astype(np.int64), predictions.astype(np.int64)
