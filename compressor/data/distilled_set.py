"""A distilled data set on disk: a file of tensors, a folder of pictures that `imagefolder:` reads, a sheet of them."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from compressor.errors import ArtifactError, RequestError

__all__ = ["class_folders", "eight_bits", "picture_sheet", "read_tensors", "write_folder", "write_tensors"]

Array = np.ndarray[Any, Any]

SHEET_EDGE, SHEET_ROWS, SHEET_COLUMNS = 48, 20, 12


def write_tensors(path: Path, images: Array, labels: Array, classes: Sequence[str]) -> None:
    """Write ``images`` and ``labels`` as safetensors; its metadata has the classes' names, as JSON, under ``classes``.

    Args:
        path: The file.
        images: ``(N, C, H, W)`` float32, raw pixels; [0, 1] is what can be shown, others may occur.
        labels: ``(N,)`` int64.
        classes: Names by label.
    """
    from safetensors.numpy import save_file

    tensors = {"images": np.ascontiguousarray(images), "labels": np.ascontiguousarray(labels)}
    save_file(tensors, str(path), metadata={"classes": json.dumps(list(classes))})


def read_tensors(path: Path) -> tuple[Array, Array, tuple[str, ...]]:
    """What `write_tensors` wrote: images, labels, names of the classes.

    Raises:
        ArtifactError: It is no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            classes = json.loads((file.metadata() or {})["classes"])
            images, labels = file.get_tensor("images"), file.get_tensor("labels")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"{path} is no distilled set: {str(error).strip()}") from error
    return images, labels, tuple(classes)


def eight_bits(images: Array) -> Array:
    """Raw pixels as uint8, clipped to [0, 1] and rounded."""
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)


def write_folder(directory: Path, images: Array, labels: Array, classes: Sequence[str]) -> None:
    """Write ``train/CLASS/000.png``, which ``imagefolder:DIR?hold_out=false`` reads with the same labels.

    Args:
        directory: Made here.
        images: ``(N, C, H, W)`` with one or three channels, raw pixels; what lies outside [0, 1] is clipped.
        labels: ``(N,)``.
        classes: Names by label.

    Raises:
        RequestError: The images have another number of channels.
    """
    if images.shape[1] not in (1, 3):
        raise RequestError(f"images of {images.shape[1]} channels are no pictures")
    folders, pixels = class_folders(classes), eight_bits(images)
    counts = dict.fromkeys(range(len(classes)), 0)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        folder = directory / "train" / folders[label]
        folder.mkdir(parents=True, exist_ok=True)
        _picture(image).save(folder / f"{counts[label]:03d}.png", optimize=True)
        counts[label] += 1


def class_folders(classes: Sequence[str]) -> list[str]:
    """A folder's name for every class, in an order that sorting keeps: the names themselves where they allow it."""
    plain = all(re.fullmatch(r"[^\s./\\:*?\"<>|][^/\\:*?\"<>|]*", name) and name != "__MACOSX" for name in classes)
    if plain and sorted(classes) == list(classes) and len({name.lower() for name in classes}) == len(classes):
        return list(classes)
    digits = len(str(len(classes) - 1))
    slugs = [re.sub(r"[^\w-]+", "_", name).strip("_")[:60] for name in classes]
    return [f"{k:0{digits}d}-{slug}".rstrip("-") for k, slug in enumerate(slugs)]


def picture_sheet(images: Array, labels: Array) -> bytes:
    """A PNG: a row a class (at most 20), its images side by side (at most 12), small ones enlarged."""
    pixels = eight_bits(images)
    rows = [pixels[labels == label][:SHEET_COLUMNS] for label in np.unique(labels)[:SHEET_ROWS]]
    zoom = max(1, SHEET_EDGE // max(pixels.shape[2:]))
    height, width = pixels.shape[2] * zoom + 2, pixels.shape[3] * zoom + 2
    sheet = np.full((pixels.shape[1], height * len(rows), width * max(map(len, rows))), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            large = image.repeat(zoom, axis=1).repeat(zoom, axis=2)
            sheet[:, y * height : (y + 1) * height - 2, x * width : (x + 1) * width - 2] = large
    buffer = io.BytesIO()
    _picture(sheet).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _picture(pixels: Array) -> Image.Image:
    """Pixels (C, H, W) of one or three channels as a picture."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
