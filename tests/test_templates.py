"""Chat templates: the prompts of `transformers`, where templates are found, the sandbox, its limits, and errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from test_text import BOS, make_codec
from transformers.utils.chat_template_utils import render_jinja_template

from tierlm.errors import CheckpointError, UsageError
from tierlm.templates.template import LARGEST, ChatTemplate

HELLO = [{"role": "user", "content": "hello"}]
TOKENS = {"bos_token": BOS, "eos_token": "<|end|>"}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The weather of a <city> & "more" - é',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = {"id": "0", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one question": [{"role": "user", "content": "  what is <b> & 'c' - é?\n"}],
    "three turns": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\ntwo", "tool_calls": None},
        {"role": "user", "content": "three"},
    ],
    "tools": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "reasoning": "I ask", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "0", "name": "weather", "content": '{"sun": true}'},
    ],
}
# The constructs of published templates, a few lines of each kind.
TEMPLATES = {
    "DeepSeek-V2": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '

' }}{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + (message['content'] or '') + eos_token }}{% endif %}
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}""",
    "DeepSeek-V3.1": """{% if not thinking is defined %}{% set thinking = false %}{% endif -%}
{% set ns = namespace(is_first=false, system_prompt='', is_first_sp=true) %}
{%- for message in messages %}{%- if message['role'] == 'system' %}{%- if ns.is_first_sp %}
{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}{%- endif %}
{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}
{%- for message in messages %}{%- if message['role'] == 'assistant' and message['tool_calls'] is defined
 and message['tool_calls'] is not none %}{%- for tool in message['tool_calls'] %}<|tool|>
{{- tool['function']['name'] + '\\n```json\\n' + tool['function']['arguments'] | tojson + '\\n```' }}{%- endfor %}
{%- elif message['role'] == 'assistant' %}{%- set content = message['content'] %}
{%- if '</think>' in content %}{% set content = content.split('</think>', 1)[1] %}{% endif %}
{{- '</think>' + content + '<|end|>' }}{%- else %}<|{{ message['role'] | title }}|>{{ message['content'] }}
{%- endif %}{%- endfor %}{% if add_generation_prompt %}<|Assistant|>{{ '<think>' if thinking else '</think>' }}
{%- endif %}""",
    "Kimi-K2": """{% macro render(content) -%}{%- if content is string -%}{{ content }}{%- elif content is none -%}
{%- else -%}{%- for part in content -%}{{ part.get('text', '') }}{%- endfor -%}{%- endif -%}{%- endmacro -%}
{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>{%- endif -%}
{%- for message in messages -%}{%- if loop.first and messages[0]['role'] != 'system' -%}
<|im_system|>system<|im_middle|>default<|im_end|>{%- endif -%}
{%- set role_name = message.get('name') or message['role'] -%}<|im_{{ role_name }}|>{{ render(message['content']) }}
{%- endfor -%}{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}""",
    "Qwen3": """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}
{%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
{%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}
{%- if tools %}{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}{%- endif %}
{%- for message in messages %}{%- if message.role == "assistant" %}
{%- set content = message.content if message.content is string else '' %}{%- set reasoning_content = '' %}
{%- if message.reasoning_content is string %}{%- set reasoning_content = message.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' }}{%- if loop.index0 > ns.last_query_index %}
{{- '<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- content }}{%- endif %}{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}""",
    "Mixtral": """{%- if messages[0]["role"] == "system" %}{%- set system = messages[0]["content"] %}
{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}
{{- bos_token }}{%- for message in loop_messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('After the optional system message, roles must alternate user/assistant/user/...') }}{%- endif %}
{%- if message["role"] == "user" %}{%- if loop.last and system is defined %}
{{- " [INST] " + system + "\\n\\n" + message["content"] + " [/INST]" }}{%- else %}
{{- " [INST] " + message["content"] + " [/INST]" }}{%- endif %}{%- else %}
{{- " " + message["content"] + eos_token }}{%- endif %}{%- endfor %}""",
    "gpt-oss": """{#- harmony -#}{%- macro type_of(spec, required=[]) -%}{%- if spec.type == "object" -%}
{{- "{\\n" }}{%- for name, value in spec.properties.items() -%}{{- "// " ~ name ~ ": " ~ type_of(value) -}}
{%- if name not in spec.required -%}?{%- endif -%}{{- "\\n" }}{%- endfor -%}{{- "}" }}{%- else -%}
{{- spec.type | default("any") -}}{%- endif -%}{%- endmacro -%}
{{- "Current date: " + strftime_now("%Y-%m") + "\\nReasoning: " + (reasoning_effort or "medium") }}
{%- for tool in tools or [] %}{%- set function = tool.function %}
{{- "type " + function.name + " = (_: " + type_of(function.parameters) + ") => any;\\n" }}{%- endfor %}
{%- for message in messages -%}{%- if message.role == "assistant" and "thinking" in message %}
{{- "<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}{%- endif %}
{%- if message.content is mapping or not message.content %}{%- continue %}{%- endif %}
{{- "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" }}{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}""",
    "GLM-4.5": """[gMASK]<sop>
{%- if tools -%}<|system|># Tools{% for tool in tools %}{{ tool | tojson(ensure_ascii=False, indent=2) }}
{% endfor %}{%- endif -%}{%- macro visible_text(content) -%}{%- if content is string -%}{{- content }}
{%- elif content is iterable and content is not mapping -%}{%- for item in content -%}{{- item.text }}{%- endfor -%}
{%- else -%}{{- content }}{%- endif -%}{%- endmacro -%}{%- for m in messages %}{%- if m.role == 'tool' -%}
{%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|observation|>' }}{%- endif %}
{%- elif m.tool_calls %}{% for tc in m.tool_calls %}{%- set tc = tc.function %}{{ '\\n<tool_call>' + tc.name }}
{% set _args = tc.arguments %}{% for k, v in _args.items() %}<arg_key>{{ k }}</arg_key>
<arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>
{% endfor %}</tool_call>{% endfor %}{%- else -%}<|{{ m.role }}|>{{ visible_text(m.content) }}
{{- '/nothink' if (enable_thinking is defined and not enable_thinking and m.role == 'user'
 and not visible_text(m.content).endswith("/nothink")) else '' -}}{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}""",
    "OLMoE": """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'assistant' %}{% generation %}{% set kept = 1 %}{{ message['content'] }}
{% endgeneration %}{% elif message['role'] != 'tool' %}
{{ '<|' + message['role'] + '|>\n' + (message['content'] or '') }}
{% endif %}{{ kept is defined }}{% endfor %}""",
    "Llama-3.1": """{{- bos_token }}{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}Today: {{ date_string }}
{%- for message in messages %}
{%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- elif 'tool_calls' in message %}{%- if not message.tool_calls|length == 1 %}
{{- raise_exception("This model only supports single tool-calls at once!") }}{%- endif %}
{{- message.tool_calls[0].function.arguments | tojson }}{%- endif %}{%- endfor %}
{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}{%- endif %}""",
    "Gemma": """{{ bos_token }}{%- set first_user_prefix = messages[0]['content'] + '

' if messages[0]['role'] == 'system' else '' -%}{%- for message in messages -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}
{%- if message['content'] is string -%}{{ message['content'] | trim }}{%- endif -%}{{ '<end_of_turn>\n' }}
{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}""",
    "all that templates may use": """
{{ {'b': [1, 2.5, none, true, '<&>"é']} | tojson(sort_keys=True, ensure_ascii=True) }}
{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}
{{ dict(a=1) }}{{ dict.fromkeys('ab', 0) }}{{ documents }}{{ tools is none }}{{ unk_token is defined }}
{% for k, v in {'x': 1, 'y': 2} | dictsort %}{{ k ~ v }}{% endfor %}{{ [3, 1] | sort | join(',') }}{{ 'a' | upper }}
{{ messages | map(attribute='role') | list }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{% set x %}block {{ messages[0].role }}{% endset %}{{ x }}{{ namespace(self=1).self }}{{ missing }}{{ none }}""",
}  # fmt: skip


