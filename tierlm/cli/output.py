"""Output of commands: JSON for programs, tables and progress bars for people, a log for the curious."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, RenderableType
from rich.table import Table

from tierlm.errors import StorageError
from tierlm.files import write_whole

STDOUT = Path("-")


def report(found: Mapping[str, object], file: Path | None, *tables: RenderableType) -> None:
    """Print ``tables``, and write ``found`` as JSON to ``file``, if given; to standard output goes only one of them.
    Raises UsageError."""
    if file != STDOUT:
        console = Console(emoji=False)  # emoji tables are slow to load
        for table in tables:
            console.print(table)
    if file is not None:
        emit(found, file)


def emit(found: Mapping[str, object], file: Path = STDOUT) -> None:
    """Write ``found`` as JSON to a file or to standard output. Raises StorageError."""
    text = json.dumps(found, indent=1, default=str)
    if file == STDOUT:
        print(text)
        return
    with writing(file):
        write_whole(file, text + "\n")


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turn an OSError into a StorageError that names ``file``."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{file}: cannot be written: {error.strerror or error}", file=str(file)) from error


def pairs(rows: Iterable[tuple[str, object]], title: str | None = None) -> Table:
    """A table of names and values."""
    table = Table(show_header=False, title=title, title_justify="left", box=None)
    for name, value in rows:
        table.add_row(name, str(value))
    return table


def log_to_stderr() -> None:
    """Print what the library logs, with the milliseconds since the start."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(relativeCreated)7.0f ms  %(message)s"))
    logger = logging.getLogger("tierlm")
    logger.handlers = [handler]
    logger.setLevel(logging.DEBUG)


@contextmanager
def progress(what: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar in bytes, with speed and remaining time, if stderr is a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    size = DownloadColumn(binary_units=True)
    columns = (TextColumn(what), BarColumn(), size, TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
