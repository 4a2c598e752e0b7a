"""What pydantic finds wrong, as one line for a person: the key, the value, what is allowed, the nearest valid key."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from compressor.errors import RequestError, nearest

__all__ = ["field_at", "key_paths", "one_line", "validated"]

Validated = TypeVar("Validated", bound=BaseModel)

SHOWN_VALUE = 60
"""Characters of a wrong value that are shown."""


def validated(model: type[Validated], values: Mapping[str, Any], *, prefix: str = "", where: str = "") -> Validated:
    """Read values that a user wrote.

    Args:
        model: What they should be.
        values: Its keys.
        prefix: Put before keys in messages, as in `one_line`.
        where: What holds the values, which messages begin with: a file, a spec.

    Raises:
        RequestError: Something is wrong.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        line = one_line(error, model, prefix=prefix)
        raise RequestError(f"{where}: {line}" if where else line) from error


def one_line(error: ValidationError, model: type[BaseModel], *, prefix: str = "") -> str:
    """Describe the first thing that is wrong.

    Args:
        error: What ``model.model_validate`` raised.
        model: The model, for the valid keys.
        prefix: Put before the key with a dot: the method's name for its configuration.
    """
    first = error.errors()[0]
    location, kind, message = first["loc"], first["type"], first["msg"]
    more = f" (and {error.error_count() - 1} more)" if _distinct(error) > 1 else ""
    key = ".".join([*([prefix] if prefix else []), *_spoken(location, model)])
    if kind == "extra_forbidden":
        return f"unknown key {key!r}: {_nearest_key(location, model, prefix)}{more}"
    if kind == "missing":
        return f"{key} is missing{more}"
    rule = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if rule.startswith("Input should be "):
        rule = "must be " + rule.removeprefix("Input should be ")
    elif rule.startswith("Input should "):
        rule = "must " + rule.removeprefix("Input should ")
    if isinstance(first["input"], BaseModel) or (kind == "value_error" and isinstance(first["input"], Mapping)):
        return f"{key}: {rule}{more}" if key else f"{rule}{more}"
    rules = _union_rules(error, model, location)
    return f"{key} is {_shown(first['input'])}: {' or '.join(rules) if len(rules) > 1 else rule}{more}"


def field_at(model: type[BaseModel], path: Sequence[str | int]) -> tuple[bool, Any]:
    """Follow a path of keys through nested models, mappings and lists.

    Returns:
        Whether there can be such a key, and the annotation found there (None where anything goes).
    """
    annotation: Any = model
    for part in path:
        inner = _model_in(annotation)
        if inner is not None:
            field = inner.model_fields.get(str(part))
            if field is None:
                return False, None
            annotation = field.annotation
        elif (items := _items_in(annotation, numbered=str(part).isdigit())) is not None:
            annotation = items
        else:
            return False, None
    return True, annotation


def key_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All dotted keys of a model and of the models nested in it."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        inner = _model_in(field.annotation)
        if inner is not None:
            yield from key_paths(inner, f"{prefix}{name}.")


def _parts(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    for part in _parts(annotation):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _items_in(annotation: Any, *, numbered: bool) -> Any:
    """The annotation of a mapping's items, or of a list's for a number; None where there are none."""
    for part in _parts(annotation):
        origin = typing.get_origin(part) or part
        if isinstance(origin, type) and issubclass(origin, (Mapping, list, tuple) if numbered else Mapping):
            arguments = typing.get_args(part)
            return arguments[-1] if arguments and arguments[-1] is not ... else (arguments or (Any,))[0]
    return None


def _distinct(error: ValidationError) -> int:
    """How many keys are wrong; the members of a union report one error each."""
    return len({one["loc"][:1] for one in error.errors()})


def _spoken(location: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    """The location without the tags that pydantic adds for the members of a union."""
    parts: list[str] = []
    path: list[int | str] = []
    for part in location:
        known, _ = field_at(model, [*path, part])
        if known or (part == location[-1] and _model_in(field_at(model, path)[1]) is not None):
            path.append(part)
            parts.append(str(part))
    return parts or [str(part) for part in location]


def _union_rules(error: ValidationError, model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    key = _spoken(location, model)
    rules: list[str] = []
    for one in error.errors():
        if _spoken(one["loc"], model) == key and one["msg"].startswith("Input should be "):
            rules.append("must be " + one["msg"].removeprefix("Input should be ") if not rules else one["msg"][16:])
    return list(dict.fromkeys(rules))


def _nearest_key(location: tuple[int | str, ...], model: type[BaseModel], prefix: str) -> str:
    wrong = str(location[-1])
    place = _model_in(field_at(model, location[:-1])[1]) or model
    before = ".".join([*([prefix] if prefix else []), *map(str, location[:-1])])
    siblings = [f"{before}.{name}" if before else name for name in place.model_fields]
    deeper = [path for path in key_paths(model) if path.rpartition(".")[2] == wrong]
    if deeper:
        return f"did you mean {' or '.join(f'{prefix}.{path}' if prefix else path for path in deeper)}?"
    hint = nearest(f"{before}.{wrong}" if before else wrong, siblings)
    return hint if hint.startswith("choose") or _resembles(wrong, place) else f"choose from {', '.join(siblings)}"


def _resembles(wrong: str, model: type[BaseModel]) -> bool:
    """Whether a sibling is near by its own name: a shared prefix makes everything look near."""
    return nearest(wrong, model.model_fields).startswith("did")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_VALUE else text[: SHOWN_VALUE - 3] + "..."
