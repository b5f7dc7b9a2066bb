"""Decode of several sequences at once under a budget: measured, and beside it what the simulator and the plan predict.

    python bench/batch.py MODEL --ram 4GiB 16GiB --batch 1 2 4 8 16 32 --plot batch.png

Every case runs in its own process, in a memory cgroup of its budget's size where possible, and records its routing.
Sequences begin with different seeded ids. Prompts, a warm-up of WARM steps and the load are not counted. Each round
runs all cases, in the opposite order of the last round.

"Simulated": the recorded routing goes through the replay of the default policy, with the slots that the run had, and
its hits and distinct experts through the cost model; "plan" is the forecast of `tierlm plan --batch`, which knows
nothing of the run. Both use a profile of this machine: --profile FILE, from `tierlm profile --json`, or one that is
made first. --routing uniform suits checkpoints without skewed routing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from limited import available, run_case
from predict import profiled
from rich.console import Console
from rich.table import Table

from tierlm.config import parse_size
from tierlm.models.catalog import Catalog
from tierlm.models.outline import sizes_of, work_of
from tierlm.planning.cost import Machine, decode_seconds, streamed_bytes
from tierlm.planning.forecast import Question, forecast
from tierlm.profiling.profile import machine_of, read_profile
from tierlm.tracing.replay import find_misses, open_policy
from tierlm.tracing.traceforms import read_trace

PROMPT, WARM, CHUNK = 16, 8, 512
Numbers = dict[str, float]


def prompts_of(batch: int, vocab: int, seed: int) -> list[list[int]]:
    """``batch`` different prompts of PROMPT ids."""
    chance = random.Random(seed)
    return [[chance.randrange(5, min(30_000, vocab)) for _ in range(PROMPT)] for _ in range(batch)]


def context_of(case: dict[str, Any]) -> int:
    """Tokens of all sequences that are alive at once."""
    return int(case["batch"]) * (PROMPT + max(WARM, case["tokens"]) + 2)


def measure(case: dict[str, Any]) -> Numbers:
    """Run one case in this process. Its trace ends with the steps that count."""
    from tierlm import LLM, Budget, SamplingParams

    def tokens(count: int) -> SamplingParams:
        return SamplingParams(max_new_tokens=count, ignore_eos=True)

    options = {"context": context_of(case), "predictor": case["predictor"], "heat": False, "trace": case["trace"]}
    options |= {"ram_slots": case["slots"]}
    with LLM.load(case["model"], budget=Budget(case["ram"]), **options) as llm:
        prompts = prompts_of(case["batch"], llm.vocab, case["seed"])
        begun = llm.generate(prompts, tokens(WARM))
        before = llm.stats()
        llm.generate([result.ids[-1:] for result in begun], tokens(case["tokens"] + 1))
        after = llm.stats()
    made, seconds, stall, nbytes = (
        getattr(after.decode, name) - getattr(before.decode, name)
        for name in ("tokens", "seconds", "stall", "disk_bytes")
    )
    now, then = after.experts["ram"], before.experts["ram"]
    hits, late, misses = (getattr(now, name) - getattr(then, name) for name in ("hits", "late_hits", "misses"))
    return {
        "tokens_per_second": made / seconds,
        "bytes_per_token": nbytes / made,
        "hit_rate": (hits + late) / (hits + late + misses),
        "stall_share": stall / seconds,
        "slots": after.plan.ram.expert_slots,
        "process": after.plan.ram.parts["interpreter and libraries"],
        "peak_ram": after.peak_ram,
    }


def simulated(case: dict[str, Any], found: Numbers, machine: Machine) -> Numbers:
    """The last steps of the case's trace, replayed in its slots; their time by the cost model."""
    trace, slots = read_trace(Path(case["trace"])), int(found["slots"])
    counted = np.flatnonzero(~trace.demands.prefill)[-case["tokens"] :]
    missed = find_misses(trace, open_policy("default", trace, slots), slots).counts[counted].sum()
    needed, batch = trace.demands.counts[counted], case["batch"]
    catalog = Catalog(Path(case["model"]))
    work, sizes = work_of(catalog), sizes_of(catalog, context_of(case), CHUNK, 4)
    hits, used = 1 - float(missed / needed.sum()), float(needed.mean())
    plan = forecast(sizes, work, machine, _question(case, found)).plan
    step = decode_seconds(
        work, machine, (hits, hits), streamed_bytes(plan, sizes.trunk), case["tokens"] // 2, batch, used
    )
    return {
        "simulated": batch / step.total,
        "simulated_bytes": step.disk_bytes / batch,
        "simulated_hit_rate": hits,
        "used": used,
        "simulated_compute_share": step.compute / step.total,
    }


def planned(case: dict[str, Any], found: Numbers, machine: Machine) -> Numbers:
    """The forecast for the case, which knows only the memory of the process."""
    catalog = Catalog(Path(case["model"]))
    work, sizes = work_of(catalog), sizes_of(catalog, context_of(case), CHUNK, 4)
    answer = forecast(sizes, work, machine, _question(case, found))
    speed = answer.worst if case["routing"] == "uniform" else answer.typical
    return {
        "planned": speed.decode,
        "planned_bytes": speed.step.disk_bytes / case["batch"],
        "planned_hit_rate": speed.hit_rate,
        "planned_used": speed.used,
    }


