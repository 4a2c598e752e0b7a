"""From a recipe as written to the full one: the methods' defaults < file < flags < ``--set``, then every check."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from compressor.errors import RequestError, nearest
from compressor.method import Needs
from compressor.plain_yaml import YAMLError, load_yaml
from compressor.recipe import Recipe, load_recipe_target
from compressor.registry import load_method, method_names
from compressor.validation import field_at, key_paths, one_line, validated

__all__ = ["Flags", "default_config", "default_recipe", "difference", "parse_settings", "resolve"]

TRAINING_KEYS = ("task", "task_options", "teachers", "students", "data", "methods", "budget", "steps", "seed", "judge")
"""What decides the student; the rest decides what is built of it and measured."""

PREFERRED_ROLES = {"teachers": "teacher", "students": "student", "data": "train"}
SINGULAR = {"teachers": "teacher", "students": "student", "data": "data"}

MethodClass = Any
"""A class as `compressor.method.Method` describes it."""


@dataclass(frozen=True)
class Flags:
    """What `compress run` was given beside a recipe file; None and empty mean "not given"."""

    methods: Sequence[str] = ()
    targets: Sequence[str] = ()
    teachers: Sequence[str] = ()
    students: Sequence[str] = ()
    data: Sequence[str] = ()
    sparsity: str | None = None
    steps: int | None = None
    budget: float | None = None
    seed: int | None = None
    device: str | None = None
    trust_remote_code: bool | None = None
    max_drop: float | None = None
    settings: Sequence[str] = ()


def resolve(written: Recipe, flags: Flags) -> Recipe:
    """See `Recipe.resolve`."""
    values = written.model_dump(exclude_unset=True)
    entries = _chain(values, flags)
    classes = [load_method(entry["name"]) for entry in entries]
    defaults = _defaults(classes)
    values = _merge(defaults, {key: value for key, value in values.items() if key not in ("methods", "sparsity")})
    _apply_flags(values, flags, [method.needs for method in classes])
    for entry, method in zip(entries, classes, strict=True):
        entry["config"] = _merge(default_config(method, own_data=_own_data(method, values)), entry["config"])
    _apply_steps(values, entries)
    for setting in flags.settings:
        _apply_setting(setting, values, entries, classes)
    _apply_steps(values, entries)  # --set recipe.steps=N
    for entry, method in zip(entries, classes, strict=True):
        entry["config"] = validated(method.Config, entry["config"], prefix=method.name).model_dump(mode="json")
    values["methods"] = entries
    values.setdefault("task", classes[0].needs.tasks[0])
    recipe = Recipe.parse(values)
    if flags.max_drop is not None:
        recipe = recipe.model_copy(update={"targets": _limited(recipe.targets, flags.max_drop)})
    _check(recipe, classes)
    recipe.load_targets()
    return recipe


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """``key=value`` strings as a mapping; values are YAML.

    Raises:
        RequestError: There is no "=", or the value is no YAML.
    """
    return dict(_split_setting(setting) for setting in settings)


def difference(recipe: Recipe) -> str:
    """A short hash of the training that a resolved recipe describes, empty where it is the method's default."""
    mine = _training(recipe)
    try:
        usual = _training(Recipe.parse({"methods": [entry.name for entry in recipe.methods]}).resolve())
    except RequestError:  # a method without a complete default
        usual = None
    return "" if mine == usual else hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()[:6]


def _training(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in recipe.to_dict().items() if key in TRAINING_KEYS}


# --- layers ----------------------------------------------------------------------------------------------------------


def _chain(values: Mapping[str, Any], flags: Flags) -> list[dict[str, Any]]:
    """The chain's entries, each with the configuration that the file gives it."""
    written = [dict(entry) for entry in values.get("methods", [])]
    entries = written
    if flags.methods:
        entries = []
        for name in flags.methods:
            known = next((entry for entry in written if entry["name"] == name), None)
            if known is not None:
                written.remove(known)
            entries.append(known or {"name": name})
    if not entries:
        raise RequestError(f"no method is given: add --method NAME ({', '.join(method_names())})")
    pattern = flags.sparsity if flags.sparsity is not None else values.get("sparsity")
    if pattern is not None:
        pattern = Recipe.parse({"sparsity": pattern}).sparsity
        entries = [*entries, {"name": "sparsity", "config": {"pattern": pattern}}]
    return [{"name": entry["name"], "config": dict(entry.get("config", {}))} for entry in entries]


