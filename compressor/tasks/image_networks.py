"""Tasks in which one network tells the classes of images apart: their data, what fits them, what is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from compressor.data.dataset import DataInfo, Dataset, Sample, Subset
from compressor.data.sources import load_data
from compressor.data.stream import Batch, stack
from compressor.errors import CompressorError, RequestError, first_line
from compressor.evaluate import Feed
from compressor.models.image_network import ImageNetwork
from compressor.models.model import Model
from compressor.runtimes.runtime import Array

__all__ = ["ImageNetworkOptions", "ImageNetworkTask", "check_image_network"]


class ImageNetworkOptions(BaseModel):
    """Options of all these tasks."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    split: Literal["test", "val"] = "test"
    """The split that is measured."""
    batch: int = Field(100, ge=1)
    """Images that a driver gets at once while it is measured."""


class ImageNetworkTask:
    """Base of these tasks: samples hold ``image`` (C, H, W), raw pixels in [0, 1], and what they are labelled with.

    Args:
        data: Specs by role; the first role is the training set.
        options: Of the task.
    """

    options: ImageNetworkOptions

    def __init__(self, data: Mapping[str, str], options: ImageNetworkOptions) -> None:
        self.data, self.options = dict(data), options
        self._sets: dict[tuple[str, str], Dataset] = {}

    def dataset(self, role: str = "train", split: str = "train") -> Dataset:
        if role not in self.data:
            raise RequestError(f"no data are given for the role {role!r}: add --data {role}=SPEC")
        if (role, split) not in self._sets:
            dataset = load_data(self.data[role], split)
            self.check_data(dataset)
            self._sets[role, split] = dataset
        return self._sets[role, split]

    def check_data(self, dataset: Dataset) -> None:
        """Raise a RequestError where a set's samples lack what the task needs."""

    @property
    def info(self) -> DataInfo:
        """The training set's facts."""
        return self.dataset(self._first_role).info

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.info.classes)

    def student_defaults(self) -> dict[str, int]:
        """What a student's spec may leave open: the data say it."""
        return {"num_classes": self.classes, "in_chans": self.info.shape[0]}

    def network(self, model: Model) -> ImageNetwork:
        """The model as a function of raw pixels."""
        raise NotImplementedError

    def view(self, samples: Sequence[Sample], rngs: Sequence[np.random.Generator] = ()) -> Batch:
        """The collation of batches, without augmentation."""
        return stack(samples)

    def check(self, model: Model) -> None:
        check_image_network(model, self.network, self.info)

    def feeds(self, samples: int) -> dict[str, Feed]:
        """The same samples of the measured split every time, at most ``samples``, drawn at random."""
        dataset = self.measured
        if len(dataset) == 0:
            raise RequestError(f"the set {dataset.info.name!r} has no samples to measure on")
        places = np.random.default_rng(0).permutation(len(dataset))[:samples]
        return {"test": Feed(Subset(dataset, sorted(places.tolist())), batch=self.options.batch)}

    def request(self, batch: int) -> dict[str, Array]:
        """``image`` (batch, C, H, W) of the measured split, from its first on, again and again."""
        dataset = self.measured
        images = [np.asarray(dataset[k % len(dataset)]["image"], np.float32) for k in range(min(batch, len(dataset)))]
        return {"image": np.stack([images[k % len(images)] for k in range(batch)])}

    @property
    def measured(self) -> Dataset:
        """The split that is measured, of the training set's role."""
        return self.dataset(self._first_role, self.options.split)

    @property
    def _first_role(self) -> str:
        return next(iter(self.data), "train")


def check_image_network(model: Model, network: Callable[[Model], ImageNetwork], info: DataInfo) -> None:
    """Call a model on one black image of a set.

    Args:
        model: Its module is left in the mode that it was in.
        network: How the task calls it; gives logits (B, classes, ...).
        info: Shape and classes of the set.

    Raises:
        RequestError: It cannot take the images, or tells another number of classes apart.
    """
    name, classes = model.info.architecture, len(info.classes)
    channels = model.info.extra.get("channels")
    # A gray image fills the channels of a colour model; nothing else can be made to fit.
    if channels is not None and info.shape[0] not in (1, channels):
        raise RequestError(f"{name} takes images of {channels} channels, the set {info.name!r} has {info.shape[0]}")
    training, device = model.module.training, next(model.module.parameters()).device
    try:
        with torch.no_grad():
            model.module.eval()
            logits = network(model)(torch.zeros(1, *info.shape, device=device))
    except CompressorError:
        raise
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
        shape = "x".join(map(str, info.shape))
        raise RequestError(f"{name} cannot take images of shape {shape}: {first_line(error)}") from error
    finally:
        model.module.train(training)
    if logits.shape[1] != classes:
        # a user's own factory may have no such option
        own = model.info.library == "python" and not name.startswith("compressor.")
        hint = "" if own else f": a model of ?num_classes={classes} fits"
        raise RequestError(f"{name} tells {logits.shape[1]} classes apart, the set {info.name!r} has {classes}{hint}")
