"""What a decision costs: microseconds per demanded record, by policy and number of residents.

    python bench/decisions.py                                     # every policy, 100 to 10,000 slots

A synthetic run: 32 layers, 8 of n experts a token, popular ones more often; half of all records have a slot. The cache
fills before measuring. A policy's work once a layer is shared by the records of that layer. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from tierlm.policies import POLICIES, make_policy
from tierlm.policies.eviction import Policy, TierInfo
from tierlm.spec import ExpertKey

LAYERS, WIDTH = 32, 8


def chosen(experts: int, tokens: int) -> list[list[list[ExpertKey]]]:
    """Tokens of layers of keys, without replacement; the n-th expert of a layer has weight 1/n."""
    random = np.random.default_rng(0)
    keys = [[ExpertKey(layer, expert) for expert in range(experts)] for layer in range(LAYERS)]
    chances = np.log(1 / np.arange(1, experts + 1))
    scores = chances + random.gumbel(size=(tokens, LAYERS, experts))
    best = np.sort(np.argpartition(-scores, WIDTH, axis=2)[:, :, :WIDTH], axis=2)
    return [[[keys[layer][e] for e in ids] for layer, ids in enumerate(token)] for token in best.tolist()]


def drive(policy: Policy, tokens: list[list[list[ExpertKey]]], slots: int, resident: set[ExpertKey]) -> int:
    """Replay; returns the number of misses."""
    misses = 0
    for token in tokens:
        for needed in token:
            missing = []
            for key in needed:
                if key in resident:
                    policy.on_hit(key)
                else:
                    missing.append(key)
            misses += len(missing)
            for key in missing:
                if len(resident) == slots:
                    victim = next(other for other in policy.victims(key) if other not in needed)
                    policy.on_evict(victim)
                    resident.remove(victim)
                policy.on_insert(key)
                resident.add(key)
    return misses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--slots", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--tokens", type=int, default=50, help="measured tokens, after as many unmeasured")
    args = parser.parse_args()
    found: dict[str, dict[int, float]] = {name: {} for name in args.policies}
    for slots in args.slots:
        run = chosen(2 * slots // LAYERS, 2 * args.tokens)
        for name in args.policies:
            policy, resident = make_policy(name, TierInfo(LAYERS, slots)), set[ExpertKey]()
            drive(policy, run[: args.tokens], slots, resident)
            began = time.perf_counter()
            misses = drive(policy, run[args.tokens :], slots, resident)
            found[name][slots] = (time.perf_counter() - began) / (args.tokens * LAYERS * WIDTH) * 1e6
            print(
                f"{name:12} {slots:6} slots: {found[name][slots]:6.2f} us a demanded record, {misses} misses",
                flush=True,
            )
    print(json.dumps({"microseconds": found}))


if __name__ == "__main__":
    main()
