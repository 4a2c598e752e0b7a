"""What is known of the licences behind a student: those that its teachers' own files and catalogues state."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["licence_note"]

_PLAIN = "A student is made of its teachers and its training data: their licences apply to it, not compressor's."
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)
_FIRST_LINES = 65536


def licence_note(recipe: Mapping[str, Any]) -> str:
    """A few sentences for a bundle's manifest.

    Args:
        recipe: The run's recipe, as stored in the manifest of an artifact.
    """
    teachers = list(dict.fromkeys(_specs(recipe.get("teachers"))))
    data = list(dict.fromkeys(_specs(recipe.get("data"))))
    stated = [(spec, _stated(spec)) for spec in teachers]
    sentences = [_PLAIN]
    sentences += [f"Teacher {spec}: {found}." for spec, found in stated if found]
    unknown = [spec for spec, found in stated if not found] + data
    if unknown:
        sentences.append(f"Not stated, look them up: {', '.join(unknown)}.")
    return " ".join(sentences)


def _specs(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inside in value.values():
            yield from _specs(inside)
    elif isinstance(value, list):
        for inside in value:
            yield from _specs(inside)


def _stated(spec: str) -> str:
    """The licence that a teacher's own source names; empty where it names none."""
    kind, _, rest = spec.partition(":")
    name = re.split(r"[?#@]", rest)[0]
    if kind == "demo":
        return "trained by compressor itself, no licence of its own"
    if kind == "timm":
        return _of_timm(name)
    folder = Path(name).expanduser()
    return _of_folder(folder) if kind in ("diffusers", "transformers", "run") and folder.is_dir() else ""


def _of_folder(folder: Path) -> str:
    """From a model card's front matter, or a licence file."""
    try:
        with open(folder / "README.md", encoding="utf-8") as file:
            card = _FRONT_MATTER.match(file.read(_FIRST_LINES))
    except (OSError, UnicodeDecodeError):
        card = None
    found = re.search(r"^license:\s*[\"']?([\w.+ -]+)", card[1], re.MULTILINE) if card else None
    if found:
        return f"{found[1].strip()} (its README.md)"
    for name in ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE"):
        try:
            with open(folder / name, encoding="utf-8", errors="replace") as file:
                lines = (line.strip() for line in file.read(_FIRST_LINES).splitlines())
        except OSError:
            continue
        return f"{next((line for line in lines if line), 'an empty file')[:80]} (its {name})"
    return ""


def _of_timm(name: str) -> str:
    try:
        import timm
    except ImportError:
        return ""
    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    except (RuntimeError, ValueError):
        return ""
    licence = getattr(config, "license", None)
    return f"{licence} (timm's catalogue)" if licence else ""
