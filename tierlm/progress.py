"""Bars of what an answer waits for, the prompt and weights that still arrive: in a terminal, and in a notebook."""

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
    """A bar for ``on_prefill``, with tokens, bytes read from disk, and remaining time. While weights arrive from the
    Hub, a second one, with their bytes and speed. Both go with the first token.

    ::

        with prefill_bar(llm) as bar:
            for piece in llm.stream(prompt, on_prefill=bar):
                print(piece.text, end="")
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    def update(done: int, total: int) -> None:
        stats = llm.stats()
        read = format_size((stats.links[DISK].bytes if DISK in stats.links else 0) - before)
        bar.update(prompt, completed=done, total=total, found=f"{done}/{total} tokens, {read} read")
        if stats.arrived is not None:
            here, every = stats.arrived
            speed = (bar.tasks[weights].speed or 0) / 1e9
            found = f"{format_size(here)} of {format_size(every)}, {speed:.2f} GB/s"
            bar.update(weights, completed=here, total=every, visible=here < every, found=found)
        if done == total:
            bar.stop()

    links, console = llm.stats().links, Console(stderr=True)
    before = links[DISK].bytes if DISK in links else 0
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[found]}"), TimeRemainingColumn())
    shown = not quiet and (console.is_terminal or console.is_jupyter)
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        prompt = bar.add_task("prompt", total=None, found="")
        weights = bar.add_task("weights", total=None, visible=False, found="")
        yield update
