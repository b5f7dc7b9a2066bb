"""Eviction policies and predictors over a trace: hit rate by cache size, regret against Belady, simulated tokens/s.

    python bench/policies.py                                          # the demo model's trace
    python bench/policies.py --trace trace.jsonl --figures /tmp/figures
    python bench/policies.py --trace one.jsonl other.npz@20000:20600     # several, one in part; and their average
    python bench/policies.py --trace long.npz --predictors --policies belady lru fifo clock   # compiled, fast

The cache starts empty, and its first misses count. Every pair of policy and size runs in its own process. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from blocks import read_block, title
from rich.console import Console
from rich.table import Table

from tierlm.policies import DEFAULT, POLICIES
from tierlm.policies.predictors import PREDICTORS, make_predictor
from tierlm.tracing.foresight import Foresight, foresee
from tierlm.tracing.link import Speed
from tierlm.tracing.replay import open_policy
from tierlm.tracing.simulate import Simulated, simulate
from tierlm.tracing.timing import Rates
from tierlm.tracing.trace import Trace

DEMO = str(Path(__file__).parent / "traces" / "demo.npz")
FRACTIONS = [0.05, 0.1, 0.2, 0.3, 0.5]
RECORD = 8 * 2**20  # bytes of an expert if the trace does not say


def slots_of(trace: Trace, fraction: float) -> int:
    return max(trace.experts.shape[2], round(trace.records * fraction))


def run(job: tuple[str, str, str, float]) -> tuple[Simulated, float]:
    """One policy and predictor at one size on a machine with a disk of 1.4 GB/s and experts computed at 10 GB/s; and
    the seconds that the simulation took."""
    block, policy, predictor, fraction = job
    trace = read_block(block, scores=True)
    record = trace.info.record_bytes or RECORD
    machine = Rates(record, Speed(1.4e9, 1e-4, 8), layer_seconds=5e-4, expert_seconds=record / 10e9)
    slots = slots_of(trace, fraction)
    predictions = make_predictor(predictor, trace.experts.shape[2])
    began = time.perf_counter()
    found = simulate(trace, open_policy(policy, trace, slots), predictions, slots, machine)
    return found, time.perf_counter() - began


def foretell(job: tuple[str, str]) -> list[Foresight]:
    block, predictor = job
    trace = read_block(block, scores=True)
    chosen = trace.experts.shape[2]
    return foresee(trace, make_predictor(predictor, chosen), [chosen, 2 * chosen])


def usable(trace: Trace) -> list[str]:
    """Predictors that this trace supports."""
    return [name for name, kind in PREDICTORS.items() if trace.predictions is not None or not kind.gates]


def show_hits(hits: dict[str, list[float]], fractions: list[float], console: Console) -> None:
    """One row a policy, the best first; gap: share of the gap from lru to belady closed, on average over the sizes."""
    table = Table(title="hit rate at a share of the experts in the cache; gap from lru to belady closed")
    for heading in ["policy", *(f"{fraction:.0%}" for fraction in fractions), "gap closed"]:
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for name in sorted(hits, key=lambda name: -sum(hits[name])):
        table.add_row(name, *(f"{rate:.1%}" for rate in hits[name]), f"{gap_closed(hits, name):.0%}")
    console.print(table)


def gap_closed(hits: dict[str, list[float]], name: str) -> float:
    shares = [
        (rate - low) / (high - low)
        for rate, low, high in zip(hits[name], hits["lru"], hits["belady"], strict=True)
        if high > low
    ]
    return sum(shares) / max(1, len(shares))


def show_predictors(found: dict[str, list[Foresight]], runs: dict[str, Simulated], console: Console) -> None:
    table = Table(title="predictors: recall and precision of the first m, and what they make of a run at a quarter")
    for heading in ("predictor", "ahead", "m", "recall", "precision", "tokens/s", "waited", "bytes a token"):
        table.add_column(heading, justify="left" if heading == "predictor" else "right")
    for name, rows in found.items():
        result = runs[name]
        bytes_read = f"{result.bytes_read / result.tokens / 2**20:.2f} MiB"
        last = [f"{result.tokens_per_second:.2f}", f"{result.stall_seconds / result.seconds:.0%}", bytes_read]
        for row in rows or [None]:
            figures = (
                ["-"] * 4 if row is None else [str(row.ahead), str(row.m), f"{row.recall:.1%}", f"{row.precision:.1%}"]
            )
            table.add_row(name, *figures, *last)
            name, last = "", ["", "", ""]
    console.print(table)


def show_gaps(gaps: dict[str, dict[str, float]], console: Console) -> None:
    """One row a policy: the gap closed on each trace, and on average; the best first."""
    table = Table(title="gap from lru to belady closed")
    for heading in ["policy", *map(title, gaps), "average"]:
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for name, mean in sorted(average(gaps).items(), key=lambda item: -item[1]):
        table.add_row(name, *(f"{gap[name]:.1%}" for gap in gaps.values()), f"{mean:.1%}")
    console.print(table)


def average(gaps: dict[str, dict[str, float]]) -> dict[str, float]:
    """Over the traces, by policy."""
    rows = list(gaps.values())
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def compare(block: str, args: argparse.Namespace, pool: ProcessPoolExecutor, console: Console) -> dict[str, Any]:
    """All policies, sizes and predictors on one trace: prints tables, draws figures, and returns the report."""
    trace = read_block(block, scores=True)
    pairs = list(product(args.policies, args.fractions))
    began = time.perf_counter()
    jobs = [(block, name, "none", fraction) for name, fraction in pairs]
    counted = dict(zip(pairs, pool.map(run, jobs), strict=True))
    counting = time.perf_counter() - began
    names = usable(trace) if args.predictors is None else args.predictors
    runs = dict(zip(names, pool.map(run, [(block, "default", name, 0.25) for name in names]), strict=True))
    foresights = dict(zip(names, pool.map(foretell, [(block, name) for name in names]), strict=True))
    hits = {name: [counted[name, fraction][0].hit_rate for fraction in args.fractions] for name in args.policies}
    speeds = {name: [counted[name, f][0].tokens_per_second for f in args.fractions] for name in args.policies}
    console.print(
        f"{title(block)}: {trace.info.model}, {len(trace)} tokens, {trace.records} experts, cold start included"
    )
    show_hits(hits, args.fractions, console)
    if names:
        show_predictors(foresights, {name: result for name, (result, _) in runs.items()}, console)
    demands = sum(result.demanded for result, _ in counted.values())
    spent = sum(seconds for _, seconds in counted.values())
    console.print(f"{len(pairs)} replays in {counting:.1f} s: {spent / demands * 1e6:.2f} us a demand and process")
    if args.figures is not None:
        import figures

        folder = args.figures if len(args.trace) == 1 else args.figures / title(block).replace(" ", "-")
        shown = {name: speeds[name] for name in ("belady", DEFAULT, "lru") if name in speeds}
        figures.draw(folder, trace, title(block), args.fractions, hits, shown)
    report: dict[str, Any] = {"tokens": len(trace), "fractions": args.fractions, "hit_rate": hits}
    report |= {"gap_closed": {name: gap_closed(hits, name) for name in hits}, "tokens_per_second": speeds}
    report["seconds"] = {name: sum(counted[name, f][1] for f in args.fractions) for name in args.policies}
    report["predictors"] = {name: [asdict(row) for row in rows] for name, rows in foresights.items()}
    report["runs"] = {name: result.as_json() | {"took": took} for name, (result, took) in runs.items()}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", nargs="+", default=[DEMO], metavar="FILE[@START:STOP]")
    parser.add_argument("--policies", nargs="+", default=["belady", *POLICIES])
    parser.add_argument("--fractions", nargs="+", type=float, default=FRACTIONS)
    parser.add_argument("--predictors", nargs="*", help="default: all that the trace supports; nothing: none")
    parser.add_argument("--figures", type=Path, help="a folder for PNGs")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    for needed in ("lru", "belady"):
        if needed not in args.policies:
            args.policies.append(needed)
    console = Console()
    with ProcessPoolExecutor(args.jobs) as pool:
        reports = {block: compare(block, args, pool, console) for block in args.trace}
    gaps = {block: report["gap_closed"] for block, report in reports.items()}
    if len(gaps) > 1:
        show_gaps(gaps, console)
    print(json.dumps({"traces": reports, "gap_closed": average(gaps)}))


if __name__ == "__main__":
    sys.exit(main())
