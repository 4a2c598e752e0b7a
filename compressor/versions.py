"""Versions of the installed distributions."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterable

__all__ = ["installed_versions"]


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """The versions of those of the named distributions that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
