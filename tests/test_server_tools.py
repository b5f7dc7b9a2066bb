"""Tools and JSON over HTTP, asked by the official clients. The engine is real; what it writes is forced, since the demo
model cannot call functions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tierlm.demo
from tierlm import SamplingParams
from tierlm.text import TextCodec

pytest.importorskip("fastapi", reason="needs the server: pip install tierlm[serve]")
from test_server import MESSAGES, Running, running

from tierlm.server.service import Limits

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

VOCAB, EOS = 3072, 1
# Calls as Qwen writes them; the marks are special tokens, as in other families.
TEMPLATE = """{{ bos_token }}{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for message in messages %}
<|{{ message.role }}|>{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}</tool_call>{% endfor %}{% endfor %}
<|assistant|>"""
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": WEATHER}}]
ANTHROPIC_TOOLS = [{"name": "weather", "description": "Of a city", "input_schema": WEATHER}]
ANSWER = (
    'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
    '<tool_call>{"name": "weather", "arguments": {"city": "Bonn"}}</tool_call>'
)
CALLED = [("weather", {"city": "Köln"}), ("weather", {"city": "Bonn"})]
HISTORY = [
    *MESSAGES,
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}},
        ],
    },
    {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "Rain"}]},
]
ANTHROPIC_HISTORY = [
    *MESSAGES,
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "Bonn"}},
        ],
    },
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "Rain"}]},
]
Force = Callable[[str], None]


class Forced:
    """Makes the model write ``ids``."""

    def __init__(self, ids: Sequence[int]):
        self.ids = ids

    def mask(self, ids: Sequence[int], /) -> Tensor:
        return torch.arange(VOCAB) == self.ids[len(ids)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a template for tools."""
    folder = tmp_path_factory.mktemp("tools") / "demo"
    shutil.copytree(Path(tierlm.demo.__path__[0]), folder, ignore=shutil.ignore_patterns("*.py", "*.txt", "__py*"))
    tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
    assert '"<|user|>"' in tokenizer and '"<|assistant|>"' in tokenizer  # special tokens, of the ids 2 and 3
    tokenizer = tokenizer.replace('"<|user|>"', '"<tool_call>"').replace('"<|assistant|>"', '"</tool_call>"')
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Running]:
    with running(Limits(), model=str(folder), options={"context": 1000}) as server:
        yield server


@pytest.fixture
def force(served: Running, monkeypatch: pytest.MonkeyPatch) -> Force:
    """Makes the model answer a text."""

    def forced(text: str) -> None:
        llm = served.service.llm
        ids = [*llm.codec.encode(text, special=False), EOS]
        params = SamplingParams(constraint=lambda: Forced(ids))
        monkeypatch.setattr(llm._llm, "default_params", params)

    return forced


