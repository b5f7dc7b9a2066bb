"""Many decode steps of a model at a small budget: memory, threads and open files must not grow.

    python bench/soak.py demo --ram 384MiB --slots 24 --steps 10000

Exit code 1 if a thread or a file is left over, or if memory grows by more than 2 MiB from the second tenth of the run
to the last. Requests of 500 tokens run one after another, each with another prompt. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from pathlib import Path

from tierlm import LLM, Budget, SamplingParams

GROWTH = 2 * 2**20
REQUEST = 500


def held() -> dict[str, int]:
    """Resident bytes, threads and open files of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    names = [Path("/proc/self/task", task, "comm").read_text() for task in os.listdir("/proc/self/task")]
    reading = sum(name.startswith("tierlm-read") for name in names)  # Python does not count these
    return {"rss": resident, "threads": threading.active_count() + reading, "files": len(os.listdir("/proc/self/fd"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--ram", default="384MiB")
    parser.add_argument("--slots", type=int, help="fewer expert slots than the budget allows")
    parser.add_argument("--steps", type=int, default=10_000)
    args = parser.parse_args()

    before = held()
    samples: list[dict[str, int]] = []
    began = time.perf_counter()
    with LLM.load(args.model, budget=Budget(args.ram), ram_slots=args.slots) as llm:
        for request in range(-(-args.steps // REQUEST)):
            prompt = [(7 * request + i) % 500 + 10 for i in range(8)]
            llm.generate(
                [prompt], SamplingParams(max_new_tokens=REQUEST, temperature=0.8, seed=request, ignore_eos=True)
            )
            samples.append(held())
        stats = llm.stats()
    after = held()

    tenth = max(1, len(samples) // 10)
    early = statistics.median(sample["rss"] for sample in samples[tenth : 2 * tenth])
    late = statistics.median(sample["rss"] for sample in samples[-tenth:])
    result = {
        "steps": stats.decode.tokens,
        "seconds": time.perf_counter() - began,
        "rss_early": early,
        "rss_late": late,
        "threads": [before["threads"], samples[0]["threads"], samples[-1]["threads"], after["threads"]],
        "files": [before["files"], samples[0]["files"], samples[-1]["files"], after["files"]],
        "hit_rate": stats.hit_rate,
        "bytes_per_token": stats.decode.disk_bytes_per_token,
        "tokens_per_second": stats.decode.rate,
    }
    print(json.dumps(result))
    leaks = [
        what for what in ("threads", "files") if after[what] > before[what] or samples[-1][what] > samples[0][what]
    ]
    if late - early > GROWTH:
        leaks.append("memory")
    if leaks:
        sys.exit(f"grown: {', '.join(leaks)}")


if __name__ == "__main__":
    main()
