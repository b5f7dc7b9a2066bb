"""Speed against the length of the context: decode, and prefill chunk by chunk.

    python bench/context.py MODEL --ram 16GiB --contexts 256 2048 4096 8192 --kv-dtype bfloat16

The cache before the measured tokens is random, as a prompt of 16,384 would take minutes: the arithmetic is the same,
routing is that of random text. Decode is the median of single steps, taken in turns over the contexts. Prefill is
measured for one chunk that ends at each context; the time of a whole prompt is the sum over its chunks of a line
through those times, since a chunk's attention grows with the tokens before it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tierlm import LLM, Budget
from tierlm.memory.kvcache import KvCache, Span
from tierlm.models.decoder import Decoder, Segment


def fill(cache: KvCache, layers: int) -> None:
    """Random values instead of a prompt's."""
    torch.manual_seed(1)
    some = torch.randn(1024, 8192)
    for layer in range(layers):
        values = cache.layer(layer)
        for start in range(0, len(values), len(some)):
            rows = values[start : start + len(some)]
            rows.copy_(some[: len(rows), : rows.shape[1]])


def misses(llm: LLM) -> int:
    """Of experts, so far."""
    return next(iter(llm.stats().experts.values())).misses


def seconds(decoder: Decoder, span: Span, past: int, tokens: int, seed: int) -> float:
    """Of one step of ``tokens`` random tokens after ``past``."""
    ids = torch.randint(5, decoder.spec.vocab, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    span.length, began = past, time.perf_counter()
    decoder.forward([Segment(ids, span)], prefill=tokens > 1)
    return time.perf_counter() - began


def whole_prompt(line: Sequence[float], tokens: int, chunk: int) -> float:
    """Seconds of a prompt in chunks whose times lie on ``line``: slope and offset over the tokens before them."""
    return sum((line[0] * start + line[1]) * min(chunk, tokens - start) / chunk for start in range(0, tokens, chunk))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--ram", default="16GiB")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 2048, 4096, 8192])
    parser.add_argument("--kv-dtype", default="bfloat16")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--steps", type=int, default=9, help="of decode at each context")
    parser.add_argument("--rounds", type=int, default=1, help="of prefill")
    args = parser.parse_args()

    longest = max(*args.contexts, args.chunk)
    options = {"kv_dtype": args.kv_dtype, "context": longest + 1, "prefill_chunk": args.chunk}
    with LLM.load(args.model, budget=Budget(args.ram), heat=False, predictor="none", **options) as llm:
        decoder = llm._runtime.decoder
        cache = decoder._attention[0].cache  # type: ignore[attr-defined]
        fill(cache, len(decoder.spec.layers))
        span = cache.reserve(longest + 1)
        before = seconds(decoder, span, 0, args.chunk, 0)  # everything is read
        read = misses(llm)
        decode: dict[int, list[float]] = {context: [] for context in args.contexts}
        chunks: dict[int, list[float]] = {max(0, context - args.chunk): [] for context in args.contexts}
        for turn in range(-1, args.steps):
            for context, found in decode.items():
                taken = seconds(decoder, span, context, 1, turn + 2)
                found.extend([taken] * (turn >= 0))
        for turn in range(args.rounds):
            for past, found in chunks.items():
                found.append(seconds(decoder, span, past, args.chunk, turn + 100))
        read = misses(llm) - read
        cache.release(span)

    step = {context: statistics.median(found) for context, found in decode.items()}
    chunk = {past: statistics.median(found) for past, found in chunks.items()}
    line = np.polyfit(list(chunk), list(chunk.values()), 1).tolist() if len(chunk) > 1 else [0.0, *chunk.values()]
    rows = {
        context: {
            "decode": 1 / step[context],
            "last_chunk": args.chunk / chunk[max(0, context - args.chunk)],
            "prefill": context / whole_prompt(line, context, args.chunk),
        }
        for context in args.contexts
    }
    table = Table(title=f"{Path(args.model).name}, {args.kv_dtype} cache, chunks of {args.chunk}: tokens/s")
    for name in ("context", "decode", "of the first", "last chunk", "whole prompt", "of the first"):
        table.add_column(name)
    first = rows[args.contexts[0]]
    for context, row in rows.items():
        shares = [f"{row[name] / first[name]:.2f}" for name in ("decode", "prefill")]
        shown = f"{row['decode']:.2f}", shares[0], f"{row['last_chunk']:.1f}", f"{row['prefill']:.1f}", shares[1]
        table.add_row(str(context), *shown)
    Console(width=100).print(table)
    print(f"first chunk, which reads everything: {before:.1f} s; misses after it: {read}")
    print(
        json.dumps({"kv_dtype": args.kv_dtype, "chunk": args.chunk, "threads": torch.get_num_threads(), "rows": rows})
    )


if __name__ == "__main__":
    main()
