"""Data specs: `digits`, `digits:16`, `latents:DIR`, `python:module:factory`, and what entry points add."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from compressor.data.dataset import Dataset
from compressor.errors import RequestError, nearest

__all__ = ["SOURCES", "load_data"]

SPLITS = ("train", "val", "test")


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


def _python(argument: str, split: str) -> Dataset:
    factory = import_object(argument, "a data set")
    dataset: Dataset = factory(split)
    return dataset


SOURCES: dict[str, Any] = {"digits": _digits, "latents": _latents, "python": _python}
"""Loaders ``(argument, split) -> Dataset`` by the word before the colon."""


def import_object(path: str, what: str) -> Any:
    """Import ``module:attribute``."""
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise RequestError(f"python:{path} names {what} as module:factory, but cannot be imported: {error}") from error


def load_data(spec: str, split: str) -> Dataset:
    """One split of a data set.

    Args:
        spec: ``KIND[:ARGUMENT]``.
        split: "train", "val" or "test".

    Raises:
        RequestError: Unknown kind, or the set cannot be read.
    """
    kind, _, argument = spec.partition(":")
    loaders = SOURCES | {point.name: point for point in entry_points(group="compressor.data")}
    if kind not in loaders:
        raise RequestError(f"unknown data {spec!r}: {nearest(kind, loaders)}")
    loader = loaders[kind]
    if kind not in SOURCES:
        loader = loader.load()
    dataset: Dataset = loader(argument, split)
    return dataset