def default_recipe(method: MethodClass) -> dict[str, Any]:
    """The keys of a recipe that a method's default recipe gives, without its configuration."""
    given = {key: value for key, value in method.default_recipe.items() if key not in ("config", "data_config")}
    try:
        return Recipe.model_validate(given).model_dump(exclude_unset=True)
    except ValidationError as error:
        line = one_line(error, Recipe)
        raise RequestError(f"the default recipe of the method {method.name!r} is wrong: {line}") from error


def _defaults(classes: Sequence[MethodClass]) -> dict[str, Any]:
    """The first method's default recipe; later ones add the roles that they need and it does not have."""
    merged: dict[str, Any] = {}
    for method in classes:
        default = default_recipe(method)
        roles = {key: default[key] for key in PREFERRED_ROLES if key in default}
        if "teachers" in roles:
            spare = {role for role, count in method.needs.teachers.items() if count in ("optional", "any")}
            roles["teachers"] = {role: specs for role, specs in roles["teachers"].items() if role not in spare}
        merged = _merge(default if not merged else roles, merged)
    return merged


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``over``; mappings are merged key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _own_data(method: MethodClass, values: Mapping[str, Any]) -> bool:
    """Whether a recipe trains on the data of the method's default recipe."""
    usual = default_recipe(method).get("data", {})
    return bool({role: values.get("data", {}).get(role) for role in usual} == usual)


def default_config(method: MethodClass, *, own_data: bool = True) -> dict[str, Any]:
    """The default configuration with every key, or what the default recipe says of one that has keys to be given.

    Args:
        method: Its default recipe may hold ``config``, and ``data_config`` for what suits its own small data only.
        own_data: The data are the default recipe's; with others, ``data_config`` is left out and the method's own
            defaults hold, which are the paper's.
    """
    given = dict(method.default_recipe.get("config", {}))
    if own_data:
        given = _merge(given, method.default_recipe.get("data_config", {}))
    try:
        values: dict[str, Any] = method.Config.model_validate(given).model_dump(mode="json")
    except ValidationError as error:
        if any(one["type"] != "missing" for one in error.errors()):
            line = one_line(error, method.Config, prefix=method.name)
            raise RequestError(f"the default recipe of the method {method.name!r} is wrong: {line}") from error
        return given
    return values


# --- flags -----------------------------------------------------------------------------------------------------------


def _apply_flags(values: dict[str, Any], flags: Flags, needs: Sequence[Needs]) -> None:
    simple = {"steps": flags.steps, "budget": flags.budget, "seed": flags.seed, "device": flags.device}
    simple["trust_remote_code"] = flags.trust_remote_code
    values.update({key: value for key, value in simple.items() if value is not None})
    if flags.targets:
        values["targets"] = list(flags.targets)
    for kind, given in (("teachers", flags.teachers), ("students", flags.students), ("data", flags.data)):
        named: dict[str, list[str]] = {}
        for text in given:
            role, spec = _split_role(text, kind, needs)
            named.setdefault(role, []).append(spec)
        if kind != "teachers":
            for role, specs in named.items():
                if len(specs) > 1:
                    raise RequestError(f"--{SINGULAR[kind]} {role} is given {len(specs)} times; it takes one")
        chosen: dict[str, Any] = {role: specs if kind == "teachers" else specs[0] for role, specs in named.items()}
        if chosen:
            values[kind] = {**values.get(kind, {}), **chosen}


def _apply_steps(values: dict[str, Any], entries: Sequence[dict[str, Any]]) -> None:
    """Move the recipe's ``steps`` to where every method keeps its own."""
    steps = Recipe.parse({"steps": values.pop("steps", None)}).steps
    if steps is None:
        return
    for entry in entries:
        entry["config"] = _with_steps(entry["config"], steps, entry["name"])


