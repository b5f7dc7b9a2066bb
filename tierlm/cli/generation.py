"""What ``run`` and ``chat`` share: loading with a progress bar, printing pieces, statistics."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from typer import Option

from tierlm.cli.interrupts import importing
from tierlm.cli.output import pairs, progress
from tierlm.config import Budget, LoadOptions

if TYPE_CHECKING:
    from tierlm.llm import LLM, Piece
    from tierlm.stats import Stats

ShowStats = Annotated[bool, Option("--stats", help="Print transfers, hit rates and waiting times.")]


def load(model: str, budget: Budget, options: LoadOptions, quiet: bool = False) -> LLM:
    """Load the model, with a progress bar."""
    with importing():
        from tierlm.llm import LLM

    with progress("loading", quiet) as update:
        return LLM.load(model, budget=budget, progress=update, **options)


def show(pieces: Iterable[Piece], quiet: bool = False) -> tuple[str, list[int], str]:
    """Print pieces as they come. Returns text, ids and finish reason ("interrupted" after Ctrl-C)."""
    text, ids, reason = "", list[int](), "interrupted"
    try:
        for piece in pieces:
            text += piece.text
            ids += piece.ids
            reason = piece.finish_reason or reason
            if not quiet:
                print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once
        Console(stderr=True).print("\n[dim]interrupted[/dim]")
    if not quiet:
        print(flush=True)
    return text, ids, reason


def print_stats(stats: Stats) -> None:
    Console(stderr=True).print(pairs(stats.rows(), "what it took"))
