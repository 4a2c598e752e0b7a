"""What `compress infer` does: run a bundle's model on pictures or labels, keep what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compressor.atomic import atomic_path
from compressor.errors import RequestError
from compressor.runtimes import load
from compressor.runtimes.images import png_bytes
from compressor.runtimes.loaded_model import Label, LoadedModel
from compressor.runtimes.runtime import Array

__all__ = ["Answer", "run_model"]

_PALETTE_SEED = 7


@dataclass
class Answer:
    """What the model gave for one picture or label.

    Attributes:
        asked: The picture's path, or the label.
        labels: Of a classifier, the most probable first.
        files: What was written.
    """

    asked: str
    labels: list[Label] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "asked": self.asked,
            "labels": [vars(label) for label in self.labels],
            "files": [str(path) for path in self.files],
        }


def run_model(
    path: Path,
    pictures: Sequence[Path],
    *,
    labels: Sequence[str] = (),
    seed: int = 0,
    top: int = 5,
    out: Path = Path(),
    options: Mapping[str, Any] | None = None,
    target: str | None = None,
) -> list[Answer]:
    """Run a model once for each picture or label.

    Args:
        path: A bundle, an artifact's folder or a run.
        pictures: For a model that takes images; a folder stands for the pictures in it and in its folders.
        labels: For one that takes labels: names or numbers.
        seed: Of the noise.
        top: Labels to keep of a classifier.
        out: Folder for what is written: ``NAME.png`` for pictures, ``NAME.OUTPUT.png`` for masks (a colour a class),
            ``NAME.npz`` for other arrays.
        options: For the engine.
        target: Which artifact of a run.

    Raises:
        RequestError: Nothing is asked, or what the model does not take.
        ArtifactError: The bundle is damaged.
        TargetError: Its engine does not run here.
    """
    pictures = [picture for given in pictures for picture in _pictures(given)]
    if path.is_dir():
        from compressor.cli.bundling import artifact_of

        path = artifact_of(path, target)
    elif target is not None:
        raise RequestError("--target names an artifact of a run: leave it out where a bundle is given")
    elif not path.exists():
        raise RequestError(f"there is no {path}: give a bundle, an artifact's folder or a run")
    with load(path, options) as model:
        kinds = {port.kind for port in model.inputs}
        _refuse_what_is_not_taken(model, kinds, pictures, labels)
        if pictures:
            stems = _stems(pictures)
            return [
                _answer(model, model(picture, seed=seed), str(picture), out / stem, top)
                for picture, stem in zip(pictures, stems, strict=True)
            ]
        name = next(port.name for port in model.inputs if port.kind == "label")
        return [
            _answer(model, model(seed=seed, **{name: label}), label, out / f"{model.label_index(label)}-{seed}", top)
            for label in labels
        ]


def _pictures(given: Path) -> list[Path]:
    """The pictures in a folder; any other path as it is."""
    if not given.is_dir():
        return [given]
    from compressor.data.picture_files import PICTURE_KINDS, pictures_below

    found = list(pictures_below(given))
    if not found:
        raise RequestError(f"{given} holds no pictures ({PICTURE_KINDS})")
    return found


def _refuse_what_is_not_taken(
    model: LoadedModel, kinds: set[str], pictures: Sequence[Path], labels: Sequence[str]
) -> None:
    if "image" in kinds and not pictures:
        raise RequestError("this model looks at pictures: name one or more")
    if "image" not in kinds and pictures:
        raise RequestError("this model takes no pictures: ask for labels with --label")
    if "label" in kinds and not labels:
        known = f" (it knows {', '.join(model.labels[:20])})" if model.labels else ""
        raise RequestError(f"this model draws what a label says: add --label NAME or --label N{known}")
    if "label" not in kinds and labels:
        raise RequestError("this model takes no labels: leave out --label")
    if not kinds & {"image", "label"}:
        raise RequestError(f"this model takes {', '.join(sorted(kinds))}: call it from Python with `load`")


def _stems(pictures: Sequence[Path]) -> list[str]:
    """Names for what is written, one for each picture: two pictures of one name are numbered."""
    stems = [picture.stem for picture in pictures]
    return [stem if stems.count(stem) == 1 else f"{stem}-{number}" for number, stem in enumerate(stems)]


def _answer(model: LoadedModel, result: Any, asked: str, stem: Path, top: int) -> Answer:
    if isinstance(result, list):
        return Answer(asked, labels=result[:top])
    if isinstance(result, np.ndarray):
        result = {next(port.name for port in model.outputs if port.kind == "image"): result}
    masks = {port.name for port in model.outputs if port.kind == "mask"}
    shown = {port.name for port in model.outputs if port.kind == "image" and port.value_range is not None}
    answer, arrays = Answer(asked), {}
    for name, value in result.items():
        if name in shown:
            answer.files.append(_write(stem.with_name(f"{stem.name}.png"), png_bytes(value[..., :3])))
        elif name in masks and _is_mask(value):
            answer.files.append(_write(stem.with_name(f"{stem.name}.{name}.png"), _mask_png(value)))
        else:
            arrays[name] = value
    if arrays and not answer.files:
        target = stem.with_name(f"{stem.name}.npz")
        with atomic_path(target) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
        answer.files.append(target)
    return answer


def _write(path: Path, data: bytes) -> Path:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return path


def _is_mask(value: Array) -> bool:
    return value.ndim == 2 and value.dtype.kind in "bui" and int(value.min()) >= 0 and int(value.max()) < 256


def _mask_png(mask: Array) -> bytes:
    """A class map as a picture with a palette: the value of a pixel is its class, its colour only shows it."""
    colours = np.random.default_rng(_PALETTE_SEED).integers(64, 256, (256, 3))
    colours[0] = 0
    return png_bytes(mask.astype(np.uint8), colours.astype(np.uint8))