def _with_steps(config: dict[str, Any], steps: int, name: str) -> dict[str, Any]:
    places = [
        key for key, value in config.items() if key == "steps" or (isinstance(value, Mapping) and value.get("steps"))
    ]
    if len(places) != 1:
        keys = [f"{name}.steps" if place == "steps" else f"{name}.{place}.steps" for place in places]
        has = " and ".join(keys) or "no phase"
        raise RequestError(f"--steps suits methods of one training phase; {name} has {has}: use --set or --budget")
    place = places[0]
    return {**config, place: steps if place == "steps" else {**config[place], "steps": steps}}


def _limited(targets: Sequence[str | dict[str, Any]], max_drop: float) -> list[str | dict[str, Any]]:
    """The targets, those of eight bits with another `calibration.max_drop`."""
    limited = [
        _with_max_drop(entry, max_drop) if load_recipe_target(entry).quantized else None  # checked as it was written
        for entry in targets
    ]
    if not any(limited):
        raise RequestError("--max-drop limits int8 and fp8 targets, and none is given: add --target ort-int8")
    return [after or before for after, before in zip(limited, targets, strict=True)]


def _with_max_drop(entry: str | dict[str, Any], max_drop: float) -> dict[str, Any]:
    written: dict[str, Any] = {"base": entry} if isinstance(entry, str) else entry
    # a mapping with a base may have written the key with a dot
    rest = {key: value for key, value in written.items() if key != "calibration.max_drop"}
    return {**rest, "calibration": {**written.get("calibration", {}), "max_drop": max_drop}}


def _roles(kind: str, needs: Iterable[Needs]) -> list[str]:
    return list(dict.fromkeys(role for one in needs for role in getattr(one, kind)))


def _split_role(text: str, kind: str, needs: Sequence[Needs]) -> tuple[str, str]:
    """``[ROLE=]SPEC``: a role is a plain word; a spec starts with a kind and a colon, and may hold "=" behind it."""
    roles, flag = _roles(kind, needs), f"--{SINGULAR[kind]}"
    before, equals, after = text.partition("=")
    if equals and before.replace("-", "_").isidentifier() and not Path(text).exists():
        if before not in roles:
            raise RequestError(f"{flag} {text}: unknown role {before!r}: {nearest(before, roles)}")
        text, role = after, before
    elif len(roles) == 1 or PREFERRED_ROLES[kind] in roles:
        role = roles[0] if len(roles) == 1 else PREFERRED_ROLES[kind]
    elif roles:
        raise RequestError(f"{flag} {text}: say which role: {' or '.join(f'{flag} {one}=SPEC' for one in roles)}")
    else:
        raise RequestError(f"{flag} {text}: the method takes no {SINGULAR[kind]}")
    if not text:
        raise RequestError(f"{flag} {before}=: the spec is missing")
    return role, text


# --- settings --------------------------------------------------------------------------------------------------------


def _split_setting(setting: str) -> tuple[str, Any]:
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not equals or not key:
        raise RequestError(f"--set {setting}: write --set KEY=VALUE")
    try:
        return key, load_yaml(text)
    except YAMLError as error:
        raise RequestError(f"--set {setting}: the value is not valid YAML; quote it") from error


def _apply_setting(
    setting: str, values: dict[str, Any], entries: Sequence[dict[str, Any]], classes: Sequence[MethodClass]
) -> None:
    """Put a value where its key belongs: a key of the recipe, of a named method, or of the last method that has it."""
    key, value = _split_setting(setting)
    head, _, rest = key.partition(".")
    names = [entry["name"] for entry in entries]
    if head == "methods":
        raise RequestError(
            f"--set {setting}: --method chooses methods; their keys are set by --set {names[-1]}.KEY=VALUE"
        )
    if key.removeprefix("recipe.") == "sparsity":
        raise RequestError(f"--set {setting}: write --sparsity {value}")
    in_recipe = field_at(Recipe, key.split("."))[0]
    owners = [place for place, method in enumerate(classes) if field_at(method.Config, key.split("."))[0]]
    if head == "recipe" and rest and field_at(Recipe, rest.split("."))[0]:
        _put(values, rest.split("."), value)
    elif head in names and rest:
        place = len(names) - 1 - names[::-1].index(head)
        _require(classes[place].Config, rest, f"{head}.", setting)
        _put(entries[place]["config"], rest.split("."), value)
    elif in_recipe and owners and key != "steps":  # the recipe's steps are the method's
        raise RequestError(f"--set {setting}: {key!r} is ambiguous: write recipe.{key} or {names[owners[-1]]}.{key}")
    elif owners:
        _put(entries[owners[-1]]["config"], key.split("."), value)
    elif in_recipe:
        _put(values, key.split("."), value)
    else:
        known = [path for path in key_paths(Recipe) if not path.startswith("methods")]
        known += [path for method in classes for path in key_paths(method.Config)]
        raise RequestError(f"--set {setting}: unknown key {key!r}: {_near(key, known, names)}")


