"""The requests that the server reads, after OpenAI's API. A field that the server does not know is an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tierlm.config import MAX_LOGPROBS, SamplingParams
from tierlm.errors import UsageError, shown
from tierlm.server.tools import with_calls
from tierlm.templates.template import Message

MAX_SAMPLES = 128  # sequences of one request
PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
SAME = ("temperature", "top_p", "top_k", "min_p", "seed", "n", "priority", *PENALTIES)  # fields of SamplingParams
Stop = str | Annotated[list[str], Field(max_length=16)] | None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class Function(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str


class NamedTool(BaseModel):
    """The function to call."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: Function


class Asked(BaseModel):
    """What both kinds of completion have in common.

    Fields without a name in OpenAI's API are named as in SamplingParams. ``user``, ``metadata``, ``store`` and
    ``service_tier`` say something to a hosted service; here they say nothing, and clients send them unasked.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: Stop = None
    n: int | None = None
    priority: int | None = None
    ignore_eos: bool = False
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None

    def sampling(self, recommended: SamplingParams, room: int) -> SamplingParams:
        """The sampling asked for; what is not asked for is ``recommended``. ``room``: tokens that an answer can have at
        most. Raises UsageError."""
        given = {name: value for name in SAME if (value := getattr(self, name)) is not None}
        if self.logit_bias is not None:
            if wrong := [token for token in self.logit_bias if not token.isdecimal() or len(token) > 10]:
                raise UsageError(f"logit_bias: expected token ids, found {shown(wrong[0])}")
            given["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        limit = self.limit()
        if limit is not None and limit < 1:
            raise UsageError(f"max_tokens: expected at least 1, found {limit}")
        if (self.n or 1) > MAX_SAMPLES:
            raise UsageError(f"n: expected at most {MAX_SAMPLES}, found {self.n}")
        logprobs = self.top()
        if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
            raise UsageError(f"expected 0 to {MAX_LOGPROBS} most likely tokens, found {logprobs}")
        stop = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        most = {**vars(recommended), **given, "max_new_tokens": max(1, room) if limit is None else limit}
        return SamplingParams(**{**most, "stop": stop, "logprobs": logprobs, "ignore_eos": self.ignore_eos})

    def limit(self) -> int | None:
        """The most tokens of the answer."""
        return self.max_tokens

    def top(self) -> int | None:
        """How many most likely tokens to report for each."""
        raise NotImplementedError


class Completion(Asked):
    """``POST /v1/completions``: text or token ids go on."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None
    echo: Literal[False] = False
    best_of: Literal[1] | None = None
    suffix: None = None

    def limit(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default

    def top(self) -> int | None:
        return self.logprobs

    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, one or several."""
        found = self.prompt
        if isinstance(found, str) or not found or isinstance(found[0], int):
            return [found]  # type: ignore[list-item]
        return found


class ChatCompletion(Asked):
    """``POST /v1/chat/completions``: the answer to messages, through the model's chat template.

    ``chat_template_kwargs``: more variables of the template, as in vLLM.
    """

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: Literal[True] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None

    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def conversation(self) -> list[Message]:
        """The messages, with their text in one piece and arguments of calls as objects. Raises UsageError."""
        return [
            with_calls({**message, "content": text_of(message.get("content"), f"{where}.content")}, where)
            for where, message in ((f"messages[{at}]", message) for at, message in enumerate(self.messages))
        ]

    def offered(self) -> list[dict[str, Any]]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.function is not None or self.tool_choice == "required"

    @property
    def function(self) -> str | None:
        """The function that it must call; None: any, if it must."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    def answer_schema(self) -> Mapping[str, Any] | None:
        """The JSON schema that the answer must follow; None: it is text. Raises UsageError."""
        asked = self.response_format or {"type": "text"}
        match asked.get("type"):
            case "text":
                return None
            case _ if self.offered():
                raise UsageError("response_format: expected the type text beside tools")
            case "json_object":
                return {"type": "object"}
            case "json_schema":
                found = asked.get("json_schema")
                schema = found.get("schema") if isinstance(found, dict) else None
                if not isinstance(schema, dict):
                    raise UsageError("response_format.json_schema.schema: expected a JSON schema")
                return schema
            case kind:
                raise UsageError(f"response_format: expected text, json_object or json_schema, found {shown(kind)}")


def text_of(content: Any, where: str) -> str | None:
    """The text of a message's content: a string, or parts of type text. Raises UsageError."""
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise UsageError(f"{where}: expected text, found {str(kind)[:60]!r}: models run text-only")
    return "".join(part["text"] for part in parts)
