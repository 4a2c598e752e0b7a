"""Folders of pictures: one folder a class.

    DIR/cat/*.jpg, DIR/dog/*.jpg              70 % train, 10 % val, 20 % test, by a hash of the file names
    DIR/train/cat/*.jpg, DIR/test/cat/*.jpg   splits of their own; what is missing is held out of train

With ``train`` and ``val`` alone, ``val`` is what is measured (test), and a tenth of ``train`` serves as val; with
``?hold_out=false`` nothing is taken out of ``train``. Hidden files and folders are not looked at, nor is what a Mac
leaves beside the pictures. Every picture is decoded once before it is used, so that damaged ones are known, all of
them, before any work; the result is remembered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from compressor.data.dataset import DataInfo
from compressor.data.picture_files import (
    PICTURE_KINDS,
    SPLIT_FOLDERS,
    file_fingerprint,
    folders_in,
    look_at,
    pictures_below,
    refuse_or_leave_out,
    remembered_look,
)
from compressor.data.pictures import PictureOptions, Pictures, held_out, parse_folder, usual_size
from compressor.errors import RequestError

__all__ = ["imagefolder"]


class ImagefolderOptions(PictureOptions):
    """Options of `imagefolder:`."""

    skip_bad: bool = False
    """Leave damaged pictures out (each is named) instead of refusing the folder."""
    hold_out: bool = True
    """Hold splits that have no folder out of train; false leaves train whole, and they do not exist."""


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
    root, options = parse_folder("imagefolder", argument, ImagefolderOptions)
    classes, parts, missing = _parts(root)
    entries = [entry for part in parts.values() for entry in part]
    mark = file_fingerprint(root, {entry.path: str(entry.label) for entry in entries})
    found = remembered_look(root, sorted({entry.path for entry in entries}), mark, look_at)
    bad = {path: facts.problem for path, facts in found.items() if facts.problem}
    refuse_or_leave_out(root, bad, len(found), options.skip_bad)
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
    folders = {folder.name.lower(): folder for folder in folders_in(root)}
    own = {split: folders[n] for split, names in SPLIT_FOLDERS.items() for n in names if n in folders}
    if "train" not in own or not folders_in(own["train"]):
        own = {"train": root}
    classes = tuple(folder.name for folder in folders_in(own["train"]))
    parts = {split: _entries(folder, classes) for split, folder in own.items()}
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
    return classes, parts, [split for split in ("val", "test") if split not in parts]


def _entries(folder: Path, classes: Sequence[str]) -> list[Entry]:
    """The pictures of the class folders in a folder.

    Raises:
        RequestError: There are no classes, one is unknown, or one is empty.
    """
    entries: list[Entry] = []
    found = folders_in(folder)
    if not found:
        raise RequestError(f"{folder} holds no class folders: put the pictures of each class into a folder of its own")
    for path in found:
        if path.name not in classes:
            raise RequestError(
                f"{path} is a class that the training folder lacks: its classes are {', '.join(classes)}"
            )
        pictures = list(pictures_below(path))
        if not pictures:
            raise RequestError(f"{path} holds no pictures ({PICTURE_KINDS}): remove the folder or fill it")
        entries += [Entry(picture, classes.index(path.name)) for picture in pictures]
    return entries


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
