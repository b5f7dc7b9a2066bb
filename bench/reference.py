"""The classic policies against libCacheSim's, request for request. Needs `pip install libcachesim`.

    python bench/reference.py                                      # synthetic sequences, and the demo model's trace
    python bench/reference.py --trace trace.jsonl --slots 51 205 512

Records are requested one at a time and none is leased, since libCacheSim knows neither layers nor leases. The last line
is JSON: misses by sequence, slots and policy. tests/test_reference.py holds those of the first command.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from blocks import read_block, title

from tierlm.policies import make_policy
from tierlm.policies.belady import Belady
from tierlm.policies.eviction import TierInfo
from tierlm.spec import ExpertKey

DEMO = str(Path(__file__).parent / "traces" / "demo.npz")
THEIRS = {
    "fifo": "FIFO",
    "lru": "LRU",
    "lfu": "LFU",
    "clock": "Clock",
    "sieve": "Sieve",
    "s3-fifo": "S3FIFO",
    "2q": "TwoQ",
    "arc": "ARC",
    "belady": "Belady",
}
SLOTS = [20, 60]
REQUESTS = 3000
NEVER = 2**62


def made(kind: str) -> list[int]:
    """Requests of 120 records: ``uniform``; ``skewed``, the n-th record about as often as 1/n; ``loop``, every third
    request skewed, the others through 50 records in turn."""
    state, found = 12345, []
    for number in range(REQUESTS):
        state = (state * 1103515245 + 12345) % 2**31  # ANSI C's generator
        share = state / 2**31
        if kind == "uniform":
            found.append(int(share * 120))
        elif kind == "skewed" or number % 3 == 0:
            found.append(int(120**share) - 1)
        else:
            found.append(number % 50)
    return found


def flat(block: str) -> list[int]:
    """The records of a trace, as numbers, token by token and layer by layer."""
    trace = read_block(block)
    steps = (enumerate(step.needed) for step in trace.passes())
    return [layer * trace.info.experts + expert for step in steps for layer, ids in step for expert in ids]


def hits(name: str, requests: Sequence[int], slots: int) -> list[bool]:
    """Whether each request is a hit under our policy."""
    keys, info = [ExpertKey(0, number) for number in requests], TierInfo(1, slots)
    policy = Belady(info, [[key] for key in keys]) if name == "belady" else make_policy(name, info)
    resident: set[ExpertKey] = set()
    found = []
    for key in keys:
        found.append(key in resident)
        if key in resident:
            policy.on_hit(key)
            continue
        if len(resident) == slots:
            victim = next(policy.victims(key))
            policy.on_evict(victim)
            resident.remove(victim)
        policy.on_insert(key)
        resident.add(key)
    return found


def their_hits(name: str, requests: Sequence[int], slots: int) -> list[bool]:
    """The same under libCacheSim's policy."""
    import libcachesim

    cache = getattr(libcachesim, THEIRS[name])(slots, hashpower=16)
    following, last = [NEVER] * len(requests), dict[int, int]()
    for place in range(len(requests) - 1, -1, -1):
        following[place] = last.get(requests[place], NEVER)
        last[requests[place]] = place
    found = []
    for place, number in enumerate(requests):
        request = libcachesim.Request()
        request.obj_id, request.obj_size, request.clock_time = number + 1, 1, place
        request.next_access_vtime = following[place]
        found.append(bool(cache.get(request)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", nargs="*", metavar="FILE[@START:STOP]", help="instead of the built-in sequences")
    parser.add_argument("--slots", type=int, nargs="+", default=SLOTS)
    args = parser.parse_args()
    sequences = {title(block): flat(block) for block in args.trace or [DEMO]}
    if not args.trace:
        sequences = {kind: made(kind) for kind in ("uniform", "skewed", "loop")} | sequences
    misses: dict[str, dict[int, dict[str, int]]] = {}
    differ = 0
    for name, requests in sequences.items():
        for slots in args.slots:
            row = misses.setdefault(name, {}).setdefault(slots, {})
            for policy in THEIRS:
                ours, theirs = hits(policy, requests, slots), their_hits(policy, requests, slots)
                unlike = sum(a != b for a, b in zip(ours, theirs, strict=True))
                differ += unlike
                row[policy] = theirs.count(False)
                print(
                    f"{name:20} {slots:5} slots {policy:8} {len(requests)} requests: libCacheSim misses "
                    f"{theirs.count(False)}, tierlm {ours.count(False)}; {unlike} requests differ"
                )
    print(json.dumps({"requests_that_differ": differ, "misses": misses}))


if __name__ == "__main__":
    main()
