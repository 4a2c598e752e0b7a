"""Labelled pictures, decoded when they are asked for: what `imagefolder:`, `torchvision:` and `hf:` share."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from PIL import Image, ImageOps
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from compressor.data.dataset import DataInfo, Sample
from compressor.errors import CompressorError, RequestError
from compressor.runtimes.images import as_eight_bits
from compressor.spec_options import split_options
from compressor.validation import validated

__all__ = ["PictureOptions", "Pictures", "held_out", "is_gray", "parse_argument", "parse_folder", "usual_size"]

LARGEST_OWN_SIZE = 256
"""Pictures of one size are taken as they are up to this edge; larger and mixed ones are resized."""
USUAL_SIZE = 224
SHARES = {"val": 0.1, "test": 0.2}
"""Shares that are held out where a set has no such split of its own."""
GRAY_MODES = ("1", "L", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")

Array = np.ndarray[Any, Any]
Item = TypeVar("Item")
Kind = TypeVar("Kind", bound="PictureOptions")


def _size(value: Any) -> Any:
    if isinstance(value, str) and "x" in value:
        value = value.split("x")
    return [value, value] if isinstance(value, (int, str)) else value


class PictureOptions(BaseModel):
    """Options of every source of pictures."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    size: Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None, BeforeValidator(_size)] = (
        None
    )
    """Edge, or HEIGHTxWIDTH, that pictures are resized and cropped to; their own where all share one, else 224."""
    channels: Literal[1, 3] | None = None
    """1 for gray, 3 for colour; gray where all pictures are."""
    cache_mb: int = Field(256, ge=0)
    """Memory for decoded pictures."""


def parse_argument(source: str, argument: str, kind: type[Kind]) -> tuple[str, Kind]:
    """A spec's argument, ``NAME?key=value,...``, as its name and its options; a directory is a name as it is.

    Args:
        source: What stands before the argument: "imagefolder".
        argument: Of the spec.
        kind: The source's options.

    Raises:
        RequestError: An unknown key or a wrong value.
    """
    name, values = (argument, {}) if Path(argument).is_dir() else split_options(argument)
    return name, validated(kind, values, where=f"{source}:{argument}")


def parse_folder(source: str, argument: str, kind: type[Kind]) -> tuple[Path, Kind]:
    """As `parse_argument`, where the name must be that of a directory.

    Raises:
        RequestError: There is none, or an option is wrong.
    """
    name, options = parse_argument(source, argument, kind)
    root = Path(name).expanduser()
    if not name or not root.is_dir():
        raise RequestError(f"{source}:{name}: there is no such directory")
    return root, options


class Pictures:
    """A set of labelled pictures: ``image`` (C, H, W) float32 in [0, 1], ``label``, ``index``.

    Args:
        info: What is known of it; its shape is that of every sample.
        labels: (N,) int64.
        read: Opens picture k.
        name: What picture k is called, for messages.
        cache_bytes: Memory for decoded pictures.
    """

    def __init__(
        self,
        info: DataInfo,
        labels: Array,
        read: Callable[[int], Image.Image],
        name: Callable[[int], str],
        cache_bytes: int,
    ) -> None:
        self.info, self.labels = info, labels
        self._read, self._name = read, name
        self._cache: OrderedDict[int, Array] = OrderedDict()
        self._lock = threading.Lock()
        self._room = cache_bytes // max(int(np.prod(info.shape)), 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        with self._lock:
            pixels = self._cache.get(index)
            if pixels is not None:
                self._cache.move_to_end(index)
        if pixels is None:
            pixels = self._decode(index)
            self._keep(index, pixels)
        return {"image": pixels.astype(np.float32) / np.float32(255), "label": int(self.labels[index]), "index": index}

    def _keep(self, index: int, pixels: Array) -> None:
        with self._lock:
            self._cache[index] = pixels
            while len(self._cache) > self._room:
                self._cache.popitem(last=False)

    def _decode(self, index: int) -> Array:
        try:
            channels, height, width = self.info.shape
            return pixels_of(self._read(index), channels, (height, width))
        except (OSError, ValueError, SyntaxError) as error:
            raise CompressorError(f"{self._name(index)} cannot be read any more: {error}") from error


def pixels_of(image: Image.Image, channels: int, size: tuple[int, int]) -> Array:
    """A picture as uint8 pixels (C, H, W): upright, resized so that it covers the size, cropped at the centre."""
    image = as_eight_bits(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")
    height, width = size
    if (image.height, image.width) != (height, width):
        image = ImageOps.fit(image, (width, height), method=Image.Resampling.BICUBIC)
    pixels = np.asarray(image, np.uint8)
    return np.ascontiguousarray(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))


def is_gray(image: Image.Image) -> bool:
    """Whether a picture has one channel."""
    return image.mode in GRAY_MODES


def usual_size(sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The size (H, W) of a set whose pictures have these sizes: their own where all share a small one, else 224."""
    found = set(sizes)
    if len(found) == 1 and max(next(iter(found))) <= LARGEST_OWN_SIZE:
        return next(iter(found))
    return USUAL_SIZE, USUAL_SIZE


def held_out(items: Sequence[Item], splits: Sequence[str] = ("val", "test")) -> dict[str, list[Item]]:
    """Divide items, in an order that is random already, into train and the splits that are to be held out of it.

    At least one item of two or more goes into the test split, and one always remains to train on.
    """
    parts: dict[str, list[Item]] = {}
    start = 0
    for split in reversed(splits):
        count = round(SHARES[split] * len(items))
        count = max(count, 1) if split == "test" and len(items) > 1 else count
        parts[split] = list(items[start : start + count])
        start += count
    parts["train"] = list(items[start:])
    return parts
