"""Measure how a model routes while it decodes: how hot its hot experts are, and how often consecutive tokens reuse
experts.

    python bench/routing.py MODEL --ram 4GiB --tokens 256

For scale it also prints the result of independent uniform routing for as many tokens.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tierlm import LLM, Budget, SamplingParams
from tierlm.policies.prediction import NoPredictor

HOT = 0.2  # the share of experts called hot
Log = Mapping[int, Sequence[Sequence[int]]]  # layer -> token -> experts


class RoutingLog(NoPredictor):
    """Predicts nothing and keeps every layer's choices, token by token, for the model loaded last."""

    kept: dict[int, list[list[int]]]

    def __init__(self, width: int):
        super().__init__(width)
        RoutingLog.kept = {}

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        self.kept.setdefault(layer, []).append(list(experts))


def log_routing(model: Path, ram: str, tokens: int, prompt: Sequence[int]) -> tuple[Log, int]:
    """The layers' choices while ``tokens`` were decoded greedily, and the number of experts."""
    options: dict[str, Any] = {"predictor": f"{__name__}:RoutingLog", "context": len(prompt) + tokens}
    with LLM.load(model, budget=Budget(ram), **options) as llm:
        llm.generate([list(prompt)], SamplingParams(max_new_tokens=tokens + 1, ignore_eos=True))
        return RoutingLog.kept, llm._runtime.catalog.spec.experts


def summarize(log: Log, experts: int) -> dict[str, float]:
    """Means over the layers. ``hot_share``: share of all choices that go to the HOT most chosen experts. ``reuse``:
    P(the next token chooses an expert again). ``same``: P(the next token chooses the same set)."""
    hot, again, same = [], [], []
    for chosen in log.values():
        counts = Counter(expert for token in chosen for expert in token)
        most = counts.most_common(max(1, round(HOT * experts)))
        hot.append(sum(count for _, count in most) / counts.total())
        again += [len(set(a) & set(b)) / len(a) for a, b in pairwise(chosen)]
        same += [set(a) == set(b) for a, b in pairwise(chosen)]
    return {"hot_share": sum(hot) / len(hot), "reuse": sum(again) / len(again), "same": sum(same) / len(same)}


def uniform(log: Log, experts: int) -> Log:
    """As many random choices as in ``log``."""
    draw = random.Random(0)
    return {layer: [draw.sample(range(experts), len(token)) for token in chosen] for layer, chosen in log.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ram", default="4GiB")
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    log, experts = log_routing(args.model, args.ram, args.tokens, range(5, 37))
    result = {"measured": summarize(log, experts), "uniform": summarize(uniform(log, experts), experts)}
    for name, numbers in result.items():
        print(
            f"{name}: the hottest {HOT:.0%} of the experts get {numbers['hot_share']:.0%} of the choices; "
            f"the next token uses an expert again with {numbers['reuse']:.0%}, all of them with {numbers['same']:.0%}"
        )
    print(json.dumps(result | {"tokens": args.tokens}))


if __name__ == "__main__":
    main()