@pytest.fixture
def client(served: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def other(served: Running) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as made:
        yield made


def called(calls: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


def test_openai_calls(client: Any, force: Force) -> None:
    force(ANSWER)
    (choice,) = client.chat.completions.create(model="demo", messages=MESSAGES, tools=TOOLS).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I look."
    assert called(choice.message.tool_calls) == CALLED
    assert len({call.id for call in choice.message.tool_calls}) == 2
    (choice,) = client.chat.completions.create(model="demo", messages=MESSAGES, tools=TOOLS, tool_choice="none").choices
    assert choice.finish_reason == "stop" and choice.message.tool_calls is None
    assert "<tool_call>" not in choice.message.content  # special tokens, left out as without tools


def test_openai_calls_streamed(client: Any, force: Force) -> None:
    force(ANSWER)
    asked = {"model": "demo", "messages": MESSAGES, "tools": TOOLS, "n": 2, "logprobs": True}
    chunks = list(client.chat.completions.create(**asked, stream=True))
    for place in range(2):
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == place]
        assert "".join(choice.delta.content or "" for choice in choices) == "I look."
        calls = [call for choice in choices for call in choice.delta.tool_calls or []]
        assert called(calls) == CALLED and [call.index for call in calls] == [0, 1]
        assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["tool_calls"]
        tokens = [one.token for choice in choices if choice.logprobs for one in choice.logprobs.content]
        assert tokens.count("<tool_call>") == 2


def test_a_call_that_is_cut_is_text(client: Any, force: Force) -> None:
    force(ANSWER)
    asked = {"model": "demo", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 12}
    (choice,) = client.chat.completions.create(**asked).choices
    assert choice.finish_reason == "length" and choice.message.tool_calls is None
    assert choice.message.content.startswith("I look.\n<tool_call>")


def test_an_answer_without_calls(client: Any, other: Any, force: Force) -> None:
    force("It is a <b> day. ")
    (choice,) = client.chat.completions.create(model="demo", messages=MESSAGES, tools=TOOLS).choices
    assert (choice.message.content, choice.finish_reason) == ("It is a <b> day. ", "stop")
    assert choice.message.tool_calls is None
    reply = other.messages.create(model="demo", max_tokens=100, messages=MESSAGES, tools=ANTHROPIC_TOOLS)
    assert [block.text for block in reply.content] == ["It is a <b> day. "] and reply.stop_reason == "end_turn"


def test_anthropic_calls(other: Any, force: Force) -> None:
    force(ANSWER + "\nDone.")
    asked = {"model": "demo", "max_tokens": 200, "messages": MESSAGES, "tools": ANTHROPIC_TOOLS}
    reply = other.messages.create(**asked)
    assert [block.type for block in reply.content] == ["text", "tool_use", "tool_use", "text"]
    assert [(block.name, block.input) for block in reply.content[1:3]] == CALLED
    assert (reply.content[0].text, reply.content[3].text) == ("I look.", "Done.") and reply.stop_reason == "tool_use"
    with other.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    same = [block.model_dump(exclude={"id"}) for block in final.content]
    assert same == [block.model_dump(exclude={"id"}) for block in reply.content]
    assert final.stop_reason == "tool_use" and final.usage.output_tokens == reply.usage.output_tokens


def test_prompts_with_tools_calls_and_results(client: Any, other: Any, served: Running, force: Force) -> None:
    """Both APIs give the template what `transformers` would: arguments as objects."""
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "content": "Rain"},
    ]
    expected = len(served.service.llm.codec.chat(messages, TOOLS))
    force("Rain.")
    reply = client.chat.completions.create(model="demo", messages=HISTORY, tools=TOOLS)
    assert reply.usage.prompt_tokens == expected
    counted = other.messages.count_tokens(model="demo", messages=ANTHROPIC_HISTORY, tools=ANTHROPIC_TOOLS)
    assert counted.input_tokens == expected
    none = {**HISTORY[1], "content": None}
    assert client.chat.completions.create(model="demo", messages=[*MESSAGES, none, HISTORY[2]], tools=TOOLS).choices


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0]: expected a function, found 'web_search'"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name: expected a name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": 5}}]},
            "tools[0].function.parameters: expected a JSON schema, found 5",
        ),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice: expected tools to choose from, found none"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "time"}}},
            "tool_choice: expected one of weather, found 'time'",
        ),
        ({"tools": TOOLS, "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "expected the type text beside tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema: expected a JSON schema"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages[0].tool_calls[0]: expected"),
        ({"messages": [{"role": "assistant", "tool_calls": {"id": "a"}}]}, "messages[0].tool_calls: expected a list"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": "[1]"}}]},
                ]
            },
            "messages[0].tool_calls[0].function.arguments: expected a JSON object, found '[1]'",
        ),
    ],
)
def test_wrong_requests(served: Running, changes: dict[str, Any], said: str) -> None:
    status, _, content = served.post("/v1/chat/completions", {"model": "demo", "messages": MESSAGES, **changes})
    assert status == 400 and said in content["error"]["message"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tools": [{"name": "bash", "type": "bash_20250124"}]}, "tools.0"),
        ({"tools": ANTHROPIC_TOOLS, "tool_choice": {"type": "must"}}, "tool_choice.type"),
        ({"tools": ANTHROPIC_TOOLS, "tool_choice": {"type": "tool"}}, "expected a name with the type tool"),
        ({"tools": ANTHROPIC_TOOLS, "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, "any or tool"),
        ({"messages": [ANTHROPIC_HISTORY[2]]}, "messages[0]: expected the result of a tool_use before it, found 'a'"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "weather"}]}]},
            "messages[0]: expected a tool_use with an id",
        ),
    ],
)
def test_wrong_messages(served: Running, changes: dict[str, Any], said: str) -> None:
    asked = {"model": "demo", "max_tokens": 9, "messages": MESSAGES, **changes}
    status, _, content = served.post("/v1/messages", asked)
    assert status == 400 and said in content["error"]["message"]


