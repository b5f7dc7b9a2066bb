"""A bar that shows how far the prompt of a request is: in a terminal, and in a notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from tierlm.config import format_size
from tierlm.memory.ticket import DISK

if TYPE_CHECKING:
    from tierlm.llm import LLM


@contextmanager
def prefill_bar(llm: LLM, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar for ``on_prefill``, with tokens, bytes read from disk, and remaining time. It goes with the first token.

    ::

        with prefill_bar(llm) as bar:
            for piece in llm.stream(prompt, on_prefill=bar):
                print(piece.text, end="")
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    def read() -> int:
        return links[DISK].bytes if DISK in (links := llm.stats().links) else 0

    def update(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total, read=format_size(read() - before))
        if done == total:
            bar.stop()

    before, console = read(), Console(stderr=True)
    columns = (TextColumn("prompt"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens, {task.fields[read]} read"))
    shown = not quiet and (console.is_terminal or console.is_jupyter)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("", total=None, read=format_size(0))
        yield update
