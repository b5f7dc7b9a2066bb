"""``tierlm run`` and ``tierlm chat``: text from a model."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from typer import Option

from tierlm.cli.options import Loading, Memory, Model, Sampling, grouped
from tierlm.cli.output import STDOUT, emit, pairs, progress
from tierlm.config import Budget, LoadOptions, SamplingParams
from tierlm.errors import UsageError

if TYPE_CHECKING:
    from tierlm.llm import LLM, Piece
    from tierlm.stats import Stats

ShowStats = Annotated[bool, Option("--stats", help="Print transfers, hit rates and waiting times.")]
Json = Annotated[
    Path | None, Option("--json", help="Write result and statistics to a file; '-': to stdout, without other output.")
]


@grouped
def run(
    model: Model,
    *,
    prompt: Annotated[str, Option("--prompt", "-p", help="The prompt; '-' reads it from standard input.")],
    budget: Annotated[Budget, Memory()],
    params: Annotated[SamplingParams, Sampling()],
    options: Annotated[LoadOptions, Loading()],
    stats: ShowStats = False,
    json_file: Json = None,
) -> None:
    """Continue a prompt and print the text as it is generated. Ctrl-C stops and keeps the text so far."""
    if json_file not in (None, STDOUT) and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise UsageError(f"{json_file}: cannot be written: expected a file in an existing folder")
    if prompt == "-":
        prompt = sys.stdin.read()
    quiet = json_file == STDOUT
    with _load(model, budget, options, quiet) as llm:
        text, ids, reason = _show(llm.stream(prompt, params), quiet)
        if stats:
            _print_stats(llm.stats())
        if json_file is not None:
            result = {"model": model, "prompt": prompt, "text": text, "ids": ids, "finish_reason": reason}
            emit(result | {"stats": llm.stats().as_json()}, json_file)


@grouped
def chat(
    model: Model,
    *,
    system: Annotated[str | None, Option(help="An instruction before the conversation.")] = None,
    budget: Annotated[Budget, Memory()],
    params: Annotated[SamplingParams, Sampling(max_new_tokens=512)],
    options: Annotated[LoadOptions, Loading()],
    stats: ShowStats = False,
) -> None:
    """Chat with a model through its chat template. Ctrl-C ends an answer; Ctrl-D or an empty line ends the chat."""
    messages = [{"role": "system", "content": system}] if system else []
    with _load(model, budget, options) as llm:
        while line := _ask():
            messages.append({"role": "user", "content": line})
            text, _, _ = _show(llm.chat(messages, params))
            messages.append({"role": "assistant", "content": text})
        if stats:
            _print_stats(llm.stats())


def _load(model: str, budget: Budget, options: LoadOptions, quiet: bool = False) -> LLM:
    """Load the model, with a progress bar."""
    from tierlm.llm import LLM

    with progress("loading", quiet) as update:
        return LLM.load(model, budget=budget, progress=update, **options)


def _show(pieces: Iterable[Piece], quiet: bool = False) -> tuple[str, list[int], str]:
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


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return ""


def _print_stats(stats: Stats) -> None:
    Console(stderr=True).print(pairs(stats.rows(), "what it took"))
