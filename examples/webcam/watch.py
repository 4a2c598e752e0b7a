"""An edge app: run a bundle on every frame of a camera and draw what it says, and how long it took, over the frame.

    python examples/webcam/watch.py digits-ort-fp32.zip frames --out watched

A folder of pictures stands for the camera: the loop is the same. It needs numpy, Pillow and `compressor.runtimes`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from compressor.errors import CompressorError
from compressor.runtimes import load
from compressor.runtimes.loaded_model import Label, LoadedModel

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
SMALLEST = 240  # pixels: an overlay on a smaller frame could not be read
BAR = 34


@dataclass
class Seen:
    """What was found in a frame."""

    name: str
    said: str
    milliseconds: float


def frames(folder: Path) -> Iterator[tuple[str, Image.Image]]:
    """The pictures of a folder in order; a camera would yield its frames here."""
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            with Image.open(path) as picture:
                yield path.name, picture.convert("RGB")


def pixels(model: LoadedModel, frame: Image.Image) -> Any:
    """A frame in the channels that the model takes."""
    return np.asarray(frame.convert("L") if model.inputs[0].shape[1] == 1 else frame)


def said(result: Any) -> str:
    """A result in a few words."""
    if isinstance(result, list) and result and isinstance(result[0], Label):
        return f"{result[0].name} {result[0].probability:.0%}"
    if isinstance(result, dict):
        return ", ".join(f"{name} {'x'.join(map(str, np.shape(value)))}" for name, value in result.items())
    return "x".join(map(str, np.shape(result)))


def overlay(frame: Image.Image, seen: Seen, recent: deque[float]) -> Image.Image:
    """The frame, large enough to read, with a bar that says what and how fast."""
    scale = max(1, -(-SMALLEST // min(frame.size)))
    large = frame.resize((frame.width * scale, frame.height * scale), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(large, "RGBA")
    draw.rectangle((0, 0, large.width, BAR), fill=(0, 0, 0, 170))
    usual = float(np.median(recent))
    draw.text((6, 4), seen.said, fill="white")
    draw.text((6, 18), f"{seen.milliseconds:.2f} ms, usually {usual:.2f} ms, {1000 / usual:.0f} a second", fill="white")
    return large


def watch(model: LoadedModel, folder: Path, out: Path | None) -> Iterator[Seen]:
    """Run the model on every frame."""
    recent: deque[float] = deque(maxlen=30)
    for name, frame in frames(folder):
        image = pixels(model, frame)
        start = time.perf_counter()
        result = model(image)
        recent.append((time.perf_counter() - start) * 1000)
        seen = Seen(name, said(result), recent[-1])
        if out is not None:
            overlay(frame, seen, recent).save(out / f"{Path(name).stem}.png")
        yield seen


def main() -> int:
    """Watch the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("frames", type=Path)
    parser.add_argument("--out", type=Path, help="folder for the frames with their overlay")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    try:
        with load(options.bundle, {"threads": options.threads}) as model:
            for seen in watch(model, options.frames, options.out):
                print(f"{seen.name}: {seen.said} ({seen.milliseconds:.2f} ms)")
    except CompressorError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
