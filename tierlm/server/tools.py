"""The functions that a request offers to the model, and the calls in its messages and answers, as OpenAI's API writes
them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tierlm.answer import Piece
from tierlm.errors import UsageError, shown
from tierlm.server.call_stream import CallStream
from tierlm.server.harmony import CHANNEL, HarmonyStream
from tierlm.server.tool_calls import FORMS, Call, Form, Schemas, form_of
from tierlm.templates.template import Message
from tierlm.text import TextCodec


@dataclass(frozen=True)
class Tools:
    """``given``: to the chat template. ``split``: makes what finds the calls in an answer. ``schemas``: of the
    parameters, by function. ``form``: of the calls; None for gpt-oss's."""

    given: Sequence[dict[str, Any]]
    split: Callable[[], CallStream | HarmonyStream]
    schemas: Schemas
    form: Form | None

    @classmethod
    def of(cls, tools: Sequence[dict[str, Any]], codec: TextCodec) -> Tools | None:
        """None without tools. Raises UsageError if one is no function, or the model's chat template has no place for
        tools or an unknown form of calls."""
        if not tools:
            return None
        schemas = {}
        for at, tool in enumerate(tools):
            function = tool.get("function")
            if tool.get("type") != "function" or not isinstance(function, dict):
                raise UsageError(f"tools[{at}]: expected a function, found {shown(tool.get('type'))}")
            name, parameters = function.get("name"), function.get("parameters") or {}
            if not isinstance(name, str) or not name:
                raise UsageError(f"tools[{at}].function.name: expected a name, found {shown(name)}")
            if not isinstance(parameters, dict):
                raise UsageError(f"tools[{at}].function.parameters: expected a JSON schema, found {shown(parameters)}")
            schemas[name] = parameters
        template = codec.template.source(tools=True)
        if re.search(r"\btools\b", template) is None:
            raise UsageError("tools: the model's chat template has no place for tools")
        if CHANNEL in template:
            return cls(tools, HarmonyStream, schemas, None)
        form = form_of(template)
        if form is None:
            known = ", ".join(form.open for form in FORMS)
            raise UsageError(
                f"tools: the model's chat template has calls in a form that is not known here: expected one of {known}"
            )
        return cls(tools, partial(CallStream, form, schemas), schemas, form)

    def chosen(self, name: str | None) -> tuple[Form, Schemas]:
        """The form of a call that is forced, and the functions that it may be of: ``name``, or any. Raises UsageError
        if there is no such function, or if such calls cannot be forced."""
        if name is not None and name not in self.schemas:
            raise UsageError(f"tool_choice: expected one of {', '.join(self.schemas)}, found {shown(name)}")
        if self.form is None or self.form.arguments is None:
            raise UsageError(
                "tool_choice: expected auto or none: this model's calls are not one JSON object, and cannot be forced"
            )
        return self.form, self.schemas if name is None else {name: self.schemas[name]}


@dataclass(frozen=True)
class CalledPiece(Piece):
    """``parts``: ``text`` and calls in their order."""

    parts: Sequence[str | Call] = field(default=())

    @property
    def calls(self) -> list[Call]:
        return [part for part in self.parts if isinstance(part, Call)]


class CallReader:
    """Finds the calls in the pieces of one answer."""

    def __init__(self, tools: Tools):
        self._stream = tools.split()
        self._called = False

    def read(self, piece: Piece) -> CalledPiece:
        """``piece`` with the text that is now known to be no call, and the calls that are now whole."""
        parts, finish = self._stream.feed(piece.text), piece.finish_reason
        if finish is not None:
            parts += self._stream.end(finish == "stop")
        self._called |= any(isinstance(part, Call) for part in parts)
        if finish == "stop" and self._called:
            finish = "tool_calls"
        text = "".join(part for part in parts if isinstance(part, str))
        return CalledPiece(**{**vars(piece), "text": text, "finish_reason": finish, "parts": parts})


def with_calls(message: Message, where: str) -> Message:
    """``message`` with the arguments of its calls as objects, which chat templates expect. Raises UsageError."""
    calls = message.get("tool_calls")
    if not calls:
        return {name: value for name, value in message.items() if name != "tool_calls"}
    if not isinstance(calls, list):
        raise UsageError(f"{where}.tool_calls: expected a list, found {shown(calls)}")
    read = [_with_object(call, f"{where}.tool_calls[{at}]") for at, call in enumerate(calls)]
    return {**message, "content": message.get("content") or "", "tool_calls": read}


def _with_object(call: object, where: str) -> Mapping[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UsageError(f"{where}: expected the call of a function, found {shown(call)}")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        found = shown(function["arguments"])
        raise UsageError(f"{where}.function.arguments: expected a JSON object, found {found}")
    return {**call, "function": {**function, "arguments": arguments}}
