"""Decode with and without prefetch in alternation within one run, so that a drifting disk affects both equally.

    python bench/prefetch.py MODEL --ram 2GiB 3GiB 4GiB 6GiB --tokens 24 --turns 8
    python bench/prefetch.py MODEL --ram 2GiB 4GiB --follow near

Each budget runs in a memory cgroup of its size where possible. After a prompt and a warm-up, turns of ``--tokens``
tokens are decoded with and without prefetch, in the order on off off on; both turns of a pair decode the same tokens.
"On" decides itself whether to prefetch, and how far ahead (policies/pace.py), as for a user; ``--follow near`` and
``far`` always prefetch. Each pair gives a ratio. Cache and policy are shared. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from disk import disk_ceiling, stolen
from limited import available, run_case
from rich.console import Console
from rich.table import Table

from tierlm.config import parse_size

PROMPT, WARM = 32, 32


class Fixed:
    """A pace that never changes."""

    def __init__(self, way: int):
        self.way = way

    def add(self, seconds: float) -> None:
        """Ignores times."""


def measure(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Run one budget in this process; returns the cost of each turn."""
    from tierlm import LLM, Budget, SamplingParams
    from tierlm.policies.pace import FAR, NEAR, NONE, Pace

    def tokens(count: int) -> SamplingParams:
        return SamplingParams(max_new_tokens=count, ignore_eos=True)

    turns = []
    options = {"predictor": case["predictor"], "context": 1024, "heat": False}
    with LLM.load(case["model"], budget=Budget(case["ram"]), **options) as llm:
        prefetch = llm._runtime.store.lookahead.prefetch
        follow = {"pace": Pace(), "near": Fixed(NEAR), "far": Fixed(FAR)}[case["follow"]]
        paces = {True: follow, False: Fixed(NONE)}
        llm.generate([list(range(5, 5 + PROMPT))], tokens(WARM))
        for turn in range(2 * case["turns"]):
            on = turn % 4 in (0, 3)
            prefetch.pace = paces[on]
            before, taken = llm.stats(), stolen()
            llm.generate([[5 + turn // 2]], tokens(case["tokens"] + 1))
            after, taken = llm.stats(), stolen() - taken
            now, then = after.decode, before.decode
            made, seconds = now.tokens - then.tokens, now.seconds - then.seconds
            tier, earlier = (next(iter(stats.experts.values())) for stats in (after, before))
            stall, reading = now.stall - then.stall, now.reading - then.reading
            judged = tier.useful - earlier.useful + tier.wasted - earlier.wasted
            turns.append(
                {
                    "on": on,
                    "tokens_per_second": made / seconds,
                    "bytes_per_token": (now.disk_bytes - then.disk_bytes) / made,
                    "predictions_per_token": (tier.prefetched - earlier.prefetched) / made,
                    "precision": (tier.useful - earlier.useful) / judged if judged else 0.0,
                    "stall_share": stall / seconds,
                    "disk_busy_share": reading / seconds,
                    "stolen_per_token": taken / made,
                }
            )
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--ram", nargs="+", default=["4GiB"])
    parser.add_argument("--predictor", default="gate")
    parser.add_argument("--follow", choices=("pace", "near", "far"), default="pace")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--turns", type=int, default=8, help="turns with predictions, and as many without")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(json.loads(args.one))))
        return

    fixed = {"model": str(args.model), "tokens": args.tokens, "turns": args.turns}
    fixed |= {"predictor": args.predictor, "follow": args.follow}
    in_cgroup = available()
    title = f"{args.model.name}: medians of {args.turns} turns of {args.tokens} tokens, without / with predictions"
    table = Table(title=title)
    for column in ("ram", "tok/s", "ratio [quartiles]", "MB/token", "predictions", "right", "stalled", "disk busy",
                   "stolen ms", "of the disk"):  # fmt: skip
        table.add_column(column)
    report = []
    for ram in args.ram:
        try:
            ceiling = disk_ceiling(args.model, 2**30)[1]
        except ValueError as error:
            sys.exit(str(error))
        command = [sys.executable, __file__, "--one", json.dumps(fixed | {"ram": ram})]
        turns = run_case(command, parse_size(ram) if in_cgroup else None)
        ways = [[turn for turn in turns if turn["on"] is way] for way in (False, True)]
        ratios = [on["tokens_per_second"] / off["tokens_per_second"] for off, on in zip(*ways, strict=True)]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        off, on = ({n: statistics.median(t[n] for t in way) for n in way[0]} for way in ways)
        shares = [way["bytes_per_token"] * way["tokens_per_second"] / ceiling for way in (off, on)]
        table.add_row(
            ram,
            f"{off['tokens_per_second']:.2f} / {on['tokens_per_second']:.2f}",
            f"{statistics.median(ratios):.3f} [{quartiles[0]:.3f}-{quartiles[2]:.3f}]",
            f"{off['bytes_per_token'] / 1e6:.0f} / {on['bytes_per_token'] / 1e6:.0f}",
            f"{on['predictions_per_token']:.0f}",
            f"{on['precision']:.0%}",
            f"{off['stall_share']:.0%} / {on['stall_share']:.0%}",
            f"{off['disk_busy_share']:.0%} / {on['disk_busy_share']:.0%}",
            f"{1000 * off['stolen_per_token']:.0f} / {1000 * on['stolen_per_token']:.0f}",
            f"{shares[0]:.0%} / {shares[1]:.0%} of {ceiling / 1e9:.2f} GB/s",
        )
        report.append({"ram": ram, "ceiling": ceiling, "ratio": statistics.median(ratios), "turns": turns})
        print(f"{ram}: {statistics.median(ratios):.3f}", file=sys.stderr, flush=True)
    Console(width=160).print(table)
    print(json.dumps({"cgroup": in_cgroup, "cases": report}))


if __name__ == "__main__":
    main()
