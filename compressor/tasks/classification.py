"""Image classification: one label an image; top-1, top-5 and macro F1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.nn import functional as F

from compressor.data.dataset import DataInfo, Dataset, Sample, Subset
from compressor.data.sources import load_data
from compressor.data.stream import Batch, stack
from compressor.deployable import Deployable, DriverSpec, Graph
from compressor.errors import RequestError
from compressor.evaluate import Feed, Metric
from compressor.models.classifier import Classifier, ClassifierGraph
from compressor.models.model import Model
from compressor.runtimes.runtime import Array
from compressor.tasks.image_networks import check_image_network
from compressor.tasks.task import Figure
from compressor.validation import one_line

__all__ = ["TASK", "Classification"]


class Options(BaseModel):
    """Options of the task."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    split: Literal["test", "val"] = "test"
    """The split that is measured."""
    batch: int = Field(100, ge=1)
    """Images that a driver gets at once while it is measured."""


class Classification:
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
        try:
            self.options = Options.model_validate(dict(options))
        except ValidationError as error:
            raise RequestError(one_line(error, Options, prefix="task_options")) from error
        self.data = dict(data)
        self._sets: dict[tuple[str, str], Dataset] = {}

    def dataset(self, role: str = "train", split: str = "train") -> Dataset:
        if role not in self.data:
            raise RequestError(f"no data are given for the role {role!r}: add --data {role}=SPEC")
        if (role, split) not in self._sets:
            self._sets[role, split] = load_data(self.data[role], split)
        return self._sets[role, split]

    @property
    def info(self) -> DataInfo:
        """The training set's facts."""
        info = self.dataset(next(iter(self.data), "train")).info
        if not info.classes:
            raise RequestError(f"the set {info.name!r} has no classes: classification needs labelled images")
        return info

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.info.classes)

    @property
    def figures(self) -> tuple[Figure, ...]:
        top5 = (Figure("top5", "Top-5 accuracy", "higher"),) if self.classes > 5 else ()
        return (
            Figure("top1", "Top-1 accuracy", "higher", headline=True),
            *top5,
            Figure("macro_f1", "Macro F1", "higher"),
        )

    def student_defaults(self) -> dict[str, int]:
        """What a student's spec may leave open: the data say it."""
        return {"num_classes": self.classes, "in_chans": self.info.shape[0]}

    def network(self, model: Model) -> Classifier:
        """The model as a function of raw pixels."""
        return Classifier(model)

    def view(self, samples: Sequence[Sample], rngs: Sequence[np.random.Generator] = ()) -> Batch:
        """The collation of batches, without augmentation."""
        return stack(samples)

    def loss(self, model: Model | Classifier, batch: Batch) -> dict[str, Tensor]:
        """The supervised loss: the cross-entropy with the labels."""
        classifier = model if isinstance(model, Classifier) else Classifier(model)
        return {"cross_entropy": F.cross_entropy(classifier(batch["image"]).float(), batch["label"])}

    def check(self, model: Model) -> None:
        name, info = model.info.architecture, self.info
        check_image_network(model, Classifier, info)
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
            ClassifierGraph(classifier), {"image": classifier.normalise(pixels)}, ("logits",), {"image": {0: "batch"}}
        )
        settings = {
            "mean": list(classifier.mean),
            "std": list(classifier.std),
            "shape": list(info.shape),
            "classes": self.classes,
            "labels": list(info.classes),
        }
        return Deployable({"classifier": graph}, DriverSpec("predict", settings))

    def feeds(self, samples: int) -> dict[str, Feed]:
        """The same samples of the measured split every time, at most ``samples``, drawn at random over its classes."""
        dataset = self.dataset(next(iter(self.data), "train"), self.options.split)
        if len(dataset) == 0:
            raise RequestError(f"the set {dataset.info.name!r} has no samples to measure on")
        places = np.random.default_rng(0).permutation(len(dataset))[:samples]
        return {"test": Feed(Subset(dataset, sorted(places.tolist())), batch=self.options.batch)}

    def metrics(self) -> list[Metric]:
        return [ClassificationMetric({figure.name for figure in self.figures})]

    def request(self, batch: int) -> dict[str, Array]:
        dataset = self.dataset(next(iter(self.data), "train"), self.options.split)
        images = [np.asarray(dataset[k % len(dataset)]["image"], np.float32) for k in range(min(batch, len(dataset)))]
        return {"image": np.stack([images[k % len(images)] for k in range(batch)])}


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
