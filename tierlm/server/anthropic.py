"""The routes of Anthropic's Messages API, which coding agents use."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from tierlm.config import SamplingParams
from tierlm.errors import TierlmError, UsageError
from tierlm.server.connection import Gone, attended, event
from tierlm.server.service import Service, TimedOut, Work
from tierlm.server.wire import text_of
from tierlm.templates.template import Message

REASONS = {"stop": "end_turn", "length": "max_tokens"}


class Counted(BaseModel):
    """What decides the prompt. ``thinking`` may only be disabled: whether a model thinks is up to its template."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    thinking: dict[str, Literal["disabled"]] | None = None

    def conversation(self) -> list[Message]:
        """The messages, the system's first. Raises UsageError."""
        first = [] if self.system is None else [{"role": "system", "content": text_of(self.system, "system")}]
        return [*first, *(self._message(at, message) for at, message in enumerate(self.messages))]

    def _message(self, at: int, message: dict[str, Any]) -> Message:
        if message.get("role") not in ("user", "assistant"):
            raise UsageError(f"messages[{at}].role: expected user or assistant, found {message.get('role')!r}")
        return {"role": message["role"], "content": text_of(message.get("content"), f"messages[{at}].content")}


class Messages(Counted):
    """``POST /v1/messages``."""

    max_tokens: int
    stop_sequences: Annotated[list[str], Field(max_length=16)] = []
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None

    def sampling(self, recommended: SamplingParams) -> SamplingParams:
        """What is not asked for is ``recommended``. Raises UsageError."""
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens: expected at least 1, found {self.max_tokens}")
        given = {
            name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(self, name)) is not None
        }
        asked = {"max_new_tokens": self.max_tokens, "stop": tuple(self.stop_sequences)}
        return SamplingParams(**{**vars(recommended), **given, **asked})


def routes(service: Service) -> APIRouter:
    """``/v1/messages`` and ``/v1/messages/count_tokens``."""
    router = APIRouter(prefix="/v1/messages")

    async def prompt(asked: Counted) -> list[int]:
        service.check(asked.model)
        llm = service.llm
        return llm.ids(await asyncio.to_thread(llm.codec.chat, asked.conversation()))

    @router.post("/count_tokens")
    async def count(asked: Counted) -> dict[str, int]:
        return {"input_tokens": len(await prompt(asked))}

    @router.post("")
    async def messages(asked: Messages, request: Request) -> Response:
        ids = await prompt(asked)
        work = Work([ids], asked.sampling(service.llm.default_params))
        reply = Reply(service.name, work)
        pieces = attended(request, service.admit(work))
        if asked.stream:
            return StreamingResponse(reply.events(pieces), media_type="text/event-stream")
        async for item in pieces:
            if item is not None:
                reply.add(item[1].text, len(item[1].ids), item[1].finish_reason)
        return JSONResponse(reply.whole())

    return router


class Reply:
    """The reply to one request."""

    def __init__(self, model: str, work: Work):
        self._fixed = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": model}
        self._work, self._new, self._text = work, 0, ""
        self._reason: str | None = None

    def add(self, text: str, tokens: int, finish: str | None) -> None:
        self._text += text
        self._new += tokens
        self._reason = None if finish is None else REASONS.get(finish, finish)

    def whole(self) -> dict[str, Any]:
        return self._message([{"type": "text", "text": self._text}])

    async def events(self, pieces: Any) -> AsyncGenerator[str, None]:
        """The reply as server-sent events."""
        yield _named("message_start", message=self._message([]))
        yield _named("content_block_start", index=0, content_block={"type": "text", "text": ""})
        try:
            async for item in pieces:
                if item is None:
                    yield _named("ping")
                    continue
                text = item[1].text
                self.add(text, len(item[1].ids), item[1].finish_reason)
                if text:
                    yield _named("content_block_delta", index=0, delta={"type": "text_delta", "text": text})
        except Gone:
            return
        except (TierlmError, TimedOut) as failure:
            yield _named("error", error={"type": "api_error", "message": str(failure)})
            return
        yield _named("content_block_stop", index=0)
        delta = {"stop_reason": self._reason, "stop_sequence": None}
        yield _named("message_delta", delta=delta, usage=self._usage())
        yield _named("message_stop")

    def _message(self, content: list[dict[str, str]]) -> dict[str, Any]:
        ended = {"stop_reason": self._reason, "stop_sequence": None, "usage": self._usage()}
        return {**self._fixed, "content": content, **ended}

    def _usage(self) -> dict[str, int]:
        """As Anthropic counts: tokens that were not computed are none of the input."""
        prompt, cached = self._work.prompt_tokens, self._work.cached
        return {"input_tokens": prompt - cached, "cache_read_input_tokens": cached, "output_tokens": self._new}


def _named(kind: str, **fields: Any) -> str:
    return event({"type": kind, **fields}, kind)
