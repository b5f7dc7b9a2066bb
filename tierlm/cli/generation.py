"""What ``run`` and ``chat`` share: loading with a progress bar, sampling, printing pieces, statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from typer import Option

from tierlm.cli.interrupts import importing
from tierlm.cli.output import pairs, progress
from tierlm.config import Budget, LoadOptions, SamplingParams

if TYPE_CHECKING:
    from tierlm.answer import Piece
    from tierlm.llm import LLM
    from tierlm.stats import Stats

ShowStats = Annotated[bool, Option("--stats", help="Print transfers, hit rates and waiting times.")]
System = Annotated[str | None, Option(metavar="TEXT", help="An instruction before the conversation.")]


def load(model: str, budget: Budget, options: LoadOptions, quiet: bool = False) -> LLM:
    """Load the model, with a progress bar."""
    with importing():
        from tierlm.llm import LLM

    with progress("loading", quiet) as update:
        return LLM.load(model, budget=budget, progress=update, **options)


def sampling(llm: LLM, given: Mapping[str, Any], quiet: bool) -> SamplingParams:
    """The sampling that the model's authors recommend, except for what the user has given. Says what it is."""
    plain, recommended = vars(SamplingParams()), vars(llm.default_params)
    used = {name: value for name, value in recommended.items() if value != plain[name] and name not in given}
    if used and not quiet:
        note("sampling, as the model recommends: " + ", ".join(f"{name} {value}" for name, value in used.items()))
    return replace(llm.default_params, **given)


def show(pieces: Iterator[Piece], quiet: bool = False) -> tuple[str, list[int], str]:
    """Print pieces as they come. Returns text, ids and finish reason ("interrupted" after Ctrl-C)."""
    text, ids, reason = "", list[int](), "interrupted"
    with closing(pieces):  # type: ignore[type-var]
        try:
            for piece in pieces:
                text += piece.text
                ids += piece.ids
                reason = piece.finish_reason or reason
                if not quiet:
                    print(piece.text, end="", flush=True)
        except KeyboardInterrupt:
            note("\ninterrupted")
    if not quiet:
        print(flush=True)
    return text, ids, reason


def note(text: str) -> None:
    """A dim line on standard error."""
    Console(stderr=True).print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def print_stats(stats: Stats) -> None:
    Console(stderr=True).print(pairs(stats.rows(), "what it took"))
