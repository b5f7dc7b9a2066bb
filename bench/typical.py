"""How far the cost model's typical hit rate is from that of recorded routing, under the policy ``cycle``.

    python bench/typical.py TRACE.jsonl --experts 256

A trace has one line a token, {"layers": [[experts of the first MoE layer], ...]}. For several shares of all experts,
the first tokens fill the slots and do not count. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tierlm.planning.routing import Skewed
from tierlm.policies import make_policy
from tierlm.policies.eviction import TierInfo
from tierlm.spec import ExpertKey

SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75)
WARM = 40  # tokens


def replayed(steps: list[list[list[int]]], slots: int) -> float:
    """The hit rate of the steps after the first WARM."""
    policy, resident = make_policy("cycle", TierInfo(len(steps[0]), slots)), set[ExpertKey]()
    hits = demanded = 0
    for number, step in enumerate(steps):
        for layer, experts in enumerate(step):
            needed = [ExpertKey(layer, expert) for expert in experts]
            there = [key for key in needed if key in resident]
            if number >= WARM:
                hits, demanded = hits + len(there), demanded + len(needed)
            for key in there:
                policy.on_hit(key)
            for key in (key for key in needed if key not in there):
                if len(resident) >= slots:
                    victim = next(key for key in policy.victims() if key not in needed)
                    resident.remove(victim)
                    policy.on_evict(victim)
                resident.add(key)
                policy.on_insert(key, demanded=True)
    return hits / demanded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--experts", type=int, required=True, help="of a layer")
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    steps = [json.loads(line)["layers"] for line in args.trace.read_text().splitlines()][: args.tokens]
    layers, chosen = len(steps[0]), len(steps[0][0])
    typical = Skewed(args.experts, chosen)
    table, rows = Table("slots, share of all", "hit rate", "typical", "uniform", title=args.trace.name), []
    for share in SHARES:
        found, prediction = replayed(steps, int(share * layers * args.experts)), typical.rate(share)
        rows.append({"share": share, "hit_rate": found, "typical": prediction})
        table.add_row(f"{share:.0%}", f"{found:.1%}", f"{prediction:.1%}", f"{share:.1%}")
    Console().print(table)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
