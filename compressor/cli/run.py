"""`compress run`: the whole pipeline, or with ``--dry-run`` its plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compressor.cli.targets import target_rows, targets_table
from compressor.cli.terminal import Terminal

if TYPE_CHECKING:
    from rich.console import Console

    from compressor.recipe import Recipe

__all__ = ["run"]

WHAT, HOW, WHERE = "What", "How", "Where"


def run(
    context: typer.Context,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", metavar="NAME", help="Method; again for a chain.", rich_help_panel=WHAT),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", metavar="NAME|FILE", help="Target; repeatable.", rich_help_panel=WHAT),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(metavar="[ROLE=]SPEC", help="Teacher, e.g. diffusers:DIR; repeatable.", rich_help_panel=WHAT),
    ] = None,
    student: Annotated[
        list[str] | None,
        typer.Option(metavar="[ROLE=]SPEC", help="Student, where the method lets you choose.", rich_help_panel=WHAT),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="[ROLE=]SPEC", help="Data, e.g. digits or imagefolder:DIR.", rich_help_panel=WHAT),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="2:4, 0.8 or block:32x32:0.8.", rich_help_panel=WHAT),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", "-r", metavar="FILE", help="YAML recipe; flags go over it.", rich_help_panel=WHAT),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Any key, e.g. keep=0.4.", rich_help_panel=HOW),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="Steps, for methods with one training phase.", rich_help_panel=HOW),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(metavar="FACTOR", help="Scales the steps of every phase.", rich_help_panel=HOW),
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of everything.", rich_help_panel=HOW)] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:N, mps or xpu.", rich_help_panel=HOW),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Accuracy that int8 and fp8 may lose, e.g. 0.01.", rich_help_panel=HOW),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Run directory; made of the recipe.", rich_help_panel=WHERE),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan; do nothing.", rich_help_panel=WHERE)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove what another recipe left in --out.", rich_help_panel=WHERE)
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let model folders run their code.", rich_help_panel=HOW)
    ] = False,
) -> None:
    """Distil, export and measure. The same command again goes on where it was stopped.

    compress run --method ppcl --target trt-fp16
    """
    from compressor.recipe import Recipe
    from compressor.recipe_resolution import Flags

    flags = Flags(
        methods=method or (),
        targets=target or (),
        teachers=teacher or (),
        students=student or (),
        data=data or (),
        sparsity=sparsity,
        steps=steps,
        budget=budget,
        seed=seed,
        device=device,
        trust_remote_code=trust_remote_code or None,
        max_drop=max_drop,
        settings=settings or (),
    )
    resolved = (Recipe.from_yaml(recipe) if recipe is not None else Recipe()).resolve(flags)
    directory = out if out is not None else resolved.default_directory()
    terminal: Terminal = context.obj
    if dry_run:
        _show_plan(terminal, resolved, directory)
    else:
        _run(terminal, resolved, directory, overwrite)


def _run(terminal: Terminal, recipe: Recipe, directory: Path, overwrite: bool) -> None:
    from compressor import pipeline
    from compressor.log import Log

    log = Log(quiet=terminal.json_output)
    try:
        report = pipeline.run(recipe, directory, overwrite=overwrite, log=log)
    except KeyboardInterrupt:
        if log.leads:
            typer.echo(f"interrupted: what is done is kept in {directory}; the same command goes on", err=True)
        raise typer.Exit(130) from None
    finally:
        log.close()
    if log.leads:
        # people have read it in the log's last line
        terminal.show({"run": str(directory), "report": str(report)}, lambda console: None)


def _show_plan(terminal: Terminal, recipe: Recipe, directory: Path) -> None:
    from compressor import pipeline
    from compressor.chain import chain_lines
    from compressor.log import process_rank

    stages = pipeline.plan(recipe)
    if process_rank():
        return
    rows = target_rows(recipe.load_targets())
    chain = chain_lines(recipe)
    value: dict[str, Any] = {"directory": str(directory), "recipe": recipe.to_dict(), "chain": chain}
    value |= {"stages": stages, "targets": rows}

    def render(console: Console) -> None:
        console.print(recipe.to_yaml(), markup=False, soft_wrap=True)
        if chain:
            console.print("Chain", style="bold")
        for line in chain:
            console.print(f"  {line}", markup=False, soft_wrap=True)
        console.print("Stages", style="bold")
        for place, stage in enumerate(stages, 1):
            console.print(f"  {place}. {stage}", markup=False)
        console.print()
        console.print(targets_table(rows))
        console.print(f"\nrun directory: {directory}", markup=False, soft_wrap=True)

    terminal.show(value, render)
