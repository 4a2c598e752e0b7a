"""Map-style sets of samples, in numpy: the same sets feed training and the evaluation of an engine without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from compressor.errors import RequestError

__all__ = ["ArrayDataset", "DataInfo", "Dataset", "Sample", "Subset", "labels_of"]

Sample = dict[str, Any]
"""Fields by name (numpy arrays or scalars); every sample carries its own ``index``."""


@dataclass(frozen=True)
class DataInfo:
    """What is known of a set as a whole.

    Attributes:
        name: For people.
        fingerprint: Changes whenever the samples change; part of the fingerprints of runs.
        classes: Names of the classes, empty where there are none.
        shape: Shape of an image, (C, H, W).
        value_range: Lowest and highest value of a pixel; None for latents.
        extra: Further facts by name: ``conditions`` (tables by condition field), ``null_row``; ``augment``, the
            augmentation that suits the set (see `compressor.data.views`); ``skipped``, files left out.
    """

    name: str
    fingerprint: str
    classes: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    value_range: tuple[float, float] | None = (0.0, 1.0)
    extra: Mapping[str, Any] = field(default_factory=dict)


class Dataset(Protocol):
    """A map-style set of samples; it may be read by several threads at once."""

    @property
    def info(self) -> DataInfo: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class ArrayDataset:
    """A set held in arrays whose first axis counts the samples.

    Args:
        info: What is known of it.
        fields: Arrays by field name, all of one length.
        transform: Applied to each sample (a fresh dict) on access.
    """

    info: DataInfo
    fields: Mapping[str, np.ndarray[Any, Any]]
    transform: Callable[[Sample], Sample] | None = None

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.fields.items()}
        if not lengths or len(set(lengths.values())) != 1:
            raise RequestError(f"the fields of the set {self.info.name!r} differ in length: {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def __getitem__(self, index: int) -> Sample:
        sample = {name: values[index] for name, values in self.fields.items()} | {"index": index}
        return self.transform(sample) if self.transform else sample

    def join(self, result: Mapping[str, np.ndarray[Any, Any]]) -> ArrayDataset:
        """Return the set with more fields, one row a sample (cached features, codes, proposals)."""
        return ArrayDataset(self.info, {**self.fields, **result}, self.transform)

    def select(self, keep: np.ndarray[Any, Any]) -> ArrayDataset:
        """Return the samples of the given indices (or boolean mask)."""
        return ArrayDataset(self.info, {name: values[keep] for name, values in self.fields.items()}, self.transform)


@dataclass(frozen=True)
class Subset:
    """Some samples of a set; each keeps the ``index`` that it has in the whole set.

    Args:
        whole: The set.
        places: Indices in it.
    """

    whole: Dataset
    places: Sequence[int]

    @property
    def info(self) -> DataInfo:
        """What is known of the whole set."""
        return self.whole.info

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Sample:
        return self.whole[int(self.places[index])]


def labels_of(dataset: Dataset) -> np.ndarray[Any, Any]:
    """The labels (N,) int64 of all samples, without reading the images where the set knows them (``labels``)."""
    known = getattr(dataset, "labels", None)
    if known is None and isinstance(dataset, ArrayDataset):
        known = dataset.fields.get("label")
    if known is None:
        known = [dataset[index]["label"] for index in range(len(dataset))]
    return np.asarray(known, np.int64)
