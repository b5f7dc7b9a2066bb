"""Decode with and without speculation in alternation within one run, on text that repeats, nearly repeats and does not.

    python bench/speculation.py demo --ram 2GiB
    python bench/speculation.py MODEL --ram 4GiB 16GiB --tokens 48 --turns 4
    python bench/speculation.py MODEL --mtp

The text is the model's own greedy output. "novel" goes on freely. "copy" and "edit" have it as their prompt, and the
answer is forced to be that text again, "edit" with every twelfth token changed: random weights copy nothing by
themselves. Everything is computed as if the model had chosen these tokens. Each budget runs in a memory cgroup of its
size where possible; turns are in the order off on on off, and both turns of a pair decode the same tokens. Cache,
policy and the gate's times are shared. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from limited import available, run_case
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tierlm.config import Constraint, parse_size

PROMPT, EDIT = 24, 12


class Forced:
    """The constraint that allows one text only."""

    def __init__(self, text: Sequence[int], vocab: int):
        self.text, self.mask_of = text, torch.zeros(vocab, dtype=torch.bool)

    def mask(self, ids: Sequence[int], /) -> Tensor:
        mask = self.mask_of.clone()
        mask[self.text[len(ids)]] = True
        return mask


def texts(own: list[int], vocab: int) -> dict[str, tuple[list[int], Callable[[], Constraint] | None]]:
    """Each kind of text: its prompt and what forces its answer."""
    edited = [(token + vocab // 2) % vocab if at % EDIT == EDIT - 1 else token for at, token in enumerate(own)]
    return {
        "copy": (own, partial(Forced, own, vocab)),
        "edit": (own, partial(Forced, edited, vocab)),
        "novel": (own[-PROMPT:], None),
    }


def measure(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Run one budget in this process; returns the cost of each turn."""
    from tierlm import LLM, Budget, SamplingParams

    tokens = case["tokens"]
    options = {"context": 1024, "speculation": "mtp" if case["mtp"] else "lookup"}
    found = []
    with LLM.load(case["model"], budget=Budget(case["ram"]), **options) as llm:
        scheduler = llm._runtime.scheduler
        ways = {True: scheduler.speculation, False: None}
        scheduler.speculation = None
        seed = [(37 * i + 11) % min(1024, llm.vocab) for i in range(PROMPT)]
        own = llm.generate([seed], SamplingParams(max_new_tokens=2 * tokens, ignore_eos=True))[0].ids[:-tokens]
        time.sleep(case["settle"])
        for kind, (prompt, force) in texts(own, llm.vocab).items():
            if kind not in case["texts"]:
                continue
            for turn in range(2 * case["turns"]):
                on = turn % 4 in (1, 2)
                scheduler.speculation = ways[on]
                before = llm.stats()
                asked = [prompt[turn // 2 % 4 :], prompt][force is not None]  # other novel text in each pair
                params = SamplingParams(max_new_tokens=tokens, ignore_eos=True, constraint=force)
                ids = llm.generate([asked], params)[0].ids
                found.append({"kind": kind, "on": on, "ids": ids, **cost(before, llm.stats())})
    for off, on in zip(*([turn["ids"] for turn in found if turn["on"] is way] for way in (False, True)), strict=True):
        assert off == on, "speculation has changed the tokens"
    return [{name: value for name, value in turn.items() if name != "ids"} for turn in found]


def cost(before: Any, after: Any) -> dict[str, float]:
    """What a turn took, from the statistics before and after it."""
    now, then = after.decode, before.decode
    made, seconds = now.tokens - then.tokens, now.seconds - then.seconds
    tier, earlier = (next(iter(stats.experts.values())) for stats in (after, before))
    hits = tier.hits + tier.late_hits - earlier.hits - earlier.late_hits
    misses = tier.misses - earlier.misses
    drafted, accepted = (getattr(after.drafts, n) - getattr(before.drafts, n) for n in ("drafted", "accepted"))
    return {
        "tokens_per_second": made / seconds,
        "bytes_per_token": (now.disk_bytes - then.disk_bytes) / made,
        "hit_rate": hits / max(1, hits + misses),
        "experts_per_token": (hits + misses) / made,
        "drafted_per_token": drafted / made,
        "accepted_per_token": accepted / made,
        "tokens_per_step": made / (after.drafts.turns - before.drafts.turns),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--ram", nargs="+", default=["4GiB"])
    parser.add_argument("--mtp", action="store_true", help="drafts by the model's layer, instead of prompt lookup")
    parser.add_argument("--tokens", type=int, default=48, help="of each turn")
    parser.add_argument("--turns", type=int, default=4, help="turns with speculation, and as many without")
    parser.add_argument("--texts", nargs="+", default=["copy", "edit", "novel"])
    parser.add_argument("--settle", type=float, default=0.0, help="seconds of warm-up before the first turn")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(json.loads(args.one))))
        return

    fixed = {name: getattr(args, name) for name in ("model", "mtp", "tokens", "turns", "texts", "settle")}
    in_cgroup = available()
    name = Path(args.model).name
    table = Table(title=f"{name}: medians of {args.turns} turns of {args.tokens} tokens, without / with speculation")
    for column in ("ram", "text", "tok/s", "ratio [quartiles]", "MB/token", "hit rate", "experts/token", "accepted",
                   "tokens a step"):  # fmt: skip
        table.add_column(column)
    report = []
    for ram in args.ram:
        command = [sys.executable, __file__, "--one", json.dumps(fixed | {"ram": ram})]
        turns = run_case(command, parse_size(ram) if in_cgroup else None)
        for kind in dict.fromkeys(turn["kind"] for turn in turns):
            ways = [[turn for turn in turns if turn["on"] is way and turn["kind"] == kind] for way in (False, True)]
            ratios = [on["tokens_per_second"] / off["tokens_per_second"] for off, on in zip(*ways, strict=True)]
            quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            figures = [name for name in ways[0][0] if name not in ("kind", "on")]
            off, on = ({n: statistics.median(turn[n] for turn in way) for n in figures} for way in ways)
            table.add_row(
                ram,
                kind,
                f"{off['tokens_per_second']:.2f} / {on['tokens_per_second']:.2f}",
                f"{statistics.median(ratios):.3f} [{quartiles[0]:.3f}-{quartiles[2]:.3f}]",
                f"{off['bytes_per_token'] / 1e6:.1f} / {on['bytes_per_token'] / 1e6:.1f}",
                f"{off['hit_rate']:.1%} / {on['hit_rate']:.1%}",
                f"{off['experts_per_token']:.0f} / {on['experts_per_token']:.0f}",
                f"{on['accepted_per_token'] / on['drafted_per_token']:.0%}" if on["drafted_per_token"] else "-",
                f"{on['tokens_per_step']:.2f}",
            )
            report.append({"ram": ram, "text": kind, "ratio": statistics.median(ratios), "off": off, "on": on})
    Console(width=160).print(table)
    print(json.dumps({"cgroup": in_cgroup, "cases": report}))


if __name__ == "__main__":
    main()
