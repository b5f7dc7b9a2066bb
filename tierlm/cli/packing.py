"""``tierlm pack`` and ``tierlm verify``: write and check a packed store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text
from typer import Argument, Option

from tierlm.cli.options import Json, Model, Quiet
from tierlm.cli.output import progress, report
from tierlm.config import Budget, format_size

EXPERTS, TRUNK = "int4", "int8"
Experts = Annotated[
    str, Option(metavar="FORMAT", help="Of the routed experts: int4, int8, fp8, bf16, f16, f32, or keep.")
]
Trunk = Annotated[
    str, Option(metavar="FORMAT", help="Of attention, shared and dense MLPs, and lm_head; like --experts.")
]
Ram = Annotated[
    str, Option(metavar="SIZE", help="Memory of the whole process, e.g. 2GiB; auto: most of the free memory.")
]
Codec = Annotated[
    str, Option(metavar="NAME", help="none; zstd: lossless, floats only; auto: zstd if it keeps up with the disk.")
]


def pack(
    model: Model,
    out: Annotated[Path, Argument(metavar="FOLDER", help="A new folder for the packed store.")],
    experts: Experts = EXPERTS,
    trunk: Trunk = TRUNK,
    codec: Codec = "none",
    ram: Ram = "auto",
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Write a model as a packed store: each expert is one aligned, checksummed read, quantised if you choose.

    The model's own files are not changed. After an interruption, the same command continues where it stopped.
    """
    from tierlm.checkpoints.hub import find_model
    from tierlm.models.packing import pack_model

    console, limit = Console(stderr=True), Budget(ram).ram

    def say(what: str) -> None:
        if not quiet:
            console.print(Text(what))

    try:
        with progress("packing", quiet) as update:
            pack_model(
                find_model(model), out, experts=experts, trunk=trunk, codec=codec, ram=limit, progress=update, say=say
            )
    except KeyboardInterrupt:
        console.print("[dim]interrupted; finished files are kept: the same command continues from there[/dim]")
        raise typer.Exit(1) from None
    size = sum(file.stat().st_size for file in out.iterdir())
    say(f"{out}: {format_size(size)}")
    report({"folder": out, "bytes": size}, json)


def verify(model: Model, json: Json = None, quiet: Quiet = False) -> None:
    """Read all files of a model, and verify the checksums of a packed store.

    Names each damaged record. Exit code 1 if anything is wrong.
    """
    from tierlm.checkpoints.hub import find_model
    from tierlm.checkpoints.verify import damage
    from tierlm.models.catalog import Catalog

    console = Console(stderr=True)
    catalog = Catalog(find_model(model))
    with progress("verifying", quiet) as update:
        problems = list(damage(catalog.checkpoint, update))
    for problem in problems:
        console.print("[red]error:[/red]", Text(str(problem)), soft_wrap=True)
    found = {"folder": catalog.checkpoint.path, "files": len(catalog.files), "checksums": catalog.sealed}
    report(found | {"damage": [str(problem) for problem in problems]}, json)
    if problems:
        raise typer.Exit(1)
    what = "all checksums match" if catalog.sealed else "all tensors can be read; the files have no checksums"
    if not quiet:
        console.print(Text(f"{catalog.checkpoint.path}: {len(catalog.files)} files; {what}"))
