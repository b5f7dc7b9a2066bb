"""Decode speed over budgets, policies and predictors, interleaved, beside the disk's ceiling.

    python bench/decode.py MODEL --ram 2GiB 4GiB --policy cycle lru --predictor none gate --rounds 3
    python bench/decode.py demo --ram 1GiB --slots 24 48 96 --policy default lru --predictor none

Every case runs in its own process, in a memory cgroup of its budget's size where possible. Each round runs all cases,
in the opposite order of the last round, after a probe of the disk's ceiling (bench/disk.py). Prompt and warm-up are not
counted. --slots fixes the number of expert slots, whatever the budget allows. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
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

PROMPT, WARM = 32, 8


def measure(case: dict[str, Any]) -> dict[str, float]:
    """Run one case in this process."""
    from tierlm import LLM, Budget, SamplingParams

    def tokens(count: int) -> SamplingParams:
        return SamplingParams(max_new_tokens=count, ignore_eos=True)

    budget = Budget(case["ram"], case["vram"])
    options = {"policy": case["policy"], "predictor": case["predictor"], "context": 1024}
    options |= {"ram_slots": case["slots"], "heat": False}  # each run starts equally cold
    with LLM.load(case["model"], budget=budget, **options) as llm:
        llm.generate([list(range(5, 5 + PROMPT))], tokens(WARM))
        before, taken = llm.stats(), stolen()
        llm.generate([[5]], tokens(case["tokens"] + 1))
        after, taken = llm.stats(), stolen() - taken
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
        "predictions_per_token": (now.prefetched - then.prefetched) / tokens_made,
        "prediction_precision": (now.useful - then.useful) / useful,
        "stall_share": stall / seconds,
        "disk_busy_share": reading / seconds,
        "stolen_per_token": taken / tokens_made,  # core-seconds that the virtual machine's host took
        "overlap": max(reading, seconds - stall) / seconds,
        "load_seconds": after.load_seconds,
        "peak_ram": after.peak_ram,
    }


def draw(file: Path, title: str, cases: list[dict[str, str]], results: list[list[dict[str, float]]]) -> None:
    """Tokens/s against the budget: one line for each policy and predictor, one point for each round."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    kinds = list(dict.fromkeys((case["policy"], case["predictor"]) for case in cases))
    for kind, colour, marker in zip(
        kinds, ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"), "osD^v", strict=False
    ):
        mine = [(c, r) for c, r in zip(cases, results, strict=True) if (c["policy"], c["predictor"]) == kind]
        sizes = [parse_size(case["ram"]) / 2**30 for case, _ in mine]
        speeds = [[one["tokens_per_second"] for one in found] for _, found in mine]
        label = f"policy {kind[0]}, predictor {kind[1]}"
        axes.plot(sizes, [statistics.median(one) for one in speeds], color=colour, marker=marker, label=label)
        for size, found in zip(sizes, speeds, strict=True):
            axes.plot([size] * len(found), found, color=colour, marker=marker, linestyle="", alpha=0.3, markersize=4)
    axes.set(xlabel="budget and memory cgroup, GiB", ylabel="tokens/s", title=title, ylim=(0, None), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--ram", nargs="+", default=["4GiB"])
    parser.add_argument("--vram")
    parser.add_argument("--slots", type=int, nargs="+", default=[None])
    parser.add_argument("--policy", nargs="+", default=["default"])
    parser.add_argument("--predictor", nargs="+", default=["none", "gate"])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="draw tokens/s against the budget to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(json.loads(args.one))))
        return

    cases = [
        {"ram": ram, "slots": slots, "policy": policy, "predictor": predictor}
        for ram, slots, policy, predictor in itertools.product(args.ram, args.slots, args.policy, args.predictor)
    ]
    fixed = {"model": str(args.model), "vram": args.vram, "tokens": args.tokens}
    in_cgroup = available()
    results: list[list[dict[str, float]]] = [[] for _ in cases]
    for turn in range(args.rounds):
        ceiling = None
        try:
            ceiling = disk_ceiling(args.model)
        except ValueError as error:  # a model too small to tell
            print(f"no ceiling of the disk: {error}", file=sys.stderr)
        order = list(zip(cases, results, strict=True))
        for case, found in reversed(order) if turn % 2 else order:
            command = [sys.executable, __file__, "--one", json.dumps(fixed | case)]
            limit = parse_size(case["ram"]) + parse_size(args.vram or 0)
            result = run_case(command, limit if in_cgroup else None)
            if ceiling is not None:
                result |= {"disk_small_pages": ceiling[0], "disk_ceiling": ceiling[1]}
                result["share_of_ceiling"] = result["bytes_per_token"] * result["tokens_per_second"] / ceiling[1]
            found.append(result)
            print(f"round {turn + 1} {case} {result['tokens_per_second']:.2f} tok/s", file=sys.stderr, flush=True)

    medians = [{name: statistics.median(r[name] for r in found) for name in found[0]} for found in results]
    rounds = [{"rounds": [result["tokens_per_second"] for result in found]} for found in results]
    table = Table(title=f"{args.model.name}, {args.rounds} rounds interleaved, medians [least-most]")
    for column in (
        "ram",
        "slots",
        "policy",
        "predictor",
        "tok/s",
        "MB/token",
        "hit rate",
        "stalled",
        "overlap",
        "stolen ms",
        "of the disk's ceiling",
    ):
        table.add_column(column)
    for case, found, median in zip(cases, results, medians, strict=True):
        speeds = [result["tokens_per_second"] for result in found]
        table.add_row(
            *("" if value is None else str(value) for value in case.values()),
            f"{median['tokens_per_second']:.2f} [{min(speeds):.2f}-{max(speeds):.2f}]",
            f"{median['bytes_per_token'] / 1e6:.3g}",
            f"{median['hit_rate']:.1%}",
            f"{median['stall_share']:.0%}",
            f"{median['overlap']:.2f}",
            f"{1000 * median['stolen_per_token']:.0f}",
            f"{median['share_of_ceiling']:.0%} of {median['disk_ceiling'] / 1e9:.2f} GB/s "
            f"({median['disk_small_pages'] / 1e9:.2f} with small pages)"
            if "disk_ceiling" in median
            else "",
        )
    Console(width=140).print(table)
    if args.plot:
        draw(args.plot, f"{args.model.name}: decode under a budget", cases, results)
    print(
        json.dumps({"cgroup": in_cgroup, "cases": [c | m | r for c, m, r in zip(cases, medians, rounds, strict=True)]})
    )


if __name__ == "__main__":
    main()
