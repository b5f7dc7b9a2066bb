"""The forms of calls, in texts as published templates write them, cut anywhere."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tierlm.server.call_stream import CallStream
from tierlm.server.harmony import HarmonyStream
from tierlm.server.tool_calls import FORMS, Call, Form, form_of

PROFILE = settings(deadline=None, derandomize=True, max_examples=60)
TOOLS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
    "now": {"type": "object", "properties": {}},
}
TWO = [Call("weather", {"city": "Köln", "days": 2}), Call("now", {})]
# Published templates: a part of each that tells the form, and how it writes the calls of TWO.
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>'
CASES = {
    "Qwen3": (
        "within <tool_call></tool_call> XML tags",
        HERMES + '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    ),
    "Qwen3-Coder": (
        "<tool_call>\n<function=example>\n<parameter=example_1>\nvalue",
        "<tool_call>\n<function=weather>\n<parameter=city>\nKöln\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    ),
    "Seed-OSS": (
        "{%- set toolcall_begin_token = '<seed:tool_call>' -%}<function=f><parameter=p>",
        "<seed:tool_call>\n<function=weather>\n<parameter=city>Köln</parameter>\n<parameter=days>2</parameter>\n"
        "</function>\n</seed:tool_call>\n<seed:tool_call>\n<function=now>\n</function>\n</seed:tool_call>",
    ),
    "GLM-4.6": (
        "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Köln</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>2</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
    ),
    "GLM-4.7": (
        "<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key>",
        "<tool_call>weather<arg_key>city</arg_key><arg_value>Köln</arg_value><arg_key>days</arg_key>"
        "<arg_value>2</arg_value></tool_call><tool_call>now</tool_call>",
    ),
    "MiniMax-M2": (
        "{%- set toolcall_begin_token = '<minimax:tool_call>' -%}",
        '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Köln</parameter>\n'
        '<parameter name="days">2</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
    ),
    "DeepSeek-V3": (
        "{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>'}}",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Köln", "days": 2}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n'
        "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "DeepSeek-V3.1": (
        "{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'+ tool['function']['name'] + '<｜tool▁sep｜>'}}",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Köln", "days": 2}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "DeepSeek-V3.2": (
        "{{- '<' + dsml_token + 'function_calls>' -}}",
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n'
        '<｜DSML｜parameter name="city" string="true">Köln</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
    ),
    "Kimi-K2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        '{"city": "Köln", "days": 2}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>'
        "{}<|tool_call_end|><|tool_calls_section_end|>",
    ),
    "Gemma-4": (
        "{{- '<|tool_call>call:' + function['name'] + '{' -}}",
        '<|tool_call>call:weather{city:<|"|>Köln<|"|>,days:2}<tool_call|><|tool_call>call:now{}<tool_call|>',
    ),
    "Mistral-Nemo": (
        '{{- "[TOOL_CALLS][" }}',
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Köln", "days": 2}, "id": "call00000"}, '
        '{"name": "now", "arguments": {}, "id": "call00001"}]',
    ),
    "Mistral-Small-3.2": (
        "{{- '[TOOL_CALLS]' + name + '[CALL_ID]' + tool_call['id'] }}",
        '[TOOL_CALLS]weather[CALL_ID]call00000[ARGS]{"city": "Köln", "days": 2}[TOOL_CALLS]now[CALL_ID]b[ARGS]{}',
    ),
    "Ministral-3": (
        "{{- '[TOOL_CALLS]' }}{{- name + '[ARGS]' + arguments }}",
        '[TOOL_CALLS]weather[ARGS]{"city": "Köln", "days": 2}[TOOL_CALLS]now[ARGS]{}',
    ),
    "Llama-3.1": (
        'in the format {"name": function name, "parameters": dictionary of argument name and its value}.',
        '{"name": "weather", "parameters": {"city": "Köln", "days": 2}}',
    ),
}


def form(name: str) -> Form:
    found = form_of(CASES[name][0])
    assert found is not None
    return found


def parts_of(form: Form | None, pieces: list[str], *, stopped: bool = True) -> list[str | Call]:
    """What a stream makes of an answer in pieces, adjacent texts joined. ``form``: None: gpt-oss."""
    stream = HarmonyStream() if form is None else CallStream(form, TOOLS)
    parts = list[str | Call]()
    for part in [*(part for piece in pieces for part in stream.feed(piece)), *stream.end(stopped)]:
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)
    return parts


def expected(name: str) -> list[Call]:
    return TWO[:1] if name == "Llama-3.1" else TWO


@pytest.mark.parametrize("name", CASES)
def test_calls_as_templates_write_them(name: str) -> None:
    text = CASES[name][1]
    assert parts_of(form(name), [text]) == expected(name)
    if not form(name).first:
        assert parts_of(form(name), [f"I look.\n\n{text}\n"]) == ["I look.", *TWO]
        assert parts_of(form(name), ["a < b [T] {x}\n"]) == ["a < b [T] {x}\n"]


def test_every_form_is_tested() -> None:
    assert {form(name).mark for name in CASES} == {one.mark for one in FORMS}
    assert form_of("{{ messages }} no {{ tools }}") is None


@PROFILE
@given(data=st.data(), name=st.sampled_from(sorted(CASES)), stopped=st.booleans())
def test_cuts_change_nothing(data: st.DataObject, name: str, stopped: bool) -> None:
    """Neither in calls nor in what looks like them."""
    one, mark = form(name), CASES[name][1]
    words = [mark, mark[: len(mark) // 2], one.open, one.close or "", "<tool", '"', "{}", " ", "\n", "x"]
    text = "".join(data.draw(st.lists(st.sampled_from(words), max_size=6)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parts_of(one, pieces, stopped=stopped) == parts_of(one, [text], stopped=stopped)
    assert parts_of(one, list(text), stopped=stopped) == parts_of(one, [text], stopped=stopped)


@PROFILE
@given(text=st.text(st.sampled_from('<tool_call>/{}"\\ \nab'), max_size=60))
@example("<tool_call>" * 3)
@example(' <tool_call>{"name": "now"}')
def test_text_that_is_no_call_is_lost_by_no_character(text: str) -> None:
    parts = parts_of(form("Qwen3"), list(text), stopped=False)
    assert not text or any(isinstance(part, Call) for part in parts) or parts == [text]


def test_text_streams_until_a_call_may_begin() -> None:
    stream = CallStream(form("Qwen3"), TOOLS)
    assert stream.feed("Let me see. ") == ["Let me see."]
    assert stream.feed("<b> ") == [" <b>"]
    assert stream.feed("<tool_") == []
    assert stream.feed("box") == [" <tool_box"]
    assert stream.feed(HERMES[:-1]) == []
    assert stream.feed(">") == TWO[:1]
    assert stream.feed("\nDone") == ["Done"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Qwen3", "<tool_call>\nweather\n</tool_call> and on"),
        ("Qwen3", '<tool_call>{"name": "weather", "arguments": 5}</tool_call>'),
        ("Qwen3", '<tool_call>{"name": "weather", "arguments": {"city": 1e999}}</tool_call>'),
        ("Qwen3", '<tool_call>{"name": "weather", "arguments": {"city": "\\ud800"}}</tool_call>'),
        ("Qwen3", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
        ("Qwen3", "<tool_call>[]</tool_call>"),
        ("Qwen3", "<tool_call>" + "[" * 100000 + "</tool_call>"),
        ("Qwen3-Coder", "<tool_call><function=weather>Köln</function></tool_call>"),
        ("GLM-4.6", "<tool_call>weather in Köln</tool_call>"),
        ("DeepSeek-V3.1", "<｜tool▁calls▁begin｜>weather<｜tool▁calls▁end｜>"),
        ("Kimi-K2", "<|tool_calls_section_begin|><|tool_calls_section_end|>"),
        ("Gemma-4", "<|tool_call>call:weather(Köln)<tool_call|>"),
        ("Mistral-Nemo", "[TOOL_CALLS] are what I make."),
        ("Llama-3.1", '{"name": "someone", "parameters": {}}'),
        ("Llama-3.1", 'As {"name": "now", "parameters": {}}'),
    ],
)
def test_malformed_calls_stay_text(name: str, text: str) -> None:
    assert parts_of(form(name), [text]) == [text]


def test_a_good_call_after_a_malformed_one() -> None:
    assert parts_of(form("Qwen3"), ["<tool_call>{", HERMES]) == ["<tool_call>{", *TWO[:1]]


@pytest.mark.parametrize("name", ["Qwen3", "GLM-4.6", "DeepSeek-V3.1", "Mistral-Nemo"])
def test_a_call_without_its_end(name: str) -> None:
    """It counts if the model has ended the answer, since the end may be a stop token, and not if the answer was cut."""
    open, close, text = form(name).open, form(name).close or "", CASES[name][1]
    cut = text.removesuffix(close).rstrip()
    assert parts_of(form(name), [cut]) == TWO
    last = cut[cut.rfind(open) :]
    assert parts_of(form(name), [cut], stopped=False)[-1] == last


def test_strings_may_contain_the_marks() -> None:
    city = "</tool_call> or <tool_call> \\ "
    text = '<tool_call>{"name": "weather", "arguments": {"city": "</tool_call> or <tool_call> \\\\ "}}</tool_call>'
    assert parts_of(form("Qwen3"), [text]) == [Call("weather", {"city": city})]
    code = "<tool_call><function=weather><parameter=city>\na</parameter>\n b\n\n</parameter>\n</function></tool_call>"
    assert parts_of(form("Qwen3-Coder"), [code]) == [Call("weather", {"city": "a</parameter>\n b\n"})]


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "integer"}, "5", 5),
        ({"type": "number"}, "5", 5),
        ({"type": "boolean"}, "True", True),
        ({"type": "array"}, '["a", 1]', ["a", 1]),
        ({"type": "object"}, '{"a": null}', {"a": None}),
        ({"type": "integer"}, "many", "many"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "5", "5"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "5", 5),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({}, "5", 5),
        (True, "x y", "x y"),
    ],
)
def test_arguments_follow_the_schema(schema: Any, text: str, value: Any) -> None:
    answer = f"<tool_call>f<arg_key>a</arg_key><arg_value>{text}</arg_value></tool_call>"
    stream = CallStream(form("GLM-4.6"), {"f": {"properties": {"a": schema}}})
    (call,) = stream.feed(answer)
    assert isinstance(call, Call) and call.arguments == {"a": value}
    assert type(call.arguments["a"]) is type(value)


def test_gemma_values() -> None:
    text = '<|tool_call>call:f{a:{b:[1,None,<|"|>c:d, "é"<|"|>]},<|"|>None<|"|>:true,None:1.5}<tool_call|>'
    call = Call("f", {"a": {"b": [1, None, 'c:d, "é"']}, "None": 1.5})
    assert parts_of(form("Gemma-4"), [text]) == [call]


def test_ids_are_those_of_the_model_or_made() -> None:
    (first, _) = parts_of(form("Kimi-K2"), [CASES["Kimi-K2"][1]])
    assert isinstance(first, Call) and first.id == "functions.weather:0"
    (first, second) = parts_of(form("Qwen3"), [CASES["Qwen3"][1]])
    assert isinstance(first, Call) and isinstance(second, Call) and first.id != second.id
    assert len(first.id) == 9 and first.id.isalnum()


# --- gpt-oss

THINK = "<|channel|>analysis<|message|>I must look.<|end|><|start|>assistant"
CALL = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Köln", "days": 2}'
FINAL = "<|channel|>final<|message|>It is a < b.<|return|>"


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        (THINK + CALL, TWO[:1]),  # its end is a stop token
        (THINK + CALL + "<|call|>", TWO[:1]),
        (" to=functions.now<|channel|>commentary json<|message|>{}<|call|>" + "<|start|>assistant" + CALL, TWO[::-1]),
        (THINK + "<|channel|>commentary<|message|>I look. <|end|><|start|>assistant" + CALL, ["I look. ", *TWO[:1]]),
        (THINK + FINAL, ["It is a < b."]),
        (THINK, []),
        ("<|channel|>analysis<|message|>I", []),
        (CALL[:-1], [CALL[:-1]]),
        ("no messages", ["no messages"]),
    ],
)
def test_gpt_oss(answer: str, parts: list[str | Call]) -> None:
    for pieces in ([answer], list(answer), [answer[:30], answer[30:33], answer[33:]]):
        assert parts_of(None, pieces) == parts


def test_gpt_oss_streams_text_and_no_call_that_is_cut() -> None:
    stream = HarmonyStream()
    assert stream.feed(THINK + "<|channel|>final<|message|>It") == ["It"]
    assert stream.feed(" is <") == [" is "]
    assert stream.feed("b<|end") == ["<b"]
    assert stream.end(stopped=False) == ["<|end"]
    assert parts_of(None, [THINK + CALL], stopped=False) == ["<|start|>assistant" + CALL]
