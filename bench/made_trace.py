"""Make a seeded trace of any length and shape, with popular experts and topics that last. For measuring how long a
simulation takes; its hit rates describe no real model.

    python bench/made_trace.py /tmp/made.npz                          # 200,000 tokens x 26 layers x 6 of 64 experts

A layer chooses the experts with the largest sum of a popularity that falls as 1 / rank^skew, a topic's contribution,
and noise; or it repeats the previous token's choice.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tierlm.tracing.trace import Trace, TraceInfo
from tierlm.tracing.tracefile import write_trace

TOPICS, STAYS = 64, 0.995  # their number, and the probability that the next token keeps the topic
AGAIN = 0.15  # the probability that a layer repeats the previous choice
BLOCK = 2000  # tokens at a time


def make(tokens: int, layers: int, experts: int, chosen: int, skew: float, topical: float) -> Trace:
    """Decode steps of one token each, in one sequence. ``topical``: standard deviation of a topic's contribution."""
    chance = np.random.default_rng(0)
    ranks = np.argsort(chance.random((layers, experts)), axis=1) + 1
    popularity = -skew * np.log(ranks)
    topics = popularity + topical * chance.standard_normal((TOPICS, layers, experts))
    starts = np.append(0, np.flatnonzero(chance.random(tokens - 1) > STAYS) + 1)  # of a topic
    topic = chance.integers(TOPICS, size=len(starts)).repeat(np.diff(starts, append=tokens))
    found = np.empty((tokens, layers, chosen), np.int16)
    for start in range(0, tokens, BLOCK):
        block = topic[start : start + BLOCK]
        scores = topics[block] + chance.gumbel(size=(len(block), layers, experts))
        found[start : start + BLOCK] = np.argpartition(-scores, chosen - 1, axis=2)[:, :, :chosen]
    fresh = chance.random((tokens, layers)) >= AGAIN
    fresh[0] = True
    source = np.maximum.accumulate(
        np.where(fresh, np.arange(tokens)[:, None], 0)
    )  # the token whose choice a layer takes
    numbers, none = np.arange(tokens, dtype=np.int32), np.zeros(tokens, np.int32)
    info = TraceInfo("made up", layers, tuple(range(layers)), experts)
    return Trace(info, np.take_along_axis(found, source[:, :, None], 0), none, numbers, np.zeros(tokens, bool))


def repeated(ids: npt.NDArray[np.int16]) -> float:
    """The share of choices that the previous token made too. ``ids``: [tokens, layers, chosen]."""
    return float((ids[1:, :, :, None] == ids[:-1, :, None]).any(3).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--experts", type=int, default=64, help="of a layer")
    parser.add_argument("--chosen", type=int, default=6)
    parser.add_argument("--skew", type=float, default=0.3)
    parser.add_argument("--topical", type=float, default=1.0)
    args = parser.parse_args()
    trace = make(args.tokens, args.layers, args.experts, args.chosen, args.skew, args.topical)
    write_trace(args.file, trace)
    print(f"{len(trace)} tokens, {trace.experts.size} choices; {repeated(trace.experts[:5000]):.0%} of them as before")


if __name__ == "__main__":
    main()
