"""Answers in JSON: the tokens that a JSON schema allows next, by the library llguidance."""

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
from tierlm.text import TextCodec

SPACES = r"[ \n\t]{1,32}"  # between two tokens of JSON; without a limit, a model may write nothing else


class Grammars:
    """Makes constraints for one model's answers. ``vocab``: its logits. ``eos``: ids that end an answer.

    Raises UsageError without llguidance, CheckpointError if it cannot use the tokenizer.
    """

    def __init__(self, codec: TextCodec, vocab: int, eos: Iterable[int]):
        try:
            self._library: Any = importlib.import_module("llguidance")
        except ImportError as error:
            raise UsageError("response_format: JSON needs llguidance: pip install 'tierlm[serve]'") from error
        self._vocab = vocab
        least = max(vocab, codec.tokenizer.get_vocab_size())
        try:
            self._tokenizer = self._library.LLTokenizer(
                codec.tokenizer.to_str(), n_vocab=least, eos_token=sorted(eos) or None
            )
        except Exception as error:  # the library raises what its Rust code says
            raise UsageError(f"response_format: JSON cannot be enforced with this tokenizer: {error}") from error

    def json(self, schema: Mapping[str, Any]) -> Callable[[], Constraint]:
        """Allows the texts that are JSON after ``schema``. Raises UsageError if it is wrong or uses too much."""
        try:
            grammar = self._library.LLMatcher.grammar_from_json_schema(
                json.dumps(schema), overrides={"whitespace_pattern": SPACES}
            )
        except (ValueError, RecursionError) as error:
            raise UsageError(f"response_format: the schema is not valid JSON: {error}") from error
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise UsageError(f"response_format: the schema is not supported: {_first_line(matcher)}")
        return lambda: Allowed(matcher.deep_copy(), self._vocab)


class Allowed:
    """The tokens that a grammar allows in one answer. ``matcher``: its state after the tokens so far."""

    def __init__(self, matcher: Any, vocab: int):
        self._matcher, self._vocab, self._seen = matcher, vocab, 0

    def mask(self, ids: Sequence[int], /) -> Tensor:
        self._matcher.consume_tokens(list(ids[self._seen :]))
        self._seen = len(ids)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise UsageError(f"response_format: the answer cannot go on: {_first_line(self._matcher)}")
        return torch.from_numpy(np.unpackbits(bits, bitorder="little", count=self._vocab).view(np.bool_))


def _first_line(matcher: Any) -> str:
    return str(matcher.get_error()).partition("\n")[0]
