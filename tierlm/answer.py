"""The answer to one prompt: its tokens and their text, as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tierlm.client import Box, Request
from tierlm.engine.sampler import TokenLogprob
from tierlm.engine.sequence import Progress
from tierlm.errors import TierlmError
from tierlm.text import TextStream


@dataclass(frozen=True)
class Piece:
    """New text and its ids. ``finish_reason`` is set on the last piece. ``logprobs``: of each id, if asked for.
    ``cached``: prompt tokens that were not computed, since their KV values were kept."""

    text: str
    ids: list[int]
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] | None = None
    cached: int = 0


@dataclass(frozen=True)
class Result:
    """The result of one prompt. ``ids``: generated, including a stop id. ``text``: None without a tokenizer.

    ``finish_reason``: "stop" (a stop id or text), "length" or "error"; "error" also sets ``error``. ``logprobs``: of
    each id, if asked for.
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str | None
    finish_reason: str
    error: TierlmError | None = None
    logprobs: list[TokenLogprob] | None = None


class Answer:
    """The tokens of one prompt and their text. ``ids``: the new tokens, up to the end of the text."""

    def __init__(self, prompt: list[int], text: TextStream | None):
        self.prompt, self.text = prompt, text
        self.ids: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None
        self.finish: str | None = None
        self.error: TierlmError | None = None
        self._shown = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop text ended it."""
        return self.text is not None and self.text.stopped

    def add(self, new: Progress) -> str:
        """Add new tokens. Returns the text that is now final."""
        if self.finish is not None:  # computed before the end of the text was found
            return ""
        self.error, found = new.error, ""
        if new.logprobs is not None:
            self._logprobs = self._logprobs or []
            self._logprobs += new.logprobs
        for at, token in enumerate(new.ids, 1):
            self.ids.append(token)
            if self.text is not None and not (new.finish == "stop" and at == len(new.ids)):  # a stop id is not text
                found += self.text.push(token)
                if self.text.stopped:
                    self.finish = "stop"
                    return found + self.text.flush()
        self.finish = new.finish
        return found + self.text.flush() if self.text is not None and self.finish else found

    def piece(self, new: Progress) -> Piece | None:
        """Add new tokens. Returns the piece to show now, if any. Raises StorageError, NumericsError."""
        text = self.add(new)
        if self.error is not None:
            raise self.error
        if not text and self.finish is None and self.text is not None:
            return None
        ids, logprobs, self._shown = self.ids[self._shown :], self._logprobs_from(self._shown), len(self.ids)
        return Piece(text, ids, self.finish, logprobs, new.cached)

    def result(self) -> Result:
        text = None if self.text is None else self.text.text
        return Result(self.prompt, self.ids, text, self.finish or "", self.error, self._logprobs_from(0))

    def _logprobs_from(self, start: int) -> list[TokenLogprob] | None:
        """Of ``ids`` from ``start``, which may end before the last token computed."""
        return None if self._logprobs is None else self._logprobs[start : len(self.ids)]


def unfinished(answers: Sequence[Answer]) -> bool:
    return any(answer.finish is None for answer in answers)


def add(answers: Sequence[Answer], request: Request[Box], new: Progress) -> None:
    """Add new tokens to the answer that they belong to, and cancel what follows a stop text."""
    answer = answers[new.place]
    answer.add(new)
    if answer.stopped:
        request.cancel_one(new.place)


def results(answers: Sequence[Answer]) -> list[Result]:
    """The results of ``answers``. Raises the error of a single answer."""
    if len(answers) == 1 and answers[0].error is not None:
        raise answers[0].error
    return [answer.result() for answer in answers]
