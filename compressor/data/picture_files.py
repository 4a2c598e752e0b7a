"""Pictures in folders: which files are looked at, and which are damaged; what `imagefolder:` and `segfolder:` share.

Hidden files and folders are not looked at, nor is what a Mac leaves beside the pictures. Every picture is decoded once
before it is used, so that damaged ones are known, all of them, before any work; the result is remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from compressor.atomic import write_json
from compressor.cache import cache_directory
from compressor.data.pictures import is_gray
from compressor.errors import CompressorError, RequestError, first_line

__all__ = [
    "PICTURE_KINDS", "SPLIT_FOLDERS", "Found", "file_fingerprint", "folders_in", "look_at", "pictures_below",
    "refuse_or_leave_out", "remembered_look", "say_once", "upright_size",
]  # fmt: skip

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
PICTURE_KINDS = " ".join(sorted(suffix.removeprefix(".") for suffix in SUFFIXES))
SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
MAC_FOLDER = "__MACOSX"
MOST_NAMED = 20
"""Damaged pictures that a message names."""

log = logging.getLogger("compressor")
_told: set[str] = set()  # each split of a set would say it again


@dataclass(frozen=True)
class Found:
    """What a look at one picture told.

    Attributes:
        size: (H, W), upright.
        gray: It has one channel.
        problem: Why it cannot be read; empty if it can.
        largest: The largest class number of a mask; -1 for anything else.
    """

    size: tuple[int, int] = (0, 0)
    gray: bool = False
    problem: str = ""
    largest: int = -1


def folders_in(folder: Path) -> list[Path]:
    """The visible folders in a folder, sorted."""
    return [path for path in _visible(folder) if path.is_dir()]


def pictures_below(folder: Path) -> Iterator[Path]:
    """The visible pictures in a folder and its folders, sorted."""
    for path in _visible(folder):
        if path.is_dir():
            yield from pictures_below(path)
        elif path.suffix.lower() in SUFFIXES:
            yield path


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.name != MAC_FOLDER)


def file_fingerprint(root: Path, files: Mapping[Path, str]) -> str:
    """A hash of the files' names, sizes and times, and of a word about each."""
    facts = hashlib.sha256()
    for path in sorted(files, key=str):
        status = path.stat()
        line = f"{path.relative_to(root)}\0{files[path]}\0{status.st_size}\0{status.st_mtime_ns}\n"
        facts.update(line.encode())
    return facts.hexdigest()[:32]


def remembered_look(root: Path, paths: Sequence[Path], mark: str, look: Callable[[Path], Found]) -> dict[Path, Found]:
    """Look at every picture once; remembered in the cache for as long as no file changes.

    Args:
        root: The set.
        paths: Its files.
        mark: Their fingerprint, and that of whatever else decides the result.
        look: Looks at one.
    """
    memory = cache_directory() / "pictures" / f"{mark}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(memory.read_text(encoding="utf-8"))
        return {path: _found(known[str(path.relative_to(root))]) for path in paths}
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        found = dict(zip(paths, pool.map(look, paths), strict=True))
    with contextlib.suppress(CompressorError):  # without a cache it is done again next time
        write_json(memory, {str(path.relative_to(root)): asdict(facts) for path, facts in found.items()})
    return found


def _found(stored: Mapping[str, Any]) -> Found:
    height, width = stored["size"]
    size = (int(height), int(width))
    return Found(size, bool(stored["gray"]), str(stored["problem"]), int(stored.get("largest", -1)))


def look_at(path: Path, read: Callable[[Image.Image], Found] | None = None) -> Found:
    """Decode a picture.

    Args:
        path: The file.
        read: What is to be found in it; by default its size and kind.
    """
    try:
        if path.stat().st_size == 0:
            return Found(problem="empty")
        with Image.open(path) as image:
            image.load()
            return read(image) if read is not None else Found(upright_size(image), is_gray(image))
    except UnidentifiedImageError:
        return Found(problem="no picture")
    except Exception as error:  # decoders fail in many ways
        reason = first_line(error)
        return Found(problem=reason)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(H, W) of a picture that is turned as its EXIF data say."""
    turned = image.getexif().get(0x0112, 1) >= 5  # lies on its side
    return (image.width, image.height) if turned else (image.height, image.width)


def refuse_or_leave_out(root: Path, bad: Mapping[Path, str], total: int, skip: bool) -> None:
    """Name the damaged pictures: in an error, or (``skip``) in a warning.

    Raises:
        RequestError: There are some, and they are not to be left out.
    """
    if not bad:
        return
    named = [f"{path.relative_to(root)} ({problem})" for path, problem in islice(bad.items(), MOST_NAMED)]
    listed = ", ".join(named) + (f" and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else "")
    which = f"{len(bad)} of {total} pictures in {root} cannot be read"
    if not skip:
        raise RequestError(f"{which}: {listed}; repair or remove them, or leave them out with ?skip_bad=true")
    say_once(f"{which} and are left out: {listed}")


def say_once(message: str) -> None:
    """Warn, the first time."""
    if message not in _told:
        _told.add(message)
        log.warning("%s", message)