def save(folder: Path, template: Any) -> ChatTemplate:
    return ChatTemplate(folder, {**TOKENS, "chat_template": template})


# --- the same prompts as transformers


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_transformers(tmp_path: Path, name: str, conversation: str) -> None:
    messages, template = CONVERSATIONS[conversation], TEMPLATES[name]
    tools = TOOLS if conversation == "tools" else None
    args = {"enable_thinking": False, "thinking": True} if conversation == "three turns" else {}
    plain = [{name: value for name, value in message.items() if value is not None} for message in messages]

    def theirs() -> str:
        found, _ = render_jinja_template(
            [plain], tools=tools, chat_template=template, add_generation_prompt=True, **TOKENS, **args
        )
        return str(found[0])

    if (name, conversation) == ("Mixtral", "tools"):
        with pytest.raises(TemplateError) as caught:
            theirs()
        with pytest.raises(UsageError, match=re.escape(str(caught.value))):
            save(tmp_path, template).render(messages, tools, args)
    else:
        assert save(tmp_path, template).render(messages, tools, args) == theirs()


def test_arguments_reach_the_template(tmp_path: Path) -> None:
    template = save(tmp_path, "{{ documents[0].title }} {{ add_generation_prompt }} {{ bos_token }}")
    args = {"documents": [{"title": "t"}], "add_generation_prompt": False, "bos_token": "mine"}
    assert template.render(HELLO, args=args) == "t False mine"


