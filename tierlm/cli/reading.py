"""A user's messages at the prompt: several lines, history, and Ctrl-C that only clears the line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from tierlm.cli.generation import note
from tierlm.files import user_cache, write_whole

BLOCK = '"""'  # opens and closes a message of several lines
REMEMBERED = 1000  # lines of history

T = TypeVar("T")


class Interrupts:
    """Ctrl-C as a KeyboardInterrupt inside ``during`` only; at other times it does nothing, so that a second one cannot
    end what the first one interrupted."""

    def __init__(self) -> None:
        self.armed = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        before = signal.signal(signal.SIGINT, self.interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def during(self, work: Callable[[], T]) -> T:
        """Do ``work``, which may raise KeyboardInterrupt, once."""
        self.armed = True
        try:
            return work()
        finally:
            self.armed = False

    def interrupt(self, *_: object) -> None:
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt


def read_message(interrupts: Interrupts) -> str | None:
    """The user's next message, not empty; None at the end of the input.

    A backslash at the end of a line, or three quotes around several lines, continue it. Ctrl-C clears it.
    """
    while True:
        try:
            message = interrupts.during(_read).strip()
        except KeyboardInterrupt:
            print()
            note("Ctrl-D ends the chat")
            continue
        except EOFError:
            print()
            return None
        if message:
            return message


def _read() -> str:
    line = input("> ")
    if line.lstrip().startswith(BLOCK):
        lines = [line.lstrip().removeprefix(BLOCK)]
        while not lines[-1].rstrip().endswith(BLOCK):
            lines.append(input(". "))
        return "\n".join(lines).rstrip().removesuffix(BLOCK)
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input(". ")
    return line


@contextmanager
def history() -> Iterator[None]:
    """Line editing with the lines of earlier chats, if stdin is a terminal. They are kept in the user's cache folder,
    for the user alone."""
    folder = user_cache()
    if not sys.stdin.isatty() or folder is None:
        yield
        return
    try:
        import readline
    except ImportError:  # Python was built without it
        yield
        return
    file = folder / "chat-history"
    with suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        count = readline.get_current_history_length()
        lines = [readline.get_history_item(at + 1) for at in range(max(0, count - REMEMBERED), count)]
        with suppress(OSError):
            write_whole(file, "".join(f"{line}\n" for line in lines))
            file.chmod(0o600)
