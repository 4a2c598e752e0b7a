"""The `compress` command. Nothing heavy is imported here or in the modules of the commands: ``--help`` is instant."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from compressor import __version__
from compressor.cli import catalogue, deploy, doctor, run, steps, targets
from compressor.cli.terminal import Terminal, tell_error
from compressor.errors import CompressorError, RequestError
from compressor.log import process_rank

__all__ = ["app", "execute", "main"]

GLOBAL_FLAGS = ("--json", "--debug")
INTERRUPTED = 130

TRAINING_PACKAGES = (
    "accelerate", "diffusers", "matplotlib", "onnx", "onnxscript", "PIL", "safetensors", "scipy", "sklearn", "timm",
    "torch", "torchvision", "transformers",
)  # fmt: skip
"""Modules that `pip install 'compressor[train]'` brings."""

app = typer.Typer(
    name="compress",
    help="Distil a vision model with a published method, export it, and measure what came out.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("run", rich_help_panel="Run")(run.run)
app.command("export", rich_help_panel="Steps on their own")(steps.export)
app.command("bench", rich_help_panel="Steps on their own")(steps.bench)
app.command("report", rich_help_panel="Steps on their own")(steps.report)
app.command("bundle", rich_help_panel="Steps on their own")(deploy.bundle)
app.command("infer", rich_help_panel="Steps on their own")(deploy.infer)
app.command("methods", rich_help_panel="What there is")(catalogue.methods)
app.command("targets", rich_help_panel="What there is")(targets.targets)
app.command("recipe", rich_help_panel="What there is")(catalogue.recipe)
app.command("doctor", rich_help_panel="What there is")(doctor.doctor)


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON; with every command.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Print the traceback of an error; with every command.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Distil a vision model with a published method, export it, and measure what came out."""
    if version:
        print(f"compressor {__version__}")
        raise typer.Exit
    context.obj = Terminal(json_output=json_output, debug=debug)
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


def execute(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code: 0 done, 1 failed, 2 the request was wrong, 130 interrupted."""
    arguments, flags = _global_flags_first(arguments)
    try:
        command = typer.main.get_command(app)
        result = command.main(args=arguments, prog_name="compress", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:  # `compress methods | head`
        sys.stderr.close()
        return 1
    except Exception as error:
        if "--debug" in flags:
            traceback.print_exc()
        return _explain(error, json_output="--json" in flags)


def main() -> None:
    """Entry point of `compress` and of ``python -m compressor``."""
    sys.exit(execute(sys.argv[1:]))


def _global_flags_first(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Move the flags that belong to every command to where the parser looks for them."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    flags = [flag for flag in GLOBAL_FLAGS if flag in arguments[:end]]
    rest = [argument for argument in arguments[:end] if argument not in GLOBAL_FLAGS]
    return [*flags, *rest, *arguments[end:]], flags


def _explain(error: Exception, *, json_output: bool) -> int:
    """Print an error as one line; return its exit code."""
    process = process_rank()
    kind, message, exit_code = type(error).__name__, str(error), 1
    if isinstance(error, CompressorError):
        exit_code = error.exit_code
        if process and isinstance(error, RequestError):
            return exit_code  # all processes find the same; the first one says it
    elif isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in TRAINING_PACKAGES:
        message = f"this needs the package {error.name!r}: pip install 'compressor[train]'"
    elif callable(usage := getattr(error, "format_message", None)):  # the parser's own errors
        kind, exit_code = "UsageError", getattr(error, "exit_code", 2)
        message = f"{usage()} {_where_help_is(error)}"
    else:
        message = f"unexpected {kind}: {message or 'no message'} (run again with --debug for the traceback)"
    tell_error(message, kind, exit_code, json_output=json_output, process=process)
    return exit_code


def _where_help_is(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return f"(see {context.command_path} --help)" if context is not None else "(see compress --help)"
