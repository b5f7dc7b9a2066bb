"""The routes of OpenAI's API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from tierlm.errors import TierlmError
from tierlm.server.connection import COMMENT, Gone, attended, event
from tierlm.server.replies import ChatReplies, CompletionReplies, Replies, error
from tierlm.server.service import Service, TimedOut, Work
from tierlm.server.tools import Tools
from tierlm.server.wire import Asked, ChatCompletion, Completion


def routes(service: Service) -> APIRouter:
    """``/v1/models``, ``/v1/completions`` and ``/v1/chat/completions``."""
    router = APIRouter(prefix="/v1")

    def card() -> dict[str, Any]:
        return {"id": service.name, "object": "model", "created": service.created, "owned_by": "tierlm"}

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check(name)
        return card()

    @router.post("/completions")
    async def completions(asked: Completion, request: Request) -> Response:
        service.check(asked.model)
        prompts = [await asyncio.to_thread(service.llm.ids, prompt) for prompt in asked.prompts()]
        work = _work(service, asked, prompts)
        replies = CompletionReplies(service.name, service.llm.codec, len(work.sequences()))
        return await _answer(service, asked, work, replies, request)

    @router.post("/chat/completions")
    async def chat(asked: ChatCompletion, request: Request) -> Response:
        service.check(asked.model)
        codec, schema = service.llm.codec, asked.answer_schema()
        tools = Tools.of(asked.offered(), codec)
        given = None if tools is None else tools.given
        ids = await asyncio.to_thread(codec.chat, asked.conversation(), given, asked.chat_template_kwargs)
        work = _work(service, asked, [service.llm.ids(ids)])
        if tools is not None:
            work.params = replace(work.params, skip_special_tokens=False)
        if schema is not None:
            constraint = await asyncio.to_thread(lambda: service.grammars.json(schema))
            work.params = replace(work.params, constraint=constraint)
        if asked.forced:
            await service.force(work, tools, asked.function)
        replies = ChatReplies(service.name, codec, len(work.sequences()), tools)
        return await _answer(service, asked, work, replies, request)

    return router


def _work(service: Service, asked: Asked, prompts: list[list[int]]) -> Work:
    llm = service.llm
    room = llm.context - max(map(len, prompts)) + 1
    return Work(prompts, asked.sampling(llm.default_params, room))


async def _answer(service: Service, asked: Asked, work: Work, replies: Replies, request: Request) -> Response:
    pieces = service.admit(work)
    if asked.stream:
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        events = _events(attended(request, pieces), replies, work, usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
    async for item in attended(request, pieces):
        if item is not None:
            replies.add(*item)
    return JSONResponse(replies.whole(work.prompt_tokens, work.cached))


async def _events(pieces: Any, replies: Replies, work: Work, usage: bool) -> AsyncGenerator[str, None]:
    """The reply as server-sent events. An error after the first text is an event, since the status is sent."""
    for chunk in replies.first():
        yield event(chunk)
    try:
        async for item in pieces:
            if item is None:
                yield COMMENT
                continue
            yield event(replies.chunk(item[0], replies.add(*item)))
    except Gone:
        return
    except (TierlmError, TimedOut) as failure:
        yield event(error(str(failure), "server_error"))
        return
    if usage:
        yield event(replies.usage_chunk(work.prompt_tokens, work.cached))
    yield event("[DONE]")