def _require(config: type[BaseModel], key: str, prefix: str, setting: str) -> None:
    if not field_at(config, key.split("."))[0]:
        hint = nearest(key, key_paths(config))
        raise RequestError(f"--set {setting}: unknown key {prefix + key!r}: {hint}")


def _near(key: str, known: Sequence[str], names: Sequence[str]) -> str:
    same_leaf = [path for path in known if path.rpartition(".")[2] == key.rpartition(".")[2]]
    if same_leaf:
        return f"did you mean {' or '.join(dict.fromkeys(same_leaf))}?"
    hint = nearest(key, known)
    return hint if hint.startswith("did") else f"`compress methods {names[-1]}` lists the keys"


def _put(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        inner = values.get(part)
        values[part] = dict(inner) if isinstance(inner, Mapping) else {}
        values = values[part]
    values[path[-1]] = value


# --- checks ----------------------------------------------------------------------------------------------------------


def _check(recipe: Recipe, classes: Sequence[MethodClass]) -> None:
    """Hold the recipe against what its methods need."""
    needs = [method.needs for method in classes]
    for kind in PREFERRED_ROLES:
        known = _roles(kind, needs)
        for role in getattr(recipe, kind):
            if role not in known:
                hint = nearest(role, known) if known else f"the method takes no {SINGULAR[kind]}"
                raise RequestError(f"{kind}: unknown role {role!r}: {hint}")
    named = {role for one in needs for role, kind in one.students.items() if kind == "spec"}
    for place, method in enumerate(classes):
        _check_task(recipe, method)
        _check_teachers(recipe, method)
        _check_students(recipe, method, classes[place - 1] if place else None, named)
        for role in method.needs.data:
            if role not in recipe.data:
                raise RequestError(f"the method {method.name!r} needs data: add --data {_written(role, 'train')}")


def _check_task(recipe: Recipe, method: MethodClass) -> None:
    if recipe.task not in method.needs.tasks:
        allowed = nearest(str(recipe.task), method.needs.tasks)
        raise RequestError(f"the method {method.name!r} does not serve the task {recipe.task!r}: {allowed}")


def _check_teachers(recipe: Recipe, method: MethodClass) -> None:
    for role, count in method.needs.teachers.items():
        specs = recipe.teachers.get(role, [])
        if not specs and count not in ("optional", "any"):
            raise RequestError(f"the method {method.name!r} needs a teacher: add --teacher {_written(role, 'teacher')}")
        if len(specs) > 1 and count not in ("many", "any"):
            raise RequestError(f"the method {method.name!r} takes one {role}, but {len(specs)} are given")


def _check_students(recipe: Recipe, method: MethodClass, before: MethodClass | None, named: Collection[str]) -> None:
    """``named``: roles whose model the user may name, for some method of the chain."""
    students: Mapping[str, str] = method.needs.students
    for role in recipe.students:
        if students.get(role) in ("copy", "own") and role not in named:
            made = "copies it from its teacher" if students[role] == "copy" else "builds it itself"
            raise RequestError(f"the method {method.name!r} takes no --student: it {made}")
    if before is None:
        return
    reason = method.needs.first
    if not any(kind in ("copy", "spec") for kind in students.values()):
        reason = "it builds its own student"
    if reason:
        raise RequestError(f"the method {method.name!r} cannot follow {before.name!r}: {reason}; let it come first")


def _written(role: str, usual: str) -> str:
    return "SPEC" if role == usual else f"{role}=SPEC"
