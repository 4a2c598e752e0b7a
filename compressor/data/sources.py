"""Data specs: a kind and its argument; other packages add kinds through the entry-point group ``compressor.data``.

digits[:SIZE]          scenes[:SIZE][?channels=3]     imagefolder:DIR[?size=..,skip_bad=true]
torchvision:NAME:ROOT  hf:DIR                         latents:DIR          python:module:factory
scenes:SIZE?masks=true segfolder:DIR[?classes=..]
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from compressor.data.dataset import Dataset
from compressor.errors import CompressorError, RequestError, nearest
from compressor.spec_options import split_options

__all__ = ["SOURCES", "call_factory", "import_object", "load_data"]


def _digits(argument: str, split: str) -> Dataset:
    from compressor.data.digits import digits

    if argument and not argument.isdecimal():
        raise RequestError(f"`digits:{argument}`: the size must be a number, as in digits:16")
    return digits(split, int(argument or 8))


def _latents(argument: str, split: str) -> Dataset:
    from compressor.data.latents import latents

    if not argument:
        raise RequestError("`latents:` needs a directory, as in latents:./my-latents")
    return latents(Path(argument), split)


def _scenes(argument: str, split: str) -> Dataset:
    size, options = split_options(argument)
    masks = bool(options.pop("masks", False))
    known = ("channels", "objects") if masks else ("channels",)
    for key in options:
        if key not in known:
            raise RequestError(
                f"`scenes:{argument}`: unknown option {key!r}: scenes take channels and masks=true, with masks also "
                "objects"
            )
    if size and not size.isdecimal():
        raise RequestError(f"`scenes:{argument}`: the size must be a number, as in scenes:32")
    if masks:
        from compressor.data.segmented_scenes import segmented_scenes

        return segmented_scenes(split, int(size or 32), options.get("channels", 1), options.get("objects", 3))
    from compressor.data.scenes import scenes

    return scenes(split, int(size or 16), options.get("channels", 1))


def _imagefolder(argument: str, split: str) -> Dataset:
    from compressor.data.imagefolder import imagefolder

    return imagefolder(argument, split)


def _segfolder(argument: str, split: str) -> Dataset:
    from compressor.data.segfolder import segfolder

    return segfolder(argument, split)


def _torchvision(argument: str, split: str) -> Dataset:
    from compressor.data.torchvision_sets import torchvision_set

    return torchvision_set(argument, split)


def _hf(argument: str, split: str) -> Dataset:
    from compressor.data.hf_sets import hf_set

    return hf_set(argument, split)


def _python(argument: str, split: str) -> Dataset:
    dataset: Dataset = call_factory(argument, "a data set", split)
    return dataset


SOURCES: dict[str, Any] = {
    "digits": _digits,
    "hf": _hf,
    "imagefolder": _imagefolder,
    "latents": _latents,
    "python": _python,
    "scenes": _scenes,
    "segfolder": _segfolder,
    "torchvision": _torchvision,
}
"""Loaders ``(argument, split) -> Dataset`` by the word before the colon."""


def import_object(path: str, what: str) -> Any:
    """Import ``module:attribute``; modules of the working directory are found, too, behind all installed ones.

    Raises:
        RequestError: There is no such module or attribute, or the module fails while it is imported.
    """
    module, _, attribute = path.partition(":")
    here = os.getcwd()
    if here not in sys.path:  # `python -m` looks there, an installed command does not
        sys.path.append(here)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise RequestError(f"python:{path} names {what} as module:factory, but cannot be imported: {error}") from error
    except Exception as error:  # the user's own code
        raise RequestError(f"python:{path} cannot be imported: {_told(error)}") from error


def call_factory(path: str, what: str, *arguments: Any) -> Any:
    """What a user's ``module:factory`` returns.

    Raises:
        RequestError: It cannot be imported, or fails.
    """
    factory = import_object(path, what)
    try:
        return factory(*arguments)
    except CompressorError:
        raise
    except Exception as error:
        raise RequestError(f"python:{path} failed: {_told(error)} (--debug adds the traceback)") from error


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def load_data(spec: str, split: str) -> Dataset:
    """One split of a data set.

    Args:
        spec: ``KIND[:ARGUMENT]``.
        split: "train", "val" or "test".

    Raises:
        RequestError: Unknown kind, or the set cannot be read.
    """
    kind, _, argument = spec.partition(":")
    if kind.startswith("scenes?"):  # options without a size
        kind, argument = "scenes", spec.removeprefix("scenes")
    loaders = SOURCES | {point.name: point for point in entry_points(group="compressor.data")}
    if kind not in loaders and Path(spec.partition("?")[0]).is_dir():
        kinds = ", ".join(f"{one}:{spec}" for one in ("segfolder", "latents", "hf"))
        raise RequestError(f"the data {spec!r} are a folder; of what? write imagefolder:{spec} (or {kinds})")
    if kind not in loaders:
        raise RequestError(f"unknown data {spec!r}: {nearest(kind, loaders)}")
    loader = loaders[kind]
    if kind not in SOURCES:
        loader = loader.load()
    dataset: Dataset = loader(argument, split)
    return dataset
