"""Text to ids and back: the checkpoint's own tokenizer and chat template, and text that is streamed as it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from tierlm.checkpoints.checkpoint import read_json
from tierlm.errors import CheckpointError, UsageError

Message = Mapping[str, Any]


class TextCodec:
    """``tokenizer.json``, ``tokenizer_config.json`` and the chat template of a model folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        file = folder / "tokenizer.json"
        if not file.exists():
            raise CheckpointError(
                f"{file}: no such file; give prompts as token ids, or add the tokenizer (AutoTokenizer of transformers "
                "writes one with save_pretrained)"
            )
        try:
            self.tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file}: not a tokenizer that can be read: {error}") from error
        config = folder / "tokenizer_config.json"
        self._config = read_json(config) if config.exists() else {}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids; ``special``: with the tokens that the tokenizer puts around a text (a chat template has put its own)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not valid Unicode: {error}") from error
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        if special and self._config.get("add_bos_token"):
            bos = self.tokenizer.token_to_id(self._token("bos_token") or "")
            return ids if bos is None or ids[:1] == [bos] else [bos, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def chat(self, messages: Sequence[Message]) -> str:
        """The prompt text for a conversation, from the checkpoint's template, run in a sandbox.

        Raises UsageError if the model has no template, or its template refuses the messages.
        """
        template = self._template()
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        tokens = {name: self._token(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        try:
            return environment.from_string(template).render(
                messages=list(messages), add_generation_prompt=True, **tokens
            )
        except Exception as error:  # a template is a program of somebody else's: it may raise anything
            raise UsageError(f"{self.folder}: the chat template refuses these messages: {error}") from error

    def _template(self) -> str:
        plain, packed = self.folder / "chat_template.jinja", self.folder / "chat_template.json"
        if plain.exists():
            return plain.read_text(encoding="utf-8")
        template = (read_json(packed) if packed.exists() else self._config).get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
        if not isinstance(template, str):
            raise UsageError(f"{self.folder}: this model has no chat template; use `run` with a plain prompt")
        return template

    def _token(self, name: str) -> str | None:
        value = self._config.get(name)
        return value.get("content") if isinstance(value, dict) else value


def _refuse(message: str) -> None:
    raise TemplateError(message)


class TextStream:
    """Turns ids, one by one, into text that is safe to show: no half of a UTF-8 character, and nothing that may yet
    turn out to be the beginning of a stop text.

    A few tokens of context go along with every decode, since what a token looks like may depend on the one before.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str]):
        self._codec, self._stop = codec, stop
        self._ids: list[int] = []
        self._before = 0  # ids[before:after] is context whose text is out already
        self._after = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that can be shown now that ``token`` has come; ``stopped`` tells that a stop text was met."""
        self._ids.append(token)
        known = self._codec.decode(self._ids[self._before : self._after])
        text = self._codec.decode(self._ids[self._before :])
        if len(text) <= len(known) or text.endswith("\ufffd"):
            return ""
        self._before, self._after = self._after, len(self._ids)
        return self._release(text[len(known) :], final=False)

    def flush(self) -> str:
        """What is left when no more tokens come; bytes that never became a character are shown as U+FFFD."""
        known = self._codec.decode(self._ids[self._before : self._after])
        text = self._codec.decode(self._ids[self._before :])
        self._before = self._after = len(self._ids)
        return self._release(text[len(known) :], final=True)

    def _release(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            piece, self._held = self._held[: min(found)], ""
        else:
            keep = 0 if final else max((_overlap(self._held, stop) for stop in self._stop), default=0)
            cut = len(self._held) - keep
            piece, self._held = self._held[:cut], self._held[cut:]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
