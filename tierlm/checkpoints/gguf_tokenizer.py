"""The tokenizer in the metadata of a GGUF file, as one of the tokenizers library.

The patterns are those of the models' own tokenizer.json; their names are llama.cpp's (llama-vocab.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tierlm.errors import CheckpointError, UnsupportedModelError

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+ENDING|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*ENDING"
CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTION}|{WORD}|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{CONTRACTION}|{WORD}|\p{{N}}|{REST}"
PATTERNS: dict[str, Sequence[str]] = {  # name of a pre-tokenizer -> splits, one after another
    "default": [GPT2],
    "gpt-2": [GPT2],
    "olmo": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
    "dbrx": [LLAMA3],
    "glm4": [LLAMA3],
    "chatglm-bpe": [LLAMA3],
    "qwen2": [QWEN2],
    "deepseek-r1-qwen": [QWEN2],
    "qwen35": [
        rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "deepseek-llm": [
        r"[\r\n]",
        r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
        r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        r"[\u0800-\u9fa5\uac00-\ud7ff]+",
        r"\p{N}+",
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[\u0800-\u9fa5\uac00-\ud7ff]+", r"\p{N}"],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        r"[\u4e00-\u9fa5\u3040-\u30ff]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
    "gpt-4o": [rf"{CASED.replace('ENDING', CONTRACTION + '?')}|\p{{N}}{{1,3}}|{CASED_REST}"],
    "minimax-m2": [rf"{CASED.replace('ENDING', CONTRACTION + '?')}|\p{{N}}{{1,3}}|{CASED_REST}"],
    "tekken": [rf"{CASED.replace('ENDING', '')}|\p{{N}}|{CASED_REST}"],
}
CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
SPACE = "▁"
MAX_CUTS = 2**30  # characters of the parts that pieces are cut into; published vocabularies have less than 2**26
IDS = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def tokenizer_of(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """Raises CheckpointError and UnsupportedModelError."""
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"{where}: no tokenizer: tokenizer.ggml.tokens is missing or no list of texts")
    try:
        if kind == "gpt2":
            found = _byte_level(metadata, tokens, where)
        elif kind == "llama":
            found = _sentencepiece(metadata, tokens)
        else:
            raise UnsupportedModelError(
                f"{where}: tokenizer {str(kind)[:60]!r} is not supported; gpt2 (byte-level BPE) and llama "
                "(SentencePiece) are; give prompts as token ids"
            )
        types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
        added = [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (CONTROL, USER_DEFINED) and token
        ]
        found.add_tokens(added)
        found.add_special_tokens([token for token in added if token.special])
    except CheckpointError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{where}: malformed tokenizer: {str(error)[:200]}") from error
    return found


def tokenizer_config_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What tokenizer_config.json says: special tokens, whether a text begins with one, the chat template."""
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    pre, kind = metadata.get("tokenizer.ggml.pre"), metadata.get("tokenizer.ggml.model")
    config: dict[str, Any] = {
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre == "llama-bpe"),
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    for name, key in IDS.items():
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(number) is int and 0 <= number < len(tokens):
            config[name] = tokens[number]
    return config


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], where: str) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PATTERNS:
        raise UnsupportedModelError(
            f"{where}: pre-tokenizer {str(pre)[:60]!r} is not supported; supported are {', '.join(PATTERNS)}; give "
            "prompts as token ids"
        )
    merges = [_pair(merge) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocab = {token: number for number, token in enumerate(tokens)}
    found = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    found.decoder = decoders.ByteLevel()
    return found


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    """A SentencePiece vocabulary as BPE: a piece of a higher score is merged first."""
    scores = metadata["tokenizer.ggml.scores"]
    if (cuts := sum(len(piece) ** 2 for piece in tokens)) > MAX_CUTS:
        raise ValueError(f"the pieces are too long: {cuts} characters in all their parts")
    vocab = {token: number for number, token in enumerate(tokens)}
    merges: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(piece)):
            pair = piece[:cut], piece[cut:]
            if pair[0] in vocab and pair[1] in vocab:
                merges.append((-score, vocab[pair[0]], vocab[pair[1]], pair))
    merges.sort()
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    model = models.BPE(
        vocab, [pair for *_, pair in merges], unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True
    )
    found = Tokenizer(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    found.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    ending = [decoders.Strip(" ", 1, 0)] if prefix else []
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    found.decoder = decoders.Sequence([*steps, *ending])
    return found
