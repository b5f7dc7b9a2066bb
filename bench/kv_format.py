"""What KV values in int8 on disk cost: perplexity after prefixes that were read from disk, and the error of the values.

    python bench/kv_format.py [--windows 20] [--prefix 192] [--scored 64] [--dtype float32]

The demo model's held-out texts are cut into windows. A first load stores the KV values of each window's prefix. A
second one reads them, and scores each next token of the window given the tokens before. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from perplexity import TEXTS

from tierlm import LLM, Budget, SamplingParams
from tierlm.engine.sequence import Keep
from tierlm.memory.kvblock import FORMATS, BlockLayout


class Forced:
    """A constraint that allows only the tokens of a text."""

    def __init__(self, ids: Sequence[int], vocab: int):
        self._ids, self._vocab = ids, vocab

    def mask(self, ids: Sequence[int], /) -> torch.Tensor:
        allowed = torch.zeros(self._vocab, dtype=torch.bool)
        allowed[self._ids[len(ids)]] = True
        return allowed


def windows(llm: LLM, count: int, length: int) -> Iterator[list[int]]:
    for text in TEXTS:
        ids = llm.codec.encode(text.read_text(encoding="utf-8"))
        yield from (ids[start : start + length] for start in range(0, min(len(ids) - length, count * length), length))


def relative_error(llm: LLM, dtype: torch.dtype) -> float:
    """Root mean square of the error of the first block of the cache, over that of its values."""
    cache = llm._runtime.scheduler.cache  # type: ignore[union-attr]
    span = cache._spans[0]
    layout = BlockLayout.of([part.shape[1] for part in cache.rows(span, 0, 1)], dtype, "int8")
    block, again = (torch.zeros(layout.buffer, dtype=torch.uint8) for _ in range(2))
    stored = torch.zeros(layout.stored, dtype=torch.uint8)
    for part, rows in zip(layout.rows(block), cache.rows(span, 0, layout.tokens), strict=True):
        part.copy_(rows)
    layout.encode(block.numpy(), stored.numpy())
    layout.decode(stored.numpy(), again.numpy())
    pairs = [(a.double(), b.double()) for a, b in zip(layout.rows(block), layout.rows(again), strict=True)]
    wrong = sum(float(((one - other) ** 2).sum()) for one, other in pairs)
    return math.sqrt(wrong / sum(float((one**2).sum()) for one, _ in pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=20, help="of each text")
    parser.add_argument("--prefix", type=int, default=192)
    parser.add_argument("--scored", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    found, budget, dtype = {}, Budget("4GiB"), getattr(torch, arguments.dtype)
    error = 0.0
    for format in ("none", *FORMATS):
        with tempfile.TemporaryDirectory() as folder:
            options: Any = {"kv_dtype": arguments.dtype, "heat": False}
            if format != "none":
                options |= {"kv_disk": "1GiB", "kv_folder": folder, "kv_format": format}
            losses, hit = list[float](), 0
            for scoring in (False, True):
                with LLM.load("demo", budget=budget, **options) as llm:
                    for ids in windows(llm, arguments.windows, arguments.prefix + 1 + arguments.scored):
                        rest = ids[arguments.prefix + 1 :]
                        params = SamplingParams(
                            max_new_tokens=len(rest) if scoring else 1,
                            constraint=lambda rest=rest: Forced(rest, llm.vocab),  # type: ignore[misc]
                            logprobs=0,
                            ignore_eos=True,
                        )
                        for piece in llm.stream(ids[: arguments.prefix + 1], params, keep=Keep()):
                            if scoring:
                                losses += [-one.logprob for one in piece.logprobs or []]
                    if scoring and format != "none":
                        hit = llm.stats().kv["disk"].hit_tokens
                        error = relative_error(llm, dtype) if format == "exact" else error
        value = math.exp(sum(losses) / len(losses))
        found[format] = {"perplexity": value, "scored": len(losses), "hit_tokens": hit}
        print(f"{format:8}perplexity {value:.5f} of {len(losses)} tokens, {hit} tokens read from disk", flush=True)
    print(f"int8: relative error of the values {error:.2e}")
    print(json.dumps({"dtype": arguments.dtype, "found": found, "error": error}))


if __name__ == "__main__":
    main()