# --- where templates are


def test_bos_of_the_template_is_not_put_twice(tmp_path: Path) -> None:
    codec = make_codec(tmp_path, adds_bos=True, add_bos_token=True, chat_template="{{ bos_token }}hello", bos_token=BOS)
    assert codec.chat(HELLO).count(codec.tokenizer.token_to_id(BOS)) == 1


def test_template_named_default_among_several_and_the_one_for_tools(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain {{ bos_token }}"}]
    assert save(tmp_path, several).render(HELLO) == f"plain {BOS}"
    assert save(tmp_path, several).render(HELLO, TOOLS) == "tools"
    assert save(tmp_path, several[1:]).render(HELLO, TOOLS) == f"plain {BOS}"
    with pytest.raises(CheckpointError, match="tool_use"):
        save(tmp_path, several[:1]).render(HELLO)


def test_template_files_come_before_the_config(tmp_path: Path) -> None:
    assert save(tmp_path, "config").render(HELLO) == "config"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json é"}))
    assert save(tmp_path, "config").render(HELLO) == "json é"
    (tmp_path / "chat_template.jinja").write_text("jinja é", encoding="utf-8")
    assert save(tmp_path, "config").render(HELLO, TOOLS) == "jinja é"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert save(tmp_path, "config").render(HELLO) == "jinja é"
    assert save(tmp_path, "config").render(HELLO, TOOLS) == "tools"


def test_special_tokens(tmp_path: Path) -> None:
    """A token that is not set is undefined, not the word None. Old checkpoints name them in a file of their own."""
    text = "{{ bos_token }}|{{ eos_token }}|{{ pad_token is defined }}"
    config = {"bos_token": {"content": "<s>"}, "eos_token": None, "chat_template": text}
    assert ChatTemplate(tmp_path, config).render(HELLO) == "<s>||False"
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": {"content": "p"}}))
    assert ChatTemplate(tmp_path, config).render(HELLO) == "<s>|</s>|True"
    assert ChatTemplate(tmp_path, {**config, "added_tokens_decoder": {}}).render(HELLO) == "<s>||False"


@pytest.mark.parametrize("template", [None, [], 5, {"default": 5}], ids=str)
def test_missing_template_is_a_usage_error(tmp_path: Path, template: Any) -> None:
    assert not save(tmp_path, template) and save(tmp_path, "x")
    with pytest.raises(UsageError, match="no chat template"):
        save(tmp_path, template).render(HELLO)


def test_template_file_without_a_template_is_no_template(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text("{}")
    assert not save(tmp_path, "config")


@pytest.mark.parametrize("kind", ["too large", "no UTF-8", "a folder", "a pipe"])
def test_template_file_that_is_none(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "chat_template.jinja"
    if kind == "a pipe":
        os.mkfifo(file)
    elif kind == "a folder":
        file.mkdir()
    else:
        file.write_bytes(b"\xff" if kind == "no UTF-8" else bytes(LARGEST + 1))
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, None)
    assert str(file) in str(caught.value)


# --- a checkpoint is data


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__ | length }}{{ strftime_now.__globals__.x }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ self.__init__.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ namespace(__class__=1) }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{% include 'other' %}",
        "{% import 'os' as os %}",
    ],
)
def test_template_cannot_leave_its_sandbox(tmp_path: Path, template: str) -> None:
    messages = [dict(HELLO[0])]
    with pytest.raises(UsageError) as caught:
        save(tmp_path, template).render(messages)
    assert str(tmp_path) in str(caught.value) and "<class 'object'>" not in str(caught.value)
    assert messages == HELLO


