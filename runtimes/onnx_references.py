"""Which other files an ONNX file refers to, found without the onnx package.

An engine opens what a tensor's ``external_data`` names, wherever that lies; so the names are looked at before an engine
sees the file. Only the message types that lead to tensors are walked (onnx.proto3's field numbers).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from compressor.errors import ArtifactError

__all__ = ["Reference", "external_references"]

_MODEL: Mapping[int, str] = {7: "graph", 20: "training", 25: "function"}
_BELOW: Mapping[str, Mapping[int, str]] = {
    "model": _MODEL,
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external"},
}
"""Message types by the field of the message that holds them."""
_OPERATOR = 4
_DEEPEST = 64
_LONGEST_TEXT = 4096


@dataclass(frozen=True)
class Reference:
    """Bytes in another file.

    Attributes:
        location: Path relative to the ONNX file, as it stands there.
        offset: First byte.
        length: Number of bytes; 0 means to the end.
    """

    location: str
    offset: int = 0
    length: int = 0


def external_references(path: Path) -> set[Reference]:
    """All references of an ONNX file.

    Raises:
        ArtifactError: The file is no ONNX model.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return set(_walk(_Message(data, path), "model", 0, len(data), 0))
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise ArtifactError(f"{path} is no ONNX model: {error}") from error


def _walk(message: _Message, kind: str, start: int, end: int, depth: int) -> Iterator[Reference]:
    if depth > _DEEPEST:
        message.refuse(f"it is nested deeper than {_DEEPEST} levels")
    pairs: dict[str, str] = {}
    for field, first, last in message.fields(start, end):
        below = _BELOW[kind].get(field)
        if below == "external":
            key, value = message.pair(first, last)
            if key in pairs:
                message.refuse(f"a reference has two values of {key[:40]!r}")
            pairs[key] = value
        elif kind == "node" and field == _OPERATOR and message.data[first:last] == b"EPContext":
            message.refuse("it holds a part that another engine compiled (EPContext), which may name files")
        elif below is not None:
            yield from _walk(message, below, first, last, depth + 1)
    if pairs:
        yield message.reference(pairs)


class _Message:
    """The wire format: a stream of fields, of which only those with a length can hold messages."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path = data, path

    def fields(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(number, first byte, byte behind) of the fields with a length."""
        place = start
        while place < end:
            tag, place = self._varint(place, end)
            wire = tag & 7
            if wire == 2:
                length, place = self._varint(place, end)
                if length > end - place:
                    self.refuse("a field is longer than the message around it")
                yield tag >> 3, place, place + length
                place += length
            elif wire == 0:
                _, place = self._varint(place, end)
            elif wire in (1, 5):
                place += 8 if wire == 1 else 4
            else:
                self.refuse(f"there is no wire type {wire}")
        if place != end:
            self.refuse("it ends early")

    def pair(self, start: int, end: int) -> tuple[str, str]:
        """A key and its value."""
        texts = {1: "", 2: ""}
        for field, first, last in self.fields(start, end):
            if field in texts:
                if last - first > _LONGEST_TEXT:
                    self.refuse("the name of a file is too long")
                texts[field] = self.data[first:last].decode("utf-8")
        return texts[1], texts[2]

    def reference(self, pairs: Mapping[str, str]) -> Reference:
        """What a tensor's pairs say."""
        numbers = {key: pairs.get(key, "0") for key in ("offset", "length")}
        if not all(text.isdecimal() and len(text) < 20 for text in numbers.values()):
            self.refuse("a reference has no plain offset and length")
        return Reference(pairs.get("location", ""), int(numbers["offset"]), int(numbers["length"]))

    def _varint(self, place: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if place >= end:
                self.refuse("it ends early")
            byte = self.data[place]
            value, place = value | (byte & 127) << shift, place + 1
            if byte < 128:
                return value, place
        self.refuse("a number is too long")

    def refuse(self, reason: str) -> NoReturn:
        raise ArtifactError(f"{self.path} is no ONNX model, or damaged: {reason}")
