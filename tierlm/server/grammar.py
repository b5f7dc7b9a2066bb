"""Answers in JSON and forced calls: the tokens that a JSON schema allows next, by the library llguidance."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tierlm.config import Constraint
from tierlm.errors import UsageError
from tierlm.server.tool_calls import Form, Schemas
from tierlm.text import TextCodec

SPACES = r"[ \n\t]{1,32}"  # between two tokens of JSON; without a limit, a model may write nothing else
WHITESPACE = {"whitespace_pattern": SPACES}


class Grammars:
    """Makes constraints for one model's answers. ``vocab``: its logits. ``eos``: ids that end an answer.

    Raises UsageError without llguidance, CheckpointError if it cannot use the tokenizer.
    """

    def __init__(self, codec: TextCodec, vocab: int, eos: Iterable[int]):
        try:
            self._library: Any = importlib.import_module("llguidance")
        except ImportError as error:
            raise UsageError("JSON needs llguidance: pip install 'tierlm[serve]'") from error
        self._vocab = vocab
        added = codec.tokenizer.get_added_tokens_decoder().values()
        self._special = {token.content for token in added if token.special}
        least = max(vocab, codec.tokenizer.get_vocab_size())
        try:
            self._tokenizer = self._library.LLTokenizer(
                codec.tokenizer.to_str(), n_vocab=least, eos_token=sorted(eos) or None
            )
        except Exception as error:  # the library raises what its Rust code says
            raise UsageError(f"JSON cannot be enforced with this tokenizer: {error}") from error

    def json(self, schema: Mapping[str, Any]) -> Callable[[], Constraint]:
        """Allows the texts that are JSON after ``schema``. Raises UsageError if it is wrong or uses too much."""
        make = self._library.LLMatcher.grammar_from_json_schema
        return self._constraint("response_format", schema, lambda text: make(text, overrides=WHITESPACE))

    def call(self, form: Form, functions: Schemas) -> Callable[[], Constraint]:
        """Allows the texts that are one call, in this ``form``, of one of ``functions``. ``form.arguments`` must be
        set. Raises UsageError as ``json``."""
        kinds = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, form.arguments: {"type": "object", **schema}},
                "required": ["name", form.arguments],
                "additionalProperties": False,
            }
            for name, schema in functions.items()
        ]
        start = "call" if form.close is None else f"{self._mark(form.open)} S? call S? {self._mark(form.close)}"
        return self._constraint(
            "tool_choice",
            {"anyOf": kinds, "x-guidance": WHITESPACE},
            lambda text: self._library.LLMatcher.grammar_from_lark(
                f"start: {start}\nS: /{SPACES}/\ncall: %json {text}"
            ),
        )

    def _constraint(
        self, field: str, schema: Mapping[str, Any], grammar: Callable[[str], str]
    ) -> Callable[[], Constraint]:
        """``grammar``: from the schema as a text. ``field``: of the request, for errors."""
        try:
            matcher = self._library.LLMatcher(self._tokenizer, grammar(json.dumps(schema)), log_level=0)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{field}: the schema is not valid JSON: {error}") from error
        if matcher.is_error():
            raise UsageError(f"{field}: the schema is not supported: {_first_line(matcher)}")
        return lambda: Allowed(matcher.deep_copy(), self._vocab, field)

    def _mark(self, text: str) -> str:
        """``text`` in a grammar: a special token, if it is one, or its characters."""
        return text if text in self._special else json.dumps(text)


class Allowed:
    """The tokens that a grammar allows in one answer. ``matcher``: its state after the tokens so far. ``field``: of the
    request, for errors."""

    def __init__(self, matcher: Any, vocab: int, field: str):
        self._matcher, self._vocab, self._field, self._seen = matcher, vocab, field, 0

    def mask(self, ids: Sequence[int], /) -> Tensor:
        self._matcher.consume_tokens(list(ids[self._seen :]))
        self._seen = len(ids)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise UsageError(f"{self._field}: the answer cannot go on: {_first_line(self._matcher)}")
        return torch.from_numpy(np.unpackbits(bits, bitorder="little", count=self._vocab).view(np.bool_))


def _first_line(matcher: Any) -> str:
    return str(matcher.get_error()).partition("\n")[0]
