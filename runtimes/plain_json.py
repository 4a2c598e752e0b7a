"""JSON from a source that is not trusted: bounded size and depth, finite numbers, every key once, whole characters."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["LARGEST_JSON", "parse_json"]

LARGEST_JSON = 16 * 2**20
"""Bytes."""
_DEEPEST = 32
_MOST_VALUES = 2**20


def parse_json(data: bytes) -> Any:
    """Parse a document of at most `LARGEST_JSON` bytes, UTF-8.

    Raises:
        ValueError: It is not valid JSON, or not plain; the message is one line.
    """
    if len(data) > LARGEST_JSON:
        raise ValueError(f"it is larger than {LARGEST_JSON // 2**20} MB")
    if sum(map(data.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise ValueError(f"it holds more than {_MOST_VALUES} values")
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_number, object_pairs_hook=_each_once)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {_DEEPEST} levels") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    _check(value)
    return value


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:60]!r} stands twice in one object")
    return found


def _check(value: Any) -> None:
    """Level by level, so that nothing here is as deep as the document."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError(f"it is nested deeper than {_DEEPEST} levels")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, float) and not math.isfinite(item):
                raise ValueError("a number is too large")
            elif isinstance(item, str) and not item.isascii() and any("\ud800" <= c <= "\udfff" for c in item):
                raise ValueError("a text holds half a character (a lone surrogate)")
        level = below
