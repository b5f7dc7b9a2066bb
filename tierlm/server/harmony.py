"""Splits an answer of gpt-oss into text and calls of functions: it is messages of several channels."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tierlm.server.tool_calls import Call, call_of
from tierlm.text import overlap

CHANNEL, MESSAGE = "<|channel|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")


class HarmonyStream:
    """Each message is a header and a body: ``<|channel|>final<|message|>text<|end|><|start|>assistant``. The channel
    says what the body is: analysis is left out, and a body for a function is a call. The others are text, as is a call
    that cannot be read."""

    def __init__(self) -> None:
        self._held = ""
        self._header: str | None = None  # of the body that goes on

    def feed(self, text: str) -> list[str | Call]:
        """What is now final."""
        self._held += text
        return list(self._parts(ended=False, stopped=False))

    def end(self, stopped: bool) -> list[str | Call]:
        """The rest. ``stopped``: the model has ended the answer; otherwise a call without its end is not whole."""
        return list(self._parts(ended=True, stopped=stopped))

    def _parts(self, ended: bool, stopped: bool) -> Iterator[str | Call]:
        while True:
            if self._header is None:
                header, found, rest = self._held.partition(MESSAGE)
                if not found:
                    break
                self._header, self._held = header, rest
            at, mark = min(((at, mark) for mark in ENDS if (at := self._held.find(mark)) >= 0), default=(-1, ""))
            if at < 0:
                break
            yield from self._body(self._header, self._held[:at], whole=True)
            self._header, self._held = None, self._held[at + len(mark) :]
        if self._header is None:
            if ended and self._held and "<|" not in self._held:  # an answer without messages
                yield self._held
        elif ended:
            yield from self._body(self._header, self._held, whole=stopped)
        elif _function(self._header) is None:
            keep = max(overlap(self._held, mark) for mark in ENDS)
            yield from self._body(self._header, self._held[: len(self._held) - keep], whole=False)
            self._held = self._held[len(self._held) - keep :]

    def _body(self, header: str, body: str, whole: bool) -> Iterator[str | Call]:
        function = _function(header)
        if function is not None:
            try:
                if not whole:
                    raise ValueError
                yield call_of(function, body)
            except (ValueError, RecursionError):
                yield f"{header}{MESSAGE}{body}"
        elif body and f"{CHANNEL}analysis" not in header:
            yield body


def _function(header: str) -> str | None:
    """The function that a message is for."""
    found = re.search(r"\bto=functions\.([\w.-]+)", header)
    return None if found is None else found[1]
