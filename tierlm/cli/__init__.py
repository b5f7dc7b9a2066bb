"""The command line: a client of the public API. Exit codes: 0 success, 1 failure, 2 wrong usage."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

from tierlm.cli.interrupts import importing

with importing():
    import typer
    from rich.console import Console
    from rich.text import Text
    from typer import Option

    from tierlm.cli.chat import chat
    from tierlm.cli.command import Command, CommandGroup, Misuse, explain
    from tierlm.cli.health import doctor
    from tierlm.cli.measuring import profile
    from tierlm.cli.packing import pack, verify
    from tierlm.cli.planning import plan
    from tierlm.cli.run import run
    from tierlm.cli.serve import serve
    from tierlm.cli.settings import PREFIX, read_config
    from tierlm.cli.top import top
    from tierlm.cli.tracing import simulate, trace
    from tierlm.errors import TierlmError, UsageError

INTERRUPTED = 130  # typer's exit code for Ctrl-C
SETTINGS = (
    "Every option can also be set by a variable, such as TIERLM_RUN_RAM=8GiB, or in ~/.config/tierlm/config.toml: "
    "a table for each command, such as \\[run], with the names of its options. `tierlm doctor` shows what is set."
)

app = typer.Typer(
    cls=CommandGroup,
    epilog=SETTINGS,
    context_settings={"auto_envvar_prefix": PREFIX},
    pretty_exceptions_enable=False,
)
for panel, commands in {
    "Text": (run, chat, serve, top),
    "Models and machines": (plan, profile, doctor, pack, verify),
    "Caching and prefetching": (simulate,),
}.items():
    for command in commands:
        app.command(cls=Command, rich_help_panel=panel)(command)
app.add_typer(trace, name="trace", rich_help_panel="Caching and prefetching")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata  # slow to import

        print(f"tierlm {metadata.version('tierlm')}")
        raise typer.Exit


Version = Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Show the version.")]


@app.callback()
def options(context: typer.Context, version: Version = False) -> None:
    """Run mixture-of-experts language models that are larger than memory, within a budget you set."""
    context.default_map = read_config(context.command)


def main() -> None:
    """The console script. An error becomes one line and its exit code, a warning one line."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        try:
            code = app(standalone_mode=False)
        finally:
            print(end="", flush=True)  # what is buffered may not fit the disk
    except TierlmError as error:
        _fail(error)
    except Misuse as misuse:
        _fail(explain(misuse))
    except typer.Abort:
        _fail(UsageError("standard input ended where the command needed more"))
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # the reader closed the pipe
            what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            Console(stderr=True).print("[red]error:[/red]", Text(what), soft_wrap=True)
        try:
            print(end="", flush=True)
        except OSError:  # Python tries again when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    else:
        if code == INTERRUPTED:
            Console(stderr=True).print("interrupted")
        sys.exit(1 if code == INTERRUPTED else code)


def _fail(error: TierlmError) -> None:
    Console(stderr=True).print(f"[red]error:[/red] {type(error).__name__}:", Text(str(error)), soft_wrap=True)
    sys.exit(error.exit_code)
