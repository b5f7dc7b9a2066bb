"""A prompt's prefill under a budget, against the slower of the disk and the arithmetic, all measured in one run.

    python bench/prefill.py MODEL --ram 4GiB --tokens 512 --rounds 3 [--pause 10]

Each round measures the disk's ceiling (bench/disk.py), the prompt in a memory cgroup of the budget, twice, and the same
prompt with everything resident, whose second run is arithmetic alone. The bound is the larger of bytes read / ceiling
and the arithmetic. The first run also touches each slot's memory for the first time, unless warm-up has filled the free
slots during a pause, as it does for users by default. Bytes read are compared with all experts and trunks, each once.
``stolen``: core-seconds that a virtual machine's host took meanwhile, largely for the reads. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from disk import disk_ceiling, drop_page_cache, stolen, weights_of
from limited import available, run_case
from rich.console import Console
from rich.table import Table

from tierlm.config import parse_size


def measure(case: dict[str, Any]) -> dict[str, float]:
    """Run the prompt in this process twice; returns the costs of both runs."""
    from tierlm import LLM, Budget, SamplingParams

    prompt = [(37 * i) % 30_000 + 5 for i in range(case["tokens"])]
    found: dict[str, float] = {}
    with LLM.load(case["model"], budget=Budget(case["ram"]), context=1024, heat=case["pause"] > 0) as llm:
        time.sleep(case["pause"])
        found["loaded_bytes"] = llm.stats().links["disk->ram"].bytes
        catalog = llm._runtime.catalog
        found["model_bytes"] = sum(catalog.size(key) for key in [*catalog.experts(), *catalog.trunks])
        for turn in ("first", "second"):
            before, taken = llm.stats().prefill, stolen()
            llm.generate([prompt], SamplingParams(max_new_tokens=1))
            now = llm.stats().prefill
            found |= {
                f"{turn}_seconds": now.seconds - before.seconds,
                f"{turn}_stall": now.stall - before.stall,
                f"{turn}_disk_busy": now.reading - before.reading,
                f"{turn}_disk_bytes": now.disk_bytes - before.disk_bytes,
                f"{turn}_stolen": stolen() - taken,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--ram", default="4GiB")
    parser.add_argument("--all", default="18GiB", help="a budget in which the whole model fits")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between the load and the prompt")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(json.loads(args.one))))
        return

    limit = parse_size(args.ram) if available() else None
    case = {"model": str(args.model), "tokens": args.tokens, "pause": args.pause}
    rounds: list[dict[str, float]] = []
    for turn in range(args.rounds):
        drop_page_cache(weights_of(args.model))
        small, again = disk_ceiling(args.model)
        command = [sys.executable, __file__, "--one"]
        found = run_case([*command, json.dumps(case | {"ram": args.ram})], limit)
        alone = run_case([*command, json.dumps(case | {"ram": args.all, "pause": 0.0})], None)
        found |= {"ceiling_bytes": again, "ceiling_small_pages_bytes": small}
        found["compute_alone"] = alone["second_seconds"] - alone["second_stall"]
        for name in ("first", "second"):
            read, seconds = found[f"{name}_disk_bytes"], found[f"{name}_seconds"]
            found[f"{name}_bytes_ratio"] = read / found["model_bytes"]
            found[f"{name}_share_of_bound"] = max(read / again, found["compute_alone"]) / seconds
            busy, computing = found[f"{name}_disk_busy"], seconds - found[f"{name}_stall"]
            found[f"{name}_overlap"] = max(busy, computing) / seconds
        rounds.append(found)
        print(f"round {turn + 1}: {found['first_seconds']:.2f} s", file=sys.stderr, flush=True)

    table = Table(title=f"{args.model.name}, {args.tokens} tokens at {args.ram}: medians [least-most] of {args.rounds}")
    table.add_column("what")
    table.add_column("value")
    for name in rounds[0]:
        values = [found[name] for found in rounds]
        unit = 1e9 if name.endswith("_bytes") else 1
        shown = f"{statistics.median(values) / unit:.3f} [{min(values) / unit:.3f}-{max(values) / unit:.3f}]"
        table.add_row(name + (" (GB)" if unit > 1 else ""), shown)
    Console(width=100).print(table)
    print(json.dumps({"cgroup": limit is not None, "rounds": rounds}))


if __name__ == "__main__":
    main()
