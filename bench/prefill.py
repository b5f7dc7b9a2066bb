"""A prompt's prefill under a budget, against the slower of the disk and the arithmetic, each measured in the same run.

    python bench/prefill.py MODEL --ram 4GiB --tokens 512 --rounds 3

Each round, one after another: the disk's ceiling (bench/disk.py), the prompt in a memory cgroup of the budget, and the
same prompt where everything fits, the second time it is run, which is arithmetic alone. The bound is the larger of
bytes read / ceiling and the arithmetic. What is read is set against the bytes of the model's experts and streamed
trunks, each once. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from disk import disk_ceiling, drop_page_cache
from limited import available, run_limited
from rich.console import Console
from rich.table import Table

from tierlm.config import parse_size


def measure(case: dict[str, Any]) -> dict[str, float]:
    """Run the prompt in this process, twice if ``again``, and report the last time."""
    from tierlm import LLM, Budget, SamplingParams

    prompt = [(37 * i) % 30_000 + 5 for i in range(case["tokens"])]
    with LLM.load(case["model"], budget=Budget(case["ram"]), context=1024, heat=False) as llm:
        loaded = llm.stats().links["disk->ram"].bytes
        for _ in range(2 if case["again"] else 1):
            before = llm.stats().prefill
            llm.generate([prompt], SamplingParams(max_new_tokens=1))
        phase = llm.stats().prefill
        model = sum(llm._runtime.catalog.size(key) for key in llm._runtime.catalog.experts())
        model += sum(llm._runtime.catalog.size(key) for key in llm._runtime.catalog.trunks)
    seconds, stall = phase.seconds - before.seconds, phase.stall - before.stall
    return {
        "seconds": seconds,
        "stall": stall,
        "reading": phase.reading - before.reading,
        "disk_bytes": phase.disk_bytes - before.disk_bytes,
        "loaded_bytes": loaded,
        "model_bytes": model,
    }


def run(case: dict[str, Any], limit: int | None) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", json.dumps(case)]
    if limit is None:
        process = subprocess.run(command, text=True, check=False, capture_output=True)
    else:
        process, report = run_limited(command, limit, capture_output=True)
        if report["killed"]:
            raise SystemExit(f"killed for memory: {case}")
    if process.returncode:
        raise SystemExit(process.stderr)
    found: dict[str, float] = json.loads(process.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--ram", default="4GiB")
    parser.add_argument("--all", default="18GiB", help="a budget in which the whole model fits")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(json.loads(args.one))))
        return

    limit = parse_size(args.ram) if available() else None
    case = {"model": str(args.model), "tokens": args.tokens}
    rounds: list[dict[str, float]] = []
    for turn in range(args.rounds):
        drop_page_cache(list(args.model.glob("*.safetensors")))
        first, again = disk_ceiling(args.model)
        found = run(case | {"ram": args.ram, "again": False}, limit)
        alone = run(case | {"ram": args.all, "again": True}, None)
        found |= {"compute": alone["seconds"] - alone["stall"], "disk": found["disk_bytes"] / again}
        found |= {"ceiling": again, "first_read": first, "bytes_ratio": found["disk_bytes"] / found["model_bytes"]}
        found["share_of_bound"] = max(found["disk"], found["compute"]) / found["seconds"]
        found["share_of_own_bound"] = max(found["reading"], found["seconds"] - found["stall"]) / found["seconds"]
        rounds.append(found)
        print(f"round {turn + 1}: {found['seconds']:.2f} s", file=sys.stderr, flush=True)

    table = Table(title=f"{args.model.name}, {args.tokens} tokens at {args.ram}: medians [least-most] of {args.rounds}")
    table.add_column("what")
    table.add_column("value")
    for name in rounds[0]:
        values = [found[name] for found in rounds]
        unit = 1e9 if name.endswith("_bytes") or name in ("ceiling", "first_read") else 1
        shown = f"{statistics.median(values) / unit:.3f} [{min(values) / unit:.3f}-{max(values) / unit:.3f}]"
        table.add_row(name + (" (GB)" if unit > 1 else ""), shown)
    Console(width=100).print(table)
    print(json.dumps({"cgroup": limit is not None, "rounds": rounds}))


if __name__ == "__main__":
    main()
