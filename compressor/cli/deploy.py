"""`compress bundle` and `compress infer`: from a run to one file, and what that file's model says of a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compressor.cli.terminal import Terminal, plain_table

if TYPE_CHECKING:
    from rich.console import Console

    from compressor.cli.inference import Answer

__all__ = ["bundle", "infer"]


def bundle(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a finished run, or an artifact's folder.")],
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", metavar="NAME", help="Artifact of the run; needed where there are several."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="RUN-TARGET.zip in this folder by default.")
    ] = None,
) -> None:
    """Pack an artifact with all that an app needs into one .zip."""
    from compressor.cli.bundling import bundle_run

    path, manifest = bundle_run(run, target, out)
    size = path.stat().st_size
    value = {"bundle": str(path), "bytes": size, "manifest": manifest.model_dump(mode="json", exclude={"metadata"})}
    terminal: Terminal = context.obj
    terminal.show(value, lambda console: console.print(f"{path}", markup=False, soft_wrap=True))


def infer(
    context: typer.Context,
    model: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="A bundle (.zip), an artifact's folder, or a run with one.")
    ],
    pictures: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[IMAGE]...", help="Pictures, or folders of them, for a model that takes them."),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", "-l", metavar="NAME|N", help="What a generator shall draw; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the noise.")] = 0,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Labels to print for each picture.")] = 5,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where pictures and arrays are written.")
    ] = Path(),
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="Threads of one inference.")] = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", metavar="NAME", help="Artifact, where a run is given.")
    ] = None,
) -> None:
    """Run a bundle's model once: print labels, or write pictures."""
    from compressor.cli.inference import run_model

    options = {} if threads is None else {"threads": threads}
    answers = run_model(
        model, pictures or [], labels=label or [], seed=seed, top=top, out=out, options=options, target=target
    )
    terminal: Terminal = context.obj
    terminal.show({"answers": [answer.as_json() for answer in answers]}, lambda console: _print(console, answers))


def _print(console: Console, answers: list[Answer]) -> None:
    from rich.text import Text

    rows: list[tuple[Any, ...]] = [
        (a.asked, label.name, f"{label.probability:.4f}") for a in answers for label in a.labels
    ]
    if rows:
        table = plain_table("picture", "label", "probability")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    for answer in answers:
        for path in answer.files:
            console.print(str(path), markup=False, soft_wrap=True)
