"""The command line: a client of the public API. Exit codes: 0 success, 1 failure, 2 wrong usage."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text
from typer import Option

from tierlm.cli.chat import chat
from tierlm.cli.health import doctor
from tierlm.cli.measuring import profile
from tierlm.cli.packing import pack, verify
from tierlm.cli.planning import plan
from tierlm.cli.run import run
from tierlm.cli.tracing import simulate, trace
from tierlm.errors import TierlmError

INTERRUPTED = 130  # typer's exit code for Ctrl-C

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (run, chat, plan, profile, doctor, pack, verify, simulate):
    app.command()(command)
app.add_typer(trace, name="trace")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata  # slow to import

        print(f"tierlm {metadata.version('tierlm')}")
        raise typer.Exit


Version = Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Show the version.")]


@app.callback()
def options(version: Version = False) -> None:
    """Run mixture-of-experts language models that are larger than memory, within a budget you set."""


def main() -> None:
    """The console script. A TierlmError becomes one line and its exit code."""
    try:
        app()
    except TierlmError as error:
        Console(stderr=True).print(f"[red]error:[/red] {type(error).__name__}:", Text(str(error)), soft_wrap=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        Console(stderr=True).print("[red]error:[/red]", Text(what), soft_wrap=True)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code != INTERRUPTED:
            raise
        Console(stderr=True).print("interrupted")
        sys.exit(1)