def _question(case: dict[str, Any], found: Numbers) -> Question:
    ram, context = parse_size(case["ram"]), context_of(case)
    return Question(ram, None, context, case["tokens"] // 2, CHUNK, int(found["process"]), case["batch"])


def draw(file: Path, title: str, rows: list[dict[str, Any]]) -> None:
    """Tokens/s and bytes a token against the batch, a colour for each budget; points are measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speeds, read) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
    batches = sorted({row["batch"] for row in rows})
    for ram, colour in zip(dict.fromkeys(row["ram"] for row in rows), colours, strict=False):
        mine = [row for row in rows if row["ram"] == ram]
        sizes = [row["batch"] for row in mine]
        for axes, measured, unit in ((speeds, "tokens_per_second", 1.0), (read, "bytes_per_token", 1e-6)):
            predictions = ("simulated", "planned") if axes is speeds else ("simulated_bytes", "planned_bytes")
            for name, style, label in zip(
                (measured, *predictions), ("o-", "--", ":"), ("measured", "simulated", "plan"), strict=True
            ):
                values = [unit * row[name] for row in mine]
                axes.plot(sizes, values, style, color=colour, markersize=5, label=f"{ram}, {label}")
    for axes, unit in ((speeds, "tokens/s, all sequences"), (read, "MB a token from disk")):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="sequences", ylabel=unit, ylim=(0, None))
        axes.set_xticks(batches, map(str, batches))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    speeds.legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.savefig(file, dpi=150)


def table_of(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, caption="measured / simulated / plan", caption_justify="left")
    columns = (
        "ram",
        "batch",
        "tokens/s",
        "simulated off by",
        "a sequence's",
        "MB/token",
        "hit rate %",
        "experts a layer",
    )
    for column in (*columns, "stalled %"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["ram"],
            str(row["batch"]),
            f"{row['tokens_per_second']:.2f} / {row['simulated']:.2f} / {row['planned']:.2f}",
            f"{row['simulated'] / row['tokens_per_second'] - 1:+.0%}",
            f"{row['tokens_per_second'] / row['batch']:.2f}",
            " / ".join(f"{row[n] / 1e6:.0f}" for n in ("bytes_per_token", "simulated_bytes", "planned_bytes")),
            " / ".join(f"{100 * row[n]:.0f}" for n in ("hit_rate", "simulated_hit_rate", "planned_hit_rate")),
            f"{row['used']:.1f} / {row['planned_used']:.1f}",
            f"{100 * row['stall_share']:.0f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--ram", nargs="+", default=["4GiB"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--slots", type=int, help="fewer expert slots than the budget allows")
    parser.add_argument("--predictor", default="none")
    parser.add_argument("--tokens", type=int, default=32, help="of each sequence, counted")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--routing", choices=("typical", "uniform"), default="typical")
    parser.add_argument("--profile", type=Path, help="rates of this machine, from `tierlm profile --json`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="draw both against the batch to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(json.loads(args.one))))
        return
    from tierlm.checkpoints.hub import find_model

    model = find_model(args.model)
    profile = read_profile(args.profile) if args.profile else profiled(model)
    machine, in_cgroup = machine_of(profile, vram=False), available()
    fixed = {"model": str(model), "slots": args.slots, "tokens": args.tokens, "seed": args.seed}
    fixed |= {"predictor": args.predictor, "routing": args.routing}
    cases = [{"ram": ram, "batch": batch} for ram, batch in itertools.product(args.ram, args.batch)]
    results: list[list[Numbers]] = [[] for _ in cases]
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            order = list(zip(cases, results, strict=True))
            for case, runs in reversed(order) if turn % 2 else order:
                whole = fixed | case | {"trace": f"{folder}/trace.npz"}
                command = [sys.executable, __file__, "--one", json.dumps(whole)]
                found = run_case(command, parse_size(case["ram"]) if in_cgroup else None)
                runs.append(found | simulated(whole, found, machine) | planned(whole, found, machine))
                told = f"{found['tokens_per_second']:.2f} tokens/s, simulated {runs[-1]['simulated']:.2f}"
                print(f"round {turn + 1} {case}: {told}", file=sys.stderr, flush=True)
    rows = [
        case | {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for case, runs in zip(cases, results, strict=True)
    ]
    title = f"{model.name}: {args.rounds} rounds, {args.tokens} tokens of each sequence, {profile.processor}"
    console = Console(width=170)
    console.print(table_of(title, rows))
    errors = [abs(row["simulated"] / row["tokens_per_second"] - 1) for row in rows]
    console.print(f"simulated tokens/s are off by {statistics.median(errors):.0%} (median), {max(errors):.0%} at most")
    if args.plot:
        draw(args.plot, f"{model.name}: sequences that decode together", rows)
    print(json.dumps({"cgroup": in_cgroup, "processor": profile.processor, "fixed": fixed, "cases": rows}))


if __name__ == "__main__":
    main()
