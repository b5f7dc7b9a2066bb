"""Decode speed over budgets, policies and predictors, interleaved, with the disk's own ceiling beside it.

    python bench/decode.py MODEL --ram 2GiB 4GiB --policy cycle lru --predictor none gate --rounds 3

Every case runs in a process of its own, in a memory cgroup of the size of its budget where one can be made, one case
after another, and all of them again in the next round. Before each round the disk's ceiling is probed: random 8 MiB
O_DIRECT reads of the model's own files, eight at a time, twice over the same places. A virtual disk may keep what it
read lately in a cache of its host, so that the second pass is faster; both are reported, and the second is the ceiling,
since a run reads the same experts again and again. Prompt and warm-up are not counted. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from disk import disk_ceiling
from limited import available, run_limited
from rich.console import Console
from rich.table import Table

from tierlm.config import parse_size

PROMPT, WARM = 32, 8


def measure(case: dict[str, Any]) -> dict[str, float]:
    """Run one case in this process."""
    from tierlm import LLM, Budget, SamplingParams

    def tokens(count: int) -> SamplingParams:
        return SamplingParams(max_new_tokens=count, ignore_eos=True)

    budget = Budget(case["ram"], case["vram"])
    options = {"policy": case["policy"], "predictor": case["predictor"], "context": 1024}
    options |= {"heat": False}  # each run begins as cold as the others
    with LLM.load(case["model"], budget=budget, **options) as llm:
        llm.generate([list(range(5, 5 + PROMPT))], tokens(WARM))
        before = llm.stats()
        llm.generate([[5]], tokens(case["tokens"] + 1))
        after = llm.stats()
    decode, earlier = after.decode, before.decode
    seconds, tokens_made = decode.seconds - earlier.seconds, decode.tokens - earlier.tokens
    compute = next(iter(after.experts))
    now, then = after.experts[compute], before.experts[compute]
    hits = now.hits + now.late_hits - then.hits - then.late_hits
    useful = max(1, now.useful - then.useful + now.wasted - then.wasted)
    stall, reading = decode.stall - earlier.stall, decode.reading - earlier.reading
    return {
        "tokens_per_second": tokens_made / seconds,
        "bytes_per_token": (decode.disk_bytes - earlier.disk_bytes) / tokens_made,
        "hit_rate": hits / (hits + now.misses - then.misses),
        "guesses_per_token": (now.speculative - then.speculative) / tokens_made,
        "guess_precision": (now.useful - then.useful) / useful,
        "stall_share": stall / seconds,
        "disk_busy_share": reading / seconds,
        "overlap": max(reading, seconds - stall) / seconds,
        "load_seconds": after.load_seconds,
        "peak_ram": after.peak_ram,
    }


def run_case(case: dict[str, Any], in_cgroup: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", json.dumps(case)]
    limit = parse_size(case["ram"]) + parse_size(case["vram"] or 0)
    if in_cgroup:
        process, report = run_limited(command, limit, capture_output=True)
        if report["killed"]:
            raise SystemExit(f"killed for memory: {case}")
    else:
        process = subprocess.run(command, text=True, check=False, capture_output=True)
    if process.returncode:
        raise SystemExit(process.stderr)
    result: dict[str, float] = json.loads(process.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--ram", nargs="+", default=["4GiB"])
    parser.add_argument("--vram")
    parser.add_argument("--policy", nargs="+", default=["cycle"])
    parser.add_argument("--predictor", nargs="+", default=["none", "gate"])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(json.loads(args.one))))
        return

    cases = [
        {"ram": ram, "policy": policy, "predictor": predictor}
        for ram, policy, predictor in itertools.product(args.ram, args.policy, args.predictor)
    ]
    fixed = {"model": str(args.model), "vram": args.vram, "tokens": args.tokens}
    in_cgroup = available()
    results: list[list[dict[str, float]]] = [[] for _ in cases]
    for turn in range(args.rounds):
        try:
            first, again = disk_ceiling(args.model)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        for case, found in zip(cases, results, strict=True):
            result = run_case(fixed | case, in_cgroup)
            result |= {"disk_first_read": first, "disk_ceiling": again}
            result["share_of_ceiling"] = result["bytes_per_token"] * result["tokens_per_second"] / again
            found.append(result)
            print(f"round {turn + 1} {case} {result['tokens_per_second']:.2f} tok/s", file=sys.stderr, flush=True)

    medians = [{name: statistics.median(r[name] for r in found) for name in found[0]} for found in results]
    table = Table(title=f"{args.model.name}, {args.rounds} rounds interleaved, medians [least-most]")
    for column in ("ram", "policy", "predictor", "tok/s", "MB/token", "hit rate", "stalled", "of the disk's ceiling"):
        table.add_column(column)
    for case, found, median in zip(cases, results, medians, strict=True):
        speeds = [result["tokens_per_second"] for result in found]
        table.add_row(
            *case.values(),
            f"{median['tokens_per_second']:.2f} [{min(speeds):.2f}-{max(speeds):.2f}]",
            f"{median['bytes_per_token'] / 1e6:.0f}",
            f"{median['hit_rate']:.1%}",
            f"{median['stall_share']:.0%}",
            f"{median['share_of_ceiling']:.0%} of {median['disk_ceiling'] / 1e9:.2f} GB/s "
            f"({median['disk_first_read'] / 1e9:.2f} at first)",
        )
    Console(width=140).print(table)
    print(json.dumps({"cgroup": in_cgroup, "cases": [c | m for c, m in zip(cases, medians, strict=True)]}))


if __name__ == "__main__":
    main()