@pytest.mark.parametrize(
    ("template", "said"), [("{{ messages }}", "no place for tools"), ("{{ tools }}", "not known here: expected one of")]
)
def test_templates_that_cannot_call(
    served: Running, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, template: str, said: str
) -> None:
    shutil.copy(folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    monkeypatch.setattr(served.service.llm._llm, "_codec", TextCodec(tmp_path))
    asked = {"model": "demo", "messages": MESSAGES, "tools": TOOLS}
    status, _, content = served.post("/v1/chat/completions", asked)
    assert status == 400 and said in content["error"]["message"]


def test_forced_calls(client: Any, other: Any) -> None:
    """The demo model, which knows nothing of tools, calls what it must."""
    kinds = {"type": "object", "properties": {"unit": {"enum": ["K", "C"]}}, "required": ["unit"]}
    clock = {"type": "function", "function": {"name": "clock", "parameters": {**kinds, "additionalProperties": False}}}
    asked: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "tools": [*TOOLS, clock], "temperature": 1, "n": 3}
    named = {"type": "function", "function": {"name": "clock"}}
    for choice in client.chat.completions.create(**asked, tool_choice=named, seed=1).choices:
        assert choice.finish_reason == "tool_calls" and not choice.message.content
        ((name, arguments),) = called(choice.message.tool_calls)
        assert name == "clock" and arguments["unit"] in ("K", "C") and len(arguments) == 1
    asked |= {"tools": [clock], "tool_choice": "required", "stream": True}
    assert sum(len(chunk.choices[0].delta.tool_calls or []) for chunk in client.chat.completions.create(**asked)) == 3
    tool = {"name": "clock", "input_schema": clock["function"]["parameters"]}
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "clock"}):
        reply = other.messages.create(model="demo", max_tokens=400, messages=MESSAGES, tools=[tool], tool_choice=choice)
        assert [block.name for block in reply.content] == ["clock"] and reply.stop_reason == "tool_use"


@pytest.mark.parametrize("template", ["<|channel|> tools", "<arg_key> tools"])
def test_calls_that_cannot_be_forced(
    served: Running, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, template: str
) -> None:
    """Of gpt-oss, and of GLM."""
    shutil.copy(folder / "tokenizer.json", tmp_path)
    template = f"{template}{{{{ tools }}}}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    monkeypatch.setattr(served.service.llm._llm, "_codec", TextCodec(tmp_path))
    asked = {"model": "demo", "messages": MESSAGES, "tools": TOOLS, "tool_choice": "required", "max_tokens": 1}
    status, _, content = served.post("/v1/chat/completions", asked)
    assert status == 400 and "tool_choice: expected auto or none" in content["error"]["message"]


def test_json_after_a_schema(client: Any) -> None:
    pytest.importorskip("llguidance", reason="needs the server: pip install tierlm[serve]")
    properties = {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer", "maximum": 99}}
    schema = {"type": "object", "properties": properties, "required": ["city", "days"], "additionalProperties": False}
    formats = [
        {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema, "strict": True}},
        {"type": "json_object"},
    ]
    asked = {"model": "demo", "messages": MESSAGES, "n": 2, "temperature": 1, "seed": 1, "max_tokens": 300}
    reply = client.chat.completions.create(**asked, response_format=formats[0])
    for choice in reply.choices:
        found = json.loads(choice.message.content)
        assert set(found) == {"city", "days"} and isinstance(found["days"], int) and choice.finish_reason == "stop"
    chunks = client.chat.completions.create(**{**asked, "n": 1}, response_format=formats[1], stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.startswith("{")
    wrong = {"type": "json_schema", "json_schema": {"name": "w", "schema": {"type": "strange"}}}
    with pytest.raises(openai.BadRequestError, match="the schema is not supported"):
        client.chat.completions.create(**asked, response_format=wrong)
