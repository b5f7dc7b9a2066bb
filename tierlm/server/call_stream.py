"""Splits an answer into text and calls of functions, as it comes."""

from __future__ import annotations

from collections.abc import Iterator

from tierlm.server.tool_calls import Call, Form, Schemas
from tierlm.text import overlap


class CallStream:
    """Text that may begin a call is held until that is known; text that looks like a call and is none stays text. White
    space beside a call is left out."""

    def __init__(self, form: Form, tools: Schemas):
        self._form, self._whole, self._tools = form, form.whole, tools
        self._held = ""
        self._looked = 0  # held text before it has no end of a call
        self._began = self._after_call = False

    def feed(self, text: str) -> list[str | Call]:
        """What is now final."""
        self._held += text
        return list(self._parts(ended=False, stopped=False))

    def end(self, stopped: bool) -> list[str | Call]:
        """The rest. ``stopped``: the model has ended the answer; otherwise a call without its end is not whole."""
        return list(self._parts(ended=True, stopped=stopped))

    def _parts(self, ended: bool, stopped: bool) -> Iterator[str | Call]:
        form = self._form
        while (at := self._open()) >= 0:
            yield from self._release(len(self._held[:at].rstrip()))
            at = self._open()
            calls, length = self._calls(at, ended, stopped)
            if calls:
                self._held, self._looked = self._held[length:], 0
                self._began = self._after_call = True
                yield from calls
            elif length or ended:
                yield from self._release(at + len(form.open))
            else:
                return
        keep = 0 if ended else overlap(self._held, form.open)
        text = self._held[: len(self._held) - keep]
        yield from self._release(len(text if ended else text.rstrip()))

    def _open(self) -> int:
        """Where a call may begin; -1: nowhere."""
        at = self._held.find(self._form.open)
        return -1 if self._form.first and (self._began or self._held[:at].strip()) else at

    def _calls(self, at: int, ended: bool, stopped: bool) -> tuple[list[Call], int]:
        """The calls at ``at``, and where they end; 0: the end has yet to come."""
        close, begin = self._form.close, at + len(self._form.open)
        while close is not None and (found := self._held.find(close, max(begin, self._looked))) >= 0:
            if (match := self._whole.match(self._held, at)) is not None:
                return self._read(match[1]), match.end()
            self._looked = found + len(close)
        if close is not None:
            self._looked = max(begin, len(self._held) - len(close) + 1)
        return (self._read(self._held[begin:]) if stopped else [], len(self._held)) if ended else ([], 0)

    def _read(self, text: str) -> list[Call]:
        try:
            return self._form.read(text, self._tools)
        except (ValueError, RecursionError):
            return []

    def _release(self, count: int) -> Iterator[str]:
        """The first ``count`` characters of what is held, which are text."""
        if not count:
            return
        text, self._held, self._looked = self._held[:count], self._held[count:], 0
        if self._after_call:
            text = text.lstrip()
        if text:
            self._began, self._after_call = True, False
            yield text
