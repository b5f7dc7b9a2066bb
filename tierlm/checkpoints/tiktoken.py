"""A vocabulary in tiktoken's form, as Kimi publishes it, as a tokenizer of the tokenizers library.

``tiktoken.model`` has a line a token: its bytes in base64, and its rank, which is its id. Merges are not stored: each
token of several bytes is made from every pair of tokens that form it, tokens of a low rank first.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

RESERVED = 256  # ids after the vocabulary, for special tokens
CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
UPPER, LOWER = (rf"[{kinds}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for kinds in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
PATTERN = "|".join(  # of Kimi; Han characters form words of their own
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def tiktoken_of(ranks: bytes, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a ``tiktoken.model`` and a ``tokenizer_config.json``, which names the special tokens. Raises
    ValueError."""
    tokens = _tokens(ranks)
    characters = _characters()
    text = {token: "".join(characters[byte] for byte in token) for token in tokens}
    merges = []
    for token in tokens:  # by rank
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        merges += [(text[left], text[right]) for left, right in pairs if left in tokens and right in tokens]
    vocab = {text[token]: rank for token, rank in tokens.items()}
    found = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    found.decoder = decoders.ByteLevel()
    for added in _added(config, len(tokens)):  # ids follow the order in which tokens are added
        if added.special:
            found.add_special_tokens([added])
        else:
            found.add_tokens([added])
    return found


def _tokens(ranks: bytes) -> dict[bytes, int]:
    """The tokens in order of their ranks, which are 0, 1, 2, ..."""
    found: dict[bytes, int] = {}
    for number, line in enumerate(ranks.splitlines()):
        word, _, rank = line.partition(b" ")
        token = base64.b64decode(word, validate=True)
        if rank != str(number).encode() or not token or token in found:
            raise ValueError(f"line {number + 1}: expected a new token and rank {number}, found {line[:60]!r}")
        found[token] = number
    if missing := [byte for byte in range(256) if bytes([byte]) not in found]:
        raise ValueError(f"expected a token for every byte, found none for {missing[0]}")
    return found


def _added(config: Mapping[str, Any], first: int) -> list[AddedToken]:
    """The special tokens, whose ids begin at ``first``; those without a name are reserved."""
    named = config.get("added_tokens_decoder", {})
    count = max([RESERVED, *(int(number) - first + 1 for number in named)])
    if count > 2 * RESERVED or any(int(number) < first for number in named):
        raise ValueError(f"added_tokens_decoder: expected ids from {first} to {first + 2 * RESERVED - 1}")
    entries = (named.get(str(number), {}) for number in range(first, first + count))
    return [
        AddedToken(
            entry.get("content", f"<|reserved_token_{number}|>"), special=entry.get("special", True), normalized=False
        )
        for number, entry in enumerate(entries, first)
    ]


def _characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE (GPT-2): itself if it is printable."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