def test_a_template_that_prints_an_unsafe_attribute_prints_nothing(tmp_path: Path) -> None:
    assert save(tmp_path, "[{{ ''.__class__ }}]").render(HELLO) == "[]"


@pytest.mark.parametrize(
    ("template", "limit"),
    [
        ("{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}", "2 s"),
        ("{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}", "2 s"),
        ("{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "256 MiB"),
        ("{{ 'x' * 10**10 }}", "256 MiB"),
        ("{{ '%10000000000d' % 1 }}", "256 MiB"),
        ("{% for i in range(2000) %}{{ 'x' * 10000 }}{% endfor %}", "16777216 characters"),
        ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "recursion"),
    ],
    ids=["loops", "numbers", "doubling", "text", "format", "prompt", "depth"],
)
def test_time_and_memory_of_a_template_are_bounded(tmp_path: Path, template: str, limit: str) -> None:
    with pytest.raises(CheckpointError, match=limit) as caught:
        save(tmp_path, template).render(HELLO)
    assert str(tmp_path) in str(caught.value)


def test_an_interrupt_ends_the_process_of_a_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = subprocess.Popen

    class Interrupted(real):  # type: ignore[type-arg, misc]
        def communicate(self, *_: Any, **__: Any) -> Any:
            made.append(self)
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}").render(HELLO)
    assert made[0].poll() is not None


def test_a_process_that_cannot_start_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(UsageError, match="cannot be started"):
        save(tmp_path, "x").render(HELLO)


# --- errors


def test_what_a_template_raises_is_a_usage_error_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line 3: roles must alternate") as caught:
        save(tmp_path, "{% if true %}\n\n{{ raise_exception('roles must alternate') }}{% endif %}").render(HELLO)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "template", ["\n{% for %}", "\n{{ messages[0]['content'", "\n{% endif %}", "\n{{ 'a' | none }}"]
)
def test_a_template_that_is_none_is_a_checkpoint_error_with_its_line(tmp_path: Path, template: str) -> None:
    with pytest.raises(CheckpointError, match="line 2: ") as caught:
        save(tmp_path, template).render(HELLO)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ missing.attribute }}",
        "{{ messages[7].content.strip() }}",
        "{{ 'a' + 1 }}",
        "{{ no_such_function() }}",
        "{{ 1 / 0 }}",
        "{{ 'abc'.index('z') }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_errors_of_a_template_are_usage_errors(tmp_path: Path, template: str) -> None:
    with pytest.raises(UsageError, match="line 1: ") as caught:
        save(tmp_path, template).render(HELLO)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "messages", [[], "hello", HELLO[0], ["hello"], [{"role": "user", "content": object()}]], ids=range(5)
)
def test_messages_that_are_none(tmp_path: Path, messages: Any) -> None:
    with pytest.raises(UsageError, match="messages"):
        save(tmp_path, "x").render(messages)


def test_tools_are_schemas(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tools: expected JSON schemas"):
        save(tmp_path, "x").render(HELLO, [time.time])  # type: ignore[list-item]
