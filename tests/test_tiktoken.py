"""Vocabularies in tiktoken's form, as Kimi's: the tokens of tiktoken's own algorithm, the published special tokens."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierlm import CheckpointError
from tierlm.checkpoints.tiktoken import tiktoken_of
from tierlm.text import TextCodec

TEXT = "Hello world, hello there! 你好世界 don't 12345 über naïve\n\n  x = 3 # ok 👍🏽 " * 3


def words() -> list[bytes]:
    """Each byte, and the frequent parts of TEXT's words, merged pair by pair: ranks as in a trained vocabulary."""
    tokens = [bytes([byte]) for byte in range(256)]
    pieces = [[bytes([byte]) for byte in f" {word}".encode()] for word in TEXT.split(" ")]
    for _ in range(40):
        counts: dict[bytes, int] = {}
        for piece in pieces:
            for left, right in pairwise(piece):
                counts[left + right] = counts.get(left + right, 0) + 1
        best = max(sorted(counts), key=lambda pair: counts[pair])
        if best not in tokens:
            tokens.append(best)
        pieces = [merged(piece, {best: 0}) for piece in pieces]
    return tokens


def merged(parts: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """tiktoken's algorithm: merge the neighbours whose token has the lowest rank, from the left, until there are
    none."""
    while True:
        found = [(ranks[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not found:
            return parts
        _, at = min(found)
        parts = [*parts[:at], parts[at] + parts[at + 1], *parts[at + 2 :]]


WORDS = words()
RANKS = {word: rank for rank, word in enumerate(WORDS)}
FILE = b"".join(b"%s %d\n" % (base64.b64encode(word), rank) for word, rank in RANKS.items())
FIRST = len(WORDS)
CONFIG = {
    "added_tokens_decoder": {
        str(FIRST): {"content": "[BOS]", "special": True},
        str(FIRST + 2): {"content": "<|im_end|>", "special": True},
        str(FIRST + 5): {"content": "<think>", "special": False},
    }
}


def ids_of(text: str) -> list[int]:
    return tiktoken_of(FILE, CONFIG).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("你好世界abc", ["你好世界", "abc"]),  # Han characters are words of their own
        ("abc你好 ABC世界", ["abc", "你好", " ABC", "世界"]),
        ("don't stop", ["don't", " stop"]),
        ("HELLOworld", ["HELLOworld"]),
        ("1234567", ["123", "456", "7"]),
        ("a  b\n\n c", ["a", " ", " b", "\n\n", " c"]),
        ("(x)!\n", ["(x", ")!\n"]),
    ],
)
def test_words_before_merging(text: str, words: list[str]) -> None:
    splitter = tiktoken_of(FILE, {}).pre_tokenizer
    assert [text[start:stop] for _, (start, stop) in splitter.pre_tokenize_str(text)] == words


def test_tokens_equal_tiktokens_algorithm() -> None:
    splitter = tiktoken_of(FILE, {}).pre_tokenizer
    for text in (TEXT, TEXT[::-1], "hello", "worldworld there"):
        expected = []
        for _, (start, stop) in splitter.pre_tokenize_str(text):
            raw = text[start:stop].encode()
            whole = [raw] if raw in RANKS else merged([bytes([byte]) for byte in raw], RANKS)
            expected += [RANKS[part] for part in whole]
        assert ids_of(text) == expected
        assert len(expected) < len(text.encode())


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_every_text_round_trips(text: str) -> None:
    tokenizer = tiktoken_of(FILE, {})
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_special_tokens_have_the_published_ids(tmp_path: Path) -> None:
    (tmp_path / "tiktoken.model").write_bytes(FILE)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    codec = TextCodec(tmp_path)
    text = f"[BOS]hi<|im_end|><think>x<|reserved_token_{FIRST + 1}|>"
    ids = codec.encode(text)
    assert [token - FIRST for token in ids if token >= FIRST] == [0, 2, 5, 1]
    assert codec.decode(ids) == "hi<think>x"  # <think> is not special: it is part of the text
    assert codec.tokenizer.get_vocab_size() == FIRST + 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.replace(b"AA== 0", b"AA== 1"), "line 1: expected a new token and rank 0"),
        (lambda raw: b"AAA=" + raw[4:], "found none for 0"),
        (lambda raw: raw.replace(b"AA==", b"A*=="), "not a readable tokenizer"),
        (lambda raw: raw.splitlines()[0], "expected a token for every byte, found none for 1"),
        (lambda raw: b"\x00" + raw, "not a readable tokenizer"),
    ],
)
def test_malformed_files(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    (tmp_path / "tiktoken.model").write_bytes(change(FILE))
    with pytest.raises(CheckpointError, match=message):
        TextCodec(tmp_path)


@pytest.mark.parametrize("named", [{"5": {"content": "x"}}, {"99999999999": {"content": "x"}}, {"a": {}}, {"700": 3}])
def test_special_tokens_elsewhere(tmp_path: Path, named: object) -> None:
    (tmp_path / "tiktoken.model").write_bytes(FILE)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": named}))
    with pytest.raises(CheckpointError, match="not a readable tokenizer"):
        TextCodec(tmp_path)
