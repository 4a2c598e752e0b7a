"""Names of methods, tasks and edits, and the modules behind them, without importing any of them.

A method is a file ``methods/<family>/<name>.py`` (hyphens as underscores) with a module attribute ``METHOD``; a task is
a file ``compressor/tasks/<name>.py`` with an attribute ``TASK``. Other packages add theirs through the entry-point
groups ``compressor.methods``, ``compressor.tasks`` (``name = package.module`` or ``name = package.module:ATTRIBUTE``)
and ``compressor.edits`` (``name = package.module``).
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import CompressorError, RequestError, nearest

if TYPE_CHECKING:
    from compressor.method import Method
    from compressor.tasks.task import Task

__all__ = [
    "MethodFacts",
    "import_edit",
    "load_method",
    "load_task",
    "method_facts",
    "method_names",
    "module_documentation",
]

METHOD_PARTS = ("name", "paper", "idea", "needs", "Config", "default_recipe", "phases", "student", "deployables")
_CORE_METHODS = ("sparsity", "qat")
"""Files of methods that go behind those of any family."""


@dataclass(frozen=True)
class Source:
    """Where a name comes from.

    Attributes:
        module: Dotted module.
        attribute: The attribute that holds the class.
        path: The module's file; None where it cannot be found without importing it.
        family: Folder of a method, or the distribution that brings it.
        builtin: It is part of this package.
    """

    module: str
    attribute: str
    path: Path | None
    family: str
    builtin: bool = True


@dataclass(frozen=True)
class MethodFacts:
    """What the catalogue shows of a method, read from its source: nothing is imported."""

    name: str
    family: str
    title: str = ""
    authors: str = ""
    venue: str = ""
    url: str = ""
    idea: str = ""
    tasks: tuple[str, ...] = ()


def method_names() -> list[str]:
    """Names of all methods, sorted."""
    return sorted(_method_sources())


def load_method(name: str) -> type[Method]:
    """Import a method's class.

    Raises:
        RequestError: There is no such method, or what a package offers under that name is none.
        CompressorError: Its module cannot be imported, for lack of a package for example.
    """
    sources = _method_sources()
    if name not in sources:
        raise RequestError(f"unknown method {name!r}: {nearest(name, sources)}")
    found: type[Method] = _load(sources[name], "method", name)
    missing = [part for part in METHOD_PARTS if not hasattr(found, part)]
    if missing:
        raise RequestError(f"the method {name!r} of {sources[name].module} lacks {', '.join(missing)}")
    return found


def load_task(name: str) -> type[Task]:
    """Import a task's class.

    Raises:
        RequestError: There is no such task.
        CompressorError: Its module cannot be imported.
    """
    sources = _task_sources()
    if name not in sources:
        raise RequestError(f"unknown task {name!r}: {nearest(name, sources)}")
    found: type[Task] = _load(sources[name], "task", name)
    return found


def import_edit(name: str) -> None:
    """Import the module that registers an edit, so that a stored model can be built again.

    ``blocks.assemble`` stands in ``compressor/models/edits/blocks.py``, ``<method>.<edit>`` in that method's module,
    and ``<group>.<edit>`` in the module that a package names ``<group>`` in the entry-point group ``compressor.edits``.
    A model's files name edits, so nothing else is ever imported on their word. An unknown name imports nothing.
    """
    group, dot, _ = name.partition(".")
    if not dot or not group.replace("-", "_").isidentifier():
        return
    if _package_folder("models", "edits", f"{group}.py").is_file():
        importlib.import_module(f"compressor.models.edits.{group}")
        return
    source = _method_sources().get(group) or _entry_point_sources("compressor.edits", "").get(group)
    if source is not None:
        _load(source, "edit", name)


def method_facts() -> list[MethodFacts]:
    """The catalogue, by family and name."""
    facts = [_read_facts(name, source) for name, source in _method_sources().items()]
    return sorted(facts, key=lambda one: (one.family, one.name))


def module_documentation(name: str) -> str:
    """The first words of a method's file: what it does, what is trained and what is exported."""
    source = _method_sources()[name]
    if source.path is None:
        return ""
    return ast.get_docstring(ast.parse(source.path.read_text(encoding="utf-8"))) or ""


def _method_sources() -> dict[str, Source]:
    sources = _entry_point_sources("compressor.methods", "METHOD")
    for path in sorted(_methods_folder().glob("*/*.py")):
        if _declares(path, "METHOD"):
            module = f"compressor.methods.{path.parent.name}.{path.stem}"
            sources[_spoken(path.stem)] = Source(module, "METHOD", path, path.parent.name)
    for stem in _CORE_METHODS:
        path = _package_folder() / f"{stem}.py"
        if _declares(path, "METHOD"):
            sources[_spoken(stem)] = Source(f"compressor.{stem}", "METHOD", path, "core")
    return sources


