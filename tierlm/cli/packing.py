"""``tierlm pack`` and ``tierlm verify``: a checkpoint as a packed store, and whether one is what it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from tierlm.cli.generation import Model
from tierlm.config import format_size

Experts = Annotated[str, typer.Option(help="Format of the routed experts: int4, int8, fp8, bf16, f16, f32, or keep.")]
Trunk = Annotated[str, typer.Option(help="Format of attention, shared and dense MLPs, and lm_head; as for experts.")]
Codec = Annotated[str, typer.Option(help="none; zstd: floats, without loss; auto: zstd if it keeps up with the disk.")]


def pack(
    model: Model,
    out: Annotated[Path, typer.Argument(help="A new folder for the packed store.")],
    experts: Experts = "int4",
    trunk: Trunk = "int8",
    codec: Codec = "none",
) -> None:
    """Write a model as a packed store: one aligned, checksummed read an expert, in fewer bits if you like.

    The model's own files are only read. When interrupted, the same command goes on where it was.
    """
    from tierlm.checkpoints.hub import find_model
    from tierlm.models.packing import pack_model

    console = Console(stderr=True)

    def say(what: str) -> None:
        console.print(Text(what))

    try:
        with _progress("packing", console) as progress:
            pack_model(find_model(model), out, experts=experts, trunk=trunk, codec=codec, progress=progress, say=say)
    except KeyboardInterrupt:
        console.print("[dim]interrupted; what is finished is kept: the same command goes on from there[/dim]")
        raise typer.Exit(1) from None
    size = sum(file.stat().st_size for file in out.iterdir())
    console.print(Text(f"{out}: {format_size(size)}"))


def verify(model: Model) -> None:
    """Read all files of a model: a packed store's records are compared with their checksums.

    Exit code 1 if anything is wrong; each damaged record is named.
    """
    from tierlm.checkpoints.hub import find_model
    from tierlm.checkpoints.verify import damage
    from tierlm.models.catalog import Catalog

    console = Console(stderr=True)
    catalog = Catalog(find_model(model))
    with _progress("verifying", console) as progress:
        problems = list(damage(catalog.checkpoint.headers, progress))
    for problem in problems:
        console.print("[red]error:[/red]", Text(str(problem)), soft_wrap=True)
    if problems:
        raise typer.Exit(1)
    sealed = catalog.sealed
    what = "all records are what was packed" if sealed else "all tensors can be read; the files have no checksums"
    console.print(Text(f"{catalog.checkpoint.folder}: {len(catalog.files)} files; {what}"))


@contextmanager
def _progress(what: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar with speed and remaining time, on a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn(what),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
