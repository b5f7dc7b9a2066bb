"""Text to ids and back: the checkpoint's tokenizer and chat template, and streamed decoding."""

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
from tierlm.files import read_regular

Message = Mapping[str, Any]


class TextCodec:
    """The tokenizer and chat template of a model folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        file = folder / "tokenizer.json"
        if not file.exists():
            raise CheckpointError(
                f"{file}: no such file; give prompts as token ids, or add the tokenizer (save_pretrained of "
                "transformers' AutoTokenizer writes it)"
            )
        try:
            self.tokenizer = Tokenizer.from_buffer(read_regular(file))
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file}: not a readable tokenizer: {error}") from error
        config = folder / "tokenizer_config.json"
        self._config = read_json(config) if config.exists() else {}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of ``text``. ``special``: add special tokens (False after a chat template, which adds its own)."""
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
        """The prompt text of a conversation, from the checkpoint's template, which runs in a sandbox.

        Raises UsageError if the model has no template or the template rejects the messages.
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
        except Exception as error:  # a template is foreign code: it may raise anything
            raise UsageError(f"{self.folder}: the chat template rejects these messages: {error}") from error

    def _template(self) -> str:
        plain, packed = self.folder / "chat_template.jinja", self.folder / "chat_template.json"
        if plain.exists():
            try:
                return read_regular(plain).decode("utf-8")
            except OSError as error:
                raise CheckpointError(f"{plain}: cannot be read: {error.strerror}") from error
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{plain}: expected UTF-8, found: {error}") from error
        template = (read_json(packed) if packed.exists() else self._config).get("chat_template")
        if isinstance(template, list):  # several named templates
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
    """Decodes ids one by one into final text: no partial UTF-8 characters, no possible start of a stop text.

    Every decode includes a few tokens of context, since the text of a token may depend on the one before.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str]):
        self._codec, self._stop = codec, stop
        self._ids: list[int] = []
        self._before = 0  # ids[before:after]: context, already released
        self._after = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add ``token`` and return the text that is now final. Sets ``stopped`` at a stop text."""
        self._ids.append(token)
        return self._decode(final=False)

    def flush(self) -> str:
        """The rest, after the last token. Bytes of an incomplete character become U+FFFD."""
        return self._decode(final=True)

    def _decode(self, final: bool) -> str:
        known = self._codec.decode(self._ids[self._before : self._after])
        text = self._codec.decode(self._ids[self._before :])
        if not final and (len(text) <= len(known) or text.endswith("\ufffd")):
            return ""
        self._before, self._after = self._after, len(self._ids)
        return self._release(text[len(known) :], final)

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
    """Length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
