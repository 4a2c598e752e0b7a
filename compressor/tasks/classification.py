"""Image classification: one label an image; top-1, top-5 and macro F1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.data.dataset import DataInfo, Sample
from compressor.data.stream import Batch
from compressor.deployable import Deployable, DriverSpec, Graph
from compressor.errors import RequestError
from compressor.evaluate import Metric
from compressor.models.classifier import Classifier
from compressor.models.image_network import ImageNetworkGraph
from compressor.models.model import Model
from compressor.runtimes.runtime import Array
from compressor.tasks.image_networks import ImageNetworkOptions, ImageNetworkTask
from compressor.tasks.task import Figure
from compressor.validation import validated

__all__ = ["TASK", "Classification"]


class Classification(ImageNetworkTask):
    """Samples hold ``image`` (C, H, W) and ``label``.

    Images are raw pixels in [0, 1] everywhere: every model normalises for itself, and a deployable's settings tell its
    driver how.
    """

    name: ClassVar[str] = "classification"
    fields: ClassVar[Mapping[str, str]] = {
        "image": "(C, H, W) float32 pixels in [0, 1]",
        "label": "integer class in 0..K-1",
    }

    target: ClassVar[str] = "label"

    def __init__(self, data: Mapping[str, str], options: Mapping[str, Any]) -> None:
        super().__init__(data, validated(ImageNetworkOptions, options, prefix="task_options"))

    @property
    def info(self) -> DataInfo:
        """The training set's facts."""
        info = super().info
        if not info.classes:
            raise RequestError(f"the set {info.name!r} has no classes: classification needs labelled images")
        return info

    @property
    def figures(self) -> tuple[Figure, ...]:
        top5 = (Figure("top5", "Top-5 accuracy", "higher"),) if self.classes > 5 else ()
        return (
            Figure("top1", "Top-1 accuracy", "higher", headline=True),
            *top5,
            Figure("macro_f1", "Macro F1", "higher"),
        )

    def network(self, model: Model) -> Classifier:
        """The model as a function of raw pixels."""
        return Classifier(model)

    def loss(self, model: Model | Classifier, batch: Batch) -> dict[str, Tensor]:
        """The supervised loss: the cross-entropy with the labels."""
        classifier = model if isinstance(model, Classifier) else Classifier(model)
        return {"cross_entropy": F.cross_entropy(classifier(batch["image"]).float(), batch["label"])}

    def check(self, model: Model) -> None:
        super().check(model)
        name, info = model.info.architecture, self.info
        known = model.info.extra.get("classes")
        if known and list(known) != list(info.classes) and sorted(known) == sorted(info.classes):
            raise RequestError(
                f"{name} knows the classes of the set {info.name!r} in another order: {', '.join(known)}"
            )

    def deployable(self, model: Model) -> Deployable:
        classifier, info = Classifier(model), self.info
        device = next(model.module.parameters()).device
        pixels = torch.from_numpy(self.request(2)["image"]).to(device)
        graph = Graph(
            ImageNetworkGraph(classifier), {"image": classifier.normalise(pixels)}, ("logits",), {"image": {0: "batch"}}
        )
        settings = {
            "mean": list(classifier.mean),
            "std": list(classifier.std),
            "shape": list(info.shape),
            "classes": self.classes,
            "labels": list(info.classes),
        }
        return Deployable({"classifier": graph}, DriverSpec("predict", settings))

    def metrics(self) -> list[Metric]:
        return [ClassificationMetric({figure.name for figure in self.figures})]


class ClassificationMetric:
    """Top-1, top-5 and macro F1 of ``logits`` (or ``probabilities``); rows that are not finite count as wrong.

    Args:
        names: Figures to compute.
    """

    def __init__(self, names: set[str]) -> None:
        self.better: Mapping[str, Literal["higher", "lower"]] = {name: "higher" for name in sorted(names)}
        self._scores: list[Array] = []
        self._labels: list[int] = []

    def update(self, feed: str, outputs: Mapping[str, Array], samples: Sequence[Sample]) -> None:
        self._scores.append(np.asarray(outputs["logits"], np.float32))
        self._labels += [int(sample["label"]) for sample in samples]

    def compute(self) -> dict[str, float]:
        from sklearn.metrics import f1_score

        scores, labels = np.concatenate(self._scores), np.asarray(self._labels)
        ranked = np.argsort(-np.nan_to_num(scores), axis=1, kind="stable")[:, :5]
        ranked[~np.isfinite(scores).all(axis=1)] = -1
        hits = ranked == labels[:, None]
        macro = f1_score(labels, ranked[:, 0], labels=np.unique(labels), average="macro", zero_division=0.0)
        values = {"top1": float(hits[:, 0].mean()), "top5": float(hits.any(axis=1).mean()), "macro_f1": float(macro)}
        return {name: values[name] for name in self.better}


TASK = Classification
