"""The entry point: subcommands, and errors as one or two lines with the right exit code."""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any

import typer

from sparse_engine import __version__
from sparse_engine.__main__ import EXIT_INTERRUPTED
from sparse_engine.errors import SparseEngineError

from . import bench, build, calibrate, doctor, export_triton, inspect, sample, samplers, tune, verify
from .terminal import errors

# Typer brings click inside itself, or imports it, by version; the base of a usage error is the same class either way.
ClickException: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="sparse-engine",
    help="Inference engines for 2:4-sparse diffusion models (SparseDM).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for module in (build, calibrate, inspect, sample, verify, bench, export_triton, samplers, tune, doctor):
    app.command(module.__name__.rpartition(".")[2].replace("_", "-"))(module.command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sparse-engine {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and log what happens.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if debug:
        logging.basicConfig(level=logging.DEBUG, format="%(levelname)s %(name)s: %(message)s")


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command line with the given arguments and return the exit code."""
    try:
        result = app(arguments, prog_name="sparse-engine", standalone_mode=False)
        if result == EXIT_INTERRUPTED:  # some versions of Typer swallow the interrupt
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except SparseEngineError as error:
        if "--debug" in arguments:
            raise
        _say(error.what, error.fix)
        return error.exit_code
    except ClickException as error:
        words = " ".join(error.format_message().split())
        if not words:  # help that was shown for want of arguments
            error.show()
            return int(error.exit_code)
        context = getattr(error, "ctx", None)
        _say(words, f"see {context.command_path if context else 'sparse-engine'} --help")
        return int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        errors.print("interrupted; nothing half-written was left behind")
        return EXIT_INTERRUPTED
    except MemoryError as error:
        _say(f"out of memory: {error}", "ask for fewer samples or steps at a time, or a smaller batch")
        return 1
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return 0


def _say(what: str, fix: str | None) -> None:
    """An error, in the two lines that all errors have."""
    errors.print(f"error: {what}", style="bold red", markup=False, highlight=False)
    if fix:
        errors.print(f"fix: {fix}", markup=False, highlight=False)
