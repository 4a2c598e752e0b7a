"""The documents as tests see them: fenced blocks with the comment before each, links, tables."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from compressor.cli.app import app, execute

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "acme"
PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {"kernels.md"}
"""Documents with tests of their own."""

FENCE = re.compile(
    r"^(?:<!-- (?P<comment>.+?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: Word behind the fence.
        text: Its content.
        kind: "test" or "file", from the comment before it; empty without one.
        value: What the comment says: "dry-run", a path, ...
    """

    language: str
    text: str
    kind: str = ""
    value: str = ""

    def stands_in(self, text: str) -> bool:
        """Whether its lines stand in a text one after the other, blank lines and indentation aside."""
        return _plain(self.text) in _plain(text)


def _plain(text: str) -> str:
    return "\n".join(["", *(line.strip() for line in text.splitlines() if line.strip()), ""])


@dataclass(frozen=True)
class Document:
    """A Markdown file."""

    path: Path

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def blocks(self) -> list[Block]:
        found = []
        for match in FENCE.finditer(self.text):
            kind, _, value = (match["comment"] or "").partition(": ")
            found.append(Block(match["language"], match["text"], kind, value))
        return found

    @property
    def links(self) -> list[str]:
        prose = FENCE.sub("", self.text)
        return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if not link.startswith("http")]

    @property
    def anchors(self) -> set[str]:
        heads = re.findall(r"^#+ (.+)$", FENCE.sub("", self.text), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}

    def table(self, first_column: str) -> list[list[str]]:
        """The rows of the table whose first column is called so; backquotes are taken off whole cells."""
        lines = self.text.splitlines()
        start = next(k for k, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
        rows = []
        for line in lines[start + 2 :]:
            if not line.startswith("|"):
                break
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            rows.append([re.sub(r"^`([^`]*)`$", r"\1", cell) for cell in cells])
        return rows


def documents() -> list[Document]:
    return [Document(path) for path in PATHS if path.name not in ELSEWHERE]


def run_python(document: Document, value: str = "") -> dict[str, Any]:
    """Execute the Python blocks of a document one after the other, those that say so only if asked for."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in document.blocks:
        if block.language != "python" or block.kind == "file":
            continue
        code = compile(block.text, f"{document.path.name} (python)", "exec")
        if block.value == value:
            _write_named(block)
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, names)
    return names


def write_files(document: Document) -> None:
    """Write the blocks that begin with a comment of a file's name."""
    for block in document.blocks:
        if block.language in ("toml", "yaml") and not block.kind:
            _write_named(block)


def _write_named(block: Block) -> None:
    name = re.match(r"# (\w[\w-]*\.(?:py|toml|yaml))\b", block.text)
    if name:
        Path(name[1]).write_text(block.text)


def commands(block: Block) -> list[str]:
    """The lines of a shell block, without comments."""
    joined = block.text.replace("\\\n", " ")
    lines = (line.partition("  #")[0].strip() for line in joined.splitlines())
    return [line for line in lines if line]


def run_command(line: str, mode: str) -> None:
    """Do what a line of a shell block says, as far as its mode allows.

    Args:
        line: ``compress ...``, ``make TARGET``, ``accelerate launch ... -m compressor ...``, or a script of ours.
        mode: "" runs it (`compress bench` for a moment only); "dry-run" adds that flag; "parse" only checks the
            arguments; "make" looks into the Makefile.
    """
    command, _, file = line.partition(" > ")
    program, *arguments = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
    elif program.startswith("."):
        assert (ROOT / program).is_file(), line
    elif program == "pip":
        assert (ROOT / arguments[-1] / "pyproject.toml").is_file(), line
    elif program == "accelerate":
        parse(arguments[arguments.index("compressor") + 1 :])
    else:
        assert program == "compress", f"no test knows how to run: {line}"
        if mode == "parse":
            parse(arguments)
            return
        extra = ["--dry-run"] if mode == "dry-run" else []
        if arguments[0] == "bench":
            extra = ["--seconds", "0.1", "--rounds", "3"]
        code, out, err = compress(arguments + extra)
        assert code == 0, f"{line}\n{err}"
        if file:
            Path(file).write_text(out)


def compress(arguments: list[str]) -> tuple[int, str, str]:
    """Run a command line: exit code, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = execute(arguments)
    return code, out.getvalue(), err.getvalue()


def parse(arguments: list[str]) -> None:
    """Check a command line's flags without doing anything."""
    group: Any = typer.main.get_command(app)
    group.commands[arguments[0]].make_context(arguments[0], list(arguments[1:]))
