"""What generated images are worth: a judge network's opinion of them, and their distance to real ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from compressor.data.dataset import Sample
from compressor.errors import RequestError
from compressor.metrics.classification import ClassFigures, accuracy, per_class
from compressor.metrics.distributions import frechet_distance, pairwise_diversity
from compressor.runtimes.runtime import Array, Run

__all__ = ["GeneratedImages", "judge_features"]

_JUDGE_BATCH = 256


class GeneratedImages:
    """Judges class-conditional images (a `compressor.evaluate.Metric`).

    Feed "test" brings the driver's ``image`` (B, C, H, W) and samples with the asked ``label``; feed "reference" brings
    real samples with ``image`` (C, H, W), in the same value range.

    Figures: ``accuracy`` (the judge sees the asked class), ``precision_min`` and ``recall_min`` (of the worst class),
    ``frechet_distance`` (of the judge's features to those of real images), ``diversity`` (mean Euclidean pixel distance
    within a class: falls when the generator repeats itself) and ``pixel_std`` (of all pixels: falls when images wash
    out). A figure whose samples are missing is NaN.

    Args:
        judge: Takes ``{"image": (B, C, H, W)}``, returns ``{"logits": (B, classes), "features": (B, D)}``. It must be
            another network than those that trained the generator.
        classes: Number of the classes, or their names.
        reference: Features of the real images, (N, D), as `judge_features` gives them; they spare judging the same
            images for every engine. None: they come from the "reference" feed.
    """

    better: Mapping[str, Literal["higher", "lower"]] = {
        "accuracy": "higher",
        "frechet_distance": "lower",
        "precision_min": "higher",
        "recall_min": "higher",
        "diversity": "higher",
        "pixel_std": "higher",
    }

    def __init__(self, judge: Run, classes: int | Sequence[str], reference: Array | None = None) -> None:
        self.judge, self.classes = judge, classes
        self._given_reference = reference
        self._real: list[Array] = []
        self._images: list[Array] = []
        self._features: list[Array] = []
        self._labels: list[int] = []
        self._predictions: list[int] = []

    def update(self, feed: str, outputs: Mapping[str, Array], samples: Sequence[Sample]) -> None:
        """Take a batch of generated ("test") or of real ("reference") images.

        Raises:
            RequestError: The feed is another, or the driver returns no images.
        """
        if feed == "reference":
            if self._given_reference is None:
                images = np.stack([np.asarray(sample["image"], dtype=np.float32) for sample in samples])
                self._real.append(judge_features(self.judge, images))
        elif feed == "test":
            if "image" not in outputs:
                raise RequestError(f"generated images need a driver with the output 'image'; it has {sorted(outputs)}")
            images = np.asarray(outputs["image"], dtype=np.float32)
            # One broken sample (overflow in half precision) must not take the figures of all others with it.
            judged = self.judge({"image": np.nan_to_num(images, nan=0.0, posinf=0.0, neginf=0.0)})
            self._images.append(images)
            self._features.append(np.asarray(judged["features"], dtype=np.float64))
            self._predictions += np.argmax(judged["logits"], axis=1).tolist()
            self._labels += [int(sample["label"]) for sample in samples]
        else:
            raise RequestError(f"generated images are measured on the feeds 'test' and 'reference', not {feed!r}")

    def compute(self) -> dict[str, float]:
        """The figures by name; accuracy, precision and recall in [0, 1]."""
        missing = float("nan")
        if not self._images:
            return dict.fromkeys(self.better, missing)
        images, table = np.concatenate(self._images), self.per_class()
        asked = [row for row in table if row.support]
        real = self._reference()
        generated = np.concatenate(self._features)
        comparable = len(real) > 1 and len(generated) > 1
        return {
            "accuracy": accuracy(np.array(self._labels), np.array(self._predictions)),
            "frechet_distance": frechet_distance(generated, real) if comparable else missing,
            "precision_min": min(row.precision for row in asked),
            "recall_min": min(row.recall for row in asked),
            "diversity": pairwise_diversity(images, np.array(self._labels)),
            "pixel_std": float(images.std(dtype=np.float64)),
        }

    def per_class(self) -> list[ClassFigures]:
        """Precision and recall of every class, as the judge sees the generated images."""
        return per_class(np.array(self._labels), np.array(self._predictions), self.classes)

    def _reference(self) -> Array:
        if self._given_reference is not None:
            return self._given_reference
        return np.concatenate(self._real) if self._real else np.empty((0, 0))


def judge_features(judge: Run, images: Array) -> Array:
    """The judge's features of images (N, C, H, W): shape (N, D), float64."""
    starts = range(0, len(images), _JUDGE_BATCH)
    parts = [judge({"image": images[start : start + _JUDGE_BATCH]})["features"] for start in starts]
    return np.concatenate(parts).astype(np.float64)
