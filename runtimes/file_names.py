"""Names of files in an artifact: the same file on every system, inside the folder, and no two that are one file."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath, PureWindowsPath

__all__ = ["clashing_names", "name_problem"]

_LONGEST_PART, _LONGEST_NAME, _DEEPEST = 255, 1024, 16  # bytes, bytes, parts
_FORBIDDEN = '<>:"|?*'
_DEVICES = {
    "con", "prn", "aux", "nul", "conin$", "conout$", "clock$",
    *(f"{kind}{number}" for kind in ("com", "lpt") for number in "0123456789¹²³"),
}  # fmt: skip
"""What Windows takes for a device, with any suffix."""


def name_problem(name: str) -> str:
    """What is wrong with the name of a file inside an artifact, e.g. "is absolute"; empty if nothing is.

    A good name is relative, stays in the folder, and means the same on Linux, macOS and Windows: parts separated by
    ``/``, no control characters, no characters or device names that Windows reserves, composed Unicode (NFC).
    """
    if not name:
        return "is empty"
    if any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") for character in name):
        return "holds control or invisible characters"
    if "\\" in name:
        return "holds a backslash"
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or name[1:2] == ":":
        return "is absolute"
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "leaves the folder or is not plain"
    if len(name.encode()) > _LONGEST_NAME or len(parts) > _DEEPEST:
        return "is too long"
    return next((problem for problem in map(_part_problem, parts) if problem), "")


def _part_problem(part: str) -> str:
    if len(part.encode()) > _LONGEST_PART:
        return "is too long"
    if any(character in _FORBIDDEN for character in part):
        return f"holds one of {_FORBIDDEN}"
    if part[-1] in " ." or part[0] == " ":
        return "begins or ends with a space, or ends with a dot"
    if part.partition(".")[0].strip().casefold() in _DEVICES:
        return "is the name of a device"
    return "" if unicodedata.is_normalized("NFC", part) else "is not composed Unicode (NFC)"


def clashing_names(names: Iterable[str]) -> tuple[str, str] | None:
    """Two names that are one file on a system that ignores case or form, or of which one is the other's folder."""
    files: dict[str, str] = {}
    for name in names:
        folded = _folded(name)
        if folded in files:
            return files[folded], name
        files[folded] = name
    for folded, name in files.items():
        parents = folded.split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            other = files.get("/".join(parents[:depth]))
            if other is not None:
                return other, name
    return None


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
