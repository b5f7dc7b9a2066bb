"""Text to ids and back: the checkpoint's tokenizer and chat template, and streamed decoding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tierlm.checkpoints.checkpoint import read_json
from tierlm.checkpoints.gguf_header import read_gguf_header
from tierlm.checkpoints.gguf_tokenizer import tokenizer_config_of, tokenizer_of
from tierlm.checkpoints.tiktoken import tiktoken_of
from tierlm.config import SamplingParams
from tierlm.errors import CheckpointError, UsageError
from tierlm.files import read_regular
from tierlm.templates.template import ChatTemplate, Message, special_tokens

RECOMMENDED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class TextCodec:
    """The tokenizer and chat template of a model folder or GGUF file."""

    def __init__(self, folder: Path):
        self.folder = folder
        if folder.is_file():
            metadata = read_gguf_header(folder).metadata
            self.tokenizer, self._config = tokenizer_of(metadata, str(folder)), tokenizer_config_of(metadata)
            return
        config = folder / "tokenizer_config.json"
        self._config = read_json(config) if config.exists() else {}
        files = [folder / name for name in ("tokenizer.json", "tiktoken.model")]
        file = next((file for file in files if file.exists()), None)
        if file is None:
            raise CheckpointError(
                f"{files[0]}: no such file; give prompts as token ids, or add the tokenizer (save_pretrained of "
                "transformers' AutoTokenizer writes it)"
            )
        try:
            raw = read_regular(file)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
        with _readable(file):
            self.tokenizer = Tokenizer.from_buffer(raw) if file == files[0] else tiktoken_of(raw, self._config)
            self.tokenizer.no_padding()  # a prompt is never padded or cut
            self.tokenizer.no_truncation()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of ``text``. ``special``: add special tokens (False after a chat template, which adds its own)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not valid Unicode: {error}") from error
        with _readable(self.folder):
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        if special and self._config.get("add_bos_token"):
            with _readable(self.folder / "tokenizer_config.json"):  # a token may be no Unicode
                bos = self.tokenizer.token_to_id(special_tokens(self.folder, self._config).get("bos_token", ""))
            return ids if bos is None or ids[:1] == [bos] else [bos, *ids]
        return ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of ``ids``, with special tokens or without."""
        with _readable(self.folder):
            text: str = self.tokenizer.decode(list(ids), skip_special_tokens=not special)
        return text

    def token_text(self, token: int) -> str:
        """The text of one token, special or not. Bytes of an incomplete character become U+FFFD."""
        with _readable(self.folder):
            text: str = self.tokenizer.decode([token], skip_special_tokens=False)
        return text

    @cached_property
    def template(self) -> ChatTemplate:
        """The model's chat template; false if it has none. Raises CheckpointError if its file cannot be read."""
        return ChatTemplate(self.folder, self._config)

    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        args: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of a conversation's prompt. Arguments and errors are those of ``ChatTemplate.render``."""
        return self.encode(self.template.render(messages, tools, args), special=False)


def default_params(folder: Path) -> SamplingParams:
    """The sampling of ``generation_config.json``, where it says ``do_sample``; what it does not name is off, at a
    temperature of 1. Raises CheckpointError."""
    file = folder / "generation_config.json"
    stated = read_json(file) if file.exists() else {}
    if stated.get("do_sample") is not True:
        return SamplingParams()
    chosen = {name: stated[name] for name in RECOMMENDED if stated.get(name) is not None}
    try:
        return SamplingParams(**{"temperature": 1.0, **chosen})
    except UsageError as error:
        raise CheckpointError(f"{file}: {error}") from error


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Errors of the tokenizer's library, also panics of its Rust code, become a CheckpointError."""
    try:
        yield
    except BaseException as error:  # the library raises bare Exception; a panic is not even that
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise CheckpointError(f"{file}: not a readable tokenizer: {error}") from error
        raise


class TextStream:
    """Decodes ids one by one into final text: no partial UTF-8 characters, no possible start of a stop text.

    Every decode includes a few tokens of context, since the text of a token may depend on the one before. ``special``:
    keep special tokens.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str], *, special: bool = False):
        self._codec, self._stop, self._special = codec, stop, special
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
        known = self._codec.decode(self._ids[self._before : self._after], special=self._special)
        text = self._codec.decode(self._ids[self._before :], special=self._special)
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
            keep = 0 if final else max((overlap(self._held, stop) for stop in self._stop), default=0)
            cut = len(self._held) - keep
            piece, self._held = self._held[:cut], self._held[cut:]
        self.text += piece
        return piece


def overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
