"""Data sets that `datasets` of Hugging Face saved locally (``save_to_disk``): `hf:DIR`. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from compressor.data.dataset import DataInfo
from compressor.data.pictures import PictureOptions, Pictures, held_out, is_gray, parse_argument, usual_size
from compressor.errors import RequestError, first_line, nearest

__all__ = ["hf_set"]

SPLIT_NAMES = {"train": ("train",), "val": ("validation", "val", "valid", "dev"), "test": ("test",)}
SIZED_BY = 64
"""Pictures that are looked at to find out whether all have one size."""


class HfOptions(PictureOptions):
    """Options of `hf:`."""

    image: str | None = None
    """Column of the pictures; the only image column by default."""
    label: str | None = None
    """Column of the labels; the only class-label column by default."""


def hf_set(argument: str, split: str = "train") -> Pictures:
    """One split of a saved data set.

    Args:
        argument: ``DIR[?image=COLUMN,label=COLUMN,size=..,channels=..]``.
        split: "train", "val" or "test"; what the set lacks is held out of its training part, always the same.

    Raises:
        RequestError: The package is missing, DIR holds no such set, or the columns are not told.
    """
    name, options = parse_argument("hf", argument, HfOptions)
    parts = _parts(_load(Path(name).expanduser()))
    if split in parts and (split != "train" or {"val", "test"} <= parts.keys()):
        rows = parts[split]
    else:
        whole = parts["train"]
        order = np.random.default_rng(0).permutation(len(whole)).tolist()
        missing = [part for part in ("val", "test") if part not in parts]
        rows = whole.select(sorted(held_out(order, missing)[split]))
    return _pictures(Path(name).name, rows, split, options)


def _load(directory: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise RequestError("hf: data need the package datasets: pip install 'compressor[hf]'") from error
    if not directory.is_dir():
        raise RequestError(f"hf:{directory}: there is no such directory; save_to_disk of a data set writes one")
    try:
        return datasets.load_from_disk(str(directory))
    except Exception as error:  # whatever it is, the folder cannot be read
        raise RequestError(f"hf:{directory} is nothing that save_to_disk wrote: {first_line(error)}") from error


def _parts(loaded: Any) -> dict[str, Any]:
    """The splits of a ``DatasetDict`` by our names; a ``Dataset`` alone is the training part."""
    if not isinstance(loaded, dict):
        return {"train": loaded}
    parts = {ours: loaded[theirs] for ours, names in SPLIT_NAMES.items() for theirs in names if theirs in loaded}
    if "train" not in parts:
        raise RequestError(f"the data set has the splits {', '.join(loaded)}, but no train")
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")  # what is held out by its makers is what is measured
    return parts


def _pictures(name: str, rows: Any, split: str, options: HfOptions) -> Pictures:
    if len(rows) == 0:
        raise RequestError(f"hf:{name} has no pictures for the split {split!r}")
    image = _column(rows, options.image, "image", "Image")
    label = _column(rows, options.label, "label", "ClassLabel")
    labels = np.asarray(rows[label], np.int64)
    known = getattr(rows.features[label], "names", None)
    classes = tuple(map(str, known or range(int(labels.max()) + 1)))
    looked = [rows[k][image] for k in range(0, len(rows), max(len(rows) // SIZED_BY, 1))][:SIZED_BY]
    channels = options.channels or (1 if all(is_gray(picture) for picture in looked) else 3)
    shape = (channels, *(options.size or usual_size((picture.height, picture.width) for picture in looked)))
    info = DataInfo(f"{name}/{split}", f"{rows._fingerprint}-{'x'.join(map(str, shape))}", classes, shape)
    read = lambda index: rows[index][image]  # noqa: E731
    return Pictures(info, labels, read, lambda index: f"{name}[{index}]", options.cache_mb << 20)


def _column(rows: Any, asked: str | None, option: str, kind: str) -> str:
    """The column that was asked for, else the only one of its kind."""
    if asked is not None:
        if asked not in rows.features:
            raise RequestError(f"hf: there is no column {asked!r}: {nearest(asked, rows.features)}")
        return asked
    fitting = [column for column, feature in rows.features.items() if type(feature).__name__ == kind]
    if len(fitting) != 1:
        raise RequestError(
            f"hf: the data set has {len(fitting)} columns of the kind {kind}: name one with ?{option}=COLUMN "
            f"({', '.join(rows.features)})"
        )
    return str(fitting[0])
