"""The replies of OpenAI's API, built from pieces of text."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from tierlm.answer import Piece
from tierlm.engine.sampler import TokenLogprob
from tierlm.server.tool_calls import Call
from tierlm.server.tools import CalledPiece, CallReader, Tools
from tierlm.text import TextCodec


def usage(prompt: int, cached: int, new: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def error(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Replies:
    """The replies to one request: chunks while it streams, or one at the end. ``kind``: the object's name."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, model: str, codec: TextCodec, count: int):
        self.codec, self.new_tokens = codec, 0
        self._fixed = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._texts = [""] * count
        self._logprobs: list[list[TokenLogprob] | None] = [None] * count
        self._finish: list[str | None] = [None] * count

    def add(self, place: int, piece: Piece) -> Piece:
        """Add a piece to the final reply. Returns it as it is to be shown."""
        self.new_tokens += len(piece.ids)
        self._texts[place] += piece.text
        if piece.logprobs is not None:
            self._logprobs[place] = [*(self._logprobs[place] or []), *piece.logprobs]
        self._finish[place] = piece.finish_reason or self._finish[place]
        return piece

    def first(self) -> list[dict[str, Any]]:
        """The chunks before any text."""
        return []

    def chunk(self, place: int, piece: Piece) -> dict[str, Any]:
        offset = len(self._texts[place]) - len(piece.text)
        choice = {"index": place, **self._delta(place, piece), "finish_reason": piece.finish_reason}
        choice["logprobs"] = None if piece.logprobs is None else self._table(piece.logprobs, offset)
        return {**self._fixed, "object": self.chunk_kind, "choices": [choice]}

    def usage_chunk(self, prompt: int, cached: int) -> dict[str, Any]:
        return {
            **self._fixed,
            "object": self.chunk_kind,
            "choices": [],
            "usage": usage(prompt, cached, self.new_tokens),
        }

    def whole(self, prompt: int, cached: int) -> dict[str, Any]:
        choices = []
        for place, logprobs in enumerate(self._logprobs):
            choices.append(
                {"index": place, **self._content(place), "finish_reason": self._finish[place]}
                | {"logprobs": None if logprobs is None else self._table(logprobs, 0)}
            )
        return {**self._fixed, "object": self.kind, "choices": choices, "usage": usage(prompt, cached, self.new_tokens)}

    def _delta(self, place: int, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def _content(self, place: int) -> dict[str, Any]:
        raise NotImplementedError

    def _table(self, logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        raise NotImplementedError

    def _named(self, top: Mapping[int, float]) -> list[tuple[str, float]]:
        return [(self.codec.token_text(token), logprob) for token, logprob in top.items()]


class CompletionReplies(Replies):
    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def _delta(self, place: int, piece: Piece) -> dict[str, Any]:
        return {"text": piece.text}

    def _content(self, place: int) -> dict[str, Any]:
        return {"text": self._texts[place]}

    def _table(self, logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        tokens = [self.codec.token_text(one.id) for one in logprobs]
        offsets = [offset + sum(map(len, tokens[:at])) for at in range(len(tokens))]
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": [dict(self._named(one.top)) for one in logprobs],
            "text_offset": offsets,
        }


class ChatReplies(Replies):
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, model: str, codec: TextCodec, count: int, tools: Tools | None):
        super().__init__(model, codec, count)
        self._readers = [None if tools is None else CallReader(tools) for _ in range(count)]
        self._calls: list[list[Call]] = [[] for _ in range(count)]

    def add(self, place: int, piece: Piece) -> Piece:
        if (reader := self._readers[place]) is None:
            return super().add(place, piece)
        called = reader.read(piece)
        self._calls[place] += called.calls
        return super().add(place, called)

    def first(self) -> list[dict[str, Any]]:
        deltas = [
            {"index": place, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}
            for place in range(len(self._texts))
        ]
        return [{**self._fixed, "object": self.chunk_kind, "choices": [delta]} for delta in deltas]

    def _delta(self, place: int, piece: Piece) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if isinstance(piece, CalledPiece) and piece.calls:
            first = len(self._calls[place]) - len(piece.calls)
            delta["tool_calls"] = [{"index": at, **_call(call)} for at, call in enumerate(piece.calls, first)]
        return {"delta": delta}

    def _content(self, place: int) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self._texts[place], "refusal": None}
        if calls := self._calls[place]:
            message |= {"content": self._texts[place] or None, "tool_calls": [_call(call) for call in calls]}
        return {"message": message}

    def _table(self, logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        return {
            "content": [
                self._entry(self.codec.token_text(one.id), one.logprob)
                | {"top_logprobs": [self._entry(*pair) for pair in self._named(one.top)]}
                for one in logprobs
            ],
            "refusal": None,
        }

    def _entry(self, token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.json}}
