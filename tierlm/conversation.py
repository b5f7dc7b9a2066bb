"""A conversation with a model, which computes only what each turn adds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tierlm.answer import Piece
from tierlm.client import OnPrefill
from tierlm.config import SamplingParams
from tierlm.engine.sequence import Keep
from tierlm.llm import LLM
from tierlm.templates.template import Message


class Conversation:
    """Messages to and from a model, and the KV values of the turns so far.

    Each prompt is computed from the first token that differs from the one before; with gated DeltaNet, from its start
    if any token differs. Kept values give way to other requests that wait for room, and are then computed again.

    A prompt that leaves less than ``max_new_tokens`` and less than a quarter of the context for its answer loses the
    oldest turns until half of the context is free. The system message stays.

    ``system``: an instruction before the messages. ``messages``: all of them, also those left out; may be changed
    between turns. ``params``, ``tools``, ``template_args``: as for ``LLM.chat``.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        system: str | None = None,
        messages: Sequence[Message] = (),
        params: SamplingParams | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
    ):
        self.llm, self.system, self.messages = llm, system, list(messages)
        self.params, self.tools, self.template_args = params or SamplingParams(), tools, template_args
        self._keep = Keep()
        self._left_out = 0

    @property
    def left_out(self) -> int:
        """The number of messages that the last prompt left out, the oldest ones."""
        return min(self._left_out, len(self.messages))

    def say(self, message: str | Message, *, on_prefill: OnPrefill | None = None) -> Iterator[Piece]:
        """Stream the answer to ``message``: a user's text, or a message with any role.

        Message and answer join ``messages`` when the answer ends, also if it is stopped by closing the iterator; an
        answer that did not begin takes its message back. Raises as ``LLM.chat``.
        """
        question = {"role": "user", "content": message} if isinstance(message, str) else message
        ids, answer, ended = self._fit(question), "", False
        pieces = self.llm.stream(ids, self.params, keep=self._keep, on_prefill=on_prefill)
        try:
            for piece in pieces:
                answer += piece.text
                ended = piece.finish_reason is not None
                yield piece
        finally:
            if answer or ended:
                self.messages += [question, {"role": "assistant", "content": answer}]
            pieces.close()  # type: ignore[attr-defined]

    def _fit(self, question: Message) -> list[int]:
        """The prompt with ``question``, without the oldest turns if the context is short."""
        context, count = self.llm.context, len(self.messages)
        first = self._left_out if self._left_out <= count else 0  # the messages may be new ones
        ids = self._prompt(first, question)
        if len(ids) + min(self.params.max_new_tokens, context // 4) > context:
            while len(ids) > context // 2 and first < count:
                first = next((at for at in range(first + 1, count) if self.messages[at]["role"] == "user"), count)
                ids = self._prompt(first, question)
        if len(ids) <= context:
            self._left_out = first
        return ids

    def _prompt(self, first: int, question: Message) -> list[int]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.llm.codec.chat([*system, *self.messages[first:], question], self.tools, self.template_args)
