"""The chat templates of a model folder: where they are, and the prompt that one makes of messages."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tierlm.checkpoints.checkpoint import read_json
from tierlm.errors import CheckpointError, UsageError
from tierlm.files import read_regular
from tierlm.templates import worker

Message = Mapping[str, Any]

LARGEST = 1 << 20  # bytes of a template file; published ones have less than 50 KB
LIMIT = 60.0  # seconds a worker may take on a busy machine; its own limit is processor time
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field, the standard one first


class ChatTemplate:
    """The templates of ``folder`` by name, ``default`` for an only one, and the special tokens that they may print.

    ``config``: the tokenizer's. Raises CheckpointError if a file cannot be read.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        self.folder = folder
        self.tokens = special_tokens(folder, config)
        self._templates = _find(folder, config)

    def __bool__(self) -> bool:
        """Whether the model has a chat template."""
        return bool(self._templates)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        args: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation.

        ``tools``: JSON schemas of functions. ``args``: more variables of the template, such as ``enable_thinking``,
        ``documents`` or ``add_generation_prompt``. Raises UsageError if there is no template or it rejects the
        messages, CheckpointError if the template is wrong or exceeds a limit of the worker.
        """
        template = self.source(tools=tools is not None)
        if isinstance(messages, (str, Mapping)) or not all(isinstance(message, Mapping) for message in messages):
            raise UsageError('messages: expected a list such as [{"role": "user", "content": "Hello"}]')
        if not messages:
            raise UsageError("messages: expected at least one")
        if tools is not None and not all(isinstance(tool, Mapping) for tool in tools):
            raise UsageError("tools: expected JSON schemas of functions, as dictionaries")
        variables = {"documents": None, "add_generation_prompt": True, **self.tokens, **(args or {})}
        variables["messages"] = [_plain(message) for message in messages]
        variables["tools"] = None if tools is None else [dict(tool) for tool in tools]
        try:
            request = json.dumps({"path": sys.path, "template": template, "variables": variables})
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"messages, tools and template arguments must be JSON values: {error}") from error
        found = self._run(request.encode())
        if "text" in found:
            return str(found["text"])
        at = f", line {found['line']}" if found["line"] else ""
        if found["broken"]:
            raise CheckpointError(f"{self.folder}: the chat template is not usable{at}: {found['error']}")
        raise UsageError(f"{self.folder}: the chat template rejects these messages{at}: {found['error']}")

    def source(self, *, tools: bool) -> str:
        """The template's text, of the one for tools if there is one. Raises UsageError if the model has none."""
        templates = self._templates
        if not templates:
            raise UsageError(f"{self.folder}: this model has no chat template; use a plain prompt (`run --raw`)")
        if tools and "tool_use" in templates:
            return templates["tool_use"]
        if "default" not in templates:
            raise CheckpointError(f"{self.folder}: expected a chat template named default, found {sorted(templates)}")
        return templates["default"]

    def _run(self, request: bytes) -> dict[str, Any]:
        """The worker's reply. Every prompt has its own process, so a template leaves nothing behind."""
        command = [sys.executable, "-I", "-S", worker.__file__]
        try:
            done = subprocess.run(
                command, input=request, capture_output=True, timeout=LIMIT, check=False, start_new_session=True
            )
            ended = done.returncode
        except subprocess.TimeoutExpired:
            ended = -signal.SIGXCPU
        except (OSError, ValueError) as error:
            raise UsageError(f"a process for the chat template cannot be started: {error}") from error
        if ended == 0:
            reply: dict[str, Any] = json.loads(done.stdout)
            return reply
        if ended in (-signal.SIGXCPU, -signal.SIGKILL):
            why = f"it takes more than {worker.SECONDS} s"
        else:
            why = done.stderr.decode(errors="replace").strip().rpartition("\n")[2] or f"its process ended with {ended}"
        return {"error": why, "line": None, "broken": True}


def special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a tokenizer config names; from ``special_tokens_map.json`` in checkpoints of old."""
    old = folder / "special_tokens_map.json"
    named = {**config, **read_json(old)} if "added_tokens_decoder" not in config and old.exists() else config
    found = {}
    for name in SPECIAL:
        value = named.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _find(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """All templates by name. Files come before the tokenizer's config."""
    plain, packed = folder / "chat_template.jinja", folder / "chat_template.json"
    found = {file.stem: _read(file) for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if plain.exists():
        found["default"] = _read(plain)
    if found:
        return found
    value = (read_json(packed) if packed.exists() else config).get("chat_template")
    if isinstance(value, list):  # several named templates
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    templates = value if isinstance(value, dict) else {"default": value}
    return {name: text for name, text in templates.items() if isinstance(name, str) and isinstance(text, str)}


def _read(file: Path) -> str:
    """The text of a template file. Raises CheckpointError."""
    try:
        return read_regular(file, LARGEST).decode("utf-8")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: expected UTF-8, found: {error}") from error


def _plain(message: Message) -> dict[str, Any]:
    """A message as `transformers` gives it to a template: without fields that are None, and with the reasoning under
    each name that templates read."""
    fields = {name: value for name, value in message.items() if value is not None}
    reasoning = next((fields[name] for name in REASONING if name in fields), None)
    return fields if reasoning is None else {"thinking": reasoning, **fields, "reasoning_content": reasoning}
