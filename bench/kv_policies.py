"""Which KV blocks leave a full disk: policies over a trace of prompts.

    python bench/kv_policies.py                                       # a made trace, as --write saves it
    python bench/kv_policies.py --trace mooncake_trace.jsonl --sizes 1000 5000 20000

Traces are in the format of Mooncake (Qin et al., FAST 2025; github.com/kvcache-ai/Mooncake): JSON lines with timestamp,
input_length, output_length and hash_ids, one for each 512 tokens of the prompt; equal ids are equal prefixes. A prompt
finds the blocks up to its first absent one. Its absent blocks are stored, if they need not push out their own chain.
``bound``: a store that never evicts. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tierlm.policies import POLICIES
from tierlm.policies.chains import BlockKey, Leaves
from tierlm.policies.eviction import Policy, TierInfo
from tierlm.policies.recency import Lru

BLOCK = 512  # tokens
NAMES = ["fifo", "lru", "lfu", "s3-fifo", "sieve", "arc", "leaves-lru", "leaves"]


def made(requests: int, seed: int) -> Iterator[dict[str, Any]]:
    """A day of a server: chats of several turns that begin with one of a few instructions; questions about documents,
    some much more popular than others; and prompts that come once."""
    draw, fresh = random.Random(seed), iter(range(10**9))
    instructions = [[next(fresh) for _ in range(draw.randint(1, 4))] for _ in range(6)]
    documents = [[next(fresh) for _ in range(draw.randint(4, 40))] for _ in range(200)]
    chats, now = list[list[int]](), 0
    for _ in range(requests):
        now += int(draw.expovariate(1 / 400))
        kind = draw.random()
        if kind < 0.5 and chats and draw.random() < 0.8:  # another turn, mostly of a recent chat
            chat = chats[-1 - min(int(draw.expovariate(1 / 12)), len(chats) - 1)]
            chat += [next(fresh) for _ in range(draw.randint(1, 3))]
            ids = list(chat)
        elif kind < 0.5:
            chats.append([*draw.choice(instructions), *(next(fresh) for _ in range(draw.randint(1, 4)))])
            ids = list(chats[-1])
        elif kind < 0.8:
            rank = min(int(draw.paretovariate(0.7)) - 1, len(documents) - 1)
            ids = [*documents[rank], next(fresh)]
        else:
            ids = [next(fresh) for _ in range(draw.randint(2, 30))]
        length = BLOCK * (len(ids) - 1) + draw.randint(1, BLOCK)
        yield {"timestamp": now, "input_length": length, "output_length": draw.randint(16, 800), "hash_ids": ids}


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def chain(ids: list[int]) -> list[BlockKey]:
    names = [b"", *(number.to_bytes(8, "big") for number in ids)]
    return [BlockKey(depth, names[depth + 1], names[depth]) for depth in range(len(ids))]


def hits(trace: list[dict[str, Any]], policy: Policy | None, capacity: int) -> float:
    """The share of the prompts' tokens that were found."""
    there, found, asked = set[BlockKey](), 0, 0
    for request in trace:
        keys = chain(request["hash_ids"])
        known = next((at for at, key in enumerate(keys) if key not in there), len(keys))
        asked += request["input_length"]
        found += min(known * BLOCK, request["input_length"] - 1)
        if policy is None:
            there.update(keys)
            continue
        for key in reversed(keys[:known]):
            policy.on_hit(key)
        own = set(keys)
        for key in keys[known:]:
            if key in there:
                continue
            if len(there) >= capacity:
                victim = next((one for one in policy.victims(key) if one not in own), None)
                if victim is None:
                    break
                policy.on_evict(victim)
                there.remove(victim)
            policy.on_insert(key)
            there.add(key)
        policy.on_turn_end(0)
    return found / asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", type=int, nargs="+", default=[250, 500, 1000, 2000, 4000], help="blocks")
    parser.add_argument("--policies", nargs="+", default=NAMES)
    parser.add_argument("--write", type=Path, help="save the made trace")
    arguments = parser.parse_args()
    trace = read(arguments.trace) if arguments.trace else list(made(arguments.requests, arguments.seed))
    if arguments.write:
        arguments.write.write_text("".join(json.dumps(request) + "\n" for request in trace))
    blocks = len({block for request in trace for block in request["hash_ids"]})
    bound = hits(trace, None, 0)
    print(f"{len(trace)} requests, {blocks} blocks; bound {bound:.1%}")
    print("blocks    " + "".join(f"{size:>9}" for size in arguments.sizes))
    kinds: dict[str, Callable[[TierInfo], Policy]] = {**POLICIES, "leaves": Leaves}
    kinds["leaves-lru"], table = partial(Leaves, order=Lru), {}
    for name in arguments.policies:
        table[name] = [hits(trace, kinds[name](TierInfo(1, size)), size) for size in arguments.sizes]
        print(f"{name:10}" + "".join(f"{share:9.1%}" for share in table[name]), flush=True)
    print(
        json.dumps({"requests": len(trace), "blocks": blocks, "bound": bound, "sizes": arguments.sizes, "hits": table})
    )


if __name__ == "__main__":
    main()
