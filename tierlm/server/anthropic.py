"""The routes of Anthropic's Messages API, which coding agents use."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from tierlm.answer import Piece
from tierlm.config import SamplingParams
from tierlm.errors import TierlmError, UsageError, shown
from tierlm.server.connection import Gone, attended, event
from tierlm.server.service import Service, TimedOut, Work
from tierlm.server.tool_calls import Call
from tierlm.server.tools import CallReader, Tools, with_calls
from tierlm.server.wire import text_of
from tierlm.templates.template import Message

REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class ToolChoice(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["auto", "none", "any", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def check(self) -> ToolChoice:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("expected a name with the type tool, and only with it")
        if self.disable_parallel_tool_use and not self.forced:
            raise ValueError("disable_parallel_tool_use: expected the type any or tool")
        return self

    @property
    def forced(self) -> bool:
        """Whether the answer must be a call, which is one call."""
        return self.type in ("any", "tool")


class Tool(BaseModel):
    """A function. ``cache_control`` is for a hosted service."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1)]
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: dict[str, Any] | None = None

    def function(self) -> dict[str, Any]:
        """As OpenAI's API writes it."""
        described = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **described, "parameters": self.input_schema}}


class Counted(BaseModel):
    """What decides the prompt. ``thinking`` may only be disabled: whether a model thinks is up to its template."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    thinking: dict[str, Literal["disabled"]] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None

    def offered(self) -> list[dict[str, Any]]:
        """The tools that the model may call."""
        chosen = self.tool_choice is None or self.tool_choice.type != "none"
        return [tool.function() for tool in self.tools or []] if chosen else []

    def conversation(self) -> list[Message]:
        """The messages, the system's first, as OpenAI's API writes them. Raises UsageError."""
        found: list[Message] = []
        if self.system is not None:
            found.append({"role": "system", "content": text_of(self.system, "system")})
        names: dict[str, str] = {}  # of the functions called, by id
        for at, message in enumerate(self.messages):
            found += _messages(message, names, f"messages[{at}]")
        return found


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

    async def prompt(asked: Counted) -> tuple[list[int], Tools | None]:
        service.check(asked.model)
        llm = service.llm
        tools = Tools.of(asked.offered(), llm.codec)
        given = None if tools is None else tools.given
        return llm.ids(await asyncio.to_thread(llm.codec.chat, asked.conversation(), given)), tools

    @router.post("/count_tokens")
    async def count(asked: Counted) -> dict[str, int]:
        return {"input_tokens": len((await prompt(asked))[0])}

    @router.post("")
    async def messages(asked: Messages, request: Request) -> Response:
        ids, tools = await prompt(asked)
        work = Work([ids], asked.sampling(service.llm.default_params))
        if tools is not None:
            work.params = replace(work.params, skip_special_tokens=False)
        if (choice := asked.tool_choice) is not None and choice.forced:
            await service.force(work, tools, choice.name)
        reply = Reply(service.name, work, tools)
        pieces = attended(request, service.admit(work))
        if asked.stream:
            return StreamingResponse(reply.events(pieces), media_type="text/event-stream")
        async for item in pieces:
            if item is not None:
                reply.add(item[1])
        return JSONResponse(reply.whole())

    return router


class Reply:
    """The reply to one request."""

    def __init__(self, model: str, work: Work, tools: Tools | None):
        self._fixed = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": model}
        self._work, self._new = work, 0
        self._content: list[dict[str, Any]] = []
        self._reason: str | None = None
        self._reader = None if tools is None else CallReader(tools)

    def add(self, piece: Piece) -> Sequence[str | Call]:
        """Add a piece. Returns its texts and calls."""
        parts: Sequence[str | Call] = [piece.text] if piece.text else []
        if self._reader is not None:
            called = self._reader.read(piece)
            piece, parts = called, called.parts
        for part in parts:
            if isinstance(part, Call):
                self._content.append({**_use(part), "input": part.arguments})
            elif self._in_text:
                self._content[-1]["text"] += part
            else:
                self._content.append({"type": "text", "text": part})
        self._new += len(piece.ids)
        self._reason = None if piece.finish_reason is None else REASONS.get(piece.finish_reason, piece.finish_reason)
        return parts

    @property
    def _in_text(self) -> bool:
        return bool(self._content) and self._content[-1]["type"] == "text"

    def whole(self) -> dict[str, Any]:
        return self._message(self._content)

    async def events(self, pieces: Any) -> AsyncGenerator[str, None]:
        """The reply as server-sent events."""
        yield _named("message_start", message=self._message([]))
        at, open = -1, False  # the block, and whether it is one of text that goes on
        try:
            async for item in pieces:
                if item is None:
                    yield _named("ping")
                    continue
                for part in self.add(item[1]):
                    if open and isinstance(part, Call):
                        yield _named("content_block_stop", index=at)
                    if not open or isinstance(part, Call):
                        at += 1
                        block = _use(part) if isinstance(part, Call) else {"type": "text", "text": ""}
                        yield _named("content_block_start", index=at, content_block=block)
                    yield _named("content_block_delta", index=at, delta=_delta(part))
                    open = isinstance(part, str)
                    if not open:
                        yield _named("content_block_stop", index=at)
        except Gone:
            return
        except (TierlmError, TimedOut) as failure:
            yield _named("error", error={"type": "api_error", "message": str(failure)})
            return
        if open:
            yield _named("content_block_stop", index=at)
        delta = {"stop_reason": self._reason, "stop_sequence": None}
        yield _named("message_delta", delta=delta, usage=self._usage())
        yield _named("message_stop")

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        ended = {"stop_reason": self._reason, "stop_sequence": None, "usage": self._usage()}
        return {**self._fixed, "content": content, **ended}

    def _usage(self) -> dict[str, int]:
        """As Anthropic counts: tokens that were not computed are none of the input."""
        prompt, cached = self._work.prompt_tokens, self._work.cached
        return {"input_tokens": prompt - cached, "cache_read_input_tokens": cached, "output_tokens": self._new}


def _messages(message: dict[str, Any], names: dict[str, str], where: str) -> list[Message]:
    """A message as OpenAI's API writes it: results of calls are messages of their own. ``names``: of the functions
    called so far, by id; those called here are added. Raises UsageError."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        raise UsageError(f"{where}.role: expected user or assistant, found {shown(role)}")
    kind = "tool_use" if role == "assistant" else "tool_result"
    blocks = content if isinstance(content, list) else []
    special = [block for block in blocks if isinstance(block, dict) and block.get("type") == kind]
    text = text_of([block for block in blocks if block not in special] if special else content, f"{where}.content")
    if role == "assistant":
        calls = [_call(block, where) for block in special]
        names |= {call["id"]: call["function"]["name"] for call in calls}
        return [with_calls({"role": role, "content": text, "tool_calls": calls}, where)]
    results = [_result(block, names, where) for block in special]
    return results if special and not text else [*results, {"role": role, "content": text}]


def _call(block: dict[str, Any], where: str) -> dict[str, Any]:
    """A block of type tool_use as OpenAI's API writes it. Raises UsageError."""
    if not isinstance(block.get("id"), str):
        raise UsageError(f"{where}: expected a tool_use with an id, found {shown(block.get('id'))}")
    function = {"name": block.get("name"), "arguments": block.get("input")}
    return {"id": block["id"], "type": "function", "function": function}


def _result(block: dict[str, Any], names: dict[str, str], where: str) -> Message:
    """A block of type tool_result as a message of OpenAI's API. Raises UsageError."""
    call = block.get("tool_use_id")
    if not isinstance(call, str) or call not in names:
        raise UsageError(f"{where}: expected the result of a tool_use before it, found {shown(call)}")
    content = text_of(block.get("content"), f"{where}.content")
    return {"role": "tool", "tool_call_id": call, "name": names[call], "content": content or ""}


def _use(call: Call) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}


def _delta(part: str | Call) -> dict[str, str]:
    if isinstance(part, Call):
        return {"type": "input_json_delta", "partial_json": part.json}
    return {"type": "text_delta", "text": part}


def _named(kind: str, **fields: Any) -> str:
    return event({"type": kind, **fields}, kind)
