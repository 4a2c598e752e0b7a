"""Folders of pictures with masks, paired by their names without the suffix:

    DIR/images/*.jpg, DIR/masks/*.png                     70 % train, 10 % val, 20 % test, by a hash of the names
    DIR/train/images/*.jpg, DIR/train/masks/*.png, ...    splits of their own; what is missing is held out of train
    DIR/images/train/*.jpg, DIR/masks/train/*.png, ...    the same, the other way round
    DIR/train/*.jpg, DIR/trainannot/*.png, ...            the same, as CamVid is often handed on

A mask holds class numbers: an indexed or a gray PNG; ``?ignore=255`` is the number of pixels of no class. Names of the
classes stand in ``DIR/classes.txt``, one a line, or come from ``?classes=``; without either they are numbers up to the
largest that a mask holds. As for `imagefolder:`, hidden files are not looked at, and pictures that cannot be read or
paired are known before any work.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from pydantic import Field

from compressor.data.dataset import DataInfo, Sample
from compressor.data.picture_files import (
    PICTURE_KINDS,
    SPLIT_FOLDERS,
    Found,
    file_fingerprint,
    folders_in,
    look_at,
    pictures_below,
    refuse_or_leave_out,
    remembered_look,
    say_once,
    upright_size,
)
from compressor.data.pictures import PictureOptions, held_out, parse_folder, pixels_of, usual_size
from compressor.errors import CompressorError, RequestError

__all__ = ["SegmentedPictures", "segfolder"]

IMAGE_FOLDERS = ("images", "image", "imgs", "img")
MASK_FOLDERS = ("masks", "mask", "labels", "annotations", "annot")
CLASSES_FILE = "classes.txt"
NUMBER_MODES = ("P", "L", "1", "I", "I;16", "I;16B", "I;16L", "I;16N")

Array = np.ndarray[Any, Any]


class SegfolderOptions(PictureOptions):
    """Options of `segfolder:`."""

    classes: int | tuple[str, ...] | None = None
    """How many classes there are, or their names; `classes.txt` or the masks tell otherwise."""
    ignore: int = Field(255, ge=0)
    """Number of the pixels that belong to no class."""
    images: str | None = None
    """Name of the folders of pictures, instead of images."""
    masks: str | None = None
    """Name of the folders of masks, instead of masks."""
    mask_suffix: str = ""
    """What follows a picture's name in its mask's: _L for street_L.png."""
    skip_bad: bool = False
    """Leave pairs that cannot be used out (each is named) instead of refusing the folder."""
    hold_out: bool = True
    """Hold splits that have no folder out of train; false leaves train whole, and they do not exist."""


@dataclass(frozen=True)
class Pair:
    """A picture and its mask."""

    image: Path
    mask: Path


def segfolder(argument: str, split: str = "train") -> SegmentedPictures:
    """One split of a folder.

    Args:
        argument: ``DIR[?size=96x128,classes=12,ignore=255,images=..,masks=..,mask_suffix=..,skip_bad=true]``.
        split: "train", "val" or "test".

    Raises:
        RequestError: There is no such folder, it has no pairs, or a pair cannot be used.
    """
    root, options = parse_folder("segfolder", argument, SegfolderOptions)
    parts, unpaired = _parts(root, options)
    pairs = [pair for part in parts.values() for pair in part]
    if not pairs and not unpaired:
        raise RequestError(f"{root} has no pictures in its image folders ({PICTURE_KINDS})")
    files = {path: kind for pair in pairs for path, kind in ((pair.image, "image"), (pair.mask, "mask"))}
    mark = file_fingerprint(root, files)
    found = _look(root, pairs, mark, options.ignore)
    names = _class_names(root, options, found)
    bad = unpaired | _unusable(pairs, found, len(names))
    refuse_or_leave_out(root, bad, len(pairs) + len(unpaired), options.skip_bad)
    parts = {name: [pair for pair in part if pair.image not in bad] for name, part in parts.items()}
    missing = [one for one in ("val", "test") if one not in parts] if options.hold_out else []
    good = (parts | _by_hash(root, parts["train"], missing)).get(split)
    if not good:
        raise RequestError(f"{root} has no pictures for the split {split!r}: add some, or a folder {root / split}")
    kept = [found[pair.image] for part in parts.values() for pair in part]
    channels = options.channels or (1 if all(facts.gray for facts in kept) else 3)
    shape = (channels, *(options.size or usual_size(facts.size for facts in kept)))
    facts = (mark, split, shape, sorted(map(str, bad)), len(good), names, options.ignore)
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    extra: dict[str, Any] = {"ignore_index": options.ignore, "augment": "scale-flip"}
    if bad:
        extra["skipped"] = [str(path.relative_to(root)) for path in bad]
    info = DataInfo(f"{root.resolve().name}/{split}", key, names, shape, extra=extra)
    return SegmentedPictures(info, good, options.cache_mb << 20)


class SegmentedPictures:
    """A set of pictures with masks: ``image`` (C, H, W) float32 in [0, 1], ``mask`` (H, W) int64, ``index``.

    Args:
        info: What is known of it; its shape is that of every sample.
        pairs: Picture and mask of every sample.
        cache_bytes: Memory for decoded pairs.
    """

    def __init__(self, info: DataInfo, pairs: Sequence[Pair], cache_bytes: int) -> None:
        self.info, self._pairs = info, list(pairs)
        self._cache: OrderedDict[int, tuple[Array, Array]] = OrderedDict()
        self._lock = threading.Lock()
        channels, height, width = info.shape
        self._room = cache_bytes // max((channels + 4) * height * width, 1)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Sample:
        with self._lock:
            known = self._cache.get(index)
            if known is not None:
                self._cache.move_to_end(index)
        pixels, classes = known if known is not None else self._decode(index)
        image = pixels.astype(np.float32) / np.float32(255)
        return {"image": image, "mask": classes.astype(np.int64), "index": index}

    def _decode(self, index: int) -> tuple[Array, Array]:
        pair, (channels, height, width) = self._pairs[index], self.info.shape
        try:
            with Image.open(pair.image) as image:
                pixels = pixels_of(image, channels, (height, width))
            with Image.open(pair.mask) as mask:
                numbers = Image.fromarray(class_numbers(mask))
        except (OSError, ValueError, SyntaxError) as error:
            raise CompressorError(f"{pair.image} or its mask cannot be read any more: {error}") from error
        if (numbers.height, numbers.width) != (height, width):
            numbers = ImageOps.fit(numbers, (width, height), method=Image.Resampling.NEAREST)
        decoded = pixels, np.asarray(numbers, np.int32)
        with self._lock:
            self._cache[index] = decoded
            while len(self._cache) > self._room:
                self._cache.popitem(last=False)
        return decoded


def class_numbers(mask: Image.Image) -> Array:
    """The class numbers (H, W) int32 of a mask, upright.

    Raises:
        ValueError: It holds colours.
    """
    if mask.mode not in NUMBER_MODES:
        raise ValueError("a mask of colours; masks are indexed or gray pictures that hold class numbers")
    return np.asarray(ImageOps.exif_transpose(mask), np.int32)


# --- what lies in the folder -----------------------------------------------------------------------------------------


def _parts(root: Path, options: SegfolderOptions) -> tuple[dict[str, list[Pair]], dict[Path, str]]:
    """Pairs of the splits that have folders, all of them in "train" where none has; and the pictures without a mask."""
    own: dict[str, tuple[Path, Path]] = {}
    whole = _folders(root, options)
    for split, names in SPLIT_FOLDERS.items():
        for name in names:
            beside = (root / name, root / f"{name}annot")
            inside = _folders(root / name, options) if (root / name).is_dir() else None
            crossed = tuple(folder / name for folder in whole) if whole else None
            for pair in (inside, crossed, beside):
                if pair is not None and pair[0].is_dir() and pair[1].is_dir():
                    own.setdefault(split, (pair[0], pair[1]))
    if "train" not in own:
        if whole is None:
            images, masks = options.images or IMAGE_FOLDERS[0], options.masks or MASK_FOLDERS[0]
            there = [folder.name for folder in folders_in(root)]
            hint = f"it holds {', '.join(there[:6])}" if there else "it holds no folders"
            raise RequestError(
                f"{root} has no folders {images}/ and {masks}/ (or train/{images}/ and train/{masks}/): {hint}; other "
                "names are given by ?images=NAME,masks=NAME"
            )
        own = {"train": whole}
    unpaired: dict[Path, str] = {}
    parts = {split: _pairs(*folders, options.mask_suffix, unpaired) for split, folders in own.items()}
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
    return parts, unpaired


def _folders(folder: Path, options: SegfolderOptions) -> tuple[Path, Path] | None:
    """The folders of pictures and of masks in a folder."""
    found = []
    for given, names in ((options.images, IMAGE_FOLDERS), (options.masks, MASK_FOLDERS)):
        places = [folder / name for name in ((given,) if given else names) if (folder / name).is_dir()]
        if not places:
            return None
        found.append(places[0])
    return found[0], found[1]


def _pairs(images: Path, masks: Path, suffix: str, unpaired: dict[Path, str]) -> list[Pair]:
    """Pictures and masks of the same name; pictures without one are added to ``unpaired``."""
    known: dict[str, Path] = {}
    for path in pictures_below(masks):
        stem = str(path.relative_to(masks).with_suffix(""))
        if stem.endswith(suffix):
            known[stem.removesuffix(suffix)] = path
    pairs: dict[str, Pair] = {}
    for path in pictures_below(images):
        stem = str(path.relative_to(images).with_suffix(""))
        if stem in pairs:
            raise RequestError(f"{pairs[stem].image} and {path.name} have one mask: give every picture its own name")
        if stem in known:
            pairs[stem] = Pair(path, known[stem])
        else:
            unpaired[path] = f"no mask {stem}{suffix}.png in {masks.name}"
    alone = sorted(known.keys() - pairs.keys())
    if alone:
        say_once(f"{len(alone)} masks in {masks} belong to no picture and are left out, such as {alone[0]}")
    return list(pairs.values())


def _by_hash(root: Path, pairs: Sequence[Pair], splits: Sequence[str]) -> dict[str, list[Pair]]:
    """Hold splits out, in the order of a hash of the names, which a further file leaves as it is."""
    order = sorted(pairs, key=lambda pair: hashlib.sha256(str(pair.image.relative_to(root)).encode()).digest())
    places = {pair.image: place for place, pair in enumerate(pairs)}
    parts = held_out(order, splits)
    return {split: sorted(some, key=lambda pair: places[pair.image]) for split, some in parts.items()}


# --- what is in the files --------------------------------------------------------------------------------------------


def _look(root: Path, pairs: Sequence[Pair], mark: str, ignore: int) -> dict[Path, Found]:
    masks = {pair.mask for pair in pairs}

    def read(mask: Image.Image) -> Found:
        numbers = class_numbers(mask)
        return Found(upright_size(mask), True, largest=int(numbers[numbers != ignore].max(initial=-1)))

    def look(path: Path) -> Found:
        return look_at(path, read if path in masks else None)

    paths = sorted({path for pair in pairs for path in (pair.image, pair.mask)})
    return remembered_look(root, paths, f"{mark}-{ignore}", look)


def _class_names(root: Path, options: SegfolderOptions, found: Mapping[Path, Found]) -> tuple[str, ...]:
    """Names of the classes, from the options, the file or the masks."""
    given = options.classes
    if isinstance(given, tuple):
        return given
    file = root / CLASSES_FILE
    if given is None and file.is_file():
        return tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    count = given if given is not None else max((facts.largest for facts in found.values()), default=-1) + 1
    if count < 2:
        raise RequestError(f"the masks in {root} tell {count} classes apart: give their number by ?classes=N")
    return tuple(map(str, range(count)))


def _unusable(pairs: Sequence[Pair], found: Mapping[Path, Found], classes: int) -> dict[Path, str]:
    """Pictures that cannot be used, with the reason."""
    bad = {}
    for pair in pairs:
        image, mask = found[pair.image], found[pair.mask]
        if image.problem:
            bad[pair.image] = image.problem
        elif mask.problem:
            bad[pair.image] = f"its mask: {mask.problem}"
        elif image.size != mask.size:
            (height, width), (own_height, own_width) = mask.size, image.size
            bad[pair.image] = f"its mask is {width}x{height}, the picture {own_width}x{own_height}"
        elif mask.largest >= classes:
            bad[pair.image] = f"its mask holds class {mask.largest} of {classes}; ?ignore= names pixels of no class"
    return bad
