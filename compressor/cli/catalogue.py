"""`compress methods` and `compress recipe`: what methods there are, and how each is configured."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compressor.cli.terminal import Terminal, plain_table

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console

    from compressor.method import Needs
    from compressor.recipe import Recipe
    from compressor.registry import MethodFacts

__all__ = ["methods", "recipe"]


def methods(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this method only.")] = None,
) -> None:
    """The catalogue of methods; with a name: its paper, what it needs, every key with its default."""
    from compressor.registry import method_facts

    terminal: Terminal = context.obj
    if name is not None:
        _show_method(terminal, name)
        return
    facts = method_facts()
    terminal.show({"methods": [asdict(one) for one in facts]}, lambda console: _print_catalogue(console, facts))


def recipe(context: typer.Context, name: Annotated[str, typer.Argument(metavar="METHOD", help="The method.")]) -> None:
    """Print a method's default recipe as YAML, to be edited and given to `run --recipe`."""
    from compressor.recipe import Recipe

    resolved = Recipe.parse({"methods": [name]}).resolve()
    terminal: Terminal = context.obj
    terminal.show(resolved.to_dict(), lambda console: print(explained_yaml(resolved), end=""))


def explained_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, the help of every key of a method's configuration behind it."""
    from compressor.recipe import Recipe
    from compressor.registry import load_method

    helps: dict[str, str] = {}
    for place, entry in enumerate(recipe.methods):
        for key, _, help_text in config_rows(load_method(entry.name).Config):
            helps[f"methods.{place}.config.{key}"] = help_text
    helps |= {key: help_text for key, _, help_text in config_rows(Recipe) if not key.startswith("methods")}
    lines = []
    for line, key in _keys_of_lines(recipe.to_yaml()):
        lines.append(f"{line}  # {helps[key]}" if helps.get(key) else line)
    return "\n".join(lines) + "\n"


def config_rows(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, type, help) of every field, nested models flattened behind their own row."""
    from pydantic import BaseModel

    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        yield key, spoken_type(field.annotation), " ".join((field.description or "").split())
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from config_rows(field.annotation, f"{key}.")


def spoken_type(annotation: Any) -> str:
    """A type as people write it: ``float``, ``"block" | "start"``, ``list of int``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is type(None):
        return "null"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(spoken_type(one) for one in arguments)
    if origin is typing.Literal:
        return " | ".join(f'"{one}"' if isinstance(one, str) else str(one) for one in arguments)
    if origin is Annotated:
        return spoken_type(arguments[0])
    if origin is tuple and ... not in arguments:
        return f"[{', '.join(spoken_type(one) for one in arguments)}]"
    if origin in (list, tuple, set, frozenset):
        return f"list of {spoken_type(arguments[0])}"
    if origin is dict:
        return f"{spoken_type(arguments[0])}: {spoken_type(arguments[1])}"
    if annotation is Any:
        return "any"
    if hasattr(annotation, "model_fields"):
        return "section"
    name = str(getattr(annotation, "__name__", annotation))
    return {"str": "text", "dict": "mapping"}.get(name, name)


def _keys_of_lines(text: str) -> Iterator[tuple[str, str]]:
    """Each line of block-style YAML with the dotted key that it begins, or an empty one."""
    stack: list[tuple[int, str]] = []
    places: dict[int, int] = {}
    for line in text.splitlines():
        match = re.match(r"^( *)((?:- )?)([A-Za-z_]\w*):", line)
        if match is None:
            yield line, ""
            continue
        indent = len(match[1])
        if match[2]:  # a list's item: its keys stand two columns deeper
            stack = [(column, key) for column, key in stack if column < indent]
            places[indent] = places.get(indent, -1) + 1
            stack.append((indent, str(places[indent])))
            indent += 2
        stack = [(column, key) for column, key in stack if column < indent]
        stack.append((indent, match[3]))
        yield line, ".".join(key for _, key in stack)


def _print_catalogue(console: Console, facts: list[MethodFacts]) -> None:
    from rich.text import Text

    table = plain_table("method", "family", "paper", "idea")
    for one in facts:
        paper = ", ".join(part for part in (one.title, one.venue) if part)
        table.add_row(Text(one.name, "bold"), Text(one.family), Text(paper), Text(one.idea))
    console.print(table)
    console.print("\ncompress methods NAME shows one; compress run --method NAME runs it")


def _show_method(terminal: Terminal, name: str) -> None:
    from compressor.recipe_resolution import default_config, default_recipe
    from compressor.registry import load_method, module_documentation

    method = load_method(name)
    default, config = default_recipe(method), default_config(method)
    rows = [
        {"key": key, "type": kind, "default": _value_at(config, key), "help": text}
        for key, kind, text in config_rows(method.Config)
        if kind != "section"
    ]
    documentation = module_documentation(name)
    value: dict[str, Any] = {
        "name": name,
        "paper": asdict(method.paper),
        "idea": method.idea,
        "documentation": documentation,
        "needs": _needs(method.needs),
        "config": rows,
        "default_recipe": {key: default[key] for key in ("teachers", "students", "data") if key in default},
    }

    def render(console: Console) -> None:
        from rich.text import Text

        paper = method.paper
        console.print(Text(name, "bold"), Text(f"{paper.title}. {paper.authors}. {paper.venue}. {paper.url}"), sep="  ")
        console.print(f"\n{documentation or method.idea}\n", markup=False)
        for key, text in value["needs"].items():
            console.print(f"{key}: {text}", markup=False)
        for key, roles in value["default_recipe"].items():
            console.print(f"default {key}: {_roles(roles)}", markup=False)
        table = plain_table("key", "default", "type", "help")
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in (row["key"], _yaml(row["default"]), row["type"], row["help"])))
        console.print()
        console.print(table)

    terminal.show(value, render)


def _needs(needs: Needs) -> dict[str, str]:
    made = {"copy": "a copy of the teacher", "spec": "named by --student", "own": "built by the method"}
    described = {
        "tasks": ", ".join(needs.tasks),
        "teachers": ", ".join(f"{role} ({count})" for role, count in needs.teachers.items()) or "none",
        "students": ", ".join(f"{role} ({made[kind]})" for role, kind in needs.students.items()),
        "data": ", ".join(
            f"{role} ({', '.join(sorted(fields))})" if fields else role for role, fields in needs.data.items()
        ),
    }
    return described | ({"anatomy": needs.anatomy} if needs.anatomy else {})


def _value_at(config: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            return "(to be given)"
        config = config[part]
    return config


def _roles(roles: dict[str, Any]) -> str:
    return ", ".join(f"{role}={' '.join(spec) if isinstance(spec, list) else spec}" for role, spec in roles.items())


def _yaml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
