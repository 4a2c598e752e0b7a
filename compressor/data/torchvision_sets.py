"""Data sets of torchvision from a local folder: `torchvision:CIFAR10:ROOT`. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from compressor.data.dataset import DataInfo
from compressor.data.pictures import PictureOptions, Pictures, held_out, is_gray, parse_argument, usual_size
from compressor.errors import RequestError, nearest

__all__ = ["torchvision_set"]

SIZED_BY = 64
"""Pictures that are looked at to find out whether all have one size."""


def torchvision_set(argument: str, split: str = "train") -> Pictures:
    """One split of a data set that torchvision knows.

    Args:
        argument: ``NAME:ROOT[?size=..,channels=..]``; ROOT is what torchvision's own class takes as ``root``.
        split: "train", "val" or "test"; what the set lacks is held out of its training part, always the same.

    Raises:
        RequestError: There is no such set, or it does not lie in ROOT.
    """
    text, options = parse_argument("torchvision", argument, PictureOptions)
    name, colon, root = text.partition(":")
    if not colon or not root:
        raise RequestError(f"torchvision:{text}: write torchvision:NAME:ROOT, as in torchvision:CIFAR10:./data")
    make = _factory(name)
    parts = _parts(name, make, Path(root).expanduser())
    if split in parts and (split != "train" or {"val", "test"} <= parts.keys()):
        whole, places = parts[split], list(range(len(parts[split])))
    else:
        whole = parts["train"]
        order = np.random.default_rng(0).permutation(len(whole)).tolist()
        places = held_out(order, [missing for missing in ("val", "test") if missing not in parts])[split]
    return _pictures(name, whole, sorted(places), split, options)


def _factory(name: str) -> type:
    import torchvision

    known = {key: value for key, value in vars(torchvision.datasets).items() if isinstance(value, type)}
    if name not in known or "download" not in inspect.signature(known[name]).parameters:
        able = [key for key, value in known.items() if "download" in inspect.signature(value).parameters]
        raise RequestError(
            f"torchvision has no labelled data set {name!r} that can be used here: {nearest(name, able)}"
        )
    return known[name]


def _parts(name: str, make: type, root: Path) -> dict[str, Any]:
    """The parts that torchvision divides the set into, by our names of the splits."""
    parameters = inspect.signature(make).parameters
    asked: dict[str, dict[str, Any]]
    if "train" in parameters:
        asked = {"train": {"train": True}, "test": {"train": False}}
    elif "split" in parameters:
        asked = {part: {"split": part} for part in ("train", "val", "test")}
    else:
        asked = {"train": {}}
    parts, problem = {}, ""
    for part, arguments in asked.items():
        try:
            parts[part] = make(root=str(root), download=False, **arguments)
        except (RuntimeError, OSError, ValueError) as error:
            unknown = isinstance(error, ValueError) and part == "val"  # no such split in this set
            problem = problem or ("" if unknown else str(error).strip().partition("\n")[0])
    if not parts or "train" not in parts:
        raise RequestError(
            f"torchvision:{name}:{root}: the set does not lie there, and nothing is downloaded ({problem})"
        )
    return parts


def _pictures(name: str, whole: Any, places: list[int], split: str, options: PictureOptions) -> Pictures:
    if not places:
        raise RequestError(f"torchvision:{name} has no pictures for the split {split!r}")
    labels = _labels(name, whole)[places]
    looked = [_image(whole, k) for k in places[:: max(len(places) // SIZED_BY, 1)][:SIZED_BY]]
    channels = options.channels or (1 if all(is_gray(image) for image in looked) else 3)
    shape = (channels, *(options.size or usual_size((image.height, image.width) for image in looked)))
    classes = tuple(map(str, getattr(whole, "classes", range(int(labels.max()) + 1))))
    first = np.concatenate([np.asarray(image, np.uint8).ravel() for image in looked])
    facts = repr((name, split, len(whole), shape, labels.tolist())).encode() + first.tobytes()
    info = DataInfo(f"{name}/{split}", hashlib.sha256(facts).hexdigest()[:16], classes, shape)
    read: Callable[[int], Image.Image] = lambda index: _image(whole, places[index])  # noqa: E731
    return Pictures(info, labels, read, lambda index: f"{name}[{places[index]}]", options.cache_mb << 20)


def _image(whole: Any, index: int) -> Image.Image:
    image: Image.Image = whole[index][0]
    return image


def _labels(name: str, whole: Any) -> np.ndarray[Any, Any]:
    """Labels without decoding the pictures, where the set keeps them under one of the usual names."""
    for attribute in ("targets", "labels", "_labels"):
        known = getattr(whole, attribute, None)
        if known is not None and len(known) == len(whole):
            return np.asarray(known, np.int64)
    labels = [whole[index][1] for index in range(len(whole))]
    if not all(isinstance(label, (int, np.integer)) for label in labels):
        raise RequestError(f"torchvision:{name} has no class labels")
    return np.asarray(labels, np.int64)
