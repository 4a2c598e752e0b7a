"""Folders of pictures: one folder a class.

    DIR/cat/*.jpg, DIR/dog/*.jpg              70 % train, 10 % val, 20 % test, by a hash of the file names
    DIR/train/cat/*.jpg, DIR/test/cat/*.jpg   splits of their own; what is missing is held out of train

With ``train`` and ``val`` alone, ``val`` is what is measured (test), and a tenth of ``train`` serves as val; with
``?hold_out=false`` nothing is taken out of ``train``. Hidden files and folders are not looked at, nor is what a Mac
leaves beside the pictures. Every picture is decoded once before it is used, so that damaged ones are known, all of
them, before any work; the result is remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from compressor.atomic import write_json
from compressor.cache import cache_directory
from compressor.data.dataset import DataInfo
from compressor.data.pictures import PictureOptions, Pictures, held_out, is_gray, parse_options, usual_size
from compressor.errors import CompressorError, RequestError
from compressor.spec_options import split_options

__all__ = ["imagefolder"]

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
MAC_FOLDER = "__MACOSX"

log = logging.getLogger("compressor")
_told: set[str] = set()  # each split of a set would say it again


class ImagefolderOptions(PictureOptions):
    """Options of `imagefolder:`."""

    skip_bad: bool = False
    """Leave damaged pictures out (each is named) instead of refusing the folder."""
    hold_out: bool = True
    """Hold splits that have no folder out of train; false leaves train whole, and they do not exist."""


@dataclass(frozen=True)
class Found:
    """What a look at one picture told.

    Attributes:
        size: (H, W), upright.
        gray: It has one channel.
        problem: Why it cannot be read; empty if it can.
    """

    size: tuple[int, int] = (0, 0)
    gray: bool = False
    problem: str = ""


@dataclass(frozen=True)
class Entry:
    """A picture of a class."""

    path: Path
    label: int


def imagefolder(argument: str, split: str = "train") -> Pictures:
    """One split of a folder.

    Args:
        argument: ``DIR[?size=64,channels=3,skip_bad=true,hold_out=false]``.
        split: "train", "val" or "test".

    Raises:
        RequestError: There is no such folder, it holds no classes, or a picture in it is damaged.
    """
    name, values = (argument, {}) if Path(argument).is_dir() else split_options(argument)
    options = parse_options(ImagefolderOptions, values, f"imagefolder:{argument}")
    root = Path(name).expanduser()
    if not name or not root.is_dir():
        raise RequestError(f"imagefolder:{name}: there is no such directory")
    classes, parts, missing = _parts(root)
    entries = [entry for part in parts.values() for entry in part]
    mark = _fingerprint(root, entries)
    found = _scan(root, entries, mark)
    bad = {path: facts.problem for path, facts in found.items() if facts.problem}
    _report_bad(root, bad, len(found), options.skip_bad)
    parts = {name: [entry for entry in part if entry.path not in bad] for name, part in parts.items()}
    good = (parts | _by_hash(root, parts["train"], missing if options.hold_out else ())).get(split)
    if not good:
        raise RequestError(f"{root} has no pictures for the split {split!r}: add some, or a folder {root / split}")
    readable = [facts for facts in found.values() if not facts.problem]
    channels = options.channels or (1 if all(facts.gray for facts in readable) else 3)
    shape = (channels, *(options.size or usual_size(facts.size for facts in readable)))
    facts = (mark, split, shape, sorted(map(str, bad)), len(good))
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    skipped = [str(path.relative_to(root)) for path in bad]
    info = DataInfo(
        f"{root.resolve().name}/{split}", key, classes, shape, extra={"skipped": skipped} if skipped else {}
    )
    return Pictures(
        info,
        np.asarray([entry.label for entry in good], np.int64),
        lambda index: Image.open(good[index].path),
        lambda index: str(good[index].path),
        options.cache_mb << 20,
    )


# --- what lies in the folder -----------------------------------------------------------------------------------------


def _parts(root: Path) -> tuple[tuple[str, ...], dict[str, list[Entry]], list[str]]:
    """Names of the classes, the pictures of the splits that have folders, and the splits to be held out of train."""
    folders = {folder.name.lower(): folder for folder in _class_folders(root)}
    own = {split: folders[n] for split, names in SPLIT_FOLDERS.items() for n in names if n in folders}
    if "train" not in own or not _class_folders(own["train"]):
        own = {"train": root}
    classes = tuple(folder.name for folder in _class_folders(own["train"]))
    parts = {split: _entries(folder, classes) for split, folder in own.items()}
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
    return classes, parts, [split for split in ("val", "test") if split not in parts]


def _visible(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without hidden entries."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.name != MAC_FOLDER)


def _class_folders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir()]


def _entries(folder: Path, classes: Sequence[str]) -> list[Entry]:
    """The pictures of the class folders in a folder.

    Raises:
        RequestError: There are no classes, one is unknown, or one is empty.
    """
    entries: list[Entry] = []
    found = _class_folders(folder)
    if not found:
        raise RequestError(f"{folder} holds no class folders: put the pictures of each class into a folder of its own")
    for path in found:
        if path.name not in classes:
            raise RequestError(
                f"{path} is a class that the training folder lacks: its classes are {', '.join(classes)}"
            )
        pictures = list(_pictures(path))
        if not pictures:
            kinds = " ".join(sorted(suffix.removeprefix(".") for suffix in SUFFIXES))
            raise RequestError(f"{path} holds no pictures ({kinds}): remove the folder or fill it")
        entries += [Entry(picture, classes.index(path.name)) for picture in pictures]
    return entries


def _pictures(folder: Path) -> Iterator[Path]:
    for path in _visible(folder):
        if path.is_dir():
            yield from _pictures(path)
        elif path.suffix.lower() in SUFFIXES:
            yield path


def _by_hash(root: Path, entries: Sequence[Entry], splits: Sequence[str]) -> dict[str, list[Entry]]:
    """Hold splits out of each class, in the order of a hash of the names, which a further file leaves as it is."""
    parts: dict[str, list[Entry]] = {"train": [], **{split: [] for split in splits}}
    for label in sorted({entry.label for entry in entries}):
        members = [entry for entry in entries if entry.label == label]
        members.sort(key=lambda entry: hashlib.sha256(str(entry.path.relative_to(root)).encode()).digest())
        for split, some in held_out(members, splits).items():
            parts[split] += some
    order = {entry.path: place for place, entry in enumerate(entries)}
    return {split: sorted(some, key=lambda entry: order[entry.path]) for split, some in parts.items()}


def _fingerprint(root: Path, entries: Sequence[Entry]) -> str:
    facts = hashlib.sha256()
    for entry in sorted(entries, key=lambda entry: str(entry.path)):
        status = entry.path.stat()
        facts.update(
            f"{entry.path.relative_to(root)}\0{entry.label}\0{status.st_size}\0{status.st_mtime_ns}\n".encode()
        )
    return facts.hexdigest()[:32]


# --- damaged pictures ------------------------------------------------------------------------------------------------


def _scan(root: Path, entries: Sequence[Entry], mark: str) -> dict[Path, Found]:
    """Look at every picture once; remembered in the cache for as long as no file changes."""
    paths = sorted({entry.path for entry in entries})
    memory = cache_directory() / "pictures" / f"{mark}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(memory.read_text(encoding="utf-8"))
        return {path: _found(known[str(path.relative_to(root))]) for path in paths}
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        found = dict(zip(paths, pool.map(_look, paths), strict=True))
    with contextlib.suppress(CompressorError):  # without a cache it is done again next time
        write_json(memory, {str(path.relative_to(root)): asdict(facts) for path, facts in found.items()})
    return found


def _found(stored: Mapping[str, Any]) -> Found:
    height, width = stored["size"]
    return Found((int(height), int(width)), bool(stored["gray"]), str(stored["problem"]))


def _look(path: Path) -> Found:
    try:
        if path.stat().st_size == 0:
            return Found(problem="empty")
        with Image.open(path) as image:
            image.load()
            turned = image.getexif().get(0x0112, 1) >= 5  # lies on its side
            height, width = (image.width, image.height) if turned else (image.height, image.width)
            return Found((height, width), is_gray(image))
    except UnidentifiedImageError:
        return Found(problem="no picture")
    except Exception as error:  # decoders fail in many ways
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return Found(problem=reason)


def _report_bad(root: Path, bad: Mapping[Path, str], total: int, skip: bool) -> None:
    if not bad:
        return
    listed = ", ".join(f"{path.relative_to(root)} ({problem})" for path, problem in bad.items())
    which = f"{len(bad)} of {total} pictures in {root} cannot be read"
    if not skip:
        raise RequestError(f"{which}: {listed}; repair or remove them, or leave them out with ?skip_bad=true")
    if which not in _told:
        _told.add(which)
        log.warning("%s and are left out: %s", which, listed)
