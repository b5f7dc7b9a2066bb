"""The calls of functions in an answer's text: each model family writes them in a form of its own."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Schemas = Mapping[str, Mapping[str, Any]]  # of the parameters, by function
LITERALS = {"True": "true", "False": "false", "None": "null"}  # as Python writes them, and some models


@dataclass(frozen=True)
class Call:
    """A call of a function. ``id``: the model's own, or a random one: nine letters and digits, as Mistral's templates
    expect."""

    name: str
    arguments: dict[str, Any]
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:9], compare=False)

    @property
    def json(self) -> str:
        """The arguments. Raises ValueError if they are not valid JSON, such as 1e999."""
        return json.dumps(self.arguments, ensure_ascii=False, allow_nan=False)


def call_of(name: object, arguments: object, id: object = None) -> Call:
    """``arguments``: an object, or JSON of one. Raises ValueError."""
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not name.strip() or not isinstance(arguments, dict):
        raise ValueError("expected a name and arguments")
    call = Call(name.strip(), arguments, *([id] if isinstance(id, str) and id else []))
    f"{call.name}{call.id}{call.json}".encode()  # raises on half a surrogate pair
    return call


# --- Readers: the calls in a text. Each raises ValueError if there is anything else in it.


def objects(text: str, tools: Schemas) -> list[Call]:
    """``{"name": ..., "arguments": ...}``, or a list of them."""
    found = json.loads(text)
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise ValueError("expected an object")
    return [
        call_of(call.get("name"), call.get("arguments", call.get("parameters", {})), call.get("id")) for call in calls
    ]


def known_object(text: str, tools: Schemas) -> list[Call]:
    """The rest of an answer that is one object, after ``{``. It is a call only if there is such a function, since an
    answer may be JSON for another reason."""
    calls = objects("{" + text, tools)
    if calls[0].name not in tools:
        raise ValueError("not a function")
    return calls


def named(pattern: str) -> Callable[[str, Schemas], list[Call]]:
    """Reads calls that match ``pattern``, with the groups name, arguments (JSON) and perhaps id."""
    compiled = re.compile(pattern, re.DOTALL)

    def read(text: str, tools: Schemas) -> list[Call]:
        found = [match.groupdict() for match in _all(compiled, text)]
        return [call_of(one["name"], one["arguments"], one.get("id")) for one in found]

    return read


def tagged(call: str, argument: str) -> Callable[[str, Schemas], list[Call]]:
    """Reads calls that match ``call``, a name and a body; a body has arguments that match ``argument``, a name and a
    text, which is JSON where the function's schema does not say string."""
    calls, arguments = re.compile(call, re.DOTALL), re.compile(argument, re.DOTALL)

    def read(text: str, tools: Schemas) -> list[Call]:
        found = []
        for match in _all(calls, text):
            name = match[1].strip()
            schemas = tools.get(name, {}).get("properties")
            values = {
                one[1].strip(): _value(one[2], schemas.get(one[1].strip()) if isinstance(schemas, dict) else None)
                for one in (_all(arguments, match[2]) if match[2].strip() else [])
            }
            found.append(call_of(name, values))
        return found

    return read


def gemma(text: str, tools: Schemas) -> list[Call]:
    """``call:name{key:<|"|>text<|"|>,other:1}``"""
    match = re.fullmatch(r"\s*call:([^{]+)(\{.*\})\s*", text, re.DOTALL)
    if match is None:
        raise ValueError("expected a call")
    parts = match[2].split('<|"|>')
    parts[::2] = [re.sub(r"([{,]\s*)([\w.-]+)\s*:", r'\1"\2":', part) for part in parts[::2]]
    parts[::2] = [re.sub(r"\bNone\b(?!\")", "null", part) for part in parts[::2]]  # as the template writes it
    parts[1::2] = map(json.dumps, parts[1::2])
    return [call_of(match[1], "".join(parts))]


def mistral(text: str, tools: Schemas) -> list[Call]:
    """A list of objects, or ``name[ARGS]{...}`` and more of these."""
    return objects(text, tools) if text.lstrip().startswith("[") else _mistral(text, tools)


_mistral = named(
    r"(?P<name>[^\[{]+)(?:\[CALL_ID\](?P<id>[^\[{]+))?(?:\[ARGS\])?(?P<arguments>\{.*?)(?:\[TOOL_CALLS\]|\s*$)"
)


def _all(pattern: re.Pattern[str], text: str) -> list[re.Match[str]]:
    """The matches that ``text`` consists of, with white space between them. Raises ValueError."""
    if pattern.sub("", text).strip() or not (found := list(pattern.finditer(text))):
        raise ValueError("expected calls and nothing else")
    return found


def _value(text: str, schema: object) -> Any:
    kinds = set(_kinds(schema))
    if kinds == {"string"}:
        return text
    try:
        value = json.loads(LITERALS.get(text.strip(), text))
    except (ValueError, RecursionError):
        return text
    if "string" in kinds and not kinds & _kinds_of(value):
        return text
    return value


def _kinds(schema: object) -> Iterator[str]:
    """The types that a schema allows, as far as it says."""
    if not isinstance(schema, dict):
        return
    stated = schema.get("type")
    yield from (kind for kind in (stated if isinstance(stated, list) else [stated]) if isinstance(kind, str))
    for name in ("anyOf", "oneOf", "enum"):
        for choice in found if isinstance(found := schema.get(name), list) else []:
            yield from _kinds_of(choice) if name == "enum" else _kinds(choice)


def _kinds_of(value: object) -> set[str]:
    """The names of a value's type in a schema."""
    if value is None:
        return {"null"}
    names: dict[type, set[str]] = {bool: {"boolean"}, int: {"integer", "number"}, float: {"number"}, str: {"string"}}
    return names.get(type(value), {"array" if isinstance(value, list) else "object"})


# --- Forms


@dataclass(frozen=True)
class Form:
    """How models write calls: between ``open`` and ``close``, or from ``open`` to the end of the answer.

    ``mark``: what only a template with this form contains. ``read``: the calls in the text between; raises ValueError.
    ``body``: pattern of the text between, if it can contain ``close``. ``first``: only an answer that begins with
    ``open`` is a call. ``arguments``: the member with the arguments, if a call is one object with a name and these.
    """

    mark: str
    open: str
    close: str | None
    read: Callable[[str, Schemas], list[Call]]
    body: str = ".*?"
    first: bool = False
    arguments: str | None = None

    @property
    def whole(self) -> re.Pattern[str]:
        """From ``open`` to ``close``."""
        return re.compile(f"{re.escape(self.open)}({self.body}){re.escape(self.close or '')}", re.DOTALL)


FUNCTIONS = tagged(
    r"<function=([^>]+)>(.*?)</function>",
    r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>(?=\s*(?:<parameter=|$))",
)
FORMS = (  # the first whose mark is in the template
    Form(
        "function_calls>",  # DeepSeek V3.2
        "<｜DSML｜function_calls>",
        "</｜DSML｜function_calls>",
        tagged(
            r'<｜DSML｜invoke name="([^"]+)">(.*?)</｜DSML｜invoke>',
            r'<｜DSML｜parameter name="([^"]+)"[^>]*>(.*?)</｜DSML｜parameter>',
        ),
    ),
    Form(
        "<minimax:tool_call>",
        "<minimax:tool_call>",
        "</minimax:tool_call>",
        tagged(r'<invoke name="([^"]+)">(.*?)</invoke>', r'<parameter name="([^"]+)">\n?(.*?)\n?</parameter>'),
    ),
    Form(
        "<arg_key>",  # GLM
        "<tool_call>",
        "</tool_call>",
        tagged(
            r"^\s*([^<\s]+)\s*(.*)$",
            r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>",
        ),
    ),
    Form("<seed:tool_call>", "<seed:tool_call>", "</seed:tool_call>", FUNCTIONS, body=r".*?</function>\s*"),
    Form("<parameter=", "<tool_call>", "</tool_call>", FUNCTIONS, body=r".*?</function>\s*"),  # Qwen3-Coder, Qwen3.5
    Form(
        "<tool_call>",  # Hermes, Qwen
        "<tool_call>",
        "</tool_call>",
        objects,
        body=r'(?:[^"<]|"(?:[^"\\]|\\.)*"|<(?!/tool_call>))*',  # a string may contain the close
        arguments="arguments",
    ),
    Form(
        "<｜tool▁calls▁begin｜>",  # DeepSeek V3, R1, V3.1
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        named(
            r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[^<\n]+)(?:<｜tool▁sep｜>|\n```json\n)"
            r"(?P<arguments>.*?)(?:\n```)?<｜tool▁call▁end｜>"
        ),
    ),
    Form(
        "<|tool_calls_section_begin|>",  # Kimi
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        named(
            r"<\|tool_call_begin\|>\s*(?P<id>(?:functions\.)?(?P<name>[^<:]+)(?::\d+)?)\s*<\|tool_call_argument_begin\|>"
            r"(?P<arguments>.*?)<\|tool_call_end\|>"
        ),
    ),
    Form("<|tool_call>", "<|tool_call>", "<tool_call|>", gemma),
    Form("[TOOL_CALLS]", "[TOOL_CALLS]", None, mistral),
    Form(  # Llama 3
        "dictionary of argument name and its value", "{", None, known_object, first=True, arguments="parameters"
    ),
)


def form_of(template: str) -> Form | None:
    """The form of the calls that a chat template asks for; None if it is not known."""
    return next((form for form in FORMS if form.mark in template), None)
