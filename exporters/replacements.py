"""Export-time replacements: parts of libraries that no exporter can translate, swapped for equal parts that it can.

A replacement is a context manager over a module and its example inputs; it is registered for the library class that
needs it, and `replaced` enters those that a module needs and checks that the outputs stay the same.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import ArtifactError

__all__ = ["REPLACEMENTS", "Replacement", "replaced", "replacement", "rotate_by_table"]

_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Replacement:
    """One replacement.

    Attributes:
        name: For messages.
        classes: Names of the library classes that need it, ``package.module:Class``.
        enter: Called with the module and its example inputs; the replacement holds inside the context.
    """

    name: str
    classes: tuple[str, ...]
    enter: Callable[[nn.Module, Mapping[str, Tensor]], AbstractContextManager[None]]

    def needed(self, module: nn.Module) -> bool:
        """True where the module holds one of the classes. Nothing is imported: a class in use is loaded already."""
        found = tuple(filter(None, (_loaded(name) for name in self.classes)))
        return bool(found) and any(isinstance(part, found) for part in module.modules())


REPLACEMENTS: list[Replacement] = []
"""All known replacements."""


def replacement(name: str, *classes: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a generator function ``(module, inputs)`` as the replacement for some library classes."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        REPLACEMENTS.append(Replacement(name, classes, contextlib.contextmanager(function)))
        return function

    return register


@contextlib.contextmanager
def replaced(
    module: nn.Module, inputs: Mapping[str, Tensor], replacements: list[Replacement] | None = None
) -> Iterator[list[str]]:
    """Hold all replacements that ``module`` needs; give their names.

    Raises:
        ArtifactError: The module's outputs change under them by more than 1e-5 of their scale.
    """
    known = REPLACEMENTS if replacements is None else replacements
    needed = [item for item in known if item.needed(module)]
    if not needed:
        yield []
        return
    with torch.no_grad():
        before = _tensors(module(**inputs))
    with contextlib.ExitStack() as stack:
        for item in needed:
            stack.enter_context(item.enter(module, inputs))
        with torch.no_grad():
            after = _tensors(module(**inputs))
        for old, new in zip(before, after, strict=True):
            scale = float(old.abs().max()) or 1.0
            drift = float((old - new).abs().max()) / scale
            if not drift <= _TOLERANCE:
                names = ", ".join(item.name for item in needed)
                raise ArtifactError(f"the export form of {names} changes the outputs by {drift:.1e}: please report it")
        yield [item.name for item in needed]


def rotate_by_table(x: Tensor, table: Tensor) -> Tensor:
    """Rotary embedding in real arithmetic.

    Args:
        x: (B, S, H, D); neighbours (2i, 2i+1) of the last axis are the real and imaginary part of a number.
        table: (S, D/2, 2) float32, cosine and sine of each angle.

    Returns:
        ``x`` rotated, in the dtype of ``x``; computed in float32.
    """
    real, imaginary = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    cosine, sine = table[..., 0].unsqueeze(1), table[..., 1].unsqueeze(1)
    turned = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-1)
    return turned.flatten(3).type_as(x)


_QWEN = "diffusers.models.transformers.transformer_qwenimage"


@replacement("Qwen-Image's complex rotary embedding", f"{_QWEN}:QwenEmbedRope", f"{_QWEN}:QwenEmbedLayer3DRope")
def _qwen_rotary(module: nn.Module, inputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Bake the complex tables of the example's lengths as cosines and sines, and rotate in real arithmetic."""
    library = sys.modules[_QWEN]
    classes = (library.QwenEmbedRope, library.QwenEmbedLayer3DRope)
    original = library.apply_rotary_emb_qwen

    def rotate(x: Tensor, freqs_cis: Any, use_real: bool = True, use_real_unbind_dim: int = -1) -> Tensor:
        if use_real:
            result: Tensor = original(x, freqs_cis, use_real, use_real_unbind_dim)
            return result
        return rotate_by_table(x, torch.view_as_real(freqs_cis) if freqs_cis.is_complex() else freqs_cis)

    parts = [part for part in module.modules() if isinstance(part, classes)]
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(_baked_tables(part, module, inputs))
        stack.enter_context(_everywhere("apply_rotary_emb_qwen", original, rotate))
        yield


@contextlib.contextmanager
def _baked_tables(part: nn.Module, module: nn.Module, inputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Let ``part`` answer with real tables, recorded while the module runs its example inputs."""
    tables: dict[str, tuple[Tensor, ...]] = {}
    original = part.forward

    def key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        named = dict(zip(("video_fhw", "device", "max_txt_seq_len"), args, strict=False)) | dict(kwargs)
        shapes = named.get("video_fhw")
        first = shapes[0] if isinstance(shapes, list) and shapes else shapes
        lengths = [int(value) for name, value in named.items() if name != "video_fhw" and _is_length(value)]
        return repr((first, lengths))

    def record(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        answer: tuple[Tensor, ...] = original(*args, **kwargs)
        tables[key(args, kwargs)] = tuple(torch.view_as_real(table).clone() for table in answer)
        return answer

    def answer(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        found = tables.get(key(args, kwargs))
        if found is None:
            raise ArtifactError("the rotary tables are baked for the example's sizes: only the batch may be dynamic")
        return found

    try:
        part.forward = record  # type: ignore[method-assign]
        with torch.no_grad():
            module(**inputs)
        part.forward = answer  # type: ignore[method-assign]
        yield
    finally:
        del part.forward


@contextlib.contextmanager
def _everywhere(name: str, original: object, substitute: object) -> Iterator[None]:
    """Replace a function in every loaded module that imported it by this name."""
    places = [place for place in list(sys.modules.values()) if getattr(place, "__dict__", {}).get(name) is original]
    try:
        for place in places:
            setattr(place, name, substitute)
        yield
    finally:
        for place in places:
            setattr(place, name, original)


def _is_length(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) or (isinstance(value, Tensor) and value.numel() == 1)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _loaded(name: str) -> type | None:
    module, _, attribute = name.partition(":")
    return getattr(sys.modules.get(module), attribute, None)
