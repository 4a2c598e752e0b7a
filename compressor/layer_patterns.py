"""Layers named by patterns: what stays in float, in training and in export alike."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from compressor.errors import RequestError, nearest

__all__ = ["check_patterns", "lies_in"]


def lies_in(path: str, patterns: Iterable[str]) -> bool:
    """Whether a layer is one that a pattern names, or lies in one.

    Args:
        path: Of the layer's module, as in ``named_modules()``: "blocks.0.attn.qkv".
        patterns: Paths with ``*`` and ``?``, which match dots, too: "head", "blocks.0", "blocks.*.mlp".
    """
    parts = path.split(".")
    ancestors = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(fnmatchcase(ancestor, pattern) for pattern in patterns for ancestor in ancestors)


def check_patterns(patterns: Iterable[str], paths: Collection[str], key: str) -> None:
    """Refuse a pattern that names nothing.

    Args:
        patterns: See `lies_in`.
        paths: All modules of the model.
        key: Where the patterns were written, for the message.

    Raises:
        RequestError: A pattern matches no path.
    """
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise RequestError(f"{key}: the model has no layer {pattern!r}: {nearest(pattern, paths)}")
