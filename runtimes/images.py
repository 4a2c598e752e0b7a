"""Pictures in and out, in numpy: what an app has (H, W, C) to what a graph takes (B, C, H, W), and back."""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import RequestError, TargetError
from compressor.runtimes.runtime import Array, Port

__all__ = ["as_eight_bits", "fit", "from_graph", "png_bytes", "read_picture", "to_graph"]

_MOST_PIXELS = 2**27
_CUBIC = -0.5
"""Parameter of the cubic filter (Keys, 1981), the usual one for pictures."""


def to_graph(image: Any, port: Port) -> tuple[Array, bool]:
    """Images as a driver's port takes them.

    Args:
        image: A path, or an array (H, W), (H, W, C) or (B, H, W, C): uint8, or floats in [0, 1]. It is resized so that
            it covers the port's size and cropped at the centre, as pictures of the training data are. Gray fills three
            channels; the opacity of a fourth one is left out.
        port: An input of kind "image".

    Returns:
        (B, C, H, W) float32 in [0, 1], and whether a batch was given.

    Raises:
        RequestError: The array is no image, or its channels do not fit.
    """
    if len(port.shape) != 4:
        raise RequestError(f"the model takes {port.name!r} as an array of {len(port.shape)} axes: give it by name")
    _, channels, height, width = port.shape
    if isinstance(image, (str, Path)):
        image = read_picture(Path(image), gray=channels == 1)
    pixels = _pixels(image)
    batched = pixels.ndim == 4
    batch = pixels if batched else pixels[None]
    if batch.shape[-1] == 4 and channels == 3:
        batch = batch[..., :3]
    if batch.shape[-1] == 1 and channels == 3:
        batch = np.repeat(batch, 3, axis=-1)
    if isinstance(channels, int) and batch.shape[-1] != channels:
        raise RequestError(
            f"the model takes images of {channels} channels, got {batch.shape[-1]} in the shape {pixels.shape}: "
            "give (height, width, channels)"
        )
    size = (
        height if isinstance(height, int) else batch.shape[1],
        width if isinstance(width, int) else batch.shape[2],
    )
    if size != batch.shape[1:3]:
        batch = np.stack([fit(one, *size) for one in batch])
    return np.ascontiguousarray(batch.transpose(0, 3, 1, 2), np.float32), batched


def _pixels(image: Any) -> Array:
    """An image as float32 in [0, 1] of the shape (H, W, C) or (B, H, W, C)."""
    try:
        array = np.asarray(image)
    except (ValueError, TypeError) as error:
        raise RequestError(f"an image must be an array or a path: {' '.join(str(error).split())}") from error
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim not in (3, 4) or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise RequestError(
            f"an image must have the shape (height, width), (height, width, 1, 3 or 4) or a batch axis before it, "
            f"got {np.shape(image)}"
        )
    if array.size > _MOST_PIXELS * 4:
        raise RequestError(f"images of {array.size} values are too large for one call: split them")
    if array.dtype == np.uint8:
        return np.asarray(array, np.float32) / np.float32(255)
    if array.dtype.kind != "f":
        raise RequestError(f"an image must be uint8, or float in [0, 1], got {array.dtype}: convert it")
    low, high = float(array.min()), float(array.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise RequestError("the image holds values that are not finite (NaN or infinity)")
    if low < 0 or high > 1:
        raise RequestError(f"a float image must lie in [0, 1], got {low:g} to {high:g}: divide by 255, or give uint8")
    return np.asarray(array, np.float32)


def read_picture(path: Path, *, gray: bool) -> Array:
    """A picture file as (H, W) or (H, W, 3) uint8, upright.

    Raises:
        TargetError: Pillow is not installed.
        RequestError: The file is no picture, damaged, or larger than 134 million pixels.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise TargetError("reading picture files needs Pillow: pip install pillow") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the limit here is our own
            with Image.open(path) as picture:
                if picture.width * picture.height > _MOST_PIXELS:
                    raise RequestError(f"{path} has {picture.width} x {picture.height} pixels: too many")
                upright = as_eight_bits(ImageOps.exif_transpose(picture))
                return np.asarray(upright.convert("L" if gray else "RGB"), np.uint8)
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise RequestError(f"cannot read the picture {path}: {reason}") from error


def as_eight_bits(picture: Any) -> Any:
    """A Pillow picture of 16 or 32 bits a pixel as one of mode L; any other as it is.

    Pixels of 16 bits keep their upper eight; wider ones are clipped to [0, 255]. (Pillow's own conversion clips both,
    which leaves a 16-bit picture white.)
    """
    from PIL import Image

    if not (picture.mode.startswith("I") or picture.mode == "F"):
        return picture
    values = np.asarray(picture)
    scaled = values / 257 if picture.mode.startswith("I;16") or values.max(initial=0) > 255 else values
    return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))


def fit(image: Array, height: int, width: int) -> Array:
    """Resize an image so that it covers a size, and crop it at the centre, with a cubic filter that does not alias.

    Args:
        image: (H, W, C) float32.
    """
    rows, columns = image.shape[:2]
    scale = min(rows / height, columns / width)
    down = _filter(rows, (rows - height * scale) / 2, scale, height)
    across = _filter(columns, (columns - width * scale) / 2, scale, width)
    # along the rows first, and what the filter overshoots is cut off in between, as picture libraries do
    narrow = np.clip(np.einsum("wc,rck->rwk", across, image, optimize=True), 0, 1)
    return np.clip(np.einsum("hr,rwk->hwk", down, narrow, optimize=True), 0, 1).astype(np.float32)


def _filter(size: int, start: float, scale: float, out: int) -> Array:
    """(out, size) float32 weights: output k is centred at ``start + (k + 1/2) * scale``; rows sum to 1."""
    stretch = max(scale, 1.0)
    centres = start + (np.arange(out) + 0.5) * scale
    distance = np.abs((np.arange(size) + 0.5)[None] - centres[:, None]) / stretch
    near = (_CUBIC + 2) * distance**3 - (_CUBIC + 3) * distance**2 + 1
    far = _CUBIC * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)


def from_graph(images: Array, port: Port) -> Array:
    """Images of a driver's port as pictures.

    Args:
        images: (B, C, H, W), as the driver gave them.
        port: An output of kind "image" with a ``value_range``.

    Returns:
        (B, H, W, C) uint8.
    """
    low, high = port.value_range or (0.0, 1.0)
    unit = (np.nan_to_num(np.asarray(images, np.float32)) - low) / (high - low)
    return np.ascontiguousarray((np.clip(unit, 0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1))


def png_bytes(pixels: Array, palette: Array | None = None) -> bytes:
    """A PNG file, so that writing pictures needs no library.

    Args:
        pixels: (H, W), (H, W, 1) or (H, W, 3) uint8; with a palette, (H, W) rows of it.
        palette: (K, 3) uint8, K at most 256.
    """
    rows = np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], -1))
    height, width, channels = rows.shape
    colour = 3 if palette is not None else {1: 0, 3: 2}[channels]
    lines = np.concatenate([np.zeros((height, 1), np.uint8), rows.reshape(height, -1)], axis=1)
    header = struct.pack(">2L5B", width, height, 8, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 6)), (b"IEND", b"")]
    if palette is not None:
        parts.insert(1, (b"PLTE", np.ascontiguousarray(palette, np.uint8).tobytes()))
    chunks = (struct.pack(">L", len(d)) + k + d + struct.pack(">L", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
