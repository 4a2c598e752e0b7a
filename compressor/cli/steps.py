"""`compress export`, `bench` and `report`: the steps of a run, each on its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compressor.cli.terminal import Terminal, plain_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from compressor.cli.benchmark import Measurement

__all__ = ["bench", "export", "report"]

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a finished run.")]


def export(
    context: typer.Context,
    run: RunArgument,
    target: Annotated[
        list[str] | None, typer.Option("--target", "-t", metavar="NAME|FILE", help="Target; the run's own by default.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Another student of the same training: keep=0.5."),
    ] = None,
) -> None:
    """Export a run's student again: to other targets, or in another size without training."""
    from compressor import pipeline
    from compressor.log import Log
    from compressor.recipe_resolution import parse_settings

    terminal: Terminal = context.obj
    log = Log(quiet=terminal.json_output)
    try:
        made = pipeline.export_run(run, list(target or ()), parse_settings(settings or ()), log)
    finally:
        log.close()
    paths = [str(path) for path in made]
    terminal.show({"artifacts": paths}, lambda console: _print_lines(console, paths))


def bench(
    context: typer.Context,
    artifacts: Annotated[
        list[Path],
        typer.Argument(
            metavar="ARTIFACT...", help="Artifact folders, bundles, runs (all their artifacts), .onnx or .xml files."
        ),
    ],
    batch: Annotated[list[int] | None, typer.Option(metavar="N", min=1, help="Batch size; repeatable.")] = None,
    seconds: Annotated[float, typer.Option(metavar="S", min=0.01, help="Time for each batch size.")] = 10.0,
    rounds: Annotated[int, typer.Option(metavar="N", min=3, help="Rounds; all candidates run in each.")] = 20,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="Threads of one inference.")] = None,
    size: Annotated[
        list[str] | None, typer.Option(metavar="AXIS=N", help="Size of another free axis, e.g. height=224.")
    ] = None,
) -> None:
    """Measure the latency of artifacts side by side, interleaved; the first one is the reference."""
    from compressor.cli.benchmark import measure_artifacts, parse_sizes

    options = {} if threads is None else {"threads": threads}
    measured = measure_artifacts(
        artifacts,
        batches=batch or [1, 8],
        seconds=seconds,
        rounds=rounds,
        options=options,
        sizes=parse_sizes(size or ()),
    )
    terminal: Terminal = context.obj
    terminal.show(measured.as_json(), lambda console: _print_measurement(console, measured))


def report(context: typer.Context, run: RunArgument) -> None:
    """Write a run's report again and print its path."""
    from compressor import pipeline

    path = pipeline.report_run(run)
    terminal: Terminal = context.obj
    terminal.show({"report": str(path)}, lambda console: _print_lines(console, [str(path)]))


def _print_lines(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _print_measurement(console: Console, measured: Measurement) -> None:
    from rich.text import Text

    table = plain_table("batch", "artifact", "p50 ms", "p90 ms", "p99 ms", "per second", "times faster", "notes")
    for row in measured.rows:
        figures = [f"{value:.3f}" for value in (row.latency.p50, row.latency.p90, row.latency.p99)]
        ratio = row.speedup
        faster = "reference" if ratio is None else f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        cells = [
            str(row.batch),
            row.name,
            *figures,
            f"{row.latency.throughput(row.batch):.1f}",
            faster,
            row.latency.reason,
        ]
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    console.print(_facts_table(measured))
    if measured.thread_note():
        console.print(measured.thread_note(), markup=False, soft_wrap=True)
    for name, reason in measured.skipped:
        console.print(f"not measured: {name}: {reason}", markup=False, soft_wrap=True)


def _facts_table(measured: Measurement) -> Table:
    """How each candidate starts, how big it is, and with how many threads it ran."""
    from rich.text import Text

    table = plain_table("artifact", "threads", "load ms", "first call ms", "MB")
    for name, facts in measured.facts.items():
        threads = f"{facts['threads']:.0f}" if facts["threads"] else "the engine's choice"
        times = [f"{facts[key]:.1f}" if key in facts else "" for key in ("load_ms", "first_ms")]
        table.add_row(*(Text(cell) for cell in (name, threads, *times, f"{facts['bytes'] / 1e6:.2f}")))
    return table