def _task_sources() -> dict[str, Source]:
    sources = _entry_point_sources("compressor.tasks", "TASK")
    for path in sorted(_package_folder("tasks").glob("*.py")):
        if _declares(path, "TASK"):
            sources[_spoken(path.stem)] = Source(f"compressor.tasks.{path.stem}", "TASK", path, "core")
    return sources


def _entry_point_sources(group: str, attribute: str) -> dict[str, Source]:
    from importlib.metadata import entry_points

    sources = {}
    for entry in entry_points(group=group):
        owner = entry.dist.name if entry.dist is not None else entry.module
        path = _module_file(entry.module)
        sources[entry.name] = Source(entry.module, entry.attr or attribute, path, owner, builtin=False)
    return sources


def _package_folder(*parts: str) -> Path:
    return Path(__file__).parent.joinpath(*parts)


def _methods_folder() -> Path:
    import compressor.methods

    return Path(next(iter(compressor.methods.__path__)))


def _spoken(stem: str) -> str:
    return stem.replace("_", "-")


def _declares(path: Path, attribute: str) -> bool:
    """Whether a file assigns a module attribute, told from its text."""
    try:
        return re.search(rf"^{attribute}\b[^=\n]*=", path.read_text(encoding="utf-8"), re.MULTILINE) is not None
    except OSError:
        return False


def _module_file(module: str) -> Path | None:
    """A module's file, found through its top package alone: `find_spec` of a submodule would import its parents."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin else None
    for folder in spec.submodule_search_locations or ():
        base = Path(folder).joinpath(*rest)
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
    return None


def _load(source: Source, kind: str, name: str) -> Any:
    try:
        module = importlib.import_module(source.module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "compressor", source.module.partition(".")[0]):
            raise CompressorError(f"the {kind} {name!r} cannot be imported: {error}") from error
        hint = "pip install 'compressor[train]'" if source.builtin else f"pip install {missing}"
        raise CompressorError(f"the {kind} {name!r} needs the package {missing!r}: {hint}") from error
    except CompressorError:
        raise
    except Exception as error:  # another package's module may fail in any way
        raise CompressorError(f"the {kind} {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not source.attribute:
        return module
    if not hasattr(module, source.attribute):
        raise RequestError(f"the {kind} {name!r}: {source.module} has no attribute {source.attribute}")
    return getattr(module, source.attribute)


def _read_facts(name: str, source: Source) -> MethodFacts:
    if source.path is None:
        return MethodFacts(name, source.family)
    try:
        values = dict(_class_values(source.path.read_text(encoding="utf-8"), source.attribute))
    except (OSError, SyntaxError):
        values = {}
    paper = _arguments(values.get("paper"), ("title", "authors", "venue", "url"))
    needs = _arguments(values.get("needs"), ("tasks",))
    idea = _literal(values.get("idea"))
    return MethodFacts(
        name,
        source.family,
        title=str(paper.get("title", "")),
        authors=str(paper.get("authors", "")),
        venue=str(paper.get("venue", "")),
        url=str(paper.get("url", "")),
        idea=idea if isinstance(idea, str) else "",
        tasks=tuple(needs.get("tasks") or ()),
    )


def _class_values(text: str, attribute: str) -> Iterator[tuple[str, ast.expr]]:
    """The class-level assignments of the method's class.

    Only the class's head, up to its first function, is parsed: parsing 50 files whole would take a noticeable time.
    """
    assigned = re.search(rf"^{attribute}\b[^=\n]*=\s*(\w+)", text, re.MULTILINE)
    name = assigned.group(1) if assigned else attribute
    start = re.search(rf"^class {re.escape(name)}\b", text, re.MULTILINE)
    if start is None:
        return
    head_end = re.compile(r"^(?: {4}(?:def |async def |@)|[^\s#)\]}])", re.MULTILINE).search(text, start.end())
    tree = ast.parse(text[start.start() : head_end.start() if head_end else None])
    for statement in tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else ():
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            yield statement.target.id, statement.value
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            yield statement.targets[0].id, statement.value


def _arguments(call: ast.expr | None, order: tuple[str, ...]) -> dict[str, Any]:
    """The literal arguments of a call by name; those without a name get theirs from ``order``."""
    if not isinstance(call, ast.Call):
        return {}
    named = [(keyword.arg, keyword.value) for keyword in call.keywords if keyword.arg]
    values = {name: _literal(value) for name, value in [*zip(order, call.args, strict=False), *named]}
    return {name: value for name, value in values.items() if value is not None}


def _literal(value: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(value) if value is not None else None
    except ValueError:
        return None
